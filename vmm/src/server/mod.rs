//! The API's server: HTTP/1.1 on a Unix socket, in one thread named `api` that is there only where it was asked for.
//!
//! What can be read, it reads from the [`Board`] without asking anyone; everything else is a [`Request`] that the owner
//! answers. Everything that a client can make large or slow has a limit here.
//!
//! [`Request`]: crate::request::Request

mod connections;
mod console;
mod events;
mod handlers;
mod memory;
mod metrics;
mod reply;
mod socket;
mod stream;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use api::HostReport;
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::yield_now;
use tokio::time::{sleep, timeout};

pub use socket::{Access, ApiListener, ApiSocket, SocketError};

use crate::board::Board;
use crate::inbox::Inbox;
use crate::sandbox::{self, Thread};
use connections::Connections;

/// How many events are kept for readers who come back or are slow.
pub const KEPT_EVENTS: usize = 2048;
/// How long clients have to take the last replies and events when the monitor ends.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The thread's stack. What is deep is refused before it is read.
const STACK: usize = 512 << 10;

/// A number that is counted up, or up and down.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    fn add(&self, by: u64) {
        self.0.fetch_add(by, Ordering::Relaxed);
    }

    fn sub(&self, by: u64) {
        self.0.fetch_sub(by, Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What the server counts.
#[derive(Debug, Default)]
pub struct ApiCounters {
    /// Connections that are open.
    connections: Count,
    /// Connections that were accepted.
    accepted: Count,
    /// Connections that were refused or given up for others.
    refused: Count,
    /// Requests that are being answered.
    in_flight: Count,
    /// Replies by the first digit of their status.
    replies: [Count; 6],
    /// Time spent answering, in nanoseconds.
    nanoseconds: Count,
    /// Readers of events.
    event_readers: Count,
    /// Events sent to all readers.
    events_sent: Count,
}

/// What every request may need.
struct Context {
    board: Arc<Board>,
    inbox: Inbox,
    counters: Arc<ApiCounters>,
    /// What the host can do, as it was found at the start.
    host: HostReport,
    memory: memory::Reader,
    /// Places of large bodies.
    large_bodies: Semaphore,
}

/// The running server. Dropping it ends it.
pub struct Server {
    stop: watch::Sender<bool>,
    board: Arc<Board>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves clients of a listening socket, in a thread of its own.
    ///
    /// # Errors
    /// The thread or its descriptors cannot be made.
    pub fn start(listener: ApiListener, host: HostReport, board: Arc<Board>, inbox: Inbox) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let (stop, stopped) = watch::channel(false);
        let (large_bodies, memory) = (Semaphore::new(handlers::LARGE_BODIES), memory::Reader::start()?);
        let context = Context { board: board.clone(), inbox, counters: Arc::default(), host, memory, large_bodies };
        let (listener, access, file) = listener.split();
        let listener = {
            let _guard = runtime.enter();
            UnixListener::from_std(listener)?
        };
        let thread = Builder::new().name("api".into()).stack_size(STACK).spawn(move || {
            sandbox::enter(Thread::Api);
            runtime.block_on(serve(listener, access, Arc::new(context), stopped));
            drop(file);
        })?;
        Ok(Self { stop, board, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.board.close();
        // Where the thread has ended already, nobody listens.
        let _ = self.stop.send(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the API's thread panicked");
        }
    }
}

async fn serve(listener: UnixListener, access: Access, context: Arc<Context>, mut stopped: watch::Receiver<bool>) {
    let connections = Connections::new(context, access, stopped.clone());
    loop {
        let accepted = {
            let mut stop = std::pin::pin!(stopped.changed());
            std::future::poll_fn(|cx| {
                if std::future::Future::poll(stop.as_mut(), cx).is_ready() {
                    return std::task::Poll::Ready(None);
                }
                listener.poll_accept(cx).map(Some)
            })
            .await
        };
        match accepted {
            None => break,
            Some(Ok((stream, _))) => {
                connections.admit(stream);
                // Many who come at once must not keep those who are here waiting, nor those who must go from going.
                yield_now().await;
            }
            Some(Err(error)) => {
                // Out of descriptors, most likely: others must give some back first.
                tracing::warn!("API: a client cannot be accepted: {error}");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    drop(listener);
    let _all_gone_or_not = timeout(LAST_WORDS, connections.all_gone()).await;
}
