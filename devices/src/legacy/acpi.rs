//! The registers of a hardware-reduced ACPI platform: sleep, reset, and the generic event device's events.
//!
//! ```text
//!   0 sleep control   1 sleep status   2 reset   4 to 7 events, cleared by reading
//! ```

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{PlatformEvent, PlatformEvents};
use crate::bus::BusDevice;
use crate::seam::Interrupt;

const SLEEP_CONTROL: u64 = 0;
const RESET: u64 = 2;
const EVENTS: u64 = 4;

/// Sleep control: enter the state in bits 4:2 (ACPI 6.5 §4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
/// The sleep type that the platform's tables give for S5, off.
const SLEEP_TYPE_S5: u8 = 5;
/// What the tables give to be written to the reset register.
const RESET_VALUE: u8 = 1;
/// The event of a press of the power button.
const EVENT_POWER_BUTTON: u32 = 1 << 0;
/// The event of processors that come and go.
const EVENT_PROCESSORS: u32 = 1 << 1;

/// The platform's power registers.
pub struct AcpiRegisters {
    platform: Arc<dyn PlatformEvents>,
    interrupt: Arc<dyn Interrupt>,
    /// Events that the guest has not read.
    events: AtomicU32,
}

impl fmt::Debug for AcpiRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiRegisters").field("events", &self.events).finish_non_exhaustive()
    }
}

impl AcpiRegisters {
    /// Length of their range in bytes.
    pub const LEN: u64 = 8;

    /// The registers. `interrupt` is the generic event device's, edge-triggered.
    pub fn new(platform: Arc<dyn PlatformEvents>, interrupt: Arc<dyn Interrupt>) -> Self {
        Self { platform, interrupt, events: AtomicU32::new(0) }
    }

    /// Presses the power button: the guest is asked to shut itself down.
    ///
    /// # Errors
    /// The interrupt's event cannot be written.
    pub fn press_power_button(&self) -> std::io::Result<()> {
        self.raise(EVENT_POWER_BUTTON)
    }

    /// Tells the guest to look at what [`super::Processors`] ask of it.
    ///
    /// # Errors
    /// The interrupt's event cannot be written.
    pub fn show_processors(&self) -> std::io::Result<()> {
        self.raise(EVENT_PROCESSORS)
    }

    fn raise(&self, event: u32) -> std::io::Result<()> {
        self.events.fetch_or(event, Ordering::SeqCst);
        self.interrupt.event().write(1)
    }

    /// Forgets what has happened, as at a reset of the machine.
    pub fn reset(&self) {
        self.set_events(0);
    }

    /// Events that the guest has not read, for a saved state.
    pub fn events(&self) -> u32 {
        self.events.load(Ordering::SeqCst)
    }

    /// Puts back the events of a saved state.
    pub fn set_events(&self, events: u32) {
        self.events.store(events, Ordering::SeqCst);
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = 0;
            if let Some(shift) = at.checked_sub(EVENTS).and_then(|at| u32::try_from(at * 8).ok())
                && let Some(mask) = 0xff_u32.checked_shl(shift)
            {
                let read = self.events.fetch_and(!mask, Ordering::SeqCst) & mask;
                *byte = u8::try_from(read >> shift).unwrap_or(0);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && value >> 2 & 7 == SLEEP_TYPE_S5 => {
                self.platform.event(PlatformEvent::Shutdown);
            }
            RESET if value == RESET_VALUE => self.platform.event(PlatformEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;
    use crate::virtio::testing::FakeInterrupts;

    fn registers() -> (Arc<Asked>, FakeInterrupts, AcpiRegisters) {
        let (asked, interrupts) = (Asked::new(), FakeInterrupts::new());
        let registers = AcpiRegisters::new(asked.clone(), Arc::from(interrupts.line()));
        (asked, interrupts, registers)
    }

    #[test]
    fn s5_and_reset_are_told_apart_from_other_writes() {
        let (asked, _, registers) = registers();
        for (offset, value) in [(0, 5 << 2), (0, 1 << 5 | 3 << 2), (1, 0x34), (2, 0), (2, 6), (4, 1)] {
            registers.write(offset, &[value]);
        }
        assert_eq!(asked.take(), []);
        registers.write(0, &[0x34]);
        registers.write(2, &[1]);
        assert_eq!(asked.take(), [PlatformEvent::Shutdown, PlatformEvent::Reset]);
    }

    #[test]
    fn the_power_button_is_one_event() {
        let (_, _, registers) = registers();
        registers.press_power_button().unwrap();
        registers.press_power_button().unwrap();
        let mut data = [0xff; 4];
        registers.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 1);
        registers.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0);
        assert_eq!(registers.interrupt.event().read().unwrap(), 2);
    }

    #[test]
    fn events_are_told_apart_and_read_together() {
        let (_, _, registers) = registers();
        registers.show_processors().unwrap();
        registers.press_power_button().unwrap();
        let mut data = [0xff; 4];
        registers.read(4, &mut data);
        assert_eq!(u32::from_le_bytes(data), 3);
    }
}
