//! The state of an endpoint: what devices put in and take out, and what the host's side does.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::arrivals::Arrivals;
use super::connection::{Connection, Peer, Waiting};
use super::escape::{Command, Escape, HELP};
use super::poller::{Registration, Role, Source, lock};
use super::ring::OutputRing;
use super::{ConnectionObserver, InputListener, ReserveError};

/// The most input, in bytes, that is read ahead of the device that takes it.
const INPUT_CAPACITY: usize = 16 << 10;

/// The most output, in bytes, that waits for its reader.
pub(super) const OUTPUT_CAPACITY: usize = 64 << 10;

/// Bytes read at a time.
const PIECE: usize = 4096;

/// Told of a guest's next output.
pub(super) struct OnOutput(pub(super) Box<dyn FnOnce() + Send>);

impl fmt::Debug for OnOutput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("OnOutput")
    }
}

/// What an endpoint and its handles share.
#[derive(Debug)]
pub(super) struct Core {
    name: String,
    state: Mutex<State>,
    pub(super) input_event: EventFd,
    pub(super) writable_event: EventFd,
    pub(super) connection_event: EventFd,
    quit: Option<EventFd>,
    /// Told of readers who come and go.
    pub(super) observer: Option<Arc<dyn ConnectionObserver>>,
    /// Told of input, with no lock held.
    pub(super) listener: Mutex<Option<Weak<dyn InputListener>>>,
}

#[derive(Debug)]
struct State {
    ring: OutputRing,
    input: VecDeque<u8>,
    connection: Option<Connection>,
    arrivals: Option<Arrivals>,
    /// A client is on the way, who will be handed in.
    reserved: bool,
    escape: Option<Escape>,
    /// A device had output that was not taken.
    wants_room: bool,
    /// How long a device is held back by a reader who takes nothing; `None` is for ever.
    patience: Option<Duration>,
    /// Since when a device has been held back without the reader taking anything.
    stalled: Option<Instant>,
    /// Patience is at an end: the oldest output is given up, until the reader takes some again.
    impatient: bool,
    /// Called, and forgotten, when the guest next writes something.
    on_output: Option<OnOutput>,
    /// An error of a file was told of.
    complained: bool,
    /// Keeps the descriptors' events coming. `None` for what is never waited for.
    registration: Option<Registration>,
}

/// Where an endpoint leads, opened.
pub(super) enum Lead {
    Nowhere,
    /// A reader that is there from the first.
    There {
        connection: Connection,
        /// `None` for what is never waited for.
        registration: Option<Registration>,
        with_escape: bool,
    },
    /// Readers who come.
    Comes {
        arrivals: Arrivals,
        registration: Registration,
    },
}

/// What to do with output that there is no room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Excess {
    /// Leave it to the device.
    Refuse,
    /// Give up the oldest for it.
    Overwrite,
}

impl Core {
    pub(super) fn new(name: String, patience: Option<Duration>, quit: Option<EventFd>) -> io::Result<Self> {
        Ok(Self {
            name,
            state: Mutex::new(State {
                ring: OutputRing::new(OUTPUT_CAPACITY, 0),
                input: VecDeque::new(),
                connection: None,
                arrivals: None,
                reserved: false,
                escape: None,
                wants_room: false,
                patience,
                stalled: None,
                impatient: false,
                on_output: None,
                complained: false,
                registration: None,
            }),
            input_event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            writable_event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            connection_event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            quit,
            observer: None,
            listener: Mutex::default(),
        })
    }

    /// Leads there from now on, and no longer where it led. What a reader there did not take, it will not get any more.
    pub(super) fn lead(&self, lead: Lead, history: usize) {
        let mut state = lock(&self.state);
        // Before the reader goes, so that no other comes from where it led.
        state.arrivals = None;
        self.disconnect(&mut state);
        state.ring.keep(history);
        (state.reserved, state.complained, state.escape) = (false, false, None);
        match lead {
            Lead::Nowhere => state.registration = None,
            Lead::There { connection, registration, with_escape } => {
                state.registration = registration;
                state.escape = (with_escape && self.quit.is_some()).then(Escape::default);
                self.attach(&mut state, connection);
            }
            Lead::Comes { arrivals, registration } => {
                state.registration = Some(registration);
                state.arrivals = Some(arrivals);
                self.await_next(&mut state);
            }
        }
    }

