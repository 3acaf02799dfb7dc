//! A quote service of a platform that is played, at a port of a VM socket, for stories in a host that has such sockets.
//!
//! Usage: `quote-service FOLDER PORT`. The folder gets what its quotes can be checked with, and in `report` the report of a trust
//! domain. Then it says "ready", and serves until its input ends.
#![expect(unsafe_code, reason = "what a socket accepts comes as a number")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use halyard_qgs::{Platform, Registers, Service};
use halyard_tests::quotes::write_collateral;
use nix::libc::VMADDR_CID_ANY;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, socket};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, port] = &arguments[..] else { bail!("usage: quote-service FOLDER PORT") };
    let folder = Path::new(folder);
    let listener =
        socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).context("a VM socket")?;
    let address = VsockAddr::new(VMADDR_CID_ANY, port.parse()?);
    bind(listener.as_raw_fd(), &address).context("its port")?;
    listen(&listener, Backlog::new(16)?)?;
    let clients = std::iter::repeat_with(move || {
        let fd = accept(listener.as_raw_fd()).ok()?;
        // SAFETY: the descriptor is new, and nobody else's.
        Some(unsafe { File::from_raw_fd(fd) })
    });
    let service = Service::over(Platform::new()?, clients.flatten());
    write_collateral(folder, service.platform())?;
    fs::write(folder.join("report"), service.platform().report(&Registers::default()))?;
    println!("ready");
    io::copy(&mut io::stdin(), &mut io::sink())?;
    Ok(())
}
