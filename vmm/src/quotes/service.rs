//! A connection to the Quote Generation Service: one for each question, which is sent in one piece, since Intel's service
//! takes what it reads first for the beginning of a message each time. Nothing here waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use api::QuoteService;
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::sockopt::SocketError;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, VsockAddr, connect, getsockopt, recv, send, socket,
};

use super::wire::{Answer, WireError};

/// When a service that has no room for a connection is asked again.
const AGAIN: Duration = Duration::from_millis(20);
/// Bytes that are received at once.
const PIECE: usize = 16 << 10;

/// Why a question is not answered.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Nobody listens.
    #[error("nobody listens: {0}")]
    Absent(io::Error),
    /// The connection fails.
    #[error("the connection fails: {0}")]
    Connection(io::Error),
    /// The service ended the connection first.
    #[error("it ended the connection without an answer")]
    Ended,
    /// The service did not answer in time.
    #[error("it has not answered in {} s", super::PATIENCE.as_secs())]
    Late,
    /// The answer is none.
    #[error(transparent)]
    Answer(#[from] WireError),
    /// The quote is longer than the guest's buffer.
    #[error("its quote of {quote} bytes does not fit in the guest's buffer, which has room for {room}")]
    Room {
        /// The quote's length in bytes.
        quote: usize,
        /// The room in bytes.
        room: usize,
    },
}

/// A question on its way to the service, and the answer on its way back.
#[derive(Debug)]
pub struct Connection {
    question: Vec<u8>,
    step: Step,
}

/// How far a connection is.
#[derive(Debug)]
enum Step {
    /// The service has no room for one now.
    Refused { again: Instant },
    /// It is being made.
    Connecting(OwnedFd),
    /// The question was sent.
    Asked(OwnedFd, Answer),
}

/// What became of a connection that could go on.
#[derive(Debug)]
pub enum Progress {
    /// It has to wait again.
    Waiting(Connection),
    /// The answer is whole.
    Answered(Answer),
}

impl Connection {
    /// Begins to ask.
    ///
    /// # Errors
    /// [`Fault::Absent`] and [`Fault::Connection`].
    pub fn open(address: &QuoteService, question: Vec<u8>) -> Result<Self, Fault> {
        Ok(Self { step: begin(address, &question)?, question })
    }

    /// What the connection waits for; `None` where it waits for [`Connection::again`] alone.
    pub fn awaited(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match &self.step {
            Step::Refused { .. } => None,
            Step::Connecting(socket) => Some((socket.as_fd(), PollFlags::POLLOUT)),
            Step::Asked(socket, _) => Some((socket.as_fd(), PollFlags::POLLIN)),
        }
    }

    /// When it is to go on whatever happens until then.
    pub fn again(&self) -> Option<Instant> {
        match &self.step {
            Step::Refused { again } => Some(*again),
            _ => None,
        }
    }

    /// Goes on, once what was awaited is there.
    ///
    /// # Errors
    /// [`Fault`]: there will be no answer.
    pub fn go_on(mut self, address: &QuoteService) -> Result<Progress, Fault> {
        self.step = match self.step {
            Step::Refused { .. } => begin(address, &self.question)?,
            Step::Connecting(socket) => match getsockopt(&socket, SocketError) {
                Ok(0) => ask(socket, &self.question)?,
                Ok(error) => return Err(Fault::Absent(io::Error::from_raw_os_error(error))),
                Err(errno) => return Err(Fault::Connection(errno.into())),
            },
            Step::Asked(socket, mut answer) => {
                if receive(&socket, &mut answer)? {
                    return Ok(Progress::Answered(answer));
                }
                Step::Asked(socket, answer)
            }
        };
        Ok(Progress::Waiting(self))
    }
}

/// Makes a connection, and asks where that takes no time.
fn begin(address: &QuoteService, question: &[u8]) -> Result<Step, Fault> {
    let absent = |errno: Errno| Fault::Absent(errno.into());
    let family = match address {
        QuoteService::Unix(_) => AddressFamily::Unix,
        QuoteService::Vsock { .. } => AddressFamily::Vsock,
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(family, SockType::Stream, flags, None).map_err(absent)?;
    let connected = match address {
        QuoteService::Unix(path) => connect(socket.as_raw_fd(), &UnixAddr::new(path).map_err(absent)?),
        QuoteService::Vsock { cid, port } => connect(socket.as_raw_fd(), &VsockAddr::new(*cid, *port)),
    };
    match connected {
        Ok(()) => ask(socket, question),
        Err(Errno::EINPROGRESS) => Ok(Step::Connecting(socket)),
        // A Unix socket whose backlog is full.
        Err(Errno::EAGAIN) => Ok(Step::Refused { again: Instant::now() + AGAIN }),
        Err(errno) => Err(absent(errno)),
    }
}

/// Sends the question. A new connection has room for all of it.
fn ask(socket: OwnedFd, question: &[u8]) -> Result<Step, Fault> {
    match send(socket.as_raw_fd(), question, MsgFlags::MSG_NOSIGNAL) {
        Ok(sent) if sent == question.len() => Ok(Step::Asked(socket, Answer::default())),
        Ok(_) => Err(Fault::Connection(io::ErrorKind::WriteZero.into())),
        Err(errno) => Err(Fault::Connection(errno.into())),
    }
}

/// Takes what has come of the answer. True once it is whole.
fn receive(socket: &OwnedFd, answer: &mut Answer) -> Result<bool, Fault> {
    let mut piece = [0; PIECE];
    loop {
        let missing = answer.missing()?.min(PIECE);
        if missing == 0 {
            return Ok(true);
        }
        let room = piece.get_mut(..missing).unwrap_or_default();
        match recv(socket.as_raw_fd(), room, MsgFlags::empty()) {
            Ok(0) => return Err(Fault::Ended),
            Ok(count) => answer.add(room.get(..count).unwrap_or_default()),
            Err(Errno::EAGAIN) => return Ok(false),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(Fault::Connection(errno.into())),
        }
    }
}
