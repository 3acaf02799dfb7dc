//! Where a guest's kernel lies, as the guest itself tells, and whether many of them lie as uniform draws would.

use std::collections::HashSet;
use std::fs;

use anyhow::{Context, Result, ensure};

use crate::kernels::Kernel;
use crate::story::ask;
use crate::vm::Vm;

/// Where Linux is linked for: its virtual and its physical address.
pub const LINKED: Place = Place { virt: 0xffff_ffff_8100_0000, physical: LINKED_PHYSICAL };
const LINKED_PHYSICAL: u64 = 0x100_0000;
/// What both addresses are a multiple of (`CONFIG_PHYSICAL_ALIGN`, and what page tables map at once).
const ALIGN: u64 = 2 << 20;
/// How many bytes of virtual addresses there are for kernels (Linux, `KERNEL_IMAGE_SIZE`), from 16 MiB below [`LINKED`] on.
const VIRTUAL_LEN: u64 = 1 << 30;

/// How likely it may be that uniform draws fail one check: there are four for each kernel that is looked at.
const CHANCE: f64 = 1e-7;

/// Where a kernel lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Place {
    /// The virtual address of its first byte, the symbol `_text`.
    pub virt: u64,
    /// The physical one.
    pub physical: u64,
}

impl Place {
    /// Asks a guest, whose agent is root: only then symbols have addresses.
    ///
    /// # Errors
    /// Where the guest does not say.
    pub fn of(vm: &Vm) -> Result<Self> {
        let symbol = "sed -n '/ _text$/{s/ .*//p;q}' /proc/kallsyms";
        let memory = r"sed -n 's/^ *\([0-9a-f]*\)-.* Kernel code$/\1/p' /proc/iomem";
        let told = ask(vm, &format!("{symbol}; {memory}"))?;
        let numbers: Vec<u64> =
            told.lines().map(|line| u64::from_str_radix(line, 16)).collect::<Result<_, _>>().context(told.clone())?;
        let [virt, physical] = numbers[..] else { anyhow::bail!("two addresses were to come: {told:?}") };
        Ok(Self { virt, physical })
    }
}

/// The places that a kernel may be given.
#[derive(Debug, Clone, Copy)]
pub struct Room {
    /// How many there are in virtual memory.
    virt: u64,
    /// How many there are in physical memory.
    physical: u64,
}

impl Room {
    /// For a kernel in a guest with so many bytes of RAM, less than 3 GiB.
    ///
    /// # Errors
    /// Where the kernel is not there, or does not fit.
    pub fn new(kernel: Kernel, ram: u64) -> Result<Self> {
        // What is unpacked is longer than what the kernel takes then: that much must be free at its place.
        let len = fs::metadata(kernel.vmlinux()?)?.len();
        let slots = |end: u64| Some(end.checked_sub(LINKED_PHYSICAL + len)? / ALIGN + 1);
        let (virt, physical) = slots(VIRTUAL_LEN).zip(slots(ram)).context("there is no room for the kernel")?;
        Ok(Self { virt, physical })
    }

    /// Checks that a place is one that the kernel's own decompressor might choose.
    ///
    /// # Errors
    /// It is none.
    pub fn check(&self, place: Place) -> Result<()> {
        let aligned = place.virt.is_multiple_of(ALIGN) && place.physical.is_multiple_of(ALIGN);
        let inside = slot(place.virt, LINKED.virt).is_some_and(|slot| slot < self.virt)
            && slot(place.physical, LINKED.physical).is_some_and(|slot| slot < self.physical);
        ensure!(aligned && inside, "a kernel lies at {place:x?}, and there are {self:?} from {LINKED:x?} on");
        Ok(())
    }

    /// How the virtual addresses of many kernels are spread.
    pub fn spread_of_virtual(&self, places: &[Place]) -> Spread {
        Spread::new(places.iter().filter_map(|place| slot(place.virt, LINKED.virt)), self.virt)
    }

    /// How the physical addresses of many kernels are spread.
    pub fn spread_of_physical(&self, places: &[Place]) -> Spread {
        Spread::new(places.iter().filter_map(|place| slot(place.physical, LINKED.physical)), self.physical)
    }
}

/// Which of the places an address is.
fn slot(address: u64, linked: u64) -> Option<u64> {
    Some(address.checked_sub(linked)? / ALIGN)
}

/// How numbers are spread over all that there might be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Numbers.
    pub draws: u32,
    /// Numbers that could have come.
    pub of: u64,
    /// Different ones.
    pub distinct: usize,
    /// The lowest.
    pub least: u64,
    /// The highest.
    pub most: u64,
    /// How far the share of numbers up to one lies from what it would be for uniform draws, at the most (the statistic of
    /// Kolmogorov and Smirnov): 0 to 1.
    pub distance: f64,
}

