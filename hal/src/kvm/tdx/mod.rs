//! Trust domains of Intel TDX, as Linux 6.16 and later run them.
//!
//! The order that works is that of the calls here: a VM of its type, what is possible ([`launch::capabilities`]), its
//! interrupt chip, then the trust domain itself ([`launch::init_vm`]), which must be there before its first vCPU. A vCPU has its
//! CPUID before it begins ([`launch::init_vcpu`]), since KVM puts it into x2APIC mode then; memory is mapped and private before
//! pages are added to it ([`launch::add`]); and what is sealed ([`launch::finalize`]) takes nothing more.

mod abi;
mod cpuid;
mod error;
pub(super) mod exits;
mod launch;
#[cfg(test)]
mod scripted;
#[cfg(test)]
mod tests;
mod vcpu;

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{KVM_CAP_MAX_VCPUS, KVM_CAP_X86_APIC_BUS_CYCLES_NS, KVM_X86_TDX_VM};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

use self::abi::Command;
pub(super) use self::abi::{EXIT_TDX, SYSTEM_EVENT_TDX_FATAL};
use self::launch::{Calls, Capabilities};
use self::vcpu::TdVcpu;
use super::irq::IOAPIC_PINS;
use super::vm::{self, Shared};
use super::{System, failed};
use crate::{
    CpuidChange, DirtyLog, Error, GpaRange, HostCaps, Irqs, KindTraits, Launch, Memory, Result, TdxSpec, Vcpu, VcpuId,
    Vm, VmSpec, VmState,
};

const PAGE: u64 = 4096;
/// The cycle of the local APICs' timer in nanoseconds: that of the TDX module, 25 MHz.
const APIC_CYCLE: u64 = 40;

ioctl_iowr_nr!(KVM_MEMORY_ENCRYPT_OP, kvm_bindings::KVMIO, 0xba, std::os::raw::c_ulong);

/// A trust domain.
pub(super) struct TdVm(Arc<Td>);

/// What a trust domain shares with its vCPUs.
struct Td {
    vm: Arc<Shared>,
    capabilities: Capabilities,
    max_vcpus: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    phase: Phase,
    vcpus: BTreeMap<VcpuId, Known>,
    /// Where CPUID is not as it was asked for, once a vCPU was reset.
    changes: Option<Vec<CpuidChange>>,
}

/// A vCPU that there is.
struct Known {
    /// Open for as long as it is here.
    fd: RawFd,
    /// It has its CPUID.
    ready: bool,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    New,
    Begun,
    Finished,
}

fn refused<T>(what: &'static str, problem: impl Into<String>) -> Result<T> {
    Err(Error::Invalid { what, problem: problem.into() })
}

impl TdVm {
    pub(super) fn create(system: &Arc<System>, caps: &HostCaps, spec: &VmSpec, tdx: &TdxSpec) -> Result<Self> {
        let fd = vm::create_fd(system, KVM_X86_TDX_VM)?;
        let vm = Arc::new(Shared::new(fd, system, caps, spec));
        let calls = Bare(&vm);
        let capabilities = launch::capabilities(&calls)?;
        vm::exit_to_convert(&vm.fd)?;
        vm::split_interrupt_chip(&vm.fd, IOAPIC_PINS)?;
        // Only once there is an interrupt chip, and no vCPU yet.
        vm::enable(&vm.fd, KVM_CAP_X86_APIC_BUS_CYCLES_NS, APIC_CYCLE)
            .map_err(failed("KVM_ENABLE_CAP(KVM_CAP_X86_APIC_BUS_CYCLES_NS)"))?;
        // Fewer than plain VMs may have: as many as the host has processors.
        let most = u32::try_from(vm.fd.check_extension_raw(KVM_CAP_MAX_VCPUS.into())).unwrap_or(0);
        if spec.max_vcpus > most {
            return Err(Error::Unsupported(format!(
                "{} vCPUs were asked for, and a trust domain on this host has {most} at the most",
                spec.max_vcpus
            )));
        }
        launch::init_vm(&calls, &capabilities, tdx)?;
        Ok(Self(Arc::new(Td { vm, capabilities, max_vcpus: spec.max_vcpus, state: Mutex::default() })))
    }
}

/// A trust domain's VM, before there are vCPUs.
struct Bare<'a>(&'a Shared);

#[expect(unsafe_code, reason = "the command's data is an address")]
impl Calls for Bare<'_> {
    unsafe fn of_vm(&self, command: &mut Command) -> std::result::Result<(), errno::Error> {
        // SAFETY: the caller's promise.
        unsafe { self.0.fd.encrypt_op(command) }
    }

    unsafe fn of_vcpu(&self, _: VcpuId, _: &mut Command) -> std::result::Result<(), errno::Error> {
        Err(errno::Error::new(libc::ENXIO))
    }
}

