//! Virtio console (virtio 1.2 §5.3): a console and named ports, each on an endpoint of the host.
//!
//! Port 0 is the first console (`hvc0` in Linux); the others are `/dev/vportNpM`, which udev links to as
//! `/dev/virtio-ports/NAME`. One thread serves all queues of a device.

mod control;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::read_from_config;
use super::{
    DeviceInfo, Error, QueueState, Result, Resumed, RunningQueue, StateSink, StateSource, VirtioDevice, saved,
};
use crate::endpoint::EndpointHandle;
use crate::io_thread::{IoThread, Running};
use control::{Control, PortControl};
use worker::{ConsoleWorker, PortData, QueueRole};

/// The configuration has the size (virtio 1.2 §5.3.3).
const F_SIZE: u32 = 0;
/// There are control queues and several ports.
const F_MULTIPORT: u32 = 1;
/// The configuration has a register to write characters to before anything is set up.
const F_EMERG_WRITE: u32 = 2;

/// The most ports that a device may have.
pub const MAX_PORTS: usize = 31;

/// The longest name of a port, in bytes.
pub const MAX_NAME_LEN: usize = 128;

/// Size of each queue in descriptors. Linux keeps a page for each of an input queue's.
const QUEUE_SIZE: u16 = 64;

/// Length in bytes of the configuration.
const CONFIG_LEN: u32 = 12;

/// Offset of `emerg_wr` in the configuration.
const EMERGENCY_OFFSET: u32 = 8;

/// One port of a console device.
#[derive(Debug)]
pub struct Port {
    /// The name that the guest finds it by; may be empty for a console.
    pub name: String,
    /// Whether it is a console rather than a port for programs.
    pub console: bool,
    /// Where it leads on the host.
    pub endpoint: EndpointHandle,
}

/// Why a console device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// There must be a port, and not too many.
    #[error("{id}: {count} ports; a console device has 1 to {MAX_PORTS}")]
    Ports {
        /// The device.
        id: String,
        /// How many were asked for.
        count: usize,
    },
    /// A name cannot be one.
    #[error("{id}: port name {name:?}: {reason}")]
    Name {
        /// The device.
        id: String,
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The operating system refused an event.
    #[error("{id}: events: {source}")]
    Host {
        /// The device.
        id: String,
        /// The operating system's answer.
        source: std::io::Error,
    },
}

/// The size of the host's terminal, for the guest to know. Shared with who watches the terminal.
#[derive(Debug)]
pub struct ConsoleSize {
    /// Columns in the upper half, rows in the lower.
    size: AtomicU32,
    event: EventFd,
}

impl ConsoleSize {
    /// Tells the guest a new size, in characters.
    pub fn set(&self, columns: u16, rows: u16) {
        let size = u32::from(columns) << 16 | u32::from(rows);
        if self.size.swap(size, Ordering::Relaxed) != size {
            // The only error is a counter at its limit, and then the event is signalled all the same.
            let _ = self.event.write(1);
        }
    }

    /// Columns and rows.
    fn get(&self) -> (u16, u16) {
        let [a, b, c, d] = self.size.load(Ordering::Relaxed).to_be_bytes();
        (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }
}

/// A virtio console device.
pub struct Console {
    id: String,
    /// Several ports, or names: the control queues are there.
    multiport: bool,
    port_count: usize,
    size: Option<Arc<ConsoleSize>>,
    /// Where bytes of the emergency write go.
    first_console: EndpointHandle,
    thread: Option<Arc<IoThread>>,
    worker: Option<WorkerPlace>,
}

/// The worker is with its thread while any queue runs.
enum WorkerPlace {
    Here(Box<ConsoleWorker>),
    Running(Running<ConsoleWorker>),
}

impl Console {
    /// A device with these ports. `size` is the columns and rows of the host's terminal, if there is one.
    ///
    /// # Errors
    /// [`ConsoleError`] where there are no ports or too many, or a name is not fit.
    pub fn new(id: &str, ports: Vec<Port>, size: Option<(u16, u16)>) -> std::result::Result<Self, ConsoleError> {
        let port_count = ports.len();
        check_names(id, &ports)?;
        let Some(first) = ports.first().filter(|_| port_count <= MAX_PORTS) else {
            return Err(ConsoleError::Ports { id: id.to_owned(), count: port_count });
        };
        let size = match size {
            Some((columns, rows)) => Some(Arc::new(ConsoleSize {
                size: AtomicU32::new(u32::from(columns) << 16 | u32::from(rows)),
                event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
                    .map_err(|source| ConsoleError::Host { id: id.to_owned(), source })?,
            })),
            None => None,
        };
        let multiport = port_count > 1 || !first.console || !first.name.is_empty();
        let first_console = ports.iter().find(|port| port.console).unwrap_or(first).endpoint.clone();
        Ok(Self {
            id: id.to_owned(),
            multiport,
            port_count,
            first_console,
            thread: None,
            worker: Some(WorkerPlace::Here(Box::new(new_worker(ports, size.clone())))),
            size,
        })
    }

