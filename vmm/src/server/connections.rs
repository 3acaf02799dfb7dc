//! The clients that are connected: who is admitted, who must make room, and how a connection is served.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::os::fd::{AsFd, OwnedFd};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as Waiting, Poll};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper::{Request, StatusCode};
use tokio::net::UnixStream;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::sleep;

use super::reply::Reply;
use super::socket::Access;
use super::stream::{ClientStream, Received};
use super::{Context, handlers};

/// The most connections at a time.
const MOST: usize = 128;
/// The most bytes of a request's line and headers together.
const MAX_HEAD: usize = 16 << 10;
/// The most headers of a request.
const MAX_HEADERS: usize = 64;
/// How long a client may be silent between its requests, or in the middle of a head.
const IDLE: Duration = Duration::from_secs(60);

/// What a connection does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Activity {
    /// It waits for the client's next request.
    Idle = 0,
    /// It waits for the rest of a request.
    Reading = 1,
    /// A request is being answered.
    Working = 2,
}

/// What a connection's requests know of it.
#[derive(Debug)]
pub struct Connection {
    /// The process that connected.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Descriptors that came and were not claimed.
    pub received: Received,
    /// Its socket once more, on which it is seen that the client is gone.
    pub socket: OwnedFd,
    activity: AtomicU8,
    /// When it last did something, in milliseconds of the server's time.
    since: AtomicU64,
    started: Instant,
}

impl Connection {
    /// Notes what the connection does now.
    pub fn does(&self, activity: Activity) {
        self.activity.store(activity as u8, Ordering::Relaxed);
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.since.store(now, Ordering::Relaxed);
    }

    /// How long the client may be silent from now on, if that is its turn.
    fn patience(&self) -> Duration {
        if self.activity.load(Ordering::Relaxed) != Activity::Idle as u8 {
            return IDLE;
        }
        let silent = self.started.elapsed().saturating_sub(Duration::from_millis(self.since.load(Ordering::Relaxed)));
        IDLE.saturating_sub(silent)
    }
}

/// All connections.
#[derive(Clone)]
pub struct Connections(Arc<Shared>);

struct Shared {
    context: Arc<Context>,
    access: Access,
    stopped: watch::Receiver<bool>,
    started: Instant,
    open: Mutex<Vec<Open>>,
    gone: Notify,
}

struct Open {
    id: u64,
    connection: Arc<Connection>,
    task: AbortHandle,
}

impl Connections {
    /// None yet.
    pub fn new(context: Arc<Context>, access: Access, stopped: watch::Receiver<bool>) -> Self {
        let started = Instant::now();
        Self(Arc::new(Shared { context, access, stopped, started, open: Mutex::default(), gone: Notify::new() }))
    }

    fn open(&self) -> MutexGuard<'_, Vec<Open>> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a client, if it may be and there is room.
    pub fn admit(&self, stream: UnixStream) {
        let counters = &self.0.context.counters;
        counters.accepted.add(1);
        let (pid, uid) = match stream.peer_cred() {
            Ok(peer) => (peer.pid().unwrap_or(0), peer.uid()),
            Err(error) => {
                tracing::warn!("API: a client without credentials is refused: {error}");
                counters.refused.add(1);
                return;
            }
        };
        if !self.0.access.admits(uid) {
            tracing::warn!(pid, uid, "API: a client of another user is refused");
            counters.refused.add(1);
            refuse(&stream, StatusCode::FORBIDDEN);
            return;
        }
        if self.open().len() >= MOST {
            counters.refused.add(1);
            if !self.make_room() {
                refuse(&stream, StatusCode::SERVICE_UNAVAILABLE);
                return;
            }
        }
        match stream.as_fd().try_clone_to_owned() {
            Ok(socket) => {
                tracing::debug!(pid, uid, "API: a client has connected");
                self.start(stream, socket, pid, uid);
            }
            Err(error) => {
                tracing::warn!("API: a client cannot be served: {error}");
                counters.refused.add(1);
                refuse(&stream, StatusCode::SERVICE_UNAVAILABLE);
            }
        }
    }

