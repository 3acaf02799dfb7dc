//! The private side of memory: a file that only the guest sees, beside the mapping that the monitor shares with it.
#![expect(unsafe_code, reason = "host memory is given back by its address")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};

use kvm_bindings::{KVM_MEMORY_ATTRIBUTE_PRIVATE, kvm_create_guest_memfd, kvm_memory_attributes};
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::failed;
use crate::{Error, GpaRange, Result, Slot, Visibility};

/// What `fstatfs` says of a file of huge pages (`include/uapi/linux/magic.h`).
const HUGETLBFS_MAGIC: libc::__fsword_t = 0x9584_58f6;

/// The private side of a slot.
pub(super) struct PrivateSide {
    /// The guest_memfd.
    pub(super) file: File,
    shared: SharedSide,
}

/// What the monitor's mapping is made of, which says how memory in it is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SharedSide {
    Anonymous,
    File,
    /// Pages too large for what a guest converts: they are kept.
    Huge,
}

impl PrivateSide {
    pub(super) fn create(fd: &VmFd, region: &GuestRegionMmap) -> Result<Self> {
        let wanted = kvm_create_guest_memfd { size: region.len(), ..Default::default() };
        let file = fd.create_guest_memfd(wanted).map_err(failed("KVM_CREATE_GUEST_MEMFD"))?;
        // SAFETY: KVM has just made the descriptor, and nobody else has it.
        let file = unsafe { File::from_raw_fd(file) };
        Ok(Self { file, shared: SharedSide::of(region) })
    }

    /// Gives back what the side that is not seen any more holds of `part`, which lies in `slot`.
    pub(super) fn discard(&self, slot: &Slot, part: GpaRange, now: Visibility) -> Result<()> {
        let offset = part.start - slot.range().start;
        match now {
            Visibility::Shared => self.punch(offset, part.len),
            Visibility::Private => self.shared.give_back(slot, offset, part.len),
        }
    }

    fn punch(&self, offset: u64, len: u64) -> Result<()> {
        let (offset, len) = (signed(offset)?, signed(len)?);
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: the call has no pointer, and the file is open.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, len) } {
            0 => Ok(()),
            _ => Err(Error::system("fallocate(guest_memfd)", io::Error::last_os_error())),
        }
    }
}

fn signed(number: u64) -> Result<i64> {
    i64::try_from(number).map_err(|_| Error::Invalid { what: "visibility", problem: format!("{number:#x} is too far") })
}

/// Whether pages of `range` are to be private.
pub(super) fn set_attributes(fd: &VmFd, range: GpaRange, to: Visibility) -> Result<()> {
    let attributes = match to {
        Visibility::Private => KVM_MEMORY_ATTRIBUTE_PRIVATE,
        Visibility::Shared => 0,
    };
    let wanted =
        kvm_memory_attributes { address: range.start, size: range.len, attributes: attributes.into(), flags: 0 };
    fd.set_memory_attributes(wanted).map_err(failed("KVM_SET_MEMORY_ATTRIBUTES"))
}

impl SharedSide {
    fn of(region: &GuestRegionMmap) -> Self {
        if region.flags() & libc::MAP_HUGETLB != 0 {
            return Self::Huge;
        }
        let Some(file) = region.file_offset() else { return Self::Anonymous };
        // SAFETY: plain integers, for which zeros are fine.
        let mut told: libc::statfs = unsafe { std::mem::zeroed() };
        // SAFETY: the descriptor is open, and there is room for what the call tells.
        let asked = unsafe { libc::fstatfs(file.file().as_raw_fd(), &raw mut told) };
        if asked == 0 && told.f_type == HUGETLBFS_MAGIC { Self::Huge } else { Self::File }
    }

    fn give_back(self, slot: &Slot, offset: u64, len: u64) -> Result<()> {
        let advice = match self {
            Self::Anonymous => libc::MADV_DONTNEED,
            Self::File => libc::MADV_REMOVE,
            Self::Huge => return Ok(()),
        };
        let bad = |problem: String| Error::Invalid { what: "visibility", problem };
        let host = slot.region.get_host_address(MemoryRegionAddress(offset)).map_err(|error| bad(error.to_string()))?;
        let len = usize::try_from(len).map_err(|error| bad(error.to_string()))?;
        // SAFETY: the range lies within the slot's mapping, which the slot holds. What the monitor reads there is guest
        // memory, which may change at any time.
        match unsafe { libc::madvise(host.cast(), len, advice) } {
            0 => Ok(()),
            _ => Err(Error::system("madvise", io::Error::last_os_error())),
        }
    }
}
