//! Text that arrives piece by piece: a console, a process's output. Lines are waited for, one after the other.

/// How much of its end a message shows, in lines and in bytes.
const TAIL: (usize, usize) = (20, 4000);

/// What has arrived, and how far it has been read.
#[derive(Debug)]
pub struct Text {
    bytes: Vec<u8>,
    cursor: usize,
    limit: usize,
    lost: usize,
    ended: bool,
}

impl Default for Text {
    fn default() -> Self {
        Self::with_limit(64 << 20)
    }
}

impl Text {
    /// Remembers at most about `limit` bytes: the last ones.
    pub fn with_limit(limit: usize) -> Self {
        Self { bytes: Vec::new(), cursor: 0, limit, lost: 0, ended: false }
    }

    /// Adds what has arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > self.limit {
            // Half at a time, so that not every piece moves all of it.
            let gone = self.bytes.len() - self.limit / 2;
            self.bytes.drain(..gone);
            self.cursor = self.cursor.saturating_sub(gone);
            self.lost += gone;
        }
    }

    /// Nothing more will arrive.
    pub fn end(&mut self) {
        self.ended = true;
    }

    /// Has the end arrived?
    pub fn ended(&self) -> bool {
        self.ended
    }

    /// Is nothing remembered?
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Bytes that were forgotten because there were too many.
    pub fn lost(&self) -> usize {
        self.lost
    }

    /// All that is remembered.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes all that is remembered.
    pub fn take(&mut self) -> Vec<u8> {
        self.cursor = 0;
        std::mem::take(&mut self.bytes)
    }

    /// Takes the first bytes, at most `most`.
    pub fn take_some(&mut self, most: usize) -> Vec<u8> {
        let length = self.bytes.len().min(most);
        self.cursor = self.cursor.saturating_sub(length);
        self.bytes.drain(..length).collect()
    }

    /// Finds the next line that contains `part`, and moves on behind it. An unfinished line counts: what is there of
    /// it is returned, and the next search begins behind `part`.
    pub fn find(&mut self, part: &str) -> Option<String> {
        let unread = &self.bytes[self.cursor..];
        let Some(at) = search(unread, part.as_bytes()) else {
            // What is known to hold no match is not searched again with the next piece.
            let begun = unread.iter().rev().position(|&byte| byte == b'\n').unwrap_or(unread.len());
            self.cursor = self.bytes.len() - begun;
            return None;
        };
        let start = unread[..at].iter().rposition(|&byte| byte == b'\n').map_or(0, |newline| newline + 1);
        let (end, next) = match unread[at + part.len()..].iter().position(|&byte| byte == b'\n') {
            Some(rest) => (at + part.len() + rest, at + part.len() + rest + 1),
            None => (unread.len(), at + part.len()),
        };
        let line = String::from_utf8_lossy(&unread[start..end]).trim_end_matches('\r').to_owned();
        self.cursor += next;
        Some(line)
    }

    /// The last lines, for messages.
    pub fn tail(&self) -> String {
        Self::tail_of(&self.bytes)
    }

    /// The last lines of some bytes, for messages.
    pub fn tail_of(bytes: &[u8]) -> String {
        let bytes = &bytes[bytes.len().saturating_sub(TAIL.1)..];
        let text = String::from_utf8_lossy(bytes).replace('\r', "");
        let lines: Vec<&str> = text.trim_end().lines().collect();
        lines[lines.len().saturating_sub(TAIL.0)..].join("\n")
    }
}

/// Where `part` begins in `bytes`.
fn search(bytes: &[u8], part: &[u8]) -> Option<usize> {
    if part.is_empty() {
        return Some(0);
    }
    bytes.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_found_in_turn_and_across_pieces() {
        let mut text = Text::default();
        text.push(b"one\r\ntwo ap");
        assert_eq!(text.find("apple"), None);
        text.push(b"ples\nthree apples\nlog");
        assert_eq!(text.find("apple").as_deref(), Some("two apples"));
        assert_eq!(text.find("apple").as_deref(), Some("three apples"));
        assert_eq!(text.find("apple"), None);
        text.push(b"in: ");
        assert_eq!(text.find("in:").as_deref(), Some("login: "));
        assert_eq!(text.find("in:"), None);
        assert!(text.bytes().starts_with(b"one"));
    }

    #[test]
    fn only_the_end_is_remembered() {
        let mut text = Text::with_limit(100);
        for number in 0..1000 {
            text.push(format!("line {number}\n").as_bytes());
        }
        assert!(text.bytes().len() <= 100);
        assert_eq!(text.lost() + text.bytes().len(), 8890);
        assert_eq!(text.find("line 999").as_deref(), Some("line 999"));
        assert!(text.tail().ends_with("line 998\nline 999"));
    }
}
