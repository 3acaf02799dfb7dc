//! The control queues' protocol of a console with several ports (virtio 1.2 §5.3.6.2).

use std::collections::VecDeque;

/// Events (virtio 1.2 §5.3.6.2).
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// Length in bytes of a message without what may follow it.
pub(super) const MESSAGE_LEN: usize = 8;

/// Messages that may wait for the driver's buffers before no more of its own are taken.
const MAX_PENDING: usize = 64;

/// What a message is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Head {
    port: u32,
    event: u16,
    value: u16,
}

impl Head {
    fn of(bytes: [u8; MESSAGE_LEN]) -> Self {
        let [a, b, c, d, e, f, g, h] = bytes;
        Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([e, f]),
            value: u16::from_le_bytes([g, h]),
        }
    }
}

/// A port as the protocol knows it.
#[derive(Debug, Clone)]
pub(super) struct PortControl {
    pub(super) name: String,
    pub(super) console: bool,
    /// The driver has set the port up.
    pub(super) ready: bool,
    /// A program in the guest has opened it. (A console is read by the guest's kernel from the first.)
    pub(super) guest_open: bool,
    /// What the driver was last told of the host's side.
    pub(super) host_open: bool,
}

/// The device's side of the protocol.
#[derive(Debug)]
pub(super) struct Control {
    pub(super) ports: Vec<PortControl>,
    /// Messages that wait for the driver's buffers.
    pending: VecDeque<Vec<u8>>,
}

/// What the device is to do after a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// Tell of the host's side of this port: [`Control::set_host_open`], and its size if it is a console.
    PortReady(usize),
    /// Look for input of this port.
    PortOpened(usize),
}

impl Control {
    pub(super) fn new(ports: Vec<PortControl>) -> Self {
        Self { ports, pending: VecDeque::new() }
    }

    /// Forgets what the driver said.
    pub(super) fn reset(&mut self) {
        self.pending.clear();
        for port in &mut self.ports {
            port.ready = false;
            port.guest_open = false;
            port.host_open = false;
        }
    }

    /// True where the driver must first take what waits for it.
    pub(super) fn is_full(&self) -> bool {
        self.pending.len() >= MAX_PENDING
    }

    /// The next message for the driver.
    pub(super) fn front(&self) -> Option<&[u8]> {
        self.pending.front().map(Vec::as_slice)
    }

    /// The driver has got the next message.
    pub(super) fn sent(&mut self) {
        self.pending.pop_front();
    }

    /// All messages for the driver, to be saved.
    pub(super) fn pending(&self) -> Vec<Vec<u8>> {
        self.pending.iter().cloned().collect()
    }

    /// Puts saved messages back.
    pub(super) fn set_pending(&mut self, messages: Vec<Vec<u8>>) {
        self.pending = messages.into();
    }

    /// Takes a message of the driver's. Such as make no sense are ignored, as the specification asks.
    pub(super) fn receive(&mut self, bytes: [u8; MESSAGE_LEN]) -> Effect {
        let message = Head::of(bytes);
        if message.event == DEVICE_READY {
            if message.value == 1 {
                for index in 0..self.ports.len() {
                    self.send(index, PORT_ADD, 1, &[]);
                }
            } else {
                tracing::debug!("console: the driver could not set the device up");
            }
            return Effect::None;
        }
        let index = usize::try_from(message.port).unwrap_or(usize::MAX);
        let Some(port) = self.ports.get_mut(index) else {
            tracing::debug!("console: the driver names port {index}, which is not there");
            return Effect::None;
        };
        match message.event {
            PORT_READY if message.value == 1 => {
                port.ready = true;
                port.host_open = false;
                let (console, name) = (port.console, port.name.clone());
                if console {
                    self.send(index, CONSOLE_PORT, 1, &[]);
                }
                if !name.is_empty() {
                    self.send(index, PORT_NAME, 1, name.as_bytes());
                }
                Effect::PortReady(index)
            }
            PORT_READY => {
                tracing::debug!("console: the driver could not set up port {index}");
                port.ready = false;
                Effect::None
            }
            PORT_OPEN => {
                port.guest_open = message.value == 1;
                Effect::PortOpened(index)
            }
            _ => Effect::None,
        }
    }

