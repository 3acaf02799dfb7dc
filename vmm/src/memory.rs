//! Guest memory: a region on each side of the 32-bit hole, in a memfd mapped shared, or anonymous.
//!
//! Shared memory is a file so that other processes (vhost-user daemons) can map it; it is sealed so that none of them
//! can shrink it under the guest, which would end the monitor with SIGBUS. Memory that nobody shares is anonymous, since
//! most hosts give transparent huge pages to anonymous memory only, and with small pages a guest's first touches of its
//! memory cost it seconds in a nested host. It is never a private mapping of a file, which would hold each page twice.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use api::Hugepages;
use hal::GpaRange;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

/// Why guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed.
    #[error("guest memory of {mib} MiB: {call}: {source}{hint}")]
    System {
        /// Memory asked for, in MiB.
        mib: u64,
        /// The call.
        call: &'static str,
        /// The operating system's answer.
        source: io::Error,
        /// What may help, beginning with a separator, or nothing.
        hint: &'static str,
    },
    /// The mapping could not be made.
    #[error("guest memory of {mib} MiB: {problem}")]
    Mapping {
        /// Memory asked for, in MiB.
        mib: u64,
        /// What is wrong.
        problem: String,
    },
}

/// What Linux takes from the end of memory before its memory map, in bytes.
const FIRST_ALLOCATIONS: u64 = 12 << 20;
/// The most that is populated before it is touched, in bytes.
const MOST_FIRST_PAGES: u64 = 256 << 20;
/// Bytes that are populated with one call: a huge page.
const POPULATED_AT_ONCE: usize = 2 << 20;

/// Guest memory, as devices and as the hypervisor take it.
pub struct Ram {
    /// All of it, by guest physical address.
    pub map: GuestMemoryMmap,
    /// The mappings that it consists of.
    pub regions: Vec<Arc<GuestRegionMmap>>,
}

/// Makes guest memory that covers `ranges`, in order, each a multiple of the page size.
///
/// # Errors
/// [`Error::System`] where the host refuses, with a hint where huge pages are the likely reason.
pub fn create(ranges: &[GpaRange], config: &api::Memory) -> Result<Ram, Error> {
    let total: u64 = ranges.iter().map(|range| range.len).sum();
    let mib = total >> 20;
    let file = file(total, config)?;
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for range in ranges {
        let file = file.clone().map(|file| FileOffset::from_arc(file, offset));
        let mapping = map(file, range.len, config).map_err(|problem| Error::Mapping { mib, problem })?;
        if config.transparent_huge_pages && config.hugepages == Hugepages::Off {
            advise_huge(&mapping);
        }
        if config.lock {
            lock(&mapping).map_err(|source| Error::System { mib, call: "mlock", source, hint: LOCK_HINT })?;
        }
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or_else(|| Error::Mapping { mib, problem: "it ends beyond the 64-bit address space".into() })?;
        regions.push(Arc::new(region));
        offset += range.len;
    }
    let map = GuestMemoryMmap::from_arc_regions(regions.clone())
        .map_err(|error| Error::Mapping { mib, problem: error.to_string() })?;
    Ok(Ram { map, regions })
}

impl Ram {
    /// The same with one more region above all others, for firmware: small pages whatever the rest is, since they are few, and
    /// a file where the rest is one that is `shared`.
    ///
    /// # Errors
    /// As [`create`].
    pub fn with_firmware(mut self, range: GpaRange, shared: bool) -> Result<Self, Error> {
        let plain = api::Memory { transparent_huge_pages: false, shared, ..api::Memory::default() };
        self.regions.extend(create(&[range], &plain)?.regions);
        self.regions.sort_by_key(|region| region.start_addr());
        self.map = GuestMemoryMmap::from_arc_regions(self.regions.clone())
            .map_err(|error| Error::Mapping { mib: range.len >> 20, problem: error.to_string() })?;
        Ok(self)
    }

    /// The pages that Linux touches first whatever it boots with: its memory map, an entry of 64 bytes for each page,
    /// and its first allocations, which it takes from the end of memory downwards. `None` where they are there already.
    pub fn first_pages(&self, config: &api::Memory) -> Option<FirstPages> {
        let total: u64 = self.regions.iter().map(|region| region.len()).sum();
        let region = self.regions.last().filter(|_| !config.prefault && !config.lock)?;
        let len = (total / 64 + FIRST_ALLOCATIONS).min(region.len()).min(MOST_FIRST_PAGES);
        Some(FirstPages { region: Arc::clone(region), len: usize::try_from(len).ok()? })
    }
}

