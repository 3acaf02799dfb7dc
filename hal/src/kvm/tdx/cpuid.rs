//! CPUID of a trust domain: what the TDX module is asked for, and what it makes of that.

use crate::{CpuidChange, CpuidEntry};

/// The leaf of address sizes. Bits 23 to 16 of EAX are the width of the guest's physical addresses, 48 or 52.
const ADDRESS_SIZES: u32 = 0x8000_0008;
const WIDTH_SHIFT: u32 = 16;
/// The leaf of state components.
const STATE_COMPONENTS: u32 = 0x0d;
/// The leaves of topology, whose EDX is the number of the vCPU.
const TOPOLOGY: [u32; 2] = [0x0b, 0x1f];
/// x2APIC in ECX of leaf 1: each vCPU of a trust domain is in that mode.
const X2APIC: u32 = 1 << 21;

/// KVM's features. A trust domain has neither its clock nor stolen time nor page faults that come later, since these live in
/// memory that the host writes. What is left (in the order of the bits): no delay at ports, unhalting, remote TLB flushes, IPIs
/// by hypercall, halt polling, yielding, 15-bit destinations.
const KVM_FEATURES: u32 = 0x4000_0001;
const KVM_FEATURES_LEFT: u32 = 1 << 1 | 1 << 7 | 1 << 9 | 1 << 11 | 1 << 12 | 1 << 13 | 1 << 15;
/// The frequency of the local APIC's timer (EBX, kHz): the TDX module's is 25 MHz.
const KVM_TIMING: u32 = 0x4000_0010;
const APIC_BUS_KHZ: u32 = 25_000;

/// A leaf by its function and subleaf; a leaf without subleaves is its own subleaf 0.
fn find(leaves: &[CpuidEntry], of: &CpuidEntry) -> Option<CpuidEntry> {
    let key = |leaf: &CpuidEntry| (leaf.function, leaf.index.unwrap_or(0));
    leaves.iter().find(|leaf| key(leaf) == key(of)).copied()
}

fn registers(leaf: &CpuidEntry) -> [u32; 4] {
    [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx]
}

/// What of the wanted leaves can be asked for: those that can be configured, and of these the bits that can be.
pub(super) fn configured(wanted: &[CpuidEntry], configurable: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut leaves = Vec::new();
    for mask in configurable {
        let leaf = find(wanted, mask);
        if mask.function == ADDRESS_SIZES {
            // KVM insists on it, and on one of these widths: with 52 the guest has page tables of five levels.
            let width = leaf.map_or(0, |leaf| leaf.eax >> WIDTH_SHIFT & 0xff);
            let width = if width == 52 { 52 } else { 48 };
            let leaf = leaf.unwrap_or(CpuidEntry { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*mask });
            let eax = leaf.eax & mask.eax & !(0xff << WIDTH_SHIFT) | width << WIDTH_SHIFT;
            leaves.push(CpuidEntry { eax, ..masked(leaf, mask) });
        } else if let Some(leaf) = leaf {
            leaves.push(masked(leaf, mask));
        }
    }
    leaves
}

/// A leaf with the bits of a mask alone, and its name.
fn masked(leaf: CpuidEntry, mask: &CpuidEntry) -> CpuidEntry {
    CpuidEntry {
        function: mask.function,
        index: mask.index,
        eax: leaf.eax & mask.eax,
        ebx: leaf.ebx & mask.ebx,
        ecx: leaf.ecx & mask.ecx,
        edx: leaf.edx & mask.edx,
    }
}

/// The state components that leaf 0xd names, of those that are supported: XCR0 in subleaf 0, IA32_XSS in subleaf 1.
pub(super) fn xfam(wanted: &[CpuidEntry], supported: u64) -> u64 {
    let components = |index, low: fn(&CpuidEntry) -> u32| {
        let leaf = CpuidEntry { function: STATE_COMPONENTS, index: Some(index), eax: 0, ebx: 0, ecx: 0, edx: 0 };
        find(wanted, &leaf).map_or(0, |leaf| u64::from(leaf.edx) << 32 | u64::from(low(&leaf)))
    };
    (components(0, |leaf| leaf.eax) | components(1, |leaf| leaf.ecx)) & supported
}

/// The leaves of a vCPU: what the TDX module gives, with the vCPU's number from the leaves that were wanted of it, and the leaves
/// that it knows nothing of as they were wanted, KVM's as far as they are possible. The guest asks KVM for these.
pub(super) fn for_vcpu(wanted: &[CpuidEntry], given: &[CpuidEntry]) -> Vec<CpuidEntry> {
    let mut leaves: Vec<CpuidEntry> = Vec::with_capacity(given.len());
    for leaf in given.iter().filter(|leaf| registers(leaf) != [0; 4]) {
        let mut leaf = *leaf;
        let own = find(wanted, &leaf);
        match own {
            Some(own) if leaf.function == 1 => leaf.ebx = leaf.ebx & 0x00ff_ffff | own.ebx & 0xff00_0000,
            Some(own) if TOPOLOGY.contains(&leaf.function) => leaf.edx = own.edx,
            _ => {}
        }
        if leaf.function == 1 {
            leaf.ecx |= X2APIC;
        }
        leaves.push(leaf);
    }
    let known = |leaf: &&CpuidEntry| given.iter().any(|known| known.function == leaf.function);
    for leaf in wanted.iter().filter(|leaf| !known(leaf)) {
        leaves.push(match leaf.function {
            KVM_FEATURES => CpuidEntry { eax: leaf.eax & KVM_FEATURES_LEFT, ..*leaf },
            KVM_TIMING => CpuidEntry { ebx: APIC_BUS_KHZ, ..*leaf },
            _ => *leaf,
        });
    }
    leaves
}

