//! The host's side of serial ports and consoles: the standard streams, a file, a socket, a pseudo-terminal, or
//! nothing.
//!
//! An [`Endpoint`] belongs to the machine and lives across resets of the guest; devices hold an [`EndpointHandle`].
//! The guest never waits for the host here. Output waits for its reader in a ring of 64 KiB; a device that can hold
//! its guest back does so when the ring is full ([`EndpointHandle::write`]), for a limited time where it is a console;
//! one that cannot gives up the oldest output ([`EndpointHandle::write_over`]). With no reader connected all output is taken, and the last of it is
//! kept for the next reader. Input is read from the host only as the device takes it.

mod arrivals;
mod connection;
mod core;
pub mod escape;
mod poller;
mod ring;
pub mod terminal;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use self::arrivals::{Arrivals, Listening, Pty};
use self::connection::Connection;
use self::core::{Core, Excess, Lead, OUTPUT_CAPACITY, OnOutput};
use self::poller::{Registration, Source};

pub use self::poller::ConsoleIo;

/// How long a console waits for its reader: well below the 20 s after which Linux takes a processor for locked up.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where an endpoint leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EndpointKind {
    /// Nowhere: output is dropped, and there is no input.
    Off,
    /// The process's standard input and output. The terminal's mode is [`terminal::RawTerminal`]'s matter.
    Stdio,
    /// A file that output goes to. It is made with mode 0600 where it does not exist. Resets of the guest go on in it.
    File {
        /// Where it is.
        path: PathBuf,
        /// Keep what is there and write after it; else it is emptied first, as by QEMU.
        append: bool,
    },
    /// A Unix stream socket to listen at, only for the monitor's own user. One client is served at a time, and those
    /// who connect meanwhile wait their turn. A new client is first sent the last output.
    Socket {
        /// Where it is made. It is removed at the end.
        path: PathBuf,
    },
    /// Clients that are handed in, one at a time; see [`Endpoint::reserve`]. Each is first sent the last output.
    Handed,
    /// A pseudo-terminal in raw mode; see [`Endpoint::path`]. A program that opens it is first sent the last output.
    Pty,
}

/// What an endpoint is made with.
#[derive(Debug)]
pub struct EndpointOptions {
    /// Names it in messages.
    pub name: String,
    /// Where it leads.
    pub kind: EndpointKind,
    /// How much of the last output, in bytes, is kept for a reader who comes later, 64 KiB at most. 0 for a port
    /// with a protocol of its own.
    pub history: usize,
    /// How long a device is held back by a connected reader who takes nothing, before the oldest output is given up;
    /// `None` is for ever. Linux holds a whole processor still while its console (`hvc0`) is held back, so a console
    /// needs a limit; a port that programs write to needs none.
    pub patience: Option<Duration>,
    /// Signalled when `Ctrl-a x` is typed at a terminal. Without it, no key is special.
    pub quit: Option<EventFd>,
    /// Told of clients and programs who come and go.
    pub observer: Option<Arc<dyn ConnectionObserver>>,
}

/// Is told of an endpoint's readers who come and go. The standard streams and files are none.
pub trait ConnectionObserver: Send + Sync + fmt::Debug {
    /// A reader has come, or is gone. Called with the endpoint locked: it must not call the endpoint.
    fn connected(&self, connected: bool);
}

impl EndpointOptions {
    /// A console of this kind: it keeps 64 KiB of history, waits 10 s for its reader, and no key is special.
    pub fn new(name: &str, kind: EndpointKind) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            history: OUTPUT_CAPACITY,
            patience: Some(PATIENCE),
            quit: None,
            observer: None,
        }
    }
}

