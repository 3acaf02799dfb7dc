//! `halyard ctl` against a real monitor, with tiny guests behind it.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use api::{Client, PhaseName, VmConfig, VmInfo, from_yaml, to_yaml};
use halyard_tests::pty::Pty;
use halyard_tests::serve;
use halyard_tests::tiny::{Run, Running, Served, binary, config, run_command, run_halyard};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket};
use serde_json::Value;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

/// `halyard ctl` with these arguments, at this socket.
fn at(socket: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(binary());
    command.env("HALYARD_SOCKET", socket).arg("ctl").args(args);
    command
}

fn ctl(served: &Served, args: &[&str]) -> Run {
    run_command(at(&served.path("api"), args))
}

/// What a command that succeeds prints.
#[track_caller]
fn printed(served: &Served, args: &[&str]) -> String {
    ctl(served, args).expect_code(0).output()
}

/// A configuration file for a tiny guest, whose serial port is reached through the API.
fn file(served: &Served, name: &str, cmdline: &str) -> String {
    let mut config = config(name);
    config.kernel.cmdline = Some(cmdline.into());
    let path = served.path("vm.yaml");
    fs::write(&path, to_yaml(&config).unwrap()).unwrap();
    path.display().to_string()
}

/// Creates and boots a guest, and waits until it says that it is ready. Its console is returned.
#[track_caller]
fn booted(served: &Served, name: &str, cmdline: &str) -> UnixStream {
    ctl(served, &["create", &file(served, name, cmdline)]).expect_code(0);
    ctl(served, &["boot"]).expect_code(0);
    let mut console = served.client().console("serial", false).unwrap();
    hear(&mut console, "ready\n");
    console
}

#[track_caller]
fn hear(console: &mut UnixStream, wanted: &str) {
    console.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains(wanted) {
        let mut byte = [0];
        let length = console.read(&mut byte).unwrap_or(0);
        assert!(length > 0, "{wanted:?} did not come, but {:?}", String::from_utf8_lossy(&heard));
        heard.extend(byte);
    }
}

#[test]
fn a_vm_is_driven_from_its_creation_to_its_end() {
    let served = serve!();
    let text = printed(&served, &["ping"]);
    assert_eq!(text, format!("the monitor is there: process {}\n", served.pid()));
    assert!(printed(&served, &["version"]).starts_with("halyard "));
    // Under the sandbox, which lets nobody look at the host any more.
    assert!(printed(&served, &["host"]).contains("virtual machines can run here"));
    let host: api::HostReport = serde_json::from_str(&printed(&served, &["host", "-o", "json"])).unwrap();
    assert!(host.can_run());
    assert_eq!(printed(&served, &["phase"]), "empty\n");
    ctl(&served, &["config"]).expect_code(5).expect_messages(&["there is no VM"]);

    let path = file(&served, "commands", "quiet");
    let created = printed(&served, &["create", &path]);
    assert!(created.contains("phase         ready (request)\n") && created.contains("64M"), "{created}");
    ctl(&served, &["create", &path]).expect_code(0);
    let config: VmConfig = api::parse(&printed(&served, &["config"])).unwrap();
    assert_eq!(Some(config), served.client().vm().unwrap().config);
    assert_eq!(printed(&served, &["vcpus", "2"]), "configured  2\npresent     0\n");
    assert!(printed(&served, &["memory", "96M"]).contains("configured              96M\n"));

    assert_eq!(printed(&served, &["boot"]), "");
    let mut console = served.client().console("serial", false).unwrap();
    hear(&mut console, "ready\n");
    assert!(printed(&served, &["vcpus"]).contains("present     2\n"));
    assert!(printed(&served, &["memory"]).contains("present                 96M\n"));
    for (verb, phase) in [("pause", "paused\n"), ("resume", "running\n"), ("reset", "running\n")] {
        assert_eq!(printed(&served, &[verb]), "");
        assert_eq!(printed(&served, &["phase"]), phase);
    }
    hear(&mut console, "ready\n");
    ctl(&served, &["nmi"]).expect_code(0);
    ctl(&served, &["destroy"]).expect_code(0);
    ctl(&served, &["destroy"]).expect_code(0);
    assert_eq!(printed(&served, &["phase", "--output", "json"]), "\"empty\"\n");
    ctl(&served, &["pause"]).expect_code(4).expect_messages(&["halyard: a VM that is empty cannot be paused"]);
    let document: Value = serde_json::from_str(&printed(&served, &["openapi"])).unwrap();
    assert_eq!(document["openapi"], "3.1.0");
    assert!(printed(&served, &["metrics"]).contains("halyard_vm_phase{phase=\"empty\"} 1\n"));
}

