//! Opening KVM where it is missing, forbidden or something else: what the user is told.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use hal::Error;
use hal::kvm::Kvm;
use nix::unistd::{Uid, setfsuid};

#[test]
fn a_missing_device_is_named_with_the_remedy() {
    let error = Kvm::open_at(Path::new("/dev/kvm-that-is-missing")).unwrap_err();
    assert!(matches!(error, Error::NoHypervisor { .. }), "{error}");
    let message = error.to_string();
    for part in ["/dev/kvm-that-is-missing does not exist", "kvm_intel or kvm_amd", "firmware", "device plugin"] {
        assert!(message.contains(part), "{part}: {message}");
    }
}

#[test]
fn a_file_that_is_something_else_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let message = Kvm::open_at(file.path()).unwrap_err().to_string();
    assert!(message.contains("is not the KVM device"), "{message}");
    let directory = tempfile::tempdir().unwrap();
    let message = Kvm::open_at(directory.path()).unwrap_err().to_string();
    assert!(message.contains("is a directory"), "{message}");
}

#[test]
fn a_device_without_permission_is_named_with_the_remedy() {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
    let path = file.path().to_path_buf();
    // On a thread of its own that opens files as nobody, which costs root its privilege over files, too.
    let opened = std::thread::spawn(move || {
        setfsuid(Uid::from_raw(65534));
        Kvm::open_at(&path)
    });
    let error = match opened.join().unwrap() {
        Err(Error::Unusable { .. }) => {
            eprintln!("skipped: this user cannot act as another, and may open its own files");
            return;
        }
        other => other.unwrap_err(),
    };
    assert!(matches!(error, Error::NotPermitted { .. }), "{error}");
    let message = error.to_string();
    assert!(message.contains("no permission to open") && message.contains("group"), "{message}");
}
