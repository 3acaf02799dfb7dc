//! Bytes of any clients on the API's socket, in any pieces and with any descriptors, in front of a monitor whose
//! hypervisor is a scripted one.
//!
//! An input is what up to four clients send, one after the other: bytes as they are, and behind each [`ESCAPE`] a byte
//! that says what happens between them (see [`Op`]). The path of a kernel is written by an operation, since its folder has
//! another name each time.

mod monitor;
mod replies;

use std::cell::RefCell;
use std::io::{self, IoSlice, Read};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::yield_now;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg, shutdown};

use self::monitor::Monitor;
use crate::{allocated, census};

/// The byte before an operation.
pub const ESCAPE: u8 = 0x1b;
/// Bytes of the path of the kernel.
pub const PATH: usize = 64;
/// Clients of an input.
const CLIENTS: u8 = 4;
/// How long the monitor may take for what it was sent.
const PATIENCE: Duration = Duration::from_secs(20);
/// Times that the monitor is waited for between two pieces: it may have no reason to read the first.
const TURNS: u32 = 200;
/// Inputs of one monitor. What a scripted hypervisor notes of them is kept as long as it lives.
const INPUTS: u32 = 128;
/// The most bytes of one input: of each client a request of the largest size with its reply, and a VM.
const MOST: usize = 8 << 20;
/// How much more may be allocated after a monitor's end than after that of the first: what threads keep for the next.
const GROWTH: usize = 64 << 10;

/// What happens between the bytes of an input: the low bits of the byte behind an [`ESCAPE`]; the other five are an
/// operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// The byte of the escape itself is sent.
    Escape = 0,
    /// What was said so far goes off, as a piece of its own.
    Send = 1,
    /// The client of this number speaks from here on.
    Client = 2,
    /// So many descriptors go with the next piece.
    Descriptors = 3,
    /// The client reads what has come.
    Read = 4,
    /// It has nothing more to say.
    Finish = 5,
    /// It is gone.
    Leave = 6,
    /// The path of a kernel that can be booted is written.
    Kernel = 7,
}

impl Op {
    const ALL: [Self; 8] = [
        Self::Escape,
        Self::Send,
        Self::Client,
        Self::Descriptors,
        Self::Read,
        Self::Finish,
        Self::Leave,
        Self::Kernel,
    ];

    /// The two bytes of this operation.
    pub fn with(self, operand: u8) -> [u8; 2] {
        [ESCAPE, operand << 3 | self as u8]
    }
}

