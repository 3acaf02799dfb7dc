//! The API over its real socket, with tiny guests behind it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown as Ends;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use api::{
    Client, ClientError, DeviceConfig, Disk, EventKind, JobState, Options, Outcome, PhaseName, Reason, Rng, Shutdown,
    TimeSpan, VmConfig,
};
use halyard_tests::serve;
use halyard_tests::tiny::{Served, config, debug_exit, guest, kvm};
use nix::sys::signal::Signal;
use tempfile::NamedTempFile;

const PATIENCE: Duration = Duration::from_secs(20);

/// Why a request was refused.
#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>) -> api::ProblemDocument {
    match result {
        Err(ClientError::Refused(document)) => *document,
        other => panic!("it must be refused: {other:?}"),
    }
}

/// A console's connection, on which texts are waited for.
struct Console(UnixStream, Vec<u8>);

impl Console {
    #[track_caller]
    fn open(client: &Client, id: &str) -> Self {
        Self(client.console(id, false).unwrap(), Vec::new())
    }

    #[track_caller]
    fn wait_for(&mut self, text: &str) {
        self.0.set_read_timeout(Some(PATIENCE)).unwrap();
        while !String::from_utf8_lossy(&self.1).contains(text) {
            let mut piece = [0; 4096];
            let length = self.0.read(&mut piece).unwrap_or(0);
            assert!(length > 0, "{text:?} did not come, but {:?}", String::from_utf8_lossy(&self.1));
            self.1.extend(&piece[..length]);
        }
        self.1.clear();
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).unwrap();
    }
}

/// Waits for an event that `wanted` picks.
#[track_caller]
fn wait_for<T>(events: &mut api::Events, wanted: impl Fn(&EventKind) -> Option<T>) -> T {
    let mut seen = Vec::new();
    for event in events {
        let event = event.unwrap_or_else(|error| panic!("{error} after {seen:?}"));
        if let Some(found) = wanted(&event.event) {
            return found;
        }
        seen.push(event);
    }
    panic!("the monitor ended after {seen:?}")
}

#[track_caller]
fn wait_for_phase(events: &mut api::Events, wanted: PhaseName) -> Option<Outcome> {
    wait_for(events, |event| match event {
        EventKind::Phase { phase, outcome, .. } if *phase == wanted => Some(outcome.clone()),
        _ => None,
    })
}

#[test]
fn a_vm_lives_from_its_creation_to_its_end() {
    let served = serve!();
    let mut client = served.client();
    assert_eq!(client.vm().unwrap().phase, PhaseName::Empty);
    let mut events = client.events(None).unwrap();

    let config = config("commands");
    let ready = client.create(&config).unwrap();
    assert_eq!((ready.phase, ready.config.as_ref()), (PhaseName::Ready, Some(&config)));
    assert_eq!(ready.running.unwrap().kernel.cmdline.as_deref(), Some("console=ttyS0"));
    client.create(&config).expect("the same once more changes nothing");
    client.boot().unwrap();
    let mut console = Console::open(&client, "serial");
    console.wait_for("ready\n");

    client.pause().unwrap();
    assert_eq!(client.vm().unwrap().phase, PhaseName::Paused);
    console.send(b"x");
    client.resume().unwrap();
    console.wait_for("what?\n");

    client.reset().unwrap();
    console.wait_for("ready\n");
    client.pause().unwrap();
    client.reset().unwrap();
    assert_eq!(client.vm().unwrap().phase, PhaseName::Paused, "it stands at its first instruction");
    client.resume().unwrap();
    console.wait_for("ready\n");
    console.send(b"o");
    assert_eq!(wait_for_phase(&mut events, PhaseName::Stopped), Some(Outcome::PoweredOff));
    let stopped = client.vm().unwrap();
    assert_eq!((stopped.reason, stopped.outcome), (Reason::Guest, Some(Outcome::PoweredOff)));
    assert_eq!(console.0.read(&mut [0]).unwrap(), 0, "the console has ended with the machine");

    client.create(&config).unwrap();
    client.boot().unwrap();
    client.destroy().unwrap();
    client.destroy().expect("nothing is left to destroy, which is what was asked for");
    assert_eq!(client.vm().unwrap().phase, PhaseName::Empty);
    served.signal(Signal::SIGTERM);
    served.finish().expect_code(0);
}