#[test]
fn json_and_yaml_say_the_same() {
    let served = serve!();
    let _console = booted(&served, "commands", "a: b #\n".trim_end());
    served.client().pause().unwrap();
    for verb in [&["show"][..], &["config", "--running"], &["devices", "list"], &["vcpus"], &["host"], &["top"]] {
        let of = |format| printed(&served, &[verb, &["--output", format]].concat());
        let (json, yaml) = (of("json"), of("yaml"));
        let json: Value = serde_json::from_str(&json).unwrap_or_else(|error| panic!("{error}: {json}"));
        let mut read = from_yaml(&yaml).unwrap_or_else(|error| panic!("{error}: {yaml}"));
        if verb == ["top"] {
            // Time has passed between them.
            assert!(json["vcpu"][0]["run_seconds"].as_f64() <= read["vcpu"][0]["run_seconds"].as_f64());
            (read["vcpu"], read["resident_bytes"]) = (json["vcpu"].clone(), json["resident_bytes"].clone());
        }
        assert_eq!(json, read, "{yaml}");
    }
    let info: VmInfo = serde_json::from_str(&printed(&served, &["show", "-o", "json"])).unwrap();
    assert_eq!(info.phase, PhaseName::Paused);
}

#[test]
fn devices_are_added_changed_and_removed() {
    let served = serve!();
    let disk = served.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let disk = disk.display().to_string();
    ctl(&served, &["create", &file(&served, "commands", "")]).expect_code(0);

    let added = printed(&served, &["devices", "add", "--disk", &format!("{disk},readonly")]);
    assert!(added.contains("disk0   disk  ") && added.contains("readonly"), "{added}");
    printed(&served, &["devices", "add", "--rng"]);
    printed(&served, &["devices", "add", "--console", "api,id=con"]);
    fs::write(served.path("d.yaml"), format!("type: disk\nid: again\npath: {disk}\nreadonly: true\n")).unwrap();
    printed(&served, &["devices", "add", "--file", &served.path("d.yaml").display().to_string()]);
    let list = printed(&served, &["devices", "list"]);
    let ids: Vec<&str> = list.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(ids, ["disk0", "rng0", "con", "again"], "{list}");

    let changed = printed(&served, &["devices", "change", "again", "serial='12'", "queues=2", "-o", "json"]);
    let changed: Value = serde_json::from_str(&changed).unwrap();
    assert_eq!((&changed["serial"], &changed["queues"]), (&"12".into(), &2.into()));
    assert!(!printed(&served, &["devices", "change", "again", "serial=null"]).contains("serial"));
    let same = ["devices", "add", "--rng=id=rng0"];
    ctl(&served, &same).expect_code(4).expect_messages(&["there is a device «rng0» already; give --replace"]);
    ctl(&served, &[&same[..], &["--replace"]].concat()).expect_code(0);

    printed(&served, &["devices", "remove", "rng0"]);
    ctl(&served, &["devices", "show", "rng0"]).expect_code(5).expect_messages(&["there is no device «rng0»"]);
    assert!(printed(&served, &["devices", "show", "con"]).contains("console  api"));

    let refused = ctl(&served, &["devices", "add", "--disk", "path=x,queues=many,sise=3"]).expect_code(2);
    refused
        .expect_messages(&["--disk path=x,queues=many,sise=3: queues: «many» is not possible", "unknown key «sise»"]);
    fs::write(served.path("d.yaml"), "type: disk\nreadonly: 3\nquues: 1\n").unwrap();
    let refused = ctl(&served, &["devices", "add", "--file", &served.path("d.yaml").display().to_string()]);
    refused.expect_code(2).expect_messages(&["d.yaml:2:1: readonly: ", "d.yaml:3:1: quues: "]);
    ctl(&served, &["devices", "change", "con", "name"]).expect_code(2).expect_messages(&["name: it has no value"]);
    let wrong = ctl(&served, &["devices", "change", "disk0", "queues=0", "x=1"]).expect_code(2);
    wrong.expect_messages(&["halyard: queues: ", "halyard: x: "]);
    ctl(&served, &["devices", "add"]).expect_code(2);
}

