//! The harness itself: hosts, the agent in them, and what a test is told when something dies.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use halyard_tests::{Client, Cmd, Host, HostSpec, Kernel, Kind, Status, VmSpec, images};

const MIB: usize = 1 << 20;

/// This machine itself: the agent's own tests need no other.
fn here() -> Host {
    Host::start(&HostSpec::new().kind(Kind::Direct)).unwrap()
}

/// Bytes of every kind, in no order (xorshift).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn commands_run(host: &Host) {
    let output = host.run("echo out; echo err >&2; exit 7").unwrap();
    assert_eq!(output.status, Status::Exited(7));
    assert_eq!((output.stdout, output.stderr), (b"out\n".to_vec(), b"err\n".to_vec()));
    let failure = host.run("echo why >&2; false").unwrap().ok().unwrap_err().to_string();
    assert!(failure.contains("exit code 1") && failure.contains("why"), "{failure}");
    let place = Cmd::new("sh").args(["-c", "pwd; echo $COLOUR"]).folder("/usr").env("COLOUR", "blue");
    assert_eq!(host.run(place).unwrap().ok().unwrap(), "/usr\nblue");
    let missing = format!("{:#}", host.run(Cmd::new("no-such-program")).unwrap_err());
    assert!(missing.contains("cannot start `no-such-program`") && missing.contains("No such file"), "{missing}");
}

fn processes_run_side_by_side(host: &Host) {
    let first = host.spawn("while read -r line; do echo \"first $line\"; done; echo done").unwrap();
    let second = host.spawn("while read -r line; do echo \"second $line\"; done").unwrap();
    for number in 0..10 {
        second.write(format!("{number}\n").as_bytes()).unwrap();
        first.write(format!("{number}\n").as_bytes()).unwrap();
        assert_eq!(first.wait_line("first").unwrap(), format!("first {number}"));
        assert_eq!(second.wait_line("second").unwrap(), format!("second {number}"));
    }
    first.close_input().unwrap();
    first.wait_line("done").unwrap();
    assert_eq!(first.wait().unwrap(), Status::Exited(0));
    assert_eq!(second.status(), None);
    second.kill(9).unwrap();
    assert_eq!(second.wait().unwrap(), Status::Killed(9));
}

fn bytes_survive(host: &Host, length: usize) {
    let sent = noise(length);
    let echo = host.run(Cmd::new("cat").input(sent.clone())).unwrap();
    assert!(echo.stdout == sent, "{} bytes came back of {length}, or they changed", echo.stdout.len());
}

#[test]
fn commands_run_on_this_machine() {
    let host = here();
    commands_run(&host);
    processes_run_side_by_side(&host);
    bytes_survive(&host, 8 * MIB);
}

#[test]
fn a_dropped_process_is_killed_with_its_children() {
    let host = here();
    let process = host.spawn("sleep 1000 & echo child $!; wait").unwrap();
    let child = process.wait_line("child").unwrap().replace("child ", "");
    assert!(host.run(format!("kill -0 {child}")).unwrap().status.success());
    drop(process);
    // `tail` watches a process that is not its own child.
    let gone = Cmd::new("tail").args(["-f", "/dev/null", "--pid", &child]).patience(Duration::from_secs(20));
    host.run(gone).unwrap().ok().unwrap();
}

#[test]
fn a_late_or_silent_process_is_reported_with_its_last_words() {
    let host = here();
    let process = host.spawn("echo last words; echo complaint >&2; sleep 1000").unwrap();
    process.wait_line("last").unwrap();
    process.wait_error_line("complaint").unwrap();
    let error = process.wait_line_for("never said", Duration::from_millis(100)).unwrap_err().to_string();
    for part in ["never said", "last words", "complaint"] {
        assert!(error.contains(part), "{error}");
    }
    let process = host.spawn("echo parting; exit 3").unwrap();
    let error = process.wait_line("never said").unwrap_err().to_string();
    assert!(error.contains("exit code 3") && error.contains("parting"), "{error}");
}

#[test]
fn a_socket_is_carried_both_ways_and_waits_for_its_reader() {
    let host = here();
    let path = format!("{}/socket", host.folder().unwrap());
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut near = host.connect(&path).unwrap();
    let (mut far, _) = listener.accept().unwrap();

    near.write_all(b"hello").unwrap();
    let mut hello = [0; 5];
    far.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello");

    // Nobody reads at this end: what the other may write is what buffers hold, and not all of it.
    far.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
    let bytes = noise(16 * MIB);
    let mut written = 0;
    while let Ok(length) = far.write(&bytes[written..]) {
        written += length;
        assert!(written < 8 * MIB, "{written} bytes were taken without a reader");
    }
    let mut received = vec![0; written];
    near.read_exact(&mut received).unwrap();
    assert!(received == bytes[..written]);
    drop(far);
    assert_eq!(near.read(&mut [0; 10]).unwrap(), 0);

    let missing = format!("{:#}", host.connect("/no/such/socket").err().unwrap());
    assert!(missing.contains("/no/such/socket") && missing.contains("No such file"), "{missing}");
}

