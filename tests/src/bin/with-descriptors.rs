//! Opens files, taps and listening sockets and becomes another program, which inherits them as descriptors 3, 4 and so on:
//! what a service manager or a shim does for a monitor that may open nothing itself.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use halyard_tests::network;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

const USAGE: &str = "usage: with-descriptors [--file PATH|--tap NAME|--listen PATH]… -- PROGRAM [ARGUMENT…]";

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
            "--tap" => network::open_tap(&value),
            // A socket that waits for clients, as a service manager makes it.
            "--listen" => UnixListener::bind(&value).map(|listener| File::from(OwnedFd::from(listener))),
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
