//! State that is saved, restored and reset, and time.

use std::sync::Mutex;
use std::time::Duration;

use hal::{Exit, ExitHandler, Hypervisor, Kick, Msr, ResetState, Vcpu, VcpuId, VcpuSnapshot, VmSpec};
use vm_memory::{Bytes, MemoryRegionAddress};

use crate::guest::{Did, Guest, MEMORY, Recorder, kvm, real_mode};
use crate::runner::{PATIENCE, idle, interruptible};

/// Registers that count time: the TSC, and the Hyper-V clocks that KVM keeps for every vCPU.
const TIMES: [u32; 3] = [0x10, 0x4000_0010, 0x4000_0020];

/// A state without what changes although nothing happens.
fn without_time(mut state: VcpuSnapshot) -> VcpuSnapshot {
    state.msrs.retain(|msr| !TIMES.contains(&msr.index));
    state
}

/// The parts in which two states differ: a whole state is too long for a message.
fn difference(one: &VcpuSnapshot, other: &VcpuSnapshot) -> Vec<String> {
    let text = |state: &VcpuSnapshot| serde_json::to_value(state).unwrap();
    let (one, other) = (text(one), text(other));
    let parts = one.as_object().unwrap().iter().filter(|(name, value)| other[name.as_str()] != **value);
    parts.map(|(name, value)| format!("{name}: {value} and {}", other[name.as_str()])).collect()
}

#[test]
fn a_saved_state_goes_on_in_another_vm() {
    let Some(kvm) = kvm() else { return };
    // Counts in bx, cx and the stack; says the count on port 0x11 and starts over. Interrupts on, APIC in x2APIC mode.
    let code = [
        0xbb, 0x34, 0x12, // mov bx,0x1234
        0xfb, // sti
        0x53, // push bx
        0x43, // inc bx
        0x89, 0xd8, // mov ax,bx
        0xe7, 0x11, // out 0x11,ax
        0x5a, // pop dx
        0xeb, 0xf7, // jmp to push
    ];
    let first = Guest::new(&kvm, &code);
    let mut vcpu = first.vcpu(&kvm);
    struct KickAt(Kick, Mutex<Vec<u8>>);
    impl ExitHandler for KickAt {
        fn pio_read(&self, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: u16, data: &[u8]) {
            *self.1.lock().unwrap() = data.to_vec();
            self.0.kick();
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn end_of_interrupt(&self, _: u8) {}
    }
    let handler = KickAt(vcpu.kick(), Mutex::default());
    for _ in 0..3 {
        assert_eq!(vcpu.run(&handler).unwrap(), Exit::Kicked);
    }
    assert_eq!(*handler.1.lock().unwrap(), 0x1237_u16.to_le_bytes());
    let saved = vcpu.state().unwrap().save().unwrap();
    assert_eq!(saved.regs.rbx, 0x1237);
    assert_eq!(saved.msrs.last().map(|msr| msr.index), Some(0x6e0), "the deadline is written last");

    // Through text and back, as a migration carries it.
    let carried: VcpuSnapshot = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
    assert_eq!(carried, saved);
    let second = Guest::new(&kvm, &code);
    let mut memory = vec![0; MEMORY];
    first.region.read_slice(&mut memory, MemoryRegionAddress(0)).unwrap();
    second.write(0, &memory);
    let mut twin = second.vm.create_vcpu(VcpuId(0)).unwrap();
    twin.state().unwrap().restore(&carried).unwrap();
    let restored = twin.state().unwrap().save().unwrap();
    assert_eq!(difference(&without_time(restored), &without_time(saved)), [""; 0]);
    let handler = KickAt(twin.kick(), Mutex::default());
    assert_eq!(twin.run(&handler).unwrap(), Exit::Kicked);
    assert_eq!(*handler.1.lock().unwrap(), 0x1238_u16.to_le_bytes());
}

#[test]
fn states_that_do_not_fit_are_refused_by_name() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, true);
    let mut vcpu = guest.vcpu(&kvm);
    let state = vcpu.state().unwrap();
    let good = state.save().unwrap();
    let mut refuse = |change: &dyn Fn(&mut VcpuSnapshot)| {
        let mut bad = good.clone();
        change(&mut bad);
        state.restore(&bad).unwrap_err().to_string()
    };
    let version = refuse(&|bad| bad.version = 99);
    assert!(version.contains("version 99"), "{version}");
    let many = refuse(&|bad| {
        bad.xsave = vec![0; 100];
        bad.lapic = Some(vec![0; 1000]);
        bad.nested = Some(vec![0; 3]);
        bad.xcrs = vec![(0, 1); 17];
    });
    for part in ["XSAVE area has 100", "local APIC's page has 1000", "nested state has 3", "17 extended"] {
        assert!(many.contains(part), "{part}: {many}");
    }
    let registers = refuse(&|bad| {
        bad.msrs.insert(0, Msr { index: 0x4321_0000, value: 7 });
        bad.msrs.push(Msr { index: 0x4321_0001, value: 8 });
    });
    assert!(registers.contains("0x43210000 = 0x7, 0x43210001 = 0x8"), "{registers}");
    state.restore(&good).unwrap();
}

