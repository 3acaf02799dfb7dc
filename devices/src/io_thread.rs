//! Threads that serve queues: a loop over events, whose workers come and go by value.
//!
//! A worker is owned by its thread while it runs, so it needs no lock. Adding and removing one waits for the
//! thread, so neither may be called from the thread itself, nor with a lock held that a worker takes.

use std::any::Any;
use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, MutEventSubscriber, RemoteEndpoint, SubscriberId, SubscriberOps};

/// Events taken from the kernel per wait.
const EVENTS_PER_WAIT: usize = 32;

/// What an [`IoThread`] runs: it registers its event descriptors in `init` and serves them in `process`.
///
/// A descriptor must be taken out of the loop (`EventOps::remove`) before it is closed: where a duplicate of it
/// is open elsewhere, the kernel would go on reporting it.
pub trait Worker: MutEventSubscriber + Send + Any {}

impl<T: MutEventSubscriber + Send + Any> Worker for T {}

/// A thread that waits for the events of its workers.
pub struct IoThread {
    endpoint: RemoteEndpoint<Box<dyn Worker>>,
    stopping: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for IoThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.thread.as_ref().and_then(|thread| thread.thread().name());
        f.debug_struct("IoThread").field("name", &name).finish_non_exhaustive()
    }
}

impl IoThread {
    /// Starts a thread. Its name is `io-` and `device`, of which the kernel shows 15 bytes in all.
    ///
    /// # Errors
    /// The thread or its events cannot be made.
    pub fn spawn(device: &str) -> io::Result<Arc<Self>> {
        Self::spawn_with(device, || {})
    }

    /// As [`IoThread::spawn`], with something to do on the thread before it serves anybody: to give up rights that its
    /// workers do not need.
    ///
    /// # Errors
    /// The thread or its events cannot be made.
    pub fn spawn_with(device: &str, first: impl FnOnce() + Send + 'static) -> io::Result<Arc<Self>> {
        let mut manager: EventManager<Box<dyn Worker>> =
            EventManager::new_with_capacity(EVENTS_PER_WAIT).map_err(io::Error::other)?;
        let endpoint = manager.remote_endpoint();
        let stopping = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopping);
        let thread = thread::Builder::new().name(thread_name(device)).spawn(move || {
            first();
            while !stop.load(Ordering::Acquire) {
                if let Err(e) = manager.run() {
                    tracing::error!("waiting for events: {e}");
                    return;
                }
            }
        })?;
        Ok(Arc::new(Self { endpoint, stopping, thread: Some(thread) }))
    }

    /// Hands a worker to the thread.
    ///
    /// # Errors
    /// The thread has ended, or it is the calling one.
    pub fn add<W: Worker>(self: &Arc<Self>, worker: W) -> io::Result<Running<W>> {
        self.refuse_own_thread()?;
        let worker: Box<dyn Worker> = Box::new(worker);
        let id = self
            .endpoint
            .call_blocking::<_, _, event_manager::Error>(move |ops| Ok(ops.add_subscriber(worker)))
            .map_err(io::Error::other)?;
        Ok(Running { thread: Arc::clone(self), id: Some(id), worker: PhantomData })
    }

    fn take(&self, id: SubscriberId) -> io::Result<Box<dyn Worker>> {
        self.refuse_own_thread()?;
        self.endpoint
            .call_blocking(move |ops: &mut dyn SubscriberOps<Subscriber = _>| ops.remove_subscriber(id))
            .map_err(io::Error::other)
    }

    fn refuse_own_thread(&self) -> io::Result<()> {
        let own = self.thread.as_ref().map(|thread| thread.thread().id());
        if own == Some(thread::current().id()) {
            return Err(io::Error::other("an I/O thread cannot wait for itself to change its workers"));
        }
        Ok(())
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::Release);
        if let Err(e) = self.endpoint.kick() {
            tracing::error!("stopping an I/O thread: {e}");
            return;
        }
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("an I/O thread panicked");
        }
    }
}

/// A worker that a thread runs. Dropping this stops and drops the worker too.
pub struct Running<W> {
    thread: Arc<IoThread>,
    /// `None` once the worker has been taken back.
    id: Option<SubscriberId>,
    worker: PhantomData<fn() -> W>,
}

