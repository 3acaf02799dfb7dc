//! The one thread that waits for all endpoints' descriptors.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The token of the event that ends the thread. Sources' tokens start above it.
const STOP: u64 = 0;

/// The token of the event that has the thread look at [`Poller::ticking`] again.
const WAKE: u64 = 1;

/// How often sources that asked for it are told of the time.
const TICK: Duration = Duration::from_millis(250);

/// What the thread tells of a descriptor that is ready.
pub(super) trait Source: Send + Sync {
    /// `role` is the one that the descriptor was watched under.
    fn ready(&self, role: Role, events: EventSet);

    /// Time has passed, after [`Registration::ask_for_ticks`]. False where no more of it is asked for.
    fn tick(&self) -> bool;
}

/// What a descriptor is to its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Input,
    Output,
    /// Tells of readers who come: a listening socket, or a watch on a terminal's name.
    Arrivals,
}

impl Role {
    fn of(bits: u64) -> Self {
        match bits {
            0 => Self::Input,
            1 => Self::Output,
            _ => Self::Arrivals,
        }
    }
}

/// Waits for the descriptors of any number of endpoints in one thread, named `console-io`, which is only there once
/// an endpoint needs it.
#[derive(Debug)]
pub struct ConsoleIo {
    poller: Arc<Poller>,
    stop: EventFd,
    thread: Mutex<Waiter>,
}

/// What a thread does before it waits.
type First = dyn Fn() + Send + Sync;

/// The thread that waits.
enum Waiter {
    /// None may be made yet.
    Held,
    /// None is needed yet.
    Unneeded(Arc<First>),
    /// It is there.
    Running(JoinHandle<()>),
}

impl std::fmt::Debug for Waiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Held => "Held",
            Self::Unneeded(_) => "Unneeded",
            Self::Running(_) => "Running",
        })
    }
}

impl ConsoleIo {
    /// Makes the means to wait. The thread comes with the first endpoint that needs it.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> io::Result<Self> {
        let io = Self::held()?;
        io.start(|| {})?;
        Ok(io)
    }

    /// As [`ConsoleIo::new`], but endpoints can only be made; nothing is read or accepted before [`ConsoleIo::start`].
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn held() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let stop = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), EpollEvent::new(EventSet::IN, WAKE))?;
        let poller = Poller { epoll, sources: Mutex::default(), wake, ticking: AtomicBool::new(false) };
        Ok(Self { poller: Arc::new(poller), stop, thread: Mutex::new(Waiter::Held) })
    }

    /// Serves the endpoints from now on. `first` is done on the thread before it waits for any: to give up rights that
    /// it does not need.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn start(&self, first: impl Fn() + Send + Sync + 'static) -> io::Result<()> {
        let mut thread = lock(&self.thread);
        if matches!(*thread, Waiter::Held) {
            *thread = Waiter::Unneeded(Arc::new(first));
        }
        let needed = !lock(&self.poller.sources).by_id.is_empty();
        if needed { self.run(&mut thread) } else { Ok(()) }
    }

    /// Makes the thread, where it may be made and is not there.
    fn run(&self, thread: &mut Waiter) -> io::Result<()> {
        if let Waiter::Unneeded(first) = thread {
            let (poller, first) = (Arc::clone(&self.poller), Arc::clone(first));
            let work = move || {
                first();
                poller.run();
            };
            *thread = Waiter::Running(thread::Builder::new().name("console-io".into()).spawn(work)?);
        }
        Ok(())
    }

    /// Adds a source, whose descriptors may be watched from then on.
    pub(super) fn add(&self, source: Weak<dyn Source>) -> io::Result<Registration> {
        self.run(&mut lock(&self.thread))?;
        let mut sources = lock(&self.poller.sources);
        let id = sources.next.max(1);
        sources.next = id + 1;
        sources.by_id.insert(id, source);
        drop(sources);
        Ok(Registration { poller: Arc::clone(&self.poller), id })
    }
}

impl Drop for ConsoleIo {
    fn drop(&mut self) {
        if let Err(e) = self.stop.write(1) {
            tracing::error!("stopping console-io: {e}");
            return;
        }
        if let Waiter::Running(thread) = std::mem::replace(&mut *lock(&self.thread), Waiter::Held)
            && thread.join().is_err()
        {
            tracing::error!("console-io panicked");
        }
    }
}

#[derive(Default)]
struct Sources {
    by_id: HashMap<u64, Weak<dyn Source>>,
    next: u64,
}

