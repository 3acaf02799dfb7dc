//! Events as server-sent events (HTML, "Server-sent events"): a reader has no buffer of its own, only a number.

use std::fmt::Write;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::body::Bytes;
use tokio::time::{Instant, Sleep, sleep};

use super::ApiCounters;
use crate::board::Board;

/// A reader's place in the events.
pub struct EventStream {
    board: Arc<Board>,
    counters: Arc<ApiCounters>,
    /// The number of the last event that was sent.
    at: u64,
    /// When something is sent again, so that a reader who is gone is noticed.
    silence: Pin<Box<Sleep>>,
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
    /// The events after number `after`.
    pub fn new(board: Arc<Board>, counters: Arc<ApiCounters>, after: u64) -> Self {
        counters.event_readers.add(1);
        Self { board, counters, at: after, silence: Box::pin(sleep(Duration::ZERO)), waits: None }
    }

    /// The next piece of the stream.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
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

impl Drop for EventStream {
    fn drop(&mut self) {
        self.counters.event_readers.sub(1);
        // No event may come for days, and until then readers who come and go would add up.
        if let Some(waker) = &self.waits {
            self.board.forget(waker);
        }
    }
}
