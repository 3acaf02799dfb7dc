//! The guest's memory map: slots, and the log of dirty pages in them.
#![expect(unsafe_code, reason = "KVM takes raw host addresses of guest memory")]

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

use super::failed;
use super::vm::Shared;
use crate::{DirtyLog, Error, GpaRange, Memory, Result, Slot, SlotId, Visibility};

const PAGE: u64 = 4096;

/// The slots of a VM, by their number in KVM.
pub(super) struct Slots {
    mapped: Mutex<BTreeMap<u32, Slot>>,
    max: u32,
    loggable: bool,
}

impl Slots {
    /// `max`: how many there may be; `loggable`: whether slots may ask for a dirty log.
    pub(super) fn new(max: u32, loggable: bool) -> Self {
        Self { mapped: Mutex::new(BTreeMap::new()), max, loggable }
    }

    fn map(&self, fd: &VmFd, slot: Slot) -> Result<SlotId> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        self.check(&mapped, &slot)?;
        let number = (0..self.max)
            .find(|number| !mapped.contains_key(number))
            .ok_or_else(|| invalid(format!("all {} slots of the VM are in use", self.max)))?;
        set_region(fd, number, &slot, slot.region.len())?;
        mapped.insert(number, slot);
        Ok(SlotId(number))
    }

    fn check(&self, mapped: &BTreeMap<u32, Slot>, slot: &Slot) -> Result<()> {
        let GpaRange { start, len } = slot.range();
        if len == 0 || !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(invalid(format!(
                "start {start:#x} and length {len:#x} must be multiples of {PAGE}, and the length not 0"
            )));
        }
        let end = start.checked_add(len).ok_or_else(|| invalid(format!("{start:#x} + {len:#x} is past 2^64")))?;
        if let Some(other) = mapped.values().map(Slot::range).find(|o| o.start < end && start < o.start + o.len) {
            return Err(invalid(format!(
                "{start:#x} to {end:#x} overlaps a slot at {:#x} to {:#x}",
                other.start,
                other.start + other.len
            )));
        }
        if slot.log_dirty && !self.loggable {
            return Err(invalid("a dirty log was asked for in a VM created without dirty bitmaps".into()));
        }
        Ok(())
    }

    fn unmap(&self, fd: &VmFd, id: SlotId) -> Result<Slot> {
        let mut mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = mapped.get(&id.0).ok_or_else(|| no_slot(id))?;
        set_region(fd, id.0, slot, 0)?;
        mapped.remove(&id.0).ok_or_else(|| no_slot(id))
    }

    fn collect(&self, fd: &VmFd, id: SlotId) -> Result<Vec<u64>> {
        // Held throughout, so that the slot cannot change its size between look and call.
        let mapped = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = mapped.get(&id.0).ok_or_else(|| no_slot(id))?;
        if !slot.log_dirty {
            return Err(invalid(format!("slot {} keeps no dirty log", id.0)));
        }
        let bytes = usize::try_from(slot.region.len()).map_err(|_| invalid("it exceeds the address space".into()))?;
        fd.get_dirty_log(id.0, bytes).map_err(failed("KVM_GET_DIRTY_LOG"))
    }
}

/// Places `slot` with a length of `len` bytes; 0 takes it away.
fn set_region(fd: &VmFd, number: u32, slot: &Slot, len: u64) -> Result<()> {
    let host = slot
        .region
        .get_host_address(MemoryRegionAddress(0))
        .map_err(|error| invalid(format!("its host memory has no address: {error}")))?;
    let mut flags = 0;
    if slot.readonly {
        flags |= KVM_MEM_READONLY;
    }
    if slot.log_dirty {
        flags |= KVM_MEM_LOG_DIRTY_PAGES;
    }
    let region = kvm_userspace_memory_region {
        slot: number,
        flags,
        guest_phys_addr: slot.range().start,
        memory_size: len,
        userspace_addr: host as u64,
    };
    // SAFETY: the host range is the whole of a mapping that `Slots` holds for as long as KVM has the slot: it is
    // stored right after this call, and leaves only after a call with length 0 or when the VM is closed.
    unsafe { fd.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
}

fn invalid(problem: String) -> Error {
    Error::Invalid { what: "memory slot", problem }
}

fn no_slot(id: SlotId) -> Error {
    invalid(format!("there is no slot {}", id.0))
}

impl Memory for Shared {
    fn map(&self, slot: Slot) -> Result<SlotId> {
        self.slots.map(&self.fd, slot)
    }

    fn unmap(&self, id: SlotId) -> Result<Slot> {
        self.slots.unmap(&self.fd, id)
    }

    fn convert(&self, _range: GpaRange, _to: Visibility) -> Result<()> {
        Err(Error::Invalid { what: "visibility", problem: "a standard VM has no private memory".into() })
    }

    fn is_shared(&self, _range: GpaRange) -> bool {
        true
    }

    fn shared(&self) -> Vec<GpaRange> {
        Vec::new()
    }
}

impl DirtyLog for Shared {
    fn collect(&self, slot: SlotId) -> Result<Vec<u64>> {
        self.slots.collect(&self.fd, slot)
    }
}
