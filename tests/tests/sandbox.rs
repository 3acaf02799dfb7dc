//! The sandbox around tiny guests: what a running monitor still may, seen from outside.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use halyard_tests::confined::Confined;
use halyard_tests::tiny::{Running, Tiny, binary, debug_exit, guest, kvm, run_halyard};
use tempfile::TempDir;

const DEADLINE: Duration = Duration::from_secs(30);

/// The flag of a descriptor that is closed on exec, in `/proc/PID/fdinfo`.
const CLOSED_ON_EXEC: u32 = 0o2_000_000;

/// A folder with two disks.
fn disks() -> (TempDir, Vec<PathBuf>) {
    let folder = tempfile::tempdir().unwrap();
    let disks: Vec<PathBuf> = ["first", "second"].map(|name| folder.path().join(name)).into();
    for disk in &disks {
        let mut content = b"Once upon a time\0".to_vec();
        content.resize(8192, 0);
        fs::write(disk, content).unwrap();
    }
    (folder, disks)
}

/// A guest that says that it is ready, and ends at the letter q.
fn waiting(args: &[&str]) -> Option<Running> {
    let mut running = Tiny::new("commands")?.args(["--memory", "64M"]).args(args).start();
    running.wait_for("ready\n");
    Some(running)
}

fn quit(mut running: Running) {
    running.send(b"q");
    running.finish().expect_code(debug_exit(7));
}

/// Fields of `/proc/PID/…/status`, as long as there is one.
fn status(path: &Path) -> Option<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).ok()?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Some(fields.map(|(name, value)| (name.to_owned(), value.trim().to_owned())).collect())
}

/// Waits until the threads of a process with two vCPUs are `expected` beside those and its own, by name, and each has a
/// filter; gives their status.
///
/// # Panics
/// Where they are not in time.
fn confined_threads(running: &Running, expected: &[&str]) -> Vec<BTreeMap<String, String>> {
    let program = binary().file_name().unwrap().to_str().unwrap().to_owned();
    let mut expected =
        [&["CPU 0/KVM", "CPU 1/KVM", "console-io", &program[..program.len().min(15)]], expected].concat();
    expected.sort_unstable();
    let folder = format!("/proc/{}/task", running.pid());
    let end = std::time::Instant::now() + DEADLINE;
    loop {
        let tasks = fs::read_dir(&folder).unwrap().map(|task| task.unwrap().path().join("status"));
        // One that ends meanwhile has no status: the thread that unpacks the kernel.
        let mut threads: Vec<_> = tasks.filter_map(|path| status(&path)).collect();
        // A thread of the kernel's own, for its huge pages.
        threads.retain(|thread| !thread["Name"].starts_with("kvm-"));
        threads.sort_by(|one, other| one["Name"].cmp(&other["Name"]));
        // The guest runs before the owner and the consoles have come to their loops, and a thread that has just been
        // made has its parent's name.
        let named = threads.iter().map(|thread| thread["Name"].as_str()).eq(expected.iter().copied());
        if named && threads.iter().all(|thread| thread["Seccomp"] == "2") {
            return threads;
        }
        assert!(std::time::Instant::now() < end, "not {expected:?}: {threads:#?}");
        std::thread::yield_now();
    }
}

/// The workers of what `everything` has beside disks.
const CONSOLES_AND_RNG: [&str; 5] = ["io-console0", "io-console1", "io-console2", "io-console3", "io-rng0"];

/// Every device that there is, on every sort of endpoint.
fn everything(folder: &TempDir, disks: &[PathBuf]) -> Vec<String> {
    let path = |name: &str| folder.path().join(name).display().to_string();
    let socket = format!("socket={}", path("socket"));
    let file = format!("file={}", path("log"));
    let mut args = vec!["--rng".to_owned(), "--cpus".into(), "2".into()];
    for console in [&socket, &file, "pty", "off"] {
        args.extend(["--console".into(), console.to_owned()]);
    }
    for disk in disks {
        args.extend(["--disk".into(), format!("{},queues=2", disk.display())]);
    }
    args
}

#[test]
fn every_thread_has_a_filter_and_no_capability() {
    let (folder, disks) = disks();
    let args = everything(&folder, &disks);
    let Some(running) = waiting(&args.iter().map(String::as_str).collect::<Vec<_>>()) else { return };
    let workers = [&CONSOLES_AND_RNG[..], &["io-disk0", "io-disk0", "io-disk1", "io-disk1"]].concat();
    let threads = confined_threads(&running, &workers);
    for thread in &threads {
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(thread[set], "0000000000000000", "{set} of {thread:?}");
        }
        assert_eq!(thread["NoNewPrivs"], "1", "{thread:?}");
    }
    let limits = fs::read_to_string(format!("/proc/{}/limits", running.pid())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    quit(running);
    assert!(!folder.path().join("socket").exists(), "a socket is removed at the end");
}

