//! Memory of a function, mapped into this process so that it can be mapped into a guest.
#![expect(unsafe_code, reason = "device memory is mapped by system calls")]

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

/// Memory of a function in this process, which never looks at it. It is unmapped when it is dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<libc::c_void>,
    len: NonZeroUsize,
}

// SAFETY: the address is handed on to the hypervisor and to `munmap`, and never followed.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps a part of a file, of whole pages.
    ///
    /// # Errors
    /// The host refuses.
    pub fn of(file: &File, part: &Range<u64>) -> io::Result<Self> {
        let bad = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let len = usize::try_from(part.end.saturating_sub(part.start)).map_err(bad)?;
        let len = NonZeroUsize::new(len).ok_or(io::ErrorKind::InvalidInput)?;
        let offset = i64::try_from(part.start).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: the mapping is new and at an address of the kernel's choice; nothing else is affected.
        let start = unsafe {
            mmap(None, len, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_SHARED, file, offset)
        };
        Ok(Self { start: start?, len })
    }

    /// It as memory of a guest's at an address, for as long as it is mapped.
    ///
    /// # Errors
    /// It ends beyond all addresses.
    pub fn at(&self, address: u64) -> io::Result<Arc<GuestRegionMmap>> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: the range is the whole of a mapping that is alive, and whoever has the region lets go of it before: see
        // `VfioFunction`.
        let region = unsafe { MmapRegion::build_raw(self.start.as_ptr().cast(), self.len.get(), protection, flags) };
        let region = region.map_err(io::Error::other)?;
        GuestRegionMmap::new(region, GuestAddress(address))
            .map(Arc::new)
            .ok_or_else(|| io::Error::other("beyond all addresses"))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the range is the whole of this mapping, which nobody uses any more.
        if let Err(errno) = unsafe { munmap(self.start, self.len.get()) } {
            tracing::error!("munmap of device memory: {errno}");
        }
    }
}
