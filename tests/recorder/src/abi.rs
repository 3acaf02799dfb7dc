//! The parts of KVM's ABI that a launch consists of (Linux 6.16, `include/uapi/linux/kvm.h`, `arch/x86/include/uapi/asm/kvm.h`).

use std::ffi::c_ulong;

/// A request without an argument of its own, or with an immediate one.
const fn plain(number: c_ulong) -> c_ulong {
    0xae00 | number
}

/// A request that takes (1), gives (2) or does both (3) with a struct.
const fn with(direction: c_ulong, number: c_ulong, size: c_ulong) -> c_ulong {
    direction << 30 | size << 16 | 0xae00 | number
}

pub const CREATE_VM: c_ulong = plain(0x01);
pub const CHECK_EXTENSION: c_ulong = plain(0x03);
pub const CREATE_VCPU: c_ulong = plain(0x41);
pub const RUN: c_ulong = plain(0x80);
pub const SET_TSC_KHZ: c_ulong = plain(0xa2);
pub const GET_SUPPORTED_CPUID: c_ulong = with(3, 0x05, 8);
pub const SET_USER_MEMORY_REGION: c_ulong = with(1, 0x46, 32);
pub const SET_USER_MEMORY_REGION2: c_ulong = with(1, 0x49, 160);
pub const SET_GSI_ROUTING: c_ulong = with(1, 0x6a, 8);
pub const IRQFD: c_ulong = with(1, 0x76, 32);
pub const SIGNAL_MSI: c_ulong = with(1, 0xa5, 32);
pub const SET_MSRS: c_ulong = with(1, 0x89, 8);
pub const SET_CPUID2: c_ulong = with(1, 0x90, 8);
pub const ENABLE_CAP: c_ulong = with(1, 0xa3, 104);
pub const MEMORY_ENCRYPT_OP: c_ulong = with(3, 0xba, 8);
pub const SET_MEMORY_ATTRIBUTES: c_ulong = with(1, 0xd2, 32);
pub const CREATE_GUEST_MEMFD: c_ulong = with(3, 0xd4, 64);

/// The numbers of calls that read or write a vCPU's registers, which a trust domain does not have: general ones, those of the
/// system, of the FPU, of the local APIC, of debugging, the extended ones with their control register.
pub const REGISTERS: [c_ulong; 16] =
    [0x81, 0x82, 0x83, 0x84, 0x8c, 0x8d, 0x8e, 0x8f, 0xa1, 0xa2, 0xa4, 0xa5, 0xa6, 0xa7, 0xcc, 0xcd];

pub const CAP_SPLIT_IRQCHIP: u32 = 121;
pub const CAP_EXIT_HYPERCALL: u32 = 201;
pub const CAP_USER_MEMORY2: c_ulong = 231;
pub const CAP_MEMORY_ATTRIBUTES: c_ulong = 233;
pub const CAP_GUEST_MEMFD: c_ulong = 234;
pub const CAP_VM_TYPES: c_ulong = 235;

/// A VM type: a plain one, and a trust domain.
pub const VM_DEFAULT: usize = 0;
pub const VM_TDX: usize = 5;
/// The flags of a memory slot: written pages are found, it can only be read.
pub const MEM_LOG_DIRTY: u32 = 1;
pub const MEM_READONLY: u32 = 2;
/// The attribute of private memory.
pub const PRIVATE: u64 = 8;
/// x2APIC in ECX of leaf 1 of CPUID.
pub const X2APIC: u32 = 1 << 21;
/// The flag of a memory slot that has a guest_memfd.
pub const MEM_GUEST_MEMFD: u32 = 4;
/// The only attribute of a trust domain that Linux lets be set: accesses to pages that are not there are no exceptions.
pub const SEPT_VE_DISABLE: u64 = 1 << 28;
/// The state components that are offered: x87, SSE, AVX, AVX-512, PKRU.
pub const XFAM: u64 = 0x2e7;
/// The flag of pages whose contents are measured.
pub const MEASURE: u32 = 1;

/// The flag by which an event is detached from a route, and the type of a route to a message.
pub const IRQFD_DEASSIGN: u32 = 1;
pub const ROUTE_MSI: u32 = 2;

/// Linux' `struct kvm_irqfd`, its beginning.
#[repr(C)]
pub struct Irqfd {
    pub event: u32,
    pub route: u32,
    pub flags: u32,
}

/// Linux' `struct kvm_irq_routing` without its entries.
#[repr(C)]
pub struct Routing {
    pub count: u32,
    pub flags: u32,
}

/// Linux' `struct kvm_irq_routing_entry` of a message.
#[repr(C)]
pub struct Route {
    pub number: u32,
    pub kind: u32,
    pub flags: u32,
    pub padding: u32,
    pub address_low: u32,
    pub address_high: u32,
    pub data: u32,
    pub rest: [u32; 5],
}

/// Linux' `struct kvm_msi`, its beginning.
#[repr(C)]
pub struct Msi {
    pub address_low: u32,
    pub address_high: u32,
    pub data: u32,
}

/// Linux' `struct kvm_tdx_cmd`.
#[repr(C)]
pub struct Command {
    pub id: u32,
    pub flags: u32,
    pub data: u64,
    pub hw_error: u64,
}

/// Linux' `struct kvm_userspace_memory_region`, and the beginning of that with a guest_memfd.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Region {
    pub slot: u32,
    pub flags: u32,
    pub start: u64,
    pub len: u64,
    pub host: u64,
}

/// Linux' `struct kvm_memory_attributes`.
#[repr(C)]
pub struct Attributes {
    pub start: u64,
    pub len: u64,
    pub attributes: u64,
    pub flags: u64,
}

/// Linux' `struct kvm_create_guest_memfd`, its beginning.
#[repr(C)]
pub struct GuestMemfd {
    pub size: u64,
    pub flags: u64,
}

/// Linux' `struct kvm_enable_cap`, its beginning.
#[repr(C)]
pub struct EnableCap {
    pub cap: u32,
    pub flags: u32,
    pub args: [u64; 4],
}

/// Linux' `struct kvm_cpuid2` without its entries.
#[repr(C)]
pub struct CpuidHeader {
    pub count: u32,
    pub padding: u32,
}

/// Linux' `struct kvm_cpuid_entry2`.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub struct CpuidEntry {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub padding: [u32; 3],
}

/// Linux' `struct kvm_tdx_capabilities` without its entries.
#[repr(C)]
pub struct Capabilities {
    pub attributes: u64,
    pub xfam: u64,
    pub vmcalls: [u64; 4],
    pub reserved: [u64; 250],
    pub cpuid: CpuidHeader,
}

/// Linux' `struct kvm_tdx_init_vm` without its entries.
#[repr(C)]
pub struct InitVm {
    pub attributes: u64,
    pub xfam: u64,
    pub mrconfigid: [u8; 48],
    pub mrowner: [u8; 48],
    pub mrownerconfig: [u8; 48],
    pub reserved: [u64; 12],
    pub cpuid: CpuidHeader,
}

/// Linux' `struct kvm_tdx_init_mem_region`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct InitMemRegion {
    pub source: u64,
    pub start: u64,
    pub pages: u64,
}

impl InitMemRegion {
    /// What is left of it when some pages are done.
    pub fn after(self, pages: u64) -> Self {
        Self { source: self.source + pages * 4096, start: self.start + pages * 4096, pages: self.pages - pages }
    }
}
