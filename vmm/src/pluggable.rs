//! Guest memory that is plugged and unplugged while the guest runs, behind a virtio-mem device.
//!
//! The whole region is one slot of the hypervisor from the start, and what a block is shows in this process's mappings:
//!
//! - An unplugged block is an anonymous mapping that cannot be written, of no page of its own. A guest that reads there
//!   finds the kernel's zero page, which costs the host nothing (Linux does it now and then, when it reads a word across
//!   the end of a page); one that writes there ends its run, since the hypervisor cannot carry the write out. So a guest
//!   never has more memory than is plugged. Slots of the hypervisor's for single blocks would do as much, but taking one
//!   out makes KVM drop the page tables of all.
//! - A plugged block is what the rest of guest memory is: anonymous, or a part of a sealed memfd.
//!
//! Devices go by what they [reach](Reach), which has the plugged blocks only and is replaced at each change: whoever else has
//! to follow guest memory as it changes (vhost-user, dirty pages) does so there. Who is at work with an older map may still write to a block that is about to go, and this
//! process would be hit by it: before a block goes, it is awaited that nobody holds a map that has it.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use api::Hugepages;
use devices::virtio::mem::Backing;
use hal::GpaRange;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous};
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::inbox::{Event, Inbox};
use crate::memory::{self, Error};
use crate::reach::Reach;

/// How long it is awaited that nobody uses an older memory map. The guest's driver tries again, seconds later.
const LONGEST_USE: Duration = Duration::from_millis(500);
/// How often it is looked whether somebody does.
const LOOK: Duration = Duration::from_micros(100);
/// The most runs of plugged blocks: each is a mapping of this process, which may have 65530.
const MOST_RUNS: usize = 8192;

/// Address space for a region, and where its blocks come from.
pub struct PluggableMemory {
    /// The mapping of all of it.
    region: Arc<GuestRegionMmap>,
    /// Where plugged blocks come from, unless they are anonymous.
    file: Option<Arc<File>>,
    config: api::Memory,
}

impl PluggableMemory {
    /// Reserves address space in this process for the guest physical addresses `range`. Nothing is plugged.
    ///
    /// # Errors
    /// [`Error`] where the host refuses.
    pub fn reserve(range: GpaRange, config: &api::Memory) -> Result<Self, Error> {
        let failed = |problem: String| Error::Mapping { mib: range.len >> 20, problem };
        let size = usize::try_from(range.len).map_err(|error| failed(error.to_string()))?;
        let file = memory::file(range.len, config)?;
        // With its file at first: where that is of huge pages, the kernel begins it where one can begin.
        let at = file.clone().map(|file| FileOffset::from_arc(file, 0));
        let kind = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let mapping = MmapRegion::build(at, size, libc::PROT_READ, kind | libc::MAP_NORESERVE);
        let mapping = mapping.map_err(|error| failed(error.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.start))
            .ok_or_else(|| failed("it ends beyond the 64-bit address space".into()))?;
        let all = Self { region: Arc::new(region), file, config: config.clone() };
        all.take_away(&(0..range.len)).map_err(|error| failed(error.to_string()))?;
        Ok(all)
    }

    /// The mapping of all of it, for the hypervisor.
    pub fn region(&self) -> &Arc<GuestRegionMmap> {
        &self.region
    }

    /// Bytes of a block.
    pub fn block(&self) -> u64 {
        self.config.block()
    }

    /// The guest physical addresses.
    pub fn range(&self) -> GpaRange {
        GpaRange { start: self.region.start_addr().0, len: self.region.len() }
    }

