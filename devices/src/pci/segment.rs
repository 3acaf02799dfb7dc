//! A PCI segment with its root bus: configuration accesses through ECAM (PCIe 5.0 §7.2.2), and base address
//! registers that follow the guest's wishes on the bus of memory-mapped registers.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{BarKind, Bars, PciFunction};
use crate::bus::{Bus, BusDevice};

/// Bytes of configuration space per function.
const FUNCTION_LEN: u64 = 4096;
/// Bytes of configuration space per bus.
const BUS_LEN: u64 = 256 * FUNCTION_LEN;
/// The header type register, whose bit 7 tells of further functions in a device (PCI 3.0 §6.2.1).
const HEADER_TYPE: u16 = 0x0e;

/// A device and function number on the root bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device, self.function)
    }
}

/// Guest physical addresses that base address registers may have. The platform's tables tell the guest the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above 4 GiB, for 64-bit registers.
    pub high: Range<u64>,
}

/// Why a function cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such device or function number, or it is taken.
    #[error("PCI address {0} is taken or does not exist")]
    Taken(Address),
    /// All 32 devices are there.
    #[error("no PCI device number is free on the root bus")]
    Full,
    /// A base address register finds no place.
    #[error("no room for {size:#x} bytes of PCI memory")]
    NoRoom {
        /// The register's size in bytes.
        size: u64,
    },
}

struct Slot {
    address: Address,
    function: Arc<dyn PciFunction>,
    /// Where each base address register answers.
    mapped: [Option<u64>; 6],
}

/// A segment with one root bus, number 0.
pub struct PciSegment {
    mmio: Arc<Bus>,
    windows: Windows,
    /// Locked before a function's own lock, never while one is held.
    slots: Mutex<Vec<Slot>>,
}

impl fmt::Debug for PciSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slots = self.lock();
        f.debug_list().entries(slots.iter().map(|slot| slot.address)).finish()
    }
}

impl PciSegment {
    /// A segment without functions, whose base address registers appear on `mmio` within `windows`.
    pub fn new(mmio: Arc<Bus>, windows: Windows) -> Self {
        Self { mmio, windows, slots: Mutex::new(Vec::new()) }
    }

    /// Length in bytes of the ECAM window, which the machine puts on its bus with this segment as the device.
    pub fn ecam_len(&self) -> u64 {
        BUS_LEN
    }

    /// Adds a function as the next free device, and gives its base address registers addresses.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::NoRoom`].
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<Address, Error> {
        let free = {
            let slots = self.lock();
            (0..32).find(|device| slots.iter().all(|slot| slot.address.device != *device))
        };
        let address = Address { device: free.ok_or(Error::Full)?, function: 0 };
        self.add_at(address, function)?;
        Ok(address)
    }

    /// Adds a function at a given address, and gives its base address registers addresses.
    ///
    /// # Errors
    /// [`Error::Taken`] and [`Error::NoRoom`].
    pub fn add_at(&self, address: Address, function: Arc<dyn PciFunction>) -> Result<(), Error> {
        let mut slots = self.lock();
        let exists = address.device < 32 && address.function < 8;
        if !exists || slots.iter().any(|slot| slot.address == address) {
            return Err(Error::Taken(address));
        }
        let mut taken: Vec<Range<u64>> = slots.iter().flat_map(|slot| ranges(&slot.function.bars())).collect();
        for (index, bar) in function.bars().into_iter().enumerate() {
            let Some(bar) = bar else { continue };
            let place = self.place(&mut taken, bar.kind, bar.size)?;
            function.place_bar(index, place);
        }
        slots.push(Slot { address, function, mapped: [None; 6] });
        self.map_bars(&mut slots);
        Ok(())
    }

    /// Takes a function out: it answers nowhere any more.
    pub fn remove(&self, address: Address) -> Option<Arc<dyn PciFunction>> {
        let mut slots = self.lock();
        let at = slots.iter().position(|slot| slot.address == address)?;
        let mut slot = slots.remove(at);
        self.unmap_where(&mut slot, |_, _| true);
        self.map_bars(&mut slots);
        Some(slot.function)
    }