impl Spread {
    fn new(numbers: impl Iterator<Item = u64>, of: u64) -> Self {
        let mut numbers: Vec<u64> = numbers.collect();
        numbers.sort_unstable();
        let draws = u32::try_from(numbers.len()).unwrap_or(u32::MAX);
        let share = |part: usize, all: f64| f64::from(u32::try_from(part).unwrap_or(u32::MAX)) / all;
        let all = f64::from(u32::try_from(of).unwrap_or(u32::MAX));
        let distance = numbers.iter().enumerate().map(|(before, number)| {
            let number = usize::try_from(*number).unwrap_or(usize::MAX);
            // Right below the number, and at it.
            let below = share(number, all) - share(before, draws.into());
            let at = share(before + 1, draws.into()) - share(number + 1, all);
            below.max(at)
        });
        Self {
            draws,
            of,
            distinct: numbers.iter().collect::<HashSet<_>>().len(),
            least: numbers.first().copied().unwrap_or(0),
            most: numbers.last().copied().unwrap_or(0),
            distance: distance.fold(0.0, f64::max),
        }
    }

    /// Checks that uniform draws may be spread so. They fail with a probability below one in a million.
    ///
    /// # Errors
    /// Uniform draws are not.
    pub fn check_uniform(&self) -> Result<()> {
        // By the inequality of Dvoretzky, Kiefer, Wolfowitz and Massart: P(distance > e) <= 2 exp(-2 n e²).
        let far = (f64::ln(2.0 / CHANCE) / (2.0 * f64::from(self.draws))).sqrt();
        ensure!(self.distance <= far, "too far from uniform draws, which lie within {far:.3}: {self:?}");
        let chance = self.chance_of_so_few();
        ensure!(chance >= CHANCE, "too many came again, which has a chance of {chance:e}: {self:?}");
        Ok(())
    }

    /// The probability that so many uniform draws show no more different numbers.
    fn chance_of_so_few(&self) -> f64 {
        let of = f64::from(u32::try_from(self.of).unwrap_or(u32::MAX));
        // By the number of different ones so far.
        let mut chances = vec![1.0];
        for _ in 0..self.draws {
            let mut next = vec![0.0; chances.len() + 1];
            for (distinct, chance) in chances.iter().enumerate() {
                let again = f64::from(u32::try_from(distinct).unwrap_or(u32::MAX)) / of;
                next[distinct] += chance * again;
                next[distinct + 1] += chance * (1.0 - again).max(0.0);
            }
            chances = next;
        }
        chances.iter().take(self.distinct + 1).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers that are the same in each run.
    fn numbers(seed: u64, below: u64) -> impl Iterator<Item = u64> {
        let mut state = seed;
        std::iter::repeat_with(move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        })
    }

    #[test]
    fn uniform_draws_pass_and_others_do_not() {
        const OF: u64 = 460;
        let spread = |numbers: &mut dyn Iterator<Item = u64>| Spread::new(numbers.take(100), OF);
        for seed in 0..1000 {
            spread(&mut numbers(seed, OF)).check_uniform().unwrap();
        }
        let bad: [(&str, &mut dyn Iterator<Item = u64>); 7] = [
            ("one", &mut std::iter::repeat(77)),
            ("the lower half", &mut numbers(1, OF / 2)),
            ("the upper half", &mut numbers(2, OF / 2).map(|number| number + OF / 2)),
            ("the middle", &mut numbers(3, OF / 4).map(|number| number + 3 * OF / 8)),
            ("both ends", &mut numbers(4, OF / 16).map(|number| if number % 2 == 0 { number } else { OF - number })),
            ("every eighth", &mut numbers(5, OF / 8).map(|number| number * 8)),
            ("few of many", &mut numbers(6, OF).map(|number| number - number % 10)),
        ];
        for (name, numbers) in bad {
            let spread = spread(numbers);
            spread.check_uniform().expect_err(name);
        }
    }

    #[test]
    fn the_chance_is_that_of_occupancy() {
        let chance =
            |draws, distinct| Spread { draws, of: 3, distinct, least: 0, most: 0, distance: 0.0 }.chance_of_so_few();
        // Of 27 ways to draw three of three, 3 have one number, 18 two, and 6 three.
        for (distinct, ways) in [(0, 0.0), (1, 3.0), (2, 21.0), (3, 27.0)] {
            assert!((chance(3, distinct) - ways / 27.0).abs() < 1e-12, "{distinct}");
        }
        assert!(chance(40, 3) > 0.999_999);
    }

    #[test]
    fn the_distance_is_that_of_the_definition() {
        let spread = |numbers: &[u64]| Spread::new(numbers.iter().copied(), 10);
        let all: Vec<u64> = (0..10).collect();
        assert!(spread(&all).distance < 1e-9);
        assert!((spread(&[0; 4]).distance - 0.9).abs() < 1e-9);
        assert!((spread(&[9; 4]).distance - 0.9).abs() < 1e-9);
        let half = spread(&[0, 1, 2, 3, 4]);
        assert!((half.distance - 0.5).abs() < 1e-9);
        assert_eq!((half.draws, half.distinct, half.least, half.most), (5, 5, 0, 4));
    }
}
