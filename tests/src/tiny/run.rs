//! A started program: its output as it comes, input for it, and its end.

use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

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

/// One of a program's two outputs, as it comes.
struct Stream {
    pieces: Receiver<Vec<u8>>,
    bytes: Vec<u8>,
    /// What was looked at already.
    seen: usize,
}

impl Stream {
    fn new(mut from: impl Read + Send + 'static) -> Self {
        let (sender, pieces) = channel();
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length) = from.read(&mut buffer)
                && length > 0
                && sender.send(buffer[..length].to_vec()).is_ok()
            {}
        });
        Self { pieces, bytes: Vec::new(), seen: 0 }
    }

    /// Takes in the next piece. False where no more can come before the deadline.
    fn receive(&mut self, deadline: Instant) -> bool {
        match self.pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => {
                self.bytes.extend(piece);
                true
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => false,
        }
    }

    /// Waits for `text`, beyond what earlier calls waited for. False where it does not come.
    fn wait_for(&mut self, text: &str, deadline: Instant) -> bool {
        loop {
            let unseen = &self.bytes[self.seen..];
            if let Some(at) = unseen.windows(text.len()).position(|window| window == text.as_bytes()) {
                self.seen += at + text.len();
                return true;
            }
            if !self.receive(deadline) {
                return false;
            }
        }
    }
}

/// A program that runs. Dropping it kills it.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    output: Stream,
    messages: Stream,
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
        let output = Stream::new(child.stdout.take().expect("a pipe"));
        let messages = Stream::new(child.stderr.take().expect("a pipe"));
        Self { stdin: child.stdin.take(), child, output, messages, started, deadline: started + deadline }
    }

    /// Lets it have so much time from now on.
    pub(super) fn extend(&mut self, deadline: Duration) {
        self.deadline = Instant::now() + deadline;
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
        if !self.output.wait_for(text, self.deadline) {
            let run = self.end();
            panic!("{text:?} did not come\n{run}");
        }
    }

    /// Waits until it has written `text` to standard error, beyond what earlier calls waited for.
    ///
    /// # Panics
    /// As [`Running::wait_for`].
    #[track_caller]
    pub fn wait_for_message(&mut self, text: &str) {
        if !self.messages.wait_for(text, self.deadline) {
            let run = self.end();
            panic!("{text:?} was not said\n{run}");
        }
    }

    /// Closes its input and waits for its end.
    ///
    /// # Panics
    /// Where it does not end before the deadline.
    #[track_caller]
    pub fn finish(mut self) -> Run {
        self.stdin = None;
        while self.output.receive(self.deadline) {}
        let late = Instant::now() >= self.deadline;
        let run = self.end();
        assert!(!late, "it did not end\n{run}");
        run
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// Where it has ended and was waited for.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.pid()).expect("a process id"));
        nix::sys::signal::kill(pid, signal).expect("the program is there");
    }

    /// Whether it has not ended yet.
    pub(super) fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end, which must come soon after that of the output, or brings it about.
    pub(super) fn end(&mut self) -> Run {
        if Instant::now() >= self.deadline {
            // It may have ended by itself.
            let _ = self.child.kill();
        }
        let status = self.child.wait().expect("the program is a child");
        let took = self.started.elapsed();
        // Both are closed now, unless a child of the program holds them.
        let soon = Instant::now() + Duration::from_secs(5);
        while self.output.receive(soon) {}
        while self.messages.receive(soon) {}
        let stderr = String::from_utf8_lossy(&self.messages.bytes).into_owned();
        Run { stdout: std::mem::take(&mut self.output.bytes), stderr, status, took }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
