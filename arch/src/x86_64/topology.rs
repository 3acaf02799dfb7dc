//! How vCPUs are arranged in packages, cores and threads, and the APIC ids that follow from it.

use hal::VcpuId;

/// The highest APIC id that a vCPU can have: 255 addresses all of them (Intel SDM vol. 3 §11.6.1).
const MAX_APIC_ID: u32 = 254;

/// The arrangement of vCPUs.
///
/// An APIC id is three numbers side by side: package, core and thread, each in a field of as many bits as its count
/// needs. Where a count is no power of two, the ids have gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    sockets: u8,
    cores: u8,
    threads: u8,
}

/// An arrangement of vCPUs that cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// A count is zero.
    #[error("{field} is 0: at least 1 is needed")]
    Zero {
        /// The count: "sockets", "cores" or "threads".
        field: &'static str,
    },
    /// Some vCPU's APIC id would be too high.
    #[error(
        "{sockets} sockets of {cores} cores of {threads} threads need APIC ids up to {highest}, and the highest is \
         {MAX_APIC_ID}: use fewer vCPUs, or counts of cores and threads that are powers of two, so that no ids are lost"
    )]
    TooLarge {
        /// Packages.
        sockets: u32,
        /// Cores in a package.
        cores: u32,
        /// Threads in a core.
        threads: u32,
        /// The APIC id that the last vCPU would have.
        highest: u64,
    },
}

impl Topology {
    /// `sockets` packages of `cores` cores of `threads` threads.
    ///
    /// # Errors
    /// [`TopologyError`] where a count is 0 or some APIC id would exceed 254.
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Result<Self, TopologyError> {
        for (field, count) in [("sockets", sockets), ("cores", cores), ("threads", threads)] {
            if count == 0 {
                return Err(TopologyError::Zero { field });
            }
        }
        let core_shift = field_bits(threads);
        let package_shift = core_shift + field_bits(cores);
        // Each field has 32 bits at the most, so that any id fits into 96.
        let highest = (u128::from(sockets - 1) << package_shift)
            | (u128::from(cores - 1) << core_shift)
            | u128::from(threads - 1);
        let too_large = |_| TopologyError::TooLarge {
            sockets,
            cores,
            threads,
            highest: u64::try_from(highest).unwrap_or(u64::MAX),
        };
        if highest > u128::from(MAX_APIC_ID) {
            return Err(too_large(()));
        }
        Ok(Self {
            sockets: u8::try_from(sockets).map_err(|_| too_large(()))?,
            cores: u8::try_from(cores).map_err(|_| too_large(()))?,
            threads: u8::try_from(threads).map_err(|_| too_large(()))?,
        })
    }

    /// One package with `vcpus` cores of one thread each: what a guest schedules best on when nothing is known of the
    /// host, and what Linux starts fastest (its check of the time stamp counters is short within a package).
    ///
    /// # Errors
    /// [`TopologyError`] where `vcpus` is 0 or more than 255.
    pub fn flat(vcpus: u32) -> Result<Self, TopologyError> {
        Self::new(1, vcpus, 1)
    }

    /// The number of vCPUs.
    pub fn vcpus(&self) -> u32 {
        u32::from(self.sockets) * self.vcpus_per_package()
    }

    /// The ids of all vCPUs in order, which are their APIC ids. The first is 0, the boot processor.
    pub fn vcpu_ids(&self) -> Vec<VcpuId> {
        let Self { sockets, cores, threads } = *self;
        let mut ids = Vec::new();
        for package in 0..sockets {
            for core in 0..cores {
                for thread in 0..threads {
                    // No bit is shifted out: `new` has seen that the highest id fits.
                    let id = u32::from(package) << self.package_shift() | u32::from(core) << self.core_shift();
                    ids.extend(u8::try_from(id | u32::from(thread)).map(VcpuId));
                }
            }
        }
        ids
    }

    /// Threads in a core.
    pub fn threads(&self) -> u32 {
        self.threads.into()
    }

    /// vCPUs in a package.
    pub fn vcpus_per_package(&self) -> u32 {
        u32::from(self.cores) * u32::from(self.threads)
    }

    /// How far to shift an APIC id right to drop its thread: the core within all packages remains.
    pub fn core_shift(&self) -> u32 {
        field_bits(self.threads.into())
    }

    /// How far to shift an APIC id right to drop thread and core: the package remains.
    pub fn package_shift(&self) -> u32 {
        self.core_shift() + field_bits(self.cores.into())
    }
}

/// Bits of a field that holds the numbers from 0 to `count` - 1.
fn field_bits(count: u32) -> u32 {
    count.saturating_sub(1).checked_ilog2().map_or(0, |top_bit| top_bit + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ids(sockets: u32, cores: u32, threads: u32) -> Vec<u8> {
        Topology::new(sockets, cores, threads).unwrap().vcpu_ids().into_iter().map(|id| id.0).collect()
    }

    #[test]
    fn powers_of_two_have_no_gaps() {
        assert_eq!(ids(1, 1, 1), [0]);
        assert_eq!(ids(1, 2, 1), [0, 1]);
        assert_eq!(ids(2, 2, 2), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(ids(1, 254, 1), (0..=253).collect::<Vec<_>>());
        assert_eq!(ids(127, 1, 2), (0..=253).collect::<Vec<_>>());
    }

    #[test]
    fn other_counts_leave_gaps() {
        assert_eq!(ids(2, 3, 1), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(1, 2, 3), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(2, 3, 2), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        let topology = Topology::new(2, 3, 2).unwrap();
        assert_eq!((topology.core_shift(), topology.package_shift()), (1, 3));
        assert_eq!((topology.vcpus(), topology.vcpus_per_package(), topology.threads()), (12, 6, 2));
    }

    #[test]
    fn an_id_beyond_254_is_an_error() {
        assert_eq!(Topology::flat(255).map(|topology| topology.vcpus()), Ok(255));
        for (sockets, cores, threads, highest) in [(1, 256, 1, 255), (1, 300, 1, 299), (4, 33, 2, 449), (9, 20, 1, 275)]
        {
            let error = Topology::new(sockets, cores, threads).unwrap_err();
            assert_eq!(error, TopologyError::TooLarge { sockets, cores, threads, highest });
        }
        let error = Topology::new(9, 20, 1).unwrap_err().to_string();
        assert!(error.contains("9 sockets of 20 cores of 1 threads need APIC ids up to 275"), "{error}");
        Topology::new(u32::MAX, u32::MAX, u32::MAX).unwrap_err();
    }

    #[test]
    fn a_count_of_zero_is_an_error() {
        for (counts, field) in [((0, 1, 1), "sockets"), ((1, 0, 1), "cores"), ((1, 1, 0), "threads")] {
            assert_eq!(Topology::new(counts.0, counts.1, counts.2), Err(TopologyError::Zero { field }));
        }
        assert_eq!(Topology::flat(0).unwrap_err().to_string(), "cores is 0: at least 1 is needed");
    }
}
