//! A console of the VM at this terminal.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use api::Client;
use devices::endpoint::escape::{Command, Escape};
use devices::endpoint::terminal::RawTerminal;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::failed::{Done, Failed};

/// What `Ctrl-a h` shows.
const HELP: &str = "\r\n\
    Ctrl-a x       leave the console\r\n\
    Ctrl-a h       show this\r\n\
    Ctrl-a Ctrl-a  send Ctrl-a to the guest\r\n";
/// The most bytes that wait for a guest that does not read.
const MOST_PENDING: usize = 64 << 10;

/// Connects standard input and output to a console until it ends, or the person leaves.
pub fn console(client: &Client, id: &str, take_over: bool) -> Done {
    let socket = client.console(id, take_over)?;
    let here = |error: io::Error| Failed::here(format!("the console «{id}»: {error}"));
    let terminal = RawTerminal::enter(&io::stdin()).map_err(here)?;
    let mut talk = Talk { socket, escape: terminal.is_some().then(Escape::default), pending: Vec::new(), input: true };
    if terminal.is_some() {
        tell(&format!("connected to {id}; Ctrl-a x leaves it\r\n"));
    }
    let ended = talk.run();
    drop(terminal);
    match ended.map_err(here)? {
        End::Left => tell("\nleft the console\n"),
        End::Closed => tell("\nthe console has ended\n"),
    }
    Ok(())
}

/// Why a talk ended.
enum End {
    /// The person left.
    Left,
    /// The monitor closed the connection: the machine has ended, or another client took the console over.
    Closed,
}

struct Talk {
    socket: UnixStream,
    /// Where a terminal is: its escape key.
    escape: Option<Escape>,
    /// What the guest has not taken yet.
    pending: Vec<u8>,
    /// Standard input has not ended.
    input: bool,
}

impl Talk {
    fn run(&mut self) -> io::Result<End> {
        self.socket.set_nonblocking(true)?;
        loop {
            let (readable, from_guest, to_guest) = self.wait()?;
            if readable && self.read_input()? {
                return Ok(End::Left);
            }
            if to_guest {
                self.write_pending()?;
            }
            if from_guest && !self.read_guest()? {
                return Ok(End::Closed);
            }
        }
    }

    /// Waits until there is something to do: input, output of the guest, room for what it is sent.
    fn wait(&self) -> io::Result<(bool, bool, bool)> {
        let stdin = io::stdin();
        let mut wanted = PollFlags::POLLIN;
        wanted.set(PollFlags::POLLOUT, !self.pending.is_empty());
        let mut waits = vec![PollFd::new(self.socket.as_fd(), wanted)];
        // At a terminal the escape key is always heard; what comes through a pipe waits for the guest.
        if self.input && (self.escape.is_some() || self.pending.is_empty()) {
            waits.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut waits, PollTimeout::NONE) {
            Err(nix::Error::EINTR) => return Ok((false, false, false)),
            other => other?,
        };
        let any = |index: usize, flags: PollFlags| {
            waits.get(index).and_then(PollFd::revents).is_some_and(|events| events.intersects(flags))
        };
        let ended = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLIN;
        Ok((any(1, ended), any(0, ended), any(0, PollFlags::POLLOUT)))
    }

    /// Takes input. Says whether the person leaves.
    fn read_input(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let length = nix::unistd::read(io::stdin().as_fd(), &mut bytes)?;
        self.input = length > 0;
        let Some(escape) = &mut self.escape else {
            self.pending.extend(bytes.get(..length).unwrap_or_default());
            return Ok(false);
        };
        // A terminal that is gone has nobody at it.
        if length == 0 {
            return Ok(true);
        }
        for byte in bytes.iter().take(length) {
            let (to_guest, command) = escape.feed(*byte);
            match to_guest {
                // As a full terminal does.
                Some(_) if self.pending.len() >= MOST_PENDING => tell("\x07"),
                to_guest => self.pending.extend(to_guest),
            }
            match command {
                Some(Command::Quit) => return Ok(true),
                Some(Command::Help) => tell(HELP),
                None => {}
            }
        }
        Ok(false)
    }

    fn write_pending(&mut self) -> io::Result<()> {
        match self.socket.write(&self.pending) {
            Ok(length) => drop(self.pending.drain(..length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The end is told where the rest of the output was read.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => self.pending.clear(),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Shows what the guest says. Says whether more may come.
    fn read_guest(&mut self) -> io::Result<bool> {
        let mut bytes = [0; 4096];
        let length = match self.socket.read(&mut bytes) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(true),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            Err(error) => return Err(error),
        };
        let mut out = io::stdout().lock();
        out.write_all(bytes.get(..length).unwrap_or_default())?;
        out.flush()?;
        Ok(length > 0)
    }
}

/// Tells the person something, beside what the guest says.
fn tell(text: &str) {
    // Where standard error is closed, there is nobody to tell.
    let _ = io::stderr().write_all(text.as_bytes());
}