#[test]
fn a_sandbox_that_is_off_says_loudly_what_is_lost() {
    let Some(running) = waiting(&["--sandbox", "off", "--core-dumps"]) else { return };
    let status = status(Path::new(&format!("/proc/{}/status", running.pid()))).unwrap();
    assert_eq!((status["Seccomp"].as_str(), status["NoNewPrivs"].as_str()), ("0", "0"));
    let mut running = running;
    running.send(b"q");
    let run = running.finish().expect_code(debug_exit(7));
    run.expect_messages(&["THE SANDBOX IS OFF", "system call", "file", "capabilities"]);
    let refused = run_halyard(["run", "--kernel", "k", "--sandbox", "maybe"]).expect_code(2);
    refused.expect_messages(&["--sandbox maybe: «maybe» is not possible; known: on, off, log"]);
}

/// The descriptors of a process beyond the standard streams: each with its flags and what it leads to.
fn descriptors(pid: u32) -> BTreeMap<u32, (u32, PathBuf)> {
    let numbers = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap().map(|entry| entry.unwrap().file_name());
    let of = |number: u32| {
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{number}")).ok()?;
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim();
        let target = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap_or_default();
        Some((number, (u32::from_str_radix(flags, 8).unwrap(), target)))
    };
    numbers.filter_map(|number| of(number.to_str()?.parse().ok()?)).filter(|(number, _)| *number > 2).collect()
}

#[test]
fn no_descriptor_outlives_an_exec_and_those_that_nobody_claims_are_closed() {
    if !kvm() {
        return;
    }
    let (folder, disks) = disks();
    let mut command = Command::new(env!("CARGO_BIN_EXE_with-descriptors"));
    for disk in &disks {
        command.arg("--file").arg(disk);
    }
    command.arg("--").arg(binary()).arg("run").arg("--kernel").arg(guest("commands"));
    command.args(["--memory", "64M", "--debug-exit", "--disk", "fd=4"]).args(everything(&folder, &[]));
    let mut running = Running::start(command, DEADLINE);
    running.wait_for("ready\n");
    confined_threads(&running, &[&CONSOLES_AND_RNG[..], &["io-disk0"]].concat());
    let open = descriptors(running.pid());
    assert!(open.len() > 10, "{open:?}");
    let inherited: Vec<_> = open.iter().filter(|(_, (flags, _))| flags & CLOSED_ON_EXEC == 0).collect();
    assert!(inherited.is_empty(), "a program that is started would get {inherited:?}");
    let leads_to = |path: &Path| open.values().any(|(_, target)| target == path);
    assert!(leads_to(&disks[1]), "the disk that was named: {open:?}");
    assert!(!leads_to(&disks[0]), "the disk that was not: {open:?}");
    quit(running);
}

#[test]
fn it_runs_as_another_user_in_a_read_only_root_on_descriptors_alone() {
    if !kvm() {
        return;
    }
    if !nix::unistd::Uid::effective().is_root() {
        eprintln!("skipped: only root can make the root file system");
        return;
    }
    let (_folder, disks) = disks();
    let root = tempfile::tempdir().unwrap();
    let confined = |name: &str, args: &[&str]| {
        let mut confined = Confined {
            root: root.path().display().to_string(),
            helper: env!("CARGO_BIN_EXE_with-descriptors").into(),
            halyard: binary().display().to_string(),
            files: vec![(guest(name).display().to_string(), "kernel".into())],
            descriptors: vec!["--file".into(), disks[0].display().to_string()],
            ..Confined::default()
        };
        let fixed = ["run", "--kernel", "/kernel", "--memory", "64M", "--debug-exit", "--disk", "fd=3"];
        confined.arguments = fixed.iter().chain(args).map(ToString::to_string).collect();
        let words = confined.command();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        Running::start(command, DEADLINE)
    };

    let mut running = confined("commands", &["--rng", "--console", "off", "--cpus", "2"]);
    running.wait_for("ready\n");
    for thread in confined_threads(&running, &["io-console0", "io-disk0", "io-rng0"]) {
        assert_eq!(thread["Uid"].split_whitespace().collect::<Vec<_>>(), ["107"; 4]);
        assert_eq!((thread["CapPrm"].as_str(), thread["Groups"].as_str()), ("0000000000000000", ""));
    }
    // The machine is made anew with what is open.
    for _ in 0..3 {
        running.send(b"r");
        running.wait_for("ready\n");
    }
    quit(running);

    let run = confined("blk", &[]).finish().expect_code(debug_exit(0));
    assert!(run.output().contains("Once upon a time"), "{run}");
}
