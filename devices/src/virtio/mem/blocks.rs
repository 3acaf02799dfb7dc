//! Which blocks of a region are plugged.

use std::ops::Range;

/// A bit for each block. Ranges are of bytes from the region's start, in whole blocks, within the region.
pub(super) struct Blocks {
    words: Vec<u64>,
    count: u64,
    block_size: u64,
    plugged: u64,
}

impl Blocks {
    /// None is plugged.
    pub(super) fn new(count: u64, block_size: u64) -> Self {
        let words = usize::try_from(count.div_ceil(64)).unwrap_or(usize::MAX);
        Self { words: vec![0; words], count, block_size, plugged: 0 }
    }

    fn numbers(&self, bytes: &Range<u64>) -> Range<u64> {
        bytes.start / self.block_size..(bytes.end / self.block_size).min(self.count)
    }

    fn is_plugged(&self, number: u64) -> bool {
        let word = usize::try_from(number / 64).ok().and_then(|index| self.words.get(index));
        word.is_some_and(|word| word >> (number % 64) & 1 != 0)
    }

    /// Whether each block of a range is plugged, or none is.
    pub(super) fn are_all(&self, bytes: &Range<u64>, plugged: bool) -> bool {
        self.numbers(bytes).all(|number| self.is_plugged(number) == plugged)
    }

    /// Notes what became of a range whose blocks were all of the other state.
    pub(super) fn set(&mut self, bytes: &Range<u64>, plugged: bool) {
        let numbers = self.numbers(bytes);
        let changed = numbers.end.saturating_sub(numbers.start);
        for number in numbers {
            let index = usize::try_from(number / 64).unwrap_or(usize::MAX);
            let Some(word) = self.words.get_mut(index) else { return };
            let bit = 1 << (number % 64);
            if plugged { *word |= bit } else { *word &= !bit }
        }
        self.plugged = if plugged { self.plugged + changed } else { self.plugged.saturating_sub(changed) };
    }

    /// Bytes of all plugged blocks.
    pub(super) fn plugged_bytes(&self) -> u64 {
        self.plugged * self.block_size
    }

    /// The runs of plugged blocks, in their order.
    pub(super) fn plugged_runs(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for number in (0..self.count).filter(|number| self.is_plugged(*number)) {
            let start = number * self.block_size;
            match runs.last_mut() {
                Some(last) if last.end == start => last.end = start + self.block_size,
                _ => runs.push(start..start + self.block_size),
            }
        }
        runs
    }
}