impl<W> fmt::Debug for Running<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running").field("thread", &self.thread).field("id", &self.id).finish()
    }
}

impl<W: Worker> Running<W> {
    /// Takes the worker back from its thread, which does not touch it any more.
    ///
    /// # Errors
    /// The thread has ended, or it is the calling one.
    pub fn remove(mut self) -> io::Result<Box<W>> {
        let Some(id) = self.id.take() else {
            return Err(io::Error::other("the worker was removed before"));
        };
        let worker: Box<dyn Any> = self.thread.take(id)?;
        worker.downcast().map_err(|_| io::Error::other("the worker is of another type"))
    }

    /// The thread that runs the worker.
    pub fn thread(&self) -> &Arc<IoThread> {
        &self.thread
    }
}

impl<W> Drop for Running<W> {
    fn drop(&mut self) {
        if let Some(id) = self.id.take()
            && let Err(e) = self.thread.take(id)
        {
            tracing::warn!("removing a worker: {e}");
        }
    }
}

/// A thread name that the kernel takes whole: at most 15 bytes.
fn thread_name(device: &str) -> String {
    let mut name = format!("io-{device}").replace('\0', "");
    while name.len() > 15 {
        name.pop();
    }
    name
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use event_manager::{EventOps, EventSet, Events};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// Tells the name of the thread that it runs on, each time its event comes.
    struct Reporter {
        event: EventFd,
        names: Sender<String>,
        count: u32,
        own: Option<Arc<IoThread>>,
    }

    impl MutEventSubscriber for Reporter {
        fn init(&mut self, ops: &mut EventOps) {
            ops.add(Events::new(&self.event, EventSet::IN)).unwrap();
        }

        fn process(&mut self, _events: Events, _ops: &mut EventOps) {
            self.event.read().unwrap();
            self.count += 1;
            let name = match &self.own {
                Some(thread) => thread.add(reporter().2).unwrap_err().to_string(),
                None => thread::current().name().unwrap().to_owned(),
            };
            self.names.send(name).unwrap();
        }
    }

    fn reporter() -> (EventFd, Receiver<String>, Reporter) {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let (names, told) = channel();
        let worker = Reporter { event: event.try_clone().unwrap(), names, count: 0, own: None };
        (event, told, worker)
    }

    #[test]
    fn a_worker_runs_on_its_thread_and_comes_back_by_value() {
        let thread = IoThread::spawn("a-device-with-a-long-name").unwrap();
        let (event, told, worker) = reporter();
        let running = thread.add(worker).unwrap();
        event.write(1).unwrap();
        assert_eq!(told.recv_timeout(TIMEOUT).unwrap(), "io-a-device-wit");
        let worker = running.remove().unwrap();
        assert_eq!(worker.count, 1);
        event.write(1).unwrap();
        let running = thread.add(*worker).unwrap();
        told.recv_timeout(TIMEOUT).unwrap();
        assert_eq!(running.remove().unwrap().count, 2, "an event that came meanwhile is served");
    }

    #[test]
    fn dropping_the_handle_or_the_thread_drops_the_worker() {
        let thread = IoThread::spawn("x").unwrap();
        let (_event, told, worker) = reporter();
        drop(thread.add(worker).unwrap());
        assert!(told.recv_timeout(TIMEOUT).is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Disconnected));
        let (_event, told, worker) = reporter();
        let running = thread.add(worker).unwrap();
        drop(thread);
        drop(running);
        assert!(told.try_recv().is_err_and(|e| e == std::sync::mpsc::TryRecvError::Disconnected));
    }

    #[test]
    fn a_thread_does_not_wait_for_itself() {
        let thread = IoThread::spawn("x").unwrap();
        let (event, told, mut worker) = reporter();
        worker.own = Some(Arc::clone(&thread));
        let running = thread.add(worker).unwrap();
        event.write(1).unwrap();
        let error = told.recv_timeout(TIMEOUT).unwrap();
        assert!(error.contains("cannot wait for itself"), "{error}");
        drop(running.remove().unwrap());
    }
}
