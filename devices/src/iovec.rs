//! Scatter-gather lists over guest memory, for the system calls that take them (`readv` and its kin).
//!
//! A list holds addresses only. Whoever hands one to the kernel keeps the [`crate::virtio::Chain`] that it was
//! made from until the kernel is done.

#![expect(unsafe_code, reason = "a list of host addresses is sent to the thread that uses it")]

use std::ptr;

use vm_memory::VolatileSlice;

/// The most entries that one system call takes (`IOV_MAX`).
const MAX_ENTRIES: usize = 1024;

/// Ranges of the monitor's own address space, in order, of which some from the front may be done already.
#[derive(Debug, Default)]
pub struct IoVectors {
    entries: Vec<libc::iovec>,
    /// Entries that are done.
    first: usize,
}

// SAFETY: the addresses are those of guest memory or of statics, which every thread may reach; they are only
// dereferenced by the kernel, for a caller that vouches for them.
unsafe impl Send for IoVectors {}

impl IoVectors {
    /// A list of no ranges.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends ranges of guest memory.
    pub fn extend<'a>(&mut self, slices: impl Iterator<Item = VolatileSlice<'a>>) {
        self.entries.extend(
            slices.map(|slice| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() }),
        );
    }

    /// Appends `len` bytes that are zero, to be read only. They are aligned as direct I/O wants them.
    pub fn extend_zeroes(&mut self, mut len: usize) {
        while len > 0 {
            let piece = len.min(Zeroes::LEN);
            self.entries.push(libc::iovec { iov_base: ptr::from_ref(&ZEROES).cast_mut().cast(), iov_len: piece });
            len -= piece;
        }
    }

    /// Empties the list, keeping its memory.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.first = 0;
    }

    /// What one system call can take of the ranges that are left.
    pub fn left(&self) -> &[libc::iovec] {
        let left = self.entries.get(self.first..).unwrap_or_default();
        left.get(..MAX_ENTRIES).unwrap_or(left)
    }

    /// Bytes left in all.
    pub fn len(&self) -> usize {
        let left = self.entries.get(self.first..).unwrap_or_default();
        left.iter().map(|entry| entry.iov_len).sum()
    }

    /// True where no bytes are left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Steps over `count` bytes that are done, or to the end.
    pub fn advance(&mut self, mut count: usize) {
        while let Some(entry) = self.entries.get_mut(self.first) {
            if count < entry.iov_len {
                entry.iov_base = entry.iov_base.wrapping_byte_add(count);
                entry.iov_len -= count;
                return;
            }
            count -= entry.iov_len;
            self.first += 1;
        }
    }

    /// True where each range that is left starts and ends at a multiple of `align`.
    pub fn is_aligned(&self, align: usize) -> bool {
        let left = self.entries.get(self.first..).unwrap_or_default();
        left.iter().all(|entry| entry.iov_base.addr().is_multiple_of(align) && entry.iov_len.is_multiple_of(align))
    }
}

/// A page-aligned run of zeroes. It is of atomics so that it lies in memory that takes no room in the executable.
#[repr(align(4096))]
struct Zeroes {
    _bytes: [std::sync::atomic::AtomicU8; Self::LEN],
}

impl Zeroes {
    const LEN: usize = 64 << 10;
}

static ZEROES: Zeroes = Zeroes { _bytes: [const { std::sync::atomic::AtomicU8::new(0) }; Zeroes::LEN] };

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x10000)]).unwrap()
    }

    #[test]
    fn advancing_splits_an_entry_and_skips_whole_ones() {
        let memory = memory();
        memory.write_slice(b"abcdefgh", GuestAddress(0x100)).unwrap();
        let mut list = IoVectors::new();
        list.extend(
            [(0x100, 3), (0x103, 5)].into_iter().map(|(at, len)| memory.get_slice(GuestAddress(at), len).unwrap()),
        );
        assert_eq!(list.len(), 8);
        list.advance(4);
        assert_eq!(list.len(), 4);
        assert_eq!(list.left().len(), 1);
        assert!(list.is_aligned(4));
        assert!(!list.is_aligned(8));
        list.advance(100);
        assert!(list.is_empty());
    }

    #[test]
    fn one_call_never_gets_more_than_the_kernel_takes() {
        let mut list = IoVectors::new();
        list.extend_zeroes(Zeroes::LEN * (MAX_ENTRIES + 3));
        assert_eq!(list.left().len(), MAX_ENTRIES);
        list.advance(Zeroes::LEN * MAX_ENTRIES);
        assert_eq!(list.left().len(), 3);
        assert!(list.is_aligned(4096));
    }
}