    /// See [`super::Endpoint::reserve`].
    pub(super) fn reserve(&self, take_over: bool) -> Result<(), ReserveError> {
        let mut state = lock(&self.state);
        if !matches!(state.arrivals, Some(Arrivals::Handed)) {
            return Err(ReserveError::Elsewhere);
        }
        if state.reserved || state.connection.is_some() && !take_over {
            return Err(ReserveError::Taken);
        }
        self.disconnect(&mut state);
        state.reserved = true;
        Ok(())
    }

    /// See [`super::Reservation::attach`].
    pub(super) fn attach_reserved(&self, client: OwnedFd, early: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        // It may lead elsewhere since the place was set aside.
        if !std::mem::take(&mut state.reserved) {
            return Ok(());
        }
        let Some(registration) = &state.registration else { return Ok(()) };
        let connection = Connection::duplex(Peer::Client, client, Waiting::Socket, registration)?;
        if !early.is_empty() {
            self.take_input(&mut state, early);
            signal(&self.input_event);
        }
        self.attach(&mut state, connection);
        drop(state);
        if !early.is_empty() {
            self.tell_listener();
        }
        Ok(())
    }

    /// The client who was on the way does not come.
    pub(super) fn free_reserved(&self) {
        lock(&self.state).reserved = false;
    }

    fn tell_listener(&self) {
        // The lock is held until it has been told: see `Subscription`.
        let current = lock(&self.listener);
        if let Some(listener) = current.as_ref().and_then(Weak::upgrade) {
            listener.input_waits();
        }
    }

    /// See [`super::EndpointHandle::write`].
    pub(super) fn write(&self, data: &[u8], excess: Excess) -> usize {
        let mut state = lock(&self.state);
        if let Some(OnOutput(tell)) = state.on_output.take_if(|_| !data.is_empty()) {
            tell();
        }
        self.emit(&mut state, data, excess)
    }

    /// See [`super::Endpoint::on_next_output`].
    pub(super) fn on_next_output(&self, tell: Option<OnOutput>) {
        lock(&self.state).on_output = tell;
    }

    /// See [`super::EndpointHandle::read`].
    pub(super) fn read(&self, data: &mut [u8]) -> io::Result<usize> {
        let mut state = lock(&self.state);
        let count = io::Read::read(&mut state.input, data)?;
        if state.input.len() <= INPUT_CAPACITY / 2 {
            self.resume_input(&mut state);
        }
        if count == 0 && !data.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(count)
    }

    pub(super) fn input_waits(&self) -> bool {
        !lock(&self.state).input.is_empty()
    }

    pub(super) fn connected(&self) -> bool {
        lock(&self.state).connection.is_some()
    }

    pub(super) fn lost(&self) -> u64 {
        lock(&self.state).ring.lost()
    }

