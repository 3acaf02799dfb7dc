//! Exits that the handler answers, exits that end a run, and KVM's own count of them.

use hal::Exit;

use crate::guest::{Did, Guest, Recorder, kvm, run_to_shutdown, then_die};

#[test]
fn port_io_of_every_width_reaches_the_handler() {
    let Some(kvm) = kvm() else { return };
    let did = run_to_shutdown(
        &kvm,
        &then_die(&[
            0xb0, 0x41, 0xe6, 0x10, // mov al,0x41; out 0x10,al
            0xe4, 0x10, // in al,0x10: reads 1
            0xe6, 0x11, // out 0x11,al
            0xba, 0xf8, 0x03, 0xed, // mov dx,0x3f8; in ax,dx: reads 2,3
            0xef, // out dx,ax
            0x66, 0xed, // in eax,dx: reads 4,5,6,7
            0x66, 0xef, // out dx,eax
        ]),
    );
    assert_eq!(
        did,
        [
            Did::PioWrite(0x10, vec![0x41]),
            Did::PioRead(0x10, 1),
            Did::PioWrite(0x11, vec![1]),
            Did::PioRead(0x3f8, 2),
            Did::PioWrite(0x3f8, vec![2, 3]),
            Did::PioRead(0x3f8, 4),
            Did::PioWrite(0x3f8, vec![4, 5, 6, 7]),
        ]
    );
}

#[test]
fn string_io_reaches_the_handler_element_by_element() {
    let Some(kvm) = kvm() else { return };
    let did = run_to_shutdown(
        &kvm,
        &then_die(&[
            0xba, 0xf8, 0x03, // mov dx,0x3f8
            0xbf, 0x00, 0x80, // mov di,0x8000
            0xb9, 0x03, 0x00, // mov cx,3
            0xf3, 0x6d, // rep insw
            0xbe, 0x00, 0x80, // mov si,0x8000
            0xb9, 0x06, 0x00, // mov cx,6
            0xf3, 0x6e, // rep outsb
        ]),
    );
    let reads = vec![Did::PioRead(0x3f8, 2); 3];
    let writes = (1..=6).map(|byte| Did::PioWrite(0x3f8, vec![byte]));
    assert_eq!(did, reads.into_iter().chain(writes).collect::<Vec<_>>());
}

#[test]
fn memory_without_a_slot_is_mmio() {
    let Some(kvm) = kvm() else { return };
    let did = run_to_shutdown(
        &kvm,
        &then_die(&[
            0xb8, 0xff, 0xff, 0x8e, 0xd8, // mov ax,0xffff; mov ds,ax: base 0xffff0
            0xa1, 0x20, 0x00, // mov ax,[0x20]: 0x100010, just beyond memory, reads 1,2
            0xa2, 0x30, 0x00, // mov [0x30],al
            0x66, 0xa3, 0x40, 0x00, // mov [0x40],eax
        ]),
    );
    assert_eq!(
        did,
        [Did::MmioRead(0x10_0010, 2), Did::MmioWrite(0x10_0020, vec![1]), Did::MmioWrite(0x10_0030, vec![1, 2, 0, 0]),]
    );
}

#[test]
fn an_instruction_that_kvm_cannot_emulate_is_a_crash_with_its_address() {
    let Some(kvm) = kvm() else { return };
    // Code outside of memory: ljmp 0xffff:0x10 to 0x100000.
    let guest = Guest::new(&kvm, &[0xea, 0x10, 0x00, 0xff, 0xff]);
    let (recorder, _heard) = Recorder::new();
    let Exit::Crash(info) = guest.vcpu(&kvm).run(&recorder).unwrap() else { panic!("no crash") };
    assert!(info.reason.contains("KVM internal error 1"), "{info}");
    assert_eq!(info.rip, Some(0x10), "{info}");
}

#[test]
fn kvms_own_counters_grow_with_the_exits() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &then_die(&[0xe6, 0x10, 0xe6, 0x10, 0xe6, 0x10]));
    let mut vcpu = guest.vcpu(&kvm);
    let Some(counters) = vcpu.counters() else {
        eprintln!("skipped: this kernel has no KVM_GET_STATS_FD");
        return;
    };
    let exits = || counters.read().unwrap().into_iter().find(|counter| counter.name == "exits").unwrap().value;
    let before = exits();
    assert_eq!(vcpu.run(&Recorder::new().0).unwrap(), Exit::Shutdown);
    assert!(exits() >= before + 3, "{} after {before}", exits());
}
