//! A VM of KVM's: its creation, its parts and its clock.

use std::sync::Arc;

use kvm_bindings::{
    KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_EXIT_HYPERCALL, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X86_TRIPLE_FAULT_EVENT,
    KVM_X86_DEFAULT_VM, KVM_X86_SW_PROTECTED_VM, kvm_clock_data, kvm_enable_cap,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use super::irq::{IOAPIC_PINS, Routes};
use super::memory::Slots;
use super::tdx::exits::MAP_GPA_RANGE;
use super::vcpu::KvmVcpu;
use super::{OTHER, System, failed};
use crate::{
    Ability, DirtyLog, DirtyTracking, Error, HostCaps, Irqs, KindTraits, Launch, Memory, Result, Vcpu, VcpuId, Vm,
    VmSpec, VmState,
};

/// Where KVM on Intel processors keeps a page table and a task state segment of its own, needed where a guest in
/// real mode cannot run directly. The four pages lie between the local APICs and the firmware, where the platform
/// has neither memory nor devices.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TASK_STATE: usize = 0xfeff_d000;

ioctl_io_nr!(KVM_GET_TSC_KHZ, kvm_bindings::KVMIO, 0xa3);

/// A VM of KVM's that needs no launch.
pub(super) struct KvmVm(pub(super) Arc<Shared>);

/// What a VM shares with its vCPUs, interrupts and doorbells: it lives until the last of them is gone, so that
/// memory slots stay mapped as long as anything can reach them.
pub(super) struct Shared {
    // Dropped first: the kernel lets go of guest memory before the slots unmap it.
    pub(super) fd: VmFd,
    pub(super) system: Arc<System>,
    pub(super) slots: Slots,
    pub(super) routes: Routes,
    max_vcpus: u32,
    dirty_tracking: DirtyTracking,
}

impl KvmVm {
    pub(super) fn create(system: &Arc<System>, caps: &HostCaps, spec: &VmSpec) -> Result<Self> {
        let fd = if spec.kind.name().traits().private_memory {
            let fd = create_with_registers(system, KVM_X86_SW_PROTECTED_VM)?;
            exit_to_convert(&fd)?;
            fd
        } else {
            create_with_registers(system, KVM_X86_DEFAULT_VM)?
        };
        Ok(Self(Arc::new(Shared::new(fd, system, caps, spec))))
    }
}

impl Shared {
    pub(super) fn new(fd: VmFd, system: &Arc<System>, caps: &HostCaps, spec: &VmSpec) -> Self {
        let traits = spec.kind.name().traits();
        Self {
            fd,
            system: system.clone(),
            slots: Slots::new(caps.max_memory_slots, spec.dirty_tracking == DirtyTracking::Bitmap, traits),
            routes: Routes::new(),
            max_vcpus: spec.max_vcpus,
            dirty_tracking: spec.dirty_tracking,
        }
    }
}

/// Everything that this host or this build cannot do is refused here.
pub(super) fn check(caps: &HostCaps, spec: &VmSpec) -> Result<()> {
    if !spec.kind.name().traits().has(Ability::DirtyLog) && spec.dirty_tracking != DirtyTracking::Off {
        return Err(Error::Unsupported(format!("a VM of the kind {} has no log of written pages", spec.kind.name())));
    }
    if spec.max_vcpus == 0 || spec.max_vcpus > caps.max_vcpus {
        return Err(Error::Unsupported(format!(
            "{} vCPUs were asked for, and KVM on this host allows 1 to {}",
            spec.max_vcpus, caps.max_vcpus
        )));
    }
    if let DirtyTracking::Ring { .. } = spec.dirty_tracking {
        return Err(Error::Unsupported(
            "dirty pages cannot be found by rings in this version of Halyard; choose bitmaps".into(),
        ));
    }
    Ok(())
}

/// Creates a VM of a type of KVM's.
pub(super) fn create_fd(system: &System, kind: u32) -> Result<VmFd> {
    loop {
        match system.kvm.create_vm_with_type(kind.into()) {
            // A signal to this thread while the kernel set up the VM.
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) if error.errno() == libc::EBUSY => {
                return Err(Error::Unusable {
                    device: "KVM".into(),
                    problem: "the processor's virtualization is in use".into(),
                    remedy: OTHER,
                });
            }
            other => return other.map_err(failed("KVM_CREATE_VM")),
        }
    }
}