/// A client.
struct Client {
    stream: UnixStream,
    /// What is to be sent with the next piece.
    said: Vec<u8>,
    descriptors: usize,
    /// All that was sent, and all that came.
    sent: Vec<u8>,
    got: Vec<u8>,
    /// The monitor has closed its side.
    ended: bool,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = UnixStream::connect(path).expect("the monitor listens");
        stream.set_nonblocking(true).expect("a socket");
        Self { stream, said: Vec::new(), descriptors: 0, sent: Vec::new(), got: Vec::new(), ended: false }
    }

    /// Sends what was said, and gives the monitor the time to read it.
    fn send(&mut self) {
        let descriptors: Vec<OwnedFd> = (0..std::mem::take(&mut self.descriptors)).map(|_| file()).collect();
        let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let mut rights = vec![ControlMessage::ScmRights(&numbers)];
        rights.retain(|_| !numbers.is_empty());
        let said = std::mem::take(&mut self.said);
        let mut rest = said.as_slice();
        while !rest.is_empty() {
            let pieces = [IoSlice::new(rest)];
            match sendmsg::<()>(self.stream.as_raw_fd(), &pieces, &rights, MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => {
                    rights.clear();
                    self.sent.extend(&rest[..sent]);
                    rest = &rest[sent..];
                }
                // The monitor does not read on: nobody takes its replies.
                Err(nix::Error::EAGAIN) => {
                    self.read();
                    yield_now();
                }
                Err(nix::Error::EPIPE | nix::Error::ECONNRESET) => return self.read(),
                Err(error) => panic!("{error}"),
            }
        }
        for _ in 0..TURNS {
            if unread(&self.stream) == 0 {
                break;
            }
            yield_now();
        }
    }

    /// Reads what is there.
    fn read(&mut self) {
        let mut piece = [0; 4096];
        while !self.ended {
            match self.stream.read(&mut piece) {
                Ok(0) => self.ended = true,
                Ok(length) => self.got.extend(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.ended = true,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// Sends the rest and says that this was all, then reads until the monitor closes, or its reply has no end.
    fn finish(mut self) {
        self.send();
        // The monitor may have closed it.
        let _ = shutdown(self.stream.as_raw_fd(), nix::sys::socket::Shutdown::Write);
        self.stream
            .set_nonblocking(false)
            .and_then(|()| self.stream.set_read_timeout(Some(PATIENCE)))
            .expect("a socket");
        while !self.ended && !replies::endless(&self.got) {
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => self.ended = true,
                Ok(length) => self.got.extend(&piece[..length]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.ended = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!(
                    "{error}: no answer, or no end, to {:?} after {:?}",
                    String::from_utf8_lossy(&self.sent),
                    String::from_utf8_lossy(&self.got)
                ),
            }
        }
        replies::check(&self.sent, &self.got);
    }
}

/// Bytes that the other side of a socket has not read (unix(7), SIOCOUTQ).
fn unread(stream: &UnixStream) -> i32 {
    let mut bytes = 0;
    // SAFETY: the socket is open, and the kernel writes one number of this size.
    let asked = unsafe { nix::libc::ioctl(stream.as_raw_fd(), nix::libc::TIOCOUTQ, &raw mut bytes) };
    if asked == 0 { bytes } else { 0 }
}

/// A file that can be a disk.
fn file() -> OwnedFd {
    let file = std::fs::File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).expect("a file"));
    file.set_len(1 << 20).expect("a size");
    file.into()
}

/// Makes what all inputs need.
pub fn warm_up() {
    // As Rust's runtime does it, which libFuzzer's programs begin without.
    // SAFETY: no handler is installed.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigIgn) }.expect("a signal");
    monitor::limit_memory();
}

thread_local! {
    static MONITOR: RefCell<Option<(Monitor, u32)>> = const { RefCell::new(None) };
    static FIRST: RefCell<Option<usize>> = const { RefCell::new(None) };
}

/// Has clients say what an input holds, and holds that each complete request is answered or its connection closed, that
/// the next client is served, and that nothing is left behind.
pub fn talk(input: &[u8]) {
    MONITOR.with_borrow_mut(|place| {
        let (monitor, inputs) = place.get_or_insert_with(|| (Monitor::start(), 0));
        *inputs += 1;
        let ((), most) = allocated::during(|| converse(monitor, input));
        assert!(most <= MOST, "{most} bytes were allocated");
        monitor.tidy_up();
        census::take();
        if *inputs == INPUTS {
            *place = None;
            let left = allocated::now();
            let first = FIRST.with_borrow_mut(|first| *first.get_or_insert(left));
            assert!(
                left <= first + GROWTH,
                "{left} bytes are allocated after a monitor's end, {first} after the first's"
            );
        }
    });
}

fn converse(monitor: &Monitor, input: &[u8]) {
    let mut clients: [Option<Client>; CLIENTS as usize] = Default::default();
    let mut at = 0;
    let mut bytes = input.iter().copied();
    let path = monitor.socket();
    while let Some(byte) = bytes.next() {
        let client = clients[at].get_or_insert_with(|| Client::connect(&path));
        if byte != ESCAPE {
            client.said.push(byte);
            continue;
        }
        let Some(code) = bytes.next() else { break };
        let operand = code >> 3;
        match Op::ALL[usize::from(code & 7)] {
            Op::Escape => client.said.push(ESCAPE),
            Op::Send => client.send(),
            Op::Client => at = usize::from(operand % CLIENTS),
            // More than are taken, too.
            Op::Descriptors => client.descriptors = 3 * usize::from(operand),
            Op::Read => client.read(),
            Op::Finish => clients[at].take().into_iter().for_each(Client::finish),
            Op::Leave => clients[at] = None,
            Op::Kernel => client.said.extend(monitor.kernel().as_bytes()),
        }
    }
    clients.into_iter().flatten().for_each(Client::finish);
}
