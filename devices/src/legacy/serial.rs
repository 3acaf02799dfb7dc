//! A 16550A serial port (registers by vm-superio) with an output that never waits and an input that loses nothing.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::SerialEvents;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::BusDevice;
use crate::seam::Interrupt;

/// Where a serial port's output goes. It is called on a vCPU's thread, so it takes all bytes and never waits.
pub trait SerialOutput: Send {
    /// Takes bytes that the guest sent.
    fn write(&mut self, bytes: &[u8]);
}

impl<F: FnMut(&[u8]) + Send> SerialOutput for F {
    fn write(&mut self, bytes: &[u8]) {
        self(bytes);
    }
}

/// The interrupt line.
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.event().write(1)
    }
}

/// Tells who has input waiting when the receiver is empty.
struct Room {
    event: EventFd,
    /// Someone was told that there is no room.
    awaited: AtomicBool,
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        if self.awaited.swap(false, Ordering::AcqRel)
            && let Err(e) = self.event.write(1)
        {
            tracing::warn!("serial port: telling of room for input: {e}");
        }
    }
}

struct Out(Box<dyn SerialOutput>);

impl io::Write for Out {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Registers = vm_superio::Serial<Line, Arc<Room>, Out>;

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
    room: Arc<Room>,
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
    ///
    /// # Errors
    /// No event can be made.
    pub fn new(line: Arc<dyn Interrupt>, output: Box<dyn SerialOutput>) -> io::Result<Self> {
        let room = Arc::new(Room { event: EventFd::new(EFD_NONBLOCK)?, awaited: AtomicBool::new(false) });
        let registers = Registers::with_events(Line(Arc::clone(&line)), Arc::clone(&room), Out(output));
        Ok(Self { line, room, registers: Mutex::new(registers) })
    }

    /// Receives bytes, and returns how many there was room for. The rest is to be given again, in order, when
    /// [`Serial::room`] is signalled.
    ///
    /// # Errors
    /// The interrupt's event cannot be written; the bytes are received nevertheless.
    pub fn input(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut registers = self.lock();
        let taken = match registers.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(vm_superio::serial::Error::FullFifo) => 0,
            Err(vm_superio::serial::Error::Trigger(e) | vm_superio::serial::Error::IOError(e)) => return Err(e),
        };
        if taken < bytes.len() {
            // Under the lock, so that the guest's next read finds it.
            self.room.awaited.store(true, Ordering::Release);
        }
        Ok(taken)
    }

    /// Signalled when there is room again after [`Serial::input`] took fewer bytes than it was given.
    pub fn room(&self) -> &EventFd {
        &self.room.event
    }

    /// Forgets what the guest set and did not read, as at a reset of the machine.
    ///
    /// # Errors
    /// None that a fresh state can cause; see [`Serial::restore`].
    pub fn reset(&self) -> io::Result<()> {
        self.replace(&vm_superio::SerialState::default())?;
        self.room.in_buffer_empty();
        Ok(())
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
        let nowhere = Out(Box::new(|_: &[u8]| {}));
        let line = Line(Arc::clone(&self.line));
        let mut registers = self.lock();
        let mut new = Registers::from_state(state, line, Arc::clone(&self.room), nowhere)
            .map_err(|e| io::Error::other(format!("serial port: {e}")))?;
        std::mem::swap(new.writer_mut(), registers.writer_mut());
        *registers = new;
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(e) = self.lock().write(offset, *byte)
        {
            tracing::warn!("serial port: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::FakeInterrupts;

    fn port() -> (mpsc::Receiver<u8>, Serial) {
        let (sent, output) = mpsc::channel();
        let write = move |bytes: &[u8]| bytes.iter().for_each(|byte| sent.send(*byte).unwrap());
        (output, Serial::new(Arc::from(FakeInterrupts::new().line()), Box::new(write)).unwrap())
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn a_mebibyte_of_input_arrives_whole() {
        let (_, serial) = port();
        let input: Vec<u8> = (0..1 << 20).map(|i: u32| (i % 251) as u8).collect();
        serial.write(1, &[1]);
        let (mut left, mut got) = (&input[..], Vec::new());
        while got.len() < input.len() {
            let taken = serial.input(left).unwrap();
            left = &left[taken..];
            assert!(serial.line.event().read().is_ok(), "an interrupt for each filling");
            while read(&serial, 5) & 1 != 0 {
                got.push(read(&serial, 0));
            }
            if !left.is_empty() {
                assert!(serial.room().read().is_ok(), "room is told");
            }
        }
        assert!(got == input);
        assert!(serial.room().read().is_err(), "nobody waits any more");
    }

    #[test]
    fn output_and_state_survive_a_restore() {
        let (output, serial) = port();
        serial.write(0, b"a");
        serial.write(7, &[0x5a]);
        serial.input(b"xyz").unwrap();
        let saved = serde_json::to_vec(&serial.save()).unwrap();
        serial.reset().unwrap();
        assert_eq!(read(&serial, 5) & 1, 0);
        serial.restore(&serde_json::from_slice(&saved).unwrap()).unwrap();
        assert_eq!((read(&serial, 7), read(&serial, 0)), (0x5a, b'x'));
        serial.write(0, b"b");
        assert_eq!(output.try_iter().collect::<Vec<_>>(), b"ab");
        let mut damaged = serial.save();
        damaged.received = vec![0; 65];
        assert!(serial.restore(&damaged).is_err());
    }

    proptest! {
        #[test]
        fn no_access_panics(accesses in proptest::collection::vec((any::<bool>(), 0..8_u64, 1..9_usize, any::<u8>()), 0..200)) {
            let (_output, serial) = port();
            for (write, offset, len, value) in accesses {
                let mut data = vec![value; len];
                match write {
                    true => serial.write(offset, &data),
                    false => serial.read(offset, &mut data),
                }
                serial.input(&[value; 3]).unwrap();
            }
        }
    }
}
