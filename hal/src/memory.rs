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

impl GpaRange {
    /// What two ranges have in common.
    pub fn common(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.start.saturating_add(self.len).min(other.start.saturating_add(other.len));
        (start < end).then(|| Self { start, len: end - start })
    }
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
    /// It is memory of a device's: it has no private side, and nothing converts it.
    pub device: bool,
}

impl Slot {
    /// A writable slot whose writes are not logged.
    pub fn new(region: Arc<GuestRegionMmap>) -> Self {
        Self { region, readonly: false, log_dirty: false, device: false }
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

    /// Makes memory of a confidential guest private or shared; what it held on the other side is lost. What is so already
    /// stays untouched. Addresses without memory are shared as they are: a guest may say so of devices.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] where the VM's kind has no private memory, the range is not of whole pages, what is to be
    /// private is not all mapped, or too many separate pieces are shared; [`crate::Error::System`] where the hypervisor refuses.
    fn convert(&self, range: GpaRange, to: Visibility) -> Result<()>;

    /// Whether guest and monitor see the same in all of a mapped range: always, where the VM's kind has no private memory.
    fn is_shared(&self, range: GpaRange) -> bool;

    /// The memory that a confidential guest has shared, in ascending order and with neighbours joined; nothing, where the
    /// VM's kind has no private memory.
    fn shared(&self) -> Vec<GpaRange>;
}
