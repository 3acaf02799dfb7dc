//! What devices reach of guest memory: the monitor's own by a memory map, and functions of the host's by an IOMMU's mappings,
//! which follow the map.
//!
//! A mapping can only be taken away as it was made. Memory that may go, since its guest makes it private or unplugs it, is
//! therefore mapped in small pieces: all that is left of a piece of which a part goes is mapped anew, and what a function has
//! under way there fails in between.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::seam::DmaMap;
use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

const PAGE: u64 = 4096;

/// What devices reach of a VM's memory.
#[derive(Clone)]
pub struct Reach {
    map: GuestMemoryAtomic<GuestMemoryMmap>,
    host: Arc<Mutex<Host>>,
}

/// What functions of the host's reach.
struct Host {
    /// None, where there are no such functions.
    dma: Option<Arc<dyn DmaMap>>,
    /// The end of each mapping, by its start.
    mapped: BTreeMap<u64, u64>,
    pieces: Pieces,
}

/// How memory is cut into mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pieces {
    /// What lies below this address stays as it is, and is mapped as a whole.
    pub from: u64,
    /// Bytes of a piece above it, a power of two of whole pages. What is less of one is mapped page by page.
    pub len: u64,
}

impl Pieces {
    /// No memory ever goes.
    pub const WHOLE: Self = Self { from: u64::MAX, len: PAGE };

    /// The mappings that a range becomes.
    fn of(self, range: &Range<u64>) -> Vec<Range<u64>> {
        if range.start < self.from {
            return vec![range.clone()];
        }
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let whole = at.is_multiple_of(self.len) && range.end - at >= self.len;
            let end = if whole { at + self.len } else { range.end.min(at + PAGE) };
            pieces.push(at..end);
            at = end;
        }
        pieces
    }
}

fn range_of(region: &GuestRegionMmap) -> Range<u64> {
    let start = region.start_addr().0;
    start..start.saturating_add(region.len())
}

impl Host {
    /// Makes the mappings those of a memory map: first all that is too much goes.
    fn shrink(&mut self, map: &GuestMemoryMmap) -> io::Result<()> {
        let Some(dma) = &self.dma else { return Ok(()) };
        let stays = |start: u64, end: u64| {
            map.find_region(GuestAddress(start)).is_some_and(|region| end <= range_of(region).end)
        };
        let gone: Vec<Range<u64>> =
            self.mapped.iter().filter(|(start, end)| !stays(**start, **end)).map(|(start, end)| *start..*end).collect();
        for part in gone {
            dma.unmap(&part)?;
            self.mapped.remove(&part.start);
        }
        Ok(())
    }

    /// As [`Host::shrink`]: then all that is missing comes.
    fn grow(&mut self, map: &GuestMemoryMmap) -> io::Result<()> {
        let Some(dma) = &self.dma else { return Ok(()) };
        for region in map.iter() {
            for part in self.missing(&range_of(region)).iter().flat_map(|part| self.pieces.of(part)) {
                dma.map(region, &part)?;
                self.mapped.insert(part.start, part.end);
            }
        }
        Ok(())
    }

    /// Makes the mappings what they were, of a memory map that was: as many, so that there is room for them.
    fn restore(&mut self, mapped: BTreeMap<u64, u64>, map: &GuestMemoryMmap) {
        let Some(dma) = &self.dma else { return };
        let mut failed = None;
        let is_new = |start: &u64, end: &mut u64| mapped.get(start) != Some(end);
        for (start, end) in self.mapped.extract_if(.., is_new) {
            failed = dma.unmap(&(start..end)).err().or(failed);
        }
        for (start, end) in mapped {
            let region = map.find_region(GuestAddress(start)).filter(|_| !self.mapped.contains_key(&start));
            match region.map(|region| dma.map(region, &(start..end))) {
                Some(Ok(())) => drop(self.mapped.insert(start, end)),
                Some(Err(error)) => failed = Some(error),
                None => {}
            }
        }
        if let Some(error) = failed {
            tracing::error!("the host does not map again what it had mapped: {error}");
        }
    }

    /// The parts of a range that have no mapping.
    fn missing(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        let mut at = range.start;
        for (start, end) in self.mapped.range(range.clone()) {
            if at < *start {
                missing.push(at..*start);
            }
            at = *end;
        }
        if at < range.end {
            missing.push(at..range.end);
        }
        missing
    }
}

impl Reach {
    /// This memory, and no function of the host's.
    pub fn new(map: GuestMemoryMmap, pieces: Pieces) -> Self {
        let host = Host { dma: None, mapped: BTreeMap::new(), pieces };
        Self { map: GuestMemoryAtomic::new(map), host: Arc::new(Mutex::new(host)) }
    }

