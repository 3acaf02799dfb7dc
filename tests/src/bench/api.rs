//! What the API costs: a request's time while the guest is busy, a boot over the socket beside one from the command line,
//! and the memory of it all.
//!
//! Requests are sent by a client that does no more than write the same bytes again and wait for as many as make a reply,
//! over a connection that stays. What of the time is the client's and the host's own is measured beside it: the same
//! number of bytes each way between two threads, over the same kind of socket, with the same clients.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::VmConfig;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use tempfile::TempDir;

use super::memory::private_memory;
use super::{Finding, Series};
use crate::process::Killed;
use crate::tiny::{self, Running};
use crate::vm;

/// The most that a request may take, in microseconds: the median, and all but one of a hundred.
const MEDIAN_LIMIT: f64 = 200.0;
const TAIL_LIMIT: f64 = 1000.0;
/// The most that a boot over the socket may take longer than one from the command line, and one in the sandbox than one
/// outside, in milliseconds.
const SOCKET_LIMIT: f64 = 2.0;
const SANDBOX_LIMIT: f64 = 1.0;
/// The most private memory of API and sandbox, in KiB.
const MEMORY_LIMIT: f64 = 1024.0;
/// Clients at once.
const CLIENTS: usize = 32;
/// Requests of each of them, and of a client alone.
const REQUESTS: usize = 400;
const REQUESTS_ALONE: usize = 4000;
/// How long a client waits between a reply and its next request, where it is one of many that look after a VM.
const PAUSE: Duration = Duration::from_millis(10);
/// Boots that are not counted.
const WARM_UP: usize = 3;
const PATIENCE: Duration = Duration::from_secs(120);
const GET: &[u8] = b"GET /api/v1/vm HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// Measures it all; a boot `rounds` times.
///
/// # Errors
/// Where a monitor does not run, or answers otherwise than it should.
pub fn measure(rounds: usize) -> Result<Vec<Finding>> {
    let mut findings = requests()?;
    findings.extend(boots(rounds)?);
    findings.push(memory()?);
    Ok(findings)
}

/// The time of requests while the guest works on a disk.
fn requests() -> Result<Vec<Finding>> {
    let folder = tempfile::tempdir()?;
    let (socket, image) = (folder.path().join("api"), folder.path().join("image"));
    std::fs::File::create(&image)?.set_len(1 << 20)?;
    let mut command = Command::new(vm::halyard()?);
    command.args(["run", "--memory", "64M", "--debug-exit", "--disk"]).arg(format!("path={}", image.display()));
    command.arg("--kernel").arg(tiny::build("busy")?).arg("--api-socket").arg(&socket);
    let mut running = Running::start(command, PATIENCE);
    running.wait_for("ready\n");
    let length = RawClient::open(&socket)?.reply_length()?;
    let (echo, echoing) = echo(length)?;
    let mut findings = Vec::new();
    for (clients, pause, how) in [
        (1, Duration::ZERO, "1 client, one request after another"),
        (CLIENTS, PAUSE, "32 clients, each with a pause of 10 ms between its requests"),
        (CLIENTS, Duration::ZERO, "32 clients, each with one request after another"),
    ] {
        let times = from_all(&socket, clients, pause, length)?;
        let least = from_all(&echo, clients, pause, length)?;
        for (what, share, limit) in [("median", 0.5, MEDIAN_LIMIT), ("99th percentile", 0.99, TAIL_LIMIT)] {
            let series = vec![
                Series::new("halyard", vec![percentile(&times, share)]),
                Series::new("an echo of as many bytes", vec![percentile(&least, share)]),
            ];
            let what = format!("GET /api/v1/vm, guest busy, {how}: {what} of {}", times.len());
            findings.push(Finding::absolute(what, "us", series, limit));
        }
    }
    drop(echoing);
    running.send(b"r");
    running.wait_for("rounds ");
    running.send(b"q");
    ensure!(running.finish().code() == Some(tiny::debug_exit(0)), "the busy guest has failed");
    Ok(findings)
}

/// A connection that asks the same question again and again.
struct RawClient {
    stream: UnixStream,
    reply: Vec<u8>,
    /// Bytes of the reply that have come.
    read: usize,
    /// When the last request was sent, and how many were answered.
    asked: Instant,
    answered: usize,
}

