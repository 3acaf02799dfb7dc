//! The walls, run against. What a process gives up it never gets back, so each case is a process of its own: this test
//! program once more, told by [`CASE`] what to do.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};

use super::*;

/// Names the case that [`child`] is to carry out.
const CASE: &str = "HALYARD_TEST_CASE";

/// Carries out a case in a process of its own, in `folder`.
fn in_process(case: &str, folder: &Path) -> Output {
    let program = std::env::current_exe().unwrap();
    let child = ["--exact", "sandbox::tests::child", "--ignored", "--nocapture", "--test-threads=1"];
    Command::new(program).args(child).env(CASE, case).current_dir(folder).output().unwrap()
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// What the cases of [`in_process`] do.
#[test]
#[ignore = "the other tests start it"]
fn child() {
    let case = std::env::var(CASE).expect("the other tests start it");
    match case.as_str() {
        "paths" => paths(),
        "rights" => rights(),
        "dumps" => dumps(),
        "quotes" => crate::quotes::tests::with_the_sandbox(),
        _ => {}
    }
    let mut words = case.split(' ');
    let (Some(mode), Some(kind), Some(call)) = (words.next(), words.next(), words.next()) else { return };
    begin(if mode == "log" { Mode::Log } else { Mode::On }, Vec::new()).unwrap();
    confine(&[]).unwrap();
    let kind = Thread::ALL.into_iter().find(|thread| thread.name() == kind).unwrap();
    let call: libc::c_long = call.parse().unwrap();
    let work = move || {
        enter(kind);
        forbidden(call);
        println!("it went on");
    };
    std::thread::Builder::new().name(format!("test-{}", kind.name())).spawn(work).unwrap().join().unwrap();
}

/// Calls that are not on every list, made with arguments with which they can do no harm.
const FORBIDDEN: [(&str, libc::c_long); 6] = [
    ("execve", libc::SYS_execve),
    ("ptrace", libc::SYS_ptrace),
    ("ioctl", libc::SYS_ioctl),
    ("mprotect", libc::SYS_mprotect),
    ("kill", libc::SYS_kill),
    ("getppid", libc::SYS_getppid),
];

#[expect(unsafe_code, reason = "system calls by their numbers")]
fn forbidden(call: libc::c_long) {
    // An ioctl with the request TIOCSTI, no memory to be made executable, signal 0 to nobody.
    let args: [usize; 3] = match call {
        libc::SYS_ioctl => [usize::MAX, 0x5412, 0],
        libc::SYS_mprotect => [0, 0, 4],
        libc::SYS_kill => [usize::MAX >> 1, 0, 0],
        _ => [usize::MAX, 0, 0],
    };
    // SAFETY: no memory is named that the kernel would write to.
    unsafe { libc::syscall(call, args[0], args[1], args[2]) };
}

#[test]
fn a_forbidden_call_ends_the_process_with_its_name_in_the_log() {
    let folder = folder();
    for thread in Thread::ALL {
        for (name, number) in FORBIDDEN {
            let kind = thread.name();
            let output = in_process(&format!("on {kind} {number}"), folder.path());
            let said = String::from_utf8_lossy(&output.stderr);
            let place = format!("{kind}, {name}: {output:?}");
            assert_eq!(output.status.code(), Some(EXIT_CODE), "{place}");
            let expected = format!("sandbox: thread «test-{kind}» made the system call {name} ({number}");
            assert!(said.contains(&expected) && said.contains(&format!("the policy «{kind}»")), "{place}");
        }
    }
}

#[test]
fn in_the_mode_that_only_logs_the_call_is_done() {
    let folder = folder();
    let (_, number) = FORBIDDEN[5];
    let output = in_process(&format!("log vcpu {number}"), folder.path());
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("it went on"), "{output:?}");
}

#[test]
fn paths_that_were_not_granted_are_refused() {
    let folder = folder();
    for name in ["granted", "other"] {
        fs::create_dir(folder.path().join(name)).unwrap();
        for file in ["file", "socket"] {
            fs::write(folder.path().join(name).join(file), "secret").unwrap();
        }
    }
    fs::write(folder.path().join("top"), "secret").unwrap();
    let output = in_process("paths", folder.path());
    assert!(output.status.success(), "{output:?}");
}

/// The version of Landlock that this kernel has, or less than 1.
#[expect(unsafe_code, reason = "a question that no wrapper asks")]
fn landlock_abi() -> i64 {
    const VERSION: u32 = 1;
    // SAFETY: with this flag the call takes no attributes.
    unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0_usize, VERSION) }
}

fn paths() {
    begin(Mode::On, vec![Grant { path: "granted".into(), access: Access::Use }]).unwrap();
    confine(&[Grant::removal(Path::new("other/socket"))]).unwrap();
    let refused = |result: io::Result<()>, what: &str| {
        let error = result.expect_err(what);
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied, "{what}: {error}");
    };
    if landlock_abi() < 1 {
        println!("skipped: this kernel has no Landlock");
        return;
    }
    assert_eq!(fs::read("granted/file").unwrap(), b"secret");
    UnixListener::bind("granted/new").unwrap();
    refused(File::open("other/file").map(drop), "a file that was not granted");
    refused(File::open("/etc/hostname").map(drop), "a file of the system's");
    refused(fs::write("other/new", ""), "a new file");
    refused(UnixListener::bind("other/new").map(drop), "a new socket");
    refused(fs::remove_file("top"), "a removal");
    fs::remove_file("other/socket").unwrap();
    refused(Command::new("/bin/true").status().map(drop), "a program");
    if landlock_abi() >= 4 {
        refused(TcpListener::bind("127.0.0.1:0").map(drop), "a TCP port");
    }
}

/// The lines of /proc/self/status, read through a descriptor that was opened before.
fn status(file: &mut File) -> impl Fn(&str) -> String + use<> {
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    move |name| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.unwrap_or_default().trim().to_owned()
    }
}

#[test]
fn capabilities_and_new_privileges_are_given_up() {
    let output = in_process("rights", folder().path());
    assert!(output.status.success(), "{output:?}");
}

fn rights() {
    begin(Mode::On, Vec::new()).unwrap();
    let mut file = File::open("/proc/thread-self/status").unwrap();
    confine(&[]).unwrap();
    let own = status(&mut file);
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(own(set), "0000000000000000", "{set}");
    }
    assert_eq!((own("NoNewPrivs").as_str(), own("Seccomp").as_str()), ("1", "0"));
    enter(Thread::Owner);
    assert_eq!(status(&mut file)("Seccomp"), "2");
}

#[test]
fn the_quote_service_is_asked_from_inside() {
    let output = in_process("quotes", folder().path());
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn core_dumps_are_forbidden() {
    let output = in_process("dumps", folder().path());
    assert!(output.status.success(), "{output:?}");
}

fn dumps() {
    assert!(nix::sys::prctl::get_dumpable().unwrap());
    forbid_core_dumps().unwrap();
    assert!(!nix::sys::prctl::get_dumpable().unwrap());
    let limits = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_CORE).unwrap();
    assert_eq!(limits, (0, 0));
}
