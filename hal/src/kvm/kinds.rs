//! Which kinds of VM KVM can create on this host, and why not others.

use std::fs;
use std::path::Path;

use kvm_bindings::{KVM_X86_SW_PROTECTED_VM, KVM_X86_TDX_VM};

use crate::KindName;

/// The first Linux that runs trust domains.
const TDX_SINCE: (u32, u32) = (6, 16);

/// The kinds that are built here and that the kernel has, by what it says of `KVM_CAP_VM_TYPES`: a bit for each type. What
/// the kernel could do besides is no promise of ours.
pub(super) fn possible(types: i32) -> Vec<KindName> {
    let has = |kind: u32| types > 0 && types >> kind & 1 != 0;
    let others = [(KVM_X86_TDX_VM, KindName::Tdx), (KVM_X86_SW_PROTECTED_VM, KindName::SoftwareProtected)];
    let others = others.into_iter().filter(|(kind, _)| has(*kind)).map(|(_, name)| name);
    [KindName::Standard].into_iter().chain(others).collect()
}

/// Why there are no trust domains, and what would help. `root` is where the host's files are.
pub(super) fn why_no_tdx(root: &Path) -> String {
    let read = |path: &str| fs::read_to_string(root.join(path)).ok();
    let flags = read("proc/cpuinfo").unwrap_or_default();
    let flags = flags.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let release = read("proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    let switch = read("sys/module/kvm_intel/parameters/tdx");
    let reason = if version(release).is_some_and(|version| version < TDX_SINCE) {
        return format!("Linux {}.{} or later runs trust domains, and this is {release}", TDX_SINCE.0, TDX_SINCE.1);
    } else if !root.join("sys/module/kvm_intel").exists() {
        "KVM is not that of Intel's processors (kvm_intel is not loaded)"
    } else if switch.is_none() {
        "this kernel was built without trust domains (CONFIG_KVM_INTEL_TDX)"
    } else if !flags.split_whitespace().any(|flag| flag == "tdx_host_platform") {
        "the processor has no TDX, or the firmware set no KeyIDs aside for it: turn on TDX and TME-MT in the firmware's settings"
    } else if switch.is_some_and(|switch| switch.trim() == "N") {
        "kvm_intel.tdx is off: start the kernel with kvm_intel.tdx=1; where it was, the kernel's log says what failed (dmesg)"
    } else {
        "KVM does not offer them; the kernel's log may say why (dmesg)"
    };
    reason.into()
}

/// Why there are no VMs that are protected by software alone.
pub(super) const WHY_NOT_SOFTWARE_PROTECTED: &str =
    "this kernel was built without them (CONFIG_KVM_SW_PROTECTED_VM, which is for development alone)";

/// The first two numbers of a kernel's release.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_kinds_are_possible_where_the_kernel_has_their_type() {
        assert_eq!(possible(1 << 5 | 1), [KindName::Standard, KindName::Tdx]);
        assert_eq!(possible(0x1f), [KindName::Standard, KindName::SoftwareProtected]);
        for types in [0, -1, 1, 0x1d] {
            assert_eq!(possible(types), [KindName::Standard]);
        }
    }

    #[test]
    fn what_is_missing_is_told_from_the_kernel_upwards() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let why = |part: &str| {
            let why = why_no_tdx(root.path());
            assert!(why.contains(part), "{why}");
        };
        write("proc/sys/kernel/osrelease", "6.12.3-amd64\n");
        why("Linux 6.16 or later runs trust domains, and this is 6.12.3-amd64");
        write("proc/sys/kernel/osrelease", "7.3.4+deb13-amd64\n");
        why("kvm_intel is not loaded");
        write("sys/module/kvm_intel/parameters/nested", "Y\n");
        why("CONFIG_KVM_INTEL_TDX");
        write("sys/module/kvm_intel/parameters/tdx", "N\n");
        write("proc/cpuinfo", "processor\t: 0\nflags\t\t: vmx sme\n");
        why("no KeyIDs");
        write("proc/cpuinfo", "processor\t: 0\nflags\t\t: vmx tdx_host_platform\n");
        why("kvm_intel.tdx=1");
        write("sys/module/kvm_intel/parameters/tdx", "Y\n");
        why("dmesg");
    }
}