    /// Where a range is in this process.
    fn host(&self, range: &Range<u64>) -> io::Result<(NonZeroUsize, NonZeroUsize)> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let len = range.end.checked_sub(range.start).filter(|_| range.end <= self.region.len()).ok_or_else(outside)?;
        let start = usize::try_from(range.start).map_err(|_| outside())?;
        let address = NonZeroUsize::new(self.region.as_ptr().addr().wrapping_add(start));
        let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
        address.zip(len).ok_or_else(outside)
    }

    /// Puts memory into a range that has none.
    #[expect(unsafe_code, reason = "memory is put at an address of this process")]
    fn put(&self, range: &Range<u64>) -> io::Result<()> {
        let (address, len) = self.host(range)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let api::Memory { hugepages, lock, prefault, .. } = self.config;
        let mut flags = MapFlags::MAP_FIXED;
        // A huge page that is not reserved now may be missing when the guest touches it, which would be its end.
        flags.set(MapFlags::MAP_NORESERVE, hugepages == Hugepages::Off);
        flags.set(MapFlags::MAP_POPULATE, prefault || lock);
        flags.set(MapFlags::MAP_LOCKED, lock);
        // SAFETY: the range is a part of this region's own mapping, in which Rust has no reference, and no device an
        // address: the memory map does not have the range.
        let mapped = unsafe {
            match &self.file {
                Some(file) => {
                    let offset = i64::try_from(range.start).map_err(io::Error::other)?;
                    mmap(Some(address), len, protection, flags | MapFlags::MAP_SHARED, file, offset)
                }
                None => mmap_anonymous(Some(address), len, protection, flags | MapFlags::MAP_PRIVATE),
            }
        }?;
        if self.config.transparent_huge_pages && hugepages == Hugepages::Off {
            // SAFETY: the range was mapped just now, and MADV_HUGEPAGE does not change its contents. A host's policy may
            // refuse, which costs speed but nothing else.
            let _ = unsafe { madvise(mapped, len.get(), MmapAdvise::MADV_HUGEPAGE) };
        }
        Ok(())
    }

    /// Takes the memory of a range away: it reads as zeroes and cannot be written.
    #[expect(unsafe_code, reason = "memory is put at an address of this process")]
    fn take_away(&self, range: &Range<u64>) -> io::Result<()> {
        let (address, len) = self.host(range)?;
        let flags = MapFlags::MAP_FIXED | MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: as in `put`: the memory map does not have the range, nor has an older one that is still in use.
        unsafe { mmap_anonymous(Some(address), len, ProtFlags::PROT_READ, flags) }?;
        let Some(file) = &self.file else { return Ok(()) };
        let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let (start, len) = (i64::try_from(range.start), i64::try_from(range.end - range.start));
        let (start, len) = (start.map_err(io::Error::other)?, len.map_err(io::Error::other)?);
        if let Err(errno) = fallocate(file, hole, start, len) {
            // It is out of the guest's reach all the same.
            tracing::warn!("unplugged memory stays with the monitor: fallocate: {errno}");
        }
        Ok(())
    }

    /// The part of the region that is plugged, as devices see it.
    #[expect(unsafe_code, reason = "a part of a mapping is named by its address")]
    fn part(&self, run: &Range<u64>) -> io::Result<GuestRegionMmap> {
        let (address, len) = self.host(run)?;
        let address = self.region.as_ptr().with_addr(address.get());
        let flags = if self.file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        // SAFETY: the range is a part of this region's mapping, which outlives all memory maps with the part in them:
        // see the drop of `PluggedMemory`.
        let part = unsafe { MmapRegion::build_raw(address, len.get(), libc::PROT_READ | libc::PROT_WRITE, flags) };
        let start = GuestAddress(self.region.start_addr().0.saturating_add(run.start));
        let part = part.ok().and_then(|part| GuestRegionMmap::new(part, start));
        part.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

/// The runs of plugged blocks, in their order, with a range more.
fn with(runs: &[Range<u64>], range: &Range<u64>) -> Vec<Range<u64>> {
    let mut all: Vec<Range<u64>> = Vec::with_capacity(runs.len() + 1);
    let after = runs.partition_point(|run| run.start < range.start);
    let (before, after) = runs.split_at(after);
    for run in before.iter().chain([range]).chain(after) {
        match all.last_mut() {
            Some(last) if last.end == run.start => last.end = run.end,
            _ => all.push(run.clone()),
        }
    }
    all
}

/// The runs of plugged blocks, in their order, without a range.
fn without(runs: &[Range<u64>], range: &Range<u64>) -> Vec<Range<u64>> {
    let rest = |run: &Range<u64>| {
        [run.start..run.end.min(range.start), run.start.max(range.end)..run.end]
            .into_iter()
            .filter(|rest| !rest.is_empty())
    };
    runs.iter().flat_map(rest).collect()
}

/// A region with the blocks that are plugged now.
pub struct PluggedMemory {
    all: PluggableMemory,
    /// What devices see.
    reach: Reach,
    /// The rest of guest memory.
    fixed: Vec<Arc<GuestRegionMmap>>,
    runs: Vec<Range<u64>>,
    /// Memory maps that somebody may still use.
    older: Vec<Weak<GuestMemoryMmap>>,
    inbox: Inbox,
}

impl PluggedMemory {
    /// None yet. `reach` has the `fixed` part of guest memory only.
    pub fn new(all: PluggableMemory, reach: Reach, fixed: Vec<Arc<GuestRegionMmap>>, inbox: Inbox) -> Self {
        Self { all, reach, fixed, runs: Vec::new(), older: Vec::new(), inbox }
    }

    /// Shows devices the memory map with these runs of blocks.
    fn publish(&mut self, runs: &[Range<u64>]) -> io::Result<()> {
        if runs.len() > MOST_RUNS {
            return Err(io::Error::other("plugged memory is in too many pieces"));
        }
        let parts: io::Result<Vec<_>> = runs.iter().map(|run| self.all.part(run).map(Arc::new)).collect();
        let regions = self.fixed.iter().cloned().chain(parts?).collect();
        let map = GuestMemoryMmap::from_arc_regions(regions).map_err(io::Error::other)?;
        let old = self.reach.map().memory().into_inner();
        self.reach.replace(map)?;
        self.older.retain(|map| map.strong_count() > 0);
        self.older.push(Arc::downgrade(&old));
        Ok(())
    }

    /// Waits until nobody uses an older memory map. False where somebody does for long.
    fn older_are_gone(&mut self) -> bool {
        let began = Instant::now();
        loop {
            self.older.retain(|map| map.strong_count() > 0);
            if self.older.is_empty() {
                // What was done with them is done before what follows.
                fence(Ordering::Acquire);
                return true;
            }
            if began.elapsed() > LONGEST_USE {
                return false;
            }
            // No sleep: the policy of the thread of a device has none.
            thread::park_timeout(LOOK);
        }
    }
}

impl Backing for PluggedMemory {
    fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        let runs = with(&self.runs, &range);
        let plugged = self.all.put(&range).and_then(|()| self.publish(&runs));
        match &plugged {
            Ok(()) => self.runs = runs,
            // A mapping that fails may have taken away what was there before.
            Err(_) => self.all.take_away(&range)?,
        }
        plugged
    }

    fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        let runs = without(&self.runs, &range);
        self.publish(&runs)?;
        let gone = match self.older_are_gone() {
            true => self.all.take_away(&range),
            false => Err(io::Error::other("a device is at work with memory that is to be unplugged")),
        };
        match &gone {
            Ok(()) => self.runs = runs,
            Err(_) => self.publish(&self.runs.clone())?,
        }
        gone
    }

    fn resized(&self, _plugged: u64) {
        self.inbox.post(Event::MemoryPlugged);
    }
}

