//! A client of the API: one blocking connection over the Unix socket.
//!
//! ```no_run
//! use api::{Client, VmConfig};
//!
//! let mut client = Client::connect("vm.sock")?;
//! client.create(&VmConfig::new("/boot/vmlinuz"))?;
//! client.boot()?;
//! println!("{}", client.vm()?.phase);
//! # Ok::<(), api::ClientError>(())
//! ```

mod wire;

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::socket::MsgFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;

use self::wire::{Chunks, Line, MAX_BODY, connect, read_body, read_byte_by_byte, read_head, write_request};
use crate::routes::{CONSOLE_PROTOCOL, Operation, Verb, encoded, route_of};
use crate::{
    DeviceConfig, Event, HostReport, Job, MemoryInfo, MemoryPatch, Pong, ProblemDocument, Quotes, Shutdown, Vcpus,
    VcpusPatch, Version, VmConfig, VmInfo,
};

/// How long a stream of events may be silent. The monitor says something every 15 seconds.
const SILENCE: Duration = Duration::from_secs(30);

/// Why a request was not answered as it wished.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The socket cannot be reached.
    #[error("{path}: {source}")]
    Connect {
        /// The socket's path.
        path: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    /// No answer came in time.
    #[error("no answer came within {} s", .0.as_secs_f32())]
    TimedOut(Duration),
    /// The monitor refused, and says why.
    #[error("{0}")]
    Refused(Box<ProblemDocument>),
    /// What came back is not what the API says.
    #[error("the reply cannot be understood: {0}")]
    Garbled(String),
}

/// The result of a request.
pub type Result<T> = std::result::Result<T, ClientError>;

/// A reply.
#[derive(Debug, Clone)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// Headers, their names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, all of it.
    pub body: Vec<u8>,
}

impl Response {
    /// A header's value.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// A request beyond the plain ones.
#[derive(Debug, Default)]
pub struct Options<'a> {
    /// Headers.
    pub headers: &'a [(&'a str, &'a str)],
    /// A body of JSON.
    pub body: Option<&'a [u8]>,
    /// Descriptors that the body names, the first as number 3.
    pub descriptors: &'a [BorrowedFd<'a>],
}

