//! The I/O APIC (Intel 82093AA, version 0x20), for hypervisors that emulate only local APICs.
//!
//! A pin's redirection entry becomes the message of an [`Interrupt`], so an edge-triggered device interrupts by
//! writing an event, without coming here. Level-triggered pins come here: they are raised again at the end of an
//! interrupt while their line is still high.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::seam::{Interrupt, MsiMessage};

/// The most pins.
pub const PINS: u8 = 24;
const PIN_COUNT: usize = PINS as usize;

/// Memory-mapped registers, each 32 bits.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const END_OF_INTERRUPT: u64 = 0x40;

/// Registers behind the window.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const FIRST_ENTRY: u8 = 0x10;

/// Version 0x20, which has the end-of-interrupt register.
const VERSION_VALUE: u32 = 0x20;

/// Fields of a redirection entry.
const DELIVERY_MODE: u64 = 7 << 8;
const DELIVERY_EXTINT: u64 = 7 << 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Bits that a guest may write: all fields but delivery status and remote IRR.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where messages to local APICs go.
const MSI_BASE: u64 = 0xfee0_0000;

/// A saved I/O APIC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IoApicState {
    select: u8,
    id: u32,
    entries: [u64; PIN_COUNT],
    /// Which level-triggered lines are high, a bit each.
    high: u32,
}

impl IoApicState {
    const RESET: Self = Self { select: 0, id: 0, entries: [MASKED; PIN_COUNT], high: 0 };
}

/// An I/O APIC.
pub struct IoApic {
    pins: u8,
    lines: [Option<Arc<dyn Interrupt>>; PIN_COUNT],
    state: Mutex<IoApicState>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IoApic").field(&*self.lock()).finish()
    }
}

impl IoApic {
    /// Length of its range in bytes.
    pub const LEN: u64 = 0x1000;

    /// An I/O APIC with so many pins, 1 to [`PINS`], all masked and none connected. Linux goes through them several times
    /// while it boots, and each access leaves the guest.
    pub fn new(pins: u8) -> Self {
        Self { pins: pins.clamp(1, PINS), lines: [const { None }; PIN_COUNT], state: Mutex::new(IoApicState::RESET) }
    }

    /// Connects a pin to a way into the guest. `None` where the pin does not exist. An edge-triggered device
    /// interrupts by the event of what is returned; what comes while the pin is masked is dropped, as by the real
    /// one. A level-triggered device uses [`IoApic::set_level`].
    pub fn connect(&mut self, pin: u8, line: Box<dyn Interrupt>) -> Option<Arc<dyn Interrupt>> {
        let slot = self.lines.get_mut(usize::from(pin)).filter(|_| pin < self.pins)?;
        let line: Arc<dyn Interrupt> = Arc::from(line);
        *slot = Some(Arc::clone(&line));
        Some(line)
    }

    /// Sets the line of a level-triggered device.
    pub fn set_level(&self, pin: u8, high: bool) {
        if pin >= self.pins {
            return;
        }
        let mut state = self.lock();
        let bit = 1 << pin;
        match high {
            true => state.high |= bit,
            false => state.high &= !bit,
        }
        self.deliver_level(&mut state, usize::from(pin));
    }

