mod lead;
mod terminal;

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::{Sender, channel};
use std::thread::{self, ThreadId};

use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::pty::openpty;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::Mode;
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::{Pid, pipe};
use tempfile::TempDir;

use super::connection::Waiting;
use super::terminal::RawTerminal;
use super::*;
use crate::virtio::testing::{TIMEOUT, wait};

const MIB: usize = 1 << 20;

/// Set for a process that a test starts: what it is to do.
const CHILD: &str = "HALYARD_TEST_TERMINAL_CHILD";

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut data = Vec::with_capacity(len);
    for _ in 0..len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        data.push(state.to_le_bytes()[3]);
    }
    data
}

struct Bench {
    dir: TempDir,
    io: ConsoleIo,
}

impl Bench {
    fn new() -> Self {
        Self { dir: TempDir::new().unwrap(), io: ConsoleIo::new().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("console")
    }

    fn open(&self, kind: EndpointKind, history: usize) -> Endpoint {
        let options = EndpointOptions { history, ..EndpointOptions::new("test", kind) };
        Endpoint::open(options, &self.io).unwrap()
    }

    fn socket(&self, history: usize) -> Endpoint {
        self.open(EndpointKind::Socket { path: self.path() }, history)
    }

    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        client
    }
}

fn wait_connected(handle: &EndpointHandle, connected: bool) {
    while handle.connected() != connected {
        assert!(wait(handle.connection_event(), TIMEOUT), "nobody came or went");
    }
}

/// Writes all, as a device that can hold its guest back.
fn write_all(handle: &EndpointHandle, mut data: &[u8]) {
    while !data.is_empty() {
        let taken = handle.write(data);
        data = &data[taken..];
        if !data.is_empty() {
            assert!(wait(handle.writable_event(), TIMEOUT), "no room was made");
        }
    }
}

/// Reads `len` bytes of input, a few at a time, as a device with a small buffer.
fn read_input(handle: &EndpointHandle, len: usize) -> Vec<u8> {
    let mut data = Vec::new();
    let mut piece = [0; 700];
    while data.len() < len {
        match handle.read(&mut piece) {
            Ok(count) => data.extend_from_slice(&piece[..count]),
            Err(e) => {
                assert_eq!(e.kind(), io::ErrorKind::WouldBlock);
                assert!(wait(handle.input_event(), TIMEOUT), "no input after {} bytes", data.len());
            }
        }
    }
    data
}

fn read_exact(from: &mut impl Read, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    from.read_exact(&mut data).unwrap();
    data
}

#[test]
fn a_slow_client_gets_every_byte() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let mut client = bench.client();
    wait_connected(&handle, true);
    let data = pattern(2 * MIB);
    let reader = thread::spawn(move || read_exact(&mut client, 2 * MIB));
    write_all(&handle, &data);
    assert!(endpoint.drain(TIMEOUT));
    assert!(reader.join().unwrap() == data);
    assert_eq!(endpoint.lost(), 0);
}

#[test]
fn a_mebibyte_of_input_arrives_whole_even_from_one_who_leaves() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let data = pattern(MIB);
    let mut client = bench.client();
    let sent = data.clone();
    let writer = thread::spawn(move || {
        client.write_all(&sent).unwrap();
        // It closes with input still on its way.
    });
    assert!(read_input(&handle, MIB) == data);
    writer.join().unwrap();
    wait_connected(&handle, false);
    // The next one is served.
    let mut client = bench.client();
    client.write_all(b"next").unwrap();
    assert_eq!(read_input(&handle, 4), b"next");
}

#[test]
fn without_a_client_the_guest_goes_on_and_the_last_output_is_shown_later() {
    let bench = Bench::new();
    let endpoint = bench.socket(64 << 10);
    let handle = endpoint.handle();
    let data = pattern(300_000);
    assert_eq!(handle.write(&data), data.len());
    let mut client = bench.client();
    assert!(read_exact(&mut client, 64 << 10) == data[data.len() - (64 << 10)..]);
    wait_connected(&handle, true);
    write_all(&handle, b"and more");
    assert_eq!(read_exact(&mut client, 8), b"and more");
    drop(client);
    wait_connected(&handle, false);
    handle.write(b"!");
    let mut client = bench.client();
    let shown = read_exact(&mut client, 64 << 10);
    assert!(shown.ends_with(b"and more!"));
}

