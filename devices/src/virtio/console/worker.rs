//! The worker that serves all queues of a console.

use std::io;
use std::sync::Arc;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::control::{Control, Effect, MESSAGE_LEN};
use super::{ConsoleSize, F_MULTIPORT, queue_role};
use crate::endpoint::EndpointHandle;
use crate::virtio::{Chain, Fault, RunningQueue, Served};

/// Bytes moved at a time.
const PIECE: usize = 4096;

/// Bytes of one port's output that are moved before the other queues have their turn.
const OUTPUT_PER_WAKEUP: usize = 256 << 10;

/// Event data from here on are of ports' endpoints, four for each port; below, queue indices.
const ENDPOINTS: u32 = 1 << 16;
const INPUT: u32 = 0;
const WRITABLE: u32 = 1;
const CONNECTION: u32 = 2;
/// Event data of a new size.
const SIZE: u32 = 1 << 24;

/// What a queue does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QueueRole {
    /// Host to guest, of this port.
    Input(usize),
    /// Guest to host, of this port.
    Output(usize),
    /// Device to driver.
    ControlInput,
    /// Driver to device.
    ControlOutput,
}

/// A port's data path.
#[derive(Debug)]
pub(super) struct PortData {
    pub(super) endpoint: EndpointHandle,
    pub(super) input: Option<RunningQueue>,
    pub(super) output: Option<RunningQueue>,
    /// Bytes of the next output chain that the endpoint has taken already.
    pub(super) output_done: usize,
}

/// Owns the queues while they run, and the ports' state always.
#[derive(Debug)]
pub(super) struct ConsoleWorker {
    pub(super) ports: Vec<PortData>,
    pub(super) control: Control,
    pub(super) control_input: Option<RunningQueue>,
    pub(super) control_output: Option<RunningQueue>,
    /// The driver's messages wait until it has taken ours.
    pub(super) control_blocked: bool,
    pub(super) size: Option<Arc<ConsoleSize>>,
}

impl ConsoleWorker {
    /// Where a queue of this index is held.
    pub(super) fn slot(&mut self, index: u16) -> Option<&mut Option<RunningQueue>> {
        match queue_role(index, self.ports.len())? {
            QueueRole::Input(port) => self.ports.get_mut(port).map(|port| &mut port.input),
            QueueRole::Output(port) => self.ports.get_mut(port).map(|port| &mut port.output),
            QueueRole::ControlInput => Some(&mut self.control_input),
            QueueRole::ControlOutput => Some(&mut self.control_output),
        }
    }

    pub(super) fn queues(&self) -> impl Iterator<Item = &RunningQueue> {
        self.ports
            .iter()
            .flat_map(|port| [&port.input, &port.output])
            .chain([&self.control_input, &self.control_output])
            .flatten()
    }

    fn serve(&mut self, role: QueueRole) {
        match role {
            QueueRole::Input(port) => self.serve_input(port),
            QueueRole::Output(port) => self.serve_output(port),
            QueueRole::ControlInput => self.serve_control_input(),
            QueueRole::ControlOutput => self.serve_control_output(),
        }
    }

    /// Takes the host's input to the guest, if the guest has the port open.
    fn serve_input(&mut self, index: usize) {
        let Some(PortData { endpoint, input: Some(queue), .. }) = self.ports.get_mut(index) else {
            return;
        };
        let multiport = queue.features() & (1 << F_MULTIPORT) != 0;
        let wanted = self.control.ports.get(index).is_some_and(|port| port.console || port.guest_open || !multiport);
        if !wanted {
            // What the guest does not read waits with the host.
            let _ = queue.kick().read();
            return;
        }
        let mut piece = [0; PIECE];
        queue.serve(|queue, chain| {
            let room = usize::try_from(chain.writable_len()).unwrap_or(PIECE);
            if room == 0 {
                return Err(Fault::Request("no room for input"));
            }
            let piece = piece.get_mut(..room.min(PIECE)).unwrap_or_default();
            match endpoint.read(piece) {
                Ok(count) => {
                    let mut writer = chain.writer();
                    writer.write_all(piece.get(..count).unwrap_or_default())?;
                    let written = writer.written();
                    queue.complete(chain, written)?;
                    Ok(Served::More)
                }
                Err(_) => {
                    queue.put_back(chain);
                    Ok(Served::Enough)
                }
            }
        });
        if multiport && !endpoint.connected() {
            self.tell_of_connection(index);
            self.serve_control_input();
        }
    }

    /// Takes the guest's output to the host, as fast as that takes it.
    fn serve_output(&mut self, index: usize) {
        let Some(PortData { endpoint, output: Some(queue), output_done, .. }) = self.ports.get_mut(index) else {
            return;
        };
        let mut budget = OUTPUT_PER_WAKEUP;
        queue.serve(|queue, chain| {
            let all_taken = send(endpoint, &chain, output_done, &mut budget)?;
            if !all_taken {
                queue.put_back(chain);
                if budget == 0 {
                    let _ = queue.kick().write(1);
                }
                return Ok(Served::Enough);
            }
            *output_done = 0;
            queue.complete(chain, 0)?;
            Ok(Served::More)
        });
    }

    /// Takes messages to the driver.
    fn serve_control_input(&mut self) {
        let control = &mut self.control;
        let Some(queue) = &mut self.control_input else {
            return;
        };
        queue.serve(|queue, chain| {
            let Some(message) = control.front() else {
                queue.put_back(chain);
                return Ok(Served::Enough);
            };
            let mut writer = chain.writer();
            writer.write_all(message)?;
            let written = writer.written();
            queue.complete(chain, written)?;
            control.sent();
            Ok(Served::More)
        });
        if self.control_blocked
            && !control.is_full()
            && let Some(queue) = &self.control_output
        {
            self.control_blocked = false;
            let _ = queue.kick().write(1);
        }
    }

