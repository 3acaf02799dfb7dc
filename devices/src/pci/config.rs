//! Configuration space of a function (PCI 3.0 §6.1) or a bridge (PCIe 5.0 §7.5.1.3), with which bits the guest may write.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestRegionMmap, MemoryRegionAddress};

/// Bytes of conventional configuration space. The extended space above it holds no capability and reads as zero.
const LEN: usize = 256;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const CACHE_LINE: usize = 0x0c;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;

/// Command register: the function answers to accesses of I/O ports.
const COMMAND_IO: u16 = 1;
/// Command register: the function answers to memory accesses.
const COMMAND_MEMORY: u8 = 1 << 1;
/// Command register bits that do something or that drivers expect to keep: memory, bus master, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0406;
/// Status register: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// The first capability stands behind the header.
const FIRST_CAPABILITY: usize = 0x40;

/// The MSI capability (PCI 3.0 §6.8.1).
pub(crate) const CAPABILITY_MSI: u8 = 0x05;
/// The PCI Express capability (PCIe 5.0 §7.5.3).
pub(super) const CAPABILITY_PCIE: u8 = 0x10;

/// Registers of a bridge: header type, bus numbers, memory windows, bridge control (PCIe 5.0 §7.5.1.3).
const HEADER_TYPE: usize = 0x0e;
const BUS_NUMBERS: usize = 0x18;
const MEMORY_WINDOW: usize = 0x20;
const PREFETCHABLE_WINDOW: usize = 0x24;
const BRIDGE_CONTROL: usize = 0x3e;
/// Low bits of both registers of the prefetchable window: its addresses have 64 bits.
const WINDOW_64_BIT: u8 = 1;

/// What a function says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code: base class, subclass and interface in bits 23 to 0.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// The width of a base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// Memory anywhere below 4 GiB.
    Memory32,
    /// Memory anywhere. It takes two registers.
    Memory64,
}

/// A base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Its width.
    pub kind: BarKind,
    /// Length of its memory in bytes, a power of two of at least 16.
    pub size: u64,
    /// The address that is programmed, which need not be a sensible one.
    pub address: u64,
}

/// The six base address registers; the upper half of a 64-bit one is `None`.
pub type Bars = [Option<Bar>; 6];

/// Configuration space of one function.
#[derive(Debug)]
pub struct ConfigSpace {
    bytes: Box<[u8; LEN]>,
    /// Bits that the guest may write.
    writable: Box<[u8; LEN]>,
    bars: [Option<(BarKind, u64)>; 6],
    /// Where the next capability goes.
    end: usize,
    /// The byte that points to the next capability.
    link: usize,
    /// Memory in which the guest reads all of this, and where in it.
    shown: Option<(Arc<GuestRegionMmap>, u64)>,
}

/// What the guest set in configuration space: a saved [`ConfigSpace`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigState {
    bytes: Vec<u8>,
}

impl ConfigSpace {
    /// Configuration space without capabilities and base address registers.
    pub fn new(identity: &Identity) -> Self {
        let mut config = Self::bare(identity);
        config.set(0x2c, &identity.subsystem_vendor.to_le_bytes());
        config.set(0x2e, &identity.subsystem.to_le_bytes());
        config
    }

