//! A function's MSI capability as the guest sees it (PCI 3.0 §6.8.1): without masks of single messages.

use std::io;
use std::sync::Arc;

use super::{Physical, Signals};
use crate::seam::{Interrupt, Interrupts, MsiMessage};

/// Message control: MSI is in use.
const ENABLE: u8 = 1;
/// Message control: how many messages the function would like, as a power of two.
const CAPABLE: u8 = 0x0e;
/// Message control: how many it has, likewise.
const GIVEN: u8 = 0x70;
/// Message control: addresses have 64 bits.
const WIDE: u8 = 1 << 7;

/// Offsets in the capability.
const CONTROL: usize = 2;
const ADDRESS: usize = 4;

/// The capability, from its ID on.
pub(super) struct Msi {
    bytes: [u8; 14],
    len: usize,
    most: u16,
    interrupts: Vec<Box<dyn Interrupt>>,
}

impl Msi {
    /// The capability that a function has, with its first bytes, of which the guest may use `most` messages.
    pub(super) fn new(head: [u8; 4], most: u16) -> Self {
        let [id, next, control, _] = head;
        let wide = control & WIDE != 0;
        let mut bytes = [0; 14];
        bytes[..3].copy_from_slice(&[id, next, control & (CAPABLE | WIDE)]);
        Self { bytes, len: if wide { 14 } else { 10 }, most, interrupts: Vec::new() }
    }

    /// Its bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }

    /// Writes a byte of it, those bits that a guest may write.
    pub(super) fn write(&mut self, at: usize, new: u8) {
        let data = self.len - 2;
        let mask = match at {
            CONTROL => ENABLE | GIVEN,
            ADDRESS => 0xfc,
            _ if at > ADDRESS && at < data + 2 => 0xff,
            _ => 0,
        };
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte = *byte & !mask | new & mask;
        }
    }

    /// Whether the function interrupts by it.
    pub(super) fn is_on(&self) -> bool {
        !self.interrupts.is_empty()
    }

    /// How many messages the guest has switched on.
    fn wanted(&self) -> u16 {
        let control = self.bytes[CONTROL];
        let capable = 1_u16 << ((control & CAPABLE) >> 1).min(5);
        let given = 1_u16 << ((control & GIVEN) >> 4).min(5);
        if control & ENABLE == 0 { 0 } else { given.min(capable).min(self.most) }
    }

    /// The message with this number: its low bits say which it is.
    fn message(&self, number: u16) -> MsiMessage {
        let byte = |at: usize| self.bytes.get(at).copied().unwrap_or(0);
        let low = u32::from_le_bytes([4, 5, 6, 7].map(byte));
        let wide = self.len == 14;
        let high = if wide { u32::from_le_bytes([8, 9, 10, 11].map(byte)) } else { 0 };
        let data = u16::from_le_bytes([byte(self.len - 2), byte(self.len - 1)]);
        let data = data & !(self.wanted().max(1) - 1) | number;
        MsiMessage { address: u64::from(high) << 32 | u64::from(low), data: data.into() }
    }

    /// Makes the function's interrupts what the capability says.
    ///
    /// # Errors
    /// The host or the hypervisor refuses.
    pub(super) fn apply(&mut self, physical: &dyn Physical, interrupts: &Arc<dyn Interrupts>) -> io::Result<()> {
        let wanted = self.wanted();
        let changes = self.interrupts.len() != usize::from(wanted);
        if changes && !self.interrupts.is_empty() {
            physical.signal_to(Signals::Msi, &[])?;
            self.interrupts.clear();
        }
        if changes {
            self.interrupts = (0..wanted).map(|_| interrupts.create()).collect::<io::Result<_>>()?;
        }
        for (number, interrupt) in (0..).zip(&self.interrupts) {
            interrupt.set(Some(self.message(number)))?;
        }
        if changes && wanted > 0 {
            let events: Vec<_> = self.interrupts.iter().map(|interrupt| interrupt.event()).collect();
            let signalled = physical.signal_to(Signals::Msi, &events);
            if signalled.is_err() {
                self.interrupts.clear();
            }
            return signalled;
        }
        Ok(())
    }
}
