//! The host side of the serial port and the consoles. Endpoints live across resets of the guest: a socket's client
//! stays connected, a pseudo-terminal keeps its name.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use api::{DeviceConfig, EventKind, Problem, Problems, VmConfig};
use devices::bus::BusDevice;
use devices::endpoint::terminal::RawTerminal;
use devices::endpoint::{
    ConnectionObserver, ConsoleIo, Endpoint, EndpointError, EndpointHandle, EndpointKind, EndpointOptions,
    InputListener, Subscription,
};
use devices::legacy::{Serial, SerialPeer};
use devices::seam::Interrupt;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::Failure;
use crate::board::Board;
use crate::sandbox::{self, Thread};
use crate::trace::Trace;

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
    terminal: Option<RawTerminal>,
    io: ConsoleIo,
}

impl Endpoints {
    /// Makes the endpoints that `config` names, which nobody serves before [`Endpoints::serve`]. A terminal on standard
    /// input is put into raw mode if one of them uses it.
    ///
    /// # Errors
    /// [`Failure::BadInput`] where a file or socket cannot be had, [`Failure::Host`] where the host has nothing left;
    /// those made before are removed again.
    pub fn open(config: &VmConfig, board: &Arc<Board>) -> Result<Self, Failure> {
        let io = ConsoleIo::held()?;
        let quit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        let wanted = wanted(config);
        let stdio = wanted.iter().any(|wanted| wanted.endpoint == api::Endpoint::Stdio {});
        let mut endpoints = Self { by_id: BTreeMap::new(), quit, terminal: None, io };
        for wanted in wanted {
            endpoints.make(wanted, board)?;
        }
        if stdio {
            endpoints.terminal = RawTerminal::enter(&std::io::stdin())?;
        }
        Ok(endpoints)
    }

    fn make(&mut self, wanted: Wanted, board: &Arc<Board>) -> Result<(), Failure> {
        let Wanted { field, id, endpoint, protocol } = wanted;
        let mut options = EndpointOptions::new(&id, kind(&endpoint));
        if protocol {
            options.history = 0;
            options.patience = None;
        }
        options.quit = Some(self.quit.try_clone()?);
        options.observer = Some(Arc::new(Observer { id: id.clone(), board: board.clone() }));
        let opened = Endpoint::open(options, &self.io).map_err(|error| failure(field, &error))?;
        tell_path(&id, &opened);
        self.by_id.insert(id, opened);
        Ok(())
    }

    /// Makes the endpoint of a device that is added to a machine, where it has one.
    ///
    /// # Errors
    /// As [`Endpoints::open`]; the field is the device's.
    pub fn add(&mut self, config: &VmConfig, id: &str, board: &Arc<Board>) -> Result<(), Failure> {
        let found = wanted(config).into_iter().find(|wanted| wanted.id == id);
        found.map_or(Ok(()), |wanted| self.make(Wanted { field: "endpoint".into(), ..wanted }, board))
    }

    /// Has a console lead where this configuration says.
    ///
    /// # Errors
    /// As [`Endpoints::add`]; it leads where it led.
    pub fn lead(&mut self, config: &VmConfig, id: &str) -> Result<(), Failure> {
        let wanted = wanted(config).into_iter().find(|wanted| wanted.id == id);
        let (Some(wanted), Some(endpoint)) = (wanted, self.by_id.get_mut(id)) else { return Ok(()) };
        endpoint.lead(kind(&wanted.endpoint), &self.io).map_err(|error| failure("endpoint".into(), &error))?;
        tell_path(id, endpoint);
        Ok(())
    }

    /// Gives up the endpoint of a device that is gone, where it had one.
    pub fn remove(&mut self, id: &str) {
        self.by_id.remove(id);
    }

    /// Serves the host's side of all endpoints from now on, on a thread of its own.
    ///
    /// # Errors
    /// The thread cannot be made.
    pub fn serve(&self) -> std::io::Result<()> {
        self.io.start(|| sandbox::enter(Thread::Console))
    }

    /// A console's endpoint; the serial port's is [`SERIAL`].
    pub fn get(&self, id: &str) -> Option<&Endpoint> {
        self.by_id.get(id)
    }

    /// The device side of a console's endpoint.
    pub fn console(&self, id: &str) -> Option<EndpointHandle> {
        self.by_id.get(id).map(Endpoint::handle)
    }

