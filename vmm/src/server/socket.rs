//! The socket that the API listens on: made at a path, or inherited.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, UnixAddr, bind, getsockname, getsockopt, listen, socket,
    sockopt,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, chown};

use crate::request::Descriptors;

/// Clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Where the API listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiSocket {
    /// At a path, where it is made.
    Path {
        /// The path.
        path: PathBuf,
        /// Who may connect.
        access: Access,
    },
    /// At an inherited descriptor.
    Fd(i32),
}

/// Who may connect to a socket that is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// The file's mode; 0600 by default.
    pub mode: u32,
    /// The file's owner, where it is not the process's user.
    pub uid: Option<u32>,
    /// The file's group, where it is not the process's.
    pub gid: Option<u32>,
}

impl Default for Access {
    fn default() -> Self {
        Self { mode: 0o600, uid: None, gid: None }
    }
}

impl Access {
    /// Who may connect to a socket that somebody else made: the mode of its file says so, where there is one to be seen at its
    /// address. An abstract address has none, so that anybody can connect, and a file may lie in another root directory:
    /// there it is for root, this process's user, and who listened at it first (unix(7), SO_PEERCRED).
    ///
    /// # Errors
    /// The socket has no such user.
    fn of(listener: &UnixListener) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let file =
            address.as_pathname().filter(|path| path.is_absolute()).and_then(|path| fs::symlink_metadata(path).ok());
        Ok(match file.filter(|file| file.file_type().is_socket()) {
            Some(file) => Self { mode: file.mode() & 0o777, uid: Some(file.uid()), gid: Some(file.gid()) },
            None => {
                let maker = getsockopt(&listener.as_fd(), sockopt::PeerCredentials)?;
                Self { uid: Some(maker.uid()), ..Self::default() }
            }
        })
    }

    /// Whether a peer of this user may be served. The file's mode decided already who can connect; with a mode for the
    /// owner alone, the kernel's word is asked for once more.
    pub fn admits(&self, uid: u32) -> bool {
        let owner = self.uid.unwrap_or_else(|| Uid::effective().as_raw());
        self.mode & 0o077 != 0 || uid == owner || uid == 0 || uid == Uid::effective().as_raw()
    }
}

/// Why there is no socket to listen on.
#[derive(Debug, thiserror::Error)]
#[error("API socket {at}: {problem}")]
pub struct SocketError {
    at: String,
    problem: String,
}

/// A listening socket, and the file that goes with it.
#[derive(Debug)]
pub struct ApiListener {
    pub(super) listener: UnixListener,
    pub(super) access: Access,
    file: Option<SocketFile>,
}

/// The file of a socket that was made here. Dropping it removes it, where it is still this one.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: u64,
}

impl ApiSocket {
    /// Listens. A socket file that a process left there when it was killed is replaced; where somebody listens, it is
    /// not.
    ///
    /// # Errors
    /// [`SocketError`] says where, and what is wrong.
    pub fn listen(&self) -> Result<ApiListener, SocketError> {
        match self {
            Self::Path { path, access } => {
                let failed = |problem: String| SocketError { at: path.display().to_string(), problem };
                let listener = make(path, access).map_err(|error| failed(reason(&error)))?;
                let inode = fs::symlink_metadata(path).map_err(|error| failed(error.to_string()))?.ino();
                let file = Some(SocketFile { path: path.clone(), inode });
                Ok(ApiListener { listener, access: *access, file })
            }
            Self::Fd(number) => {
                let failed = |problem: String| SocketError { at: format!("descriptor {number}"), problem };
                let fd = Descriptors::Inherited.take(*number).map_err(|error| failed(error.to_string()))?;
                let listener = inherited(fd).map_err(|error| failed(error.to_string()))?;
                let access = Access::of(&listener).map_err(|error| failed(error.to_string()))?;
                Ok(ApiListener { listener, access, file: None })
            }
        }
    }

    /// The socket that systemd started the process with, where it did (sd_listen_fds(3)).
    pub fn from_systemd() -> Option<Self> {
        let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
        let ours = number("LISTEN_PID") == Some(std::process::id());
        (ours && number("LISTEN_FDS")? >= 1).then_some(Self::Fd(crate::request::FIRST_DESCRIPTOR))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!("{}: {error}", self.path.display());
        }
    }
}

impl ApiListener {
    /// Parts with the file, so that it lives as long as its holder wants.
    pub(super) fn split(self) -> (UnixListener, Access, impl Send) {
        (self.listener, self.access, self.file)
    }
}

