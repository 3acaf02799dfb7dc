//! The harness's side of the agent: runs commands, talks to sockets, and gives up with the last words that were heard.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};

use crate::protocol::{CHUNK, Decoder, Found, Message, Request, Status, Stream, WINDOW};
use crate::text::Text;

/// How long anything may take where nothing else is said.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Most output that [`Client::run`] collects.
const OUTPUT_LIMIT: usize = 1 << 30;
/// What a running process's output is remembered of, for error messages and late readers.
const MEMORY_LIMIT: usize = 64 << 20;

/// A command to run.
#[derive(Clone, Debug)]
pub struct Cmd {
    argv: Vec<String>,
    env: Vec<(String, String)>,
    folder: Option<String>,
    input: Vec<u8>,
    patience: Duration,
}

impl Cmd {
    /// A program, searched in `PATH`.
    pub fn new(program: impl Into<String>) -> Self {
        Self { argv: vec![program.into()], env: Vec::new(), folder: None, input: Vec::new(), patience: PATIENCE }
    }

    /// A line for `sh`.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new("sh").arg("-c").arg(line)
    }

    /// One argument more.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.argv.push(argument.into());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<T: Into<String>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<String>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// What [`Client::run`] writes to its standard input, which is then closed.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// How long [`Client::run`] waits for its end; [`PATIENCE`] by default.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    fn line(&self) -> String {
        match self.argv.as_slice() {
            [shell, flag, line] if shell == "sh" && flag == "-c" => line.clone(),
            argv => argv.join(" "),
        }
    }
}

impl From<&str> for Cmd {
    fn from(line: &str) -> Self {
        Self::shell(line)
    }
}

impl From<String> for Cmd {
    fn from(line: String) -> Self {
        Self::shell(line)
    }
}

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command as a line, for messages.
    pub command: String,
    /// How it ended.
    pub status: Status,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text without the newline at its end.
    ///
    /// # Errors
    /// Where the command did not exit with 0: its status and the end of what it wrote.
    pub fn ok(self) -> Result<String> {
        if !self.status.success() {
            bail!(
                "`{}` ended with {}\n--- its error output ends ---\n{}\n--- its output ends ---\n{}",
                self.command,
                self.status,
                Text::tail_of(&self.stderr),
                Text::tail_of(&self.stdout)
            );
        }
        Ok(String::from_utf8_lossy(&self.stdout).trim_end().to_owned())
    }
}

/// Says what else is known where something went wrong, such as the end of a machine's console.
pub type Witness = Arc<dyn Fn() -> String + Send + Sync>;

/// A byte stream that leads to an agent.
pub trait Line: Send + Sync + 'static {
    /// Its two halves, each with the stream kept open by it alone.
    ///
    /// # Errors
    /// Where they cannot be made.
    fn halves(&self) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)>;

    /// Ends it, and every read of it that waits.
    fn close(&self);
}

impl Line for UnixStream {
    fn halves(&self) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)> {
        Ok((Box::new(self.try_clone()?), Box::new(self.try_clone()?)))
    }

    fn close(&self) {
        // It may have been closed at the other end already.
        let _ = self.shutdown(Shutdown::Both);
    }
}

impl Line for Socket {
    fn halves(&self) -> io::Result<(Box<dyn Read + Send>, Box<dyn Write + Send>)> {
        Ok((Box::new(self.clone()), Box::new(self.clone())))
    }

    fn close(&self) {
        self.channel.close();
    }
}

/// A session with an agent. Clones share it, as do its processes and sockets; it ends with the last of them.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
    _end: Arc<End>,
}

/// Ends the stream under a session, and with it the thread that listens.
struct End(Box<dyn Line>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.close();
    }
}

struct Shared {
    name: String,
    witness: Witness,
    line: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    welcome: bool,
    dead: Option<String>,
    next: u32,
    channels: HashMap<u32, Remote>,
}

/// What has been heard of a channel.
#[derive(Default)]
struct Remote {
    opened: Option<Result<u32, String>>,
    credit: usize,
    output: Inbox,
    error: Inbox,
    status: Option<Status>,
}

#[derive(Default)]
struct Inbox {
    text: Text,
    /// Credit is granted as bytes are read instead of as they arrive.
    on_demand: bool,
}