#[test]
fn a_descriptor_that_the_command_inherits_is_the_devices() {
    let served = serve!();
    let disk = served.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    ctl(&served, &["create", &file(&served, "commands", "")]).expect_code(0);
    let mut command = Command::new("bash");
    command.env("HALYARD_SOCKET", served.path("api")).arg("-c");
    command.arg("exec \"$0\" ctl devices add --disk fd=9,id=given 9<>\"$1\"").arg(binary()).arg(&disk);
    run_command(command).expect_code(0);
    let given: Vec<_> = served.client().device("given").unwrap().descriptors().collect();
    assert_eq!(given, [("fd", 3)], "the first that came with the request");
    ctl(&served, &["boot"]).expect_code(0);
    ctl(&served, &["devices", "add", "--disk", "fd=77"]).expect_code(2).expect_messages(&["fd 77: "]);
}

#[test]
fn a_shutdown_is_waited_for() {
    let served = serve!();
    let console = booted(&served, "power-button", "ignore");
    let run = ctl(&served, &["shutdown", "--deadline", "0s", "--wait"]).expect_code(6);
    assert!(run.output().contains("failed"), "{run}");
    run.expect_messages(&["job 1 failed: the guest did not switch itself off in time"]);
    ctl(&served, &["jobs", "wait", "1"]).expect_code(6);

    let job: api::Job =
        serde_json::from_str(&printed(&served, &["shutdown", "--deadline", "1h", "-o", "json"])).unwrap();
    assert_eq!((job.id, job.state), (2, api::JobState::Running));
    let mut waiting = Running::start(at(&served.path("api"), &["jobs", "wait", "2"]), PATIENCE);
    assert!(printed(&served, &["jobs", "show", "2"]).contains("running"));
    ctl(&served, &["jobs", "cancel", "2"]).expect_code(0);
    waiting.wait_for("cancelled");
    waiting.finish().expect_code(6);
    assert_eq!(printed(&served, &["jobs", "list"]).lines().count(), 3);
    ctl(&served, &["jobs", "show", "9"]).expect_code(5);

    let run = ctl(&served, &["shutdown", "--deadline", "0s", "--force", "--wait"]).expect_code(0);
    assert!(run.output().contains("succeeded"), "{run}");
    assert_eq!(printed(&served, &["phase"]), "stopped\n");
    drop(console);

    let _console = booted(&served, "power-button", "");
    ctl(&served, &["shutdown", "--wait"]).expect_code(0);
    assert!(printed(&served, &["show"]).contains("outcome       the guest powered off\n"));
}

/// A socket in front of a monitor's, whose connections can be cut.
struct Proxy {
    path: PathBuf,
    open: std::sync::Arc<std::sync::Mutex<Vec<UnixStream>>>,
}

impl Proxy {
    fn start(served: &Served) -> Self {
        let (path, behind) = (served.path("proxy"), served.path("api"));
        let listener = UnixListener::bind(&path).unwrap();
        let open = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let kept = open.clone();
        thread::spawn(move || {
            for front in listener.incoming().map_while(Result::ok) {
                let back = UnixStream::connect(&behind).unwrap();
                kept.lock().unwrap().extend([front.try_clone().unwrap(), back.try_clone().unwrap()]);
                for (mut from, mut to) in [(front.try_clone().unwrap(), back.try_clone().unwrap()), (back, front)] {
                    // An end that was cut off is what this is for.
                    thread::spawn(move || drop(std::io::copy(&mut from, &mut to)));
                }
            }
        });
        Self { path, open }
    }

    fn cut(&self) {
        for stream in self.open.lock().unwrap().drain(..) {
            drop(stream.shutdown(std::net::Shutdown::Both));
        }
    }
}