/// A connection to a monitor.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: BufReader<Line>,
    timeout: Option<Duration>,
    /// A reply was not read to its end: what comes next on this connection belongs to nothing.
    broken: bool,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect(path: impl AsRef<Path>) -> Result<Self> {
        Self::connect_within(path, None)
    }

    /// Connects to the socket at `path`, and gives up where this, or later a request with its reply, takes longer than
    /// `timeout`.
    ///
    /// # Errors
    /// [`ClientError::Connect`].
    pub fn connect_within(path: impl AsRef<Path>, timeout: Option<Duration>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        let stream = connect(&path, timeout)?;
        Ok(Self { path, stream, timeout, broken: false })
    }

    /// Gives up on a request whose reply has not come within `timeout`.
    ///
    /// # Errors
    /// The socket does not take it.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<()> {
        self.stream.get_ref().socket.set_read_timeout(timeout)?;
        self.timeout = timeout;
        Ok(())
    }

    /// Sends a request and reads its reply, whatever its status.
    ///
    /// # Errors
    /// [`ClientError::Broken`], [`ClientError::TimedOut`], [`ClientError::Garbled`], and [`ClientError::Connect`] where the
    /// connection, which had been closed since the last request, cannot be made again.
    pub fn send(&mut self, verb: &str, path: &str, options: &Options) -> Result<Response> {
        if self.broken || self.closed() {
            self.stream = connect(&self.path, self.timeout)?;
        }
        self.broken = true;
        self.stream.get_mut().until = self.timeout.map(|timeout| Instant::now() + timeout);
        let response = self.exchange(verb, path, options).map_err(|error| late(error, self.timeout))?;
        self.broken = false;
        Ok(response)
    }

    fn exchange(&mut self, verb: &str, path: &str, options: &Options) -> Result<Response> {
        let written = write_request(self.stream.get_mut(), verb, path, options);
        // A monitor that refuses a request before it has read all of it says why, and closes.
        let refused_early = matches!(&written, Err(error) if error.kind() == io::ErrorKind::BrokenPipe);
        if !refused_early {
            written?;
        }
        let head = read_head(&mut self.stream)?;
        let body = if verb == "HEAD" { Vec::new() } else { read_body(&mut self.stream, &head)? };
        Ok(Response { body, ..head })
    }

    /// Whether the monitor has closed the connection: it does with one that was silent for long.
    fn closed(&self) -> bool {
        if !self.stream.buffer().is_empty() {
            return true;
        }
        let socket = &self.stream.get_ref().socket;
        let mut byte = [0];
        let peeked = nix::sys::socket::recv(socket.as_raw_fd(), &mut byte, MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT);
        // Nothing may have come: a byte belongs to no request.
        !matches!(peeked, Err(nix::Error::EAGAIN))
    }

    /// Carries an operation out. `id` is what `{id}` in its path stands for.
    ///
    /// # Errors
    /// As [`Client::send`], and [`ClientError::Refused`] where the monitor refuses.
    pub fn call(&mut self, operation: Operation, id: &str, options: &Options) -> Result<Response> {
        let route = route_of(operation).ok_or_else(|| ClientError::Garbled("there is no such operation".into()))?;
        self.checked(route.verb, &route.path.replace("{id}", &encoded(id)), options)
    }

    fn checked(&mut self, verb: Verb, path: &str, options: &Options) -> Result<Response> {
        let response = self.send(verb.as_str(), path, options)?;
        if response.status < 400 { Ok(response) } else { Err(refused(&response)) }
    }

    fn get<T: DeserializeOwned>(&mut self, operation: Operation, id: &str) -> Result<T> {
        read(&self.call(operation, id, &Options::default())?)
    }

    fn put<T: DeserializeOwned>(&mut self, operation: Operation, id: &str, body: &impl Serialize) -> Result<T> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Garbled(error.to_string()))?;
        read(&self.call(operation, id, &Options { body: Some(&body), ..Options::default() })?)
    }

    fn act(&mut self, operation: Operation, id: &str) -> Result<()> {
        self.call(operation, id, &Options::default()).map(drop)
    }
}

/// Each operation by name.
///
/// # Errors
/// As [`Client::call`].
#[expect(missing_docs, clippy::missing_errors_doc, reason = "the table of routes says what each does")]
impl Client {
    pub fn ping(&mut self) -> Result<Pong> {
        self.get(Operation::Ping, "")
    }
    pub fn openapi(&mut self) -> Result<String> {
        text(self.call(Operation::GetOpenapi, "", &Options::default())?)
    }
    pub fn version(&mut self) -> Result<Version> {
        self.get(Operation::GetVersion, "")
    }
    pub fn host(&mut self) -> Result<HostReport> {
        self.get(Operation::GetHost, "")
    }
    pub fn vm(&mut self) -> Result<VmInfo> {
        self.get(Operation::GetVm, "")
    }
    pub fn create(&mut self, config: &VmConfig) -> Result<VmInfo> {
        self.put(Operation::CreateVm, "", config)
    }
    pub fn destroy(&mut self) -> Result<()> {
        self.act(Operation::DestroyVm, "")
    }
    pub fn boot(&mut self) -> Result<()> {
        self.act(Operation::BootVm, "")
    }
    pub fn pause(&mut self) -> Result<()> {
        self.act(Operation::PauseVm, "")
    }
    pub fn resume(&mut self) -> Result<()> {
        self.act(Operation::ResumeVm, "")
    }
    pub fn reset(&mut self) -> Result<()> {
        self.act(Operation::ResetVm, "")
    }
    pub fn nmi(&mut self) -> Result<()> {
        self.act(Operation::SendNmi, "")
    }
    pub fn shutdown(&mut self, how: &Shutdown) -> Result<Job> {
        self.put(Operation::ShutdownVm, "", how)
    }
    pub fn devices(&mut self) -> Result<Vec<DeviceConfig>> {
        self.get(Operation::ListDevices, "")
    }
    pub fn device(&mut self, id: &str) -> Result<DeviceConfig> {
        self.get(Operation::GetDevice, id)
    }
    pub fn vcpus(&mut self) -> Result<Vcpus> {
        self.get(Operation::GetVcpus, "")
    }
    pub fn memory(&mut self) -> Result<MemoryInfo> {
        self.get(Operation::GetMemory, "")
    }
    pub fn quotes(&mut self) -> Result<Quotes> {
        self.get(Operation::GetQuotes, "")
    }
    pub fn jobs(&mut self) -> Result<Vec<Job>> {
        self.get(Operation::ListJobs, "")
    }
    pub fn job(&mut self, id: u64) -> Result<Job> {
        self.get(Operation::GetJob, &id.to_string())
    }
    pub fn cancel_job(&mut self, id: u64) -> Result<()> {
        self.act(Operation::CancelJob, &id.to_string())
    }
    pub fn metrics(&mut self) -> Result<String> {
        text(self.call(Operation::GetMetrics, "", &Options::default())?)
    }
}