    /// The guest's local APIC has ended a level-triggered interrupt.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut state = self.lock();
        for pin in 0..PIN_COUNT {
            let Some(entry) = state.entries.get_mut(pin) else { continue };
            if *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && *entry & 0xff == u64::from(vector) {
                *entry &= !REMOTE_IRR;
                self.deliver_level(&mut state, pin);
            }
        }
    }

    /// Masks all pins, as at a reset of the machine.
    pub fn reset(&self) {
        self.restore(&IoApicState::RESET);
    }

    /// What to save.
    pub fn save(&self) -> IoApicState {
        self.lock().clone()
    }

    /// Puts back a saved state.
    pub fn restore(&self, saved: &IoApicState) {
        let mut state = self.lock();
        state.clone_from(saved);
        for pin in 0..PIN_COUNT {
            if let Some(entry) = state.entries.get_mut(pin) {
                *entry &= WRITABLE | REMOTE_IRR;
            }
            self.route(&mut state, pin);
        }
    }

    fn lock(&self) -> MutexGuard<'_, IoApicState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a pin's interrupt deliver what its entry says.
    fn route(&self, state: &mut IoApicState, pin: usize) {
        let (Some(Some(line)), Some(entry)) = (self.lines.get(pin), state.entries.get(pin)) else {
            return;
        };
        if let Err(e) = line.set(message(*entry)) {
            tracing::warn!("I/O APIC pin {pin}: {e}");
        }
        self.deliver_level(state, pin);
    }

    /// Interrupts for a level-triggered line that is high, unless that interrupt has been delivered and not ended.
    fn deliver_level(&self, state: &mut IoApicState, pin: usize) {
        let (Some(Some(line)), Some(entry)) = (self.lines.get(pin), state.entries.get_mut(pin)) else {
            return;
        };
        let high = state.high >> pin & 1 != 0;
        if high && *entry & (LEVEL | REMOTE_IRR) == LEVEL && message(*entry).is_some() {
            *entry |= REMOTE_IRR;
            if let Err(e) = line.event().write(1) {
                tracing::warn!("I/O APIC pin {pin}: {e}");
            }
        }
    }

    /// The pin whose redirection entry a register is part of.
    fn pin_of(&self, select: u8) -> Option<usize> {
        select.checked_sub(FIRST_ENTRY).map(|at| at / 2).filter(|pin| *pin < self.pins).map(usize::from)
    }

    fn read_register(&self, state: &IoApicState) -> u32 {
        match state.select {
            ID | ARBITRATION => state.id,
            // The number of the last pin is in bits 23:16.
            VERSION => VERSION_VALUE | u32::from(self.pins - 1) << 16,
            select => {
                let entry = self.pin_of(select).and_then(|pin| state.entries.get(pin)).copied().unwrap_or(0);
                let half = if select & 1 == 0 { entry } else { entry >> 32 };
                u32::try_from(half & 0xffff_ffff).unwrap_or(0)
            }
        }
    }

    fn write_register(&self, state: &mut IoApicState, value: u32) {
        let select = state.select;
        if select == ID {
            state.id = value & 0x0f00_0000;
            return;
        }
        let Some(pin) = self.pin_of(select) else { return };
        let Some(entry) = state.entries.get_mut(pin) else { return };
        let old = *entry;
        let new = match select & 1 {
            0 => old & !0xffff_ffff | u64::from(value),
            _ => old & 0xffff_ffff | u64::from(value) << 32,
        };
        *entry = new & WRITABLE | old & REMOTE_IRR;
        if *entry & LEVEL == 0 {
            // An edge-triggered entry has no interrupt that waits for its end.
            *entry &= !REMOTE_IRR;
        }
        if *entry & !REMOTE_IRR != old & !REMOTE_IRR {
            self.route(state, pin);
        }
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        let value = match offset {
            SELECT => u32::from(state.select),
            WINDOW => self.read_register(&state),
            _ => 0,
        };
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = value;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (byte, value) in bytes.iter_mut().zip(data) {
            *byte = *value;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            SELECT => self.lock().select = bytes[0],
            WINDOW => self.write_register(&mut self.lock(), value),
            END_OF_INTERRUPT => self.end_of_interrupt(bytes[0]),
            _ => {}
        }
    }
}