impl Client {
    /// Opens a session over a byte stream. `name` and `witness` are for messages.
    ///
    /// # Errors
    /// Where the agent does not answer in time, or the stream ends.
    pub fn open(name: impl Into<String>, line: impl Line, patience: Duration, witness: Witness) -> Result<Self> {
        let (reader, writer) = line.halves().context("the way to an agent")?;
        let shared = Arc::new(Shared {
            name: name.into(),
            witness,
            line: Mutex::new(writer),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let session = session_number();
        let listener = shared.clone();
        thread::Builder::new()
            .name(format!("agent of {}", shared.name))
            .spawn(move || listener.listen(reader, session))
            .context("no thread for the agent's answers")?;
        let client = Self { shared, _end: Arc::new(End(Box::new(line))) };
        let deadline = Instant::now() + patience;
        loop {
            // An agent that is not there yet loses this: it is said again, and the agent's own start is answered too.
            client.shared.send(&Message::Hello(session))?;
            let again = deadline.min(Instant::now() + Duration::from_millis(500));
            if client.shared.wait(again, |state| state.welcome.then_some(()))?.is_some() {
                return Ok(client);
            }
            if Instant::now() >= deadline {
                bail!(client.shared.late("its agent to answer", patience, ""));
            }
        }
    }

    /// Runs a command to its end.
    ///
    /// # Errors
    /// Where it cannot be started, does not end in time, or the agent is gone. A command that fails is no error
    /// here: see [`Output::ok`].
    pub fn run(&self, command: impl Into<Cmd>) -> Result<Output> {
        let command = command.into();
        let mut process = self.spawn_limited(&command, OUTPUT_LIMIT)?;
        if !command.input.is_empty() {
            process.write(&command.input)?;
        }
        process.close_input()?;
        process.finish(command.patience)
    }

    /// Starts a command that runs on, beside the test. Dropping the [`Process`] kills its process group.
    ///
    /// # Errors
    /// Where it cannot be started, or the agent is gone.
    pub fn spawn(&self, command: impl Into<Cmd>) -> Result<Process> {
        let command = command.into();
        let process = self.spawn_limited(&command, MEMORY_LIMIT)?;
        if !command.input.is_empty() {
            process.write(&command.input)?;
        }
        Ok(process)
    }

    /// Connects to a Unix stream socket.
    ///
    /// # Errors
    /// Where nothing listens there, or the agent is gone.
    pub fn connect(&self, path: &str) -> Result<Socket> {
        let channel = self.channel(MEMORY_LIMIT, true)?;
        channel
            .open(Request::Connect { path: path.to_owned() })
            .with_context(|| format!("cannot connect to {path}"))?;
        Ok(Socket { channel: Arc::new(channel) })
    }

    fn spawn_limited(&self, command: &Cmd, limit: usize) -> Result<Process> {
        let channel = self.channel(limit, false)?;
        let line = command.line();
        let request =
            Request::Run { argv: command.argv.clone(), env: command.env.clone(), folder: command.folder.clone() };
        let pid = channel.open(request).with_context(|| format!("cannot start `{line}`"))?;
        Ok(Process { channel, line, pid })
    }

    fn channel(&self, limit: usize, on_demand: bool) -> Result<Channel> {
        let mut state = self.shared.lock();
        state.check(&self.shared)?;
        state.next += 1;
        let number = state.next;
        let inbox = || Inbox { text: Text::with_limit(limit), on_demand };
        let remote = Remote { credit: WINDOW, output: inbox(), error: inbox(), ..Remote::default() };
        state.channels.insert(number, remote);
        Ok(Channel { client: self.clone(), number })
    }
}

/// A number that no other session has.
fn session_number() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(1);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    (now << 32) ^ (u64::from(std::process::id()) << 12) ^ COUNT.fetch_add(1, Ordering::Relaxed)
}

impl State {
    fn check(&self, shared: &Shared) -> Result<()> {
        match &self.dead {
            Some(reason) => Err(anyhow!("{}: {reason}{}", shared.name, (shared.witness)())),
            None => Ok(()),
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, message: &Message) -> Result<()> {
        let frame = message.encode();
        let result = self.line.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame);
        if let Err(error) = result {
            self.lock().check(self)?;
            bail!("{}: writing to its agent failed: {error}{}", self.name, (self.witness)());
        }
        Ok(())
    }