/// Why an endpoint cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum EndpointError {
    /// A file cannot be used.
    #[error("{name}: file {path}: {source}")]
    File {
        /// The endpoint.
        name: String,
        /// The file's path.
        path: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A path names what no output can be kept in.
    #[error("{name}: {path} is {what}; give the path of a regular file")]
    FileKind {
        /// The endpoint.
        name: String,
        /// The path.
        path: String,
        /// What is there.
        what: &'static str,
    },
    /// A socket cannot be made.
    #[error("{name}: socket {path}: {source}{hint}")]
    Socket {
        /// The endpoint.
        name: String,
        /// The socket's path.
        path: String,
        /// The operating system's answer.
        source: io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// The operating system refused something else.
    #[error("{name}: {what}: {source}")]
    Host {
        /// The endpoint.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// The host's side of a serial port or console.
#[derive(Debug)]
pub struct Endpoint {
    core: Arc<Core>,
    name: String,
    /// How much is kept for readers who come.
    history: usize,
    path: Option<PathBuf>,
}

impl Endpoint {
    /// Makes an endpoint, whose descriptors `io` waits for.
    ///
    /// # Errors
    /// [`EndpointError`] names the endpoint, and what was tried.
    pub fn open(options: EndpointOptions, io: &ConsoleIo) -> Result<Self, EndpointError> {
        let EndpointOptions { name, kind, history, patience, quit, observer } = options;
        let core = Core::new(name.clone(), patience, quit);
        let mut core = core.map_err(|source| EndpointError::Host { name: name.clone(), what: "events", source })?;
        core.observer = observer;
        let mut endpoint = Self { core: Arc::new(core), name, history, path: None };
        endpoint.lead(kind, io)?;
        Ok(endpoint)
    }

    /// Has the endpoint lead elsewhere from now on. Its device does not notice, but for a reader who goes or comes. A reader
    /// where it leads then is sent the last output, as always; who read where it led is sent away.
    ///
    /// # Errors
    /// As [`Endpoint::open`]; it leads where it led.
    pub fn lead(&mut self, kind: EndpointKind, io: &ConsoleIo) -> Result<(), EndpointError> {
        let history = match kind {
            EndpointKind::Socket { .. } | EndpointKind::Pty | EndpointKind::Handed => self.history,
            _ => 0,
        };
        let mut path = None;
        let lead = match kind {
            EndpointKind::Off => Lead::Nowhere,
            EndpointKind::Stdio => {
                let registration = self.register(io)?;
                let connection = Connection::streams(io::stdin().as_fd(), io::stdout().as_fd(), &registration)
                    .map_err(self.host("standard streams"))?;
                Lead::There { connection, registration: Some(registration), with_escape: io::stdin().is_terminal() }
            }
            EndpointKind::File { path, append } => {
                let connection = open_file(&self.name, &path, append)?;
                Lead::There { connection, registration: None, with_escape: false }
            }
            EndpointKind::Socket { path } => {
                let registration = self.register(io)?;
                let listening = Listening::bind(&path, &registration);
                let listening = listening.map_err(|error| socket_error(&self.name, &path, error))?;
                Lead::Comes { arrivals: Arrivals::Socket(listening), registration }
            }
            EndpointKind::Handed => Lead::Comes { arrivals: Arrivals::Handed, registration: self.register(io)? },
            EndpointKind::Pty => {
                let registration = self.register(io)?;
                let (pty, other) = Pty::open(&registration).map_err(self.host("pseudo-terminal"))?;
                path = Some(other);
                Lead::Comes { arrivals: Arrivals::Pty(pty), registration }
            }
        };
        self.path = path;
        self.core.lead(lead, history);
        Ok(())
    }

    fn register(&self, io: &ConsoleIo) -> Result<Registration, EndpointError> {
        let source: Weak<dyn Source> = Arc::downgrade(&(Arc::clone(&self.core) as Arc<dyn Source>));
        io.add(source).map_err(self.host("console thread"))
    }

    fn host(&self, what: &'static str) -> impl Fn(io::Error) -> EndpointError {
        let name = self.name.clone();
        move |source| EndpointError::Host { name: name.clone(), what, source }
    }

    /// A device's way to this endpoint. Only one device uses it at a time.
    pub fn handle(&self) -> EndpointHandle {
        EndpointHandle { core: Arc::clone(&self.core) }
    }

    /// Sets the place of the one client aside for one who is to be handed in.
    ///
    /// # Errors
    /// [`ReserveError`] where clients are not handed in here, or one is here or on the way; with `take_over`, who is
    /// here is sent away.
    pub fn reserve(&self, take_over: bool) -> Result<Reservation, ReserveError> {
        self.core.reserve(take_over)?;
        Ok(Reservation { core: Arc::clone(&self.core), attached: false })
    }

    /// The path of a pseudo-terminal's other end, for programs to open.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Waits until the reader has taken all output, but no longer than `timeout`. True where nothing is left. To be
    /// called before the monitor ends.
    pub fn drain(&self, timeout: Duration) -> bool {
        self.core.drain(timeout)
    }

    /// Has `tell` called, once, when the guest next writes something, instead of one before. It is called on the
    /// device's thread in the middle of the write and with the endpoint locked: it must not wait, nor use the endpoint.
    pub fn on_next_output(&self, tell: Option<Box<dyn FnOnce() + Send>>) {
        self.core.on_next_output(tell.map(OnOutput));
    }

    /// Bytes of output that no reader got, since it did not read in time.
    pub fn lost(&self) -> u64 {
        self.core.lost()
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // Devices, and the thread that waits for its descriptors, may hold the rest of it for a while: what others see of it, a
        // socket and its client, is gone at once.
        self.core.lead(Lead::Nowhere, 0);
    }
}

/// Why no client can be handed in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReserveError {
    /// It leads elsewhere.
    #[error("no clients are handed in here")]
    Elsewhere,
    /// There is one client at a time.
    #[error("a client is connected already")]
    Taken,
}

/// The place of a client who is on the way. Dropping it frees the place.
#[derive(Debug)]
pub struct Reservation {
    core: Arc<Core>,
    attached: bool,
}

impl Reservation {
    /// Hands the client in: a connected stream socket, and what was read from it already. It is served until it hangs
    /// up, another takes its place, or the endpoint goes.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn attach(mut self, client: OwnedFd, early: &[u8]) -> io::Result<()> {
        self.attached = true;
        self.core.attach_reserved(client, early)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if !self.attached {
            self.core.free_reserved();
        }
    }
}

/// A device that is told of input by a call instead of an event.
pub trait InputListener: Send + Sync + fmt::Debug {
    /// Input waits. Called on whatever thread brought it, and not after the [`Subscription`] is over: it must not begin or
    /// end one.
    fn input_waits(&self);
}

/// A listener's time with an endpoint. Dropping it ends that: a call that is going on is waited for, and none begins
/// after it. Whoever owns the listener drops this first, so that no caller is ever the last who holds it: to take a
/// device apart needs system calls that the threads of consoles do not have.
#[derive(Debug)]
pub struct Subscription {
    core: Arc<Core>,
    listener: Weak<dyn InputListener>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        poller::lock(&self.core.listener).take_if(|now| Weak::ptr_eq(now, &self.listener));
    }
}

