//! The memory map that a kernel is handed: the one of E820 and of PVH, which share their numbers for kinds.

use hal::GpaRange;
use linux_loader::bootparam::E820_MAX_ENTRIES_ZEROPAGE;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::super::layout;
use super::super::platform::Platform;
use super::error::MemoryError;

/// What a range of the memory map is (ACPI 6.5 §15, table 15.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Ram,
    Reserved,
    AcpiTables,
}

impl Kind {
    /// Its number in the map, which both protocols share.
    pub(super) fn number(self) -> u32 {
        match self {
            Self::Ram => 1,
            Self::Reserved => 2,
            Self::AcpiTables => 3,
        }
    }
}

/// A range of addresses, the end excluded. Never wraps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    start: u64,
    end: u64,
}

impl Span {
    pub(super) fn new(start: u64, end: u64) -> Self {
        Self { start, end: end.max(start) }
    }

    pub(super) fn start(self) -> u64 {
        self.start
    }

    pub(super) fn end(self) -> u64 {
        self.end
    }

    pub(super) fn len(self) -> u64 {
        self.end - self.start
    }

    pub(super) fn cut(self, start: u64, end: u64) -> Self {
        Self::new(self.start.max(start), self.end.min(end))
    }
}

impl From<GpaRange> for Span {
    fn from(range: GpaRange) -> Self {
        Self::new(range.start, range.start.saturating_add(range.len))
    }
}

/// The memory map, by ascending address.
#[derive(Debug)]
pub(super) struct MemoryMap {
    entries: Vec<(Span, Kind)>,
    kernel_ram: Span,
}

impl MemoryMap {
    /// The map of this memory: RAM without the area that a PC keeps for video memory and firmware, the ACPI tables
    /// with the reset vector behind them, and ECAM, which Linux uses only where it finds it reserved.
    ///
    /// # Errors
    /// [`MemoryError`] where there is no RAM for a kernel, or the map is too long for a zero page.
    pub(super) fn new(memory: &GuestMemoryMmap, platform: &Platform) -> Result<Self, MemoryError> {
        let mut ram: Vec<Span> = Vec::new();
        for region in memory.iter() {
            let region = Span::from(GpaRange { start: region.start_addr().0, len: region.len() });
            for part in [region.cut(0, layout::LOW_RAM_END), region.cut(layout::HIGH_RAM_START, u64::MAX)] {
                match ram.last_mut() {
                    _ if part.len() == 0 => {}
                    Some(last) if last.end == part.start => last.end = part.end,
                    _ => ram.push(part),
                }
            }
        }
        let low_end = layout::CMDLINE + layout::CMDLINE_MAX;
        if !ram.iter().any(|span| span.start == 0 && span.end >= low_end) {
            return Err(MemoryError::TooSmall { at: 0 });
        }
        let kernel_ram = ram.iter().find(|span| span.start == layout::HIGH_RAM_START).copied();
        let kernel_ram = kernel_ram.ok_or(MemoryError::TooSmall { at: layout::HIGH_RAM_START })?;

        let mut entries: Vec<(Span, Kind)> = ram.into_iter().map(|span| (span, Kind::Ram)).collect();
        let firmware = Span::new(layout::ACPI_TABLES.start, layout::HIGH_RAM_START);
        entries.push((firmware, Kind::AcpiTables));
        entries.extend(platform.host_bridges.iter().map(|bridge| (bridge.ecam().into(), Kind::Reserved)));
        entries.sort_by_key(|(span, _)| span.start);
        if entries.len() > E820_MAX_ENTRIES_ZEROPAGE {
            return Err(MemoryError::TooManyRanges { entries: entries.len(), max: E820_MAX_ENTRIES_ZEROPAGE });
        }
        Ok(Self { entries, kernel_ram })
    }

    pub(super) fn entries(&self) -> &[(Span, Kind)] {
        &self.entries
    }

    /// All RAM.
    pub(super) fn ram(&self) -> impl Iterator<Item = Span> {
        self.entries.iter().filter(|(_, kind)| *kind == Kind::Ram).map(|(span, _)| *span)
    }

    /// The RAM from 1 MiB up to the hole below 4 GiB, where kernel and initramfs go.
    pub(super) fn kernel_ram(&self) -> Span {
        self.kernel_ram.cut(0, layout::HOLE_START)
    }
}
