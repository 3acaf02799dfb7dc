//! What the harness and its agent say to each other over one byte stream: a serial port, a console or a socket.
//!
//! A message travels in a frame as in RFC 1662 (PPP in HDLC-like framing): a flag byte before and after it, the flag
//! and the escape byte inside of it escaped, and a CRC-32 (IEEE 802.3) at its end. So whatever was on the line before,
//! a torn frame of a peer that died or the echo of a terminal, ends at the next flag and is dropped.
//!
//! Inside of a frame: one byte of kind, four of channel, the kind's own fields, the CRC. Integers are little-endian.
//!
//! A session begins with [`Message::Hello`] from the harness and [`Message::Welcome`] with the same number from the
//! agent. Each stream of bytes in a channel has credit: a side sends no more than the other has granted, and starts
//! with [`WINDOW`], so that neither ever has to hold more than that.

use serde::{Deserialize, Serialize};

/// Bytes that a side may send on a stream before it is granted more.
pub const WINDOW: usize = 256 << 10;
/// Most bytes of a stream in one message.
pub const CHUNK: usize = 16 << 10;
/// Most bytes of a frame, unescaped: a longer one is damaged.
const FRAME_LIMIT: usize = 1 << 20;

const FLAG: u8 = 0x7e;
const ESCAPE: u8 = 0x7d;
const ESCAPED: u8 = 0x20;

/// A stream of bytes in a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// To the process or socket.
    Input,
    /// From the process's standard output, or from the socket.
    Output,
    /// From the process's standard error.
    Error,
}

/// What a channel is opened for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Runs a program.
    Run {
        /// Program and arguments; the program is searched in the agent's `PATH`.
        argv: Vec<String>,
        /// Added to the agent's own environment.
        env: Vec<(String, String)>,
        /// Working directory, or the agent's.
        folder: Option<String>,
    },
    /// Connects to a Unix stream socket.
    Connect {
        /// Path of the socket.
        path: String,
    },
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