#[expect(unsafe_code, reason = "the command's data is an address, and descriptors go by their numbers")]
impl Calls for Td {
    unsafe fn of_vm(&self, command: &mut Command) -> std::result::Result<(), errno::Error> {
        // SAFETY: the caller's promise.
        unsafe { Bare(&self.vm).of_vm(command) }
    }

    unsafe fn of_vcpu(&self, id: VcpuId, command: &mut Command) -> std::result::Result<(), errno::Error> {
        // Held throughout: the vCPU cannot be dropped, and its descriptor not be closed, meanwhile.
        let state = self.state();
        let known = state.vcpus.get(&id).ok_or(errno::Error::new(libc::ENXIO))?;
        // SAFETY: the command has the layout that KVM wants, and what it points to is the caller's promise.
        match unsafe { ioctl_with_mut_ref(&known.fd, KVM_MEMORY_ENCRYPT_OP(), command) } {
            0 => Ok(()),
            _ => Err(errno::Error::last()),
        }
    }
}

impl Td {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_finished(&self) -> bool {
        self.state().phase == Phase::Finished
    }

    /// A vCPU may be reset once, before the launch begins.
    fn may_reset(&self, id: VcpuId) -> Result<()> {
        let state = self.state();
        if state.phase != Phase::New || state.vcpus.get(&id).is_some_and(|known| known.ready) {
            return refused("reset", "a trust domain is not reset in place: its reset is a new VM");
        }
        Ok(())
    }

    /// Notes that a vCPU has its CPUID, and where that is not as it was asked for.
    fn is_ready(&self, id: VcpuId, changes: Vec<CpuidChange>) {
        let mut state = self.state();
        if let Some(known) = state.vcpus.get_mut(&id) {
            known.ready = true;
        }
        state.changes.get_or_insert(changes);
    }
}

impl Vm for TdVm {
    fn kind(&self) -> &KindTraits {
        &KindTraits::TDX
    }

    fn memory(&self) -> &dyn Memory {
        &*self.0.vm
    }

    fn irqs(&self) -> &dyn Irqs {
        &self.0.vm
    }

    fn tsc_khz(&self) -> Option<u32> {
        self.0.vm.tsc_khz()
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>> {
        if u32::from(id.0) >= self.0.max_vcpus {
            return refused("vCPU", format!("{} was asked for, and there are 0 to {}", id.0, self.0.max_vcpus - 1));
        }
        if self.0.state().phase != Phase::New {
            return refused("vCPU", format!("{} comes after the launch has begun", id.0));
        }
        Ok(Box::new(TdVcpu::create(&self.0, id)?))
    }

    fn launch(&self) -> Option<&dyn Launch> {
        Some(&*self.0)
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        None
    }

    fn state(&self) -> Option<&dyn VmState> {
        None
    }
}

impl Launch for Td {
    fn begin(&self, hand_off: u64) -> Result<()> {
        let mut state = self.state();
        if state.phase != Phase::New {
            return refused("launch", "it has begun already");
        }
        if state.vcpus.is_empty() || !state.vcpus.values().all(|known| known.ready) {
            return refused("launch", "a vCPU is missing, or has not been reset");
        }
        state.phase = Phase::Begun;
        let ids: Vec<VcpuId> = state.vcpus.keys().copied().collect();
        drop(state);
        ids.into_iter().try_for_each(|id| launch::init_vcpu(self, id, hand_off))
    }

    fn add(&self, range: GpaRange, contents: &[u8], measured: bool) -> Result<()> {
        let state = self.state();
        match state.phase {
            Phase::New => return refused("launch", "it has not begun"),
            Phase::Finished => return refused("launch", "the guest is sealed"),
            Phase::Begun => {}
        }
        let first = state.vcpus.keys().next().copied();
        drop(state);
        let Some(first) = first else { return refused("launch", "its vCPUs are gone") };
        if range.len == 0 || !range.start.is_multiple_of(PAGE) || !range.len.is_multiple_of(PAGE) {
            return refused("launch", "the range is not of whole pages");
        }
        if !self.vm.slots.is_private(range) {
            return refused("launch", "the range is not private memory of one slot");
        }
        launch::add(self, first, range, contents, measured)
    }

    fn finish(&self) -> Result<()> {
        match self.state().phase {
            Phase::New => return refused("launch", "it has not begun"),
            Phase::Finished => return refused("launch", "the guest is sealed already"),
            Phase::Begun => {}
        }
        launch::finalize(self)?;
        self.state().phase = Phase::Finished;
        Ok(())
    }

    fn changes(&self) -> Vec<CpuidChange> {
        self.state().changes.clone().unwrap_or_default()
    }
}
