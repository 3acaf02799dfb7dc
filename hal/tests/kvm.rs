//! The KVM backend on the machine's own `/dev/kvm`, with guests of a few bytes.

mod guest;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use guest::{Did, Guest, Recorder, kvm, real_mode, run_to_shutdown, then_die};
use hal::kvm::{Kvm, kick_signal};
use hal::{
    Conversion, DirtyTracking, DoorbellMatch, Error, Exit, ExitHandler, GpaRange, GuestCall, GuestCallStatus,
    Hypervisor, IoAddr, Kick, KindName, MpState, MsiMessage, Msr, ResetState, Slot, SlotId, SnpSpec, TdxSpec, Vcpu,
    VcpuId, VcpuSnapshot, Visibility, VmKind, VmSpec,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::block_signal;

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

/// Enables the local APIC in x2APIC mode and interrupts, then halts for ever. The handler of vector 0x40 writes a byte
/// to port 0x10 and ends the interrupt. Ready is said on port 0x11.
fn interruptible(kvm: &Kvm) -> Guest {
    let guest = Guest::new(
        kvm,
        &[
            0x66, 0xb9, 0x1b, 0x00, 0x00, 0x00, // mov ecx,0x1b: APIC base
            0x0f, 0x32, // rdmsr
            0x80, 0xcc, 0x0c, // or ah,0x0c: enabled, x2APIC
            0x0f, 0x30, // wrmsr
            0x66, 0xb9, 0x0f, 0x08, 0x00, 0x00, // mov ecx,0x80f: spurious vector register
            0x66, 0xb8, 0xff, 0x01, 0x00, 0x00, // mov eax,0x1ff: enabled, vector 0xff
            0x66, 0x31, 0xd2, // xor edx,edx
            0x0f, 0x30, // wrmsr
            0xe6, 0x11, // out 0x11,al
            0xfb, // sti
            0xf4, // hlt
            0xeb, 0xfd, // jmp to hlt
        ],
    );
    // Interrupt table of real mode: vector 0x40 at 0x100, offset and segment.
    guest.write(4 * 0x40, &[0x00, 0x20, 0x00, 0x00]);
    guest.write(
        0x2000,
        &[
            0xb0, 0x40, 0xe6, 0x10, // mov al,0x40; out 0x10,al
            0x66, 0xb9, 0x0b, 0x08, 0x00, 0x00, // mov ecx,0x80b: end of interrupt
            0x66, 0x31, 0xc0, // xor eax,eax
            0x66, 0x31, 0xd2, // xor edx,edx
            0x0f, 0x30, // wrmsr
            0xcf, // iret
        ],
    );
    guest
}

const EDGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x40 };
const LEVEL: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0xc040 };
const PATIENCE: Duration = Duration::from_secs(20);

/// A vCPU thread; dropping it kicks the vCPU and waits for the thread.
struct Runner {
    kick: Kick,
    thread: Option<JoinHandle<Exit>>,
    heard: Receiver<Did>,
}

impl Runner {
    fn start(mut vcpu: Box<dyn Vcpu>) -> Self {
        let kick = vcpu.kick();
        let (recorder, heard) = Recorder::new();
        let thread = Some(std::thread::spawn(move || vcpu.run(&recorder).unwrap()));
        Self { kick, thread, heard }
    }

    fn next(&self) -> Did {
        self.heard.recv_timeout(PATIENCE).unwrap()
    }

    fn expect(&self, did: &Did) {
        assert_eq!(self.next(), *did);
    }

    fn stop(mut self) -> Exit {
        self.kick.kick();
        self.thread.take().unwrap().join().unwrap()
    }
}

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

/// Says on port 0x11 that it is there, then does nothing for ever, with or without halting.
fn idle(kvm: &Kvm, halts: bool) -> Guest {
    let wait: &[u8] = if halts { &[0xf4, 0xeb, 0xfd] } else { &[0xeb, 0xfe] };
    Guest::new(kvm, &[&[0xe6, 0x11], wait].concat())
}

#[test]
fn a_kick_ends_the_run_of_a_guest_that_halts_or_spins() {
    let Some(kvm) = kvm() else { return };
    for halts in [true, false] {
        let guest = idle(&kvm, halts);
        let runner = Runner::start(guest.vcpu(&kvm));
        runner.expect(&Did::PioWrite(0x11, vec![0]));
        assert_eq!(runner.stop(), Exit::Kicked);
    }
}

#[test]
fn a_thread_that_inherits_a_signal_mask_can_be_kicked() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, true);
    let mut vcpu = guest.vcpu(&kvm);
    let kick = vcpu.kick();
    let (recorder, heard) = Recorder::new();
    let thread = std::thread::spawn(move || {
        block_signal(kick_signal()).unwrap();
        vcpu.run(&recorder).unwrap()
    });
    assert_eq!(heard.recv_timeout(PATIENCE), Ok(Did::PioWrite(0x11, vec![0])));
    kick.kick();
    assert_eq!(thread.join().unwrap(), Exit::Kicked);
}

