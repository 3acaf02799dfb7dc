//! Interrupts into the guest, doorbells out of it, and processors that start each other.

use std::sync::atomic::Ordering;

use hal::{DoorbellMatch, Exit, IoAddr, MsiMessage, ResetState, VcpuId};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::{Did, Guest, Recorder, kvm, real_mode, then_die};
use crate::runner::{Runner, idle, interruptible};

const EDGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x40 };
const LEVEL: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0xc040 };

#[test]
fn an_msi_wakes_a_halted_guest() {
    let Some(kvm) = kvm() else { return };
    let guest = interruptible(&kvm);
    let msi = guest.vm.irqs().msi().unwrap();
    let runner = Runner::start(guest.vcpu(&kvm));
    runner.expect(&Did::PioWrite(0x11, vec![0xff]));
    msi.set(Some(EDGE)).unwrap();
    for _ in 0..100 {
        msi.event().write(1).unwrap();
        runner.expect(&Did::PioWrite(0x10, vec![0x40]));
    }
    // While masked the event waits; it is delivered when the message is set again.
    msi.set(None).unwrap();
    msi.event().write(1).unwrap();
    assert!(runner.heard.try_recv().is_err());
    msi.set(Some(EDGE)).unwrap();
    runner.expect(&Did::PioWrite(0x10, vec![0x40]));
    assert_eq!(runner.stop(), Exit::Kicked);
}

#[test]
fn the_end_of_a_level_interrupt_is_told() {
    let Some(kvm) = kvm() else { return };
    let guest = interruptible(&kvm);
    let line = guest.vm.irqs().line(5).unwrap();
    let runner = Runner::start(guest.vcpu(&kvm));
    runner.expect(&Did::PioWrite(0x11, vec![0xff]));
    line.set(Some(LEVEL)).unwrap();
    for _ in 0..100 {
        line.event().write(1).unwrap();
        // A KVM without hardware behind it ends an interrupt as it delivers it, so either may be told first.
        let told = [runner.next(), runner.next()];
        assert!(told.contains(&Did::PioWrite(0x10, vec![0x40])) && told.contains(&Did::Eoi(0x40)), "{told:?}");
    }
    assert_eq!(runner.stop(), Exit::Kicked);
}

#[test]
fn a_doorbell_rings_instead_of_the_handler() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(
        &kvm,
        &then_die(&[
            0xb8, 0x07, 0x00, 0xba, 0x50, 0x00, 0xef, // mov ax,7; mov dx,0x50; out dx,ax: rings
            0x40, 0xef, // inc ax; out dx,ax: does not match
            0xb8, 0xff, 0xff, 0x8e, 0xd8, // mov ax,0xffff; mov ds,ax
            0xa2, 0x20, 0x00, // mov [0x20],al: rings, any width
            0xa3, 0x20, 0x00, // mov [0x20],ax: rings
            0xa3, 0x22, 0x00, // mov [0x22],ax: does not
        ]),
    );
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let irqs = guest.vm.irqs();
    let port = irqs.doorbell(IoAddr::Pio(0x50), DoorbellMatch::U16(7), event()).unwrap();
    let memory = irqs.doorbell(IoAddr::Mmio(0x10_0010), DoorbellMatch::Any, event()).unwrap();
    let taken = irqs.doorbell(IoAddr::Mmio(0x10_0010), DoorbellMatch::Any, event());
    assert!(taken.is_err_and(|error| error.to_string().contains("KVM_IOEVENTFD")));
    let (recorder, heard) = Recorder::new();
    let mut vcpu = guest.vcpu(&kvm);
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    assert_eq!(heard.try_recv(), Ok(Did::PioWrite(0x50, vec![8, 0])));
    assert_eq!(heard.try_recv(), Ok(Did::MmioWrite(0x10_0012, vec![0xff, 0xff])));
    assert!(heard.try_recv().is_err());
    assert_eq!((port.event().read().unwrap(), memory.event().read().unwrap()), (1, 2));

    // A dropped doorbell frees its address: writes reach the handler again.
    drop(memory);
    vcpu.reset(&real_mode(&kvm)).unwrap();
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    assert_eq!(heard.try_recv(), Ok(Did::PioWrite(0x50, vec![8, 0])));
    assert_eq!(heard.try_recv(), Ok(Did::MmioWrite(0x10_0010, vec![0xff])));
}

