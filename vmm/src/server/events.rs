//! Events as server-sent events (HTML, "Server-sent events"): a reader has no buffer of its own, only a number.

use std::fmt::Write;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::body::Bytes;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, Sleep, sleep};

use super::ApiCounters;
use super::connections::Connection;
use crate::board::Board;

/// A reader's place in the events.
pub struct EventStream {
    board: Arc<Board>,
    counters: Arc<ApiCounters>,
    /// The number of the last event that was sent.
    at: u64,
    /// When something is sent again, so that the reader sees that the monitor is there.
    silence: Pin<Box<Sleep>>,
    /// Ends when the reader is gone. That it only sends no more does not count.
    gone: Pin<Box<dyn Future<Output = ()> + Send>>,
    /// What the board wakes at the next event.
    waits: Option<Waker>,
}

/// How long nothing is sent at the most.
const SILENCE: Duration = Duration::from_secs(15);
/// A comment, which readers skip.
const COMMENT: &str = ":\n\n";
/// The most events in one piece.
const AT_ONCE: usize = 32;

impl EventStream {
    /// The events after number `after`, for the client of this connection.
    ///
    /// # Errors
    /// The connection cannot be watched.
    pub fn new(board: Arc<Board>, counters: Arc<ApiCounters>, after: u64, reader: Arc<Connection>) -> io::Result<Self> {
        // Urgent data means nothing here: what is always told besides is that the other end is closed (EPOLLHUP).
        #[expect(unsafe_code, reason = "tokio cannot see that the descriptor stays what it is")]
        // SAFETY: a connection keeps its descriptor, and always names this one.
        let socket = unsafe { AsyncFd::register_with_interest(Reader(reader), Interest::PRIORITY) }?;
        counters.event_readers.add(1);
        let (gone, silence) = (Box::pin(closed(socket)), Box::pin(sleep(Duration::ZERO)));
        Ok(Self { board, counters, at: after, silence, gone, waits: None })
    }

    /// The next piece of the stream.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.gone.as_mut().poll(cx).is_ready() {
            return Poll::Ready(None);
        }
        let mut text = String::new();
        // The first comment comes at once, and with it the head of the reply: the reader misses nothing from here.
        while self.silence.as_mut().poll(cx).is_ready() {
            self.silence.as_mut().reset(Instant::now() + SILENCE);
            text.push_str(COMMENT);
        }
        for _ in 0..AT_ONCE {
            match self.board.poll_event(self.at, cx.waker()) {
                Poll::Ready(Some(event)) => {
                    self.at = event.sequence;
                    let data = serde_json::to_string(&*event).unwrap_or_default();
                    // Writing to a string cannot fail.
                    let _ = write!(text, "id: {}\nevent: {}\ndata: {data}\n\n", self.at, event.event.type_name());
                    self.counters.events_sent.add(1);
                }
                Poll::Ready(None) if text.is_empty() => return Poll::Ready(None),
                Poll::Ready(None) => break,
                Poll::Pending => {
                    self.waits = Some(cx.waker().clone());
                    if text.is_empty() {
                        return Poll::Pending;
                    }
                    break;
                }
            }
        }
        Poll::Ready(Some(text.into()))
    }
}

/// A reader's socket.
struct Reader(Arc<Connection>);

impl AsRawFd for Reader {
    fn as_raw_fd(&self) -> RawFd {
        self.0.socket.as_raw_fd()
    }
}

/// Waits until the other end of a socket is closed both ways.
async fn closed(socket: AsyncFd<Reader>) {
    while let Ok(mut guard) = socket.ready(Interest::PRIORITY).await {
        if guard.ready().is_read_closed() {
            return;
        }
        guard.clear_ready();
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.counters.event_readers.sub(1);
        // No event may come for days, and until then readers who come and go would add up.
        if let Some(waker) = &self.waits {
            self.board.forget(waker);
        }
    }
}