#[test]
fn a_kick_before_the_run_ends_it_and_is_used_up() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &then_die(&[0xe6, 0x11]));
    let mut vcpu = guest.vcpu(&kvm);
    let (recorder, heard) = Recorder::new();
    vcpu.kick().kick();
    vcpu.kick().kick();
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Kicked);
    assert!(heard.try_recv().is_err(), "the guest must not have run");
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
}

#[test]
fn a_kick_from_a_handler_ends_the_run_after_the_instruction() {
    struct KickOnWrite(Kick);
    impl ExitHandler for KickOnWrite {
        fn pio_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
            self.0.kick();
        }
        fn pio_write(&self, _: u16, _: &[u8]) {}
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn end_of_interrupt(&self, _: u8) {}
        fn convert(&self, _: GpaRange, _: Visibility) -> Conversion {
            Conversion::Invalid
        }
        fn guest_call(&self, _: GuestCall) -> GuestCallStatus {
            GuestCallStatus::Unsupported
        }
    }
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &then_die(&[0xe4, 0x10]));
    let mut vcpu = guest.vcpu(&kvm);
    let handler = KickOnWrite(vcpu.kick());
    assert_eq!(vcpu.run(&handler).unwrap(), Exit::Kicked);
    let regs = vcpu.state().unwrap().save().unwrap().regs;
    assert_eq!((regs.rip, regs.rax & 0xff), (guest::CODE + 2, 0x5a), "the read must be complete");
}

/// Every kick ends exactly the run that it meets: each is sent when the one before has been answered.
#[test]
fn none_of_ten_thousand_kicks_is_lost() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, false);
    let mut vcpu = guest.vcpu(&kvm);
    let kick = vcpu.kick();
    let (recorder, _heard) = Recorder::new();
    let (answered, answers) = channel();
    let thread = std::thread::spawn(move || {
        for _ in 0..10_000 {
            let exit = vcpu.run(&recorder).unwrap();
            answered.send(exit).unwrap();
        }
    });
    for number in 0..10_000 {
        // At first while the run begins, then at ever later moments of it.
        for _ in 0..number % 512 {
            std::hint::spin_loop();
        }
        kick.kick();
        assert_eq!(answers.recv_timeout(PATIENCE), Ok(Exit::Kicked), "kick {number}");
    }
    thread.join().unwrap();
}

/// Kicks from many threads at once, during which vCPUs end: nothing hangs, and what is left over hurts nobody.
#[test]
fn kicks_outlive_their_vcpu_without_harm() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, true);
    for number in 0..3 {
        let mut vcpu = guest.vm.create_vcpu(VcpuId(number)).unwrap();
        vcpu.reset(&real_mode(&kvm)).unwrap();
        let kick = vcpu.kick();
        let stop = Arc::new(AtomicBool::new(false));
        let kickers: Vec<_> = (0..3)
            .map(|_| {
                let (kick, stop) = (kick.clone(), stop.clone());
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        kick.kick();
                    }
                })
            })
            .collect();
        let (recorder, _heard) = Recorder::new();
        for _ in 0..200 {
            assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Kicked);
        }
        // The kickers go on through the end of the vCPU, and kick what is gone.
        drop(vcpu);
        kick.kick();
        stop.store(true, Ordering::Relaxed);
        for kicker in kickers {
            kicker.join().unwrap();
        }
    }
}

