//! Tiny guests in real mode, and what a test needs to run them on the host's KVM.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use hal::kvm::Kvm;
use hal::{
    BootRegisters, DescriptorTable, DirtyTracking, Error, Exit, ExitHandler, Hypervisor, Registers, ResetState,
    Segment, Slot, SlotId, SystemRegisters, Vcpu, VcpuId, Vm, VmSpec,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

/// Where guests are loaded and begin.
pub const CODE: u64 = 0x1000;
/// Guest memory of a test, in bytes.
pub const MEMORY: usize = 0x10_0000;

/// KVM, or `None` with the reason printed where this machine lets no test use it.
pub fn kvm() -> Option<Kvm> {
    match Kvm::open() {
        Ok(kvm) => Some(kvm),
        Err(reason @ (Error::NoHypervisor { .. } | Error::NotPermitted { .. } | Error::Unusable { .. })) => {
            eprintln!("skipped: {reason}");
            None
        }
        Err(other) => panic!("{other}"),
    }
}

/// A VM with one MiB of memory.
pub struct Guest {
    pub vm: Box<dyn Vm>,
    pub region: Arc<GuestRegionMmap>,
    pub slot: SlotId,
}

impl Guest {
    pub fn new(kvm: &Kvm, code: &[u8]) -> Self {
        Self::with(kvm, code, DirtyTracking::Off)
    }

    pub fn with(kvm: &Kvm, code: &[u8], dirty_tracking: DirtyTracking) -> Self {
        let vm = kvm.create(&VmSpec { max_vcpus: 4, dirty_tracking, ..Default::default() }).unwrap();
        let region = Arc::new(GuestRegionMmap::new(MmapRegion::new(MEMORY).unwrap(), GuestAddress(0)).unwrap());
        region.write_slice(code, MemoryRegionAddress(CODE)).unwrap();
        let log_dirty = dirty_tracking == DirtyTracking::Bitmap;
        let slot = vm.memory().map(Slot { log_dirty, ..Slot::new(region.clone()) }).unwrap();
        Self { vm, region, slot }
    }

    /// vCPU 0, at the guest's first instruction.
    pub fn vcpu(&self, kvm: &Kvm) -> Box<dyn Vcpu> {
        let mut vcpu = self.vm.create_vcpu(VcpuId(0)).unwrap();
        vcpu.reset(&real_mode(kvm)).unwrap();
        vcpu
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        self.region.write_slice(bytes, MemoryRegionAddress(at)).unwrap();
    }
}

/// A vCPU in real mode at [`CODE`] with all segments at 0, its stack below the code, and the host's CPUID.
pub fn real_mode(kvm: &Kvm) -> ResetState {
    let data = Segment { limit: 0xffff, access: 0x93, ..Default::default() };
    let table = DescriptorTable { base: 0, limit: 0x3ff };
    let sregs = SystemRegisters {
        cs: Segment { access: 0x9b, ..data },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment { access: 0x8b, ..data },
        ldt: Segment { access: 0x82, ..data },
        gdt: table,
        idt: table,
        cr0: 0x10,
        apic_base: 0xfee0_0900,
        ..Default::default()
    };
    let regs = Registers { rip: CODE, rsp: CODE, rflags: 2, ..Default::default() };
    ResetState { cpuid: kvm.caps().cpuid.clone(), msrs: Vec::new(), entry: Some(BootRegisters { regs, sregs }) }
}

/// What a guest did that reached the monitor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Did {
    PioRead(u16, usize),
    PioWrite(u16, Vec<u8>),
    MmioRead(u64, usize),
    MmioWrite(u64, Vec<u8>),
    Eoi(u8),
}

/// A monitor that answers reads with counted bytes (1, 2, 3…) and tells what the guest did.
pub struct Recorder {
    said: Mutex<Sender<Did>>,
    next: Mutex<u8>,
}

impl Recorder {
    pub fn new() -> (Self, Receiver<Did>) {
        let (said, heard) = channel();
        (Self { said: Mutex::new(said), next: Mutex::new(1) }, heard)
    }

    fn say(&self, did: Did) {
        self.said.lock().unwrap().send(did).unwrap();
    }

    fn fill(&self, data: &mut [u8]) {
        let mut next = self.next.lock().unwrap();
        for byte in data {
            *byte = *next;
            *next = next.wrapping_add(1);
        }
    }
}

impl ExitHandler for Recorder {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.fill(data);
        self.say(Did::PioRead(port, data.len()));
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.say(Did::PioWrite(port, data.to_vec()));
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.fill(data);
        self.say(Did::MmioRead(gpa, data.len()));
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.say(Did::MmioWrite(gpa, data.to_vec()));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.say(Did::Eoi(vector));
    }
}

/// Runs a guest to its end, which is a triple fault, and gives what it did.
pub fn run_to_shutdown(kvm: &Kvm, code: &[u8]) -> Vec<Did> {
    let guest = Guest::new(kvm, code);
    let (recorder, heard) = Recorder::new();
    let mut vcpu = guest.vcpu(kvm);
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    drop(recorder);
    heard.iter().collect()
}

/// Makes the processor give up: protected mode with an empty interrupt table, then an exception.
pub const TRIPLE_FAULT: [u8; 17] = [
    0x2e, 0x0f, 0x01, 0x1e, 0x00, 0x09, // lidt cs:[0x900], where memory is 0: a table of length 0
    0x0f, 0x20, 0xc0, // mov eax,cr0
    0x0c, 0x01, // or al,1
    0x0f, 0x22, 0xc0, // mov cr0,eax
    0x0f, 0x0b, // ud2
    0xf4, // hlt, never reached
];

/// Code with a triple fault after it.
pub fn then_die(code: &[u8]) -> Vec<u8> {
    [code, &TRIPLE_FAULT].concat()
}