    /// Looks at all base address registers again, after functions were restored.
    pub fn refresh(&self) {
        self.map_bars(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn function(&self, address: Address) -> Option<(Arc<dyn PciFunction>, bool)> {
        let slots = self.lock();
        let slot = slots.iter().find(|slot| slot.address == address)?;
        let siblings = slots.iter().filter(|other| other.address.device == address.device);
        Some((Arc::clone(&slot.function), siblings.count() > 1))
    }

    /// The lowest free place for a register, in the high window where it may go there.
    fn place(&self, taken: &mut Vec<Range<u64>>, kind: BarKind, size: u64) -> Result<u64, Error> {
        let windows = match kind {
            BarKind::Memory64 => vec![&self.windows.high, &self.windows.low],
            BarKind::Memory32 => vec![&self.windows.low],
        };
        let place = windows.into_iter().find_map(|window| first_fit(window, taken, size));
        let place = place.ok_or(Error::NoRoom { size })?;
        taken.push(place..place + size);
        Ok(place)
    }

    /// Makes the bus answer where the registers of all functions say. A register that claims another's addresses,
    /// or addresses outside the windows, answers nowhere until its address is sensible and free.
    fn map_bars(&self, slots: &mut [Slot]) {
        for slot in slots.iter_mut() {
            let wanted = self.wanted(slot);
            self.unmap_where(slot, |index, at| wanted.get(index).copied().flatten() != Some(at));
        }
        for slot in slots.iter_mut() {
            let wanted = self.wanted(slot);
            let bars = slot.function.bars();
            for (index, (mapped, wanted)) in slot.mapped.iter_mut().zip(wanted).enumerate() {
                let (None, Some(at), Some(Some(bar))) = (&mapped, wanted, bars.get(index)) else {
                    continue;
                };
                let memory = BarMemory { function: Arc::clone(&slot.function), index };
                if let Err(e) = self.mmio.insert(at, bar.size, Arc::new(memory)) {
                    tracing::debug!("BAR {index} of {} is not mapped: {e}", slot.address);
                    continue;
                }
                *mapped = Some(at);
                slot.function.bar_mapped(index, Some(at));
            }
        }
    }

    /// Where each register of a function should answer.
    fn wanted(&self, slot: &Slot) -> [Option<u64>; 6] {
        if !slot.function.memory_enabled() {
            return [None; 6];
        }
        slot.function.bars().map(|bar| {
            let bar = bar?;
            let last = bar.address.checked_add(bar.size - 1)?;
            let within = |window: &Range<u64>| window.contains(&bar.address) && window.contains(&last);
            (within(&self.windows.low) || within(&self.windows.high)).then_some(bar.address)
        })
    }

    fn unmap_where(&self, slot: &mut Slot, which: impl Fn(usize, u64) -> bool) {
        for (index, mapped) in slot.mapped.iter_mut().enumerate() {
            if let Some(at) = mapped.take_if(|at| which(index, *at)) {
                if let Err(e) = self.mmio.remove(at) {
                    tracing::warn!("BAR {index} of {}: {e}", slot.address);
                }
                slot.function.bar_mapped(index, None);
            }
        }
    }
}

impl BusDevice for PciSegment {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let found = decode(offset, data.len())
            .and_then(|(address, register)| Some((self.function(address)?, address, register)));
        let Some(((function, multifunction), address, register)) = found else {
            data.fill(0xff);
            return;
        };
        function.config_read(register, data);
        if multifunction
            && address.function == 0
            && let Some(at) = HEADER_TYPE.checked_sub(register)
            && let Some(byte) = data.get_mut(usize::from(at))
        {
            *byte |= 0x80;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((address, register)) = decode(offset, data.len()) else {
            return;
        };
        let Some((function, _)) = self.function(address) else {
            return;
        };
        function.config_write(register, data);
        // The command register and the base address registers lie in 0x04 to 0x27.
        if register < 0x28 {
            self.map_bars(&mut self.lock());
        }
    }
}

/// The function and register that an offset into ECAM stands for.
fn decode(offset: u64, len: usize) -> Option<(Address, u16)> {
    if offset >= BUS_LEN {
        return None;
    }
    let register = offset % FUNCTION_LEN;
    let end = register.checked_add(u64::try_from(len).ok()?)?;
    let address =
        Address { device: u8::try_from(offset >> 15 & 31).ok()?, function: u8::try_from(offset >> 12 & 7).ok()? };
    (end <= FUNCTION_LEN).then_some((address, u16::try_from(register).ok()?))
}

fn ranges(bars: &Bars) -> Vec<Range<u64>> {
    let end = |address: u64, size: u64| address.saturating_add(size);
    bars.iter().flatten().map(|bar| bar.address..end(bar.address, bar.size)).collect()
}

/// The lowest multiple of `size` in `window` from which `size` addresses are free.
fn first_fit(window: &Range<u64>, taken: &[Range<u64>], size: u64) -> Option<u64> {
    let mut at = window.start.checked_next_multiple_of(size)?;
    loop {
        let end = at.checked_add(size)?;
        if end > window.end {
            return None;
        }
        match taken.iter().find(|other| other.start < end && at < other.end) {
            // Its end is beyond `at`, so this comes to an end.
            Some(other) => at = other.end.checked_next_multiple_of(size)?,
            None => return Some(at),
        }
    }
}

/// The memory of one base address register, on the bus.
struct BarMemory {
    function: Arc<dyn PciFunction>,
    index: usize,
}

impl BusDevice for BarMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.index, offset, data);
    }
}

#[cfg(test)]
mod tests;
