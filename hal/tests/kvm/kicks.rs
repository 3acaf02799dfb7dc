//! Kicks, which end a run from another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use hal::kvm::kick_signal;
use hal::{Exit, ExitHandler, Kick, MpState, ResetState, VcpuId};
use vmm_sys_util::signal::block_signal;

use crate::guest::{CODE, Did, Guest, Recorder, kvm, real_mode, then_die};
use crate::runner::{PATIENCE, Runner, idle};

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
    }
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &then_die(&[0xe4, 0x10]));
    let mut vcpu = guest.vcpu(&kvm);
    let handler = KickOnWrite(vcpu.kick());
    assert_eq!(vcpu.run(&handler).unwrap(), Exit::Kicked);
    let regs = vcpu.state().unwrap().save().unwrap().regs;
    assert_eq!((regs.rip, regs.rax & 0xff), (CODE + 2, 0x5a), "the read must be complete");
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