#[test]
fn a_kernel_whose_symbols_are_looked_for_may_have_a_relative_path() {
    let served = serve!();
    fs::copy(guest("commands"), served.path("kernel-1")).unwrap();
    let mut config = VmConfig { kernel: VmConfig::new("kernel-1").kernel, ..config("commands") };
    config.lifecycle.boot_timeout = Some(TimeSpan::from_millis(20_000));
    served.client().create(&config).unwrap();
    served.client().destroy().unwrap();
}

#[test]
fn events_tell_everything_in_order() {
    let served = serve!();
    let mut client = served.client();
    let known = client.vm().unwrap().sequence;
    let mut events = client.events(Some(known)).unwrap();
    client.create(&config("commands")).unwrap();
    client.put_device("rng0", &DeviceConfig::Rng(Rng::default())).unwrap();
    client.remove_device("rng0", false).unwrap();
    client.boot().unwrap();
    let mut console = Console::open(&client, "serial");
    console.wait_for("ready\n");
    console.send(b"c");
    console.wait_for("crash kernel\n");
    client.pause().unwrap();
    drop(console);
    let told: Vec<String> = (0..7).map(|_| format!("{:?}", events.next().unwrap().unwrap().event)).collect();
    for (event, expected) in told.iter().zip([
        "Phase { phase: Ready",
        "DeviceAdded { id: \"rng0\"",
        "DeviceRemoved",
        "Phase { phase: Running",
        "ConsoleOpened { id: \"serial\"",
        "GuestPanic { crash_kernel: true",
        "Phase { phase: Paused",
    ]) {
        assert!(event.starts_with(expected), "{expected} is missing in {told:#?}");
    }
    wait_for(&mut events, |event| matches!(event, EventKind::ConsoleClosed { .. }).then_some(()));
    // Another reader sees the same from any number on.
    let again: Vec<u64> = client.events(Some(3)).unwrap().take(3).map(|event| event.unwrap().sequence).collect();
    assert_eq!(again, [4, 5, 6]);
    // A number of another process: all is lost to it.
    let first = client.events(Some(1 << 40)).unwrap().next().unwrap().unwrap();
    assert!(matches!(first.event, EventKind::Gap { first: 1, .. }), "{first:?}");
}

#[test]
fn a_guest_switches_itself_off_when_asked() {
    let served = serve!();
    let mut client = served.client();
    let mut events = client.events(None).unwrap();
    client.create(&config("power-button")).unwrap();
    client.boot().unwrap();
    let mut console = Console::open(&client, "serial");
    console.wait_for("ready\n");
    let job = client.shutdown(&Shutdown::default()).unwrap();
    assert_eq!(job.state, JobState::Running);
    assert_eq!(wait_for_phase(&mut events, PhaseName::Stopped), Some(Outcome::PoweredOff));
    assert_eq!(client.job(job.id).unwrap().state, JobState::Succeeded);
    assert_eq!(client.jobs().unwrap().len(), 1);
    assert_eq!(refused(client.job(99)).status, 404);
}

#[test]
fn a_guest_that_does_not_switch_itself_off_runs_on_or_is_destroyed() {
    let served = serve!();
    let mut client = served.client();
    let mut events = client.events(None).unwrap();
    let mut config = config("power-button");
    config.kernel.cmdline = Some("ignore".into());
    client.create(&config).unwrap();
    client.boot().unwrap();
    Console::open(&client, "serial").wait_for("ready\n");
    let ended = |events: &mut api::Events| {
        wait_for(events, |event| match event {
            EventKind::Job { job } if job.state != JobState::Running => Some(job.clone()),
            _ => None,
        })
    };
    client.shutdown(&Shutdown { deadline: Some(TimeSpan::from_millis(0)), force: false }).unwrap();
    let job = ended(&mut events);
    assert_eq!((job.state, job.error.unwrap().status), (JobState::Failed, 504));
    assert_eq!(client.vm().unwrap().phase, PhaseName::Running);

    let job = client.shutdown(&Shutdown { deadline: Some(TimeSpan::from_millis(1000000)), force: true }).unwrap();
    client.cancel_job(job.id).unwrap();
    assert_eq!(client.job(job.id).unwrap().state, JobState::Cancelled);
    client.cancel_job(job.id).expect("it is cancelled already");

    let job = client.shutdown(&Shutdown { deadline: Some(TimeSpan::from_millis(0)), force: true }).unwrap();
    assert_eq!(wait_for_phase(&mut events, PhaseName::Stopped), Some(Outcome::Destroyed));
    assert_eq!(client.job(job.id).unwrap().state, JobState::Succeeded, "force was asked for, and used");
    assert_eq!(client.vm().unwrap().reason, Reason::Deadline);
}