#[test]
fn a_port_without_history_shows_none() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    handle.write(b"nobody hears this");
    let mut client = bench.client();
    wait_connected(&handle, true);
    handle.write(b"this");
    assert_eq!(read_exact(&mut client, 4), b"this");
}

/// A listener that tells when it is told of input, and on which thread it is taken apart.
#[derive(Debug)]
struct Witness(Sender<Option<ThreadId>>);

impl InputListener for Witness {
    fn input_waits(&self) {
        self.0.send(None).unwrap();
        // Time for its owner to give it up meanwhile.
        (0..1000).for_each(|_| thread::yield_now());
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.0.send(Some(thread::current().id())).unwrap();
    }
}

#[test]
fn a_listener_is_taken_apart_by_its_owner_though_it_is_being_told_of_input() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let mut client = bench.client();
    wait_connected(&handle, true);
    for _ in 0..20 {
        let (sender, told) = channel();
        let listener: Arc<dyn InputListener> = Arc::new(Witness(sender));
        let subscription = handle.listen(Arc::downgrade(&listener));
        client.write_all(b"x").unwrap();
        assert_eq!(told.recv_timeout(TIMEOUT), Ok(None));
        drop(subscription);
        drop(listener);
        assert_eq!(told.into_iter().last(), Some(Some(thread::current().id())));
        assert_eq!(read_input(&handle, 1), b"x");
    }
}

#[test]
fn a_device_that_cannot_wait_loses_the_oldest() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let mut client = bench.client();
    wait_connected(&handle, true);
    let data = pattern(2 * MIB);
    for piece in data.chunks(1000) {
        handle.write_over(piece);
    }
    let lost = usize::try_from(endpoint.lost()).unwrap();
    assert!(lost > 0, "a socket does not take 2 MiB");
    let got = read_exact(&mut client, 2 * MIB - lost);
    assert!(got.ends_with(&data[2 * MIB - OUTPUT_CAPACITY..]));
}

#[test]
fn a_console_waits_for_its_reader_only_so_long() {
    let bench = Bench::new();
    let options = EndpointOptions {
        history: 0,
        patience: Some(Duration::from_millis(300)),
        ..EndpointOptions::new("test", EndpointKind::Socket { path: bench.path() })
    };
    let endpoint = Endpoint::open(options, &bench.io).unwrap();
    let handle = endpoint.handle();
    let mut client = bench.client();
    wait_connected(&handle, true);
    let data = pattern(2 * MIB);
    let taken = handle.write(&data);
    assert!(taken < data.len());
    assert!(wait(handle.writable_event(), TIMEOUT), "the guest is held back for ever");
    assert_eq!(handle.write(&data[taken..]), data.len() - taken);
    let lost = usize::try_from(endpoint.lost()).unwrap();
    assert!(lost > 0);
    // A reader who is back gets what is left, and everything from then on.
    let got = read_exact(&mut client, data.len() - lost);
    assert!(got.ends_with(&data[data.len() - OUTPUT_CAPACITY..]));
    assert!(endpoint.drain(TIMEOUT));
    let reader = thread::spawn(move || read_exact(&mut client, 64 << 10));
    write_all(&handle, &data[..64 << 10]);
    assert!(reader.join().unwrap() == data[..64 << 10]);
    assert_eq!(usize::try_from(endpoint.lost()).unwrap(), lost);
}

#[test]
fn clients_are_served_one_after_the_other() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let mut first = bench.client();
    wait_connected(&handle, true);
    let mut second = bench.client();
    second.write_all(b"second").unwrap();
    first.write_all(b"first").unwrap();
    assert_eq!(read_input(&handle, 5), b"first");
    assert_eq!(handle.read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    drop(first);
    assert_eq!(read_input(&handle, 6), b"second");
}

#[test]
fn a_client_that_only_listens_still_gets_output() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let mut client = bench.client();
    client.write_all(b"ls\n").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_input(&handle, 3), b"ls\n");
    let data = pattern(MIB);
    let reader = thread::spawn(move || read_exact(&mut client, MIB));
    write_all(&handle, &data);
    assert!(reader.join().unwrap() == data);
    wait_connected(&handle, false);
}