impl Client {
    /// Adds a device, or puts it in the place of the one with its id. A job, where the guest must take it first.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn put_device(&mut self, id: &str, device: &DeviceConfig) -> Result<Option<Job>> {
        self.put_device_on(id, device, &[])
    }

    /// As [`Client::put_device`], with the descriptors that the device names, the first as number 3.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn put_device_on(
        &mut self,
        id: &str,
        device: &DeviceConfig,
        descriptors: &[BorrowedFd],
    ) -> Result<Option<Job>> {
        let body = serde_json::to_vec(device).map_err(|error| ClientError::Garbled(error.to_string()))?;
        job_of(&self.call(Operation::PutDevice, id, &Options { body: Some(&body), descriptors, headers: &[] })?)
    }

    /// Changes the number of vCPUs. A job, where the guest must take them, or let go of them, first.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn set_vcpus(&mut self, count: u32) -> Result<Option<Job>> {
        let body =
            serde_json::to_vec(&VcpusPatch { count }).map_err(|error| ClientError::Garbled(error.to_string()))?;
        job_of(&self.call(Operation::PatchVcpus, "", &Options { body: Some(&body), ..Options::default() })?)
    }

    /// Changes fields of a device (a merge patch, RFC 7396). The device as it is then.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn patch_device(&mut self, id: &str, patch: &serde_json::Value) -> Result<DeviceConfig> {
        self.put(Operation::PatchDevice, id, patch)
    }

    /// Removes a device. A job, where the guest must let go of it first; with `force` it is not asked, and loses what it
    /// has not written.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn remove_device(&mut self, id: &str, force: bool) -> Result<Option<Job>> {
        let query = if force { "?force=true" } else { "" };
        let path = path_of(Operation::RemoveDevice).replace("{id}", &encoded(id)) + query;
        job_of(&self.checked(Verb::Delete, &path, &Options::default())?)
    }

    /// Changes the size of memory. A job, where the guest must take it or let go of it first.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn set_memory(&mut self, patch: &MemoryPatch) -> Result<Option<Job>> {
        let body = serde_json::to_vec(patch).map_err(|error| ClientError::Garbled(error.to_string()))?;
        job_of(&self.call(Operation::PatchMemory, "", &Options { body: Some(&body), ..Options::default() })?)
    }

    /// Reads events on a connection of its own: those after number `after`, or those that happen from now on.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn events(&self, after: Option<u64>) -> Result<Events> {
        let mut stream = self.another()?;
        let after = after.map(|number| number.to_string());
        let header = after.as_deref().map(|number| ("last-event-id", number));
        let options = Options { headers: header.as_slice(), ..Options::default() };
        let asked = write_request(stream.get_mut(), Verb::Get.as_str(), path_of(Operation::ReadEvents), &options);
        let head = asked.map_err(ClientError::from).and_then(|()| read_head(&mut stream));
        let head = head.map_err(|error| late(error, self.timeout))?;
        if head.status != 200 {
            let body = read_body(&mut stream, &head)?;
            return Err(refused(&Response { body, ..head }));
        }
        let line = stream.get_mut();
        line.until = None;
        line.socket.set_read_timeout(self.timeout.map(|timeout| timeout.max(SILENCE)))?;
        Ok(Events { stream: BufReader::new(Chunks::new(stream)) })
    }

    /// Connects to a console on a connection of its own, which is the console's from then on.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub fn console(&self, id: &str, take_over: bool) -> Result<UnixStream> {
        let mut stream = self.another()?;
        let path = path_of(Operation::OpenConsole).replace("{id}", &encoded(id))
            + if take_over { "?takeover=true" } else { "" };
        let headers = [("connection", "upgrade"), ("upgrade", CONSOLE_PROTOCOL)];
        let asked = write_request(stream.get_mut(), "GET", &path, &Options { headers: &headers, ..Options::default() });
        let head = asked.map_err(ClientError::from).and_then(|()| read_byte_by_byte(stream.get_mut()));
        let head = head.map_err(|error| late(error, self.timeout))?;
        if head.status != 101 {
            let body = read_body(&mut stream, &head)?;
            return Err(refused(&Response { body, ..head }));
        }
        let Line { socket, .. } = stream.into_inner();
        socket.set_read_timeout(None)?;
        socket.set_write_timeout(None)?;
        Ok(socket)
    }

    /// A connection beside this one.
    fn another(&self) -> Result<BufReader<Line>> {
        let mut stream = connect(&self.path, self.timeout)?;
        stream.get_mut().until = self.timeout.map(|timeout| Instant::now() + timeout);
        Ok(stream)
    }
}