    /// Tells the driver whether somebody on the host has this port open, if that is news.
    pub(super) fn set_host_open(&mut self, index: usize, open: bool) {
        let Some(port) = self.ports.get_mut(index) else {
            return;
        };
        if !port.ready || port.host_open == open {
            return;
        }
        port.host_open = open;
        // A message of this kind that still waits is overtaken, so that there is never more than one for each port.
        let old = self.encode(index, PORT_OPEN, u16::from(!open), &[]);
        self.pending.retain(|message| *message != old);
        self.send(index, PORT_OPEN, u16::from(open), &[]);
    }

    /// Tells the driver a console's new size in characters.
    pub(super) fn resize(&mut self, index: usize, columns: u16, rows: u16) {
        if !self.ports.get(index).is_some_and(|p| p.ready && p.console) {
            return;
        }
        // The specification has the columns first, but Linux has always read the rows first, and so do those who
        // send them.
        let mut size = rows.to_le_bytes().to_vec();
        size.extend(columns.to_le_bytes());
        let head = self.encode(index, RESIZE, 0, &[]);
        self.pending.retain(|message| !message.starts_with(&head));
        self.send(index, RESIZE, 0, &size);
    }

    fn send(&mut self, index: usize, event: u16, value: u16, more: &[u8]) {
        let message = self.encode(index, event, value, more);
        self.pending.push_back(message);
    }

    fn encode(&self, index: usize, event: u16, value: u16, more: &[u8]) -> Vec<u8> {
        let mut message = Vec::with_capacity(MESSAGE_LEN + more.len());
        message.extend(u32::try_from(index).unwrap_or(u32::MAX).to_le_bytes());
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        message.extend(more);
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn control() -> Control {
        let port = |name: &str, console| PortControl {
            name: name.into(),
            console,
            ready: false,
            guest_open: false,
            host_open: false,
        };
        Control::new(vec![port("", true), port("agent", false)])
    }

    fn message(port: u32, event: u16, value: u16) -> [u8; MESSAGE_LEN] {
        let mut bytes = [0; MESSAGE_LEN];
        bytes[..4].copy_from_slice(&port.to_le_bytes());
        bytes[4..6].copy_from_slice(&event.to_le_bytes());
        bytes[6..].copy_from_slice(&value.to_le_bytes());
        bytes
    }

    fn all(control: &mut Control) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let mut messages = Vec::new();
        while let Some(bytes) = control.front() {
            let head = Head::of(bytes[..MESSAGE_LEN].try_into().unwrap());
            let more = bytes[MESSAGE_LEN..].to_vec();
            messages.push((head.port, head.event, head.value, more));
            control.sent();
        }
        messages
    }

    #[test]
    fn a_port_is_added_named_and_opened() {
        let mut control = control();
        let ready = message(u32::MAX, DEVICE_READY, 1);
        assert_eq!(control.receive(ready), Effect::None);
        assert_eq!(all(&mut control), [(0, PORT_ADD, 1, vec![]), (1, PORT_ADD, 1, vec![])]);
        // Not before the driver is ready for it.
        control.set_host_open(1, true);
        assert_eq!(all(&mut control), []);
        let ready = message(1, PORT_READY, 1);
        assert_eq!(control.receive(ready), Effect::PortReady(1));
        control.set_host_open(1, true);
        assert_eq!(all(&mut control), [(1, PORT_NAME, 1, b"agent".to_vec()), (1, PORT_OPEN, 1, vec![])]);
    }

    #[test]
    fn news_that_were_not_taken_are_overtaken() {
        let mut control = control();
        control.receive(message(1, PORT_READY, 1));
        all(&mut control);
        for _ in 0..1000 {
            control.set_host_open(1, true);
            control.set_host_open(1, false);
        }
        assert_eq!(all(&mut control), [(1, PORT_OPEN, 0, vec![])]);
    }

    #[test]
    fn nonsense_is_ignored() {
        let mut control = control();
        for event in 0..20 {
            for port in [2, 31, u32::MAX] {
                if event != DEVICE_READY {
                    assert_eq!(control.receive(message(port, event, 1)), Effect::None);
                }
            }
        }
        assert_eq!(control.receive(message(0, 999, 1)), Effect::None);
        assert_eq!(all(&mut control), []);
    }

    #[test]
    fn a_driver_that_takes_nothing_is_not_listened_to() {
        let mut control = control();
        let mut count = 0;
        while !control.is_full() {
            control.receive(message(0, DEVICE_READY, 1));
            count += 1;
        }
        assert_eq!(count, MAX_PENDING / 2);
    }
}