#[test]
fn events_go_on_where_a_connection_broke() {
    let served = serve!();
    let proxy = Proxy::start(&served);
    let mut follow = Running::start(at(&proxy.path, &["events", "--follow", "--after", "0"]), PATIENCE);
    ctl(&served, &["create", &file(&served, "commands", "")]).expect_code(0);
    follow.wait_for("phase            ready (request)\n");
    proxy.cut();
    for _ in 0..2 {
        ctl(&served, &["devices", "add", "--rng=id=r"]).expect_code(0);
        ctl(&served, &["devices", "remove", "r"]).expect_code(0);
    }
    for what in ["device-added     r\n", "device-removed   r\n"].repeat(2) {
        follow.wait_for(what);
    }
    let known = printed(&served, &["events"]);
    assert_eq!(known.lines().count(), 5, "{known}");
    let json = printed(&served, &["events", "--after", "3", "-o", "json"]);
    let numbers: Vec<u64> =
        json.lines().map(|line| serde_json::from_str::<api::Event>(line).unwrap().sequence).collect();
    assert_eq!(numbers, [4, 5]);
    let mut lost = Running::start(at(&served.path("api"), &["events", "-f", "--after", "1000000"]), PATIENCE);
    lost.wait_for("gap              events 1 to 5 are lost to this reader");
    served.signal(nix::sys::signal::Signal::SIGTERM);
    lost.finish().expect_code(0);
    let run = follow.finish();
    assert_eq!(run.output(), known, "each once\n{run}");
    served.finish().expect_code(0);
}

/// Waits until the monitor has seen so many clients of consoles go.
#[track_caller]
fn wait_for_closed(served: &Served, count: usize) {
    let events = served.client().events(Some(0)).unwrap().map(Result::unwrap);
    let closed = events.filter(|event| matches!(event.event, api::EventKind::ConsoleClosed { .. }));
    assert_eq!(closed.take(count).count(), count);
}

#[test]
fn a_console_is_left_by_its_escape() {
    let served = serve!();
    drop(booted(&served, "commands", ""));
    wait_for_closed(&served, 1);
    let mut pty = Pty::start(at(&served.path("api"), &["console", "serial"]), PATIENCE);
    pty.wait_for("connected to serial; Ctrl-a x leaves it");
    assert!(pty.is_raw());
    ctl(&served, &["console", "serial"]).expect_code(4);
    pty.send(b"x");
    pty.wait_for("what?");
    pty.send(b"\x01h");
    pty.wait_for("leave the console");
    pty.send(b"z");
    pty.wait_for("what?");
    pty.send(b"\x01x");
    pty.wait_for("left the console");
    assert_eq!(pty.finish(), Some(0));
    assert_eq!(printed(&served, &["phase"]), "running\n", "the VM runs on");

    wait_for_closed(&served, 2);
    let mut first = Pty::start(at(&served.path("api"), &["console", "serial"]), PATIENCE);
    first.wait_for("connected");
    let mut second = Running::start(at(&served.path("api"), &["console", "serial", "--take-over"]), PATIENCE);
    first.wait_for("the console has ended");
    assert_eq!(first.finish(), Some(0));
    second.send(b"x");
    second.wait_for("what?\n");
    second.send(b"o");
    second.finish().expect_code(0).expect_messages(&["the console has ended"]);
    ctl(&served, &["console", "other"]).expect_code(4);
}

#[test]
fn top_shows_what_a_vm_does() {
    let served = serve!();
    let disk = served.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    ctl(&served, &["create", &file(&served, "commands", "")]).expect_code(0);
    ctl(&served, &["devices", "add", "--disk", &format!("{},id=root", disk.display())]).expect_code(0);
    ctl(&served, &["boot"]).expect_code(0);
    hear(&mut served.client().console("serial", false).unwrap(), "ready\n");
    let once = printed(&served, &["top"]);
    assert!(once.starts_with("running  1 vCPUs  64.0M memory, "), "{once}");
    assert!(once.contains("VCPU  RUN s") && once.contains("DISK  READS") && once.contains("\nroot "), "{once}");

    let mut pty = Pty::start(at(&served.path("api"), &["top"]), PATIENCE);
    pty.wait_for("\x1b[?1049h");
    // Again and again, and also where it was stopped in between. The guest waits for a byte in a loop, so it exits.
    for _ in 0..2 {
        pty.interrupt();
        pty.wait_for("EXITS/s");
        pty.wait_for("root");
    }
    pty.send(b"q");
    pty.wait_for("\x1b[?1049l");
    assert_eq!(pty.finish(), Some(0));
    let mut pty = Pty::start(at(&served.path("api"), &["top"]), PATIENCE);
    pty.wait_for("EXITS/s");
    served.signal(nix::sys::signal::Signal::SIGKILL);
    pty.wait_for("\x1b[?1049l");
    assert_eq!(pty.finish(), Some(3), "the screen is back, and the reason told");
}

