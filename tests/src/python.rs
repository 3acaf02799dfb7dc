//! Programs of Python's that `scripts/install` put into the cache, and a way for them to an API's socket.

use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use anyhow::{Context, Result, ensure};

use crate::cache;

/// The command that starts one of them.
///
/// # Errors
/// Where it is not there.
pub fn program(name: &str) -> Result<Command> {
    let folder = cache::folder()?.join("python/bin");
    let path = folder.join(name);
    ensure!(path.exists(), "{} is not there: scripts/install puts it there", path.display());
    let mut command = Command::new(path);
    // They start each other by name.
    let others = std::env::var_os("PATH").unwrap_or_default();
    let paths = [folder].into_iter().chain(std::env::split_paths(&others));
    command.env("PATH", std::env::join_paths(paths).context("PATH")?);
    // Nothing is left behind beside the sources.
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    Ok(command)
}

/// A TCP port of this machine whose connections lead to the Unix socket at `socket`, for clients that know no other
/// kind. It is there as long as this process.
///
/// # Errors
/// Where there is no port to be had.
pub fn port_to(socket: &Path) -> Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").context("a port")?;
    let address = listener.local_addr().context("a port")?;
    let socket = socket.to_path_buf();
    thread::spawn(move || {
        for near in listener.incoming().map_while(Result::ok) {
            // Where the socket cannot be reached, whoever connected reads an end.
            if let Ok(far) = UnixStream::connect(&socket) {
                join(near, far).unwrap_or_default();
            }
        }
    });
    Ok(address)
}

/// Carries bytes both ways, until each side has ended.
fn join(near: TcpStream, far: UnixStream) -> io::Result<()> {
    near.set_nodelay(true)?;
    let (mut from_near, mut to_far) = (near.try_clone()?, far.try_clone()?);
    thread::spawn(move || {
        // An end and a failure mean the same: no more comes from there.
        let _ = io::copy(&mut from_near, &mut to_far);
        let _ = to_far.shutdown(Shutdown::Write);
    });
    let (mut from_far, mut to_near) = (far, near);
    thread::spawn(move || {
        let _ = io::copy(&mut from_far, &mut to_near);
        let _ = to_near.shutdown(Shutdown::Both);
    });
    Ok(())
}

/// A file of `tests/python`.
pub fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("python").join(name)
}