    /// Configuration space of a bridge: bus numbers, a 32-bit and a 64-bit prefetchable memory window, no I/O window and
    /// no base address registers. A bridge has no subsystem in its header.
    pub fn bridge(identity: &Identity) -> Self {
        let mut config = Self::bare(identity);
        config.set(HEADER_TYPE, &[1]);
        config.set_writable(BUS_NUMBERS, &[0xff; 3]);
        config.set_writable(MEMORY_WINDOW, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set(PREFETCHABLE_WINDOW, &[WINDOW_64_BIT, 0, WINDOW_64_BIT, 0]);
        config.set_writable(PREFETCHABLE_WINDOW, &[0xf0, 0xff, 0xf0, 0xff]);
        config.set_writable(PREFETCHABLE_WINDOW + 4, &[0xff; 8]);
        // Responses to parity and system errors, which there are none of. A secondary bus reset does nothing.
        config.set_writable(BRIDGE_CONTROL, &[0x03]);
        config
    }

    fn bare(identity: &Identity) -> Self {
        let mut config = Self {
            bytes: Box::new([0; LEN]),
            writable: Box::new([0; LEN]),
            bars: [None; 6],
            end: FIRST_CAPABILITY,
            link: CAPABILITIES,
            shown: None,
        };
        let [interface, subclass, base, _] = identity.class.to_le_bytes();
        config.set(0x00, &identity.vendor.to_le_bytes());
        config.set(0x02, &identity.device.to_le_bytes());
        config.set(0x08, &[identity.revision, interface, subclass, base]);
        config.set_writable(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        config.set_writable(CACHE_LINE, &[0xff]);
        config.set_writable(INTERRUPT_LINE, &[0xff]);
        config
    }

    /// Lets the guest switch the function's answers to accesses of I/O ports on and off, too.
    pub(super) fn allow_io(&mut self) {
        self.set_writable(COMMAND, &(COMMAND_WRITABLE | COMMAND_IO).to_le_bytes());
    }

    /// Adds a base address register of `size` bytes (a power of two of at least 16), not prefetchable.
    pub fn add_bar(&mut self, index: usize, kind: BarKind, size: u64) {
        let Some(slot) = self.bars.get_mut(index) else {
            return;
        };
        *slot = Some((kind, size));
        let mask = (!(size - 1)).to_le_bytes();
        let len = match kind {
            BarKind::Memory32 => 4,
            BarKind::Memory64 => 8,
        };
        let at = BAR0 + 4 * index;
        self.set_writable(at, mask.get(..len).unwrap_or_default());
        if kind == BarKind::Memory64 {
            // Bits 2 and 1: located anywhere in 64 bits.
            self.set(at, &[0b100]);
        }
    }

    /// Adds a capability: `body` follows its ID and link. Returns its offset, or `None` where it does not fit.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Option<u16> {
        let at = self.end;
        let end = at.checked_add(2 + body.len())?.next_multiple_of(4);
        if end > LEN {
            return None;
        }
        let pointer = u8::try_from(at).ok()?;
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.set_writable(at + 2, writable);
        self.set(self.link, &[pointer]);
        let [status] = self.array(STATUS);
        self.set(STATUS, &[status | STATUS_CAPABILITIES]);
        self.link = at + 1;
        self.end = end;
        Some(u16::from(pointer))
    }

    /// Adds the PCI Express capability of a root complex integrated endpoint (PCIe 5.0 §7.5.3), which has no link.
    pub fn add_pcie_endpoint(&mut self) -> Option<u16> {
        let mut body = [0_u8; 0x3a];
        let mut writable = [0_u8; 0x3a];
        // PCI Express capabilities: version 2, device type 9. Device capabilities: role-based error reporting.
        body[..4].copy_from_slice(&[0x92, 0x00, 0x00, 0x80]);
        // Device control: error reporting enables, relaxed ordering, no snoop, largest read request.
        writable[6..8].copy_from_slice(&[0x1f, 0x78]);
        self.add_capability(CAPABILITY_PCIE, &body, &writable)
    }

    /// Reads; beyond the conventional space there is nothing but zeros.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes those bits that the guest may write.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, new) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | new & mask;
            }
        }
        self.show_part(offset.into(), data.len());
    }

    /// Sets bytes, whether or not the guest may write them.
    pub fn set(&mut self, at: usize, data: &[u8]) {
        if let Some(bytes) = self.bytes.get_mut(at..at + data.len()) {
            bytes.copy_from_slice(data);
        }
        self.show_part(at, data.len());
    }

    /// Shows the space in memory that the guest can only read, from `at` bytes of `pages` on: from now on it says there what
    /// [`ConfigSpace::read`] says. `pages` are new, and `at` is a multiple of 4.
    pub fn show(&mut self, pages: Arc<GuestRegionMmap>, at: u64) {
        self.shown = Some((pages, at));
        self.show_part(0, LEN);
    }

    /// Brings a part up to date where it is shown, whole registers at a time, so that no guest sees a half of one.
    fn show_part(&self, start: usize, len: usize) {
        let Some((pages, base)) = &self.shown else { return };
        for at in (start & !3..(start + len).min(LEN)).step_by(4) {
            let place = base.checked_add(at as u64).map(MemoryRegionAddress);
            let value = u32::from_ne_bytes(self.array(at));
            if place.is_none_or(|place| pages.store(value, place, Ordering::Release).is_err()) {
                tracing::error!("configuration space at {at:#x} is shown nowhere");
            }
        }
    }

    fn array<const N: usize>(&self, at: usize) -> [u8; N] {
        self.bytes.get(at..).and_then(|bytes| bytes.first_chunk().copied()).unwrap_or([0; N])
    }

    fn set_writable(&mut self, at: usize, mask: &[u8]) {
        if let Some(bytes) = self.writable.get_mut(at..at + mask.len()) {
            bytes.copy_from_slice(mask);
        }
    }

    /// A 32-bit register, whichever the guest may write of it.
    pub fn dword(&self, offset: u16) -> u32 {
        let mut data = [0; 4];
        self.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    /// True while the function may answer to memory accesses.
    pub fn memory_enabled(&self) -> bool {
        self.bytes.get(COMMAND).is_some_and(|command| command & COMMAND_MEMORY != 0)
    }

    /// The base address registers as they stand.
    pub fn bars(&self) -> Bars {
        let mut bars = [None; 6];
        for (index, (bar, spec)) in bars.iter_mut().zip(&self.bars).enumerate() {
            let Some((kind, size)) = *spec else { continue };
            // Six registers of four bytes: the offset is of 8 bits.
            let at = u16::try_from(BAR0 + 4 * index).unwrap_or(0);
            let low = u64::from(self.dword(at));
            let value = match kind {
                BarKind::Memory32 => low,
                BarKind::Memory64 => u64::from(self.dword(at + 4)) << 32 | low,
            };
            *bar = Some(Bar { kind, size, address: value & !(size - 1) });
        }
        bars
    }

    /// Programs a base address register.
    pub fn place_bar(&mut self, index: usize, address: u64) {
        let Some(Some((kind, _))) = self.bars.get(index).copied() else {
            return;
        };
        let bytes = address.to_le_bytes();
        let len = match kind {
            BarKind::Memory32 => 4,
            BarKind::Memory64 => 8,
        };
        // The guest's own way, which keeps the kind's bits.
        let at = u16::try_from(BAR0 + 4 * index).unwrap_or(0);
        self.write(at, bytes.get(..len).unwrap_or_default());
    }

    /// What to save.
    pub fn save(&self) -> ConfigState {
        ConfigState { bytes: self.bytes.to_vec() }
    }

    /// Puts back what the guest had set. What it cannot write stays as this function has it.
    pub fn restore(&mut self, state: &ConfigState) {
        self.write(0, &state.bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        revision: 1,
        class: 0x01_80_02,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1100,
    };

    fn space() -> ConfigSpace {
        let mut config = ConfigSpace::new(&IDENTITY);
        config.add_bar(0, BarKind::Memory64, 0x8000);
        config.add_bar(2, BarKind::Memory32, 0x1000);
        config.add_pcie_endpoint().unwrap();
        config.add_capability(0x09, &[6, 1, 2, 3], &[]).unwrap();
        config
    }

    #[test]
    fn the_header_tells_who_it_is() {
        let config = space();
        assert_eq!(config.dword(0), 0x1042_1af4);
        assert_eq!(config.dword(8), 0x0180_0201);
        assert_eq!(config.dword(0x2c), 0x1100_1af4);
        assert_eq!(config.dword(0x34), 0x40);
        assert_eq!(config.dword(0x40) & 0xffff, 0x7c10);
        assert_eq!(config.dword(0x7c) & 0xffff, 0x0009);
        assert_eq!(config.dword(0x100), 0);
    }

    #[test]
    fn sizing_shows_the_size_and_the_address_comes_back() {
        let mut config = space();
        config.place_bar(0, 0x40_0000_8000);
        config.place_bar(2, 0xc000_1000);
        config.write(0x10, &[0xff; 8]);
        assert_eq!(config.dword(0x10), 0xffff_8004);
        assert_eq!(config.dword(0x14), 0xffff_ffff);
        config.write(0x18, &[0xff; 8]);
        assert_eq!(config.dword(0x18), 0xffff_f000);
        assert_eq!(config.dword(0x1c), 0, "there is no register");
        config.write(0x10, &0x40_0000_8000_u64.to_le_bytes());
        let bars = config.bars();
        assert_eq!(bars[0].unwrap().address, 0x40_0000_8000);
        assert_eq!(bars[2].unwrap().address, 0xffff_f000);
        assert!(bars[1].is_none());
    }

    #[test]
    fn a_capability_that_does_not_fit_is_refused() {
        let mut config = space();
        assert_eq!(config.add_capability(9, &[0; 200], &[]), None);
        assert!(config.add_capability(9, &[0; 2], &[]).is_some());
    }

    proptest! {
        #[test]
        fn writes_change_nothing_that_is_read_only(
            writes in proptest::collection::vec((0..4096_u16, proptest::collection::vec(any::<u8>(), 1..9)), 0..200)
        ) {
            let mut config = space();
            let before = config.save();
            for (offset, data) in writes {
                config.write(offset, &data);
            }
            for (at, (new, old)) in config.save().bytes.iter().zip(&before.bytes).enumerate() {
                prop_assert_eq!((new ^ old) & !config.writable[at], 0, "byte {:#x}", at);
            }
            let mut copy = space();
            copy.restore(&config.save());
            prop_assert_eq!(copy.save(), config.save());
        }
    }
}
