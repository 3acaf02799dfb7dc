//! Where a kernel is put at random.

use std::collections::BTreeMap;

use hal::GpaRange;

use super::super::kaslr::{Candidate, Slide, choose};
use super::super::map::MemoryMap;
use super::images::*;
use crate::layout;

const GIB: u64 = 1 << 30;
const LINKED: GpaRange = GpaRange { start: 16 * MIB, len: 39 * MIB + 5 };

fn map(ram: u64) -> MemoryMap {
    MemoryMap::new(&memory(ram), &platform(ram)).unwrap()
}

fn candidate() -> Candidate {
    Candidate { linked: LINKED, align: 2 * MIB, taken: None }
}

/// Random numbers that are the same in each run.
fn random_numbers() -> impl Iterator<Item = [u64; 2]> {
    let mut state = 0_u64;
    let mut next = move || {
        // SplitMix64.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    };
    std::iter::repeat_with(move || [next(), next()])
}

/// All addresses at which the kernel lies in RAM, beside what is taken.
fn possible(kernel: &Candidate, ram: u64) -> Vec<u64> {
    let fits = |start: u64| {
        let end = start + kernel.linked.len;
        let in_ram = layout::ram_ranges(ram).iter().any(|range| start >= range.start && end <= range.start + range.len);
        in_ram && kernel.taken.is_none_or(|taken| end <= taken.start || start >= taken.start + taken.len)
    };
    let step = usize::try_from(kernel.align).unwrap();
    (kernel.linked.start..ram + 2 * GIB).step_by(step).filter(|start| fits(*start)).collect()
}

/// Each value is as likely as the others: the sum of the squares of the differences from what is expected, by what is
/// expected, lies within five standard deviations of its mean.
fn assert_uniform(counts: &BTreeMap<u64, u32>, what: &str) {
    let values = f64::from(u32::try_from(counts.len()).unwrap());
    let expected = f64::from(counts.values().sum::<u32>()) / values;
    let chi_square: f64 = counts.values().map(|count| (f64::from(*count) - expected).powi(2) / expected).sum();
    let (mean, deviation) = (values - 1.0, (2.0 * (values - 1.0)).sqrt());
    assert!((chi_square - mean).abs() < 5.0 * deviation, "{what}: chi square {chi_square} of {values} values");
}

#[test]
fn all_places_are_as_likely_and_no_other_is_chosen() {
    let hole = |start, len| Some(GpaRange { start, len });
    for (ram, taken) in [
        (256 * MIB, None),
        (256 * MIB, hole(256 * MIB - 0x1f_f000, 0x1f_e123)),
        (256 * MIB, hole(100 * MIB - 0x1000, 0x1001)),
        (256 * MIB, hole(LINKED.start + LINKED.len, 1)),
        (3 * GIB + 100 * MIB, hole(0x7f00_0000, 0xff_f000)),
        (5 * GIB, None),
    ] {
        let (map, kernel) = (map(ram), Candidate { taken, ..candidate() });
        let places = possible(&kernel, ram);
        let mut physical: BTreeMap<u64, u32> = places.iter().map(|place| (*place, 0)).collect();
        let mut virt = BTreeMap::new();
        let times = 100 * places.len().max(500);
        for random in random_numbers().take(times) {
            let slide = choose(&kernel, &map, "root=/dev/vda", random).unwrap();
            let place = LINKED.start + slide.physical;
            *physical.get_mut(&place).unwrap_or_else(|| panic!("{place:#x} with {taken:?}")) += 1;
            *virt.entry(u64::from(slide.virt)).or_default() += 1;
        }
        assert_uniform(&physical, "physical");
        assert_uniform(&virt, "virtual");
        // The virtual addresses of a kernel end 1 GiB above their beginning.
        let last = (GIB - LINKED.start - LINKED.len) / (2 * MIB) * (2 * MIB);
        assert_eq!((virt.keys().min(), virt.keys().max()), (Some(&0), Some(&last)));
        assert_eq!(virt.len() as u64, last / (2 * MIB) + 1, "all multiples of 2 MiB");
    }
}

#[test]
fn ram_beyond_what_the_first_page_tables_map_is_not_used() {
    // Only addresses are looked at: nothing is there behind them.
    let kernel = candidate();
    let map = map(700 * GIB);
    let highest = random_numbers().take(20_000).map(|random| choose(&kernel, &map, "", random).unwrap().physical).max();
    let end = LINKED.start + highest.unwrap() + LINKED.len;
    assert!((500 * GIB..=512 * GIB).contains(&end), "{end:#x}");
}

#[test]
fn the_command_line_has_its_say() {
    let (map, kernel) = (map(256 * MIB), candidate());
    let chosen = |cmdline| choose(&kernel, &map, cmdline, [3, 5]);
    let free = Slide { physical: 10 * MIB, virt: 6 << 20 };
    for cmdline in ["", "root=/dev/vda quiet", "nokaslrs xnokaslr nokaslr=1", "xmem=1 memory=2"] {
        assert_eq!(chosen(cmdline), Some(free), "{cmdline}");
    }
    for cmdline in ["nokaslr", "quiet\tnokaslr", "a nokaslr\nb", "mem=64M nokaslr"] {
        assert_eq!(chosen(cmdline), None, "{cmdline}");
    }
    // What is taken from the kernel is not looked into: only the virtual address is random then.
    let options = ["mem=64M", "a memmap=1M$32M b", "hugepages=2", "hugepagesz=1G hugepages=1"];
    for cmdline in options {
        assert_eq!(chosen(cmdline), Some(Slide { physical: 0, ..free }), "{cmdline}");
    }
}

#[test]
fn a_kernel_with_one_place_stays_there() {
    let kernel = candidate();
    let ram = 56 * MIB;
    for random in random_numbers().take(1000) {
        assert_eq!(choose(&kernel, &map(ram), "", random).unwrap().physical, 0);
    }
    // It is all of its virtual addresses long, or longer.
    let long = |len| Candidate { linked: GpaRange { start: 16 * MIB, len }, ..candidate() };
    let slide = choose(&long(GIB - 16 * MIB), &map(2 * GIB), "", [7, 7]).unwrap();
    assert_eq!((slide.virt, slide.physical), (0, 14 * MIB));
    assert_eq!(choose(&long(GIB - 16 * MIB + 1), &map(2 * GIB), "", [7, 7]), None);
    assert_eq!(choose(&long(u64::MAX), &map(2 * GIB), "", [7, 7]), None);
}

#[test]
fn larger_alignments_are_kept() {
    let kernel = Candidate { align: 16 * MIB, ..candidate() };
    let map = map(5 * GIB);
    for random in random_numbers().take(10_000) {
        let slide = choose(&kernel, &map, "", random).unwrap();
        assert_eq!(slide.physical % (16 * MIB), 0);
        assert_eq!(slide.virt % (16 << 20), 0);
    }
}