/// Events as they come.
#[derive(Debug)]
pub struct Events {
    stream: BufReader<Chunks>,
}

impl Iterator for Events {
    type Item = Result<Event>;

    /// The next event, which is waited for. `None` where the monitor has ended.
    fn next(&mut self) -> Option<Result<Event>> {
        let mut line = String::new();
        loop {
            line.clear();
            match (&mut self.stream).take(MAX_BODY).read_line(&mut line) {
                Ok(0) => return None,
                Ok(_) if line.len() as u64 == MAX_BODY => {
                    return Some(Err(ClientError::Garbled("an event is too long".into())));
                }
                Ok(_) => {}
                Err(error) => return Some(Err(error.into())),
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(serde_json::from_str(data).map_err(|error| ClientError::Garbled(error.to_string())));
            }
        }
    }
}

fn path_of(operation: Operation) -> &'static str {
    route_of(operation).map_or("", |route| route.path)
}

/// An error that may be the end of the time that there was.
fn late(error: ClientError, timeout: Option<Duration>) -> ClientError {
    match (error, timeout) {
        (ClientError::Broken(error), Some(timeout))
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) =>
        {
            ClientError::TimedOut(timeout)
        }
        (error, _) => error,
    }
}

/// The job that goes on with what was asked, where it is not done yet.
fn job_of(response: &Response) -> Result<Option<Job>> {
    if response.status == 202 { read(response).map(Some) } else { Ok(None) }
}

fn text(response: Response) -> Result<String> {
    String::from_utf8(response.body).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn read<T: DeserializeOwned>(response: &Response) -> Result<T> {
    serde_json::from_slice(&response.body).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn refused(response: &Response) -> ClientError {
    match read::<ProblemDocument>(response) {
        Ok(document) => ClientError::Refused(Box::new(document)),
        Err(_) => {
            let document = ProblemDocument::new(response.status, "", "the reply says no more");
            ClientError::Refused(Box::new(document))
        }
    }
}