impl RawClient {
    fn open(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self::new(stream))
    }

    fn new(stream: UnixStream) -> Self {
        Self { stream, reply: vec![0; 64 << 10], read: 0, asked: Instant::now(), answered: 0 }
    }

    /// Bytes of a reply to [`GET`].
    fn reply_length(&mut self) -> Result<usize> {
        self.stream.write_all(GET)?;
        self.reply("200")
    }

    /// Sends a request with a JSON body, or none, whose reply must have this status.
    fn ask(&mut self, line: &str, body: &str, status: &str) -> Result<()> {
        self.send(line, body)?;
        self.reply(status).map(drop).with_context(|| line.to_owned())
    }

    fn send(&mut self, line: &str, body: &str) -> Result<()> {
        let kind = if body.is_empty() { "" } else { "content-type: application/json\r\n" };
        let length = body.len();
        let request = format!("{line} HTTP/1.1\r\nhost: localhost\r\n{kind}content-length: {length}\r\n\r\n{body}");
        Ok(self.stream.write_all(request.as_bytes())?)
    }

    /// Bytes of the reply, which must have this status.
    fn reply(&mut self, status: &str) -> Result<usize> {
        let mut length = 0;
        loop {
            let more = self.stream.read(self.reply.get_mut(length..).context("a long reply")?)?;
            ensure!(more > 0, "the connection was closed after {length} bytes of a reply");
            length += more;
            let text = std::str::from_utf8(&self.reply[..length])?;
            let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
            ensure!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
            let field = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() == field.map_or(Ok(0), str::parse)? {
                return Ok(length);
            }
        }
    }

    /// Sends a request.
    fn begin(&mut self) -> Result<()> {
        self.read = 0;
        self.asked = Instant::now();
        Ok(self.stream.write_all(GET)?)
    }

    /// Reads what has come, and says whether it is a whole reply of about this length: numbers in it may have grown.
    fn read_more(&mut self, length: usize) -> Result<bool> {
        let more = self.stream.read(self.reply.get_mut(self.read..).context("a long reply")?)?;
        ensure!(more > 0, "the connection was closed after {} bytes of a reply", self.read);
        self.read += more;
        // A reply ends with the brace of its only object.
        Ok(self.read + 8 >= length && self.reply.get(self.read - 1) == Some(&b'}'))
    }
}

/// Microseconds of requests of so many clients at once, in order: from when a request was written until its reply could be
/// read.
fn from_all(socket: &Path, clients: usize, pause: Duration, length: usize) -> Result<Vec<f64>> {
    let requests = if clients == 1 { REQUESTS_ALONE } else { REQUESTS };
    let connections = (0..clients).map(|_| RawClient::open(socket)).collect::<Result<Vec<_>>>()?;
    let times = if pause.is_zero() {
        back_to_back(connections, requests, length)
    } else {
        with_pauses(connections, requests, pause, length)
    };
    let mut times = times?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Clients that rest most of the time: each is a thread.
fn with_pauses(clients: Vec<RawClient>, requests: usize, pause: Duration, length: usize) -> Result<Vec<f64>> {
    let ask = |mut client: RawClient| {
        move || {
            let mut times = Vec::with_capacity(requests);
            for _ in 0..requests {
                client.begin()?;
                while !client.read_more(length)? {}
                times.push(client.asked.elapsed().as_secs_f64() * 1e6);
                thread::sleep(pause);
            }
            Ok(times)
        }
    };
    let times: Result<Vec<Vec<f64>>> = thread::scope(|scope| {
        let threads: Vec<_> = clients.into_iter().map(|client| scope.spawn(ask(client))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(|_| anyhow::bail!("a client panicked"))).collect()
    });
    Ok(times?.concat())
}

/// Clients that ask again at once: they are one thread, so that they do not take the processors from what they measure.
fn back_to_back(mut clients: Vec<RawClient>, requests: usize, length: usize) -> Result<Vec<f64>> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    for (number, client) in (0..).zip(&mut clients) {
        epoll.add(&client.stream, EpollEvent::new(EpollFlags::EPOLLIN, number))?;
        client.begin()?;
    }
    let all = requests * clients.len();
    let mut times = Vec::with_capacity(all);
    let mut events = [EpollEvent::empty(); CLIENTS];
    while times.len() < all {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        let came = Instant::now();
        for event in &events[..count] {
            let client = clients.get_mut(usize::try_from(event.data())?).context("a client of this number")?;
            if !client.read_more(length)? {
                continue;
            }
            times.push(came.duration_since(client.asked).as_secs_f64() * 1e6);
            client.answered += 1;
            if client.answered < requests {
                client.begin()?;
            }
        }
    }
    Ok(times)
}

