//! Private memory of a real kernel's, where it has VMs that are protected by software alone (`CONFIG_KVM_SW_PROTECTED_VM`).
//!
//! In such a VM each access is of the kind that the page's attribute says: a fault comes only where private memory has no
//! private side, which a slot of ours always has. So these tests give KVM such a slot behind our back.
#![expect(unsafe_code, reason = "KVM takes raw host addresses of guest memory")]

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

use super::private::set_attributes;
use super::vcpu::KvmVcpu;
use super::vm::{KvmVm, Shared};
use super::{Kvm, failed};
use crate::{
    Conversion, Exit, ExitHandler, GpaRange, GuestCall, GuestCallStatus, KindName, Result, Slot, Vcpu, VcpuId,
    Visibility, Vm, VmKind, VmSpec,
};

const CODE: u64 = 0x1000;
/// Two pages without a private side, the addresses of which are in the code.
const PLAIN: GpaRange = GpaRange { start: 0x8000, len: 0x2000 };
/// A slot's number that ours do not reach.
const NUMBER: u32 = 400;

/// A VM with memory below [`PLAIN`], or `None` with the reason printed where this host has none.
fn protected() -> Option<KvmVm> {
    let kvm = Kvm::open().map_err(|reason| eprintln!("skipped: {reason}")).ok()?;
    if !kvm.caps.kinds.contains(&KindName::SoftwareProtected) {
        eprintln!("skipped: {}", super::kinds::WHY_NOT_SOFTWARE_PROTECTED);
        return None;
    }
    let spec = VmSpec { kind: VmKind::SoftwareProtected, max_vcpus: 1, ..VmSpec::default() };
    Some(KvmVm::create(&kvm.system, &kvm.caps, &spec).unwrap())
}

fn region(range: GpaRange) -> Arc<GuestRegionMmap> {
    let mapping = MmapRegion::new(usize::try_from(range.len).unwrap()).unwrap();
    Arc::new(GuestRegionMmap::new(mapping, GuestAddress(range.start)).unwrap())
}

/// A vCPU in real mode at [`CODE`], with all segments at 0.
fn vcpu(vm: &KvmVm) -> KvmVcpu {
    let vcpu = KvmVcpu::create(&vm.0, VcpuId(0)).unwrap();
    let mut sregs = vcpu.fd.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.fd.set_sregs(&sregs).unwrap();
    let mut regs = vcpu.fd.get_regs().unwrap();
    (regs.rip, regs.rflags) = (CODE, 2);
    vcpu.fd.set_regs(&regs).unwrap();
    vcpu
}

/// Gives memory another visibility the first time, and then refuses it.
struct Once<'a> {
    vm: &'a Shared,
    asked: RefCell<Vec<(GpaRange, Visibility)>>,
    said: Cell<u8>,
}

impl ExitHandler for Once<'_> {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, data: &[u8]) {
        self.said.set(data[0]);
    }
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}
    fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        self.asked.borrow_mut().push((range, to));
        if self.asked.borrow().len() > 1 {
            return Conversion::Invalid;
        }
        set_attributes(&self.vm.fd, range, Visibility::Shared).unwrap();
        Conversion::Done
    }
    fn guest_call(&self, _: GuestCall) -> GuestCallStatus {
        GuestCallStatus::Unsupported
    }
}

#[test]
fn an_access_that_memory_cannot_answer_is_asked_about_and_ends_the_run_where_it_is_refused() {
    let Some(vm) = protected() else { return };
    let code = region(GpaRange { start: 0, len: PLAIN.start });
    let program = [
        0xc6, 0x06, 0x10, 0x80, 0x5a, // mov byte [0x8010],0x5a
        0xa0, 0x10, 0x80, // mov al,[0x8010]
        0xe6, 0x10, // out 0x10,al
        0xa0, 0x20, 0x90, // mov al,[0x9020]
    ];
    code.write_slice(&program, MemoryRegionAddress(CODE)).unwrap();
    vm.memory().map(Slot::new(code)).unwrap();
    let plain = region(PLAIN);
    set_plain(&vm.0, &plain).unwrap();
    set_attributes(&vm.0.fd, PLAIN, Visibility::Private).unwrap();
    let host = Once { vm: &vm.0, asked: RefCell::default(), said: Cell::new(0) };
    let exit = vcpu(&vm).run(&host).unwrap();
    let page = |start| GpaRange { start, len: 0x1000 };
    assert_eq!(exit, Exit::MemoryFault { range: page(0x9000), want: Visibility::Private });
    assert_eq!(
        *host.asked.borrow(),
        [(page(0x8000), Visibility::Private), (page(0x9000), Visibility::Private)],
        "the page that is touched, and the kind of access"
    );
    assert_eq!(host.said.get(), 0x5a, "it goes on where it was");
    assert_eq!(plain.read_obj::<u8>(MemoryRegionAddress(0x10)).unwrap(), 0x5a);
}

/// Maps memory without a private side.
fn set_plain(vm: &Shared, region: &GuestRegionMmap) -> Result<()> {
    let plain = kvm_userspace_memory_region {
        slot: NUMBER,
        flags: 0,
        guest_phys_addr: PLAIN.start,
        memory_size: PLAIN.len,
        userspace_addr: region.as_ptr().addr() as u64,
    };
    // SAFETY: the mapping is of this size, and no guest runs once it is gone.
    unsafe { vm.fd.set_user_memory_region(plain) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
}

#[test]
fn a_slot_begins_shared_whatever_was_there() {
    let Some(vm) = protected() else { return };
    let range = GpaRange { start: 0, len: 0x4000 };
    let page = GpaRange { start: 0x1000, len: 0x1000 };
    for _ in 0..2 {
        let id = vm.memory().map(Slot::new(region(range))).unwrap();
        assert_eq!(vm.memory().shared(), [range]);
        vm.memory().convert(page, Visibility::Private).unwrap();
        assert!(!vm.memory().is_shared(page));
        vm.memory().unmap(id).unwrap();
    }
}

#[test]
fn memory_of_a_device_has_no_private_side() {
    let Some(vm) = protected() else { return };
    let memory = vm.memory();
    memory.map(Slot::new(region(GpaRange { start: 0, len: 0x8000 }))).unwrap();
    let bar = GpaRange { start: 0x10_0000, len: 0x2000 };
    let slot = memory.map(Slot { device: true, ..Slot::new(region(bar)) }).unwrap();
    let private = memory.convert(bar, Visibility::Private).unwrap_err().to_string();
    assert!(private.contains("there is no memory"), "{private}");
    memory.convert(bar, Visibility::Shared).unwrap();
    assert_eq!(memory.shared(), [GpaRange { start: 0, len: 0x8000 }]);
    memory.unmap(slot).unwrap();
    memory.map(Slot { device: true, ..Slot::new(region(bar)) }).unwrap();
}
