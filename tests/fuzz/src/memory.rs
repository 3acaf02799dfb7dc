//! Guest memory that tells which of its pages a load touched, without looking at all the others.

use std::ptr::NonNull;

use arch::layout;
use nix::libc;
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// RAM of a guest at its places, all zeros at first.
pub struct Memory {
    map: GuestMemoryMmap,
}

impl Memory {
    /// So many bytes of RAM, on small pages: a huge one would be touched by a write to any byte of it.
    pub fn new(ram: u64) -> Self {
        let ranges: Vec<_> = layout::ram_ranges(ram)
            .into_iter()
            .map(|range| (GuestAddress(range.start), usize::try_from(range.len).expect("a length")))
            .collect();
        let memory = Self { map: GuestMemoryMmap::from_ranges(&ranges).expect("guest memory") };
        memory.advise(MmapAdvise::MADV_NOHUGEPAGE);
        memory
    }

    /// The memory.
    pub fn map(&self) -> &GuestMemoryMmap {
        &self.map
    }

    /// Calls `look` with the address and content of each page that is not all zeros.
    pub fn written(&self, mut look: impl FnMut(u64, &[u8; PAGE])) {
        for region in self.map.iter() {
            let mut bytes = [0; PAGE];
            for (number, touched) in touched(region).iter().enumerate() {
                if *touched & 1 != 0 {
                    let offset = (number * PAGE) as u64;
                    region.read_slice(&mut bytes, MemoryRegionAddress(offset)).expect("a page of the region");
                    if bytes != [0; PAGE] {
                        look(region.start_addr().0 + offset, &bytes);
                    }
                }
            }
        }
    }

    /// Checks that no byte but those in `allowed` was written; `of` is told where one was.
    pub fn check(&self, allowed: &[std::ops::Range<u64>], of: &dyn std::fmt::Debug) {
        self.written(|page, bytes| {
            for (at, _) in (page..).zip(bytes).filter(|(_, byte)| **byte != 0) {
                assert!(allowed.iter().any(|range| range.contains(&at)), "{at:#x} was written: {of:?}");
            }
        });
    }

    /// Makes it all zeros again.
    pub fn clear(&self) {
        self.advise(MmapAdvise::MADV_DONTNEED);
    }

    fn advise(&self, advice: MmapAdvise) {
        for region in self.map.iter() {
            let start = NonNull::new(region.as_ptr().cast()).expect("a mapping");
            // SAFETY: the range is a private anonymous mapping that is alive, nobody refers to its bytes, and they may
            // all become zeros.
            unsafe { madvise(start, length(region), advice) }.expect("advice on guest memory");
        }
    }
}

fn length(region: &impl GuestMemoryRegion) -> usize {
    usize::try_from(region.len()).expect("a length")
}

/// A byte for each page of a region, whose bit 0 tells that it was touched.
fn touched(region: &vm_memory::GuestRegionMmap) -> Vec<u8> {
    let mut pages = vec![0; length(region) / PAGE];
    // SAFETY: the region is mapped as long as it is, and `pages` has a byte for each of its pages.
    let result = unsafe { libc::mincore(region.as_ptr().cast(), length(region), pages.as_mut_ptr()) };
    assert_eq!(result, 0, "mincore: {}", std::io::Error::last_os_error());
    pages
}