/// A device's way to an [`Endpoint`].
#[derive(Debug, Clone)]
pub struct EndpointHandle {
    core: Arc<Core>,
}

impl EndpointHandle {
    /// Takes output, and tells how much of it: less than all where the reader is slow. The rest is to be given again
    /// when [`EndpointHandle::writable_event`] is signalled.
    pub fn write(&self, data: &[u8]) -> usize {
        self.core.write(data, Excess::Refuse)
    }

    /// Takes all output, giving up the oldest where the reader is slow: for devices that cannot hold their guest
    /// back.
    pub fn write_over(&self, data: &[u8]) {
        self.core.write(data, Excess::Overwrite);
    }

    /// Signalled when output is taken again, after [`EndpointHandle::write`] took less than all.
    pub fn writable_event(&self) -> &EventFd {
        &self.core.writable_event
    }

    /// Takes input, as much as there is and as fits.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where there is none.
    pub fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        self.core.read(data)
    }

    /// Whether there is input.
    pub fn input_waits(&self) -> bool {
        self.core.input_waits()
    }

    /// Signalled when there is input. Input that came earlier may be there without a signal, so a device reads once
    /// when it starts, and after it had no room for all.
    pub fn input_event(&self) -> &EventFd {
        &self.core.input_event
    }

    /// Has `listener` told of input from now on, instead of one before. Input that came earlier is not told of.
    #[must_use]
    pub fn listen(&self, listener: Weak<dyn InputListener>) -> Subscription {
        *poller::lock(&self.core.listener) = Some(listener.clone());
        Subscription { core: self.core.clone(), listener }
    }

    /// Whether a reader is connected. The standard streams and a file always are.
    pub fn connected(&self) -> bool {
        self.core.connected()
    }

    /// Signalled when a reader comes or goes.
    pub fn connection_event(&self) -> &EventFd {
        &self.core.connection_event
    }
}

fn open_file(name: &str, path: &Path, append: bool) -> Result<Connection, EndpointError> {
    let error = |source| EndpointError::File { name: name.to_owned(), path: path.display().to_string(), source };
    if let Ok(metadata) = std::fs::metadata(path) {
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            Some("a directory")
        } else if kind.is_fifo() {
            Some("a FIFO")
        } else if kind.is_socket() {
            Some("a socket")
        } else if kind.is_block_device() {
            Some("a block device")
        } else {
            None
        };
        if let Some(what) = what {
            return Err(EndpointError::FileKind { name: name.to_owned(), path: path.display().to_string(), what });
        }
    }
    let file = OpenOptions::new()
        .create(true)
        .append(append)
        .write(true)
        .truncate(!append)
        .mode(0o600)
        .custom_flags(libc::O_CLOEXEC | libc::O_NOCTTY)
        .open(path)
        .map_err(error)?;
    Ok(Connection::file(file.into()))
}

fn socket_error(name: &str, path: &Path, source: io::Error) -> EndpointError {
    let hint = match source.kind() {
        io::ErrorKind::AddrInUse => "; another process listens there, or it is no socket",
        io::ErrorKind::NotFound => "; its directory does not exist",
        _ => "",
    };
    EndpointError::Socket { name: name.to_owned(), path: path.display().to_string(), source, hint }
}