/// The value below which this share of sorted ones lies.
fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "short")]
    let index = (sorted.len() as f64 * share) as usize;
    sorted.get(index).or(sorted.last()).copied().unwrap_or(f64::NAN)
}

/// A socket at which a thread answers each request with so many bytes, in a folder that goes with it. It ends when its
/// clients are gone.
fn echo(length: usize) -> Result<(PathBuf, TempDir)> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("echo");
    let listener = UnixListener::bind(&path)?;
    let answer = [vec![b' '; length - 1], vec![b'}']].concat();
    thread::spawn(move || answer_all(&listener, &answer));
    Ok((path, folder))
}

/// Answers clients of a socket for as long as waiting works.
fn answer_all(listener: &UnixListener, answer: &[u8]) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::empty())?;
    epoll.add(listener, EpollEvent::new(EpollFlags::EPOLLIN, u64::MAX))?;
    let mut clients: Vec<Option<UnixStream>> = Vec::new();
    let mut events = [EpollEvent::empty(); CLIENTS];
    loop {
        let count = epoll.wait(&mut events, EpollTimeout::NONE)?;
        for event in &events[..count] {
            if event.data() == u64::MAX {
                let (stream, _) = listener.accept()?;
                epoll.add(&stream, EpollEvent::new(EpollFlags::EPOLLIN, u64::try_from(clients.len())?))?;
                clients.push(Some(stream));
                continue;
            }
            let Some(place) = clients.get_mut(usize::try_from(event.data())?) else { continue };
            let Some(stream) = place else { continue };
            if !matches!(stream.read(&mut [0; 4096]), Ok(1..)) || stream.write_all(answer).is_err() {
                *place = None;
            }
        }
    }
}

/// Where the time of a boot over the socket goes, in milliseconds.
#[derive(Debug, Default)]
struct Stages {
    /// From right before the start of the process until it accepts a connection.
    started: Vec<f64>,
    /// Until the VM is created.
    created: Vec<f64>,
    /// From the request to boot until the guest's first byte.
    byte: Vec<f64>,
    /// All of it.
    all: Vec<f64>,
}

/// Boots from the command line and over the socket, with the sandbox and without, in turn.
fn boots(rounds: usize) -> Result<Vec<Finding>> {
    let guest = tiny::build("first-byte")?;
    let mut lines = [Vec::new(), Vec::new()];
    let mut sockets = [Stages::default(), Stages::default()];
    let mut warm = Stages::default();
    for round in 0..WARM_UP + rounds {
        if round == WARM_UP {
            (lines, sockets) = Default::default();
        }
        for (index, sandbox) in ["on", "off"].into_iter().enumerate() {
            lines[index].push(from_line(&guest, sandbox)?);
            over_socket(&guest, sandbox, &mut sockets[index], (sandbox == "on").then_some(&mut warm))?;
        }
    }
    let [on, off] = &sockets;
    for (how, stages) in [("a new process, sandbox on", on), ("a new process, sandbox off", off)] {
        tell(how, stages);
    }
    tell("a process that has had a VM before", &warm);
    let what = |what: &str| format!("{what} to the guest's first byte, 1 vCPU, 256 MiB, serial port only");
    let pair = |one: &Vec<f64>, other: &Vec<f64>, names: [&str; 2]| {
        vec![Series::new(names[0], one.clone()), Series::new(names[1], other.clone())]
    };
    let ways = ["over the socket", "from the command line"];
    let walls = ["sandbox on", "sandbox off"];
    Ok(vec![
        Finding::difference(what("Exec, create and boot"), "ms", pair(&on.all, &lines[0], ways), SOCKET_LIMIT),
        Finding::difference(
            what("Exec, create and boot, sandbox"),
            "ms",
            pair(&on.all, &off.all, walls),
            SANDBOX_LIMIT,
        ),
        Finding::difference(what("Exec, sandbox"), "ms", pair(&lines[0], &lines[1], walls), SANDBOX_LIMIT),
        Finding::difference(
            what("Create and boot in a running process"),
            "ms",
            pair(&warm.all, &lines[0], ways),
            SOCKET_LIMIT,
        ),
    ])
}

fn tell(how: &str, stages: &Stages) {
    let median = |values: &Vec<f64>| Series::new("", values.clone()).median;
    eprintln!(
        "  boot over the socket, {how}: {:.2} ms until it accepts, {:.2} for the VM's creation, {:.2} from the request to \
         boot to the first byte, {:.2} in all (medians)",
        median(&stages.started),
        median(&stages.created),
        median(&stages.byte),
        median(&stages.all)
    );
}