fn make(path: &Path, access: &Access) -> io::Result<UnixListener> {
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK, None)?;
    // The file is born with the mode of the descriptor, less what the process's umask takes: nobody slips in before.
    fchmod(&fd, Mode::from_bits_truncate(access.mode))?;
    let address = UnixAddr::new(path)?;
    match bind(fd.as_raw_fd(), &address) {
        Err(nix::Error::EADDRINUSE) => {
            remove_stale(path)?;
            bind(fd.as_raw_fd(), &address)?;
        }
        bound => bound?,
    }
    let settled = chown(path, access.uid.map(Uid::from_raw), access.gid.map(Gid::from_raw))
        .map_err(io::Error::from)
        .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(access.mode)))
        .and_then(|()| Ok(listen(&fd, Backlog::new(BACKLOG)?)?));
    if settled.is_err() {
        // The error is the one to tell.
        let _ = fs::remove_file(path);
    }
    settled.map(|()| fd.into())
}

fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket = fs::symlink_metadata(path)?.file_type().is_socket();
    match UnixStream::connect(path) {
        Err(error) if is_socket && error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path),
        _ if !is_socket => {
            Err(io::Error::other("there is a file that is no socket: remove it, or choose another path"))
        }
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}

fn inherited(fd: OwnedFd) -> io::Result<UnixListener> {
    let unix =
        getsockname::<UnixAddr>(fd.as_raw_fd()).is_ok_and(|address| address.family() == Some(AddressFamily::Unix));
    if !unix || !getsockopt(&fd.as_fd(), sockopt::AcceptConn)? {
        return Err(io::Error::other("it is no listening Unix socket"));
    }
    let listener = UnixListener::from(fd);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AddrInUse => "another process listens there already".into(),
        io::ErrorKind::NotFound => "its directory does not exist".into(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &Path, mode: u32) -> ApiSocket {
        ApiSocket::Path { path: path.to_owned(), access: Access { mode, ..Access::default() } }
    }

    #[test]
    fn the_file_has_the_mode_and_goes_with_its_listener() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        for mode in [0o600, 0o660, 0o666] {
            let listener = at(&path, mode).listen().unwrap();
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, mode);
            UnixStream::connect(&path).unwrap();
            drop(listener);
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_is_stale_is_replaced_and_what_lives_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        // A child that another test makes has it, too, until it executes its program.
        while UnixStream::connect(&path).is_ok() {}
        assert!(path.exists(), "a listener that is only dropped leaves its file behind");
        let first = at(&path, 0o600).listen().unwrap();
        let refused = at(&path, 0o600).listen().unwrap_err().to_string();
        assert!(refused.ends_with("another process listens there already"), "{refused}");
        // A file that another has put in this one's place is not removed.
        fs::rename(&path, folder.path().join("old")).unwrap();
        let second = at(&path, 0o600).listen().unwrap();
        drop(first);
        assert!(path.exists());
        drop(second);
        fs::write(&path, "precious").unwrap();
        assert!(at(&path, 0o600).listen().unwrap_err().to_string().contains("no socket"));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        let missing = at(&folder.path().join("a/b"), 0o600).listen().unwrap_err().to_string();
        assert!(missing.ends_with("its directory does not exist"), "{missing}");
    }

    fn inherited_access(listener: UnixListener) -> Access {
        // As if the process had been started with it.
        nix::fcntl::fcntl(&listener, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
        let listener = ApiSocket::Fd(std::os::fd::IntoRawFd::into_raw_fd(listener)).listen().unwrap();
        listener.access
    }

    #[test]
    fn an_inherited_socket_is_for_whom_its_file_says_or_for_its_maker() {
        let own = Uid::effective().as_raw();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        for (mode, others) in [(0o600, false), (0o700, false), (0o660, true), (0o777, true)] {
            let listener = UnixListener::bind(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let access = inherited_access(listener);
            assert!(access.admits(own) && access.admits(0) && access.admits(4321) == others, "{mode:o}");
            fs::remove_file(&path).unwrap();
        }
        // Where the file is not to be seen, and where there is none.
        let listener = UnixListener::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let name = format!("halyard-test-{}", std::process::id());
        let address = <std::os::unix::net::SocketAddr as std::os::linux::net::SocketAddrExt>::from_abstract_name(name);
        for listener in [listener, UnixListener::bind_addr(&address.unwrap()).unwrap()] {
            let access = inherited_access(listener);
            assert!(access.admits(own) && access.admits(0) && !access.admits(4321));
        }
    }

    #[test]
    fn a_mode_for_the_owner_alone_admits_no_other_user() {
        let own = Uid::effective().as_raw();
        let access = Access { uid: Some(1234), ..Access::default() };
        assert!(access.admits(1234) && access.admits(0) && access.admits(own) && !access.admits(4321));
        assert!(Access { mode: 0o660, ..access }.admits(4321), "the file's group decides");
    }
}