    /// Takes the driver's messages, unless it does not take ours.
    fn serve_control_output(&mut self) {
        let Self { control, control_output: Some(queue), control_blocked: blocked, .. } = self else {
            return;
        };
        let mut effects = Vec::new();
        queue.serve(|queue, chain| {
            if control.is_full() {
                *blocked = true;
                queue.put_back(chain);
                return Ok(Served::Enough);
            }
            let message: [u8; MESSAGE_LEN] = chain.reader().read_obj()?;
            effects.push(control.receive(message));
            queue.complete(chain, 0)?;
            Ok(Served::More)
        });
        for effect in effects {
            self.apply(effect);
        }
        self.serve_control_input();
    }

    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::PortReady(index) => {
                self.tell_of_connection(index);
                self.tell_of_size(index);
            }
            Effect::PortOpened(index) => self.serve_input(index),
        }
    }

    fn tell_of_connection(&mut self, index: usize) {
        let console = self.control.ports.get(index).is_some_and(|p| p.console);
        let Some(port) = self.ports.get(index) else {
            return;
        };
        // A console is there whether or not somebody looks. A client that is gone stays until the guest has all that
        // it sent, since a guest that hears of its going reads no further.
        let there = console || port.endpoint.connected() || port.endpoint.input_waits();
        self.control.set_host_open(index, there);
    }

    fn tell_of_size(&mut self, index: usize) {
        if let Some(size) = &self.size {
            let (columns, rows) = size.get();
            self.control.resize(index, columns, rows);
        }
    }

    /// The size has changed.
    fn resized(&mut self) {
        let Some(size) = &self.size else {
            return;
        };
        let _ = size.event.read();
        let multiport = 1 << F_MULTIPORT;
        if let Some(queue) = self.queues().find(|q| q.features() & multiport == 0) {
            queue.events().config_changed();
            return;
        }
        for index in 0..self.ports.len() {
            self.tell_of_size(index);
        }
        self.serve_control_input();
    }

    fn endpoint_event(&mut self, index: usize, kind: u32) {
        let Some(port) = self.ports.get(index) else {
            return;
        };
        match kind {
            INPUT => {
                let _ = port.endpoint.input_event().read();
                self.serve_input(index);
            }
            WRITABLE => {
                let _ = port.endpoint.writable_event().read();
                self.serve_output(index);
            }
            _ => {
                let _ = port.endpoint.connection_event().read();
                self.tell_of_connection(index);
                self.serve_control_input();
            }
        }
    }

    fn register(&self, ops: &mut EventOps) -> Result<(), event_manager::Error> {
        let add =
            |ops: &mut EventOps, event: &EventFd, data: u32| ops.add(Events::with_data(event, data, EventSet::IN));
        for (index, port) in (0_u32..).zip(&self.ports) {
            let base = ENDPOINTS + index * 4;
            add(ops, port.endpoint.input_event(), base + INPUT)?;
            add(ops, port.endpoint.writable_event(), base + WRITABLE)?;
            add(ops, port.endpoint.connection_event(), base + CONNECTION)?;
            for (queue, role) in
                [(&port.input, QueueRole::Input as fn(usize) -> QueueRole), (&port.output, QueueRole::Output)]
            {
                if let Some(queue) = queue {
                    let role = role(usize::try_from(index).unwrap_or(usize::MAX));
                    add(ops, queue.kick(), super::queue_index(role))?;
                }
            }
        }
        if let Some(queue) = &self.control_input {
            let index = super::queue_index(QueueRole::ControlInput);
            add(ops, queue.kick(), index)?;
        }
        if let Some(queue) = &self.control_output {
            let index = super::queue_index(QueueRole::ControlOutput);
            add(ops, queue.kick(), index)?;
        }
        if let Some(size) = &self.size {
            add(ops, &size.event, SIZE)?;
        }
        Ok(())
    }
}

/// Gives a chain's bytes to an endpoint, from `done` on. True where all were taken.
fn send(endpoint: &EndpointHandle, chain: &Chain, done: &mut usize, budget: &mut usize) -> Result<bool, Fault> {
    if chain.writable_len() > 0 {
        return Err(Fault::Request("output in a device-writable buffer"));
    }
    let mut reader = chain.reader();
    reader.skip(*done);
    let mut piece = [0; PIECE];
    while reader.remaining() > 0 {
        let len = reader.remaining().min(PIECE).min(*budget);
        if len == 0 {
            return Ok(false);
        }
        let piece = piece.get_mut(..len).unwrap_or_default();
        let count = io::Read::read(&mut reader, piece).map_err(|_| Fault::Request("output cannot be read"))?;
        let taken = endpoint.write(piece.get(..count).unwrap_or_default());
        *done += taken;
        *budget -= taken;
        if taken < count {
            return Ok(false);
        }
    }
    Ok(true)
}

impl MutEventSubscriber for ConsoleWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = self.register(ops) {
            if let Some(queue) = self.queues().next() {
                queue.events().broken(&format!("console: events: {e}"));
            }
            return;
        }
        // Input, room and readers may have come while nobody listened.
        for index in 0..self.ports.len() {
            self.serve_output(index);
            self.serve_input(index);
            self.tell_of_connection(index);
        }
        self.serve_control_output();
        self.serve_control_input();
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            SIZE => self.resized(),
            data if data >= ENDPOINTS => {
                let index = usize::try_from((data - ENDPOINTS) / 4).unwrap_or(usize::MAX);
                self.endpoint_event(index, data % 4);
            }
            data => {
                let index = u16::try_from(data).unwrap_or(u16::MAX);
                if let Some(role) = queue_role(index, self.ports.len()) {
                    self.serve(role);
                }
            }
        }
    }
}
