//! Readers who come and go: clients of a socket, and programs that open a pseudo-terminal.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::pty::{PtyMaster, grantpt, posix_openpt, ptsname_r, unlockpt};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::stat::Mode;
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use vmm_sys_util::epoll::EventSet;

use super::connection::{Connection, Peer, Waiting};
use super::poller::{Registration, Role, Watched};

/// Where readers come from.
#[derive(Debug)]
pub(super) enum Arrivals {
    Socket(Listening),
    Pty(Pty),
    /// Somebody hands them in.
    Handed,
}

impl Arrivals {
    /// Gives a reader who is there, or waits for one.
    pub(super) fn next(&mut self, registration: &Registration) -> io::Result<Option<Connection>> {
        match self {
            Self::Socket(listening) => listening.next(registration),
            Self::Pty(pty) => pty.next(registration),
            Self::Handed => Ok(None),
        }
    }
}

/// A listening socket. One client is served at a time; those who connect meanwhile wait their turn, as with QEMU.
#[derive(Debug)]
pub(super) struct Listening {
    listener: UnixListener,
    watched: Watched,
    path: PathBuf,
}

impl Listening {
    /// Listens at `path`. A socket that a monitor left there when it was killed is replaced; one that somebody
    /// listens at is not.
    pub(super) fn bind(path: &Path, registration: &Registration) -> io::Result<Self> {
        remove_stale(path)?;
        let listener = UnixListener::bind(path)?;
        // Who reaches a console may be root in the guest: only the monitor's own user may connect.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let watched = registration.watch(listener.as_fd().try_clone_to_owned()?, Role::Arrivals);
        Ok(Self { listener, watched, path: path.to_owned() })
    }

    fn next(&mut self, registration: &Registration) -> io::Result<Option<Connection>> {
        match self.listener.accept() {
            Ok((client, _)) => {
                self.watched.set_interest(None)?;
                Connection::duplex(Peer::Client, client.into(), Waiting::Socket, registration).map(Some)
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                self.watched.set_interest(Some(EventSet::IN))?;
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.path) {
            tracing::debug!("{}: {e}", self.path.display());
        }
    }
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    if metadata.file_type().is_socket()
        && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    {
        return fs::remove_file(path);
    }
    Err(io::ErrorKind::AddrInUse.into())
}

/// A pseudo-terminal, in raw mode, whose other end programs open by name.
///
/// With nobody there, the monitor's end hangs up at once, so it cannot be waited on; opening of the name is watched
/// for instead.
#[derive(Debug)]
pub(super) struct Pty {
    master: PtyMaster,
    inotify: Inotify,
    watched: Watched,
}

impl Pty {
    /// Makes a pseudo-terminal. Gives the path of its other end too.
    pub(super) fn open(registration: &Registration) -> io::Result<(Self, PathBuf)> {
        let flags = OFlag::O_RDWR | OFlag::O_NOCTTY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let master = posix_openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let path = PathBuf::from(ptsname_r(&master)?);
        // Opened and closed once, so that the monitor's end says from the first that nobody is there.
        let other = open(&path, flags, Mode::empty())?;
        let mut modes = tcgetattr(&other)?;
        cfmakeraw(&mut modes);
        tcsetattr(&other, SetArg::TCSANOW, &modes)?;
        drop(other);
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        inotify.add_watch(&path, AddWatchFlags::IN_OPEN)?;
        let watched = registration.watch(inotify.as_fd().try_clone_to_owned()?, Role::Arrivals);
        let pty = Self { master, inotify, watched };
        Ok((pty, path))
    }

    fn next(&mut self, registration: &Registration) -> io::Result<Option<Connection>> {
        // Emptied before looking, so that an opening after the look is told of again.
        match self.inotify.read_events() {
            Ok(_) | Err(nix::Error::EAGAIN) => {}
            Err(e) => return Err(e.into()),
        }
        let mut polled = [PollFd::new(self.master.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::ZERO)?;
        let nobody = polled.iter().filter_map(PollFd::revents).any(|events| events.contains(PollFlags::POLLHUP));
        if nobody {
            self.watched.set_interest(Some(EventSet::IN))?;
            return Ok(None);
        }
        self.watched.set_interest(None)?;
        let fd: OwnedFd = self.master.as_fd().try_clone_to_owned()?;
        Connection::duplex(Peer::Pty, fd, Waiting::Never, registration).map(Some)
    }
}