#[test]
fn requests_out_of_place_are_refused_and_change_nothing() {
    let served = serve!();
    let mut client = served.client();
    let sequence = client.vm().unwrap().sequence;
    for refusal in [client.boot(), client.pause(), client.resume(), client.reset(), client.nmi()] {
        let document = refused(refusal);
        assert_eq!(document.status, 409);
        assert!(document.detail.starts_with("a VM that is empty cannot be "), "{document}");
        assert!(!document.request_id.is_empty());
    }
    let mut bad = VmConfig::new("/nonexistent/kernel");
    bad.cpus.count = 300;
    bad.devices.push(DeviceConfig::Disk(Disk::new("/nonexistent/disk")));
    let document = refused(client.create(&bad));
    let pointers: Vec<&str> = document.problems.iter().map(|problem| problem.pointer.as_str()).collect();
    assert_eq!((document.status, pointers), (422, vec!["/cpus/count", "/kernel/path", "/devices/0/path"]));
    assert_eq!(refused(client.vcpus()).status, 404);
    assert_eq!(client.vm().unwrap().sequence, sequence);

    client.create(&config("commands")).unwrap();
    client.boot().unwrap();
    let document = refused(client.put_device("rng0", &DeviceConfig::Rng(Rng::default())));
    assert!(document.status == 409 && document.detail.contains("hot-plug port"), "{document}");
    assert_eq!(refused(client.remove_device("disk0", false)).status, 404);
    let document = refused(client.set_vcpus(2));
    assert!(document.status == 409 && document.detail.contains("cpus.max"), "{document}");
    assert_eq!(refused(client.create(&config("timer"))).status, 409);
    let opened = client.console("other", false).map(drop);
    assert_eq!(refused(opened).status, 404);
}