    /// Waits until `ready` finds what it looks for. `None` at the deadline.
    fn wait<T>(&self, deadline: Instant, mut ready: impl FnMut(&mut State) -> Option<T>) -> Result<Option<T>> {
        let mut state = self.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Ok(Some(found));
            }
            if state.dead.is_some() {
                drop(state);
                // What killed it may have more to say: the witness is asked without the lock.
                let reason = self.lock().dead.clone().unwrap_or_default();
                bail!("{}: {reason}{}", self.name, (self.witness)());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn late(&self, what: &str, patience: Duration, heard: &str) -> String {
        let witness = (self.witness)();
        format!("{}: waited {} s for {what}{heard}{witness}", self.name, patience.as_secs())
    }

    fn listen(&self, mut reader: impl Read, session: u64) {
        let mut decoder = Decoder::default();
        let mut buffer = vec![0; 64 << 10];
        let reason = loop {
            match reader.read(&mut buffer) {
                Ok(0) => break "the connection to its agent was closed".to_owned(),
                Ok(length) => {
                    let mut broken = None;
                    decoder.push(&buffer[..length], &mut |found| broken = broken.take().or(self.hear(found, session)));
                    if let Some(reason) = broken {
                        break reason;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break format!("reading from its agent failed: {error}"),
            }
        };
        self.lock().dead = Some(reason);
        self.changed.notify_all();
    }

    /// Takes what the agent said; returns why the session is over, if it is.
    fn hear(&self, found: Found, session: u64) -> Option<String> {
        let mut state = self.lock();
        let mut grant = None;
        match found {
            // Noise from before the session: an earlier session's end, a terminal's echo.
            Found::Damage if !state.welcome => {}
            Found::Damage => return Some("its agent's answer arrived damaged: bytes were lost or changed".to_owned()),
            Found::Message(Message::Welcome(number)) => state.welcome |= number == session,
            Found::Message(Message::Ready) if state.welcome => return Some("its agent has restarted".to_owned()),
            Found::Message(Message::Ready) => {
                drop(state);
                let _ = self.send(&Message::Hello(session));
                return None;
            }
            Found::Message(_) if !state.welcome => {}
            Found::Message(Message::Damaged) => {
                return Some("what was sent to its agent arrived damaged: bytes were lost or changed".to_owned());
            }
            Found::Message(message) => grant = state.note(message),
        }
        drop(state);
        self.changed.notify_all();
        if let Some(grant) = grant {
            let _ = self.send(&grant);
        }
        None
    }
}

impl State {
    /// Notes what the agent said of a channel; returns the credit to grant for it.
    fn note(&mut self, message: Message) -> Option<Message> {
        match message {
            Message::Opened(channel, process) => self.channels.get_mut(&channel)?.opened = Some(Ok(process)),
            Message::Refused(channel, reason) => self.channels.get_mut(&channel)?.opened = Some(Err(reason)),
            Message::Exited(channel, status) => self.channels.get_mut(&channel)?.status = Some(status),
            Message::Credit(channel, _, bytes) => self.channels.get_mut(&channel)?.credit += bytes as usize,
            Message::End(channel, stream) => self.channels.get_mut(&channel)?.inbox(stream).text.end(),
            Message::Data(channel, stream, bytes) => {
                let inbox = self.channels.get_mut(&channel)?.inbox(stream);
                inbox.text.push(&bytes);
                if !inbox.on_demand {
                    return Some(Message::Credit(channel, stream, u32::try_from(bytes.len()).ok()?));
                }
            }
            _ => {}
        }
        None
    }
}

impl Remote {
    fn inbox(&mut self, stream: Stream) -> &mut Inbox {
        if stream == Stream::Error { &mut self.error } else { &mut self.output }
    }

    fn heard(&self) -> String {
        let mut heard = String::new();
        for (name, inbox) in [("error output", &self.error), ("output", &self.output)] {
            if !inbox.text.is_empty() {
                heard += &format!("\n--- its {name} ends ---\n{}", inbox.text.tail());
            }
        }
        heard
    }
}

struct Channel {
    client: Client,
    number: u32,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.client.shared.lock().channels.remove(&self.number);
        let _ = self.client.shared.send(&Message::Close(self.number));
    }
}

impl Channel {
    /// Ends it here and there: whoever reads it finds its end.
    fn close(&self) {
        if let Some(remote) = self.client.shared.lock().channels.get_mut(&self.number) {
            remote.output.text.end();
        }
        self.client.shared.changed.notify_all();
        let _ = self.client.shared.send(&Message::Close(self.number));
    }

    fn open(&self, request: Request) -> Result<u32> {
        self.client.shared.send(&Message::Open(self.number, request))?;
        self.wait("an answer", PATIENCE, |remote| remote.opened.take())?.map_err(anyhow::Error::msg)
    }

    fn wait<T>(&self, what: &str, patience: Duration, mut ready: impl FnMut(&mut Remote) -> Option<T>) -> Result<T> {
        let found = self
            .client
            .shared
            .wait(Instant::now() + patience, |state| state.channels.get_mut(&self.number).and_then(&mut ready))?;
        found.ok_or_else(|| {
            let heard = self.client.shared.lock().channels.get(&self.number).map(Remote::heard).unwrap_or_default();
            anyhow!(self.client.shared.late(what, patience, &heard))
        })
    }

    fn write(&self, mut bytes: &[u8]) -> Result<()> {
        while !bytes.is_empty() {
            let length = self.wait("its input to be read", PATIENCE, |remote| {
                let length = remote.credit.min(bytes.len()).min(CHUNK);
                remote.credit -= length;
                (length > 0).then_some(length)
            })?;
            let (now, later) = bytes.split_at(length);
            self.client.shared.send(&Message::Data(self.number, Stream::Input, now.to_vec()))?;
            bytes = later;
        }
        Ok(())
    }
}

/// A process in a host or guest. Dropping it kills its process group.
pub struct Process {
    channel: Channel,
    line: String,
    pid: u32,
}

impl Process {
    /// Its process id there.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Writes to its standard input, at the pace at which it is read.
    ///
    /// # Errors
    /// Where it does not read in time, or the agent is gone.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        self.channel.write(bytes).with_context(|| format!("writing to `{}`", self.line))
    }

    /// Closes its standard input.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn close_input(&self) -> Result<()> {
        self.channel.client.shared.send(&Message::End(self.channel.number, Stream::Input))
    }

