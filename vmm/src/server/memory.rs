//! Where this process's memory goes, as the kernel counts it (`/proc/self/smaps`, proc_pid_smaps(5)).

use std::ops::Range;

/// What is resident, in bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Resident {
    /// Of the guest's memory.
    pub guest: u64,
    /// Of that, in huge pages.
    pub guest_huge: u64,
    /// Private memory of the monitor's own.
    pub overhead: u64,
}

/// Adds up `smaps`. The guest's memory lies at the addresses `guest`.
pub fn resident(smaps: &str, guest: &[Range<u64>]) -> Resident {
    let mut sum = Resident::default();
    let mut of_guest = false;
    for line in smaps.lines() {
        let Some((name, rest)) = line.split_once(':') else { continue };
        // The first line of a mapping begins with its addresses: "7f00-7f10 rw-p 00000000 00:00 0".
        if let Some(start) = name.split_once('-').and_then(|(start, _)| u64::from_str_radix(start, 16).ok()) {
            of_guest = guest.iter().any(|range| range.contains(&start));
            continue;
        }
        let kib = rest.trim().strip_suffix(" kB").and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        let into = match (name, of_guest) {
            ("Rss", true) => &mut sum.guest,
            ("AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped", true) => &mut sum.guest_huge,
            // What hugetlbfs gives is not part of the resident set.
            ("Private_Hugetlb" | "Shared_Hugetlb", true) => {
                sum.guest += kib << 10;
                &mut sum.guest_huge
            }
            ("Private_Dirty", false) => &mut sum.overhead,
            _ => continue,
        };
        *into += kib << 10;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_of_the_guest_are_told_from_the_monitors_own() {
        let smaps = "1000-9000 rw-p 00000000 00:00 0 \nRss: 32 kB\nPrivate_Dirty: 32 kB\nAnonHugePages: 16 kB\n\
                     9000-a000 rw-p 00000000 00:00 0 [heap]\nRss: 4 kB\nPrivate_Dirty: 4 kB\nVmFlags: rd wr\n\
                     a000-b000 rw-s 00000000 00:0f 7 /x\nRss: 0 kB\nPrivate_Hugetlb: 2048 kB\n";
        let guest = [0x1000..0x9000, 0xa000..0xb000];
        let expected =
            Resident { guest: (32 << 10) + (2 << 20), guest_huge: (16 << 10) + (2 << 20), overhead: 4 << 10 };
        assert_eq!(resident(smaps, &guest), expected);
        assert_eq!(resident("", &guest), Resident::default());
    }
}