#[test]
fn routes_run_out_and_are_used_again() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, true);
    let irqs = guest.vm.irqs();
    let line = irqs.line(3).unwrap();
    let taken = irqs.line(3).err().unwrap().to_string();
    assert!(taken.contains("3 is taken"), "{taken}");
    let beyond = irqs.line(24).err().unwrap().to_string();
    assert!(beyond.contains("the pins are 0 to 23"), "{beyond}");
    drop(line);
    let mut routes: Vec<_> = (0..500).map(|_| irqs.msi().unwrap()).collect();
    for (route, data) in routes.iter().zip(0x20..) {
        route.set(Some(MsiMessage { address: 0xfee0_0000, data: data & 0xff })).unwrap();
    }
    assert_eq!(irqs.routes_held().load(Ordering::Relaxed), 500);
    routes.clear();
    assert_eq!(irqs.routes_held().load(Ordering::Relaxed), 0);
    // As many as before, all at once and many times over: none may leak.
    for _ in 0..10 {
        let again: Vec<_> = (0..1000).map(|_| irqs.msi().unwrap()).collect();
        again[999].set(Some(EDGE)).unwrap();
    }
    let line = irqs.line(3).unwrap();
    line.set(Some(LEVEL)).unwrap();
    assert_eq!(irqs.routes_held().load(Ordering::Relaxed), 1);
}

#[test]
fn a_processor_starts_another() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(
        &kvm,
        &[
            0x66, 0xb9, 0x1b, 0x00, 0x00, 0x00, // mov ecx,0x1b: APIC base
            0x0f, 0x32, // rdmsr
            0x80, 0xcc, 0x0c, // or ah,0x0c: enabled, x2APIC
            0x0f, 0x30, // wrmsr
            0x66, 0xb9, 0x0f, 0x08, 0x00, 0x00, // mov ecx,0x80f: spurious vector register
            0x66, 0xb8, 0xff, 0x01, 0x00, 0x00, // mov eax,0x1ff: enabled, vector 0xff
            0x66, 0x31, 0xd2, // xor edx,edx
            0x0f, 0x30, // wrmsr
            0x66, 0xb9, 0x30, 0x08, 0x00, 0x00, // mov ecx,0x830: interrupt command
            0x66, 0xba, 0x01, 0x00, 0x00, 0x00, // mov edx,1: to processor 1
            0x66, 0xb8, 0x00, 0x45, 0x00, 0x00, // mov eax,0x4500: INIT
            0x0f, 0x30, // wrmsr
            0x66, 0xb8, 0x03, 0x46, 0x00, 0x00, // mov eax,0x4603: start at 0x3000
            0x0f, 0x30, // wrmsr
            0xf4, 0xeb, 0xfd, // hlt for ever
        ],
    );
    guest.write(0x3000, &[0xb0, 0x77, 0xe6, 0x12, 0xf4, 0xeb, 0xfd]); // mov al,0x77; out 0x12,al; hlt for ever
    let mut second = guest.vm.create_vcpu(VcpuId(1)).unwrap();
    let boot = guest.vcpu(&kvm);
    second.reset(&ResetState { entry: None, ..real_mode(&kvm) }).unwrap();
    let (boot, second) = (Runner::start(boot), Runner::start(second));
    second.expect(&Did::PioWrite(0x12, vec![0x77]));
    assert_eq!((boot.stop(), second.stop()), (Exit::Kicked, Exit::Kicked));
}
