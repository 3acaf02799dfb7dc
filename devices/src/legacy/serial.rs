//! A 16550A serial port (registers by vm-superio) with an output that never waits and an input that loses nothing.
//!
//! Input needs no thread of its own: whoever has some calls [`Serial::fill`], and the port takes more by itself each
//! time the guest has emptied the receiver.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;

use crate::bus::BusDevice;
use crate::seam::Interrupt;

/// The interrupt identification register: bit 0 is clear while an interrupt waits, and bits 3 to 1 say which.
const INTERRUPT_IDENTIFICATION: u64 = 2;
const NO_INTERRUPT: u8 = 1 << 0;
const INPUT_WAITS: u8 = 1 << 2;
/// Bits of the interrupt enable and line status registers that make that interrupt.
const ENABLE_INPUT: u8 = 1 << 0;
const DATA_READY: u8 = 1 << 0;
/// The modem control register, whose bit 4 loops the port's output back to its input.
const MODEM_CONTROL: u64 = 4;
const LOOPBACK: u8 = 1 << 4;
/// Bytes that the receiver holds, at the most.
const RECEIVER: usize = 64;

/// The host's side of a serial port. It is called on vCPU threads, so it never waits.
pub trait SerialPeer: Send {
    /// Takes all bytes that the guest sent.
    fn write(&mut self, bytes: &[u8]);

    /// Gives input, as much as there is and as fits, and tells how much.
    fn read(&mut self, into: &mut [u8]) -> usize;
}

/// The interrupt line.
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.event().write(1)
    }
}

/// Notes that the guest has emptied the receiver.
#[derive(Default)]
struct Emptied(AtomicBool);

impl SerialEvents for Emptied {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

struct Peer(Box<dyn SerialPeer>);

impl io::Write for Peer {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Registers = vm_superio::Serial<Line, Arc<Emptied>, Peer>;

/// A saved serial port.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Bytes received that the guest has not read.
    received: Vec<u8>,
}

/// A serial port: eight byte-wide registers.
pub struct Serial {
    line: Arc<dyn Interrupt>,
    emptied: Arc<Emptied>,
    registers: Mutex<Registers>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").finish_non_exhaustive()
    }
}

impl Serial {
    /// Length of its range in bytes.
    pub const LEN: u64 = 8;

    /// A serial port whose interrupt is edge-triggered.
    pub fn new(line: Arc<dyn Interrupt>, peer: Box<dyn SerialPeer>) -> Self {
        let emptied = Arc::new(Emptied::default());
        let registers = Registers::with_events(Line(Arc::clone(&line)), Arc::clone(&emptied), Peer(peer));
        Self { line, emptied, registers: Mutex::new(registers) }
    }

    /// Takes input from the peer, as much as the receiver has room for. To be called when the peer has some; the port
    /// takes the rest by itself as the guest reads.
    pub fn fill(&self) {
        fill(&mut self.lock());
    }

    /// What to save.
    pub fn save(&self) -> SerialState {
        let state = self.lock().state();
        SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// Puts back a saved state; an interrupt that was pending comes again.
    ///
    /// # Errors
    /// More bytes were received than the port holds, or the interrupt's event cannot be written.
    pub fn restore(&self, state: &SerialState) -> io::Result<()> {
        self.replace(&vm_superio::SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.clone(),
        })
    }

