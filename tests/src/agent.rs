//! The agent: what runs in a lab host or in a guest, and does there what the harness asks over one byte stream.
//!
//! One thread reads messages and never waits for anything else. Each process has threads of its own that move its
//! output and its input; they wait for credit, so a process that writes much is slowed down instead of remembered.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::protocol::{CHUNK, Decoder, Found, Message, Request, Status, Stream, WINDOW};

/// Serves the harness at the other end of a byte stream until that ends.
///
/// # Errors
/// Where the stream cannot be read or written. Its end is no error.
pub fn serve(mut input: impl Read, output: impl Write + Send + 'static) -> io::Result<()> {
    let line = Arc::new(Line { state: Mutex::new(LineState { output: Box::new(output), session: 0 }) });
    line.send_always(&Message::Ready)?;
    let mut agent = Agent { line, session: 0, channels: HashMap::new() };
    let mut decoder = Decoder::default();
    let mut buffer = vec![0; 64 << 10];
    loop {
        let length = match input.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let mut result = Ok(());
        decoder.push(&buffer[..length], &mut |found| {
            if result.is_ok() {
                result = agent.take(found);
            }
        });
        result?;
    }
    agent.end_session();
    Ok(())
}

/// The way back to the harness, shared by all threads.
struct Line {
    state: Mutex<LineState>,
}

struct LineState {
    output: Box<dyn Write + Send>,
    session: u64,
}

impl Line {
    fn lock(&self) -> MutexGuard<'_, LineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send_always(&self, message: &Message) -> io::Result<()> {
        self.lock().output.write_all(&message.encode())
    }

    /// Sends, unless the session is over.
    fn send(&self, session: u64, message: &Message) -> io::Result<()> {
        let frame = message.encode();
        let mut state = self.lock();
        if state.session != session {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        state.output.write_all(&frame)
    }

    /// From here on nothing of an earlier session is sent.
    fn begin(&self, session: u64) -> io::Result<()> {
        let mut state = self.lock();
        state.session = session;
        state.output.write_all(&Message::Welcome(session).encode())
    }
}

/// What the harness lets a stream send.
#[derive(Default)]
struct Credit {
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Credit {
    fn grant(&self, bytes: usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 += bytes;
        self.changed.notify_all();
    }

    fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.changed.notify_all();
    }

    /// Waits until something may be sent, and says how much; `None` once the channel is closed.
    fn wait(&self) -> Option<usize> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self
            .changed
            .wait_while(state, |(bytes, closed)| *bytes == 0 && !*closed)
            .unwrap_or_else(PoisonError::into_inner);
        (!state.1).then_some(state.0)
    }

    fn spend(&self, bytes: usize) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).0 -= bytes;
    }
}

enum Input {
    Bytes(Vec<u8>),
    End,
}

/// An open channel, as the reading thread knows it.
struct Channel {
    input: Sender<Input>,
    output: Arc<Credit>,
    error: Arc<Credit>,
    /// The process group, and whether its leader has ended.
    process: Option<(Pid, Arc<AtomicBool>)>,
    socket: Option<UnixStream>,
}

