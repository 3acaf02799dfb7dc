//! Guests that wait, and threads that run them.

use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;
use std::time::Duration;

use hal::kvm::Kvm;
use hal::{Exit, Kick, Vcpu};

use crate::guest::{Did, Guest, Recorder};

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Enables the local APIC in x2APIC mode and interrupts, then halts for ever. The handler of vector 0x40 writes a byte
/// to port 0x10 and ends the interrupt. Ready is said on port 0x11.
pub fn interruptible(kvm: &Kvm) -> Guest {
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

/// A vCPU thread; dropping it kicks the vCPU and waits for the thread.
pub struct Runner {
    kick: Kick,
    thread: Option<JoinHandle<Exit>>,
    pub heard: Receiver<Did>,
}

impl Runner {
    pub fn start(mut vcpu: Box<dyn Vcpu>) -> Self {
        let kick = vcpu.kick();
        let (recorder, heard) = Recorder::new();
        let thread = Some(std::thread::spawn(move || vcpu.run(&recorder).unwrap()));
        Self { kick, thread, heard }
    }

    pub fn next(&self) -> Did {
        self.heard.recv_timeout(PATIENCE).unwrap()
    }

    pub fn expect(&self, did: &Did) {
        assert_eq!(self.next(), *did);
    }

    pub fn stop(mut self) -> Exit {
        self.kick.kick();
        self.thread.take().unwrap().join().unwrap()
    }
}

/// Says on port 0x11 that it is there, then does nothing for ever, with or without halting.
pub fn idle(kvm: &Kvm, halts: bool) -> Guest {
    let wait: &[u8] = if halts { &[0xf4, 0xeb, 0xfd] } else { &[0xeb, 0xfe] };
    Guest::new(kvm, &[&[0xe6, 0x11], wait].concat())
}
