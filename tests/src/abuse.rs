//! Abuse of the API, while a guest works on its disk and a well-behaved client goes on to be served.

use std::fmt;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use api::{Client, Console, DeviceConfig, Disk, Endpoint, EventKind, Outcome, PhaseName, VmConfig};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::{Pid, gettid};

use crate::contract;
use crate::tiny::{Served, binary, config};

/// How much more memory, in KiB, a monitor may have had at its peak for all abuse: 128 connections with a request of 16 KiB
/// and a small body or a reply each, two bodies of the largest size, and what the heap keeps of them.
const MEMORY_BOUND: u64 = 8 << 10;
/// The longest time that a well-behaved client may wait for its reply; other work on the machine counts, too.
const SERVED_WITHIN: Duration = Duration::from_secs(5);
/// Changes while a reader of events does not read: more than the socket and the monitor keep.
const CHANGES: u64 = 8000;
/// Bodies of the largest size that is taken, and how many come at once.
const LARGE: usize = 1 << 20;
const CROWD: usize = 32;
/// A console that the guest does not use.
const QUIET_CONSOLE: &str = "quiet";
/// The sectors that the guest writes in turn.
const SECTORS: u32 = 64;
const PATIENCE: Duration = Duration::from_secs(20);

/// A kind of abuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Requests of which a byte comes at a time.
    Slow,
    /// Halves of requests, on connections that stay open or are closed.
    Half,
    /// Bodies of gigabytes, told in advance or sent in chunks.
    Huge,
    /// Many bodies of the largest size at once, none of which comes to its end.
    Large,
    /// JSON 10,000 deep.
    Deep,
    /// Thousands of headers.
    Headers,
    /// Bytes that are no HTTP.
    Noise,
    /// Requests whose replies nobody reads.
    Deaf,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 8] =
        [Self::Slow, Self::Half, Self::Huge, Self::Large, Self::Deep, Self::Headers, Self::Noise, Self::Deaf];
}

/// What the guest says of itself.
#[derive(Debug, Clone, Copy)]
struct Work {
    rounds: u32,
    /// The longest time between two of its looks at the clock, in cycles of the time stamp counter.
    longest: u32,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Nobody is abused.
    calm: Share,
    /// Another monitor is: the host has as much to do, and the guest's monitor nothing.
    elsewhere: Share,
    /// The guest's own monitor is.
    abused: Share,
    connections: usize,
    memory: (u64, u64),
}

/// Stretches of time.
#[derive(Debug, Default)]
struct Share {
    took: Duration,
    /// Rounds of a write and a read that the guest did.
    rounds: u32,
    longest: Duration,
    /// Requests of the well-behaved client, and the longest time of one.
    served: usize,
    slowest: Duration,
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let each = f64::from(self.rounds) / self.took.as_secs_f64();
        write!(
            f,
            "{each:.0} disk rounds a second, longest stall of the vCPU {:.1} ms, {} requests served, slowest {:.1} ms",
            self.longest.as_secs_f64() * 1000.0,
            self.served,
            self.slowest.as_secs_f64() * 1000.0
        )
    }
}

impl Share {
    /// Adds another stretch.
    fn add(&mut self, other: &Self) {
        self.took += other.took;
        self.rounds += other.rounds;
        self.longest = self.longest.max(other.longest);
        self.served += other.served;
        self.slowest = self.slowest.max(other.slowest);
    }
}

impl Report {
    /// How much longer a vCPU stood still at the most than where another monitor had the same abuse.
    pub fn stall_of_its_own(&self) -> Duration {
        self.abused.longest.saturating_sub(self.elsewhere.longest)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "calm:              {}", self.calm)?;
        writeln!(f, "another is abused: {}", self.elsewhere)?;
        writeln!(f, "abused:            {}", self.abused)?;
        let ratio = self.abused.longest.as_secs_f64() / self.elsewhere.longest.as_secs_f64();
        writeln!(f, "longest stall, abused to another abused: {ratio:.2}")?;
        let (before, after) = self.memory;
        write!(f, "{} connections to both; peak of memory {before} KiB before, {after} KiB after", self.connections)
    }
}