/// As a guest's agent is reached: through a socket that its host's agent carries.
#[test]
fn a_session_runs_inside_of_another() {
    let host = here();
    let path = format!("{}/socket", host.folder().unwrap());
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let socket = host.connect(&path).unwrap();
    let (far, _) = listener.accept().unwrap();
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_agent"))
        .arg("socket")
        .arg(tempfile::tempdir().unwrap().keep())
        .stdin(std::os::fd::OwnedFd::from(far))
        .spawn()
        .unwrap();
    let inner = Client::open("inner", socket, Duration::from_secs(20), Arc::new(String::new)).unwrap();
    assert_eq!(inner.run("echo here").unwrap().ok().unwrap(), "here");
    let sent = noise(MIB);
    assert!(inner.run(Cmd::new("cat").input(sent.clone())).unwrap().stdout == sent);
    // With the session ends the connection, and with that the agent at its other end.
    drop(inner);
    assert!(agent.wait().unwrap().success());
}

#[test]
fn an_agent_that_dies_is_reported_at_once() {
    let host = here();
    let process = host.spawn("echo here; sleep 30").unwrap();
    process.wait_line("here").unwrap();
    let parent = host.run("ps -o ppid= -p $$").unwrap().ok().unwrap();
    let begun = Instant::now();
    let error = format!("{:#}", host.run(format!("kill -9 {parent}")).unwrap_err());
    assert!(error.contains("agent"), "{error}");
    let error = process.wait().unwrap_err().to_string();
    assert!(error.contains("agent"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn the_shared_host_is_one_that_can_run_monitors() {
    let host = Host::shared().unwrap();
    if !host.is_direct() {
        assert_eq!(host.run("uname -r").unwrap().ok().unwrap(), Kernel::Lab.version().unwrap());
        let flags = host.run("grep -c -w svm /proc/cpuinfo").unwrap().ok().unwrap();
        assert_eq!(flags, host.run("nproc").unwrap().ok().unwrap());
    }
    host.run("test -c /dev/kvm && test -c /dev/net/tun").unwrap().ok().unwrap();
    commands_run(host);
    processes_run_side_by_side(host);
    bytes_survive(host, MIB);
    let path = format!("{}/file", host.folder().unwrap());
    host.write_file(&path, b"content".to_vec()).unwrap();
    assert_eq!(host.read_file(&path).unwrap(), b"content");
}

#[test]
fn the_shared_host_carries_eight_mebibytes() {
    bytes_survive(Host::shared().unwrap(), 8 * MIB);
}

#[test]
fn networks_are_made_and_go() {
    let host = Host::shared().unwrap();
    let bridge = host.bridge().unwrap();
    let tap = host.tap(Some(&bridge)).unwrap();
    let master = format!("readlink /sys/class/net/{}/master", tap.name());
    assert!(host.run(master.clone()).unwrap().ok().unwrap().ends_with(bridge.name()));
    let name = tap.name().to_owned();
    drop((tap, bridge));
    let links = host.run("ls /sys/class/net").unwrap().ok().unwrap();
    assert!(!links.contains(&name), "{links}");
}

#[test]
fn an_emulated_host_that_crashes_is_reported_at_once() {
    let host = Host::start(&HostSpec::new().kind(Kind::Emulated).cpus(1).memory_mib(1024)).unwrap();
    let waiting = host.spawn("sleep 1000").unwrap();
    let begun = Instant::now();
    let crash = host.spawn("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger").unwrap();
    let error = crash.wait_for(Duration::from_secs(60)).unwrap_err().to_string();
    assert!(error.contains("Kernel panic"), "{error}");
    let error = waiting.wait().unwrap_err().to_string();
    assert!(error.contains("lab host"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
}

/// Guests of the shared host run one after the other: with two at once on a host of two processors, busy machines lost the
/// host's kernel or a guest in 4 of 10 runs (see `qemu::keep_processors_apart`).
static ONE_GUEST: Mutex<()> = Mutex::new(());

/// The images, on a monitor that is known to work: banner, agent at a console of its name, power button.
fn guest_answers(kernel: Kernel) {
    let _one = ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::shared().unwrap();
    let folder = host.folder().unwrap();
    let (agent, monitor) = (format!("{folder}/agent"), format!("{folder}/monitor"));
    let qemu = Cmd::new("qemu-system-x86_64")
        .args(["-M", "q35", "-accel", "kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot", "-append", "console=ttyS0 quiet panic=-1"])
        .args(["-kernel".to_owned(), kernel.vmlinux().unwrap().display().to_string()])
        .args(["-initrd".to_owned(), images::guest(kernel).unwrap().display().to_string()])
        .args(["-chardev".to_owned(), format!("socket,id=agent,path={agent},server=on,wait=off")])
        .args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=agent,name=org.halyard.agent"])
        .args(["-monitor".to_owned(), format!("unix:{monitor},server=on,wait=off")])
        .args(["-blockdev", "null-co,node-name=disk,size=33554432", "-device", "virtio-blk-pci,drive=disk"])
        .args(["-device", "virtio-net-pci,mac=52:54:00:00:00:07", "-device", "pvpanic"]);
    let qemu = host.spawn(qemu).unwrap();
    qemu.wait_line("HALYARD-GUEST up").unwrap();
    for fact in [format!("kernel {}", kernel.version().unwrap()), "processors 1".into()] {
        qemu.wait_line(&fact).unwrap();
    }
    qemu.wait_line("disk vda 32 MiB").unwrap();
    qemu.wait_line("network eth0 52:54:00:00:00:07").unwrap();
    qemu.wait_line("HALYARD-GUEST ready").unwrap();
    for session in 1..=2 {
        let socket = host.connect(&agent).unwrap();
        let patience = Duration::from_secs(60);
        let guest = Client::open("guest", socket, patience, Arc::new(String::new)).unwrap();
        assert_eq!(guest.run("uname -r").unwrap().ok().unwrap(), kernel.version().unwrap(), "session {session}");
        let sent = noise(100_000);
        assert!(guest.run(Cmd::new("cat").input(sent.clone())).unwrap().stdout == sent);
        let modules = guest.run("lsmod; ls /dev/hwrng /dev/vda").unwrap().ok().unwrap();
        assert!(modules.contains("virtio_net"), "{modules}");
    }
    let mut monitor = host.connect(&monitor).unwrap();
    monitor.write_all(b"system_powerdown\n").unwrap();
    qemu.wait_line("HALYARD-GUEST power button").unwrap();
    assert_eq!(qemu.wait().unwrap(), Status::Exited(0));
}

#[test]
fn a_guest_of_another_monitor_answers() {
    guest_answers(Kernel::Debian6_1Cloud);
}

#[test]
fn a_guest_of_halyard_answers() {
    let _one = ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner);
    let host = Host::shared().unwrap();
    let kernel = Kernel::Debian6_12Cloud;
    let spec = VmSpec::elf_guest(kernel).unwrap();
    let vm = host.halyard(&spec).unwrap();
    vm.wait_line("HALYARD-GUEST up").unwrap();
    assert_eq!(vm.run("uname -r").unwrap().ok().unwrap(), kernel.version().unwrap());
    let sent = noise(MIB);
    assert!(vm.run(Cmd::new("cat").input(sent.clone())).unwrap().stdout == sent);
    let failure = vm.run("echo why >&2; exit 5").unwrap();
    assert_eq!((failure.status, failure.stderr.as_slice()), (Status::Exited(5), b"why\n".as_slice()));

    // One that is killed takes its guest with it, and whoever waits for that is told.
    let waiting = vm.spawn("sleep 1000").unwrap();
    assert!(host.run(format!("kill -9 {}", vm.pid())).unwrap().status.success());
    assert_eq!(vm.exit_status().unwrap(), Status::Killed(9));
    let error = waiting.wait().unwrap_err().to_string();
    assert!(error.contains("guest"), "{error}");
    let error = vm.run("true").unwrap_err().to_string();
    assert!(error.contains("signal 9"), "{error}");
}

#[test]
fn a_halyard_that_does_not_start_says_why() {
    let vm = Host::shared().unwrap().halyard(&VmSpec::kernel("/no/such/kernel")).unwrap();
    assert_eq!(vm.exit_status().unwrap(), Status::Exited(2));
    // What it wrote may arrive after its end has.
    vm.process().wait_error_line("/no/such/kernel").unwrap();
    let error = vm.wait_line("HALYARD-GUEST up").unwrap_err().to_string();
    assert!(error.contains("exit code 2") && error.contains("/no/such/kernel"), "{error}");
}
