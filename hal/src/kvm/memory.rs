//! The guest's memory map: slots, and the log of dirty pages in them.
#![expect(unsafe_code, reason = "KVM takes raw host addresses of guest memory")]

use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_MEM_GUEST_MEMFD, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, kvm_userspace_memory_region,
    kvm_userspace_memory_region2,
};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};

use super::failed;
use super::private::{self, PrivateSide};
use super::vm::Shared;
use crate::{DirtyLog, Error, GpaRange, KindTraits, Memory, Result, SharedRanges, Slot, SlotId, Visibility};

const PAGE: u64 = 4096;
/// The most ranges that a guest may share, none beside another: what devices of the host's can be told of, and few enough to
/// remember. Linux shares some dozens. Making memory private may split a range, so that has as much room again.
const MAX_PIECES: usize = 65_536;

/// The slots of a VM, by their number in KVM.
pub(super) struct Slots {
    map: Mutex<Map>,
    max: u32,
    loggable: bool,
    traits: &'static KindTraits,
}

#[derive(Default)]
struct Map {
    slots: BTreeMap<u32, Mapped>,
    /// What is not private, where memory has a private side.
    shared: SharedRanges,
}

/// A slot, which holds its mapping as long as KVM has it.
struct Mapped {
    slot: Slot,
    private: Option<PrivateSide>,
}

impl Mapped {
    /// The part of a range that is memory of the guest's in this slot.
    fn part(&self, range: GpaRange) -> Option<GpaRange> {
        self.slot.range().common(range).filter(|_| !self.slot.device)
    }
}

impl Slots {
    /// `max`: how many there may be; `loggable`: whether slots may ask for a dirty log; `traits`: those of the VM's kind.
    pub(super) fn new(max: u32, loggable: bool, traits: &'static KindTraits) -> Self {
        Self { map: Mutex::default(), max, loggable, traits }
    }

