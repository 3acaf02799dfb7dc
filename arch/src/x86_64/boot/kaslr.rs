//! Address space layout randomization: where a kernel goes in physical and in virtual memory, chosen as the kernel's own
//! decompressor would (Linux, `arch/x86/boot/compressed/kaslr.c`).

use hal::GpaRange;

use super::map::{MemoryMap, Span};

/// The virtual addresses that kernels are mapped to, in bytes (Linux, `KERNEL_IMAGE_SIZE`).
const KERNEL_IMAGE_SIZE: u64 = 1 << 30;
/// What the page tables at the entry can map: all that one table of the third level covers.
const REACHABLE: u64 = 512 << 30;

/// How far a kernel lies from the addresses that it was linked for, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slide {
    /// In guest physical memory.
    pub physical: u64,
    /// In the kernel's virtual addresses. Less than 1 GiB.
    pub virt: u32,
}

/// A kernel to be placed.
pub(super) struct Candidate {
    /// Where it would go, aligned.
    pub(super) linked: GpaRange,
    /// What its addresses are a multiple of: a power of two.
    pub(super) align: u64,
    /// Memory that is taken.
    pub(super) taken: Option<GpaRange>,
}

/// Chooses one of all possible places, each as likely as the others. `random` are two random numbers.
///
/// Nothing moves with `nokaslr` on the command line. With an option there that takes memory from the kernel only the
/// virtual address changes, so that the kernel is not put into what is taken.
pub(super) fn choose(kernel: &Candidate, map: &MemoryMap, cmdline: &str, random: [u64; 2]) -> Option<Slide> {
    let options = || cmdline.split_ascii_whitespace();
    if options().any(|option| option == "nokaslr") {
        return None;
    }
    let room = KERNEL_IMAGE_SIZE.checked_sub(kernel.linked.start.checked_add(kernel.linked.len)?)?;
    let slots = room / kernel.align + 1;
    let virt = u32::try_from(random[0] % slots * kernel.align).ok()?;
    let takes_memory = ["mem=", "memmap=", "hugepages=", "hugepagesz="];
    let fixed = options().any(|option| takes_memory.iter().any(|name| option.starts_with(name)));
    let physical = if fixed { None } else { choose_physical(kernel, map, random[1]) };
    Some(Slide { physical: physical.unwrap_or(0), virt })
}

fn choose_physical(kernel: &Candidate, map: &MemoryMap, random: u64) -> Option<u64> {
    let taken = kernel.taken.map_or(Span::new(0, 0), Span::from);
    let reach = Span::new(kernel.linked.start, REACHABLE);
    let areas: Vec<Slots> = map
        .ram()
        .map(|ram| ram.cut(reach.start(), reach.end()))
        .flat_map(|ram| [ram.cut(0, taken.start().max(1)), ram.cut(taken.end(), u64::MAX)])
        .filter_map(|free| Slots::new(free, kernel))
        .collect();
    let all: u64 = areas.iter().map(|area| area.count).sum();
    let mut slot = random.checked_rem(all)?;
    for area in &areas {
        if slot < area.count {
            return Some(area.first + slot * kernel.align - kernel.linked.start);
        }
        slot -= area.count;
    }
    None
}

/// The places for a kernel in a range of free memory.
struct Slots {
    first: u64,
    count: u64,
}

impl Slots {
    fn new(free: Span, kernel: &Candidate) -> Option<Self> {
        let first = free.start().checked_next_multiple_of(kernel.align)?;
        let last = free.end().checked_sub(kernel.linked.len)?;
        let count = last.checked_sub(first)? / kernel.align + 1;
        Some(Self { first, count })
    }
}