impl Status {
    /// Did it exit with 0?
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit code {code}"),
            Self::Killed(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Harness: a new session, with a number of its own; whatever an earlier one started is killed.
    Hello(u64),
    /// Agent: the session is open.
    Welcome(u64),
    /// Agent: just started, and waiting for a session.
    Ready,
    /// Agent: what it received was damaged; nothing that follows in this session can be trusted.
    Damaged,
    /// Harness: opens a channel.
    Open(u32, Request),
    /// Agent: the channel is open; the process's id, or 0 for a socket.
    Opened(u32, u32),
    /// Agent: the channel could not be opened, and why.
    Refused(u32, String),
    /// Either: bytes of a stream.
    Data(u32, Stream, Vec<u8>),
    /// Either: the stream has ended.
    End(u32, Stream),
    /// Either: the receiver of the stream takes so many bytes more.
    Credit(u32, Stream, u32),
    /// Harness: sends the process a signal.
    Signal(u32, i32),
    /// Agent: the process has ended.
    Exited(u32, Status),
    /// Harness: the channel is forgotten; its process group is killed if it still runs.
    Close(u32),
}

impl Message {
    /// The message as a frame, ready to be written.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        let mut begin = |kind: u8, channel: u32| {
            body.push(kind);
            body.extend(channel.to_le_bytes());
        };
        match self {
            Self::Hello(number) => {
                begin(1, 0);
                body.extend(number.to_le_bytes());
            }
            Self::Welcome(number) => {
                begin(2, 0);
                body.extend(number.to_le_bytes());
            }
            Self::Ready => begin(3, 0),
            Self::Damaged => begin(4, 0),
            Self::Open(channel, request) => {
                begin(5, *channel);
                // Strings and lists only: there is nothing in a request that JSON cannot say.
                body.extend(serde_json::to_vec(request).unwrap_or_default());
            }
            Self::Opened(channel, process) => {
                begin(6, *channel);
                body.extend(process.to_le_bytes());
            }
            Self::Refused(channel, reason) => {
                begin(7, *channel);
                body.extend(reason.as_bytes());
            }
            Self::Data(channel, stream, bytes) => {
                begin(8, *channel);
                body.push(*stream as u8);
                body.extend(bytes);
            }
            Self::End(channel, stream) => {
                begin(9, *channel);
                body.push(*stream as u8);
            }
            Self::Credit(channel, stream, bytes) => {
                begin(10, *channel);
                body.push(*stream as u8);
                body.extend(bytes.to_le_bytes());
            }
            Self::Signal(channel, number) => {
                begin(11, *channel);
                body.extend(number.to_le_bytes());
            }
            Self::Exited(channel, status) => {
                begin(12, *channel);
                let (how, number) = match status {
                    Status::Exited(code) => (0, code),
                    Status::Killed(signal) => (1, signal),
                };
                body.push(how);
                body.extend(number.to_le_bytes());
            }
            Self::Close(channel) => begin(13, *channel),
        }
        frame(&body)
    }

    /// Reads a frame's content without its CRC. `None` where it is no message.
    fn decode(body: &[u8]) -> Option<Self> {
        let (&kind, rest) = body.split_first()?;
        let (channel, rest) = rest.split_first_chunk()?;
        let channel = u32::from_le_bytes(*channel);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some(match kind {
            1 => Self::Hello(u64::from_le_bytes(rest.try_into().ok()?)),
            2 => Self::Welcome(u64::from_le_bytes(rest.try_into().ok()?)),
            3 => Self::Ready,
            4 => Self::Damaged,
            5 => Self::Open(channel, serde_json::from_slice(rest).ok()?),
            6 => Self::Opened(channel, u32::from_le_bytes(rest.try_into().ok()?)),
            7 => Self::Refused(channel, text(rest)),
            8 => stream(rest).map(|(stream, bytes)| Self::Data(channel, stream, bytes.to_vec()))?,
            9 => stream(rest).map(|(stream, _)| Self::End(channel, stream))?,
            10 => {
                let (stream, bytes) = stream(rest)?;
                Self::Credit(channel, stream, u32::from_le_bytes(bytes.try_into().ok()?))
            }
            11 => Self::Signal(channel, i32::from_le_bytes(rest.try_into().ok()?)),
            12 => {
                let (&how, number) = rest.split_first()?;
                let number = i32::from_le_bytes(number.try_into().ok()?);
                Self::Exited(channel, if how == 0 { Status::Exited(number) } else { Status::Killed(number) })
            }
            13 => Self::Close(channel),
            _ => return None,
        })
    }
}

/// A leading stream byte, and what follows it.
fn stream(bytes: &[u8]) -> Option<(Stream, &[u8])> {
    let (&number, rest) = bytes.split_first()?;
    let stream = match number {
        0 => Stream::Input,
        1 => Stream::Output,
        2 => Stream::Error,
        _ => return None,
    };
    Some((stream, rest))
}

/// Wraps a message's bytes with their CRC into a frame.
fn frame(body: &[u8]) -> Vec<u8> {
    let mut framed = Vec::with_capacity(body.len() + body.len() / 16 + 16);
    framed.push(FLAG);
    for &byte in body.iter().chain(&crc32(body).to_le_bytes()) {
        if byte == FLAG || byte == ESCAPE {
            framed.push(ESCAPE);
            framed.push(byte ^ ESCAPED);
        } else {
            framed.push(byte);
        }
    }
    framed.push(FLAG);
    framed
}

/// What a [`Decoder`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// A whole message.
    Message(Message),
    /// Bytes that are no message: noise between sessions, loss or change within one.
    Damage,
}

/// Finds messages in a stream of bytes that arrives piece by piece.
#[derive(Debug, Default)]
pub struct Decoder {
    frame: Vec<u8>,
    escaped: bool,
}

impl Decoder {
    /// Takes the next bytes of the stream, and hands each message that they complete to `sink`.
    pub fn push(&mut self, bytes: &[u8], sink: &mut dyn FnMut(Found)) {
        for &byte in bytes {
            match byte {
                FLAG => self.finish(sink),
                _ if self.frame.len() > FRAME_LIMIT => {}
                ESCAPE => self.escaped = true,
                _ => {
                    self.frame.push(if self.escaped { byte ^ ESCAPED } else { byte });
                    self.escaped = false;
                }
            }
        }
    }