struct Poller {
    epoll: Epoll,
    sources: Mutex<Sources>,
    wake: EventFd,
    /// A source wants to know of the time.
    ticking: AtomicBool,
}

impl std::fmt::Debug for Poller {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poller").finish_non_exhaustive()
    }
}

impl Poller {
    fn run(&self) {
        let mut events = [EpollEvent::default(); 8];
        let mut ticked = Instant::now();
        loop {
            let timeout = if self.ticking.load(Ordering::Acquire) { TICK.as_millis() } else { u128::MAX };
            let count = match self.epoll.wait(i32::try_from(timeout).unwrap_or(-1), &mut events) {
                Ok(count) => count,
                // Its time runs on, however often a signal comes.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
                Err(e) => {
                    tracing::error!("console-io: {e}");
                    return;
                }
            };
            for event in events.iter().take(count) {
                match event.data() {
                    STOP => return,
                    WAKE => {
                        let _ = self.wake.read();
                    }
                    token => self.tell(token, event.event_set()),
                }
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                self.tick();
            }
        }
    }

    fn tell(&self, token: u64, events: EventSet) {
        let source = lock(&self.sources).by_id.get(&(token >> 2)).cloned();
        // A source that has gone since is not told.
        if let Some(source) = source.and_then(|source| source.upgrade()) {
            source.ready(Role::of(token & 3), events);
        }
    }

    fn tick(&self) {
        // Taken first, so that what is asked for meanwhile is not forgotten.
        if !self.ticking.swap(false, Ordering::AcqRel) {
            return;
        }
        let sources: Vec<_> = lock(&self.sources).by_id.values().filter_map(Weak::upgrade).collect();
        for source in sources {
            if source.tick() {
                self.ticking.store(true, Ordering::Release);
            }
        }
    }
}

/// A source's place with the poller, given up on drop.
#[derive(Debug)]
pub(super) struct Registration {
    poller: Arc<Poller>,
    id: u64,
}

impl Registration {
    /// Has the source told of the time, until it wants no more.
    pub(super) fn ask_for_ticks(&self) {
        if !self.poller.ticking.swap(true, Ordering::AcqRel) {
            // The only error is a counter at its limit, and then the event is signalled all the same.
            let _ = self.poller.wake.write(1);
        }
    }

    /// Takes a descriptor, not waited for yet.
    pub(super) fn watch(&self, fd: OwnedFd, role: Role) -> Watched {
        Watched { poller: Some(Arc::clone(&self.poller)), fd, token: self.id << 2 | role as u64, interest: None }
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        lock(&self.poller.sources).by_id.remove(&self.id);
    }
}

/// A descriptor that may be waited for.
#[derive(Debug)]
pub(super) struct Watched {
    /// `None` for what is never waited for.
    poller: Option<Arc<Poller>>,
    fd: OwnedFd,
    token: u64,
    /// `None` where the descriptor is not with the poller at all.
    interest: Option<EventSet>,
}

impl Watched {
    /// A descriptor that is always ready, as that of a regular file.
    pub(super) fn never(fd: OwnedFd) -> Self {
        Self { poller: None, fd, token: STOP, interest: None }
    }

    /// Waits for `interest` from now on. Hang-ups and errors are always told of, unless it is `None`.
    ///
    /// # Errors
    /// [`io::ErrorKind::PermissionDenied`] for what is always ready, as a regular file is.
    pub(super) fn set_interest(&mut self, interest: Option<EventSet>) -> io::Result<()> {
        let (operation, events) = match (self.interest, interest) {
            (old, new) if old == new => return Ok(()),
            (None, Some(new)) => (ControlOperation::Add, new),
            (Some(_), Some(new)) => (ControlOperation::Modify, new),
            (_, None) => (ControlOperation::Delete, EventSet::empty()),
        };
        let Some(poller) = &self.poller else {
            return Err(io::ErrorKind::PermissionDenied.into());
        };
        poller.epoll.ctl(operation, self.fd.as_raw_fd(), EpollEvent::new(events, self.token))?;
        self.interest = interest;
        Ok(())
    }

    /// The descriptor.
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // Closing would not be enough where others hold the same open file, as with a terminal.
        if let Err(e) = self.set_interest(None) {
            tracing::debug!("console-io: {e}");
        }
    }
}

/// The state behind these locks is whole between any two statements, so a panic elsewhere does not spoil it.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