/// A VM whose guest works on a disk in the file `image`.
fn busy(served: &Served) -> VmConfig {
    let image = served.path("image");
    std::fs::File::create(&image).and_then(|file| file.set_len(1 << 20)).expect("an image");
    let mut config = config("busy");
    config.devices.push(DeviceConfig::Disk(Disk::new(image)));
    config
}

/// Boots a VM; its serial port.
fn booted(served: &Served, config: &VmConfig) -> UnixStream {
    let mut client = served.client();
    client.create(config).expect("it can be created");
    client.boot().expect("it boots");
    let serial = client.console("serial", false).expect("its serial port");
    serial.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    serial
}

/// Asks the guest what it did since it was asked last. That it answers says that no write was lost, too.
fn work(serial: &mut UnixStream) -> Work {
    serial.write_all(b"r").expect("the guest's console");
    let mut said = Vec::new();
    while !(said.ends_with(b"\n") && String::from_utf8_lossy(&said).contains("longest")) {
        let mut byte = [0];
        let read = serial.read_exact(&mut byte);
        assert!(read.is_ok(), "the guest does not work any more: {read:?} after {:?}", String::from_utf8_lossy(&said));
        said.push(byte[0]);
    }
    let said = String::from_utf8_lossy(&said).into_owned();
    let number = |name: &str| {
        let (_, rest) = said.split_once(name).expect("its words");
        u32::from_str_radix(rest.get(..8).unwrap_or_default(), 16).expect("its number")
    };
    Work { rounds: number("rounds "), longest: number("longest ") }
}

/// A monitor whose guest works on a disk.
struct Victim {
    served: Served,
    serial: UnixStream,
    /// Cycles of the time stamp counter in a second.
    cycles: f64,
}

impl Victim {
    fn start() -> Self {
        let served = Served::start("serve", ["--log-level", "error"]);
        let mut config = busy(&served);
        config.devices.push(quiet_console());
        let serial = booted(&served, &config);
        let mut victim = Self { served, serial, cycles: frequency() };
        keep_to(victim.vcpu(), 1);
        victim.work();
        victim
    }

    /// The thread of its vCPU.
    fn vcpu(&self) -> Pid {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", self.served.pid())).expect("a process");
        let vcpu = tasks.filter_map(Result::ok).find(|task| {
            std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim_end() == "CPU 0/KVM")
        });
        let number = vcpu.and_then(|task| task.file_name().to_str()?.parse().ok());
        Pid::from_raw(number.expect("the number of a thread"))
    }

    /// What its descriptors are of.
    fn open(&self) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(format!("/proc/{}/fd", self.served.pid())).expect("a process");
        entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok()).collect()
    }

    fn work(&mut self) -> Work {
        work(&mut self.serial)
    }

    fn peak(&self) -> u64 {
        status(self.served.pid(), "VmHWM")
    }

    /// What guest and good client see while `meanwhile` goes on.
    fn watch(&mut self, meanwhile: impl FnOnce(&Path)) -> Share {
        let path = self.served.path("api");
        let before = self.work();
        let began = Instant::now();
        let over = AtomicBool::new(false);
        let (served, slowest) = thread::scope(|scope| {
            let good = scope.spawn(|| be_served(&path, &over));
            meanwhile(&path);
            over.store(true, Ordering::Relaxed);
            good.join().expect("the good client is served")
        });
        let (after, took) = (self.work(), began.elapsed());
        let longest = Duration::from_secs_f64(f64::from(after.longest) / self.cycles);
        let rounds = after.rounds.wrapping_sub(before.rounds);
        assert!(rounds > 0, "the guest stood still");
        Share { took, rounds, longest, served, slowest }
    }
}

/// A number of `/proc/PID/status`.
pub fn status(pid: u32, name: &str) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("a process");
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).expect("a field");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}

/// Cycles of the time stamp counter in a second, as the kernel tells them.
fn frequency() -> f64 {
    let text = std::fs::read_to_string("/proc/cpuinfo").expect("the processor");
    let line = text.lines().find_map(|line| line.strip_prefix("cpu MHz")).expect("its frequency");
    line.trim_start_matches(['\t', ' ', ':']).parse::<f64>().expect("a number") * 1e6
}