/// The message that a redirection entry stands for, `None` while it delivers nothing.
fn message(entry: u64) -> Option<MsiMessage> {
    // There is no 8259 that could answer an ExtINT.
    if entry & MASKED != 0 || entry & DELIVERY_MODE == DELIVERY_EXTINT {
        return None;
    }
    let destination = entry >> 56;
    let logical = u64::from(entry & LOGICAL != 0);
    // Vector, delivery mode and trigger mode have the same places in both.
    let data = entry & (0xff | DELIVERY_MODE | LEVEL);
    Some(MsiMessage { address: MSI_BASE | destination << 12 | logical << 2, data: u32::try_from(data).unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::FakeInterrupts;

    fn apic() -> (FakeInterrupts, IoApic) {
        let interrupts = FakeInterrupts::new();
        let mut apic = IoApic::new(PINS);
        for pin in 0..PINS {
            apic.connect(pin, interrupts.line()).unwrap();
        }
        (interrupts, apic)
    }

    fn set_entry(apic: &IoApic, pin: u8, entry: u64) {
        let bytes = entry.to_le_bytes();
        for (register, half) in [(FIRST_ENTRY + 2 * pin + 1, &bytes[4..]), (FIRST_ENTRY + 2 * pin, &bytes[..4])] {
            apic.write(SELECT, &[register]);
            apic.write(WINDOW, half);
        }
    }

    fn entry(apic: &IoApic, pin: u8) -> u64 {
        apic.save().entries[usize::from(pin)]
    }

    #[test]
    fn an_entry_becomes_a_message() {
        let (interrupts, apic) = apic();
        set_entry(&apic, 4, 3 << 56 | LOGICAL | 0x31);
        let message = interrupts.message(4).unwrap();
        assert_eq!(message, MsiMessage { address: 0xfee0_3004, data: 0x31 });
        set_entry(&apic, 4, 3 << 56 | MASKED | 0x31);
        assert_eq!(interrupts.message(4), None);
        set_entry(&apic, 4, DELIVERY_EXTINT | 0x31);
        assert_eq!(interrupts.message(4), None);
    }

    #[test]
    fn tells_its_version_and_refuses_what_is_read_only() {
        let (_, apic) = apic();
        apic.write(SELECT, &[VERSION, 0, 0, 0]);
        apic.write(WINDOW, &[0xff; 4]);
        let mut data = [0; 4];
        apic.read(WINDOW, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0017_0020);
        set_entry(&apic, 0, u64::MAX);
        assert_eq!(entry(&apic, 0), WRITABLE);
    }

    #[test]
    fn an_io_apic_of_few_pins_has_no_others() {
        let mut apic = IoApic::new(10);
        let interrupts = FakeInterrupts::new();
        assert!(apic.connect(9, interrupts.line()).is_some());
        assert!(apic.connect(10, interrupts.line()).is_none());
        apic.write(SELECT, &[VERSION, 0, 0, 0]);
        let mut data = [0; 4];
        apic.read(WINDOW, &mut data);
        assert_eq!(u32::from_le_bytes(data), 0x0009_0020);
        for pin in [9, 10] {
            set_entry(&apic, pin, 0x31);
            apic.read(WINDOW, &mut data);
            assert_eq!(u32::from_le_bytes(data), if pin == 9 { 0x31 } else { 0 });
        }
    }

    #[test]
    fn a_level_comes_again_until_it_is_low() {
        let (interrupts, apic) = apic();
        set_entry(&apic, 9, LEVEL | 0x40);
        apic.set_level(9, true);
        apic.set_level(9, true);
        assert_eq!(interrupts.take(9), 1);
        assert_ne!(entry(&apic, 9) & REMOTE_IRR, 0);
        apic.end_of_interrupt(0x41);
        assert_eq!(interrupts.take(9), 0);
        apic.end_of_interrupt(0x40);
        assert_eq!(interrupts.take(9), 1);
        apic.set_level(9, false);
        apic.write(END_OF_INTERRUPT, &[0x40, 0, 0, 0]);
        assert_eq!(interrupts.take(9), 0);
        assert_eq!(entry(&apic, 9) & REMOTE_IRR, 0);
    }

    #[test]
    fn a_level_waits_for_unmasking() {
        let (interrupts, apic) = apic();
        set_entry(&apic, 9, LEVEL | MASKED | 0x40);
        apic.set_level(9, true);
        assert_eq!(interrupts.take(9), 0);
        set_entry(&apic, 9, LEVEL | 0x40);
        assert_eq!(interrupts.take(9), 1);
    }

    proptest! {
        #[test]
        fn no_access_panics_and_state_survives_saving(
            accesses in proptest::collection::vec((any::<bool>(), 0..0x48_u64, proptest::collection::vec(any::<u8>(), 1..9)), 0..200),
            levels in proptest::collection::vec((any::<u8>(), any::<bool>()), 0..20),
        ) {
            let (_interrupts, apic) = apic();
            for (write, offset, mut data) in accesses {
                match write {
                    true => apic.write(offset, &data),
                    false => apic.read(offset, &mut data),
                }
            }
            for (pin, high) in levels {
                apic.set_level(pin, high);
                apic.end_of_interrupt(pin);
            }
            let saved = apic.save();
            let json = serde_json::to_vec(&saved).unwrap();
            let (_interrupts, copy) = self::apic();
            copy.restore(&serde_json::from_slice(&json).unwrap());
            prop_assert_eq!(copy.save(), saved);
        }
    }
}