    /// Sends it a signal, by number.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn kill(&self, signal: i32) -> Result<()> {
        self.channel.client.shared.send(&Message::Signal(self.channel.number, signal))
    }

    /// Waits for a line of its output that contains `part`, after the last one that was waited for, and returns it.
    ///
    /// # Errors
    /// Where its output ends before, or after [`PATIENCE`]: with the end of what it wrote.
    pub fn wait_line(&self, part: &str) -> Result<String> {
        self.wait_line_for(part, PATIENCE)
    }

    /// As [`Process::wait_line`], with a patience of its own.
    ///
    /// # Errors
    /// As [`Process::wait_line`].
    pub fn wait_line_for(&self, part: &str, patience: Duration) -> Result<String> {
        self.wait_stream(part, patience, Stream::Output)
    }

    /// As [`Process::wait_line`], on its error output.
    ///
    /// # Errors
    /// As [`Process::wait_line`].
    pub fn wait_error_line(&self, part: &str) -> Result<String> {
        self.wait_stream(part, PATIENCE, Stream::Error)
    }

    fn wait_stream(&self, part: &str, patience: Duration, stream: Stream) -> Result<String> {
        let what = format!("`{}` to write \"{part}\"", self.line);
        let found = self.channel.wait(&what, patience, |remote| {
            let heard = remote.inbox(stream);
            match heard.text.find(part) {
                Some(line) => Some(Ok(line)),
                None if heard.text.ended() => Some(Err(remote.heard())),
                None => None,
            }
        })?;
        found.map_err(|heard| {
            // The exit status follows the end of its output at once, unless a child holds on.
            let status = self.wait_for(Duration::from_secs(2));
            let status = status.map_or_else(|_| "still runs".to_owned(), |status| format!("ended with {status}"));
            anyhow!(
                "`{}` never wrote \"{part}\", and {status}{heard}{}",
                self.line,
                (self.channel.client.shared.witness)()
            )
        })
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// After [`PATIENCE`], with the end of what it wrote.
    pub fn wait(&self) -> Result<Status> {
        self.wait_for(PATIENCE)
    }

    /// As [`Process::wait`], with a patience of its own.
    ///
    /// # Errors
    /// As [`Process::wait`].
    pub fn wait_for(&self, patience: Duration) -> Result<Status> {
        self.channel.wait(&format!("`{}` to end", self.line), patience, |remote| remote.status)
    }

    /// Has it ended, and how?
    pub fn status(&self) -> Option<Status> {
        self.channel.client.shared.lock().channels.get(&self.channel.number).and_then(|remote| remote.status)
    }

    /// All of its output that is remembered so far.
    pub fn output(&self) -> String {
        let state = self.channel.client.shared.lock();
        let bytes = state.channels.get(&self.channel.number).map(|remote| remote.output.text.bytes());
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }

    /// All of its error output that is remembered so far.
    pub fn error_output(&self) -> String {
        let state = self.channel.client.shared.lock();
        let bytes = state.channels.get(&self.channel.number).map(|remote| remote.error.text.bytes());
        String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned()
    }

    /// The ends of both outputs, for messages.
    pub fn last_words(&self) -> String {
        self.channel.client.shared.lock().channels.get(&self.channel.number).map(Remote::heard).unwrap_or_default()
    }

    /// Waits for its end and that of its output, and returns all of it.
    ///
    /// # Errors
    /// After `patience`, or where it wrote more than can be collected.
    pub fn finish(&mut self, patience: Duration) -> Result<Output> {
        let what = format!("`{}` to end, and its output with it", self.line);
        let (status, stdout, stderr, lost) = self.channel.wait(&what, patience, |remote| {
            let status = remote.status?;
            let (output, error) = (&mut remote.output.text, &mut remote.error.text);
            let lost = output.lost() + error.lost();
            (output.ended() && error.ended()).then(|| (status, output.take(), error.take(), lost))
        })?;
        if lost > 0 {
            bail!("`{}` wrote more than can be kept: the first {lost} bytes are gone", self.line);
        }
        Ok(Output { command: self.line.clone(), status, stdout, stderr })
    }

    /// Copies its outputs as they come until it and they have ended.
    ///
    /// # Errors
    /// Where the agent is gone, or a sink fails.
    pub fn copy_to(&self, output: &mut dyn Write, error: &mut dyn Write) -> Result<Status> {
        loop {
            let (out, err, status) = self.channel.wait("more output", Duration::from_secs(86_400), |remote| {
                let over = remote.output.text.ended() && remote.error.text.ended();
                let (out, err) = (remote.output.text.take(), remote.error.text.take());
                let status = remote.status.filter(|_| over);
                (!out.is_empty() || !err.is_empty() || status.is_some()).then_some((out, err, status))
            })?;
            output.write_all(&out)?;
            error.write_all(&err)?;
            output.flush()?;
            error.flush()?;
            if let Some(status) = status {
                return Ok(status);
            }
        }
    }
}

/// A connection to a Unix stream socket in a host or guest. Clones share it; it is closed with the last one.
#[derive(Clone)]
pub struct Socket {
    channel: Arc<Channel>,
}

impl Socket {
    /// Says that nothing more will be written.
    ///
    /// # Errors
    /// Where the agent is gone.
    pub fn close_input(&self) -> Result<()> {
        self.channel.client.shared.send(&Message::End(self.channel.number, Stream::Input))
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        // A reader may wait for long, as for an event that is still to happen: it is the story that has a deadline.
        let bytes = self.channel.wait("bytes from a socket", Duration::from_secs(86_400), |remote| {
            let bytes = remote.output.text.take_some(buffer.len());
            (!bytes.is_empty() || remote.output.text.ended()).then_some(bytes)
        });
        let bytes = bytes.map_err(io::Error::other)?;
        buffer[..bytes.len()].copy_from_slice(&bytes);
        if !bytes.is_empty() {
            let granted = u32::try_from(bytes.len()).unwrap_or(0);
            let credit = Message::Credit(self.channel.number, Stream::Output, granted);
            self.channel.client.shared.send(&credit).map_err(io::Error::other)?;
        }
        Ok(bytes.len())
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.channel.write(bytes).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