/// Pages at the end of memory, to be populated beside the guest that begins to run.
pub struct FirstPages {
    region: Arc<GuestRegionMmap>,
    /// In bytes.
    len: usize,
}

impl FirstPages {
    /// Populates them, as far as the host has memory, from the last one on.
    #[expect(unsafe_code, reason = "madvise takes a raw address")]
    pub fn populate(self) {
        // A failure costs nothing: the guest's own accesses do the same, later. Kernels below 5.14 always fail.
        let mut left = self.len;
        let mut end = self.region.size();
        while let Some(start) = end.checked_sub(1).map(|last| last & !(POPULATED_AT_ONCE - 1)).filter(|_| left > 0) {
            let Some(address) = NonNull::new(self.region.as_ptr().wrapping_add(start).cast()) else { return };
            let advice = MmapAdvise::MADV_POPULATE_WRITE;
            // SAFETY: the range is a part of a mapping that is alive, and MADV_POPULATE_WRITE does not change its
            // contents, whoever accesses it meanwhile.
            if unsafe { nix::sys::mman::madvise(address, end - start, advice) }.is_err() {
                return;
            }
            left = left.saturating_sub(end - start);
            end = start;
        }
    }
}

/// The file that `total` bytes of memory are in, where they are not anonymous.
///
/// # Errors
/// As [`create`].
pub fn file(total: u64, config: &api::Memory) -> Result<Option<Arc<File>>, Error> {
    // Anonymous memory cannot be huge by request of one process alone: reserved pages come through the file.
    if !config.shared && config.hugepages == Hugepages::Off {
        return Ok(None);
    }
    memory_file(total, config.hugepages).map(Arc::new).map(Some)
}

fn memory_file(total: u64, pages: Hugepages) -> Result<File, Error> {
    let failed = |call, errno: nix::Error, hint| Error::System { mib: total >> 20, call, source: errno.into(), hint };
    let huge = match pages {
        Hugepages::Off => MFdFlags::empty(),
        Hugepages::Size2M => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB,
        Hugepages::Size1G => MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_1GB,
    };
    let hint =
        if huge.is_empty() { "" } else { "; are huge pages of this size reserved on the host (vm.nr_hugepages)?" };
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING | huge;
    let fd = memfd_create(c"guest-memory", flags).map_err(|errno| failed("memfd_create", errno, hint))?;
    let file = File::from(fd);
    let length = i64::try_from(total).unwrap_or(i64::MAX);
    nix::unistd::ftruncate(&file, length).map_err(|errno| failed("ftruncate", errno, hint))?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals)).map_err(|errno| failed("fcntl(F_ADD_SEALS)", errno, ""))?;
    Ok(file)
}

fn map(file: Option<FileOffset>, len: u64, config: &api::Memory) -> Result<MmapRegion, String> {
    let size = usize::try_from(len).map_err(|_| "it is larger than this host's address space".to_string())?;
    let mut flags = libc::MAP_NORESERVE;
    flags |= if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
    if config.prefault {
        flags |= libc::MAP_POPULATE;
    }
    let mut mapping =
        MmapRegion::build(file, size, libc::PROT_READ | libc::PROT_WRITE, flags).map_err(|error| error.to_string())?;
    mapping.set_hugetlbfs(config.hugepages != Hugepages::Off);
    Ok(mapping)
}

/// Asks for transparent huge pages. The host's policy may refuse, which costs speed but nothing else.
#[expect(unsafe_code, reason = "madvise takes a raw address")]
fn advise_huge(mapping: &MmapRegion) {
    let Some(start) = NonNull::new(mapping.as_ptr().cast()) else { return };
    // SAFETY: the range is the whole of a mapping that is alive, and MADV_HUGEPAGE does not change its contents.
    let advised = unsafe { nix::sys::mman::madvise(start, mapping.size(), MmapAdvise::MADV_HUGEPAGE) };
    if let Err(errno) = advised {
        tracing::warn!("no transparent huge pages for guest memory: madvise: {errno}");
    }
}

/// What may help where memory cannot be locked.
const LOCK_HINT: &str =
    "; raise the limit on locked memory (ulimit -l, LimitMEMLOCK=) above the guest's, or leave lock out";