/// Has local APICs in the kernel and no other interrupt chip there, which must be so before the first vCPU. KVM reports the
/// end of interrupts for `pins` routes only, those of the monitor's I/O APIC.
pub(super) fn split_interrupt_chip(fd: &VmFd, pins: u8) -> Result<()> {
    enable(fd, KVM_CAP_SPLIT_IRQCHIP, pins.into()).map_err(failed("KVM_ENABLE_CAP(KVM_CAP_SPLIT_IRQCHIP)"))
}

/// Has the guest's wishes for memory of another visibility handed on.
pub(super) fn exit_to_convert(fd: &VmFd) -> Result<()> {
    enable(fd, KVM_CAP_EXIT_HYPERCALL, 1 << MAP_GPA_RANGE).map_err(failed("KVM_ENABLE_CAP(KVM_CAP_EXIT_HYPERCALL)"))
}

/// Creates a VM of a type whose registers the monitor sets.
fn create_with_registers(system: &System, kind: u32) -> Result<VmFd> {
    let fd = create_fd(system, kind)?;
    split_interrupt_chip(&fd, IOAPIC_PINS)?;
    // Saved states then hold exceptions that wait with all that belongs to them. Where a kernel lacks these, such an
    // exception is delivered before the state is read (the first), or a triple fault forgotten (the second).
    let _ = enable(&fd, KVM_CAP_EXCEPTION_PAYLOAD, 1);
    let _ = enable(&fd, KVM_CAP_X86_TRIPLE_FAULT_EVENT, 1);
    if system.intel {
        fd.set_identity_map_address(IDENTITY_MAP).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TASK_STATE).map_err(failed("KVM_SET_TSS_ADDR"))?;
    }
    Ok(fd)
}

pub(super) fn enable(fd: &VmFd, cap: u32, argument: u64) -> std::result::Result<(), errno::Error> {
    fd.enable_cap(&kvm_enable_cap { cap, args: [argument, 0, 0, 0], ..Default::default() })
}

impl Vm for KvmVm {
    fn kind(&self) -> &KindTraits {
        self.0.slots.traits()
    }

    fn memory(&self) -> &dyn Memory {
        &*self.0
    }

    fn irqs(&self) -> &dyn Irqs {
        &self.0
    }

    fn tsc_khz(&self) -> Option<u32> {
        self.0.tsc_khz()
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>> {
        if u32::from(id.0) >= self.0.max_vcpus {
            return Err(Error::Invalid {
                what: "vCPU",
                problem: format!("number {} was asked for, and this VM has 0 to {}", id.0, self.0.max_vcpus - 1),
            });
        }
        Ok(Box::new(KvmVcpu::create(&self.0, id)?))
    }

    fn launch(&self) -> Option<&dyn Launch> {
        None
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        match self.0.dirty_tracking {
            DirtyTracking::Bitmap => Some(&*self.0),
            DirtyTracking::Off | DirtyTracking::Ring { .. } => None,
        }
    }

    fn state(&self) -> Option<&dyn VmState> {
        Some(&*self.0)
    }
}

impl Shared {
    /// See [`Vm::tsc_khz`].
    pub(super) fn tsc_khz(&self) -> Option<u32> {
        // SAFETY: the descriptor is a VM's, and this call has no argument.
        #[expect(unsafe_code, reason = "kvm-ioctls knows this call for vCPUs only")]
        let khz = unsafe { ioctl(&self.fd, KVM_GET_TSC_KHZ()) };
        u32::try_from(khz).ok().filter(|khz| *khz > 0)
    }

    /// A VM of the same making without memory, from which the state of a vCPU at power-on can be read.
    pub(super) fn blank_twin(&self) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            fd: create_with_registers(&self.system, KVM_X86_DEFAULT_VM)?,
            system: self.system.clone(),
            slots: Slots::new(0, false, &KindTraits::STANDARD),
            routes: Routes::new(),
            max_vcpus: self.max_vcpus,
            dirty_tracking: DirtyTracking::Off,
        }))
    }
}

impl VmState for Shared {
    fn clock(&self) -> Result<u64> {
        Ok(self.fd.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock)
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<()> {
        let clock = kvm_clock_data { clock: nanoseconds, ..Default::default() };
        self.fd.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}