    /// Serves the queues on this thread instead of one that is made when the driver starts them.
    #[must_use]
    pub fn on_thread(mut self, thread: Arc<IoThread>) -> Self {
        self.thread = Some(thread);
        self
    }

    /// Where to tell new sizes of the host's terminal; `None` for a device made without one.
    pub fn size(&self) -> Option<Arc<ConsoleSize>> {
        self.size.clone()
    }

    /// Takes the worker from its thread, to change it.
    fn take_worker(&mut self) -> Result<Box<ConsoleWorker>> {
        match self.worker.take() {
            Some(WorkerPlace::Here(worker)) => Ok(worker),
            Some(WorkerPlace::Running(running)) => running.remove().map_err(thread_error),
            None => Err(thread_error(std::io::Error::other("the worker was lost"))),
        }
    }

    /// Puts the worker back: with its thread where it has queues to serve.
    fn put_worker(&mut self, worker: Box<ConsoleWorker>) -> Result<()> {
        if worker.queues().next().is_none() {
            self.worker = Some(WorkerPlace::Here(worker));
            return Ok(());
        }
        let thread = match &self.thread {
            Some(thread) => thread,
            None => self.thread.insert(IoThread::spawn(&self.id).map_err(thread_error)?),
        };
        let running = thread.add(*worker).map_err(thread_error)?;
        self.worker = Some(WorkerPlace::Running(running));
        Ok(())
    }

