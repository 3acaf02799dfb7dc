//! The kernel's relocation table: places in the kernel that hold an address of its own, and must be corrected when it
//! runs at another virtual address than it was linked for (Linux, `arch/x86/tools/relocs.c` writes it and
//! `handle_relocations` in `arch/x86/boot/compressed/misc.c` reads it).
//!
//! The table is a row of 32-bit words, lists that each begin with a zero: places of 64-bit addresses, places of 32-bit
//! offsets that go down when the kernel goes up (up to Linux 6.14), and places of 32-bit addresses. A place is a virtual
//! address of which the upper half, all ones, is left out.

use hal::GpaRange;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

use super::error::BootError;
use super::payload::PayloadError;
use super::plan::KernelFile;

/// Where the kernel's virtual addresses begin (Linux, `__START_KERNEL_map`), without its upper half.
const START_KERNEL_MAP: u32 = 0x8000_0000;
/// Longer than the table of any kernel, in bytes.
const MAX_TABLE: u64 = 64 << 20;

/// The places to correct, as physical addresses at which the kernel is linked, counted from its start.
#[derive(Debug)]
pub(super) struct Relocations {
    /// Bytes of the kernel, all places within.
    len: usize,
    /// 64-bit addresses.
    wide: Vec<u32>,
    /// 32-bit offsets to something that does not move with the kernel.
    inverse: Vec<u32>,
    /// 32-bit addresses.
    narrow: Vec<u32>,
}

impl Relocations {
    /// Reads the table from `start` to the end of the image; `None` where there is none. Each place must lie in `range`.
    pub(super) fn read(image: &KernelFile, start: u64, range: GpaRange) -> Result<Option<Self>, PayloadError> {
        let wrong = |problem: String| PayloadError::Relocations { problem };
        let size = image.size().saturating_sub(start);
        if size == 0 {
            return Ok(None);
        }
        if size > MAX_TABLE || !size.is_multiple_of(4) {
            return Err(wrong(format!("has {size} bytes: a multiple of 4, up to 64 MiB, is right")));
        }
        let len = usize::try_from(size).map_err(|error| wrong(error.to_string()))?;
        let bytes =
            image.bytes(start, len, "the relocation table").map_err(|error| PayloadError::Kernel(Box::new(error)))?;
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word: &[u8; 4]| u32::from_le_bytes(*word)).collect();
        let lists: Vec<&[u32]> = words.splitn(5, |word| *word == 0).collect();
        let (wide, inverse, narrow): (&[u32], &[u32], &[u32]) = match lists[..] {
            [[], wide, narrow] => (wide, &[], narrow),
            [[], wide, inverse, narrow] => (wide, inverse, narrow),
            _ => {
                let lists = words.iter().filter(|word| **word == 0).count();
                return Err(wrong(format!(
                    "begins with {:#x} and has {lists} zeros: two or three lists, each behind a zero, are right",
                    words.first().copied().unwrap_or_default()
                )));
            }
        };
        let place = |list: &[u32], size| list.iter().map(|word| offset(*word, size, range)).collect::<Result<_, _>>();
        let len = usize::try_from(range.len).map_err(|error| wrong(error.to_string()))?;
        Ok(Some(Self { len, wide: place(wide, 8)?, inverse: place(inverse, 4)?, narrow: place(narrow, 4)? }))
    }

    /// Corrects the kernel that begins at `start` in guest memory for a virtual address that is `slide` bytes higher, less than
    /// 1 GiB.
    pub(super) fn apply(&self, memory: &GuestMemoryMmap, start: u64, slide: u32) -> Result<(), BootError> {
        let failed = |source| BootError::Write { what: "a relocated kernel", at: start, source };
        let code = memory.get_slice(GuestAddress(start), self.len).map_err(failed)?;
        for (list, slide) in [(&self.inverse, slide.wrapping_neg()), (&self.narrow, slide)] {
            for place in list {
                let word = code.get_ref::<u32>(index(*place)).map_err(|error| failed(error.into()))?;
                word.store(word.load().wrapping_add(slide));
            }
        }
        for place in &self.wide {
            let word = code.get_ref::<u64>(index(*place)).map_err(|error| failed(error.into()))?;
            word.store(word.load().wrapping_add(slide.into()));
        }
        Ok(())
    }
}

/// A place of `size` bytes as an offset in the kernel.
fn offset(word: u32, size: u64, range: GpaRange) -> Result<u32, PayloadError> {
    let physical = word.checked_sub(START_KERNEL_MAP).map(u64::from);
    physical
        .and_then(|physical| physical.checked_sub(range.start))
        .filter(|offset| offset.saturating_add(size) <= range.len)
        .and_then(|offset| u32::try_from(offset).ok())
        .ok_or_else(|| PayloadError::Relocations {
            problem: format!("points to {word:#x}, outside the kernel at {:#x}", range.start),
        })
}

fn index(place: u32) -> usize {
    usize::try_from(place).unwrap_or(usize::MAX)
}
