//! A client's connection as hyper sees it: bytes, and the descriptors that come with them (SCM_RIGHTS, unix(7)).

use std::future::Future;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::rt::{Read, ReadBufCursor, Write};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use tokio::io::{AsyncWrite, Interest};
use tokio::net::UnixStream;
use tokio::time::{Sleep, sleep};

/// The most descriptors that may wait on a connection to be claimed.
pub const MAX_DESCRIPTORS: usize = 64;
/// The most descriptors in one message (SCM_MAX_FD).
const MAX_IN_MESSAGE: usize = 253;
/// How long a client may take nothing of what is to be sent.
const PATIENCE: Duration = Duration::from_secs(60);
/// The most that is read at once.
const PIECE: usize = 8 << 10;

/// Descriptors that came over a connection and that no request has claimed yet.
#[derive(Debug, Clone, Default)]
pub struct Received(Arc<Mutex<Pile>>);

#[derive(Debug, Default)]
struct Pile {
    descriptors: Vec<OwnedFd>,
    /// More came than may wait: those were closed.
    too_many: bool,
}

impl Received {
    /// Takes all that came so far.
    ///
    /// # Errors
    /// More came than [`MAX_DESCRIPTORS`].
    pub fn take(&self) -> Result<Vec<OwnedFd>, TooMany> {
        let mut pile = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let descriptors = std::mem::take(&mut pile.descriptors);
        if std::mem::take(&mut pile.too_many) { Err(TooMany) } else { Ok(descriptors) }
    }

    fn add(&self, came: Vec<OwnedFd>, cut: bool) {
        let mut pile = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        pile.too_many |= cut || pile.descriptors.len() + came.len() > MAX_DESCRIPTORS;
        let room = MAX_DESCRIPTORS.saturating_sub(pile.descriptors.len());
        pile.descriptors.extend(came.into_iter().take(room));
    }
}

/// More descriptors came with a request than are taken.
#[derive(Debug, thiserror::Error)]
#[error("more than {MAX_DESCRIPTORS} descriptors came with the request")]
pub struct TooMany;

/// A connection.
#[derive(Debug)]
pub struct ClientStream {
    stream: UnixStream,
    received: Received,
    /// Runs while the client takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
}

impl ClientStream {
    /// A connection, and the descriptors that will come over it.
    pub fn new(stream: UnixStream) -> (Self, Received) {
        let received = Received::default();
        (Self { stream, received: received.clone(), stalled: None }, received)
    }

    /// The socket itself.
    ///
    /// # Errors
    /// It cannot be taken out of the runtime.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        self.stream.into_std().map(OwnedFd::from)
    }

    /// Notes whether the client takes what is sent, and gives up where it has not for too long.
    fn mind<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Read for ClientStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, mut into: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let mut piece = [0; PIECE];
        let room = into.remaining().min(PIECE);
        loop {
            ready!(self.stream.poll_read_ready(cx))?;
            let piece = piece.get_mut(..room).unwrap_or_default();
            match self.stream.try_io(Interest::READABLE, || receive(&self.stream, piece, &self.received)) {
                Ok((length, whole)) => {
                    into.put_slice(piece.get(..length).unwrap_or_default());
                    if whole && (1..room).contains(&length) {
                        // There was no more: the next look would only find that out.
                        let _ =
                            self.stream.try_io(Interest::READABLE, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl Write for ClientStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.mind(cx, written)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, pieces);
        self.mind(cx, written)
    }
}

/// Bytes that came, and whether as many as were there: a message ends with the descriptors that came with it.
fn receive(stream: &UnixStream, into: &mut [u8], received: &Received) -> io::Result<(usize, bool)> {
    let mut control = nix::cmsg_space!([RawFd; MAX_IN_MESSAGE]);
    let mut pieces = [IoSliceMut::new(into)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut pieces, Some(&mut control), flags)?;
    let cut = message.flags.contains(MsgFlags::MSG_CTRUNC);
    let mut came = Vec::new();
    for part in message.cmsgs().into_iter().flatten() {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            came.extend(numbers.into_iter().map(own));
        }
    }
    let whole = !cut && came.is_empty();
    if !whole {
        received.add(came, cut);
    }
    Ok((message.bytes, whole))
}

#[expect(unsafe_code, reason = "the kernel hands descriptors over by number")]
fn own(number: RawFd) -> OwnedFd {
    // SAFETY: the kernel has just made it for this process, and nobody else knows of it.
    unsafe { OwnedFd::from_raw_fd(number) }
}