/// The well-behaved client: one connection that stays, and one for each question. All are answered.
fn be_served(path: &Path, over: &AtomicBool) -> (usize, Duration) {
    let (mut served, mut slowest) = (0, Duration::ZERO);
    let open = || {
        let mut client = Client::connect(path).expect("the good client is let in");
        client.set_timeout(Some(PATIENCE)).expect("a timeout");
        client
    };
    while !over.load(Ordering::Relaxed) {
        let began = Instant::now();
        assert_eq!(open().vm().expect("the good client is answered").phase, PhaseName::Running);
        let took = began.elapsed();
        assert!(took < SERVED_WITHIN, "the good client waited {took:?}");
        served += 1;
        slowest = slowest.max(took);
        thread::sleep(Duration::from_millis(5));
    }
    (served, slowest)
}

/// Lets a thread, and what it starts from now on, run on one processor alone, where there is one of that number.
fn keep_to(thread: Pid, processor: usize) {
    let mut one = CpuSet::new();
    if one.set(processor).is_ok() {
        // Where there is none, the host's scheduler shows among the stalls.
        let _ = sched_setaffinity(thread, &one);
    }
}

/// Abuses a monitor in these ways for so long each, then with a storm of connections and a deaf reader of events, and
/// another one in turn, which tells what of the guest's stalls is the host's and not the monitor's. It holds that the guest works on, good clients are served and memory is bounded.
///
/// # Panics
/// Where any of it is not so.
pub fn endure(kinds: &[Kind], each: Duration, storm: usize) -> Report {
    // The vCPU has a processor of its own, beside all that abuses and is abused: what it waits for is not the scheduler.
    keep_to(gettid(), 0);
    let mut victim = Victim::start();
    let other = bystander();
    let elsewhere = other.path("api");
    let mut report = Report::default();
    let before = victim.peak();
    let idle = Things::of(&victim);
    for kind in kinds {
        report.calm.add(&victim.watch(|_| thread::sleep(each)));
        report.elsewhere.add(&victim.watch(|_| report.connections += abuse_for(*kind, each, &elsewhere)));
        report.abused.add(&victim.watch(|path| report.connections += abuse_for(*kind, each, path)));
    }
    let mut storms = |path: &Path| {
        report.connections += crowd(path, storm);
        deaf_reader(path);
    };
    report.elsewhere.add(&victim.watch(|_| storms(&elsewhere)));
    report.abused.add(&victim.watch(storms));
    let after = victim.peak();
    assert!(after <= before + MEMORY_BOUND, "the peak of memory went from {before} KiB to {after} KiB");
    idle.wait_for(&victim);
    report.memory = (before, after);
    report
}

/// A monitor whose guest is halted.
fn bystander() -> Served {
    let served = Served::start("serve", ["--log-level", "error"]);
    let mut config = config("power-button");
    config.devices.push(quiet_console());
    let mut client = served.client();
    client.create(&config).expect("it can be created");
    client.boot().expect("it boots");
    served
}

fn quiet_console() -> DeviceConfig {
    DeviceConfig::Console(Console { id: QUIET_CONSOLE.into(), name: None, endpoint: Endpoint::Api {} })
}

/// Abuses a monitor in this way for so long; how often.
fn abuse_for(kind: Kind, time: Duration, path: &Path) -> usize {
    let until = Instant::now() + time;
    let mut connections = 0;
    while Instant::now() < until {
        abuse(kind, path);
        connections += 1;
    }
    connections
}

/// Descriptors and threads of a monitor.
#[derive(Debug, PartialEq, Eq)]
struct Things {
    descriptors: usize,
    threads: usize,
}

impl Things {
    fn of(victim: &Victim) -> Self {
        let count = |folder: &str| {
            std::fs::read_dir(format!("/proc/{}/{folder}", victim.served.pid())).expect("a process").count()
        };
        Self { descriptors: count("fd"), threads: count("task") }
    }

