//! A started program: its output as it comes, input for it, and its end.

use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How a program ended.
#[derive(Debug)]
pub struct Run {
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: String,
    /// How it ended.
    pub status: ExitStatus,
    /// From its start to its end.
    pub took: Duration,
}

impl Run {
    /// What it wrote to standard output, as text.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Its exit code; `None` where a signal killed it.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// The same run, after a look at its exit code.
    ///
    /// # Panics
    /// Where it is another, with all that the program wrote.
    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(self.code(), Some(code), "exit code\n{self}");
        self
    }

    /// The same run, after a look for each of `texts` in its messages.
    ///
    /// # Panics
    /// Where one is not there, with all that the program wrote.
    #[track_caller]
    pub fn expect_messages(self, texts: &[&str]) -> Self {
        for text in texts {
            assert!(self.stderr.contains(text), "no {text:?} in the messages\n{self}");
        }
        self
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} after {:?}\n--- output\n{}\n--- messages\n{}", self.status, self.took, self.output(), self.stderr)
    }
}

/// A program that runs. Dropping it kills it.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    pieces: Receiver<Vec<u8>>,
    stdout: Vec<u8>,
    /// What was looked at already by [`Running::wait_for`].
    seen: usize,
    stderr: Option<JoinHandle<String>>,
    started: Instant,
    deadline: Instant,
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("pid", &self.child.id()).finish_non_exhaustive()
    }
}

impl Running {
    /// Starts a command, which has `deadline` to come to its end.
    pub fn start(mut command: Command, deadline: Duration) -> Self {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{}: {error}", command.get_program().display()));
        let mut output = child.stdout.take().expect("a pipe");
        let mut messages = child.stderr.take().expect("a pipe");
        let (sender, pieces) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length) = output.read(&mut buffer)
                && length > 0
                && sender.send(buffer[..length].to_vec()).is_ok()
            {}
        });
        let stderr = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What was read before an error is as good as all.
            let _ = messages.read_to_end(&mut bytes);
            String::from_utf8_lossy(&bytes).into_owned()
        });
        Self {
            stdin: child.stdin.take(),
            child,
            pieces,
            stdout: Vec::new(),
            seen: 0,
            stderr: Some(stderr),
            started,
            deadline: started + deadline,
        }
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes to its standard input.
    ///
    /// # Panics
    /// Where it reads no more.
    pub fn send(&mut self, bytes: &[u8]) {
        let stdin = self.stdin.as_mut().expect("input was not closed");
        stdin.write_all(bytes).and_then(|()| stdin.flush()).expect("the program reads its input");
    }

    /// Waits until it has written `text` to standard output, beyond what earlier calls waited for.
    ///
    /// # Panics
    /// Where it ends, or the deadline comes, before that.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        loop {
            let unseen = &self.stdout[self.seen..];
            if let Some(at) = unseen.windows(text.len()).position(|window| window == text.as_bytes()) {
                self.seen += at + text.len();
                return;
            }
            if !self.receive() {
                let run = self.end();
                panic!("{text:?} did not come\n{run}");
            }
        }
    }

    /// Closes its input and waits for its end.
    ///
    /// # Panics
    /// Where it does not end before the deadline.
    #[track_caller]
    pub fn finish(mut self) -> Run {
        self.stdin = None;
        while self.receive() {}
        let late = Instant::now() >= self.deadline;
        let run = self.end();
        assert!(!late, "it did not end\n{run}");
        run
    }

    /// Takes in the next piece of output. False where no more can come before the deadline.
    fn receive(&mut self) -> bool {
        match self.pieces.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => {
                self.stdout.extend(piece);
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Waits for the end, which must come soon after that of the output, or brings it about.
    fn end(&mut self) -> Run {
        if Instant::now() >= self.deadline {
            // It may have ended by itself.
            let _ = self.child.kill();
        }
        let status = self.child.wait().expect("the program is a child");
        let took = self.started.elapsed();
        while self.receive() {}
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        Run { stdout: std::mem::take(&mut self.stdout), stderr, status, took }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