    /// The memory map, for the monitor's own devices.
    pub fn map(&self) -> &GuestMemoryAtomic<GuestMemoryMmap> {
        &self.map
    }

    /// Has devices reach what is in `map`, and nothing else. When this returns, functions of the host's reach nothing of what is
    /// not in it; others may still be at work with the map that was before.
    ///
    /// # Errors
    /// The host does not map what is new. They reach what they did before then.
    pub fn replace(&self, map: GuestMemoryMmap) -> io::Result<()> {
        let mut host = self.host();
        let before = self.map.memory().into_inner();
        let mapped = host.mapped.clone();
        let done = host.shrink(&map).and_then(|()| {
            self.set(map);
            host.grow(&self.map.memory())
        });
        if done.is_err() {
            self.set(GuestMemoryMmap::clone(&before));
            host.restore(mapped, &before);
        }
        done
    }

    /// Has functions of the host's reach the same, from now on. Those of the same IOMMU mappings may do so already.
    ///
    /// # Errors
    /// The host does not map it.
    pub fn lead(&self, dma: &Arc<dyn DmaMap>) -> io::Result<()> {
        let mut host = self.host();
        if host.dma.is_some() {
            return Ok(());
        }
        host.dma = Some(dma.clone());
        let mapped = host.grow(&self.map.memory());
        if mapped.is_err() {
            drop(host);
            self.leave();
        }
        mapped
    }

    /// Has functions of the host's reach nothing any more.
    pub fn leave(&self) {
        let mut host = self.host();
        if let Err(error) = host.shrink(&GuestMemoryMmap::new()) {
            tracing::error!("guest memory stays mapped for functions of the host's: {error}");
        }
        host.mapped.clear();
        host.dma = None;
    }

    fn set(&self, map: GuestMemoryMmap) {
        self.map.lock().unwrap_or_else(PoisonError::into_inner).replace(map);
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]

    use proptest::prelude::*;
    use vm_memory::MmapRegion;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// An IOMMU by VFIO's rules: a mapping overlaps no other, and goes as it came. It may have room for so many only.
    struct Iommu {
        mapped: Mutex<BTreeMap<u64, u64>>,
        room: usize,
        calls: Mutex<Vec<String>>,
    }

    impl Iommu {
        fn new(room: usize) -> Arc<Self> {
            Arc::new(Self { mapped: Mutex::default(), room, calls: Mutex::default() })
        }

        fn calls(&self) -> Vec<String> {
            std::mem::take(&mut self.calls.lock().unwrap())
        }

        /// What it reaches, with neighbours joined.
        fn reached(&self) -> Vec<Range<u64>> {
            joined(self.mapped.lock().unwrap().iter().map(|(start, end)| *start..*end))
        }
    }