    /// Waits until there are no more of them.
    fn wait_for(&self, victim: &Victim) {
        let until = Instant::now() + PATIENCE;
        while Self::of(victim) != *self {
            let (now, open) = (Self::of(victim), victim.open());
            assert!(Instant::now() < until, "{now:?} are left behind of {self:?}: {open:?}");
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).and_then(|()| stream.set_write_timeout(Some(PATIENCE))).expect("timeouts");
    stream
}

/// Abuses it once.
fn abuse(kind: Kind, path: &Path) {
    let mut stream = connect(path);
    let put = "PUT /api/v1/vm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    // The monitor may hang up at any moment: what it says matters, where it must say something.
    let mut told = |bytes: &[u8], statuses: &[&str]| {
        let _ = stream.write_all(bytes);
        let mut reply = [0; 512];
        let length = stream.read(&mut reply).unwrap_or(0);
        let reply = String::from_utf8_lossy(&reply[..length]).into_owned();
        let status = reply.split(' ').nth(1).unwrap_or("none");
        assert!(statuses.contains(&status), "{kind:?} is told {reply:?}, and not one of {statuses:?}");
    };
    match kind {
        Kind::Slow => {
            for byte in b"GET /api/v1/vm HTTP/1.1\r\nhost: x\r\n" {
                if stream.write_all(&[*byte]).is_err() {
                    return;
                }
                thread::sleep(Duration::from_micros(200));
            }
        }
        Kind::Half => {
            let _ = stream.write_all(format!("{put}content-length: 100\r\n\r\n{{\"").as_bytes());
        }
        Kind::Huge => {
            told(format!("{put}content-length: {}\r\n\r\n{{", 8_u64 << 30).as_bytes(), &["413"]);
            let mut stream = connect(path);
            let chunk = [b"10000\r\n".as_slice(), &[b' '; 0x10000], b"\r\n"].concat();
            let _ = stream.write_all(format!("{put}transfer-encoding: chunked\r\n\r\n").as_bytes());
            // Gigabytes, if it took them.
            let sent = (0..1 << 16).take_while(|_| stream.write_all(&chunk).is_ok()).count();
            assert!(sent < 256, "{sent} chunks of 64 KiB were taken");
        }
        Kind::Large => {
            let body = [format!("{put}content-length: {LARGE}\r\n\r\n").into_bytes(), vec![b' '; LARGE - 1]].concat();
            let mut crowd: Vec<_> = (0..CROWD).map(|_| (connect(path), body.as_slice())).collect();
            for _ in 0..LARGE >> 15 {
                for (stream, rest) in &mut crowd {
                    let _ = stream.set_nonblocking(true);
                    let sent = stream.write(&rest[..rest.len().min(1 << 15)]).unwrap_or(0);
                    *rest = &rest[sent..];
                }
            }
        }
        Kind::Deep => {
            let deep = r#"{"a":"#.repeat(10_000);
            told(format!("{put}content-length: {}\r\n\r\n{deep}", deep.len()).as_bytes(), &["400"]);
        }
        Kind::Headers => {
            let flood: String = (0..5000).map(|number| format!("x-{number}: y\r\n")).collect();
            told(format!("GET /api/v1/vm HTTP/1.1\r\n{flood}\r\n").as_bytes(), &["431"]);
        }
        Kind::Noise => told(&[0xff; 4096], &["400"]),
        Kind::Deaf => {
            let _ = stream.set_nonblocking(true);
            while matches!(stream.write(b"GET /api/v1/openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"), Ok(1..)) {}
            let _ = stream.shutdown(Shutdown::Write);
        }
    }
}

/// So many connections that all stay, as far as this process may have descriptors, in waves; how many.
fn crowd(path: &Path, storm: usize) -> usize {
    let mut came = 0;
    while came < storm {
        let wave: Vec<UnixStream> = (0..(storm - came).min(500)).map(|_| connect(path)).collect();
        came += wave.len();
        for (number, mut stream) in wave.iter().enumerate() {
            if number % 2 == 0 {
                let _ = stream.write_all(b"GET /api/v1/vm HTTP/1.1\r\n");
            }
        }
    }
    came
}

/// A reader of events who never reads while much happens, and hears of one gap when it does.
fn deaf_reader(path: &Path) {
    let mut client = Client::connect(path).expect("a connection");
    client.set_timeout(Some(PATIENCE)).expect("a timeout");
    let begin = client.vm().expect("a state").sequence;
    let deaf = client.events(Some(begin)).expect("events");
    // A console that is opened and closed is two events.
    let mut end = begin;
    while end < begin + CHANGES {
        drop(client.console(QUIET_CONSOLE, true).expect("a console"));
        end = client.vm().expect("a state").sequence;
    }
    let (mut at, mut gaps) = (begin, 0);
    for event in deaf {
        let event = event.expect("an event");
        if let EventKind::Gap { first, .. } = event.event {
            assert_eq!(first, at + 1);
            gaps += 1;
        } else {
            assert_eq!(event.sequence, at + 1, "an event is missing, or comes twice");
        }
        at = event.sequence;
        if at >= end {
            break;
        }
    }
    assert_eq!(gaps, 1, "what was lost is told once");
}

/// The number of the newest job, of which there are only so many kept.
fn last_job(client: &mut Client) -> u64 {
    client.jobs().expect("jobs").last().map_or(0, |job| job.id)
}

/// Has schemathesis try so many examples for each operation while the guest works on its disk, and holds that no write was
/// lost: neither one that the guest has read back, nor the last to each sector. schemathesis' lines with figures.
///
/// # Panics
/// Where it was, or schemathesis finds something.
pub fn try_all_under_load(examples: &str) -> Vec<String> {
    let served = Served::start("serve", ["--log-level", "error"]).patient(Duration::from_secs(3600));
    let config = busy(&served);
    // The guest ends the run where the disk gives back another number than it was given.
    let events = served.client().events(None).expect("events");
    let watch = thread::spawn(move || {
        let ended = |event: &api::Event| {
            matches!(event.event, EventKind::Phase { outcome: Some(Outcome::DebugExit { .. }), .. })
        };
        events.map_while(Result::ok).filter(ended).count()
    });
    let (served, figures) = contract::try_all(served, &config, examples);
    // A VM from here on, whose guest overwrites each sector in turn.
    let mut client = served.client();
    client.destroy().expect("it can be destroyed");
    let mut serial = booted(&served, &config);
    while work(&mut serial).rounds < 1000 {}
    client.destroy().expect("it can be destroyed");
    let image = std::fs::read(served.path("image")).expect("the image");
    let number = |sector: &[u8]| sector.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let numbers: Vec<u32> = image.chunks(512).take(SECTORS as usize).map(number).collect();
    let last = numbers.iter().copied().max().unwrap_or(0);
    for (sector, number) in (0..).zip(&numbers) {
        let in_turn = number % SECTORS == sector && number + SECTORS > last;
        assert!(in_turn, "sector {sector} holds {number}, and the last number is {last}");
    }
    served.signal(Signal::SIGTERM);
    served.finish().expect_code(0);
    assert_eq!(watch.join().expect("a thread"), 0, "the guest has lost a write");
    figures
}

/// Kills programs in the middle of a job and of a console's stream: the next finds both as they should be.
///
/// # Panics
/// Where it does not.
pub fn kill_clients(rounds: usize) {
    let mut victim = Victim::start();
    let mut client = victim.served.client();
    // Not before the monitor has taken the connection.
    last_job(&mut client);
    let idle = Things::of(&victim);
    let socket = victim.served.path("api");
    let program = |words: &[&str]| {
        let mut command = Command::new(binary());
        command.arg("ctl").arg("--socket").arg(&socket).args(words);
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().expect("halyard ctl")
    };
    let killed = |mut child: std::process::Child| {
        child.kill().and_then(|()| child.wait()).expect("it is there");
    };
    let mut events = client.events(None).expect("events");
    let mut wait = |wanted: fn(&EventKind) -> bool| {
        let found = events.by_ref().find(|event| event.as_ref().is_ok_and(|event| wanted(&event.event)));
        assert!(found.is_some(), "the monitor has ended");
    };
    for _ in 0..rounds {
        let before = last_job(&mut client);
        let job = program(&["shutdown", "--deadline", "60s"]);
        wait(|event| matches!(event, EventKind::Job { .. }));
        killed(job);
        let last = last_job(&mut client);
        assert!(last > before, "the job is gone with its client");
        client.cancel_job(last).expect("it can be cancelled");
        wait(|event| matches!(event, EventKind::Job { .. }));

        let console = program(&["console", "serial", "--take-over"]);
        wait(|event| matches!(event, EventKind::ConsoleOpened { .. }));
        killed(console);
        wait(|event| matches!(event, EventKind::ConsoleClosed { .. }));
        victim.serial = client.console("serial", true).expect("the console is free again");
        victim.serial.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        wait(|event| matches!(event, EventKind::ConsoleOpened { .. }));
        victim.work();
    }
    drop(events);
    idle.wait_for(&victim);
}