#[test]
fn a_reset_after_a_run_is_a_reset_from_power_on() {
    let Some(kvm) = kvm() else { return };
    let guest = interruptible(&kvm);
    let mut vcpu = guest.vcpu(&kvm);
    let fresh = without_time(vcpu.state().unwrap().save().unwrap());
    let (recorder, heard) = Recorder::new();
    let kick = vcpu.kick();
    let stopper = std::thread::spawn(move || {
        assert_eq!(heard.recv_timeout(PATIENCE), Ok(Did::PioWrite(0x11, vec![0xff])));
        kick.kick();
        heard
    });
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Kicked);
    let _heard = stopper.join().unwrap();
    let ran = without_time(vcpu.state().unwrap().save().unwrap());
    assert!(ran.lapic != fresh.lapic && ran.regs != fresh.regs, "the guest has changed something");
    vcpu.reset(&real_mode(&kvm)).unwrap();
    assert_eq!(difference(&without_time(vcpu.state().unwrap().save().unwrap()), &fresh), [""; 0]);
}

#[test]
fn a_vcpu_that_comes_late_or_again_has_the_time_of_the_others() {
    let Some(kvm) = kvm() else { return };
    let vm = kvm.create(&VmSpec { max_vcpus: 2, ..VmSpec::default() }).unwrap();
    let mut first = vm.create_vcpu(VcpuId(0)).unwrap();
    first.reset(&real_mode(&kvm)).unwrap();
    // Long enough that a counter that begins with its vCPU would be behind.
    std::thread::sleep(Duration::from_millis(200));
    let mut late = vm.create_vcpu(VcpuId(1)).unwrap();
    late.reset(&ResetState { entry: None, ..real_mode(&kvm) }).unwrap();
    let mut between = || [time(&mut *first), time(&mut *late), time(&mut *first)];
    assert!(between().is_sorted(), "{:?}", between());
    // It stands in line for its start-up IPI until it is sent away.
    late.kick().kick();
    assert_eq!(late.run(&Recorder::new().0).unwrap(), Exit::Kicked);
    late.reset(&ResetState { entry: None, ..real_mode(&kvm) }).unwrap();
    let times = [time(&mut *first), time(&mut *late), time(&mut *first)];
    assert!(times.is_sorted(), "{times:?}");
}

/// A vCPU's time stamp counter.
fn time(vcpu: &mut dyn Vcpu) -> u64 {
    let state = vcpu.state().unwrap().save().unwrap();
    state.msrs.iter().find(|msr| msr.index == 0x10).unwrap().value
}

#[test]
fn the_clock_of_a_vm_can_be_set() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, true);
    let _vcpu = guest.vcpu(&kvm);
    let clock = guest.vm.state().unwrap();
    let hour = 3_600_000_000_000;
    clock.set_clock(hour).unwrap();
    let now = clock.clock().unwrap();
    assert!((hour..hour + 60_000_000_000).contains(&now), "{now}");
    assert!(guest.vm.tsc_khz().is_some_and(|khz| khz > 100_000));
}
