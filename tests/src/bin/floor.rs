//! The floor: the least that any monitor must do between its own start and its guest's first byte on the serial port.
//!
//! One vCPU, 256 MiB of memory, local APICs in the kernel and the other interrupt controllers outside of it, the guest's
//! CPUID, the one segment of an ELF file, `KVM_RUN`. It checks nothing and can do nothing else: it is here to be
//! measured beside Halyard, and runs no guest but this project's own.
//!
//! Usage: `floor GUEST`

#![expect(unsafe_code, reason = "guest memory is mapped and filled by plain system calls, without a library's checks")]

use std::num::NonZeroUsize;

use anyhow::{Context, Result, bail};
use kvm_bindings::{
    KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};

/// Guest memory in bytes.
const MEMORY: NonZeroUsize = NonZeroUsize::new(256 << 20).unwrap();
/// Pins of the I/O APIC, which KVM is told of though nobody makes one.
const IOAPIC_PINS: u64 = 24;
/// The transmitter of the first serial port.
const COM1: u16 = 0x3f8;

fn main() -> Result<()> {
    let guest = std::env::args_os().nth(1).context("usage: floor GUEST")?;
    let elf = std::fs::read(&guest).with_context(|| format!("reading {}", guest.display()))?;
    let kvm = Kvm::new().context("opening /dev/kvm")?;
    let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
    let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
    split.args[0] = IOAPIC_PINS;
    vm.enable_cap(&split).context("KVM_CAP_SPLIT_IRQCHIP")?;
    let entry = load(&vm, &elf)?;

    let mut vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    set_registers(&vcpu, entry)?;
    match vcpu.run().context("KVM_RUN")? {
        // A plain file, since standard output's buffer would be one thing more to set up.
        VcpuExit::IoOut(COM1, byte) => {
            nix::unistd::write(std::io::stdout(), byte).map(drop).context("writing the byte")
        }
        _ => bail!("the guest does not begin with a byte to the serial port"),
    }
}

/// Makes guest memory with the first segment of `elf` in it, and returns the address at which the guest begins.
fn load(vm: &VmFd, elf: &[u8]) -> Result<u64> {
    let file = memfd_create(c"guest-memory", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    nix::unistd::ftruncate(&file, i64::try_from(MEMORY.get())?).context("ftruncate")?;
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses; it stays until the process ends.
    let memory = unsafe { mmap(None, MEMORY, access, MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE, &file, 0) };
    let memory = memory.context("mmap")?;

    let word = |at: usize| -> Result<usize> {
        let bytes = elf.get(at..).and_then(<[u8]>::first_chunk).context("the ELF file ends too early")?;
        Ok(usize::try_from(u64::from_le_bytes(*bytes))?)
    };
    // e_phoff; then p_offset, p_paddr and p_filesz of the first program header.
    let header = word(32)?;
    let (offset, address, size) = (word(header + 8)?, word(header + 24)?, word(header + 32)?);
    let segment = elf.get(offset..offset + size).context("the segment lies outside the ELF file")?;
    if address + size > MEMORY.get() {
        bail!("the segment lies outside guest memory");
    }
    // SAFETY: `size` bytes from `address` on lie within the mapping, which nothing else in this process refers to.
    unsafe { memory.as_ptr().cast::<u8>().add(address).copy_from_nonoverlapping(segment.as_ptr(), size) };
    let region = kvm_userspace_memory_region {
        memory_size: u64::try_from(MEMORY.get())?,
        userspace_addr: u64::try_from(memory.addr().get())?,
        ..Default::default()
    };
    // SAFETY: the mapping stays until the process ends.
    unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
    // e_entry
    Ok(u64::try_from(word(24)?)?)
}

/// 32-bit protected mode with flat segments, as the PVH protocol prescribes, at `entry`.
fn set_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let data =
        kvm_segment { limit: u32::MAX, selector: 0x10, type_: 3, present: 1, db: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 11, ..data };
    (sregs.ds, sregs.es, sregs.ss) = (data, data, data);
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let mut regs = vcpu.get_regs().context("KVM_GET_REGS")?;
    (regs.rip, regs.rflags) = (entry, 2);
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}