    fn replace(&self, state: &vm_superio::SerialState) -> io::Result<()> {
        let line = Line(Arc::clone(&self.line));
        let mut registers = self.lock();
        let mut new = Registers::from_state(state, line, Arc::clone(&self.emptied), Peer(Box::new(Nobody)))
            .map_err(|e| io::Error::other(format!("serial port: {e}")))?;
        std::mem::swap(new.writer_mut(), registers.writer_mut());
        *registers = new;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A peer for the moment in which the real one changes hands.
struct Nobody;

impl SerialPeer for Nobody {
    fn write(&mut self, _bytes: &[u8]) {}

    fn read(&mut self, _into: &mut [u8]) -> usize {
        0
    }
}

/// Whether received bytes wait that the guest wants to be interrupted for. The reason lasts as long as they do, while
/// the registers forget it when the guest has read one of them or asked for it: a driver that stops in the middle
/// would never come back.
fn interrupts_for_input(registers: &Registers) -> bool {
    let state = registers.state();
    state.interrupt_enable & ENABLE_INPUT != 0 && state.line_status & DATA_READY != 0
}

fn fill(registers: &mut Registers) {
    // In loopback the receiver is the transmitter's; input waits until it is over.
    if registers.state().modem_control & LOOPBACK != 0 {
        return;
    }
    let mut piece = [0; RECEIVER];
    loop {
        let room = registers.fifo_capacity().min(RECEIVER);
        let Some(part) = piece.get_mut(..room).filter(|part| !part.is_empty()) else { return };
        let count = registers.writer_mut().0.read(part);
        let Some(given) = part.get(..count).filter(|given| !given.is_empty()) else { return };
        if let Err(e) = registers.enqueue_raw_bytes(given) {
            tracing::warn!("serial port: {e}");
        }
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut registers = self.lock();
            let waits = u64::from(offset) == INTERRUPT_IDENTIFICATION && interrupts_for_input(&registers);
            *byte = registers.read(offset);
            if waits {
                *byte = *byte & !NO_INTERRUPT | INPUT_WAITS;
            }
            if self.emptied.0.swap(false, Ordering::Relaxed) {
                fill(&mut registers);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let ([byte], Ok(register)) = (data, u8::try_from(offset)) else { return };
        let mut registers = self.lock();
        if let Err(e) = registers.write(register, *byte) {
            tracing::warn!("serial port: {e}");
        }
        if offset == MODEM_CONTROL {
            fill(&mut registers);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::FakeInterrupts;

    /// A host that keeps what it is sent and gives what it has.
    struct Host(mpsc::Sender<u8>, Arc<Mutex<VecDeque<u8>>>);

    impl SerialPeer for Host {
        fn write(&mut self, bytes: &[u8]) {
            bytes.iter().for_each(|byte| self.0.send(*byte).unwrap());
        }

        fn read(&mut self, into: &mut [u8]) -> usize {
            io::Read::read(&mut *self.1.lock().unwrap(), into).unwrap()
        }
    }

    struct Port {
        output: mpsc::Receiver<u8>,
        input: Arc<Mutex<VecDeque<u8>>>,
        serial: Serial,
    }

    impl Port {
        fn new() -> Self {
            let (sent, output) = mpsc::channel();
            let input = Arc::default();
            let host = Host(sent, Arc::clone(&input));
            Self { output, input, serial: Serial::new(Arc::from(FakeInterrupts::new().line()), Box::new(host)) }
        }

        fn give(&self, bytes: &[u8]) {
            self.input.lock().unwrap().extend(bytes);
            self.serial.fill();
        }
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_mebibyte_of_input_arrives_whole() {
        let port = Port::new();
        let input: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        port.serial.write(1, &[1]);
        port.give(&input);
        let mut got = Vec::new();
        while got.len() < input.len() {
            assert!(port.serial.line.event().read().is_ok(), "an interrupt for each filling");
            for _ in 0..RECEIVER {
                assert_eq!(read(&port.serial, 5) & 1, 1, "input waits");
                got.push(read(&port.serial, 0));
            }
        }
        assert!(got == input);
        assert_eq!(read(&port.serial, 5) & 1, 0);
    }

    #[test]
    fn input_waits_while_the_port_loops_back() {
        let port = Port::new();
        port.serial.write(4, &[LOOPBACK]);
        port.give(b"later");
        port.serial.write(0, b"l");
        assert_eq!((read(&port.serial, 0), read(&port.serial, 5) & 1), (b'l', 0));
        assert!(port.output.try_recv().is_err(), "looped output stays inside");
        port.serial.write(4, &[0]);
        let got: Vec<u8> = (0..5).map(|_| read(&port.serial, 0)).collect();
        assert_eq!(got, b"later");
    }

    #[test]
    fn output_and_state_survive_a_restore() {
        let (port, other) = (Port::new(), Port::new());
        port.serial.write(0, b"a");
        port.serial.write(7, &[0x5a]);
        port.give(b"xyz");
        let saved = serde_json::to_vec(&port.serial.save()).unwrap();
        other.serial.restore(&serde_json::from_slice(&saved).unwrap()).unwrap();
        assert_eq!((read(&other.serial, 7), read(&other.serial, 0)), (0x5a, b'x'));
        other.serial.write(0, b"b");
        assert_eq!(other.output.try_iter().collect::<Vec<_>>(), b"b");
        let mut damaged = port.serial.save();
        damaged.received = vec![0; 65];
        assert!(other.serial.restore(&damaged).is_err());
    }

    /// What Linux's driver does at an interrupt: it takes 256 bytes at the most before it asks for the reason again.
    fn handle_interrupt(serial: &Serial, got: &mut Vec<u8>) {
        while read(serial, 2) & 1 == 0 {
            for _ in 0..256 {
                if read(serial, 5) & 1 == 0 {
                    break;
                }
                got.push(read(serial, 0));
            }
        }
    }

    #[test]
    fn the_reason_of_an_interrupt_stays_while_input_waits() {
        let port = Port::new();
        port.serial.write(1, &[1]);
        let input: Vec<u8> = (0..10_000_u32).map(|i| (i % 251) as u8).collect();
        // Little at first, so that 256 bytes end in the middle of what the receiver holds.
        let (first, rest) = input.split_at(10);
        port.give(first);
        port.input.lock().unwrap().extend(rest);
        let mut got = Vec::new();
        while port.serial.line.event().read().is_ok() {
            handle_interrupt(&port.serial, &mut got);
        }
        assert_eq!(got.len(), input.len(), "input waits, and no interrupt tells of it");
        assert!(got == input);
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((any::<bool>(), 0..8_u64, 1..9_usize, any::<u8>()), 0..200)) {
            let port = Port::new();
            for (write, offset, len, value) in accesses {
                let mut data = vec![value; len];
                match write {
                    true => port.serial.write(offset, &data),
                    false => port.serial.read(offset, &mut data),
                }
                port.give(&[value; 3]);
            }
        }
    }
}
