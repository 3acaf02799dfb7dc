//! Where a fuzzed guest has its rings and buffers, and the codes by which a program names addresses and lengths.
//!
//! ```text
//!   0x0_1000 rings, 0x800 for each queue     0x0_8000 buffers
//!   0x0_5000 indirect tables                 0x1_0000 the sound driver that comes after the program
//!   0x0_6000 headers of requests             0x2_0000 no memory, then 0x3_0000 to 0x3_8000 again
//! ```

use std::ops::Range;

use vm_memory::{GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory, with a hole in it.
pub const REGIONS: [Range<u64>; 2] = [0..0x2_0000, 0x3_0000..0x3_8000];
/// What the sound driver after a program uses.
pub const SOUND: Range<u64> = 0x1_0000..0x2_0000;
/// Queues that a program can name.
pub const QUEUES: u8 = 8;
/// Indirect tables of a queue have this many descriptors.
pub const INDIRECT_ENTRIES: u8 = 32;

/// New guest memory, of zeros.
pub fn memory() -> GuestMemoryAtomic<GuestMemoryMmap> {
    let ranges = REGIONS.map(|range| (GuestAddress(range.start), length(&range)));
    GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&ranges).expect("guest memory"))
}

/// A range's length.
pub fn length(range: &Range<u64>) -> usize {
    usize::try_from(range.end - range.start).expect("a length")
}

/// A queue's descriptor table, available ring and used ring, for up to 64 descriptors; with more they overlap.
pub fn rings(queue: u8) -> [u64; 3] {
    let base = 0x1000 + 0x800 * u64::from(queue % QUEUES);
    [base, base + 0x400, base + 0x500]
}

/// A queue's indirect table.
pub fn indirect_table(queue: u8) -> u64 {
    0x5000 + 0x200 * u64::from(queue % QUEUES)
}

/// Where a queue's request has its header, by the number of the request.
pub fn header(queue: u8, number: u16) -> u64 {
    0x6000 + 0x200 * u64::from(queue % QUEUES) + 16 * u64::from(number % 32)
}

/// An address by its code: mostly of rings and buffers, sometimes at an edge, sometimes far outside.
pub fn address(code: u16) -> u64 {
    let low = u64::from(code & 0x3fff);
    match code >> 14 {
        0 => low << 3,
        1 => low + 0x1000,
        2 => {
            let edges = [0x2_0000, 0x3_0000, 0x3_8000, 0x1_0000];
            edges[usize::from(code & 3)] - 64 + (low >> 2 & 0x7f)
        }
        _ => {
            let far = [u64::MAX, 1 << 63, 0xffff_ffff, 0xfee0_0000, 0xe000_0000, 0x10_0000_0000, 1 << 32, 1 << 52];
            far[usize::from(code & 7)].wrapping_sub(low >> 3)
        }
    }
}

/// A length by its code.
pub fn len(code: u8) -> u32 {
    let low = u32::from(code & 0x3f);
    match code >> 6 {
        0 => low,
        1 => low * 16,
        2 => low * 512,
        _ => [u32::MAX, 1 << 31, 0x1_0000, 0x2_0000, 0x8000, 0xffff_f000, 0xffff, 0x7fff_ffff][usize::from(code & 7)],
    }
}