impl Drop for Channel {
    fn drop(&mut self) {
        self.output.close();
        self.error.close();
        if let Some((process, ended)) = &self.process
            && !ended.load(Ordering::Acquire)
        {
            let _ = kill(Pid::from_raw(-process.as_raw()), Signal::SIGKILL);
        }
        if let Some(socket) = &self.socket {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

struct Agent {
    line: Arc<Line>,
    session: u64,
    channels: HashMap<u32, Channel>,
}

impl Agent {
    fn take(&mut self, found: Found) -> io::Result<()> {
        match found {
            Found::Damage if self.session == 0 => {}
            Found::Damage => self.line.send(self.session, &Message::Damaged)?,
            Found::Message(Message::Hello(session)) => {
                if session != self.session {
                    self.end_session();
                    self.session = session;
                }
                self.line.begin(session)?;
            }
            Found::Message(_) if self.session == 0 => {}
            Found::Message(message) => self.act(message)?,
        }
        Ok(())
    }

    fn act(&mut self, message: Message) -> io::Result<()> {
        match message {
            Message::Open(channel, request) => {
                let answer = match self.open(channel, request) {
                    Ok(process) => Message::Opened(channel, process),
                    Err(error) => Message::Refused(channel, error.to_string()),
                };
                self.line.send(self.session, &answer)?;
                self.start(channel);
            }
            Message::Data(channel, Stream::Input, bytes) => self.input(channel, Input::Bytes(bytes)),
            Message::End(channel, Stream::Input) => self.input(channel, Input::End),
            Message::Credit(channel, stream, bytes) => {
                if let Some(channel) = self.channels.get(&channel) {
                    let credit = if stream == Stream::Error { &channel.error } else { &channel.output };
                    credit.grant(bytes as usize);
                }
            }
            Message::Signal(channel, number) => {
                let process = self.channels.get(&channel).and_then(|channel| channel.process.as_ref());
                if let (Some((process, ended)), Ok(signal)) = (process, Signal::try_from(number))
                    && !ended.load(Ordering::Acquire)
                {
                    let _ = kill(*process, signal);
                }
            }
            Message::Close(channel) => drop(self.channels.remove(&channel)),
            _ => {}
        }
        Ok(())
    }

    fn input(&self, channel: u32, input: Input) {
        if let Some(channel) = self.channels.get(&channel) {
            // The thread at the other end is gone where the process closed its input: then nobody wants this.
            let _ = channel.input.send(input);
        }
    }

    /// Output may flow once the harness knows that the channel is open.
    fn start(&self, channel: u32) {
        if let Some(channel) = self.channels.get(&channel) {
            channel.output.grant(WINDOW);
            channel.error.grant(WINDOW);
        }
    }

    fn end_session(&mut self) {
        self.channels.clear();
    }

    fn open(&mut self, number: u32, request: Request) -> io::Result<u32> {
        let (input, inputs) = channel();
        let pump = Pump { line: self.line.clone(), session: self.session, channel: number };
        let mut channel = Channel { input, output: Arc::default(), error: Arc::default(), process: None, socket: None };
        let mut id = 0;
        match request {
            Request::Run { argv, env, folder } => {
                let child = spawn(&argv, env, folder)?;
                id = child.id();
                let pid = i32::try_from(id).map_err(io::Error::other)?;
                let ended = Arc::new(AtomicBool::new(false));
                channel.process = Some((Pid::from_raw(pid), ended.clone()));
                pump.run_process(child, inputs, &channel, ended);
            }
            Request::Connect { path } => {
                let socket = UnixStream::connect(path)?;
                pump.run_socket(&socket, inputs, &channel)?;
                channel.socket = Some(socket);
            }
        }
        self.channels.insert(number, channel);
        Ok(id)
    }
}

fn spawn(argv: &[String], env: Vec<(String, String)>, folder: Option<String>) -> io::Result<Child> {
    let (program, arguments) = argv.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut command = Command::new(program);
    command.args(arguments).envs(env).process_group(0);
    if let Some(folder) = folder {
        command.current_dir(folder);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()
}

/// Moves the bytes of one channel, each stream by a thread.
#[derive(Clone)]
struct Pump {
    line: Arc<Line>,
    session: u64,
    channel: u32,
}

impl Pump {
    fn run_process(&self, mut child: Child, inputs: Receiver<Input>, channel: &Channel, ended: Arc<AtomicBool>) {
        if let Some(stdout) = child.stdout.take() {
            let (pump, credit) = (self.clone(), channel.output.clone());
            thread::spawn(move || pump.outward(stdout, Stream::Output, &credit));
        }
        if let Some(stderr) = child.stderr.take() {
            let (pump, credit) = (self.clone(), channel.error.clone());
            thread::spawn(move || pump.outward(stderr, Stream::Error, &credit));
        }
        if let Some(stdin) = child.stdin.take() {
            let pump = self.clone();
            thread::spawn(move || pump.inward(stdin, &inputs));
        }
        let pump = self.clone();
        thread::spawn(move || {
            let status = child.wait();
            ended.store(true, Ordering::Release);
            let status = match status {
                Ok(status) => match status.signal() {
                    Some(signal) => Status::Killed(signal),
                    None => Status::Exited(status.code().unwrap_or(-1)),
                },
                Err(_) => Status::Exited(-1),
            };
            let _ = pump.line.send(pump.session, &Message::Exited(pump.channel, status));
        });
    }

    fn run_socket(&self, socket: &UnixStream, inputs: Receiver<Input>, channel: &Channel) -> io::Result<()> {
        let (reader, writer) = (socket.try_clone()?, socket.try_clone()?);
        let (pump, credit) = (self.clone(), channel.output.clone());
        thread::spawn(move || pump.outward(reader, Stream::Output, &credit));
        let pump = self.clone();
        thread::spawn(move || {
            pump.inward(&writer, &inputs);
            let _ = writer.shutdown(Shutdown::Write);
        });
        Ok(())
    }

    /// From a process or socket to the harness, as credit allows.
    fn outward(&self, mut from: impl Read, stream: Stream, credit: &Credit) {
        let mut buffer = vec![0; CHUNK];
        while let Some(allowed) = credit.wait() {
            let length = match from.read(&mut buffer[..allowed.min(CHUNK)]) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            credit.spend(length);
            let message = Message::Data(self.channel, stream, buffer[..length].to_vec());
            if self.line.send(self.session, &message).is_err() {
                return;
            }
        }
        let _ = self.line.send(self.session, &Message::End(self.channel, stream));
    }

    /// From the harness to a process or socket; what was written is granted anew.
    fn inward(&self, mut to: impl Write, inputs: &Receiver<Input>) {
        let mut open = true;
        while let Ok(Input::Bytes(bytes)) = inputs.recv() {
            open = open && to.write_all(&bytes).is_ok();
            let granted = u32::try_from(bytes.len()).unwrap_or(0);
            if self.line.send(self.session, &Message::Credit(self.channel, Stream::Input, granted)).is_err() {
                return;
            }
        }
    }
}
