//! Configuration space of a function of the host's, as its guest sees it.

use super::msi::Msi;
use super::{Physical, Region, Signals};
use crate::pci::{
    Bar, BarKind, Bars, CAPABILITY_MSI, CAPABILITY_MSIX, CONTROL_ENABLE, CONTROL_FUNCTION_MASK, ConfigSpace, ENTRY_LEN,
    Identity,
};

/// Bytes of conventional configuration space: what lies beyond is not shown.
const LEN: u16 = 256;
pub(super) const COMMAND: u16 = 0x04;
/// Command: the function answers to accesses of I/O ports, which it never does here; of memory, which the monitor sees to; and
/// INTx is off, as it always is.
const COMMAND_IO: u8 = 1;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_NO_INTX: u8 = 1 << 2;
const HEADER_TYPE: u16 = 0x0e;
const MULTIFUNCTION: u8 = 1 << 7;
const BAR0: u16 = 0x10;
const BARS_END: u16 = 0x28;
const ROM: u16 = 0x30;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT_LINE: u16 = 0x3c;
const INTERRUPT_PIN: u16 = 0x3d;

const CAPABILITY_POWER: u8 = 0x01;
/// The power management capability's control and status register, and its power state (PCI PM 1.2 §3.2.4).
const POWER_CONTROL: u16 = 4;
const POWER_STATE: u8 = 3;
/// Bits of message control of MSI-X that a guest may write.
const MSIX_WRITABLE: u16 = CONTROL_ENABLE | CONTROL_FUNCTION_MASK;
/// Vectors less one, in message control.
const MSIX_SIZE: u16 = 0x7ff;

/// Where a structure lies in memory of a base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) bar: u8,
    pub(super) offset: u64,
}

impl Place {
    fn new(register: u32) -> Self {
        Self { bar: u8::try_from(register & 7).unwrap_or(0), offset: u64::from(register & !7) }
    }
}

/// The MSI-X capability.
pub(super) struct Msix {
    at: u16,
    control: u16,
    table: Place,
    pending: Place,
}

/// What MSI-X has in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Structure {
    Table,
    Pending,
}

impl Msix {
    /// Its structures: where each lies, and its length in bytes.
    pub(super) fn structures(&self) -> [(Structure, Place, u64); 2] {
        let count = u64::from(self.vectors());
        let pending = count.div_ceil(64) * 8;
        [(Structure::Table, self.table, count * ENTRY_LEN), (Structure::Pending, self.pending, pending)]
    }

    pub(super) fn vectors(&self) -> u16 {
        (self.control & MSIX_SIZE) + 1
    }

    pub(super) fn control(&self) -> u16 {
        self.control
    }

    pub(super) fn is_on(&self) -> bool {
        self.control & CONTROL_ENABLE != 0
    }
}

/// What of configuration space is the monitor's. All else is the function's own, as the host's kernel lets it be seen.
pub(super) struct Config {
    /// Base address registers, the command register's memory bit, the interrupt line.
    header: ConfigSpace,
    pub(super) msi: Option<Msi>,
    msi_at: u16,
    pub(super) msix: Option<Msix>,
    /// The register with the power state, and what it says.
    power: Option<(u16, u8)>,
}

fn read<const N: usize>(physical: &dyn Physical, at: u16) -> [u8; N] {
    let mut bytes = [0; N];
    physical.read(Region::Config, at.into(), &mut bytes);
    bytes
}

/// The function's capabilities: offset and ID of each.
fn capabilities(physical: &dyn Physical) -> Vec<(u16, u8)> {
    let mut found = Vec::new();
    let [mut next] = read(physical, CAPABILITIES);
    // A function may have a loop of them; more than this do not fit.
    while next >= 0x40 && next != 0xff && found.len() < 48 {
        let at = u16::from(next & !3);
        let [id, after] = read(physical, at);
        found.push((at, id));
        next = after;
    }
    found
}

impl Config {
    /// What the guest sees first of a function.
    pub(super) fn new(physical: &dyn Physical) -> Self {
        // Registers that the monitor answers for; who it is, the function says itself.
        let nobody = Identity { vendor: 0, device: 0, revision: 0, class: 0, subsystem_vendor: 0, subsystem: 0 };
        let mut config = Self { header: ConfigSpace::new(&nobody), msi: None, msi_at: 0, msix: None, power: None };
        config.add_bars(physical);
        for (at, id) in capabilities(physical) {
            match id {
                CAPABILITY_POWER => config.power = Some((at + POWER_CONTROL, 0)),
                CAPABILITY_MSI if physical.signals(Signals::Msi) > 0 => {
                    config.msi = Some(Msi::new(read(physical, at), physical.signals(Signals::Msi)));
                    config.msi_at = at;
                }
                CAPABILITY_MSIX if physical.signals(Signals::Msix) > 0 => {
                    let [low, high] = read(physical, at + 2);
                    let [table, pending] =
                        [at + 4, at + 8].map(|at| Place::new(u32::from_le_bytes(read(physical, at))));
                    let control = u16::from_le_bytes([low, high]) & MSIX_SIZE;
                    config.msix = Some(Msix { at, control, table, pending });
                }
                _ => {}
            }
        }
        config
    }

