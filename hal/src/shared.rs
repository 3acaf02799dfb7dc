//! Which memory of a confidential guest is shared.

use std::collections::BTreeMap;

use crate::GpaRange;

/// Ranges of guest physical addresses that are shared, with neighbours joined: a guest that shares memory page by page makes
/// one long range of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SharedRanges {
    /// The end of each range, by its start.
    ends: BTreeMap<u64, u64>,
}

impl SharedRanges {
    /// Adds a range. One that reaches past 2^64 ends there.
    pub fn insert(&mut self, range: GpaRange) {
        let (mut start, mut end) = (range.start, range.start.saturating_add(range.len));
        if start == end {
            return;
        }
        // All that it overlaps or touches becomes one with it.
        while let Some((&first, &last)) = self.ends.range(..=end).next_back()
            && last >= start
        {
            self.ends.remove(&first);
            (start, end) = (start.min(first), end.max(last));
        }
        self.ends.insert(start, end);
    }

    /// Takes a range out. One that reaches past 2^64 ends there.
    pub fn remove(&mut self, range: GpaRange) {
        let (start, end) = (range.start, range.start.saturating_add(range.len));
        if start == end {
            return;
        }
        while let Some((&first, &last)) = self.ends.range(..end).next_back()
            && last > start
        {
            self.ends.remove(&first);
            if last > end {
                self.ends.insert(end, last);
            }
            if first < start {
                self.ends.insert(first, start);
            }
        }
    }

    /// Whether all of a range is shared.
    pub fn contains(&self, range: GpaRange) -> bool {
        let Some(end) = range.start.checked_add(range.len) else { return false };
        self.ends.range(..=range.start).next_back().is_some_and(|(_, &last)| end <= last)
    }

    /// Whether any of a range is shared.
    pub fn overlaps(&self, range: GpaRange) -> bool {
        let end = range.start.saturating_add(range.len);
        range.len > 0 && self.ends.range(..end).next_back().is_some_and(|(_, &last)| last > range.start)
    }

    /// How many ranges there are.
    pub fn pieces(&self) -> usize {
        self.ends.len()
    }

    /// All ranges, in ascending order.
    pub fn ranges(&self) -> Vec<GpaRange> {
        self.ends.iter().map(|(&start, &end)| GpaRange { start, len: end - start }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GpaRange {
        GpaRange { start, len: end - start }
    }

    #[test]
    fn neighbours_are_joined_and_what_is_taken_out_splits() {
        let mut shared = SharedRanges::default();
        // In an order in which each joins another side.
        for page in [4, 6, 5, 1, 0, 3, 2] {
            shared.insert(range(page * 0x1000, (page + 1) * 0x1000));
        }
        assert_eq!(shared.ranges(), [range(0, 0x7000)]);
        shared.remove(range(0x2000, 0x3000));
        shared.remove(range(0x6000, 0x9000));
        shared.remove(range(0x3000, 0x3000));
        assert_eq!(shared.ranges(), [range(0, 0x2000), range(0x3000, 0x6000)]);
        assert!(shared.contains(range(0x3000, 0x6000)) && !shared.contains(range(0x1000, 0x4000)));
        assert!(shared.overlaps(range(0x1000, 0x4000)) && !shared.overlaps(range(0x2000, 0x3000)));
        shared.insert(range(0x1000, 0x5000));
        assert_eq!(shared.ranges(), [range(0, 0x6000)]);
        shared.remove(range(0, u64::MAX));
        assert_eq!(shared, SharedRanges::default());
    }

    /// Beside a plain list of pages.
    #[test]
    fn it_is_what_a_list_of_pages_is() {
        let (mut shared, mut pages, mut seed) = (SharedRanges::default(), [false; 32], 1_u64);
        for _ in 0..2000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (from, len, add) = (seed >> 33 & 31, seed >> 40 & 7, seed >> 50 & 1 == 1);
            let to = (from + len).min(32);
            let change = range(from * 0x1000, to * 0x1000);
            let touched: Vec<bool> = (from..to).map(|page| pages[usize::try_from(page).unwrap()]).collect();
            assert_eq!(shared.overlaps(change), touched.contains(&true));
            assert!(touched.is_empty() || shared.contains(change) != touched.contains(&false));
            if add {
                shared.insert(change)
            } else {
                shared.remove(change)
            }
            (from..to).for_each(|page| pages[usize::try_from(page).unwrap()] = add);
            let joined = shared.ranges().windows(2).all(|two| two[0].start + two[0].len < two[1].start);
            assert_eq!(shared.pieces(), shared.ranges().len());
            let covered: u64 = shared.ranges().iter().map(|range| range.len / 0x1000).sum();
            assert!(joined && covered == pages.iter().filter(|page| **page).count() as u64);
        }
    }
}
