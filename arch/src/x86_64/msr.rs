//! Model-specific registers that a firmware would have set before the kernel.

use hal::{HostCaps, Msr};

use super::cpuid::Vendor;

/// IA32_MISC_ENABLE (Intel SDM vol. 4, table 2-2).
const IA32_MISC_ENABLE: u32 = 0x1a0;
/// Fast string operations: Linux hides ERMS without it.
const MISC_ENABLE_FAST_STRING: u64 = 1 << 0;
/// There is no branch trace storage.
const MISC_ENABLE_BTS_UNAVAILABLE: u64 = 1 << 11;
/// There is no processor event based sampling.
const MISC_ENABLE_PEBS_UNAVAILABLE: u64 = 1 << 12;

/// IA32_MTRR_DEF_TYPE (Intel SDM vol. 3 §12.11.2.1).
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
/// The memory type range registers are on.
const MTRR_ENABLE: u64 = 1 << 11;
/// Write-back.
const MTRR_TYPE_WRITE_BACK: u64 = 6;

/// The registers to set on every vCPU before it runs, the application processors included: Linux wants the memory
/// types to agree.
///
/// Memory is write-back by default and no variable range is used. The hole needs none: a kernel maps registers
/// uncached by its page tables, which wins over write-back. Left off, the memory type registers would keep older
/// kernels (6.1 among them) from using the page attribute table, and with it write-combining.
pub fn boot_msrs(caps: &HostCaps) -> Vec<Msr> {
    let mut msrs = vec![Msr { index: IA32_MTRR_DEF_TYPE, value: MTRR_ENABLE | MTRR_TYPE_WRITE_BACK }];
    if Vendor::of(&caps.cpuid) == Vendor::Intel {
        let value = MISC_ENABLE_FAST_STRING | MISC_ENABLE_BTS_UNAVAILABLE | MISC_ENABLE_PEBS_UNAVAILABLE;
        msrs.push(Msr { index: IA32_MISC_ENABLE, value });
    }
    msrs
}

#[cfg(test)]
mod tests {
    use super::super::cpuid::test_host;
    use super::*;

    #[test]
    fn memory_is_write_back_and_strings_are_fast() {
        let registers = |vendor| -> Vec<_> {
            boot_msrs(&test_host::caps(vendor)).into_iter().map(|msr| (msr.index, msr.value)).collect()
        };
        assert_eq!(registers(Vendor::Amd), [(0x2ff, 0x806)]);
        assert_eq!(registers(Vendor::Intel), [(0x2ff, 0x806), (0x1a0, 0x1801)]);
    }
}