    fn start(&self, stream: UnixStream, socket: OwnedFd, pid: i32, uid: u32) {
        let counters = &self.0.context.counters;
        let (stream, received) = ClientStream::new(stream);
        let (activity, since) = (AtomicU8::new(Activity::Idle as u8), AtomicU64::new(0));
        let connection = Arc::new(Connection { pid, uid, received, socket, activity, since, started: self.0.started });
        connection.does(Activity::Idle);
        counters.connections.add(1);
        let id = counters.accepted.get();
        let guard = Guard { connections: self.clone(), id };
        let stopped = self.0.stopped.clone();
        let service = Answers { context: self.0.context.clone(), connection: connection.clone() };
        let mut open = self.open();
        let task = tokio::spawn(async move {
            let _guard = guard;
            converse(stream, service, stopped).await;
        });
        open.push(Open { id, connection, task: task.abort_handle() });
    }

    /// Ends the connection that has been silent for the longest time, or waits in the middle of a request. False where
    /// all are being answered.
    fn make_room(&self) -> bool {
        let mut open = self.open();
        let activity = |one: &Open| one.connection.activity.load(Ordering::Relaxed);
        let silent = open.iter().enumerate().filter(|(_, one)| activity(one) < Activity::Working as u8);
        let oldest = silent.min_by_key(|(_, one)| (activity(one), one.connection.since.load(Ordering::Relaxed)));
        let Some((index, _)) = oldest else { return false };
        let oldest = open.swap_remove(index);
        tracing::debug!(pid = oldest.connection.pid, "API: a silent client makes room for another");
        oldest.task.abort();
        true
    }

    /// Waits until no client is connected.
    pub async fn all_gone(&self) {
        while !self.open().is_empty() {
            self.0.gone.notified().await;
        }
    }
}

/// Takes a connection out of the list when its task is over, however that came.
struct Guard {
    connections: Connections,
    id: u64,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.connections.open().retain(|open| open.id != self.id);
        self.connections.0.context.counters.connections.sub(1);
        self.connections.0.gone.notify_one();
    }
}

/// Tells a client that it is not served. Whether it listens is its own matter.
fn refuse(stream: &UnixStream, status: StatusCode) {
    let text = format!("HTTP/1.1 {status}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
    let _ = stream.try_write(text.as_bytes());
}

/// Answers a client's requests until it goes, or the server ends.
async fn converse(stream: ClientStream, service: Answers, mut stopped: watch::Receiver<bool>) {
    let mut protocol = http1::Builder::new();
    protocol.header_read_timeout(None).max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    // A client that has sent its request may close its side: the request is answered all the same. It is for streams that
    // never end to see that their reader is gone.
    protocol.half_close(true);
    let client = service.connection.clone();
    let mut connection = pin!(protocol.serve_connection(stream, service).with_upgrades());
    // Of a client that asks often it is seen only now and then how long it has been silent: hyper would set a timer for
    // each request.
    let mut silence = pin!(sleep(IDLE));
    let mut stop = pin!(stopped.changed());
    let mut stopping = false;
    let ended = poll_fn(|cx: &mut Waiting<'_>| {
        if !stopping && stop.as_mut().poll(cx).is_ready() {
            stopping = true;
            connection.as_mut().graceful_shutdown();
        }
        while silence.as_mut().poll(cx).is_ready() {
            let patience = client.patience();
            if patience.is_zero() {
                tracing::debug!(pid = client.pid, "API: a client was silent for too long");
                return Poll::Ready(Ok(()));
            }
            silence.as_mut().reset(tokio::time::Instant::now() + patience);
        }
        connection.as_mut().poll(cx)
    })
    .await;
    if let Err(error) = ended {
        tracing::debug!("API: a connection broke: {error}");
    }
}

/// Answers one connection's requests.
struct Answers {
    context: Arc<Context>,
    connection: Arc<Connection>,
}

impl Service<Request<Incoming>> for Answers {
    type Response = Reply;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Reply, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let (context, connection) = (self.context.clone(), self.connection.clone());
        Box::pin(async move { Ok(handlers::answer(&context, &connection, request).await) })
    }
}