impl Drop for PluggedMemory {
    fn drop(&mut self) {
        // No map may have parts of a mapping that is gone.
        if self.publish(&[]).is_err() || !self.older_are_gone() {
            tracing::error!("pluggable memory stays mapped: something holds on to it");
            std::mem::forget(self.all.region.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reach::Pieces;
    use vm_memory::{Bytes, GuestMemoryAtomic};

    const MIB: u64 = 1 << 20;
    const START: u64 = 4 << 30;

    fn plugged(config: &api::Memory) -> (PluggedMemory, GuestMemoryAtomic<GuestMemoryMmap>) {
        let ram = memory::create(&[GpaRange { start: 0, len: MIB }], config).unwrap();
        let all = PluggableMemory::reserve(GpaRange { start: START, len: 64 * MIB }, config).unwrap();
        let reach = Reach::new(ram.map, Pieces::WHOLE);
        let map = reach.map().clone();
        (PluggedMemory::new(all, reach, ram.regions, Inbox::new().unwrap()), map)
    }

    fn mib(range: Range<u64>) -> Range<u64> {
        range.start * MIB..range.end * MIB
    }

    /// Bytes of the region that are resident, by this process's page map.
    fn resident(plugged: &PluggedMemory) -> u64 {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let region = &plugged.all.region;
        let mut entries = vec![0; usize::try_from(region.len() / 4096 * 8).unwrap()];
        let at = region.as_ptr().addr() as u64 / 4096 * 8;
        std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entries, at).unwrap();
        entries.chunks(8).filter(|entry| entry[7] & 0x80 != 0).count() as u64 * 4096
    }

    fn every_kind() -> [api::Memory; 3] {
        let small = api::Memory { transparent_huge_pages: false, ..api::Memory::default() };
        [small.clone(), api::Memory { shared: true, ..small.clone() }, api::Memory { prefault: true, ..small }]
    }

    #[test]
    fn what_is_plugged_can_be_used_and_what_is_unplugged_is_the_hosts_again() {
        for config in every_kind() {
            let (mut plugged, map) = plugged(&config);
            let at = |offset: u64| GuestAddress(START + offset * MIB);
            assert!(map.memory().write_obj(1_u64, at(2)).is_err());
            plugged.plug(mib(2..6)).unwrap();
            plugged.plug(mib(6..8)).unwrap();
            for offset in 2..8 {
                map.memory().write_slice(&[7; 1 << 20], at(offset)).unwrap();
            }
            assert!(map.memory().write_obj(1_u64, at(8)).is_err() && map.memory().write_obj(1_u64, at(1)).is_err());
            let across = GuestAddress(START + 6 * MIB - 4);
            map.memory().write_obj(u64::MAX, across).unwrap();
            assert_eq!(resident(&plugged), 6 * MIB, "{config:?}");
            plugged.unplug(mib(4..6)).unwrap();
            assert!(map.memory().read_obj::<u8>(at(5)).is_err());
            assert_eq!((map.memory().read_obj::<u8>(at(3)).unwrap(), resident(&plugged)), (7, 4 * MIB), "{config:?}");
            plugged.plug(mib(4..6)).unwrap();
            assert_eq!(map.memory().read_obj::<u64>(at(5)).unwrap(), 0, "nothing of what was there is left");
            drop(plugged);
            assert!(
                map.memory().read_obj::<u8>(at(3)).is_err() && map.memory().read_obj::<u8>(GuestAddress(0)).is_ok()
            );
        }
    }

    #[test]
    fn a_block_that_a_device_is_at_work_with_stays() {
        let (mut plugged, map) = plugged(&api::Memory::default());
        plugged.plug(mib(0..2)).unwrap();
        let at_work = map.memory().into_inner();
        plugged.plug(mib(2..4)).unwrap();
        assert!(plugged.unplug(mib(0..2)).is_err(), "not the last map, but one before has it");
        at_work.write_obj(7_u8, GuestAddress(START)).unwrap();
        assert_eq!(map.memory().read_obj::<u8>(GuestAddress(START)).unwrap(), 7);
        drop(at_work);
        plugged.unplug(mib(0..2)).unwrap();
        assert!(map.memory().read_obj::<u8>(GuestAddress(START)).is_err());
        assert!(map.memory().read_obj::<u8>(GuestAddress(START + 2 * MIB)).is_ok());
    }

    #[test]
    fn a_device_that_is_done_soon_is_awaited() {
        let (mut plugged, map) = plugged(&api::Memory::default());
        plugged.plug(mib(0..2)).unwrap();
        let at_work = map.memory().into_inner();
        let (tell, told) = std::sync::mpsc::channel();
        let device = thread::spawn(move || {
            told.recv().unwrap();
            at_work.write_obj(7_u8, GuestAddress(START)).unwrap();
        });
        let reached = map.clone();
        let owner = thread::spawn(move || plugged.unplug(mib(0..2)));
        // Once the new map is there, the old one is waited for.
        while reached.memory().read_obj::<u8>(GuestAddress(START)).is_ok() {
            thread::yield_now();
        }
        tell.send(()).unwrap();
        device.join().unwrap();
        owner.join().unwrap().unwrap();
    }

    #[test]
    fn memory_in_too_many_pieces_is_refused_before_the_host_has_too_many_mappings() {
        let config = api::Memory { transparent_huge_pages: false, ..api::Memory::default() };
        let (mut plugged, _map) = plugged(&config);
        let pieces: Vec<_> =
            (0..u64::try_from(MOST_RUNS).unwrap()).map(|piece| piece * 8192..piece * 8192 + 4096).collect();
        plugged.runs.clone_from(&pieces);
        let last = u64::try_from(MOST_RUNS).unwrap() * 8192;
        assert!(plugged.plug(last..last + 4096).is_err());
        assert_eq!(plugged.runs, pieces);
        plugged.runs.clear();
    }

    #[test]
    fn runs_join_and_part() {
        let runs = [0..2, 4..6];
        let told = |runs: Vec<Range<u64>>| format!("{runs:?}");
        let more = |range: Range<u64>| told(with(&runs, &range));
        assert_eq!([more(2..4), more(6..8), more(8..9)], ["[0..6]", "[0..2, 4..8]", "[0..2, 4..6, 8..9]"]);
        assert_eq!(told(with(&[], &(1..2))), "[1..2]");
        let less = |range: Range<u64>| told(without(&runs, &range));
        assert_eq!([less(4..6), less(0..1), less(5..6), less(0..6)], ["[0..2]", "[1..2, 4..6]", "[0..2, 4..5]", "[]"]);
        assert_eq!(told(without(&with(&runs, &(2..4)), &(1..5))), "[0..1, 5..6]");
    }

    #[test]
    fn huge_pages_that_the_host_lacks_cannot_be_plugged() {
        let config = api::Memory { hugepages: Hugepages::Size2M, ..api::Memory::default() };
        let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
        let Ok(free) = free.unwrap_or_default().trim().parse::<u64>() else { return };
        let all = PluggableMemory::reserve(GpaRange { start: START, len: 2 * MIB * (free + 1) }, &config).unwrap();
        let range = all.range();
        assert!(all.put(&(0..range.len)).is_err(), "{free} huge pages are free");
    }
}