/// Milliseconds since a moment.
fn since(moment: Instant) -> f64 {
    moment.elapsed().as_secs_f64() * 1000.0
}

fn from_line(guest: &Path, sandbox: &str) -> Result<f64> {
    let mut command = Command::new(vm::halyard()?);
    command.args(["run", "--memory", "256M", "--debug-exit", "--sandbox", sandbox, "--kernel"]).arg(guest);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let began = Instant::now();
    let mut child = Killed(command.spawn()?);
    first_byte(&mut child)?;
    Ok(since(began))
}

fn first_byte(child: &mut Killed) -> Result<()> {
    let mut byte = [0];
    child.0.stdout.as_mut().context("a pipe")?.read_exact(&mut byte).context("the guest's first byte")?;
    ensure!(byte == *b"H", "the guest's first byte is {byte:?}");
    Ok(())
}

/// Boots a VM of a new process, and another one of the same process for `again`.
fn over_socket(guest: &Path, sandbox: &str, stages: &mut Stages, again: Option<&mut Stages>) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("api");
    let mut config = VmConfig::new(guest);
    config.memory.size = "256M".parse().map_err(|error| anyhow::anyhow!("{error}"))?;
    config.platform.debug_exit = true;
    let body = serde_json::to_string(&config)?;
    let mut command = Command::new(vm::halyard()?);
    command.args(["serve", "--log-level", "error", "--sandbox", sandbox, "--api-socket"]).arg(&socket);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let began = Instant::now();
    let mut child = Killed(command.spawn()?);
    let mut client = loop {
        if let Ok(stream) = UnixStream::connect(&socket) {
            break RawClient::new(stream);
        }
        ensure!(began.elapsed() < PATIENCE, "nothing listens at {}", socket.display());
        thread::sleep(Duration::from_micros(20));
    };
    stages.started.push(since(began));
    create_and_boot(&mut client, &body, &mut child, began, stages)?;
    let Some(again) = again else { return Ok(()) };
    // A VM that was destroyed has left all that it held.
    client.ask("DELETE /api/v1/vm", "", "204")?;
    let began = Instant::now();
    again.started.push(0.0);
    create_and_boot(&mut client, &body, &mut child, began, again)
}

fn create_and_boot(
    client: &mut RawClient,
    body: &str,
    child: &mut Killed,
    start: Instant,
    stages: &mut Stages,
) -> Result<()> {
    let began = Instant::now();
    client.ask("PUT /api/v1/vm", body, "201")?;
    stages.created.push(since(began));
    let began = Instant::now();
    client.send("POST /api/v1/vm/actions/boot", "")?;
    first_byte(child)?;
    stages.byte.push(since(began));
    stages.all.push(since(start));
    // The byte may come before the reply, or behind it.
    client.reply("204").map(drop)
}

/// What a monitor with API and sandbox has more of private memory than one without, both with an idle guest.
fn memory() -> Result<Finding> {
    let with = private(true)?;
    let without = private(false)?;
    let what = "Private dirty memory of API and sandbox, guest halted, after a client's visit";
    let series = vec![Series::new("with both", vec![with]), Series::new("with neither", vec![without])];
    Ok(Finding::difference(what, "KiB", series, MEMORY_LIMIT))
}

fn private(both: bool) -> Result<f64> {
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("api");
    let halyard = vm::halyard()?;
    // Pages of the program that were just built count as dirty until they are on disk.
    std::fs::File::open(&halyard)?.sync_all()?;
    let mut command = Command::new(halyard);
    command.args(["run", "--memory", "256M", "--debug-exit", "--kernel"]).arg(tiny::build("power-button")?);
    if both {
        command.arg("--api-socket").arg(&socket);
    } else {
        command.args(["--sandbox", "off"]);
    }
    let mut running = Running::start(command, PATIENCE);
    // From here on the guest is halted.
    running.wait_for("ready\n");
    if both {
        RawClient::open(&socket)?.reply_length()?;
    }
    private_memory(running.pid())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_sorted_values() {
        let values: Vec<f64> = (0..200).map(f64::from).collect();
        assert_eq!((percentile(&values, 0.5), percentile(&values, 0.99)), (100.0, 198.0));
        assert_eq!(percentile(&[7.0], 0.99), 7.0);
    }
}
