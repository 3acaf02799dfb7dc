//! Hosts to try the leaves on.

use hal::{CpuidEntry, HostCaps};

use super::Vendor;

pub(in super::super) const TSC_KHZ: u32 = 2_400_000;

fn leaf(function: u32, index: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index, eax, ebx, ecx, edx }
}

/// A host of this vendor with all features and its own topology: 16 cores of 2 threads.
pub(in super::super) fn caps(vendor: Vendor) -> HostCaps {
    let mut cpuid = vec![
        leaf(0x01, None, [0x8_06f8, 0x4520_0800, !(1 << 24), u32::MAX]),
        leaf(0x06, None, [0xff, 2, 9, 0]),
        leaf(0x07, Some(0), [2, u32::MAX, u32::MAX, u32::MAX]),
        leaf(0x07, Some(1), [0x10, 0, 0, 0]),
        leaf(0x0a, None, [0x0730_0404, 0, 0, 0x603]),
        leaf(0x0b, Some(0), [1, 2, 0x100, 0x45]),
        leaf(0x0b, Some(1), [6, 32, 0x201, 0x45]),
        leaf(0x0d, Some(0), [7, 832, 832, 0]),
        leaf(0x4000_0000, None, [0x4000_0001, 1, 2, 3]),
        leaf(0x4000_0001, None, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0000, None, [0x8000_0026, 0, 0, 0]),
        leaf(0x8000_0001, None, [0, 0, u32::MAX, u32::MAX]),
        leaf(0x8000_0007, None, [0, 0, 0, 0x100]),
        leaf(0x8000_000a, None, [1, 8, 0, 0xff]),
        leaf(0x8000_001f, None, [3, 51, 16, 1]),
    ];
    let (name, highest) = match vendor {
        Vendor::Intel => (["Genu", "ntel", "ineI"], 0x20),
        Vendor::Amd => (["Auth", "cAMD", "enti"], 0x10),
        Vendor::Other => (["some", "one ", "else"], 0x0d),
    };
    let [ebx, ecx, edx] = name.map(|text| u32::from_le_bytes(text.as_bytes().try_into().unwrap()));
    cpuid.insert(0, leaf(0, None, [highest, ebx, ecx, edx]));
    if vendor == Vendor::Intel {
        // Level 1 data and instructions, levels 2 and 3: 32 cores, 64 threads.
        let sizes = [0x7c00_4121, 0x7c00_4122, 0x7c00_4143, 0x7c0f_c163];
        cpuid.extend((0u32..).zip(sizes).map(|(index, eax)| leaf(0x04, Some(index), [eax, 0x1c0_003f, 63, 0])));
        cpuid.push(leaf(0x04, Some(4), [0; 4]));
        cpuid.push(leaf(0x1f, Some(0), [1, 2, 0x100, 0x45]));
        cpuid.push(leaf(0x8000_0008, None, [0x0030_392e, 0, 0, 0]));
    }
    if vendor == Vendor::Amd {
        let sizes = [0x4121, 0x4122, 0x4143, 0x3_c163];
        cpuid.extend((0u32..).zip(sizes).map(|(index, eax)| leaf(0x8000_001d, Some(index), [eax, 0x1c0_003f, 63, 0])));
        cpuid.push(leaf(0x8000_001d, Some(4), [0; 4]));
        cpuid.push(leaf(0x8000_0008, None, [0x0030_3030, 0x1234_5678, 0x1_601f, 0]));
        cpuid.push(leaf(0x8000_001e, None, [0x45, 0x122, 0x307, 0]));
    }
    HostCaps {
        backend: "test",
        kinds: Vec::new(),
        max_vcpus: 255,
        physical_address_bits: 40,
        cpuid,
        tsc_deadline: true,
        dirty_tracking: hal::DirtyTrackingCaps::default(),
        max_memory_slots: 32,
    }
}