#[test]
fn a_client_that_dies_amid_output_lets_the_guest_go_on() {
    let bench = Bench::new();
    let endpoint = bench.socket(0);
    let handle = endpoint.handle();
    let client = bench.client();
    wait_connected(&handle, true);
    let data = pattern(MIB);
    let taken = handle.write(&data);
    assert!(taken < MIB);
    drop(client);
    assert!(wait(handle.writable_event(), TIMEOUT), "the device was forgotten");
    write_all(&handle, &data[taken..]);
    wait_connected(&handle, false);
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let bench = Bench::new();
    drop(UnixListener::bind(bench.path()).unwrap());
    // A child that another test makes has it, too, until it executes its program.
    while UnixStream::connect(bench.path()).is_ok() {}
    let endpoint = bench.socket(0);
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(bench.path()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600);
    let kind = || EndpointKind::Socket { path: bench.path() };
    let error = Endpoint::open(EndpointOptions::new("serial", kind()), &bench.io).unwrap_err();
    assert!(error.to_string().contains("another process listens there"), "{error}");
    drop(endpoint);
    assert!(!bench.path().exists(), "removed at the end");
    fs::write(bench.path(), "precious").unwrap();
    assert!(Endpoint::open(EndpointOptions::new("serial", kind()), &bench.io).is_err());
    assert_eq!(fs::read(bench.path()).unwrap(), b"precious");
}

#[test]
fn a_file_gets_everything_and_is_emptied_or_kept_as_asked() {
    let bench = Bench::new();
    let file = |append| EndpointKind::File { path: bench.path(), append };
    fs::write(bench.path(), "old ").unwrap();
    let data = pattern(MIB);
    let endpoint = bench.open(file(true), 0);
    assert_eq!(endpoint.handle().write(&data), MIB);
    assert!(fs::read(bench.path()).unwrap() == [b"old ", &data[..]].concat());
    let endpoint = bench.open(file(false), 0);
    endpoint.handle().write_over(b"new");
    assert_eq!(fs::read(bench.path()).unwrap(), b"new");
    assert_eq!(endpoint.handle().read(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    let options = EndpointOptions::new("serial", EndpointKind::File { path: bench.dir.path().into(), append: false });
    let error = Endpoint::open(options, &bench.io).unwrap_err().to_string();
    assert!(error.contains("is a directory; give the path of a regular file"), "{error}");
}

#[test]
fn nowhere_takes_everything() {
    let bench = Bench::new();
    let endpoint = bench.open(EndpointKind::Off, 0);
    assert_eq!(endpoint.handle().write(&pattern(MIB)), MIB);
    assert!(!endpoint.handle().connected());
    assert!(endpoint.drain(TIMEOUT));
}

fn open_pty(endpoint: &Endpoint) -> fs::File {
    let path = endpoint.path().unwrap();
    fs::File::from(open(path, OFlag::O_RDWR | OFlag::O_NOCTTY, Mode::empty()).unwrap())
}

#[test]
fn a_pseudo_terminal_serves_those_who_open_it() {
    let bench = Bench::new();
    let endpoint = bench.open(EndpointKind::Pty, 1000);
    let handle = endpoint.handle();
    // Nobody there: the guest goes on.
    assert_eq!(handle.write(&pattern(MIB)), MIB);
    for round in 0..3 {
        handle.write(b"hello\n");
        let mut terminal = open_pty(&endpoint);
        wait_connected(&handle, true);
        let shown = read_exact(&mut terminal, 1000);
        assert!(shown.ends_with(b"hello\n"), "round {round}");
        terminal.write_all(b"ls\r\x03").unwrap();
        assert_eq!(read_input(&handle, 4), b"ls\r\x03");
        drop(terminal);
        wait_connected(&handle, false);
    }
}

#[test]
fn a_pseudo_terminal_carries_a_mebibyte_both_ways() {
    let bench = Bench::new();
    let endpoint = bench.open(EndpointKind::Pty, 0);
    let handle = endpoint.handle();
    let mut terminal = open_pty(&endpoint);
    wait_connected(&handle, true);
    let data = pattern(MIB);
    let sent = data.clone();
    let mut writing = terminal.try_clone().unwrap();
    let writer = thread::spawn(move || writing.write_all(&sent).unwrap());
    assert!(read_input(&handle, MIB) == data, "input");
    writer.join().unwrap();
    let reader = thread::spawn(move || read_exact(&mut terminal, MIB));
    write_all(&handle, &data);
    assert!(reader.join().unwrap() == data, "output");
}

/// The processor time that this process's console thread has used, in clock ticks (10 ms).
fn console_thread_ticks() -> u64 {
    let mut ticks = 0;
    for task in fs::read_dir("/proc/self/task").unwrap() {
        let stat = fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
        let (name, rest) = stat.split_once(')').unwrap();
        if name.ends_with("(console-io") {
            let fields: Vec<&str> = rest.split_whitespace().collect();
            ticks += fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        }
    }
    ticks
}

#[test]
fn ends_and_hang_ups_leave_the_thread_asleep() {
    if std::env::var(CHILD).is_ok() {
        // Input of this process is a closed pipe, output one that nobody reads.
        let bench = Bench::new();
        let stdio = bench.open(EndpointKind::Stdio, 0);
        let pty = bench.open(EndpointKind::Pty, 0);
        let socket = bench.socket(0);
        drop(open_pty(&pty));
        wait_connected(&pty.handle(), false);
        // A client that has said all, and more than is taken of it.
        let mut client = bench.client();
        client.write_all(&pattern(100_000)).unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        stdio.handle().write_over(&pattern(200_000));
        let quiet = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        assert!(!wait(&quiet, Duration::from_millis(300)));
        assert_eq!(read_input(&socket.handle(), 100_000).len(), 100_000);
        assert!(!wait(&quiet, Duration::from_millis(300)));
        drop(client);
        wait_connected(&socket.handle(), false);
        assert!(!wait(&quiet, Duration::from_millis(300)));
        std::process::exit(if console_thread_ticks() < 10 { 0 } else { 1 });
    }
    let (input, to_child) = pipe().unwrap();
    drop(to_child);
    // Not closed at its other end, since the test's own frame writes to it.
    let (_from_child, output) = pipe().unwrap();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "endpoint::tests::ends_and_hang_ups_leave_the_thread_asleep", "--nocapture"])
        .env(CHILD, "idle")
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(0), "1: the thread is busy; else the child failed");
}

