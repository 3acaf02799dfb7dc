//! The connection under a client: HTTP/1.1 as far as the monitor speaks it, within a time.

use std::io::{self, BufRead, BufReader, IoSlice, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect as connect_to, sendmsg, setsockopt,
    socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::{ClientError, Options, Response, Result};

/// The most bytes of a reply's head that are read.
const MAX_HEAD: u64 = 64 << 10;
/// The most bytes of a reply's body that are read, and of a line of events.
pub(super) const MAX_BODY: u64 = 16 << 20;
/// The most bytes around a chunk.
const MAX_CHUNK_LINE: u64 = 32;

/// A connection on which reading and writing end at a moment.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) socket: UnixStream,
    pub(super) until: Option<Instant>,
}

impl Line {
    /// What is left of the time.
    fn left(&self) -> io::Result<Option<Duration>> {
        let left = self.until.map(|until| until.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
    }
}

impl Read for Line {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_read_timeout(Some(left))?;
        }
        self.socket.read(into)
    }
}

impl Write for Line {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        if let Some(left) = self.left()? {
            self.socket.set_write_timeout(Some(left))?;
        }
        self.socket.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

pub(super) fn connect(path: &Path, timeout: Option<Duration>) -> Result<BufReader<Line>> {
    let connected = open(path, timeout).map_err(|source| {
        // A connect that runs out of time says that it would block.
        let late = source.kind() == io::ErrorKind::WouldBlock;
        let source = if late { io::ErrorKind::TimedOut.into() } else { source };
        ClientError::Connect { path: path.display().to_string(), source }
    });
    connected.map(|socket| BufReader::new(Line { socket, until: None }))
}

/// Connects. A monitor that does not accept connections is waited for as long as `timeout` says.
fn open(path: &Path, timeout: Option<Duration>) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let socket = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(timeout) = timeout {
        let whole = i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX);
        let micros = i64::from(timeout.subsec_micros());
        // Nothing would mean that it waits for ever.
        let micros = if whole == 0 { micros.max(1) } else { micros };
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::new(whole, micros))?;
    }
    connect_to(socket.as_raw_fd(), &address)?;
    let socket = UnixStream::from(socket);
    socket.set_read_timeout(timeout)?;
    Ok(socket)
}

pub(super) fn write_request(line: &mut Line, verb: &str, path: &str, options: &Options) -> io::Result<()> {
    let mut request = format!("{verb} {path} HTTP/1.1\r\nhost: localhost\r\n").into_bytes();
    for (name, value) in options.headers {
        request.extend(format!("{name}: {value}\r\n").bytes());
    }
    if let Some(body) = options.body {
        request.extend(format!("content-type: application/json\r\ncontent-length: {}\r\n", body.len()).bytes());
    }
    request.extend(b"\r\n");
    request.extend(options.body.unwrap_or_default());
    let mut sent = 0;
    if !options.descriptors.is_empty() {
        // They come with the first byte.
        let numbers: Vec<i32> = options.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        sent =
            sendmsg::<()>(line.socket.as_raw_fd(), &[IoSlice::new(&request)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    }
    line.write_all(request.get(sent..).unwrap_or_default())
}

/// Reads the head of a reply, and not a byte more: what follows belongs to somebody else.
pub(super) fn read_byte_by_byte(stream: &mut Line) -> Result<Response> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
        if head.len() as u64 > MAX_HEAD {
            return Err(ClientError::Garbled("its head is too long".into()));
        }
    }
    parse_head(&head)
}

pub(super) fn read_head(stream: &mut BufReader<Line>) -> Result<Response> {
    let mut head = Vec::new();
    let mut limited = stream.take(MAX_HEAD);
    loop {
        let before = head.len();
        if limited.read_until(b'\n', &mut head)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        if matches!(head.get(before..), Some(b"\r\n")) {
            return parse_head(&head);
        }
    }
}

fn parse_head(head: &[u8]) -> Result<Response> {
    let garbled = |error: httparse::Error| ClientError::Garbled(error.to_string());
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Response::new(&mut headers);
    parsed.parse(head).map_err(garbled)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok(Response {
        status: parsed.code.unwrap_or_default(),
        headers: parsed.headers.iter().map(|one| (one.name.to_ascii_lowercase(), text(one.value))).collect(),
        body: Vec::new(),
    })
}

pub(super) fn read_body(stream: &mut BufReader<Line>, head: &Response) -> Result<Vec<u8>> {
    let length = head.header("content-length").and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
    if length > MAX_BODY {
        return Err(ClientError::Garbled(format!("its body of {length} bytes is too long")));
    }
    let mut body = Vec::new();
    stream.take(length).read_to_end(&mut body)?;
    if (body.len() as u64) < length {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    Ok(body)
}

/// A body in chunks (RFC 9112 §7.1), without what holds them together.
#[derive(Debug)]
pub(super) struct Chunks {
    stream: BufReader<Line>,
    /// What is left of this chunk.
    left: usize,
    begun: bool,
}

impl Chunks {
    /// The body that follows on this connection.
    pub(super) fn new(stream: BufReader<Line>) -> Self {
        Self { stream, left: 0, begun: false }
    }
}

impl Read for Chunks {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            let mut line = String::new();
            if std::mem::replace(&mut self.begun, true) {
                // The end of the chunk before.
                (&mut self.stream).take(MAX_CHUNK_LINE).read_line(&mut line)?;
                line.clear();
            }
            (&mut self.stream).take(MAX_CHUNK_LINE).read_line(&mut line)?;
            let digits = line.trim_end().split(';').next().unwrap_or_default();
            self.left = usize::from_str_radix(digits, 16).map_err(|_| io::ErrorKind::UnexpectedEof)?;
            if self.left == 0 {
                return Ok(0);
            }
        }
        let room = into.len().min(self.left);
        let length = self.stream.read(into.get_mut(..room).unwrap_or_default())?;
        self.left -= length;
        if length == 0 && room > 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(length) }
    }
}