#[test]
fn what_cannot_be_used_is_told_at_once() {
    let served = serve!();
    let path = served.path("bad.yaml");
    fs::write(&path, "kernel: {path: k, x: 1}\ncpus: {count: 300}\n").unwrap();
    let path = path.display().to_string();
    let told = ["bad.yaml:1:19: kernel.x: «x» is no field here", "bad.yaml:2:8: cpus.count: 300 vCPUs are too many"];
    ctl(&served, &["create", &path]).expect_code(2).expect_messages(&told);
    let alike = run_halyard(["validate", "--config", &path]).expect_code(2);
    assert_eq!(ctl(&served, &["create", &path]).stderr, alike.stderr, "as validate tells it");
    // What only the monitor can know.
    fs::write(&path, "kernel:\n  path: /nonexistent/k\ndevices:\n  - {type: disk, path: /nonexistent/d}\n").unwrap();
    let told = ["bad.yaml:2:3: kernel.path: ", "bad.yaml:4:18: devices[0].path: "];
    ctl(&served, &["create", &path]).expect_code(2).expect_messages(&told);
    ctl(&served, &["create", "/nonexistent"]).expect_code(2).expect_messages(&["there is no such file"]);
    ctl(&served, &["--timeout", "5", "ping"]).expect_code(2);
    ctl(&served, &["--timeout", "0s", "ping"]).expect_code(2).expect_messages(&["--timeout: "]);
    ctl(&served, &["devices", "show", "a/b?c\r\nx: y"]).expect_code(5);
}

#[test]
fn a_monitor_that_is_not_there_or_does_not_answer_is_told_soon() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let mut command = Command::new(binary());
    command.env_remove("HALYARD_SOCKET").args(["ctl", "ping"]);
    run_command(command).expect_code(2).expect_messages(&["--socket: no socket is named"]);
    run_command(at(&path, &["ping"])).expect_code(3).expect_messages(&["there is no such socket"]);
    let listener = UnixListener::bind(&path).unwrap();
    drop(listener);
    run_command(at(&path, &["ping"])).expect_code(3).expect_messages(&["nobody listens at it"]);

    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let soon = ["--timeout", "300ms", "ping"];
    let started = Instant::now();
    run_command(at(&path, &soon)).expect_code(3).expect_messages(&["no answer came within 0.3 s"]);
    // One that sends a byte now and then is no better.
    let slow = thread::spawn(move || {
        let (first, _) = listener.accept().unwrap();
        drop(first);
        let (mut second, _) = listener.accept().unwrap();
        hear(&mut second, "\r\n\r\n");
        let mut sent = 0;
        while second
            .write_all(b"HTTP/1.1 200 OK\r\nx: yyyyyyyyyyyyyyyyyyyyyyyyyyyyy".get(sent..=sent).unwrap_or(b"y"))
            .is_ok()
        {
            sent += 1;
            thread::sleep(Duration::from_millis(20));
        }
        // It reads what is asked and says nothing.
        let (mut third, _) = listener.accept().unwrap();
        drop(third.read(&mut [0; 16]));
        drop(third);
    });
    run_command(at(&path, &soon)).expect_code(3).expect_messages(&["no answer came within 0.3 s"]);
    run_command(at(&path, &["ping"])).expect_code(3).expect_messages(&["closed the connection before it had answered"]);
    slow.join().unwrap();
    assert!(started.elapsed() < PATIENCE);
}

#[test]
fn a_monitor_that_takes_no_connections_is_given_up() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let connection = || socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_NONBLOCK, None).unwrap();
    let address = UnixAddr::new(&path).unwrap();
    let listener = connection();
    bind(listener.as_raw_fd(), &address).unwrap();
    listen(&listener, Backlog::new(1).unwrap()).unwrap();
    let mut waiting = Vec::new();
    loop {
        waiting.push(connection());
        match connect(waiting.last().unwrap().as_raw_fd(), &address) {
            Ok(()) => assert!(waiting.len() < 10, "its queue does not fill up"),
            Err(error) => break assert_eq!(error, nix::Error::EAGAIN),
        }
    }
    let run = run_command(at(&path, &["--timeout", "300ms", "ping"])).expect_code(3);
    run.expect_messages(&["the monitor does not take connections"]);
}

