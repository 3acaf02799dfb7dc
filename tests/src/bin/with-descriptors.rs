//! Opens files and taps and becomes another program, which inherits them as descriptors 3, 4 and so on: what a service
//! manager or a shim does for a monitor that may open nothing itself.

#![expect(unsafe_code, reason = "an ioctl that no wrapper has")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;

const USAGE: &str = "usage: with-descriptors [--file PATH|--tap NAME]… -- PROGRAM [ARGUMENT…]";

mod requests {
    nix::ioctl_write_ptr_bad!(set_interface, nix::libc::TUNSETIFF, nix::libc::ifreq);
}

fn main() -> ExitCode {
    match run() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("with-descriptors: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<std::convert::Infallible> {
    let mut words = std::env::args().skip(1);
    let mut next = 3;
    while let Some(word) = words.next() {
        if word == "--" {
            let program = words.next().context(USAGE)?;
            return Err(Command::new(&program).args(words).exec()).context(program);
        }
        let value = words.next().context(USAGE)?;
        let file = match word.as_str() {
            "--file" => OpenOptions::new().read(true).write(true).open(&value),
            "--tap" => tap(&value),
            _ => bail!("{USAGE}"),
        };
        let file = file.with_context(|| format!("{word} {value}"))?;
        ensure!(file.as_raw_fd() == next, "descriptor {next} is in use already");
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty()))?;
        // It stays open for the program.
        let _ = file.into_raw_fd();
        next += 1;
    }
    bail!("{USAGE}")
}

/// Attaches to a tap that is there already.
fn tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    unsafe { requests::set_interface(file.as_raw_fd(), &raw mut request) }?;
    Ok(file)
}
