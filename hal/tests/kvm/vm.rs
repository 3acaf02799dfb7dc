//! VMs that are made, refused and gone.

use hal::{
    DirtyTracking, DoorbellMatch, Error, Hypervisor, IoAddr, KindName, SnpSpec, TdxSpec, VcpuId, VmKind, VmSpec,
};
use vmm_sys_util::eventfd::EventFd;

use crate::guest::kvm;
use crate::runner::idle;

#[test]
fn what_cannot_be_created_is_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let caps = kvm.caps();
    let refuse = |spec: VmSpec| match kvm.create(&spec) {
        Err(error @ Error::Unsupported(_)) => error.to_string(),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("{spec:?} was created"),
    };
    let plain = VmSpec { max_vcpus: 1, ..Default::default() };
    for kind in [VmKind::Tdx(TdxSpec::default()), VmKind::Snp(SnpSpec::default()), VmKind::SoftwareProtected] {
        if caps.kinds.contains(&kind.name()) {
            continue;
        }
        let message = refuse(VmSpec { kind: kind.clone(), ..plain.clone() });
        assert!(message.contains(&kind.name().to_string()), "{message}");
    }
    assert_eq!(caps.kinds[0], KindName::Standard);
    let none = refuse(VmSpec { max_vcpus: 0, ..plain.clone() });
    assert!(none.contains("0 vCPUs"), "{none}");
    let many = refuse(VmSpec { max_vcpus: caps.max_vcpus + 1, ..plain.clone() });
    assert!(many.contains(&format!("1 to {}", caps.max_vcpus)), "{many}");
    let ring = refuse(VmSpec { dirty_tracking: DirtyTracking::Ring { entries: 4096 }, ..plain.clone() });
    assert!(ring.contains("rings"), "{ring}");
    let beyond = kvm.create(&plain).unwrap().create_vcpu(VcpuId(1)).err().unwrap().to_string();
    assert!(beyond.contains("number 1"), "{beyond}");
}

#[test]
fn the_end_of_a_vm_frees_everything() {
    let Some(kvm) = kvm() else { return };
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let rounds = |times: usize| {
        for _ in 0..times {
            let guest = idle(&kvm, true);
            let _msi = guest.vm.irqs().msi().unwrap();
            let _bell = guest.vm.irqs().doorbell(IoAddr::Pio(1), DoorbellMatch::Any, EventFd::new(0).unwrap()).unwrap();
            let _kick = guest.vcpu(&kvm).kick();
        }
    };
    rounds(1);
    // Other tests open and close descriptors meanwhile; a leak would show in every round.
    let before = descriptors();
    rounds(300);
    assert!(descriptors() < before + 150, "{before} descriptors, then {}", descriptors());
}