/// Where leaves are not those that were wanted.
pub(super) fn changes(wanted: &[CpuidEntry], given: &[CpuidEntry]) -> Vec<CpuidChange> {
    let nothing = |leaf: &CpuidEntry| CpuidEntry { eax: 0, ebx: 0, ecx: 0, edx: 0, ..*leaf };
    let more = given.iter().filter(|leaf| find(wanted, leaf).is_none());
    let pairs = wanted.iter().map(|leaf| (*leaf, find(given, leaf).unwrap_or(nothing(leaf))));
    let mut changes = Vec::new();
    for (wanted, given) in pairs.chain(more.map(|leaf| (nothing(leaf), *leaf))) {
        let names = ["eax", "ebx", "ecx", "edx"];
        for ((register, wanted_value), given_value) in names.into_iter().zip(registers(&wanted)).zip(registers(&given))
        {
            if wanted_value != given_value {
                let CpuidEntry { function, index, .. } = wanted;
                changes.push(CpuidChange { function, index, register, wanted: wanted_value, given: given_value });
            }
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, eax, ebx, ecx, edx }
    }

    #[test]
    fn only_what_can_be_configured_is_asked_for() {
        let wanted = [leaf(1, None, [0xffff, 0xff, 0xf0f0, 1]), leaf(3, None, [1; 4]), leaf(7, Some(0), [1, 2, 3, 4])];
        let masks = [
            leaf(1, Some(0), [0xff0, 0, 0xff, 0]),
            leaf(7, Some(1), [u32::MAX; 4]),
            leaf(ADDRESS_SIZES, None, [0xff_0000, 0, 0, 0]),
        ];
        assert_eq!(
            configured(&wanted, &masks),
            [leaf(1, Some(0), [0xff0, 0, 0xf0, 0]), leaf(ADDRESS_SIZES, None, [0x30_0000, 0, 0, 0])]
        );
        // Both widths, and a host that says nothing of them.
        for (eax, width) in [(0x34_3034, 52), (0x30_3934, 48), (0x3934, 48)] {
            let leaves = configured(&[leaf(ADDRESS_SIZES, None, [eax, 0, 0, 0])], &masks);
            assert_eq!(leaves[0].eax, width << 16);
        }
    }

    #[test]
    fn state_components_are_those_of_both_registers() {
        let wanted = [leaf(0xd, Some(0), [0x2e7, 0, 0, 1]), leaf(0xd, Some(1), [9, 9, 0x1800, 2])];
        assert_eq!(xfam(&wanted, u64::MAX), 0x3_0000_1ae7);
        assert_eq!(xfam(&wanted, 0x207), 0x207);
        assert_eq!(xfam(&[], u64::MAX), 0);
    }

    #[test]
    fn a_vcpu_keeps_its_number_and_loses_what_the_host_would_write() {
        let wanted = [
            leaf(1, None, [0, 0x0500_0800, 0, 0]),
            leaf(0xb, Some(0), [0, 1, 0x100, 5]),
            leaf(KVM_FEATURES, None, [u32::MAX, 0, 0, 0]),
            leaf(KVM_TIMING, None, [2_000_000, 1_000_000, 0, 0]),
            leaf(2, None, [1; 4]),
            leaf(0x16, None, [2000, 3000, 100, 0]),
        ];
        let given =
            [leaf(1, None, [0x806f8, 0x0012_0800, 4, 8]), leaf(2, None, [0; 4]), leaf(0xb, Some(0), [0, 1, 0x100, 0])];
        let leaves = for_vcpu(&wanted, &given);
        assert_eq!(
            leaves,
            [
                leaf(1, None, [0x806f8, 0x0512_0800, 4 | X2APIC, 8]),
                leaf(0xb, Some(0), [0, 1, 0x100, 5]),
                leaf(KVM_FEATURES, None, [0xba82, 0, 0, 0]),
                leaf(KVM_TIMING, None, [2_000_000, 25_000, 0, 0]),
                leaf(0x16, None, [2000, 3000, 100, 0]),
            ]
        );
        let told: Vec<String> = changes(&wanted, &leaves).iter().map(ToString::to_string).collect();
        assert_eq!(told.len(), 10, "{told:#?}");
        assert_eq!(told[0], "CPUID 0x1 eax: 0x00000000 was asked for, 0x000806f8 is given, with 0x806f8");
        assert!(told.contains(
            &"CPUID 0x40000001 eax: 0xffffffff was asked for, 0x0000ba82 is given, without 0xffff457d".to_owned()
        ));
        assert_eq!(changes(&wanted, &wanted), []);
    }
}