    pub(super) fn traits(&self) -> &'static KindTraits {
        self.traits
    }

    fn private(&self) -> bool {
        self.traits.private_memory
    }

    fn lock(&self) -> MutexGuard<'_, Map> {
        self.map.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn map(&self, fd: &VmFd, slot: Slot) -> Result<SlotId> {
        let mut map = self.lock();
        self.check(&map.slots, &slot)?;
        let number = (0..self.max)
            .find(|number| !map.slots.contains_key(number))
            .ok_or_else(|| invalid(format!("all {} slots of the VM are in use", self.max)))?;
        let two_sided = self.private() && !slot.device;
        let private = if two_sided { Some(PrivateSide::create(fd, &slot.region)?) } else { None };
        let mapped = Mapped { slot, private };
        set_region(fd, number, &mapped, mapped.slot.region.len())?;
        let range = mapped.slot.range();
        // KVM has it from here on, whatever else fails.
        map.slots.insert(number, mapped);
        if two_sided {
            let begins = self.traits.begins();
            // Whatever a slot that was there before has left.
            private::set_attributes(fd, range, begins)?;
            if begins == Visibility::Shared {
                map.shared.insert(range);
            }
        }
        Ok(SlotId(number))
    }

    fn check(&self, slots: &BTreeMap<u32, Mapped>, slot: &Slot) -> Result<()> {
        let GpaRange { start, len } = slot.range();
        if len == 0 || !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(invalid(format!(
                "start {start:#x} and length {len:#x} must be multiples of {PAGE}, and the length not 0"
            )));
        }
        let end = start.checked_add(len).ok_or_else(|| invalid(format!("{start:#x} + {len:#x} is past 2^64")))?;
        let mut ranges = slots.values().map(|mapped| mapped.slot.range());
        if let Some(other) = ranges.find(|o| o.start < end && start < o.start + o.len) {
            return Err(invalid(format!(
                "{start:#x} to {end:#x} overlaps a slot at {:#x} to {:#x}",
                other.start,
                other.start + other.len
            )));
        }
        if slot.log_dirty && !self.loggable {
            return Err(invalid("a dirty log was asked for in a VM created without dirty bitmaps".into()));
        }
        if slot.readonly && self.private() {
            return Err(invalid("memory with a private side cannot be read-only".into()));
        }
        Ok(())
    }

    fn unmap(&self, fd: &VmFd, id: SlotId) -> Result<Slot> {
        let mut map = self.lock();
        let mapped = map.slots.get(&id.0).ok_or_else(|| no_slot(id))?;
        set_region(fd, id.0, mapped, 0)?;
        let mapped = map.slots.remove(&id.0).ok_or_else(|| no_slot(id))?;
        map.shared.remove(mapped.slot.range());
        Ok(mapped.slot)
    }

    fn collect(&self, fd: &VmFd, id: SlotId) -> Result<Vec<u64>> {
        // Held throughout, so that the slot cannot change its size between look and call.
        let map = self.lock();
        let slot = &map.slots.get(&id.0).ok_or_else(|| no_slot(id))?.slot;
        if !slot.log_dirty {
            return Err(invalid(format!("slot {} keeps no dirty log", id.0)));
        }
        let bytes = usize::try_from(slot.region.len()).map_err(|_| invalid("it exceeds the address space".into()))?;
        fd.get_dirty_log(id.0, bytes).map_err(failed("KVM_GET_DIRTY_LOG"))
    }

    /// Whether a range is private memory of one slot.
    pub(super) fn is_private(&self, range: GpaRange) -> bool {
        let map = self.lock();
        self.private()
            && map.slots.values().any(|mapped| mapped.part(range) == Some(range))
            && !map.shared.overlaps(range)
    }

    /// Makes what is mapped of a range private or shared. The lock is held throughout, so that what the guest sees and what
    /// is noted here are the same.
    fn convert(&self, fd: &VmFd, range: GpaRange, to: Visibility) -> Result<()> {
        let GpaRange { start, len } = range;
        if !self.private() {
            return Err(not_convertible("this kind of VM has no private memory"));
        }
        if !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || start.checked_add(len).is_none() {
            return Err(not_convertible("the range is not of whole pages"));
        }
        let mut map = self.lock();
        let Map { slots, shared } = &mut *map;
        let mapped: u64 = slots.values().filter_map(|mapped| mapped.part(range)).map(|part| part.len).sum();
        if to == Visibility::Private && mapped != len {
            return Err(not_convertible("there is no memory in a part of the range"));
        }
        let room = if to == Visibility::Shared { MAX_PIECES } else { 2 * MAX_PIECES };
        if shared.pieces() >= room {
            return Err(not_convertible("memory is shared in too many pieces: share pages beside each other"));
        }
        // What is so already is left out, and what slots side by side have becomes one range.
        let mut changing = SharedRanges::default();
        for part in slots.values().filter_map(|mapped| mapped.part(range)) {
            let done = match to {
                Visibility::Private => !shared.overlaps(part),
                Visibility::Shared => shared.contains(part),
            };
            if !done {
                changing.insert(part);
            }
        }
        for range in changing.ranges() {
            private::set_attributes(fd, range, to)?;
            match to {
                Visibility::Private => shared.remove(range),
                Visibility::Shared => shared.insert(range),
            }
            for Mapped { slot, private } in slots.values() {
                if let (Some(part), Some(private)) = (slot.range().common(range), private) {
                    private.discard(slot, part, to)?;
                }
            }
        }
        Ok(())
    }
}

/// Places `slot` with a length of `len` bytes; 0 takes it away.
fn set_region(fd: &VmFd, number: u32, mapped: &Mapped, len: u64) -> Result<()> {
    let slot = &mapped.slot;
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
    if let Some(private) = &mapped.private {
        let region = kvm_userspace_memory_region2 {
            slot: number,
            // A slot that goes has no flags.
            flags: if len == 0 { 0 } else { flags | KVM_MEM_GUEST_MEMFD },
            guest_phys_addr: slot.range().start,
            memory_size: len,
            userspace_addr: host as u64,
            guest_memfd: private.file.as_raw_fd().unsigned_abs(),
            ..Default::default()
        };
        // SAFETY: as below.
        return unsafe { fd.set_user_memory_region2(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION2"));
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

fn not_convertible(problem: &str) -> Error {
    Error::Invalid { what: "visibility", problem: problem.into() }
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

    fn convert(&self, range: GpaRange, to: Visibility) -> Result<()> {
        self.slots.convert(&self.fd, range, to)
    }

    fn is_shared(&self, range: GpaRange) -> bool {
        !self.slots.private() || self.slots.lock().shared.contains(range)
    }

    fn shared(&self) -> Vec<GpaRange> {
        self.slots.lock().shared.ranges()
    }
}

impl DirtyLog for Shared {
    fn collect(&self, slot: SlotId) -> Result<Vec<u64>> {
        self.slots.collect(&self.fd, slot)
    }
}