    fn joined(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
        let mut all: Vec<Range<u64>> = Vec::new();
        for range in ranges {
            match all.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => all.push(range),
            }
        }
        all
    }

    impl DmaMap for Iommu {
        fn map(&self, region: &GuestRegionMmap, part: &Range<u64>) -> io::Result<()> {
            let all = range_of(region);
            assert!(all.start <= part.start && part.end <= all.end && !part.is_empty(), "{part:?} of {all:?}");
            let mut mapped = self.mapped.lock().unwrap();
            assert!(mapped.iter().all(|(start, end)| part.end <= *start || *end <= part.start), "{part:?} is mapped");
            if mapped.len() >= self.room {
                return Err(io::ErrorKind::OutOfMemory.into());
            }
            mapped.insert(part.start, part.end);
            self.calls.lock().unwrap().push(format!("+{:x}..{:x}", part.start >> 12, part.end >> 12));
            Ok(())
        }

        fn unmap(&self, part: &Range<u64>) -> io::Result<()> {
            assert_eq!(self.mapped.lock().unwrap().remove(&part.start), Some(part.end), "{part:?} as it was mapped");
            self.calls.lock().unwrap().push(format!("-{:x}..{:x}", part.start >> 12, part.end >> 12));
            Ok(())
        }
    }

    fn map(ranges: &[Range<u64>]) -> GuestMemoryMmap {
        let region = |range: &Range<u64>| {
            let mapping = MmapRegion::new(usize::try_from(range.end - range.start).unwrap()).unwrap();
            Arc::new(GuestRegionMmap::new(mapping, GuestAddress(range.start)).unwrap())
        };
        match ranges {
            [] => GuestMemoryMmap::new(),
            ranges => GuestMemoryMmap::from_arc_regions(ranges.iter().map(region).collect()).unwrap(),
        }
    }

    fn following(ranges: &[Range<u64>], pieces: Pieces, room: usize) -> (Reach, Arc<Iommu>) {
        let (reach, iommu) = (Reach::new(map(ranges), pieces), Iommu::new(room));
        let dma: Arc<dyn DmaMap> = iommu.clone();
        reach.lead(&dma).unwrap();
        (reach, iommu)
    }

    const CONVERTED: Pieces = Pieces { from: 0, len: 2 * MIB };

    #[test]
    fn memory_that_stays_is_one_mapping_and_nothing_else_is_touched_when_some_is_plugged() {
        let pieces = Pieces { from: 64 * MIB, len: 2 * MIB };
        let (reach, iommu) = following(&[0..8 * MIB], pieces, 99);
        assert_eq!(iommu.calls(), ["+0..800"]);
        reach.replace(map(&[0..8 * MIB, 64 * MIB..68 * MIB])).unwrap();
        assert_eq!(iommu.calls(), ["+4000..4200", "+4200..4400"]);
        reach.replace(map(&[0..8 * MIB, 66 * MIB..68 * MIB])).unwrap();
        assert_eq!(iommu.calls(), ["-4000..4200"]);
        reach.leave();
        assert_eq!(iommu.reached(), []);
    }

    #[test]
    fn what_is_shared_is_mapped_in_pieces_and_what_becomes_private_takes_its_own_only() {
        let (reach, iommu) = following(&[], CONVERTED, 99_999);
        reach.replace(map(&[MIB..MIB + 2 * PAGE])).unwrap();
        assert_eq!(iommu.calls(), ["+100..101", "+101..102"]);
        // Neighbours of what is mapped already, which the memory map joins.
        reach.replace(map(&[MIB..MIB + 3 * PAGE, 2 * MIB..6 * MIB])).unwrap();
        assert_eq!(iommu.calls(), ["+102..103", "+200..400", "+400..600"]);
        reach.replace(map(&[MIB..MIB + PAGE, MIB + 2 * PAGE..MIB + 3 * PAGE, 2 * MIB..6 * MIB])).unwrap();
        assert_eq!(iommu.calls(), ["-101..102"]);
        // A page of a large piece: the rest of it is mapped anew, the other piece stays.
        reach.replace(map(&[2 * MIB..4 * MIB - 2 * PAGE, 4 * MIB - PAGE..6 * MIB])).unwrap();
        let calls = iommu.calls();
        assert_eq!(calls[..3], ["-100..101", "-102..103", "-200..400"]);
        assert_eq!(
            (calls.len(), calls[3].as_str(), calls.last().unwrap().as_str()),
            (3 + 511, "+200..201", "+3ff..400")
        );
    }

    #[test]
    fn what_the_host_does_not_map_changes_nothing() {
        let (reach, iommu) = following(&[0..PAGE], CONVERTED, 3);
        let refused = reach.replace(map(&[PAGE..2 * PAGE, 8 * PAGE..16 * PAGE])).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::OutOfMemory);
        assert_eq!(iommu.reached(), [0..PAGE]);
        assert_eq!(reach.map().memory().iter().map(range_of).collect::<Vec<_>>(), [0..PAGE]);
        // A piece of which a part should go is there as a whole again, not in more parts than there is room for.
        let (reach, iommu) = following(&[0..2 * MIB], CONVERTED, 3);
        assert!(reach.replace(map(&[0..2 * MIB - PAGE])).is_err());
        assert_eq!((iommu.reached(), iommu.calls().last().unwrap().as_str()), (vec![0..2 * MIB], "+0..200"));
        // Functions that cannot reach all that they should reach nothing.
        let (reach, iommu) = (Reach::new(map(&[0..8 * PAGE]), CONVERTED), Iommu::new(3));
        let dma: Arc<dyn DmaMap> = iommu.clone();
        assert!(reach.lead(&dma).is_err());
        assert_eq!(iommu.reached(), []);
        // Without functions of the host's, nobody is told.
        reach.replace(map(&[0..64 * PAGE])).unwrap();
        assert_eq!(iommu.reached(), []);
    }

    proptest! {
        #[test]
        fn functions_reach_what_the_memory_map_has(
            changes in proptest::collection::vec((0..64_u64, 1..24_u64, any::<bool>()), 1..40)
        ) {
            let pieces = Pieces { from: 8 * PAGE, len: 4 * PAGE };
            let (reach, iommu) = following(&[], pieces, 999);
            let mut pages = [false; 96];
            for (first, count, shared) in changes {
                for page in first..first + count {
                    pages[usize::try_from(page).unwrap()] = shared;
                }
                let shared = (0..).zip(pages).filter(|(_, shared)| *shared).map(|(page, _)| page * PAGE..(page + 1) * PAGE);
                let wanted = joined(shared);
                reach.replace(map(&wanted)).unwrap();
                prop_assert_eq!(iommu.reached(), wanted);
            }
        }
    }
}