    fn stopped_worker(&mut self) -> Result<&mut ConsoleWorker> {
        match &mut self.worker {
            Some(WorkerPlace::Here(worker)) => Ok(worker),
            _ => Err(Error::State(format!("{}: queues are running", self.id))),
        }
    }
}

fn new_worker(ports: Vec<Port>, size: Option<Arc<ConsoleSize>>) -> ConsoleWorker {
    let control = ports
        .iter()
        .map(|port| PortControl {
            name: port.name.clone(),
            console: port.console,
            ready: false,
            guest_open: false,
            host_open: false,
        })
        .collect();
    ConsoleWorker {
        ports: ports
            .into_iter()
            .map(|port| PortData { endpoint: port.endpoint, input: None, output: None, output_done: 0 })
            .collect(),
        control: Control::new(control),
        control_input: None,
        control_output: None,
        control_blocked: false,
        size,
    }
}

fn check_names(id: &str, ports: &[Port]) -> std::result::Result<(), ConsoleError> {
    for (index, port) in ports.iter().enumerate() {
        let earlier = ports.get(..index).unwrap_or_default();
        let reason = if port.name.len() > MAX_NAME_LEN {
            "longer than 128 bytes"
        } else if port.name.contains(['/', '\0']) {
            "holds a slash or a zero byte"
        } else if port.name.is_empty() && !port.console {
            "is empty, and only a console may be without"
        } else if !port.name.is_empty() && earlier.iter().any(|other| other.name == port.name) {
            "is another port's too"
        } else {
            continue;
        };
        return Err(ConsoleError::Name { id: id.to_owned(), name: port.name.clone(), reason });
    }
    Ok(())
}

fn thread_error(source: std::io::Error) -> Error {
    Error::Host { what: "console thread", source }
}

/// What the queue of this index does, on a device of this many ports (virtio 1.2 §5.3.2).
fn queue_role(index: u16, ports: usize) -> Option<QueueRole> {
    let index = usize::from(index);
    let role = match index {
        0 => QueueRole::Input(0),
        1 => QueueRole::Output(0),
        2 => QueueRole::ControlInput,
        3 => QueueRole::ControlOutput,
        _ if index.is_multiple_of(2) => QueueRole::Input(index / 2 - 1),
        _ => QueueRole::Output(index / 2 - 1),
    };
    match role {
        QueueRole::Input(port) | QueueRole::Output(port) if port >= ports => None,
        _ => Some(role),
    }
}

/// The index of the queue that does this.
fn queue_index(role: QueueRole) -> u32 {
    let index = match role {
        QueueRole::Input(0) => 0,
        QueueRole::Output(0) => 1,
        QueueRole::ControlInput => 2,
        QueueRole::ControlOutput => 3,
        QueueRole::Input(port) => 2 * port + 2,
        QueueRole::Output(port) => 2 * port + 3,
    };
    u32::try_from(index).unwrap_or(u32::MAX)
}

impl VirtioDevice for Console {
    fn info(&self) -> DeviceInfo {
        let mut features = 1 << F_EMERG_WRITE;
        let mut queues = 2;
        if self.multiport {
            features |= 1 << F_MULTIPORT;
            queues = 2 * self.port_count + 2;
        }
        if self.size.is_some() {
            features |= 1 << F_SIZE;
        }
        DeviceInfo {
            device_type: u16::try_from(VIRTIO_ID_CONSOLE).unwrap_or_default(),
            features,
            queue_sizes: vec![QUEUE_SIZE; queues],
            config_len: CONFIG_LEN,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let (columns, rows) = self.size.as_ref().map_or((0, 0), |size| size.get());
        let mut config = Vec::new();
        config.extend(columns.to_le_bytes());
        config.extend(rows.to_le_bytes());
        config.extend(u32::try_from(self.port_count).unwrap_or_default().to_le_bytes());
        read_from_config(&config, offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        if offset == EMERGENCY_OFFSET
            && let Some(character) = data.first()
        {
            self.first_console.write_over(&[*character]);
        }
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()> {
        let mut worker = self.take_worker()?;
        let started = match worker.slot(index) {
            Some(slot) => {
                *slot = Some(queue);
                Ok(())
            }
            None => Err(Error::Driver(format!("{}: there is no queue {index}", self.id))),
        };
        self.put_worker(worker).and(started)
    }

    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>> {
        let mut worker = self.take_worker()?;
        let queue = worker.slot(index).and_then(Option::take);
        self.put_worker(worker)?;
        Ok(queue.map(RunningQueue::into_state))
    }

    fn reset(&mut self) {
        match self.stopped_worker() {
            Ok(worker) => {
                worker.control.reset();
                for port in &mut worker.ports {
                    port.output_done = 0;
                }
            }
            Err(e) => tracing::error!("{e}"),
        }
    }

    fn save(&self, into: &mut dyn StateSink) -> Result<()> {
        let Some(WorkerPlace::Here(worker)) = &self.worker else {
            return Err(Error::State(format!("{}: queues are running", self.id)));
        };
        let ports = worker.control.ports.iter().zip(&worker.ports);
        let state = SavedConsole {
            ports: ports
                .map(|(port, data)| SavedPort {
                    name: port.name.clone(),
                    ready: port.ready,
                    guest_open: port.guest_open,
                    host_open: port.host_open,
                    output_done: data.output_done,
                })
                .collect(),
            pending: worker.control.pending(),
        };
        saved::save(into, "console", 1, &state)
    }

    fn restore(&mut self, from: &mut dyn StateSource) -> Result<()> {
        let state: SavedConsole = saved::restore(from, "console", 1)?;
        let id = self.id.clone();
        let worker = self.stopped_worker()?;
        let names = worker.control.ports.iter().map(|port| &port.name);
        if !names.eq(state.ports.iter().map(|port| &port.name)) {
            return Err(Error::State(format!("{id}: the ports are not the same")));
        }
        if state.pending.len() > 4 * MAX_PORTS + 64
            || state.pending.iter().any(|message| message.len() > control::MESSAGE_LEN + MAX_NAME_LEN)
        {
            return Err(Error::State(format!("{id}: too many messages wait")));
        }
        let ports = worker.control.ports.iter_mut().zip(&mut worker.ports);
        for ((port, data), saved) in ports.zip(state.ports) {
            port.ready = saved.ready;
            port.guest_open = saved.guest_open;
            port.host_open = saved.host_open;
            data.output_done = saved.output_done;
        }
        worker.control.set_pending(state.pending);
        Ok(())
    }

    fn resumed(&mut self, _why: Resumed) {
        // Who is connected now is told of when the queues start.
    }
}

/// What a console saves, version 1.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct SavedConsole {
    ports: Vec<SavedPort>,
    /// Messages that the driver has not taken.
    pending: Vec<Vec<u8>>,
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct SavedPort {
    name: String,
    ready: bool,
    guest_open: bool,
    host_open: bool,
    output_done: usize,
}
