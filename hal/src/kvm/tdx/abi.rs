//! KVM's ABI for trust domains, which the bindings lack (Linux 6.16, `arch/x86/include/uapi/asm/kvm.h` and
//! `include/uapi/linux/kvm.h`).

use kvm_bindings::{__IncompleteArrayField, kvm_cpuid_entry2};
use vmm_sys_util::fam::{FamStruct, FamStructWrapper};
use vmm_sys_util::generate_fam_struct_impl;

/// KVM's own limit for lists of leaves.
pub(super) const MAX_LEAVES: usize = 256;

/// The commands of `KVM_MEMORY_ENCRYPT_OP`.
pub(super) const CAPABILITIES: u32 = 0;
pub(super) const INIT_VM: u32 = 1;
pub(super) const INIT_VCPU: u32 = 2;
pub(super) const INIT_MEM_REGION: u32 = 3;
pub(super) const FINALIZE_VM: u32 = 4;
pub(super) const GET_CPUID: u32 = 5;

/// The flag of INIT_MEM_REGION that has contents measured.
pub(super) const MEASURE: u32 = 1;

/// `struct kvm_tdx_cmd`.
#[repr(C)]
#[derive(Debug, Default)]
pub(super) struct Command {
    pub id: u32,
    pub flags: u32,
    /// The address of the command's data, or a number.
    pub data: u64,
    /// What the TDX module says; 0 on entry.
    pub hw_error: u64,
}

/// `struct kvm_tdx_capabilities`.
#[repr(C)]
pub(super) struct CapabilitiesData {
    pub attributes: u64,
    pub xfam: u64,
    /// The bits of TDG.VP.VMCALL<GetTdVmCallInfo> that KVM answers, and those that are the monitor's.
    pub kernel_r11: u64,
    pub user_r11: u64,
    pub kernel_r12: u64,
    pub user_r12: u64,
    pub reserved: [u64; 250],
    pub count: u32,
    pub padding: u32,
    pub entries: __IncompleteArrayField<kvm_cpuid_entry2>,
}

impl Default for CapabilitiesData {
    fn default() -> Self {
        Self {
            attributes: 0,
            xfam: 0,
            kernel_r11: 0,
            user_r11: 0,
            kernel_r12: 0,
            user_r12: 0,
            reserved: [0; 250],
            count: 0,
            padding: 0,
            entries: __IncompleteArrayField::default(),
        }
    }
}

/// `struct kvm_tdx_init_vm`.
#[repr(C)]
pub(super) struct InitVmData {
    pub attributes: u64,
    pub xfam: u64,
    pub config_id: [u8; 48],
    pub owner: [u8; 48],
    pub owner_config: [u8; 48],
    pub reserved: [u64; 12],
    pub count: u32,
    pub padding: u32,
    pub entries: __IncompleteArrayField<kvm_cpuid_entry2>,
}

impl Default for InitVmData {
    fn default() -> Self {
        Self {
            attributes: 0,
            xfam: 0,
            config_id: [0; 48],
            owner: [0; 48],
            owner_config: [0; 48],
            reserved: [0; 12],
            count: 0,
            padding: 0,
            entries: __IncompleteArrayField::default(),
        }
    }
}

/// `struct kvm_cpuid2`, with room for all that KVM may give.
#[repr(C)]
#[derive(Default)]
pub(super) struct LeavesData {
    pub count: u32,
    pub padding: u32,
    pub entries: __IncompleteArrayField<kvm_cpuid_entry2>,
}

generate_fam_struct_impl!(CapabilitiesData, kvm_cpuid_entry2, entries, u32, count, MAX_LEAVES);
generate_fam_struct_impl!(InitVmData, kvm_cpuid_entry2, entries, u32, count, MAX_LEAVES);
generate_fam_struct_impl!(LeavesData, kvm_cpuid_entry2, entries, u32, count, MAX_LEAVES);

pub(super) type CapabilitiesList = FamStructWrapper<CapabilitiesData>;
pub(super) type InitVmList = FamStructWrapper<InitVmData>;
pub(super) type LeavesList = FamStructWrapper<LeavesData>;

/// `struct kvm_tdx_init_mem_region`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct MemRegion {
    /// The address of what the pages hold.
    pub source: u64,
    pub gpa: u64,
    pub pages: u64,
}

/// The exit of a guest's call, `KVM_EXIT_TDX`.
pub(in super::super) const EXIT_TDX: u32 = 40;
pub(super) const CALL_INFO: u64 = 0x10000;
pub(super) const CALL_GET_QUOTE: u64 = 0x10002;
pub(super) const CALL_SETUP_NOTIFY: u64 = 0x10004;

/// What `kvm_run` holds for `KVM_EXIT_TDX`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CallExit {
    pub flags: u64,
    pub number: u64,
    /// The status that the guest gets.
    pub status: u64,
    /// By number: the leaf and R11 to R14; an address and a size; a vector.
    pub arguments: [u64; 5],
}

/// The system event of a guest's last words, `KVM_SYSTEM_EVENT_TDX_FATAL`.
pub(in super::super) const SYSTEM_EVENT_TDX_FATAL: u32 = 7;

const _: () = {
    assert!(size_of::<Command>() == 24);
    assert!(std::mem::offset_of!(CapabilitiesData, count) == 2048 && size_of::<CapabilitiesData>() == 2056);
    assert!(std::mem::offset_of!(InitVmData, count) == 256 && size_of::<InitVmData>() == 264);
    assert!(size_of::<LeavesData>() == 8 && size_of::<MemRegion>() == 24 && size_of::<CallExit>() == 64);
};