/// An endpoint on other streams than this process's own.
fn streams(bench: &Bench, input: (OwnedFd, Waiting), output: (OwnedFd, Waiting), quit: Option<EventFd>) -> Endpoint {
    let core = Arc::new(Core::new("streams".into(), None, quit).unwrap());
    let source: Weak<dyn Source> = Arc::downgrade(&(Arc::clone(&core) as Arc<dyn Source>));
    let registration = bench.io.add(source).unwrap();
    let with_escape = nix::unistd::isatty(&input.0).unwrap();
    let connection = if input.1 == Waiting::WhenReady {
        Connection::split(input, output, &registration)
    } else {
        Connection::streams(input.0.as_fd(), output.0.as_fd(), &registration).unwrap()
    };
    core.lead(Lead::There { connection, registration: Some(registration), with_escape }, 0);
    Endpoint { core, name: "streams".into(), history: 0, path: None }
}

#[test]
fn pipes_carry_everything_and_an_end_of_input_ends_only_that() {
    for mode in [Waiting::Never, Waiting::WhenReady] {
        let bench = Bench::new();
        let (input, to_guest) = pipe().unwrap();
        let (from_guest, output) = pipe().unwrap();
        let endpoint = streams(&bench, (input, mode), (output, mode), None);
        let handle = endpoint.handle();
        // Ctrl-a is nothing special in a pipe.
        let data = [b"\x01x\x01h".to_vec(), pattern(MIB)].concat();
        let sent = data.clone();
        let writer = thread::spawn(move || fs::File::from(to_guest).write_all(&sent).unwrap());
        assert!(read_input(&handle, data.len()) == data);
        writer.join().unwrap();
        // A pipe that nobody reads stops the device, not the monitor.
        let taken = handle.write(&data);
        assert!(taken < data.len() && taken >= OUTPUT_CAPACITY, "{taken}");
        assert!(!endpoint.drain(Duration::from_millis(1)));
        let mut reader = fs::File::from(from_guest);
        let expected = data.len();
        let reader = thread::spawn(move || read_exact(&mut reader, expected));
        write_all(&handle, &data[taken..]);
        assert!(endpoint.drain(TIMEOUT));
        assert!(reader.join().unwrap() == data);
        assert_eq!(endpoint.lost(), 0);
        // Nobody will read any more: all is taken, and lost.
        write_all(&handle, &data);
    }
}

