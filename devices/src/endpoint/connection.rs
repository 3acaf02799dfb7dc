//! A reader and writer on the host's side, by descriptors that are never waited for while reading or writing.

#![expect(unsafe_code, reason = "send and recv with flags on borrowed descriptors")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::isatty;
use vmm_sys_util::epoll::EventSet;

use super::poller::{Registration, Role, Watched};

/// The most that is written at once to what may wait: every pipe and terminal that is ready takes as much.
const SMALL_WRITE: usize = 256;

/// How a descriptor is kept from waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// It never waits: it is non-blocking, or a file.
    Never,
    /// It is a socket, which can be told by each call.
    Socket,
    /// It is only used, and little, when it is ready: others share it, so it cannot be made non-blocking.
    WhenReady,
}

/// Who is at the other end, which decides what an end of input means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peer {
    /// The standard streams: output goes on after an end of input.
    Stdio,
    /// A file: output only, and an error may pass.
    File,
    /// A client of a socket: output goes on until it has closed both ways.
    Client,
    /// A program at a pseudo-terminal: when it closes it, both ways end.
    Pty,
}

/// The way in.
#[derive(Debug)]
pub(super) struct Input {
    pub(super) watched: Watched,
    mode: Waiting,
    /// Not waited for, since what was read has not been taken yet.
    pub(super) paused: bool,
    /// The end was read.
    pub(super) ended: bool,
}

/// The way out.
#[derive(Debug)]
pub(super) struct Output {
    pub(super) watched: Watched,
    mode: Waiting,
}

/// A connected reader and writer.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) peer: Peer,
    pub(super) input: Option<Input>,
    pub(super) output: Option<Output>,
}

impl Connection {
    /// A connection both ways over one descriptor of our own.
    pub(super) fn duplex(peer: Peer, fd: OwnedFd, mode: Waiting, registration: &Registration) -> io::Result<Self> {
        let again = fd.try_clone()?;
        Ok(Self {
            peer,
            input: Some(Input::new(registration.watch(fd, Role::Input), mode)),
            output: Some(Output { watched: registration.watch(again, Role::Output), mode }),
        })
    }

    /// Streams that others may share, as the process's standard ones are.
    pub(super) fn streams(
        input: BorrowedFd<'_>,
        output: BorrowedFd<'_>,
        registration: &Registration,
    ) -> io::Result<Self> {
        let input = unshared(input, OFlag::O_RDONLY)?;
        let output = unshared(output, OFlag::O_WRONLY)?;
        Ok(Self::split(input, output, registration))
    }

    /// One descriptor for each way.
    pub(super) fn split(
        (input, input_mode): (OwnedFd, Waiting),
        (output, mode): (OwnedFd, Waiting),
        registration: &Registration,
    ) -> Self {
        Self {
            peer: Peer::Stdio,
            input: Some(Input::new(registration.watch(input, Role::Input), input_mode)),
            output: Some(Output { watched: registration.watch(output, Role::Output), mode }),
        }
    }

    /// A file that is only written to.
    pub(super) fn file(fd: OwnedFd) -> Self {
        Self {
            peer: Peer::File,
            input: None,
            output: Some(Output { watched: Watched::never(fd), mode: Waiting::Never }),
        }
    }
}

impl Input {
    fn new(watched: Watched, mode: Waiting) -> Self {
        Self { watched, mode, paused: true, ended: false }
    }

    /// Reads what is there. 0 is the end.
    pub(super) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        let fd = self.watched.fd();
        match self.mode {
            Waiting::Never => {}
            Waiting::Socket => {
                // SAFETY: the pointer and the length are those of `data`.
                let got =
                    unsafe { libc::recv(fd.as_raw_fd(), data.as_mut_ptr().cast(), data.len(), libc::MSG_DONTWAIT) };
                return usize::try_from(got).map_err(|_| io::Error::last_os_error());
            }
            Waiting::WhenReady => ready(fd, PollFlags::POLLIN)?,
        }
        Ok(nix::unistd::read(fd, data)?)
    }
}

impl Output {
    /// Whether it may be written to in any thread.
    pub(super) fn is_immediate(&self) -> bool {
        self.mode != Waiting::WhenReady
    }

    /// Writes as much as can be without waiting.
    pub(super) fn write(&self, data: &[u8]) -> io::Result<usize> {
        let fd = self.watched.fd();
        let data = match self.mode {
            Waiting::Never => data,
            Waiting::Socket => {
                // SAFETY: the pointer and the length are those of `data`.
                let sent = unsafe {
                    libc::send(
                        fd.as_raw_fd(),
                        data.as_ptr().cast(),
                        data.len(),
                        libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
                    )
                };
                return usize::try_from(sent).map_err(|_| io::Error::last_os_error());
            }
            Waiting::WhenReady => {
                ready(fd, PollFlags::POLLOUT)?;
                data.get(..SMALL_WRITE).unwrap_or(data)
            }
        };
        Ok(nix::unistd::write(fd, data)?)
    }

    /// Waits for room from now on, or no more.
    pub(super) fn wait_for_room(&mut self, wait: bool) {
        let interest = wait.then_some(EventSet::OUT);
        if let Err(e) = self.watched.set_interest(interest) {
            tracing::warn!("console-io: {e}");
        }
    }
}

/// An error of [`io::ErrorKind::WouldBlock`] where a call would wait.
fn ready(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    let mut polled = [PollFd::new(fd, flags)];
    match poll(&mut polled, PollTimeout::ZERO)? {
        0 => Err(io::ErrorKind::WouldBlock.into()),
        _ => Ok(()),
    }
}

/// A descriptor for the same file, that can be made non-blocking without the others who share the file noticing.
fn unshared(fd: BorrowedFd<'_>, access: OFlag) -> io::Result<(OwnedFd, Waiting)> {
    let kind = SFlag::from_bits_truncate(fstat(fd)?.st_mode) & SFlag::S_IFMT;
    if kind == SFlag::S_IFSOCK {
        return Ok((fd.try_clone_to_owned()?, Waiting::Socket));
    }
    if kind != SFlag::S_IFIFO && !isatty(fd)? {
        // A file's position is shared with the other writers, and it never waits.
        return Ok((fd.try_clone_to_owned()?, Waiting::Never));
    }
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = access | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    match open(path.as_str(), flags, Mode::empty()) {
        Ok(fd) => Ok((fd, Waiting::Never)),
        // No /proc, or a terminal of another user.
        Err(_) => Ok((fd.try_clone_to_owned()?, Waiting::WhenReady)),
    }
}