    /// A serial port on its endpoint.
    ///
    /// # Errors
    /// [`Failure::Host`] where the configuration has no serial port.
    pub fn serial(&self, line: Arc<dyn Interrupt>) -> Result<Arc<SerialPort>, Failure> {
        let endpoint = self.by_id.get(SERIAL).map(Endpoint::handle);
        let endpoint = endpoint.ok_or_else(|| Failure::Host("the serial port has no endpoint".into()))?;
        let registers = Arc::new(Registers(Serial::new(line, Box::new(Peer(endpoint.clone())))));
        let listener: Arc<dyn InputListener> = registers.clone();
        let port = SerialPort { _subscription: endpoint.listen(Arc::downgrade(&listener)), registers };
        // What was typed before there was a port to take it.
        port.registers.0.fill();
        Ok(Arc::new(port))
    }

    /// Has the trace told of the guest's first words on each of them.
    pub fn watch(&self, config: &VmConfig, trace: &Trace) {
        for Wanted { id, protocol, .. } in wanted(config) {
            if let Some(endpoint) = self.by_id.get(&id) {
                endpoint.on_next_output(trace.on_output(&id, protocol));
            }
        }
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

/// Tells where a pseudo-terminal is.
fn tell_path(id: &str, endpoint: &Endpoint) {
    if let Some(path) = endpoint.path() {
        tracing::info!("{id} is at {}", path.display());
    }
}

/// Tells of clients who come and go.
struct Observer {
    id: String,
    board: Arc<Board>,
}

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Observer").field(&self.id).finish()
    }
}

impl ConnectionObserver for Observer {
    fn connected(&self, connected: bool) {
        let id = self.id.clone();
        self.board.publish(if connected { EventKind::ConsoleOpened { id } } else { EventKind::ConsoleClosed { id } });
    }
}

/// The serial port on its endpoint.
#[derive(Debug)]
pub struct SerialPort {
    /// Over before the registers go.
    _subscription: Subscription,
    registers: Arc<Registers>,
}

/// The part of the port that is told of input.
#[derive(Debug)]
struct Registers(Serial);

impl InputListener for Registers {
    fn input_waits(&self) {
        self.0.fill();
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.0.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.registers.0.write(offset, data);
    }
}

struct Peer(EndpointHandle);

impl SerialPeer for Peer {
    fn write(&mut self, bytes: &[u8]) {
        self.0.write_over(bytes);
    }

    fn read(&mut self, into: &mut [u8]) -> usize {
        self.0.read(into).unwrap_or(0)
    }
}

/// An endpoint to be made.
struct Wanted {
    /// Its field in the configuration.
    field: String,
    id: String,
    endpoint: api::Endpoint,
    /// Programs speak a protocol over it: late readers are not shown what they missed, and nothing is ever left out.
    protocol: bool,
}

fn wanted(config: &VmConfig) -> Vec<Wanted> {
    let serial =
        Wanted { field: SERIAL.into(), id: SERIAL.into(), endpoint: config.serial_endpoint(), protocol: false };
    let consoles = config.devices.iter().enumerate().filter_map(|(index, device)| match device {
        DeviceConfig::Console(console) => Some(Wanted {
            field: format!("devices[{index}].endpoint"),
            id: console.id.clone(),
            endpoint: console.endpoint.clone(),
            protocol: console.name.is_some(),
        }),
        _ => None,
    });
    std::iter::once(serial).chain(consoles).collect()
}

fn failure(field: String, error: &EndpointError) -> Failure {
    match error {
        EndpointError::Host { .. } => Failure::Host(error.to_string()),
        _ => Failure::BadInput(Problems(vec![Problem::new(field, error.to_string(), "")])),
    }
}

fn kind(endpoint: &api::Endpoint) -> EndpointKind {
    match endpoint {
        api::Endpoint::Stdio {} => EndpointKind::Stdio,
        api::Endpoint::File { path } => EndpointKind::File { path: path.clone(), append: true },
        api::Endpoint::Socket { path } => EndpointKind::Socket { path: path.clone() },
        api::Endpoint::Pty {} => EndpointKind::Pty,
        api::Endpoint::Api {} => EndpointKind::Handed,
        api::Endpoint::Off {} => EndpointKind::Off,
    }
}