#[test]
fn a_terminal_has_commands_and_its_sharers_notice_nothing() {
    let bench = Bench::new();
    let pty = openpty(None, None).unwrap();
    let _raw = nix::sys::termios::tcgetattr(&pty.slave).map(|mut modes| {
        nix::sys::termios::cfmakeraw(&mut modes);
        nix::sys::termios::tcsetattr(&pty.slave, nix::sys::termios::SetArg::TCSANOW, &modes).unwrap();
    });
    let quit = EventFd::new(0).unwrap();
    let slave = || pty.slave.try_clone().unwrap();
    let endpoint =
        streams(&bench, (slave(), Waiting::Never), (slave(), Waiting::Never), Some(quit.try_clone().unwrap()));
    let handle = endpoint.handle();
    let flags = OFlag::from_bits_retain(fcntl(&pty.slave, FcntlArg::F_GETFL).unwrap());
    assert!(!flags.contains(OFlag::O_NONBLOCK), "the shell's terminal was made non-blocking");
    let mut keyboard = fs::File::from(pty.master);
    keyboard.write_all(b"a\x01hb\x01\x01").unwrap();
    assert_eq!(read_input(&handle, 3), b"ab\x01");
    assert_eq!(read_exact(&mut keyboard, escape::HELP.len()), escape::HELP.as_bytes());
    handle.write_over(b"login: ");
    assert_eq!(read_exact(&mut keyboard, 7), b"login: ");
    // A guest that does not read its input does not keep its user from leaving.
    keyboard.write_all(b"some input\x01x").unwrap();
    assert!(wait(&quit, TIMEOUT), "Ctrl-a x was not noticed");
}

#[test]
fn a_file_as_input_is_read_to_its_end() {
    let bench = Bench::new();
    let data = pattern(100_000);
    fs::write(bench.path(), &data).unwrap();
    let (_reader, output) = pipe().unwrap();
    let input = fs::File::open(bench.path()).unwrap();
    let endpoint = streams(&bench, (input.into(), Waiting::Never), (output, Waiting::Never), None);
    assert!(read_input(&endpoint.handle(), data.len()) == data);
}

/// Remembers who came and went.
#[derive(Debug, Default)]
struct Comings(Mutex<Vec<bool>>);

impl ConnectionObserver for Comings {
    fn connected(&self, connected: bool) {
        self.0.lock().unwrap().push(connected);
    }
}

#[test]
fn clients_are_handed_in_one_at_a_time() {
    let bench = Bench::new();
    let comings = Arc::new(Comings::default());
    let mut options = EndpointOptions::new("test", EndpointKind::Handed);
    options.observer = Some(comings.clone());
    let endpoint = Endpoint::open(options, &bench.io).unwrap();
    let handle = endpoint.handle();
    handle.write_over(b"before");

    let reservation = endpoint.reserve(false).unwrap();
    assert_eq!(endpoint.reserve(true).unwrap_err(), ReserveError::Taken, "one is on the way");
    drop(reservation);
    let (mut near, far) = UnixStream::pair().unwrap();
    near.set_read_timeout(Some(TIMEOUT)).unwrap();
    endpoint.reserve(false).unwrap().attach(far.into(), b"early").unwrap();
    assert_eq!(read_exact(&mut near, 6), b"before");
    let mut input = [0; 5];
    assert_eq!((handle.read(&mut input).unwrap(), &input), (5, b"early"));
    assert_eq!(endpoint.reserve(false).unwrap_err(), ReserveError::Taken);

    // Another takes its place: the first reads an end.
    let reservation = endpoint.reserve(true).unwrap();
    assert_eq!(near.read(&mut [0]).unwrap(), 0);
    let (mut next, far) = UnixStream::pair().unwrap();
    next.set_read_timeout(Some(TIMEOUT)).unwrap();
    reservation.attach(far.into(), b"").unwrap();
    assert_eq!(read_exact(&mut next, 6), b"before");
    drop(next);
    wait_connected(&handle, false);
    assert_eq!(*comings.0.lock().unwrap(), [true, false, true, false]);
    assert_eq!(bench.open(EndpointKind::Off, 0).reserve(true).unwrap_err(), ReserveError::Elsewhere);
}
