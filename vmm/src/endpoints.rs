//! The host side of the serial port and the consoles. Endpoints live across resets of the guest: a socket's client
//! stays connected, a pseudo-terminal keeps its name.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use api::{DeviceConfig, VmConfig};
use devices::endpoint::terminal::RawTerminal;
use devices::endpoint::{ConsoleIo, Endpoint, EndpointHandle, EndpointKind, EndpointOptions};
use devices::io_thread::{IoThread, Running};
use devices::legacy::Serial;
use devices::seam::Interrupt;
use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::Failure;

/// How long the end of a run waits for readers to take the last output.
const DRAIN: Duration = Duration::from_secs(2);

/// The id under which the serial port's endpoint is kept: no device can have it.
const SERIAL: &str = "serial";

/// The endpoints of a VM.
pub struct Endpoints {
    by_id: BTreeMap<String, Endpoint>,
    /// Signalled when the person at the terminal asks to quit.
    quit: EventFd,
    /// Gives the terminal its mode back when dropped.
    _terminal: Option<RawTerminal>,
    _io: ConsoleIo,
}

impl Endpoints {
    /// Makes the endpoints that `config` names. A terminal on standard input is put into raw mode if one of them uses
    /// it.
    ///
    /// # Errors
    /// [`Failure::Host`] naming the endpoint; those made before are removed again.
    pub fn open(config: &VmConfig) -> Result<Self, Failure> {
        let io = ConsoleIo::new()?;
        let quit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let mut by_id = BTreeMap::new();
        let mut stdio = false;
        for (id, endpoint, history) in wanted(config) {
            let mut options = EndpointOptions::new(&id, kind(&endpoint));
            if !history {
                options.history = 0;
            }
            options.quit = Some(quit.try_clone()?);
            stdio |= options.kind == EndpointKind::Stdio;
            let opened = Endpoint::open(options, &io).map_err(|error| Failure::Host(error.to_string()))?;
            if let Some(path) = opened.path() {
                tracing::info!("{id} is at {}", path.display());
            }
            by_id.insert(id, opened);
        }
        let terminal = if stdio { RawTerminal::enter(&std::io::stdin())? } else { None };
        Ok(Self { by_id, quit, _terminal: terminal, _io: io })
    }

    /// The device side of a console's endpoint.
    pub fn console(&self, id: &str) -> Option<EndpointHandle> {
        self.by_id.get(id).map(Endpoint::handle)
    }

    /// A serial port on its endpoint, with what carries its input.
    ///
    /// # Errors
    /// [`Failure::Host`] where no thread or event can be made.
    pub fn serial(&self, line: Arc<dyn Interrupt>) -> Result<SerialPort, Failure> {
        let handle = self.by_id.get(SERIAL).map(Endpoint::handle);
        let handle = handle.ok_or_else(|| Failure::Host("the serial port has no endpoint".into()))?;
        let output = handle.clone();
        let port = Arc::new(Serial::new(line, Box::new(move |bytes: &[u8]| output.write_over(bytes)))?);
        let worker = SerialInput { port: port.clone(), endpoint: handle, pending: Vec::new() };
        let input = IoThread::spawn(SERIAL)?.add(worker)?;
        Ok(SerialPort { port, _input: input })
    }

    /// Readable when the person at the terminal has asked to quit.
    pub fn quit(&self) -> &EventFd {
        &self.quit
    }

    /// Gives readers a last chance to take what the guest wrote.
    pub fn drain(&self) {
        for endpoint in self.by_id.values() {
            if !endpoint.drain(DRAIN) {
                tracing::warn!("not all output of the guest was read");
            }
        }
    }
}

/// A serial port whose input flows.
pub struct SerialPort {
    /// Its registers.
    pub port: Arc<Serial>,
    _input: Running<SerialInput>,
}

/// Every endpoint by its id, with whether late readers are to be shown what they missed: not on a named port, where
/// programs speak a protocol.
fn wanted(config: &VmConfig) -> Vec<(String, api::Endpoint, bool)> {
    let serial = (SERIAL.to_string(), config.serial_endpoint(), true);
    let consoles = config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Console(console) => {
            Some((console.id.clone(), console.endpoint.clone(), console.name.is_none()))
        }
        _ => None,
    });
    std::iter::once(serial).chain(consoles).collect()
}

fn kind(endpoint: &api::Endpoint) -> EndpointKind {
    match endpoint {
        api::Endpoint::Stdio {} => EndpointKind::Stdio,
        api::Endpoint::File { path } => EndpointKind::File { path: path.clone(), append: true },
        api::Endpoint::Socket { path } => EndpointKind::Socket { path: path.clone() },
        api::Endpoint::Pty {} => EndpointKind::Pty,
        api::Endpoint::Off {} => EndpointKind::Off,
    }
}

/// Carries input from an endpoint to the serial port, as fast as the guest reads it.
struct SerialInput {
    port: Arc<Serial>,
    endpoint: EndpointHandle,
    /// Bytes that the port had no room for.
    pending: Vec<u8>,
}

impl SerialInput {
    fn carry(&mut self) {
        let mut piece = [0; 256];
        loop {
            if self.pending.is_empty() {
                let Ok(count) = self.endpoint.read(&mut piece) else { return };
                self.pending.extend_from_slice(piece.get(..count).unwrap_or_default());
            }
            match self.port.input(&self.pending) {
                Ok(taken) => drop(self.pending.drain(..taken)),
                Err(error) => {
                    tracing::warn!("serial input is lost: {error}");
                    self.pending.clear();
                }
            }
            if !self.pending.is_empty() {
                return;
            }
        }
    }
}

impl MutEventSubscriber for SerialInput {
    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        let _ = match events.data() {
            0 => self.endpoint.input_event().read(),
            _ => self.port.room().read(),
        };
        self.carry();
    }

    fn init(&mut self, ops: &mut EventOps) {
        for (data, event) in [(0, self.endpoint.input_event()), (1, self.port.room())] {
            if let Err(error) = ops.add(Events::with_data(event, data, EventSet::IN)) {
                tracing::error!("serial input: {error}");
            }
        }
        self.carry();
    }
}