    /// Waits until all output has been read, or no longer than `timeout`. True where nothing is left.
    pub(super) fn drain(&self, timeout: Duration) -> bool {
        let end = Instant::now() + timeout;
        loop {
            let mut state = lock(&self.state);
            self.flush(&mut state, EventSet::empty());
            if state.ring.unsent() == 0 {
                return true;
            }
            let Some(output) = state.connection.as_ref().and_then(|c| c.output.as_ref()) else {
                return true;
            };
            let Ok(fd) = output.watched.fd().try_clone_to_owned() else {
                return false;
            };
            drop(state);
            let left = end.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLOUT)];
            // A signal is no reason to give up what is still to be read.
            if left.is_zero() || !matches!(poll(&mut polled, timeout), Ok(_) | Err(Errno::EINTR)) {
                return false;
            }
        }
    }

    fn emit(&self, state: &mut State, data: &[u8], excess: Excess) -> usize {
        let State { ring, connection, impatient, .. } = state;
        let Some(output) = connection.as_mut().and_then(|c| c.output.as_mut()) else {
            ring.remember(data);
            return data.len();
        };
        let mut sent = 0;
        if ring.unsent() == 0 && output.is_immediate() {
            match output.write(data) {
                Ok(count) => sent = count,
                Err(e) if is_passing(&e) => {}
                Err(e) => {
                    self.output_failed(state, &e);
                    state.ring.remember(data);
                    return data.len();
                }
            }
            ring.remember(data.get(..sent).unwrap_or_default());
        }
        let rest = data.get(sent..).unwrap_or_default();
        match excess {
            Excess::Refuse if !*impatient => sent += ring.push(rest),
            _ => {
                ring.push_over(rest);
                sent = data.len();
            }
        }
        output.wait_for_room(ring.unsent() > 0);
        if sent < data.len() {
            state.wants_room = true;
            self.mind_the_time(state);
        }
        sent
    }

    /// A device is held back: notes since when, where that matters.
    fn mind_the_time(&self, state: &mut State) {
        if let (Some(_), None, Some(registration)) = (state.patience, state.stalled, &state.registration) {
            state.stalled = Some(Instant::now());
            registration.ask_for_ticks();
        }
    }

    /// Sends what waits, as much as can be.
    fn flush(&self, state: &mut State, events: EventSet) {
        let State { ring, connection, .. } = state;
        let Some(output) = connection.as_mut().and_then(|c| c.output.as_mut()) else {
            return;
        };
        let before = ring.unsent();
        let failed = loop {
            if ring.next().is_empty() {
                break None;
            }
            match output.write(ring.next()) {
                Ok(count) => ring.sent(count),
                // A reader who has hung up never makes room.
                Err(e) if is_passing(&e) && !events.contains(EventSet::HANG_UP) => break None,
                Err(e) => break Some(e),
            }
        };
        output.wait_for_room(ring.unsent() > 0);
        if ring.unsent() < before {
            state.impatient = false;
            state.stalled = state.stalled.map(|_| Instant::now());
        }
        if let Some(e) = failed {
            self.output_failed(state, &e);
        }
        self.tell_of_room(state);
    }

    fn tell_of_room(&self, state: &mut State) {
        if state.wants_room && state.ring.room() >= OUTPUT_CAPACITY / 2 {
            state.wants_room = false;
            state.stalled = None;
            signal(&self.writable_event);
        }
    }

    fn output_failed(&self, state: &mut State, error: &io::Error) {
        let State { ring, connection, complained, .. } = state;
        let Some(connection) = connection else {
            return;
        };
        if matches!(connection.peer, Peer::File | Peer::Stdio) && !*complained {
            *complained = true;
            tracing::warn!("{}: output is lost: {error}", self.name);
        }
        ring.forget_reader();
        if connection.peer == Peer::File {
            // A full disk may have room again.
            return;
        }
        connection.output = None;
        let input_ended = connection.input.as_ref().is_none_or(|input| input.ended);
        if input_ended {
            self.disconnect(state);
        }
        self.tell_of_room(state);
    }

    fn attach(&self, state: &mut State, connection: Connection) {
        self.observe(connection.peer, true);
        state.connection = Some(connection);
        state.ring.replay();
        signal(&self.connection_event);
        self.flush(state, EventSet::empty());
        self.resume_input(state);
    }

    fn observe(&self, peer: Peer, connected: bool) {
        if let (Peer::Client | Peer::Pty, Some(observer)) = (peer, &self.observer) {
            observer.connected(connected);
        }
    }

    fn disconnect(&self, state: &mut State) {
        let Some(connection) = state.connection.take() else {
            return;
        };
        self.observe(connection.peer, false);
        state.ring.forget_reader();
        (state.stalled, state.impatient) = (None, false);
        signal(&self.connection_event);
        self.tell_of_room(state);
        self.await_next(state);
    }

    /// Takes a reader who is there already, or waits for the next.
    fn await_next(&self, state: &mut State) {
        if state.connection.is_some() {
            return;
        }
        let State { arrivals, registration, .. } = state;
        let (Some(arrivals), Some(registration)) = (arrivals, registration) else {
            return;
        };
        match arrivals.next(registration) {
            Ok(Some(connection)) => self.attach(state, connection),
            Ok(None) => {}
            Err(e) => tracing::warn!("{}: {e}", self.name),
        }
    }

    fn resume_input(&self, state: &mut State) {
        let Some(input) = state.connection.as_mut().and_then(|c| c.input.as_mut()) else {
            return;
        };
        if !input.paused || input.ended {
            return;
        }
        match input.watched.set_interest(Some(EventSet::IN)) {
            Ok(()) => input.paused = false,
            // What cannot be waited for is always ready.
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied => {
                self.pump(state, EventSet::empty());
            }
            Err(e) => tracing::warn!("{}: input: {e}", self.name),
        }
    }

    /// Reads input, as much as there is room for.
    fn pump(&self, state: &mut State, events: EventSet) {
        let mut piece = [0; PIECE];
        let mut got_any = false;
        while let Some(input) = state.connection.as_mut().and_then(|c| c.input.as_mut()) {
            if input.ended {
                break;
            }
            let room = INPUT_CAPACITY.saturating_sub(state.input.len()).min(PIECE);
            if room == 0 {
                input.paused = true;
                if let Err(e) = input.watched.set_interest(None) {
                    tracing::warn!("{}: input: {e}", self.name);
                }
                break;
            }
            match input.read(piece.get_mut(..room).unwrap_or_default()) {
                Ok(0) => self.input_ended(state),
                Ok(count) => {
                    got_any = true;
                    self.take_input(state, piece.get(..count).unwrap_or_default());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.input_ended(state),
            }
        }
        if got_any {
            signal(&self.input_event);
        }
        let ended = |c: &Connection| c.input.as_ref().is_some_and(|input| input.ended);
        if events.contains(EventSet::HANG_UP) && state.connection.as_ref().is_some_and(ended) {
            self.disconnect(state);
        }
    }

    fn take_input(&self, state: &mut State, data: &[u8]) {
        let Some(mut escape) = state.escape.take() else {
            state.input.extend(data);
            return;
        };
        for byte in data {
            let (to_guest, command) = escape.feed(*byte);
            state.input.extend(to_guest);
            match command {
                None => {}
                Some(Command::Help) => {
                    self.emit(state, HELP.as_bytes(), Excess::Overwrite);
                }
                Some(Command::Quit) => self.quit.iter().for_each(signal),
            }
        }
        state.escape = Some(escape);
    }

    fn input_ended(&self, state: &mut State) {
        let Some(connection) = &mut state.connection else {
            return;
        };
        match connection.peer {
            Peer::Stdio | Peer::File => connection.input = None,
            Peer::Pty => self.disconnect(state),
            Peer::Client if connection.output.is_none() => self.disconnect(state),
            Peer::Client => {
                if let Some(input) = &mut connection.input {
                    input.ended = true;
                    // Only its hanging up is of interest now.
                    if let Err(e) = input.watched.set_interest(Some(EventSet::empty())) {
                        tracing::warn!("{}: input: {e}", self.name);
                    }
                }
            }
        }
    }
}

impl Source for Core {
    fn ready(&self, role: Role, events: EventSet) {
        let mut state = lock(&self.state);
        match role {
            Role::Input => self.pump(&mut state, events),
            Role::Output => self.flush(&mut state, events),
            Role::Arrivals => self.await_next(&mut state),
        }
        let waits = !state.input.is_empty();
        drop(state);
        if waits {
            self.tell_listener();
        }
    }

    fn tick(&self) -> bool {
        let mut state = lock(&self.state);
        let (Some(patience), Some(since)) = (state.patience, state.stalled) else {
            return false;
        };
        if since.elapsed() < patience {
            return true;
        }
        tracing::warn!("{}: its reader has taken nothing for {} s; output is lost", self.name, patience.as_secs());
        state.impatient = true;
        state.stalled = None;
        state.wants_room = false;
        signal(&self.writable_event);
        false
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn signal(event: &EventFd) {
    // The only error is a counter at its limit, and then the event is signalled all the same.
    let _ = event.write(1);
}