    /// Base address registers of memory, as large as the function's.
    fn add_bars(&mut self, physical: &dyn Physical) {
        let mut bars = 0..6_u8;
        while let Some(bar) = bars.next() {
            let size = physical.len(Region::Bar(bar));
            let [kind] = read(physical, BAR0 + 4 * u16::from(bar));
            // Bit 0: I/O ports; bit 2: the address has 64 bits, and takes the next register, too.
            if kind & 1 == 0 && size.is_power_of_two() && size >= 16 {
                let kind = if kind & 4 != 0 { BarKind::Memory64 } else { BarKind::Memory32 };
                self.header.add_bar(bar.into(), kind, size);
            }
            if kind & 5 == 4 {
                bars.next();
            }
        }
    }

    /// The byte at an offset, where it is not the function's own, which is `own`.
    fn shown(&self, at: u16, own: u8) -> u8 {
        let header = || {
            let mut byte = [0];
            self.header.read(at, &mut byte);
            byte[0]
        };
        match at {
            COMMAND => own & !(COMMAND_IO | COMMAND_MEMORY) | header() & COMMAND_MEMORY,
            HEADER_TYPE => own & !MULTIFUNCTION,
            BAR0..BARS_END | INTERRUPT_LINE => header(),
            ROM..CAPABILITIES | INTERRUPT_PIN | LEN.. => 0,
            _ => self.shown_capability(at, own),
        }
    }

    fn shown_capability(&self, at: u16, own: u8) -> u8 {
        if let Some((_, state)) = self.power.filter(|(register, _)| *register == at) {
            return own & !POWER_STATE | state;
        }
        if let Some(msix) = self.msix.as_ref().filter(|msix| msix.at + 2 == at || msix.at + 3 == at) {
            return msix.control.to_le_bytes()[usize::from(at - msix.at - 2)];
        }
        let msi = self.msi.as_ref().and_then(|msi| msi.bytes().get(usize::from(at.checked_sub(self.msi_at)?)));
        msi.copied().unwrap_or(own)
    }

    /// Whether a byte is the monitor's, and no write to it reaches the function.
    fn is_kept(&self, at: u16) -> bool {
        let within = |start: u16, len: usize| at >= start && usize::from(at - start) < len;
        let msi = self.msi.as_ref().is_some_and(|msi| within(self.msi_at, msi.bytes().len()));
        let msix = self.msix.as_ref().is_some_and(|msix| within(msix.at, 12));
        let power = self.power.is_some_and(|(register, _)| within(register, 4));
        matches!(at, BAR0..BARS_END | ROM..CAPABILITIES | INTERRUPT_LINE | INTERRUPT_PIN | LEN..)
            || msi
            || msix
            || power
    }

    /// Reads.
    pub(super) fn read(&self, physical: &dyn Physical, offset: u16, data: &mut [u8]) {
        physical.read(Region::Config, offset.into(), data);
        for (at, byte) in (offset..).zip(data) {
            *byte = self.shown(at, *byte);
        }
    }

    /// Writes, of the function's own what the host's kernel allows.
    pub(super) fn write(&mut self, physical: &dyn Physical, offset: u16, data: &[u8]) {
        self.header.write(offset, data);
        for (at, new) in (offset..).zip(data) {
            self.keep(at, *new);
        }
        let mut data = data.to_vec();
        if let Some(command) = COMMAND.checked_sub(offset).and_then(|at| data.get_mut(usize::from(at))) {
            // Its memory always answers to the host, where it is mapped; whether it does to the guest, the monitor sees to.
            *command = *command & !COMMAND_IO | COMMAND_MEMORY;
        }
        if let Some(high) = (COMMAND + 1).checked_sub(offset).and_then(|at| data.get_mut(usize::from(at))) {
            *high |= COMMAND_NO_INTX;
        }
        let kept = |at: usize| u16::try_from(at).is_ok_and(|at| self.is_kept(offset.saturating_add(at)));
        let mut start = 0;
        while start < data.len() {
            let end = (start..data.len()).find(|at| kept(*at) != kept(start)).unwrap_or(data.len());
            if !kept(start) {
                physical.write(Region::Config, u64::from(offset) + start as u64, &data[start..end]);
            }
            start = end;
        }
    }

    fn keep(&mut self, at: u16, new: u8) {
        if let Some((register, state)) = &mut self.power
            && *register == at
        {
            *state = new & POWER_STATE;
        }
        if let Some(msix) = self.msix.as_mut().filter(|msix| msix.at + 3 == at) {
            msix.control = msix.control & !MSIX_WRITABLE | u16::from_le_bytes([0, new]) & MSIX_WRITABLE;
        }
        if let (Some(msi), Some(at)) = (&mut self.msi, at.checked_sub(self.msi_at)) {
            msi.write(at.into(), new);
        }
    }

    /// The base address registers as they stand.
    pub(super) fn bars(&self) -> Bars {
        self.header.bars()
    }

    /// One of them.
    pub(super) fn bar(&self, index: usize) -> Option<Bar> {
        self.bars().get(index).copied().flatten()
    }

    /// Gives a base address register an address.
    pub(super) fn place_bar(&mut self, index: usize, address: u64) {
        self.header.place_bar(index, address);
    }

    /// Whether the guest lets the function answer to memory accesses.
    pub(super) fn memory_enabled(&self) -> bool {
        self.header.memory_enabled()
    }
}
