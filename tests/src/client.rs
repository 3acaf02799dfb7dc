//! The harness's side of the agent: runs commands, talks to sockets, and gives up with the last words that were heard.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};

use crate::command::{Cmd, Output};
use crate::process::{Channel, Process, Socket};
use crate::protocol::{Decoder, Found, Message, Request, Status, Stream, WINDOW};
use crate::text::Text;

/// How long anything may take where nothing else is said.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Most output that [`Client::run`] collects.
const OUTPUT_LIMIT: usize = 1 << 30;
/// What a running process's output is remembered of, for error messages and late readers.
const MEMORY_LIMIT: usize = 64 << 20;

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

/// A session with an agent. Clones share it, as do its processes and sockets; it ends with the last of them.
#[derive(Clone)]
pub struct Client {
    pub(crate) shared: Arc<Shared>,
    end: Arc<End>,
}

/// Ends the stream under a session, and with it the thread that listens.
struct End(Box<dyn Line>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// What a session's handles and its listening thread share.
pub(crate) struct Shared {
    name: String,
    pub(crate) witness: Witness,
    line: Mutex<Box<dyn Write + Send>>,
    state: Mutex<State>,
    pub(crate) changed: Condvar,
}

#[derive(Default)]
pub(crate) struct State {
    welcome: bool,
    dead: Option<String>,
    next: u32,
    pub(crate) channels: HashMap<u32, Remote>,
}

/// What has been heard of a channel.
#[derive(Default)]
pub(crate) struct Remote {
    pub(crate) opened: Option<Result<u32, String>>,
    pub(crate) credit: usize,
    pub(crate) output: Inbox,
    pub(crate) error: Inbox,
    pub(crate) status: Option<Status>,
}

#[derive(Default)]
pub(crate) struct Inbox {
    pub(crate) text: Text,
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
        let client = Self { shared, end: Arc::new(End(Box::new(line))) };
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

    /// Ends the session, for its clones, processes and sockets too.
    pub(crate) fn close(&self) {
        self.end.0.close();
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
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn send(&self, message: &Message) -> Result<()> {
        let frame = message.encode();
        let result = self.line.lock().unwrap_or_else(PoisonError::into_inner).write_all(&frame);
        if let Err(error) = result {
            self.lock().check(self)?;
            bail!("{}: writing to its agent failed: {error}{}", self.name, (self.witness)());
        }
        Ok(())
    }

    /// Waits until `ready` finds what it looks for. `None` at the deadline.
    pub(crate) fn wait<T>(
        &self,
        deadline: Instant,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<Option<T>> {
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

    pub(crate) fn late(&self, what: &str, patience: Duration, heard: &str) -> String {
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
    pub(crate) fn inbox(&mut self, stream: Stream) -> &mut Inbox {
        if stream == Stream::Error { &mut self.error } else { &mut self.output }
    }

    pub(crate) fn heard(&self) -> String {
        let mut heard = String::new();
        for (name, inbox) in [("error output", &self.error), ("output", &self.output)] {
            if !inbox.text.is_empty() {
                heard += &format!("\n--- its {name} ends ---\n{}", inbox.text.tail());
            }
        }
        heard
    }
}