#[test]
fn a_configuration_is_changed_before_the_boot_and_only_the_one_that_is_known() {
    let served = serve!();
    let mut client = served.client();
    let disk = NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    client.create(&config("commands")).unwrap();
    assert_eq!(client.put_device("root", &DeviceConfig::Disk(Disk::new(disk.path()))).unwrap(), None);
    let added = client.device("root").unwrap();
    assert_eq!((added.id(), added.type_name()), ("root", "disk"));
    assert_eq!(client.devices().unwrap().len(), 1);
    let tag = |client: &mut Client| {
        client.send("GET", "/api/v1/vm/devices/root", &Options::default()).unwrap().header("etag").unwrap().to_owned()
    };
    let known = tag(&mut client);
    let change = |client: &mut Client, body: &[u8], headers: &[(&str, &str)]| {
        let options = Options { headers, body: Some(body), ..Options::default() };
        client.send("PATCH", "/api/v1/vm/devices/root", &options).unwrap()
    };
    let changed = change(&mut client, br#"{"readonly": true}"#, &[("if-match", &known)]);
    assert_eq!(changed.status, 200, "{}", String::from_utf8_lossy(&changed.body));
    assert!(matches!(client.device("root").unwrap(), DeviceConfig::Disk(disk) if disk.readonly));
    assert_ne!(tag(&mut client), known);
    assert_eq!(change(&mut client, br#"{"readonly": false}"#, &[("if-match", &known)]).status, 412);
    assert_eq!(change(&mut client, br#"{"queues": 0, "x": 1}"#, &[]).status, 422);
    assert_eq!(change(&mut client, br#"{"readonly": null}"#, &[]).status, 200);
    assert!(matches!(client.device("root").unwrap(), DeviceConfig::Disk(disk) if !disk.readonly));
    assert_eq!(change(&mut client, br#"{"path": "/nonexistent"}"#, &[]).status, 422);
    assert!(
        matches!(client.device("root").unwrap(), DeviceConfig::Disk(known) if known.path.as_deref() == Some(disk.path()))
    );

    assert_eq!(client.set_vcpus(2).unwrap(), None);
    let vcpus = client.vcpus().unwrap();
    assert_eq!((vcpus.config.count, vcpus.present), (2, 0));
    client.boot().unwrap();
    assert_eq!(client.vcpus().unwrap().present, 2);
    assert_eq!(client.memory().unwrap().present, 64 << 20);
    let metrics = client.metrics().unwrap();
    for line in ["halyard_vm_phase{phase=\"running\"} 1", "halyard_disk_requests_total{device=\"root\",op=\"read\"} 0"]
    {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    client.destroy().unwrap();
}

#[test]
fn a_console_has_one_client_at_a_time() {
    let served = serve!();
    let mut client = served.client();
    client.create(&config("echo")).unwrap();
    client.boot().unwrap();
    let mut first = Console::open(&client, "serial");
    assert_eq!(refused(client.console("serial", false)).status, 409);
    let mut second = Console(client.console("serial", true).unwrap(), Vec::new());
    let mut rest = Vec::new();
    first.0.set_read_timeout(Some(PATIENCE)).unwrap();
    first.0.read_to_end(&mut rest).unwrap();
    second.send(b"hello");
    second.wait_for("hello");
    let plain = client.send("GET", "/api/v1/vm/consoles/serial", &Options::default()).unwrap();
    assert_eq!((plain.status, plain.header("upgrade")), (426, Some("halyard-console")));
}

#[test]
fn a_vm_of_run_ends_the_process_with_its_outcome() {
    if !kvm() {
        return;
    }
    let run = |name: &str| {
        let kernel = guest(name).display().to_string();
        Served::start("run", ["--kernel", &kernel, "--memory", "64M", "--serial", "api", "--debug-exit"])
    };
    let served = run("commands");
    let client = served.client();
    let mut events = client.events(None).unwrap();
    let mut console = Console::open(&client, "serial");
    console.wait_for("ready\n");
    console.send(b"q");
    // The last events come before the end.
    wait_for_phase(&mut events, PhaseName::Stopped);
    assert!(events.next().is_none());
    served.finish().expect_code(debug_exit(7));

    let served = run("commands");
    served.client().destroy().unwrap();
    served.finish().expect_code(7);
}

#[test]
fn a_termination_signal_gives_the_guest_its_time_and_no_more() {
    let mut served = serve!();
    let mut client = served.client();
    let mut config = config("power-button");
    config.kernel.cmdline = Some("ignore".into());
    config.lifecycle.shutdown_timeout = TimeSpan::from_millis(1000);
    client.create(&config).unwrap();
    client.boot().unwrap();
    Console::open(&client, "serial").wait_for("ready\n");
    let begun = Instant::now();
    served.signal(Signal::SIGTERM);
    served.wait_for_notice("STOPPING=1");
    let run = served.finish().expect_code(128 + 15);
    assert!(begun.elapsed() >= Duration::from_secs(1), "{run}");
}

#[test]
fn what_is_no_http_or_too_much_of_it_is_told_off() {
    let served = serve!();
    let ask = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(served.path("api")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        // The monitor may answer and hang up before it has heard all.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Ends::Write);
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        String::from_utf8_lossy(&reply).lines().next().unwrap_or_default().to_owned()
    };
    let put = |length: usize, body: &str| {
        format!(
            "PUT /api/v1/vm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    };
    let deep = "[".repeat(10_000);
    let headers: String = (0..1000).map(|number| format!("x-{number}: y\r\n")).collect();
    for (bytes, expected) in [
        ("\0\0\0\0\r\n\r\n".to_owned(), "HTTP/1.1 400"),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(100_000)), "HTTP/1.1 4"),
        (format!("GET / HTTP/1.1\r\n{headers}\r\n"), "HTTP/1.1 431"),
        (put(deep.len(), &deep), "HTTP/1.1 400"),
        (put(4 << 30, "{"), "HTTP/1.1 413"),
        (put(100, "{"), "HTTP/1.1 400"),
        ("GET /api/v1/nothing HTTP/1.1\r\nhost: x\r\n\r\n".to_owned(), "HTTP/1.1 404"),
        (
            "PUT /api/v1/vm HTTP/1.1\r\ncontent-type: text/plain\r\ncontent-length: 1\r\n\r\nx".to_owned(),
            "HTTP/1.1 415",
        ),
    ] {
        let status = ask(bytes.as_bytes());
        assert!(
            status.starts_with(expected),
            "{expected} is expected for {:?}, not {status:?}",
            &bytes[..bytes.len().min(60)]
        );
    }
    assert_eq!(served.client().vm().unwrap().phase, PhaseName::Empty);
}

#[test]
fn clients_that_vanish_or_only_connect_keep_nobody_out() {
    let served = serve!();
    let mut client = served.client();
    client.create(&config("commands")).unwrap();
    // One vanishes in the middle of its request: the request is carried out all the same.
    let mut vanishing = UnixStream::connect(served.path("api")).unwrap();
    let mut events = client.events(None).unwrap();
    vanishing.write_all(b"POST /api/v1/vm/actions/boot HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    drop(vanishing);
    wait_for_phase(&mut events, PhaseName::Running);
    // Many connect and say nothing, or half a request.
    let mut silent = Vec::new();
    for number in 0..400 {
        let mut stream = UnixStream::connect(served.path("api")).unwrap();
        if number % 2 == 0 {
            let _ = stream.write_all(b"PUT /api/v1/vm HTTP/1.1\r\ncontent-length: 10\r\n\r\n{");
        }
        silent.push(stream);
        if number % 50 == 0 {
            assert_eq!(served.client().vm().unwrap().phase, PhaseName::Running);
        }
    }
    assert_eq!(served.client().vm().unwrap().phase, PhaseName::Running);
    let metrics = served.client().metrics().unwrap();
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
    };
    assert!(value("halyard_api_connections ") <= 129, "{metrics}");
    assert!(value("halyard_api_connections_refused_total") > 0, "{metrics}");
}

#[test]
fn two_clients_at_once_are_both_answered_and_one_of_them_wins() {
    let served = serve!();
    served.client().create(&config("commands")).unwrap();
    let boots: Vec<bool> = thread::scope(|scope| {
        let clients = (0..8).map(|_| served.client());
        let clients: Vec<_> = clients.map(|mut client| scope.spawn(move || client.boot().is_ok())).collect();
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    assert_eq!(boots.iter().filter(|booted| **booted).count(), 1, "{boots:?}");
}

#[test]
fn a_slow_reader_of_events_is_told_once_of_what_it_lost() {
    let served = serve!();
    let mut client = served.client();
    client.create(&config("commands")).unwrap();
    let stalled = client.events(None).unwrap();
    let begin = client.vm().unwrap().sequence;
    // Nobody reads while more happens than the socket and the monitor keep.
    let mut changes = 0;
    for count in (1..=2_u32).cycle().take(8000) {
        client.set_vcpus(count).unwrap();
        changes += 1;
    }
    let end = client.vm().unwrap().sequence;
    assert_eq!(end - begin, changes);
    let (mut at, mut gaps) = (begin, 0);
    for event in stalled {
        let event = event.unwrap();
        match event.event {
            EventKind::Gap { first, last } => {
                assert_eq!((first, last), (at + 1, event.sequence));
                gaps += 1;
            }
            _ => assert_eq!(event.sequence, at + 1),
        }
        at = event.sequence;
        if at == end {
            break;
        }
    }
    assert_eq!(gaps, 1, "what was lost is told once");
}

#[test]
fn readers_of_events_make_room_when_they_go_and_not_when_they_only_send_no_more() {
    let served = serve!();
    let mut client = served.client();
    client.create(&config("commands")).unwrap();
    let mut quiet = UnixStream::connect(served.path("api")).unwrap();
    quiet.write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    quiet.shutdown(Ends::Write).unwrap();
    // Far more than there is room for, were they not noticed as they go.
    for _ in 0..1000 {
        let mut reader = UnixStream::connect(served.path("api")).unwrap();
        reader.write_all(b"GET /api/v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        // Nothing is left unread, which would break the connection.
        let mut lines = BufReader::new(reader).lines().map(Result::unwrap);
        assert_eq!(lines.next().unwrap(), "HTTP/1.1 200 OK");
        assert!(lines.any(|line| line == ":") && lines.nth(1).is_some());
    }
    client.set_vcpus(2).unwrap();
    quiet.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut lines = BufReader::new(quiet).lines().map(Result::unwrap);
    assert!(lines.any(|line| line == "event: config-changed"));
}

#[test]
fn descriptors_come_with_a_request_and_those_that_nobody_claims_are_closed() {
    let served = serve!();
    let mut client = served.client();
    let fds = || fs::read_dir(format!("/proc/{}/fd", served.pid())).unwrap().count();
    client.vm().unwrap();
    let before = fds();
    let (near, far) = UnixStream::pair().unwrap();
    let body = serde_json::to_vec(&config("commands")).unwrap();
    for count in [1, 3] {
        let all = vec![far.as_fd(); count];
        let options = Options { body: Some(&body), descriptors: &all, ..Options::default() };
        assert!(client.send("PUT", "/api/v1/vm", &options).unwrap().status < 300);
    }
    let with_inputs = fds();
    assert!(with_inputs <= before + 2, "{before} descriptors have become {with_inputs}");
    let options = Options { descriptors: &vec![far.as_fd(); 100], ..Options::default() };
    assert_eq!(client.send("GET", "/api/v1/vm", &options).unwrap().status, 200);
    assert_eq!(fds(), with_inputs);
    drop(far);
    let mut near = near;
    near.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(near.read(&mut [0]).unwrap(), 0, "every copy is closed");
    // A network card on a descriptor that is no tap.
    let (_near, far) = UnixStream::pair().unwrap();
    let card = br#"{"type": "net", "fd": 3}"#;
    let all = [far.as_fd()];
    let options = Options { body: Some(card), descriptors: &all, ..Options::default() };
    let reply = client.send("PUT", "/api/v1/vm/devices/net0", &options).unwrap();
    let document: api::ProblemDocument = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!((document.status, document.problems[0].pointer.as_str()), (422, "/fd"), "{document}");
    assert_eq!(fds(), with_inputs);
    // A disk on a descriptor, which the guest then has.
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(b"written by the host").unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    let mut config = config("blk");
    config.devices.push(DeviceConfig::Disk(Disk { id: "root".into(), path: None, fd: Some(4), ..Disk::new("") }));
    client.destroy().unwrap();
    let body = serde_json::to_vec(&config).unwrap();
    let disk = fs::OpenOptions::new().read(true).write(true).open(file.path()).unwrap();
    let all = [far.as_fd(), disk.as_fd()];
    let options = Options { body: Some(&body), descriptors: &all, ..Options::default() };
    let created = client.send("PUT", "/api/v1/vm", &options).unwrap();
    assert_eq!(created.status, 201, "{}", String::from_utf8_lossy(&created.body));
    // The guest ends by itself, and may have before a console could be opened: its disk tells.
    let mut events = client.events(None).unwrap();
    client.boot().unwrap();
    wait_for_phase(&mut events, PhaseName::Stopped);
    let bytes = fs::read(file.path()).unwrap();
    assert!(bytes[512..].starts_with(b"written by the guest\0"), "{}", String::from_utf8_lossy(&bytes[512..544]));
}

#[test]
fn the_socket_belongs_to_its_user_and_another_process_is_refused_it() {
    let served = serve!();
    let path = served.path("api");
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let path = path.display().to_string();
    halyard_tests::tiny::run_halyard(["serve", "--api-socket", &path])
        .expect_code(1)
        .expect_messages(&["another process listens there already"]);
    halyard_tests::tiny::run_halyard(["serve", "--boot", "--api-socket", "x,mode=9"])
        .expect_code(2)
        .expect_messages(&["--api-socket x,mode=9: mode", "--boot: there is no virtual machine to boot"]);
    served.signal(Signal::SIGINT);
    served.finish().expect_code(0);
}

#[test]
fn a_request_has_one_id_in_reply_and_log() {
    let served = serve!();
    let headers = [("x-request-id", "my-own-7")];
    let reply =
        served.client().send("POST", "/api/v1/vm/actions/boot", &Options { headers: &headers, ..Options::default() });
    let reply = reply.unwrap();
    assert_eq!(reply.header("x-request-id"), Some("my-own-7"));
    let document: api::ProblemDocument = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(document.request_id, "my-own-7");
    served.signal(Signal::SIGTERM);
    served.finish().expect_code(0).expect_messages(&["API: POST /api/v1/vm/actions/boot request=\"my-own-7\""]);
}
