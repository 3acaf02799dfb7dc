//! The leaves as guests read them.

use super::test_host::{TSC_KHZ, caps};
use super::*;

fn table(vendor: Vendor, topology: Topology) -> CpuidTable {
    CpuidTable::new(&caps(vendor), Some(TSC_KHZ), topology)
}

/// What a vCPU reads, with zeros for what has no entry.
fn read(leaves: &[CpuidEntry], function: u32, index: u32) -> [u32; 4] {
    let matching: Vec<_> = leaves
        .iter()
        .filter(|leaf| leaf.function == function && leaf.index.is_none_or(|own| own == index))
        .map(|leaf| [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
        .collect();
    assert!(matching.len() <= 1, "leaf {function:#x}.{index} has {} entries", matching.len());
    matching.first().copied().unwrap_or_default()
}

/// Every shape, with the number of vCPUs it has.
const SHAPES: [(u32, u32, u32); 9] =
    [(1, 1, 1), (1, 2, 1), (1, 8, 1), (1, 254, 1), (2, 4, 1), (2, 2, 2), (2, 3, 2), (4, 1, 1), (1, 5, 3)];

/// The topology that a guest works out of leaf 0xb as Linux does: package, core and thread of an APIC id by shifts.
fn decode(leaves: &[CpuidEntry], function: u32) -> (u32, u32, u32) {
    let [thread_shift, threads, thread_level, id] = read(leaves, function, 0);
    let [core_shift, logical, core_level, same_id] = read(leaves, function, 1);
    assert_eq!((thread_level, core_level), (0x100, 0x201));
    assert_eq!(id, same_id);
    assert_eq!(read(leaves, function, 2), [0, 0, 2, id]);
    assert!(threads <= 1 << thread_shift && logical <= 1 << core_shift);
    (id >> core_shift, (id & ((1 << core_shift) - 1)) >> thread_shift, id & ((1 << thread_shift) - 1))
}

#[test]
fn every_vcpu_finds_its_place() {
    for (sockets, cores, threads) in SHAPES {
        let topology = Topology::new(sockets, cores, threads).unwrap();
        for vendor in [Vendor::Intel, Vendor::Amd] {
            let table = table(vendor, topology);
            let places = (0..sockets).flat_map(|package| {
                (0..cores).flat_map(move |core| (0..threads).map(move |thread| (package, core, thread)))
            });
            let ids = topology.vcpu_ids();
            assert_eq!(ids.len(), usize::try_from(sockets * cores * threads).unwrap());
            for (id, place) in ids.into_iter().zip(places) {
                let leaves = table.for_vcpu(id);
                assert_eq!(decode(&leaves, 0x0b), place);
                if vendor == Vendor::Intel {
                    assert_eq!(decode(&leaves, 0x1f), place);
                }
                assert_eq!(read(&leaves, 1, 0)[1] >> 24, u32::from(id.0));
                assert_eq!(read(&leaves, 0x0b, 0)[1], threads);
                assert_eq!(read(&leaves, 0x0b, 1)[1], cores * threads);
            }
        }
    }
}

#[test]
fn leaf_1_counts_the_ids_of_the_package() {
    for ((sockets, cores, threads), (count, several)) in
        SHAPES.into_iter().zip([(1, 0), (2, 1), (8, 1), (255, 1), (4, 1), (4, 1), (8, 1), (1, 0), (32, 1)])
    {
        let table = table(Vendor::Intel, Topology::new(sockets, cores, threads).unwrap());
        let [_, ebx, _, edx] = read(&table.for_vcpu(VcpuId(0)), 1, 0);
        assert_eq!((ebx >> 16 & 0xff, edx >> 28 & 1), (count, several), "{sockets} {cores} {threads}");
        // The size of a cache line is the host's.
        assert_eq!(ebx >> 8 & 0xff, 8);
    }
}

#[test]
fn caches_are_shared_by_threads_and_packages() {
    let topology = Topology::new(2, 3, 2).unwrap();
    let intel = table(Vendor::Intel, topology).for_vcpu(VcpuId(0));
    // Sharing in bits 25:14, cores in bits 31:26, both as the highest number.
    let sharing = |function, index| read(&intel, function, index)[0] >> 14;
    assert_eq!([0, 1, 2, 3].map(|index| sharing(0x04, index)), [1 | 3 << 12, 1 | 3 << 12, 1 | 3 << 12, 7 | 3 << 12]);
    assert_eq!(read(&intel, 0x04, 0)[0] & 0x3fff, 0x121);
    assert_eq!(read(&intel, 0x04, 4), [0; 4]);

    let amd = table(Vendor::Amd, topology).for_vcpu(VcpuId(0));
    assert_eq!([0, 2, 3].map(|index| read(&amd, 0x8000_001d, index)[0] >> 14), [1, 1, 7]);
    assert_eq!(read(&amd, 0x8000_001d, 4), [0; 4]);

    // More cores than the field of leaf 4 can count.
    let many = table(Vendor::Intel, Topology::flat(254).unwrap()).for_vcpu(VcpuId(0));
    assert_eq!(read(&many, 0x04, 3)[0] >> 14, 255 | 63 << 12);
}

#[test]
fn amd_guests_find_the_topology_in_their_own_leaves() {
    let topology = Topology::new(2, 3, 2).unwrap();
    let table = table(Vendor::Amd, topology);
    // The sixth vCPU of the second package: its core 2, its thread 1.
    let leaves = table.for_vcpu(VcpuId(13));
    assert_eq!(read(&leaves, 0x8000_001e, 0), [13, 1 << 8 | 2, 1, 0]);
    assert_eq!(read(&leaves, 0x8000_0008, 0)[2], 5 | 3 << 12);
    assert_eq!(read(&leaves, 0x8000_0001, 0)[2] & 2, 2);
    let single = super::CpuidTable::new(&caps(Vendor::Amd), None, Topology::flat(1).unwrap()).for_vcpu(VcpuId(0));
    assert_eq!(read(&single, 0x8000_0001, 0)[2] & 2, 0);
    assert_eq!(read(&single, 0x8000_0008, 0)[2], 0);
}

#[test]
fn guests_see_a_hypervisor_and_no_nesting() {
    for vendor in [Vendor::Intel, Vendor::Amd, Vendor::Other] {
        let leaves = table(vendor, Topology::flat(2).unwrap()).for_vcpu(VcpuId(1));
        let [_, _, ecx, _] = read(&leaves, 1, 0);
        assert_eq!(ecx >> 31, 1, "hypervisor");
        assert_eq!(ecx >> 24 & 1, 1, "TSC deadline");
        assert_eq!(ecx >> 21 & 1, 1, "x2APIC");
        assert_eq!(ecx >> 5 & 1, 0, "VMX");
        assert_eq!(read(&leaves, 0x8000_0001, 0)[2] >> 2 & 1, 0, "SVM");
        assert_eq!(read(&leaves, 0x06, 0), [4, 0, 0, 0], "the APIC timer never stops, and nothing else");
        assert_eq!(read(&leaves, 0x07, 0)[1] >> 1 & 1, 1, "TSC_ADJUST");
        assert_eq!(read(&leaves, 0x07, 1), [0x10, 0, 0, 0]);
        assert_eq!(read(&leaves, 0x8000_0007, 0)[3], 0x100, "invariant TSC");
        assert_eq!(read(&leaves, 0x4000_0001, 0), [0x0100_7efb, 0, 0, 0]);
        assert_eq!(read(&leaves, 0x8000_0008, 0)[0] & 0xff, 40, "bits of a physical address");
        for hidden in [0x0a, 0x8000_000a, 0x8000_001f] {
            assert_eq!(read(&leaves, hidden, 0), [0; 4], "{hidden:#x}");
        }
    }
}

#[test]
fn what_the_host_lacks_is_not_shown() {
    let mut host = caps(Vendor::Intel);
    host.tsc_deadline = false;
    host.cpuid.iter_mut().filter(|leaf| leaf.function == 7).for_each(|leaf| leaf.ebx = 0);
    let leaves = CpuidTable::new(&host, None, Topology::flat(1).unwrap()).for_vcpu(VcpuId(0));
    assert_eq!(read(&leaves, 1, 0)[2] >> 24 & 1, 0);
    assert_eq!(read(&leaves, 7, 0)[1], 0);
    assert_eq!(read(&leaves, 0x15, 0), [0; 4]);
    assert_eq!(read(&leaves, 0x4000_0000, 0)[0], 0x4000_0001);
}

#[test]
fn the_highest_leaf_is_the_last_that_there_is() {
    let highest = |vendor, tsc| {
        let leaves = CpuidTable::new(&caps(vendor), tsc, Topology::flat(1).unwrap()).for_vcpu(VcpuId(0));
        read(&leaves, 0, 0)[0]
    };
    assert_eq!(highest(Vendor::Intel, Some(TSC_KHZ)), 0x1f);
    assert_eq!(highest(Vendor::Amd, Some(TSC_KHZ)), 0x0d);
    let mut nothing = caps(Vendor::Other);
    nothing.cpuid.clear();
    let leaves = CpuidTable::new(&nothing, None, Topology::flat(3).unwrap()).for_vcpu(VcpuId(2));
    assert_eq!(read(&leaves, 0, 0)[0], 0x0b);
    assert_eq!(decode(&leaves, 0x0b), (0, 2, 0));
}

#[test]
fn frequencies_are_told_exactly_or_not_at_all() {
    let leaves =
        |vendor, tsc| CpuidTable::new(&caps(vendor), Some(tsc), Topology::flat(1).unwrap()).for_vcpu(VcpuId(0));
    let intel = leaves(Vendor::Intel, 2_400_000);
    let [denominator, numerator, crystal, _] = read(&intel, 0x15, 0).map(u64::from);
    assert_eq!(crystal, 1_000_000_000, "the APIC timer's clock");
    assert_eq!(crystal * numerator / denominator, 2_400_000_000);
    // Linux multiplies in 32 bits.
    assert!(crystal / 1000 * numerator <= u64::from(u32::MAX));
    assert_eq!(read(&intel, 0x16, 0), [2400, 2400, 100, 0]);
    assert_eq!(read(&intel, 0x4000_0010, 0), [2_400_000, 1_000_000, 0, 0]);
    assert_eq!(read(&intel, 0x4000_0000, 0), [0x4000_0010, 1, 2, 3]);

    let odd = leaves(Vendor::Intel, 2_399_999);
    assert_eq!(read(&odd, 0x15, 0), [0; 4]);
    assert_eq!(read(&odd, 0x4000_0010, 0)[0], 2_399_999);
    let amd = leaves(Vendor::Amd, 2_400_000);
    assert_eq!(read(&amd, 0x15, 0), [0; 4]);
    assert_eq!(read(&amd, 0x4000_0010, 0)[0], 2_400_000);
    assert_eq!(read(&leaves(Vendor::Intel, 0), 0x4000_0010, 0), [0; 4]);
}
