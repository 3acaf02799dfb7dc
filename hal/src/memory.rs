//! Guest memory as a hypervisor sees it: slots that own their mapping.

use std::sync::Arc;

use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use crate::Result;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpaRange {
    /// The first address.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Whether the monitor can see a page of a confidential guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Visibility {
    /// Only the guest can read it.
    Private,
    /// Guest and monitor can read and write it.
    Shared,
}

/// A piece of guest memory to be mapped. It holds its host mapping for as long as the hypervisor uses it, so that
/// the one cannot outlive the other.
#[derive(Debug, Clone)]
pub struct Slot {
    /// Host memory and the guest physical address at which it appears. The start and the length are multiples of
    /// 4096 bytes.
    pub region: Arc<GuestRegionMmap>,
    /// Guest writes exit as MMIO writes instead of being carried out.
    pub readonly: bool,
    /// Guest writes are recorded for [`crate::DirtyLog`].
    pub log_dirty: bool,
}

impl Slot {
    /// A writable slot whose writes are not logged.
    pub fn new(region: Arc<GuestRegionMmap>) -> Self {
        Self { region, readonly: false, log_dirty: false }
    }

    /// The guest physical addresses that the slot covers.
    pub fn range(&self) -> GpaRange {
        GpaRange { start: self.region.start_addr().0, len: self.region.len() }
    }
}

/// The name of a mapped slot within its VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u32);

/// The guest's memory map.
pub trait Memory: Send + Sync {
    /// Makes a slot appear in the guest.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where it overlaps another slot, is empty or is not page-aligned, or where no slot
    /// is free; [`crate::Error::System`] where the hypervisor refuses.
    fn map(&self, slot: Slot) -> Result<SlotId>;

    /// Takes a slot out of the guest and hands its mapping back.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where there is no such slot; [`crate::Error::System`] where the hypervisor refuses.
    fn unmap(&self, id: SlotId) -> Result<Slot>;

    /// Changes pages of a confidential guest between private and shared.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the VM's kind has no private memory or the range is not mapped.
    fn convert(&self, range: GpaRange, to: Visibility) -> Result<()>;
}
