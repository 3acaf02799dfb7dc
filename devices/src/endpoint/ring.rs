//! Output on its way to the host: what is not sent yet, and what was sent and is kept to be shown again.

use std::collections::VecDeque;

/// The last bytes of an output, of which some at the end may not have been sent.
#[derive(Debug)]
pub(super) struct OutputRing {
    /// Sent bytes, then unsent ones.
    bytes: VecDeque<u8>,
    unsent: usize,
    /// The most bytes kept in all.
    capacity: usize,
    /// The most sent bytes kept, to be shown to a reader who comes later.
    history: usize,
    /// Bytes given up before anyone read them.
    lost: u64,
}

impl OutputRing {
    pub(super) fn new(capacity: usize, history: usize) -> Self {
        Self { bytes: VecDeque::new(), unsent: 0, capacity, history: history.min(capacity), lost: 0 }
    }

    /// Keeps this many sent bytes from now on.
    pub(super) fn keep(&mut self, history: usize) {
        self.history = history.min(self.capacity);
        self.trim();
    }

    /// How many bytes [`OutputRing::push`] takes.
    pub(super) fn room(&self) -> usize {
        self.capacity - self.unsent
    }

    pub(super) fn unsent(&self) -> usize {
        self.unsent
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Takes as much as there is room for, to be sent, and tells how much that is.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let taken = data.get(..self.room()).unwrap_or(data);
        self.append(taken);
        self.unsent += taken.len();
        taken.len()
    }

    /// Takes all, to be sent, giving up the oldest where there is no room.
    pub(super) fn push_over(&mut self, data: &[u8]) {
        let kept = data.len().saturating_sub(self.capacity);
        let data = data.get(kept..).unwrap_or_default();
        let over = data.len().saturating_sub(self.room());
        self.unsent -= over;
        self.lost += (over + kept) as u64;
        self.push(data);
    }

    /// Keeps what has been sent already, or what nobody was there to read.
    pub(super) fn remember(&mut self, data: &[u8]) {
        debug_assert_eq!(self.unsent, 0, "what is sent comes after what is not");
        let from = data.len().saturating_sub(self.history);
        self.append(data.get(from..).unwrap_or_default());
        self.trim();
    }

    /// The next bytes to send, as many as lie together; empty where all has been sent.
    pub(super) fn next(&self) -> &[u8] {
        let (front, back) = self.bytes.as_slices();
        let sent = self.bytes.len() - self.unsent;
        match sent.checked_sub(front.len()) {
            Some(in_back) => back.get(in_back..).unwrap_or_default(),
            None => front.get(sent..).unwrap_or_default(),
        }
    }

    /// Marks `count` bytes as sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.unsent = self.unsent.saturating_sub(count);
        self.trim();
    }

    /// A new reader: all that is kept is to be sent.
    pub(super) fn replay(&mut self) {
        self.unsent = self.bytes.len();
    }

    /// The reader is gone: what it did not read is history.
    pub(super) fn forget_reader(&mut self) {
        self.unsent = 0;
        self.trim();
    }

    /// Appends, giving up sent bytes where the whole would become too long.
    fn append(&mut self, data: &[u8]) {
        let over = (self.bytes.len() + data.len()).saturating_sub(self.capacity);
        self.bytes.drain(..over.min(self.bytes.len()));
        self.bytes.extend(data);
    }

    fn trim(&mut self) {
        let over = (self.bytes.len() - self.unsent).saturating_sub(self.history);
        self.bytes.drain(..over);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unsent(ring: &mut OutputRing) -> Vec<u8> {
        let mut all = Vec::new();
        while !ring.next().is_empty() {
            all.extend_from_slice(ring.next());
            ring.sent(ring.next().len());
        }
        all
    }

    #[test]
    fn takes_no_more_than_there_is_room_for() {
        let mut ring = OutputRing::new(4, 0);
        assert_eq!(ring.push(b"abcdef"), 4);
        assert_eq!(ring.push(b"x"), 0);
        ring.sent(2);
        assert_eq!(ring.push(b"ef"), 2);
        assert_eq!(unsent(&mut ring), b"cdef");
        assert_eq!(ring.lost(), 0);
    }

    #[test]
    fn gives_up_the_oldest_and_counts_them() {
        let mut ring = OutputRing::new(4, 0);
        ring.push_over(b"abc");
        ring.push_over(b"def");
        assert_eq!(ring.lost(), 2);
        ring.push_over(b"0123456789");
        assert_eq!(ring.lost(), 12);
        assert_eq!(unsent(&mut ring), b"6789");
    }

    #[test]
    fn shows_history_to_the_next_reader_and_keeps_it_bounded() {
        let mut ring = OutputRing::new(8, 3);
        ring.remember(b"abcd");
        ring.remember(b"e");
        ring.replay();
        assert_eq!(ring.push(b"fghijk"), 5);
        assert_eq!(unsent(&mut ring), b"cdefghij");
        ring.forget_reader();
        ring.replay();
        assert_eq!(unsent(&mut ring), b"hij");
    }

    #[test]
    fn without_history_nothing_is_kept() {
        let mut ring = OutputRing::new(8, 0);
        ring.remember(b"abcd");
        ring.replay();
        assert_eq!(ring.next(), b"");
    }
}