#[test]
fn a_monitor_that_vanishes_while_a_job_is_waited_for_is_told() {
    let served = serve!();
    let _console = booted(&served, "power-button", "ignore");
    let mut waiting = Pty::start(at(&served.path("api"), &["shutdown", "--deadline", "1h", "--wait"]), PATIENCE);
    waiting.wait_for("job 1: shutdown, running");
    served.signal(nix::sys::signal::Signal::SIGKILL);
    waiting.wait_for("halyard: ");
    assert_eq!(waiting.finish(), Some(3));
}

/// Answers a connection's requests as a monitor would whose guest must answer first: a device comes and goes by job 7.
/// The lines of the requests are told.
fn serve_a_job(mut stream: UnixStream, told: &std::sync::mpsc::Sender<String>) {
    let job = |state: &str, progress: u32| {
        format!(r#"{{"id":7,"kind":"shutdown","state":"{state}","progress":{progress},"started_ms":0}}"#)
    };
    let reply = |status: &str, body: &str| {
        format!("HTTP/1.1 {status}\r\netag: \"3\"\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    loop {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            let Ok(1) = stream.read(&mut byte) else { return };
            head.extend(byte);
        }
        let head = String::from_utf8(head).unwrap();
        let length =
            head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |l| l.parse().unwrap());
        stream.read_exact(&mut vec![0; length]).unwrap();
        let line = head.lines().next().unwrap_or_default().to_owned();
        if line.starts_with("GET /api/v1/events") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n:\n\n\r\n").unwrap();
            for (number, state, progress) in [(1, "running", 50), (2, "succeeded", 100)] {
                let event = format!(
                    r#"{{"sequence":{number},"time_ms":0,"event":{{"type":"job","job":{}}}}}"#,
                    job(state, progress)
                );
                let event = format!("id: {number}\nevent: job\ndata: {event}\n\n");
                stream.write_all(format!("{:x}\r\n{event}\r\n", event.len()).as_bytes()).unwrap();
            }
            // It stays open, as a monitor's does.
            continue;
        }
        let body = if line.starts_with("GET /api/v1/vm ") {
            reply("200 OK", r#"{"sequence":0,"phase":"running","reason":"request","since_ms":0}"#)
        } else {
            told.send(line + if head.contains("if-match: \"3\"\r\n") { " if 3" } else { "" }).unwrap();
            reply("202 Accepted", &job("running", 0))
        };
        stream.write_all(body.as_bytes()).unwrap();
    }
}

#[test]
fn a_guests_answer_to_a_device_is_waited_for() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (sender, told) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let sender = sender.clone();
            thread::spawn(move || serve_a_job(stream, &sender));
        }
    });
    let mut add = Pty::start(at(&path, &["devices", "add", "--rng"]), PATIENCE);
    add.wait_for("job 7: shutdown [..............................] 0 %");
    add.wait_for("job 7: shutdown [###############...............] 50 %");
    add.wait_for("succeeded  100 %");
    assert_eq!(add.finish(), Some(0));
    assert_eq!(told.recv().unwrap(), "PUT /api/v1/vm/devices/rng0 HTTP/1.1 if 3");
    let run = run_command(at(&path, &["devices", "remove", "rng0"])).expect_code(0);
    assert!(run.output().contains("succeeded") && run.stderr.is_empty(), "{run}");
    assert_eq!(told.recv().unwrap(), "DELETE /api/v1/vm/devices/rng0 HTTP/1.1");
    run_command(at(&path, &["devices", "remove", "a b", "--force"])).expect_code(0);
    assert_eq!(told.recv().unwrap(), "DELETE /api/v1/vm/devices/a%20b?force=true HTTP/1.1");
    let run = run_command(at(&path, &["devices", "remove", "rng0", "--no-wait"])).expect_code(0);
    assert!(run.output().contains("running  0 %"), "{run}");
}