    fn finish(&mut self, sink: &mut dyn FnMut(Found)) {
        self.escaped = false;
        if self.frame.is_empty() {
            return; // the flag before a frame, right after the one behind the last
        }
        let message = match self.frame.split_last_chunk() {
            Some((body, crc)) if crc32(body) == u32::from_le_bytes(*crc) => Message::decode(body),
            _ => None,
        };
        self.frame.clear();
        sink(message.map_or(Found::Damage, Found::Message));
    }
}

/// CRC-32 of IEEE 802.3, reflected.
fn crc32(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = crc32_table();
    !bytes.iter().fold(!0u32, |crc, &byte| TABLE[((crc ^ u32::from(byte)) & 0xff) as usize] ^ (crc >> 8))
}

const fn crc32_table() -> [u32; 256] {
    let mut table = [0u32; 256];
    let mut index = 0u32;
    while index < 256 {
        let mut crc = index;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { 0xedb8_8320 ^ (crc >> 1) } else { crc >> 1 };
            bit += 1;
        }
        table[index as usize] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(bytes: &[u8], piece: usize) -> Vec<Found> {
        let mut decoder = Decoder::default();
        let mut found = Vec::new();
        for piece in bytes.chunks(piece) {
            decoder.push(piece, &mut |each| found.push(each));
        }
        found
    }

    fn samples() -> Vec<Message> {
        let request = Request::Run {
            argv: vec!["sh".into(), "-c".into(), "echo ~}\u{1f600}".into()],
            env: vec![("A".into(), "b=c".into())],
            folder: Some("/".into()),
        };
        vec![
            Message::Hello(0x7e7d_7e7d_0000_ffff),
            Message::Welcome(1),
            Message::Ready,
            Message::Damaged,
            Message::Open(0x7d7e, request),
            Message::Open(8, Request::Connect { path: "/run/x".into() }),
            Message::Opened(1, 77),
            Message::Refused(2, "no such file".into()),
            Message::Data(3, Stream::Error, (0..=255).collect()),
            Message::Data(3, Stream::Input, Vec::new()),
            Message::End(4, Stream::Output),
            Message::Credit(5, Stream::Input, 70_000),
            Message::Signal(6, 9),
            Message::Exited(7, Status::Killed(9)),
            Message::Exited(7, Status::Exited(-1)),
            Message::Close(9),
        ]
    }

    #[test]
    fn crc_is_the_standard_one() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn every_message_survives_in_pieces_of_any_size() {
        let bytes: Vec<u8> = samples().iter().flat_map(Message::encode).collect();
        let expected: Vec<Found> = samples().into_iter().map(Found::Message).collect();
        for piece in [1, 2, 3, 7, 4096] {
            assert_eq!(all(&bytes, piece), expected, "in pieces of {piece}");
        }
    }

    #[test]
    fn a_torn_frame_and_noise_do_not_hide_the_next_message() {
        for message in samples() {
            let whole = message.encode();
            for length in 0..whole.len() - 1 {
                let mut bytes = b"login: \r\n".to_vec();
                bytes.extend(&whole[..length]);
                bytes.extend(Message::Hello(5).encode());
                assert_eq!(
                    all(&bytes, 5).last(),
                    Some(&Found::Message(Message::Hello(5))),
                    "{message:?}, {length} bytes"
                );
            }
        }
    }

    #[test]
    fn a_changed_or_lost_byte_is_damage() {
        let whole = Message::Data(3, Stream::Output, vec![1, 2, 3, 4]).encode();
        for index in 1..whole.len() - 1 {
            let mut changed = whole.clone();
            changed[index] ^= 1;
            assert!(all(&changed, 100).contains(&Found::Damage), "byte {index} changed");
            let mut lost = whole.clone();
            lost.remove(index);
            assert_eq!(all(&lost, 100), [Found::Damage], "byte {index} lost");
        }
    }

    #[test]
    fn a_frame_without_end_takes_no_memory_without_end() {
        let mut decoder = Decoder::default();
        for _ in 0..100 {
            decoder.push(&[7; 100_000], &mut |found| panic!("{found:?}"));
        }
        assert!(decoder.frame.capacity() <= 4 * FRAME_LIMIT);
    }
}