#[test]
fn a_waiting_processor_can_be_kicked() {
    let Some(kvm) = kvm() else { return };
    let guest = idle(&kvm, true);
    let mut vcpu = guest.vm.create_vcpu(VcpuId(1)).unwrap();
    vcpu.reset(&ResetState { entry: None, ..real_mode(&kvm) }).unwrap();
    assert_eq!(vcpu.state().unwrap().save().unwrap().mp_state, MpState::Uninitialized);
    let runner = Runner::start(vcpu);
    assert_eq!(runner.stop(), Exit::Kicked);
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

#[test]
fn the_dirty_log_shows_exactly_what_was_written() {
    let Some(kvm) = kvm() else { return };
    // mov [0x5123],al; then a read of another page, which does not count.
    let code = then_die(&[0xa2, 0x23, 0x51, 0xa0, 0x00, 0x70]);
    let guest = Guest::with(&kvm, &code, DirtyTracking::Bitmap);
    let mut vcpu = guest.vcpu(&kvm);
    let log = guest.vm.dirty_log().unwrap();
    assert!(log.collect(guest.slot).unwrap().iter().all(|word| *word == 0), "the monitor's own writes do not count");
    let (recorder, _heard) = Recorder::new();
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    // KVM may count a page that is only read when it maps it for the first time, so exactness begins with the second.
    let bitmap = log.collect(guest.slot).unwrap();
    assert_eq!(bitmap.len(), guest::MEMORY / 4096 / 64);
    assert_eq!(bitmap[0] & 1 << 5, 1 << 5, "{bitmap:x?}");
    vcpu.reset(&real_mode(&kvm)).unwrap();
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    let bitmap = log.collect(guest.slot).unwrap();
    assert_eq!(bitmap[0], 1 << 5, "{bitmap:x?}");
    assert!(bitmap[1..].iter().all(|word| *word == 0), "{bitmap:x?}");
    assert!(log.collect(guest.slot).unwrap().iter().all(|word| *word == 0), "collecting starts anew");
    let error = log.collect(SlotId(9)).unwrap_err().to_string();
    assert!(error.contains("no slot 9"), "{error}");
}

#[test]
fn memory_slots_are_checked_and_come_back() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &then_die(&[0xa0, 0x10, 0x00, 0xe6, 0x11]));
    let memory = guest.vm.memory();
    let region = |start, len| {
        Slot::new(Arc::new(GuestRegionMmap::new(MmapRegion::new(len).unwrap(), GuestAddress(start)).unwrap()))
    };
    let overlaps = memory.map(region(0xf_f000, 0x2000)).unwrap_err().to_string();
    assert!(overlaps.contains("overlaps a slot at 0x0 to 0x100000"), "{overlaps}");
    let crooked = memory.map(region(0x20_0800, 0x1000)).unwrap_err().to_string();
    assert!(crooked.contains("multiples of 4096"), "{crooked}");
    let unlogged = memory.map(Slot { log_dirty: true, ..region(0x20_0000, 0x1000) }).unwrap_err().to_string();
    assert!(unlogged.contains("without dirty bitmaps"), "{unlogged}");
    let id = memory.map(region(0x20_0000, 0x1000)).unwrap();
    assert_eq!(memory.unmap(id).unwrap().range(), GpaRange { start: 0x20_0000, len: 0x1000 });
    let gone = memory.unmap(id).unwrap_err().to_string();
    assert!(gone.contains("there is no slot 1"), "{gone}");
    assert_eq!(memory.map(region(0x20_0000, 0x1000)).unwrap(), id, "the number is used again");
    let visibility = memory.convert(GpaRange { start: 0, len: 4096 }, Visibility::Private).unwrap_err().to_string();
    assert!(visibility.contains("no private memory"), "{visibility}");
}

#[test]
fn writes_to_readonly_memory_reach_the_handler() {
    let Some(kvm) = kvm() else { return };
    // mov ax,0xffff; mov ds,ax; mov al,[0x10]: reads from the slot; mov [0x11],al: a write
    let guest = Guest::new(&kvm, &then_die(&[0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa0, 0x10, 0x00, 0xa2, 0x11, 0x00]));
    let rom = Arc::new(GuestRegionMmap::new(MmapRegion::new(0x1000).unwrap(), GuestAddress(0x10_0000)).unwrap());
    rom.write_slice(&[0x77], MemoryRegionAddress(0)).unwrap();
    guest.vm.memory().map(Slot { readonly: true, ..Slot::new(rom.clone()) }).unwrap();
    let (recorder, heard) = Recorder::new();
    assert_eq!(guest.vcpu(&kvm).run(&recorder).unwrap(), Exit::Shutdown);
    assert_eq!(heard.try_recv(), Ok(Did::MmioWrite(0x10_0001, vec![0x77])));
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
    routes.clear();
    // As many as before, all at once and many times over: none may leak.
    for _ in 0..10 {
        let again: Vec<_> = (0..1000).map(|_| irqs.msi().unwrap()).collect();
        again[999].set(Some(EDGE)).unwrap();
    }
    let line = irqs.line(3).unwrap();
    line.set(Some(LEVEL)).unwrap();
}

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
        fn convert(&self, _: GpaRange, _: Visibility) -> Conversion {
            Conversion::Invalid
        }
        fn guest_call(&self, _: GuestCall) -> GuestCallStatus {
            GuestCallStatus::Unsupported
        }
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
    let mut memory = vec![0; guest::MEMORY];
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
fn time(vcpu: &mut dyn hal::Vcpu) -> u64 {
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
        let message = refuse(VmSpec { kind: kind.clone(), ..plain.clone() });
        assert!(message.contains(&kind.name().to_string()), "{message}");
        assert!(!caps.kinds.contains(&kind.name()));
    }
    assert_eq!(caps.kinds, [KindName::Standard]);
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