/// What bash would offer for a line, whose last word is after its last blank.
#[track_caller]
fn bash(served: &Served, line: &str) -> Vec<String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/completions/halyard.bash");
    let mut command = Command::new("bash");
    command.args(["--norc", "-c"]);
    command.arg("source \"$1\"; PATH=$2:$PATH; COMP_WORDS=(\"${@:3}\"); COMP_CWORD=$(($# - 3)); _halyard; printf '%s\\n' \"${COMPREPLY[@]}\"");
    command.arg("bash").arg(script).arg(binary().parent().unwrap()).args(line.split(' '));
    command.current_dir(served.path("")).env("HALYARD_SOCKET", served.path("api"));
    run_command(command).expect_code(0).output().lines().map(str::to_owned).collect()
}

#[test]
fn bash_completes_commands_and_what_the_monitor_knows() {
    let served = serve!();
    let _console = booted(&served, "commands", "");
    ctl(&served, &["shutdown", "--deadline", "1h"]).expect_code(0);
    for (line, expected) in [
        ("halyard ctl ph", &["phase"][..]),
        ("halyard ctl devices remove --n", &["--no-wait"]),
        ("halyard ctl console ", &["serial"]),
        ("halyard ctl jobs wait ", &["1"]),
        ("halyard ctl --output = j", &["json"]),
        ("halyard run --config a", &["api"]),
    ] {
        assert_eq!(bash(&served, line), expected, "{line}");
    }
    ctl(&served, &["destroy"]).expect_code(0);
    ctl(&served, &["create", &file(&served, "commands", "")]).expect_code(0);
    for device in ["--rng=id=one", "--console=api,id=own", "--console=off,id=other"] {
        ctl(&served, &["devices", "add", device]).expect_code(0);
    }
    assert_eq!(bash(&served, "halyard ctl devices remove o"), ["one", "own", "other"]);
    assert_eq!(bash(&served, "halyard ctl console "), ["own", "serial"]);
    assert_eq!(bash(&served, "halyard ctl --socket /nonexistent devices show "), [""]);
}

#[test]
fn the_installation_has_the_manual_and_completions() {
    let folder = TempDir::new().unwrap();
    let mut make = Command::new("make");
    make.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("..")).args([
        "--silent",
        "--old-file=build",
        "install",
    ]);
    make.arg(format!("DESTDIR={}", folder.path().display())).arg("PREFIX=/usr");
    make.arg(format!("BIN={}", binary().display()));
    run_command(make).expect_code(0);
    let usr = folder.path().join("usr");
    for name in ["bin/halyard", "share/bash-completion/completions/halyard", "share/zsh/site-functions/_halyard"] {
        assert!(usr.join(name).is_file(), "{name}");
    }
    let man = usr.join("share/man/man1");
    let page = |name: &str| fs::read_to_string(man.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    for (name, wanted) in [
        ("halyard.1", "halyard\\-ctl(1)"),
        ("halyard-ctl.1", "\\- Ask something of a running monitor"),
        ("halyard-run.1", "\\-\\-kernel"),
        ("halyard-ctl.1", "HALYARD_SOCKET"),
        ("halyard-ctl-devices-add.1", "\\-\\-disk"),
        ("halyard-ctl-jobs-wait.1", "JOB"),
        ("halyard-ctl-events.1", "\\-\\-follow"),
    ] {
        let text = page(name);
        assert!(text.contains(".TH ") && text.contains(wanted), "{wanted} is not in {name}:\n{text}");
    }
    assert!(!man.join("halyard-complete.1").exists(), "it is for shells");
}

/// What the commands of the tests above cannot see: a client that was late for a reply does not take it for the next one.
#[test]
fn a_late_reply_is_not_taken_for_the_next_one() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let reply = |pid: u32| {
        let body = format!("{{\"pid\": {pid}}}");
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len())
    };
    let server = thread::spawn(move || {
        let (mut first, _) = listener.accept().unwrap();
        // The next connection comes when the client has given up.
        let (mut second, _) = listener.accept().unwrap();
        first.write_all(reply(1).as_bytes()).unwrap_or_default();
        hear(&mut second, "\r\n\r\n");
        second.write_all(reply(2).as_bytes()).unwrap();
    });
    let mut client = Client::connect(&path).unwrap();
    client.set_timeout(Some(Duration::from_millis(100))).unwrap();
    assert!(matches!(client.ping(), Err(api::ClientError::TimedOut(_))));
    client.set_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(client.ping().unwrap().pid, 2);
    server.join().unwrap();
}