/// Populates a mapping and keeps it in memory.
#[expect(unsafe_code, reason = "mlock takes a raw address")]
fn lock(mapping: &MmapRegion) -> io::Result<()> {
    let Some(start) = NonNull::new(mapping.as_ptr().cast()) else { return Ok(()) };
    // SAFETY: the range is the whole of a mapping that is alive.
    unsafe { nix::sys::mman::mlock(start, mapping.size()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use vm_memory::{Bytes, GuestMemoryBackend};

    #[test]
    fn shared_regions_cover_the_ranges_and_are_one_sealed_file() {
        let ranges = [GpaRange { start: 0, len: 2 << 20 }, GpaRange { start: 4 << 30, len: 1 << 20 }];
        let config = api::Memory { shared: true, ..api::Memory::default() };
        let memory = create(&ranges, &config).unwrap().map;
        memory.write_obj(0x1234_5678_u32, GuestAddress((4 << 30) + 16)).unwrap();
        assert_eq!(memory.read_obj::<u32>(GuestAddress((4 << 30) + 16)).unwrap(), 0x1234_5678);
        assert!(memory.read_obj::<u32>(GuestAddress(2 << 20)).is_err());
        let offsets: Vec<u64> = memory.iter().map(|region| region.file_offset().unwrap().start()).collect();
        assert_eq!(offsets, [0, 2 << 20]);
        let file = memory.iter().next().unwrap().file_offset().unwrap().file();
        assert!(file.set_len(0).is_err(), "a sealed memory file must not shrink");
    }

    #[test]
    fn memory_that_is_not_shared_has_no_file() {
        let config = api::Memory { prefault: true, ..api::Memory::default() };
        let memory = create(&[GpaRange { start: 0, len: 1 << 20 }], &config).unwrap().map;
        assert!(memory.iter().all(|region| region.file_offset().is_none()));
        memory.write_obj(7_u8, GuestAddress(4095)).unwrap();
    }

    #[test]
    fn first_pages_are_there_before_they_are_touched_and_hold_what_was_written() {
        let config = api::Memory::default();
        let ranges = [GpaRange { start: 0, len: 32 << 20 }, GpaRange { start: 4 << 30, len: 64 << 20 }];
        let ram = create(&ranges, &config).unwrap();
        let last = GuestAddress((4 << 30) + (64 << 20) - 8);
        ram.map.write_obj(0x1234_u64, last).unwrap();
        // Not from smaps: there the kernel may show it as one with a mapping beside it.
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let resident = |region: &GuestRegionMmap| {
            let mut entries = vec![0; usize::try_from(region.len() / 4096 * 8).unwrap()];
            pagemap.read_exact_at(&mut entries, region.as_ptr().addr() as u64 / 4096 * 8).unwrap();
            // Bit 63 of a page's entry: it is present.
            entries.chunks(8).filter(|entry| entry[7] & 0x80 != 0).count() << 12
        };
        ram.first_pages(&config).unwrap().populate();
        // 96 MiB need a memory map of 1.5 MiB.
        let there = resident(&ram.regions[1]);
        assert!((13 << 20..=16 << 20).contains(&there), "{there} bytes are populated");
        // Where both are neighbours here, a huge page may lie in both.
        assert!(resident(&ram.regions[0]) < 2 << 20);
        assert_eq!(ram.map.read_obj::<u64>(last).unwrap(), 0x1234);
        let populated = api::Memory { prefault: true, ..config };
        assert!(ram.first_pages(&populated).is_none());
    }

    #[test]
    fn locked_memory_stays_in_the_hosts() {
        let config = api::Memory { lock: true, ..api::Memory::default() };
        let memory = create(&[GpaRange { start: 0, len: 2 << 20 }], &config).unwrap();
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")?.trim().strip_suffix(" kB"));
        assert!(locked.unwrap().parse::<u64>().unwrap() >= 2048, "{locked:?} KiB are locked");
        drop(memory);
    }

    #[test]
    fn huge_pages_that_the_host_lacks_are_named() {
        // 1 EiB is more than any host has reserved.
        let config = api::Memory { hugepages: Hugepages::Size2M, ..api::Memory::default() };
        let error = create(&[GpaRange { start: 0, len: 1 << 60 }], &config).err().unwrap().to_string();
        assert!(error.contains("guest memory of"), "{error}");
    }
}
