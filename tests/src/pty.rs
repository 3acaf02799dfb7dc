//! A program at a terminal of its own, as a person would use it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// A started program, and the other end of its terminal. Dropping it kills it.
pub struct Pty {
    child: Child,
    master: File,
    /// Kept open, so that the terminal's modes can be read after the program's end.
    slave: OwnedFd,
    output: Receiver<Vec<u8>>,
    heard: Vec<u8>,
    /// What was not waited for yet begins here.
    at: usize,
    deadline: Instant,
}

impl Pty {
    /// Starts a program at a terminal of 100 columns and 40 rows. What it is waited for must happen within `patience`.
    ///
    /// # Panics
    /// Where there is no terminal to be had, or the program cannot be started.
    pub fn start(mut command: Command, patience: Duration) -> Self {
        let size = Winsize { ws_row: 40, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size), None).expect("a terminal");
        let end = || slave.try_clone().expect("a descriptor");
        let child = command.stdin(end()).stdout(end()).stderr(end()).spawn().expect("a program");
        let master = File::from(master);
        let mut reader = master.try_clone().expect("a descriptor");
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(length @ 1..) = reader.read(&mut piece) {
                if sender.send(piece[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, master, slave, output, heard: Vec::new(), at: 0, deadline: Instant::now() + patience }
    }

    /// Types.
    ///
    /// # Panics
    /// Where the terminal is gone.
    pub fn send(&mut self, bytes: &[u8]) {
        self.master.write_all(bytes).expect("a terminal");
    }

    /// Stops the program, as a shell's `kill -STOP` does, and lets it go on.
    ///
    /// # Panics
    /// Where it is gone.
    pub fn interrupt(&self) {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a process id"));
        kill(pid, Signal::SIGSTOP).expect("a child");
        waitpid(pid, Some(WaitPidFlag::WUNTRACED)).expect("it stops");
        kill(pid, Signal::SIGCONT).expect("a child");
    }

    /// Waits until `text` is shown, beyond what earlier calls waited for.
    ///
    /// # Panics
    /// Where it is not.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let new = &self.heard[self.at..];
            if let Some(found) = new.windows(text.len()).position(|part| part == text.as_bytes()) {
                self.at += found + text.len();
                return;
            }
            match self.output.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
                Ok(piece) => self.heard.extend(piece),
                Err(_) => panic!("{text:?} was not shown, but {:?}", String::from_utf8_lossy(&self.heard)),
            }
        }
    }

    /// Whether keys go to the program one by one.
    ///
    /// # Panics
    /// Where the terminal is gone.
    pub fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).expect("a terminal").local_flags.contains(LocalFlags::ICANON)
    }

    /// Waits for the program's end, at which the terminal must be as it was before. Its exit code is returned; `None`
    /// where a signal killed it.
    ///
    /// # Panics
    /// Where it does not end in time, or leaves the terminal changed.
    #[track_caller]
    pub fn finish(mut self) -> Option<i32> {
        loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                assert!(!self.is_raw(), "the terminal was left in raw mode");
                return status.code();
            }
            assert!(Instant::now() < self.deadline, "it did not end; {:?}", String::from_utf8_lossy(&self.heard));
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Pty {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
