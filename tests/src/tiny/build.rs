//! Assembles and links guests, by binutils, into `target/tiny-guests`.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The root of the workspace.
pub fn workspace() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().expect("the crate lies in the workspace").to_path_buf()
}

/// The ELF file of the guest `tests/guests/NAME.S`, made where it is not there yet.
///
/// Its name holds a hash of all sources in that directory, so a stale one is never found; and it appears by a rename,
/// so that tests may run side by side.
///
/// # Panics
/// Where the source is missing or has errors, or binutils are not installed.
pub fn guest(name: &str) -> PathBuf {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let source = sources.join(format!("{name}.S"));
    assert!(source.is_file(), "there is no guest {}", source.display());
    let cache = workspace().join("target/tiny-guests");
    let elf = cache.join(format!("{name}-{:016x}", hash(&sources)));
    if elf.is_file() {
        return elf;
    }
    fs::create_dir_all(&cache).unwrap_or_else(|error| panic!("{}: {error}", cache.display()));
    let work = tempfile::tempdir_in(&cache).expect("a directory to build the guest in");
    let (object, linked) = (work.path().join("object"), work.path().join("guest"));
    tool("as", [OsStr::new("--64"), "-I".as_ref(), sources.as_ref(), "-o".as_ref(), object.as_ref(), source.as_ref()]);
    let script = sources.join("guest.ld");
    // One page size for the file's layout, so that it is small, and one segment with all rights, as the script says.
    let flags = ["-m", "elf_x86_64", "-z", "max-page-size=4096", "--no-warn-rwx-segments", "-T"].map(OsStr::new);
    let files = [script.as_os_str(), "-o".as_ref(), linked.as_ref(), object.as_ref()];
    tool("ld", flags.into_iter().chain(files));
    fs::rename(&linked, &elf).unwrap_or_else(|error| panic!("{}: {error}", elf.display()));
    elf
}

/// A hash of all files in `directory`, with their names.
fn hash(directory: &Path) -> u64 {
    let listing = fs::read_dir(directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
    let mut files: Vec<PathBuf> = listing.map(|entry| entry.expect("a directory entry").path()).collect();
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display())).hash(&mut hasher);
    }
    hasher.finish()
}

fn tool<'a>(program: &str, args: impl IntoIterator<Item = &'a OsStr>) {
    let output = Command::new(program).args(args).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (of binutils): {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}
