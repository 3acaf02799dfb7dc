//! `halyard serve` under a service manager: sockets that it is given, what it tells, and its pid file.

use std::ffi::OsString;
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use api::{Client, Endpoint, VmConfig};
use halyard_tests::tiny::{Running, binary, guest, kvm, run_command};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);

fn folder() -> TempDir {
    tempfile::tempdir().expect("a folder")
}

/// Halyard, started by a shell after `first`, with its arguments.
fn after<A: Into<OsString>>(first: &str, args: impl IntoIterator<Item = A>) -> Command {
    let mut command = Command::new("bash");
    command.arg("-c").arg(format!("{first}; exec \"$0\" \"$@\"")).arg(binary());
    command.args(args.into_iter().map(Into::into)).env_remove("RUST_LOG");
    command
}

/// A listening socket that children inherit.
fn listener(path: &Path) -> UnixListener {
    let listener = UnixListener::bind(path).expect("a socket");
    fcntl(&listener, FcntlArg::F_SETFD(FdFlag::empty())).expect("a flag");
    listener
}

/// Asks for the process's number, which is told as soon as the service is there: the socket keeps who came before.
#[track_caller]
fn answers(socket: &Path, pid: u32) {
    let mut client = Client::connect(socket).expect("somebody listens");
    client.set_timeout(Some(PATIENCE)).expect("a timeout");
    let reply = client.send("GET", "/api/v1/ping", &api::Options::default()).expect("an answer");
    let pong: api::Pong = serde_json::from_slice(&reply.body).expect("JSON");
    assert_eq!(pong.pid, pid);
}

/// What a service manager hears, message by message.
struct Manager {
    socket: UnixDatagram,
    heard: Vec<String>,
}

impl Manager {
    fn new(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).expect("a socket");
        socket.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        Self { socket, heard: Vec::new() }
    }

    /// Waits for the next message that has this line; what comes before it is kept.
    #[track_caller]
    fn wait_for(&mut self, line: &str) {
        loop {
            let mut message = [0; 4096];
            let length = self.socket.recv(&mut message);
            let length = length.unwrap_or_else(|error| panic!("{line}: {error} after {:?}", self.heard));
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            self.heard.push(text.clone());
            if text.lines().any(|found| found == line) {
                return;
            }
        }
    }
}

#[test]
fn a_socket_that_systemd_opened_is_served_and_left_behind() {
    let folder = folder();
    let path = folder.path().join("api");
    let listener = listener(&path);
    // As systemd has it: the first descriptor is 3, and the variables are for this process alone.
    let first = format!("export LISTEN_PID=$$ LISTEN_FDS=1; exec 3<&{}", listener.as_raw_fd());
    let running = Running::start(after(&first, ["serve"]), PATIENCE);
    drop(listener);
    answers(&path, running.pid());
    running.signal(Signal::SIGTERM);
    running.finish().expect_code(0);
    assert!(path.exists(), "the file is systemd's");
}

#[test]
fn what_systemd_opened_for_another_process_is_nobodys_socket() {
    let folder = folder();
    let listener = listener(&folder.path().join("api"));
    let first = format!("export LISTEN_PID=1 LISTEN_FDS=1; exec 3<&{}", listener.as_raw_fd());
    run_command(after(&first, ["serve"]))
        .expect_code(2)
        .expect_messages(&["--api-socket", "the service has no socket"]);
}

#[test]
fn a_socket_is_given_by_its_descriptor() {
    let folder = folder();
    let path = folder.path().join("api");
    let listener = listener(&path);
    let first = format!("exec 5<&{}", listener.as_raw_fd());
    let running = Running::start(after(&first, ["serve", "--api-socket", "fd=5"]), PATIENCE);
    drop(listener);
    answers(&path, running.pid());
    running.signal(Signal::SIGTERM);
    running.finish().expect_code(0);
    assert!(path.exists(), "the file is not Halyard's");
    for (first, problem) in [("exec 5</dev/null", "it is no listening Unix socket"), ("exec 5<&-", "descriptor 5: ")] {
        run_command(after(first, ["serve", "--api-socket", "fd=5"])).expect_code(1).expect_messages(&[problem]);
    }
}

#[test]
fn the_service_manager_is_told_of_start_phases_life_and_end() {
    if !kvm() {
        return;
    }
    let folder = folder();
    let socket = folder.path().join("api");
    let mut manager = Manager::new(&folder.path().join("notify"));
    let mut command = Command::new(binary());
    command.env_remove("RUST_LOG").env("NOTIFY_SOCKET", folder.path().join("notify")).env("WATCHDOG_USEC", "100000");
    command.arg("serve").arg("--api-socket").arg(&socket);
    let running = Running::start(command, PATIENCE);
    manager.wait_for("READY=1");
    for _ in 0..4 {
        manager.wait_for("WATCHDOG=1");
    }
    let mut client = Client::connect(&socket).expect("a client");
    let mut config = VmConfig::new(guest("power-button"));
    config.memory.size = "64M".parse().expect("a size");
    config.serial = Some(Endpoint::Off {});
    client.create(&config).expect("a VM");
    manager.wait_for("STATUS=the VM is ready");
    client.boot().expect("a running VM");
    manager.wait_for("STATUS=the VM is running");
    manager.wait_for("WATCHDOG=1");
    client.destroy().expect("no VM");
    manager.wait_for("STATUS=the VM is empty");
    running.signal(Signal::SIGTERM);
    manager.wait_for("STOPPING=1");
    running.finish().expect_code(0);
    assert_eq!(manager.heard.iter().filter(|text| text.as_str() == "READY=1").count(), 1, "{:?}", manager.heard);
}

#[test]
fn the_pid_file_names_the_process_while_it_is_there() {
    let folder = folder();
    let (socket, pid_file) = (folder.path().join("api"), folder.path().join("pid"));
    // One that a process which was killed left there is no obstacle.
    fs::write(&pid_file, "999999999\n").expect("a file");
    let mut manager = Manager::new(&folder.path().join("notify"));
    let mut command = Command::new(binary());
    command.env_remove("RUST_LOG").env("NOTIFY_SOCKET", folder.path().join("notify"));
    command.arg("serve").arg("--api-socket").arg(&socket).arg("--pid-file").arg(&pid_file);
    let running = Running::start(command, PATIENCE);
    manager.wait_for("READY=1");
    assert_eq!(fs::read_to_string(&pid_file).expect("a file"), format!("{}\n", running.pid()));
    running.signal(Signal::SIGTERM);
    running.finish().expect_code(0);
    assert!(!pid_file.exists() && !socket.exists(), "nothing is left behind");
    let nowhere = folder.path().join("missing/pid");
    let mut command = Command::new(binary());
    command.arg("serve").arg("--api-socket").arg(&socket).arg("--pid-file").arg(nowhere);
    run_command(command).expect_code(1).expect_messages(&["pid"]);
    assert!(!socket.exists(), "nothing half done is left behind");
}
