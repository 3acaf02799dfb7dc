//! A socket of a host, at a path of this machine.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::client::Client;
use crate::process::Socket;

/// A listening socket of this machine whose connections lead to one of a host, as long as the host is there.
pub struct Forward {
    folder: TempDir,
}

impl Forward {
    /// Connections to [`Forward::path`] lead to the socket at `remote` from now on.
    ///
    /// # Errors
    /// Where no socket can be made.
    pub fn new(client: &Client, remote: &str) -> Result<Self> {
        let folder = tempfile::tempdir().context("a folder")?;
        let listener = UnixListener::bind(folder.path().join("socket")).context("a socket")?;
        let (client, remote) = (client.clone(), remote.to_owned());
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                // Where the host's socket cannot be reached, whoever connected reads an end.
                if let Ok(far) = client.connect(&remote) {
                    join(&near, &far).unwrap_or_default();
                }
            }
        });
        Ok(Self { folder })
    }

    /// Where to connect.
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("socket")
    }
}

/// Carries bytes both ways, until each side has ended.
fn join(near: &UnixStream, far: &Socket) -> io::Result<()> {
    let (mut from_near, mut to_near) = (near.try_clone()?, near.try_clone()?);
    let (mut to_far, mut from_far) = (far.clone(), far.clone());
    thread::spawn(move || {
        copy(&mut from_near, &mut to_far);
        let _ = to_far.close_input();
    });
    thread::spawn(move || {
        copy(&mut from_far, &mut to_near);
        let _ = to_near.shutdown(Shutdown::Both);
    });
    Ok(())
}

/// Until an end or an error, which are the same to the other side.
fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut piece = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut piece)
        && to.write_all(&piece[..length]).is_ok()
    {}
}
