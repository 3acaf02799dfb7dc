//! The scripted hypervisor behaves as a hypervisor does, and shows a test what it was asked.

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hal::fake::{Call, Fake, GuestAnswer, GuestRead, Live, RouteId, RouteView, Step};
use hal::{
    BootRegisters, Conversion, CrashInfo, DirtyTracking, DoorbellMatch, Error, Exit, ExitHandler, GpaRange, GuestCall,
    GuestCallStatus, HostCaps, Hypervisor, IoAddr, KindName, MpState, MsiMessage, Msr, Registers, ResetState, Slot,
    SlotId, TdxSpec, Vcpu, VcpuId, Visibility, Vm, VmKind, VmSpec,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const ZERO: VcpuId = VcpuId(0);
const MESSAGE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x41 };
const PATIENCE: Duration = Duration::from_secs(20);

/// Answers reads with 0x5a and remembers writes and ends of interrupts.
#[derive(Default)]
struct Devices(Mutex<Vec<String>>);

impl Devices {
    fn say(&self, what: String) {
        self.0.lock().unwrap().push(what);
    }
}

impl ExitHandler for Devices {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0x5a);
        self.say(format!("in {port:#x}"));
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.say(format!("out {port:#x} {data:x?}"));
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xa5);
        self.say(format!("read {gpa:#x}"));
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.say(format!("write {gpa:#x} {data:x?}"));
    }
    fn end_of_interrupt(&self, vector: u8) {
        self.say(format!("eoi {vector}"));
    }
}

fn spec() -> VmSpec {
    VmSpec { max_vcpus: 2, dirty_tracking: DirtyTracking::Bitmap, ..Default::default() }
}

fn slot(start: u64, len: usize) -> Slot {
    Slot::new(Arc::new(GuestRegionMmap::new(MmapRegion::new(len).unwrap(), GuestAddress(start)).unwrap()))
}

/// Runs vCPU 0 of a new VM once.
fn run(fake: &Fake, vm: &dyn Vm) -> (Exit, Vec<String>) {
    let devices = Devices::default();
    let exit = vm.create_vcpu(ZERO).unwrap().run(&devices).unwrap();
    assert!(fake.calls().contains(&Call::Run(ZERO)));
    (exit, devices.0.into_inner().unwrap())
}

#[test]
fn a_script_reaches_the_handler_step_by_step() {
    let fake = Fake::new();
    fake.script(
        ZERO,
        [
            Step::pio_read(0x60, 2),
            Step::pio_write(0x3f8, b"A"),
            Step::mmio_read(0x1000, 1),
            Step::mmio_write(0x2000, &[1, 2]),
            Step::Eoi(9),
            Step::Crash("broken".into()),
        ],
    );
    let vm = fake.create(&spec()).unwrap();
    let (exit, said) = run(&fake, &*vm);
    assert_eq!(exit, Exit::Crash(CrashInfo { reason: "broken".into(), rip: None }));
    assert_eq!(said, ["in 0x60", "out 0x3f8 [41]", "read 0x1000", "write 0x2000 [1, 2]", "eoi 9"]);
    let reads = [
        GuestRead { at: IoAddr::Pio(0x60), data: vec![0x5a; 2] },
        GuestRead { at: IoAddr::Mmio(0x1000), data: vec![0xa5] },
    ];
    assert_eq!(fake.reads(ZERO), reads);
}

#[test]
fn every_end_of_a_run_can_be_scripted() {
    let fake = Fake::new();
    let range = GpaRange { start: 0x1000, len: 0x1000 };
    fake.script(
        ZERO,
        [Step::Shutdown, Step::Reset, Step::Debug, Step::MemoryFault { range, want: Visibility::Private }],
    );
    let vm = fake.create(&spec()).unwrap();
    let mut vcpu = vm.create_vcpu(ZERO).unwrap();
    let mut ends = || vcpu.run(&Devices::default()).unwrap();
    assert_eq!(
        [ends(), ends(), ends(), ends()],
        [Exit::Shutdown, Exit::Reset, Exit::Debug, Exit::MemoryFault { range, want: Visibility::Private }]
    );
}

#[test]
fn memory_answers_before_devices_and_keeps_a_dirty_log() {
    let fake = Fake::new();
    let vm = fake.create(&spec()).unwrap();
    let logged = Slot { log_dirty: true, ..slot(0, 0x8_0000) };
    let region = logged.region.clone();
    let id = vm.memory().map(logged).unwrap();
    vm.memory().map(Slot { readonly: true, ..slot(0x10_0000, 0x1000) }).unwrap();
    fake.script(
        ZERO,
        [
            // Across the boundary of two pages.
            Step::mmio_write(0x4_1fff, &[7, 8]),
            Step::mmio_read(0x4_2000, 1),
            Step::mmio_write(0x10_0000, &[9]),
            Step::Shutdown,
        ],
    );
    let (_, said) = run(&fake, &*vm);
    assert_eq!(said, ["write 0x100000 [9]"], "only the write to the read-only slot leaves the guest");
    assert_eq!(fake.reads(ZERO), [GuestRead { at: IoAddr::Mmio(0x4_2000), data: vec![8] }]);
    assert_eq!(region.read_obj::<u8>(MemoryRegionAddress(0x4_1fff)).unwrap(), 7);
    let log = vm.dirty_log().unwrap();
    assert_eq!(log.collect(id).unwrap(), [0, 0b110]);
    assert_eq!(log.collect(id).unwrap(), [0, 0]);
    assert!(log.collect(SlotId(1)).unwrap_err().to_string().contains("keeps no dirty log"));
}

#[test]
fn bad_slots_are_refused_as_on_a_host() {
    let fake = Fake::new();
    let vm = fake.create(&VmSpec { max_vcpus: 1, ..Default::default() }).unwrap();
    let memory = vm.memory();
    let id = memory.map(slot(0x1000, 0x2000)).unwrap();
    let refuse = |slot| memory.map(slot).unwrap_err().to_string();
    assert!(refuse(slot(0x2000, 0x1000)).contains("overlaps"));
    assert!(refuse(slot(0x8001, 0x1000)).contains("multiples of 4096"));
    assert!(refuse(Slot { log_dirty: true, ..slot(0x8000, 0x1000) }).contains("dirty log"));
    assert_eq!(fake.slots(), [(id, GpaRange { start: 0x1000, len: 0x2000 })]);
    assert_eq!(memory.unmap(id).unwrap().range().start, 0x1000);
    assert!(memory.unmap(id).is_err());
    assert!(vm.dirty_log().is_none());
}

#[test]
fn doorbells_ring_instead_of_handlers() {
    let fake = Fake::new();
    let vm = fake.create(&spec()).unwrap();
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let at = IoAddr::Mmio(0xc000_0000);
    let one = vm.irqs().doorbell(at, DoorbellMatch::U16(1), event()).unwrap();
    let any = vm.irqs().doorbell(IoAddr::Pio(0x10), DoorbellMatch::Any, event()).unwrap();
    assert!(vm.irqs().doorbell(at, DoorbellMatch::U16(1), event()).is_err());
    assert!(vm.irqs().doorbell(at, DoorbellMatch::Any, event()).is_err());
    fake.script(
        ZERO,
        [
            Step::mmio_write(0xc000_0000, &[1, 0]),
            Step::mmio_write(0xc000_0000, &[2, 0]),
            Step::pio_write(0x10, &[1]),
            Step::pio_write(0x10, &[1, 2, 3, 4]),
            Step::Shutdown,
        ],
    );
    assert_eq!(run(&fake, &*vm).1, ["write 0xc0000000 [2, 0]"]);
    assert_eq!((one.event().read().unwrap(), any.event().read().unwrap()), (1, 2));
    drop(one);
    assert_eq!(fake.doorbells(), [(IoAddr::Pio(0x10), DoorbellMatch::Any)]);
}

#[test]
fn interrupts_wake_the_guest_and_the_test() {
    let fake = Fake::new();
    fake.script(ZERO, [Step::WaitForInterrupt(MESSAGE), Step::pio_write(1, &[1]), Step::Shutdown]);
    let vm = fake.create(&spec()).unwrap();
    let route = vm.irqs().msi().unwrap();
    let pin = vm.irqs().line(4).unwrap();
    assert!(vm.irqs().line(4).is_err() && vm.irqs().line(24).is_err());
    // Signalled while masked: it waits for its message.
    route.event().write(1).unwrap();
    let mut vcpu = vm.create_vcpu(ZERO).unwrap();
    let kick = vcpu.kick();
    let (answered, answers) = channel();
    let thread = std::thread::spawn(move || {
        for _ in 0..2 {
            answered.send(vcpu.run(&Devices::default()).unwrap()).unwrap();
        }
    });
    kick.kick();
    assert_eq!(answers.recv_timeout(PATIENCE), Ok(Exit::Kicked), "a kick ends a run that waits");
    assert!(answers.try_recv().is_err());
    route.set(Some(MESSAGE)).unwrap();
    assert_eq!(answers.recv_timeout(PATIENCE), Ok(Exit::Shutdown), "the guest goes on waiting, and wakes");
    thread.join().unwrap();

    assert_eq!(
        fake.routes(),
        [
            RouteView { id: RouteId(0), pin: None, message: Some(MESSAGE) },
            RouteView { id: RouteId(1), pin: Some(4), message: None },
        ]
    );
    let level = MsiMessage { data: 0x8042, ..MESSAGE };
    assert!(!fake.wait_for(level, Duration::ZERO).unwrap());
    pin.set(Some(level)).unwrap();
    let (from_device, event) = (fake.clone(), pin.event().try_clone().unwrap());
    let device = std::thread::spawn(move || event.write(1).unwrap());
    assert!(from_device.wait_for(level, PATIENCE).unwrap());
    device.join().unwrap();
    assert!(!fake.wait_for(level, Duration::from_millis(1)).unwrap(), "one signal is taken once");
}

#[test]
fn a_guest_without_a_script_halts_until_it_is_kicked_or_has_more_to_do() {
    let fake = Fake::new();
    let vm = fake.create(&spec()).unwrap();
    let mut vcpu = vm.create_vcpu(ZERO).unwrap();
    let kick = vcpu.kick();
    kick.kick();
    assert_eq!(vcpu.run(&Devices::default()).unwrap(), Exit::Kicked);
    let (answered, answers) = channel();
    let thread = std::thread::spawn(move || {
        answered.send(vcpu.run(&Devices::default()).unwrap()).unwrap();
        answered.send(vcpu.run(&Devices::default()).unwrap()).unwrap();
    });
    assert!(answers.try_recv().is_err());
    fake.script(ZERO, [Step::Reset, Step::WaitForKick]);
    assert_eq!(answers.recv_timeout(PATIENCE), Ok(Exit::Reset));
    kick.kick();
    assert_eq!(answers.recv_timeout(PATIENCE), Ok(Exit::Kicked));
    thread.join().unwrap();
    // A kick of what is gone is harmless.
    kick.kick();
}

#[test]
fn calls_are_logged_in_order_and_drops_too() {
    let fake = Fake::new();
    let vm = fake.create(&spec()).unwrap();
    let id = vm.memory().map(slot(0, 0x1000)).unwrap();
    let route = vm.irqs().msi().unwrap();
    let vcpu = vm.create_vcpu(VcpuId(1)).unwrap();
    assert_eq!(fake.live(), Live { vms: 1, vcpus: 1, slots: 1, routes: 1, doorbells: 0 });
    drop(vm);
    route.set(Some(MESSAGE)).unwrap();
    drop(vcpu);
    assert_eq!(fake.live().vms, 1, "the route still holds the VM");
    drop(route);
    assert_eq!(fake.live(), Live::default());
    let range = GpaRange { start: 0, len: 0x1000 };
    assert_eq!(
        fake.calls(),
        [
            Call::Create { kind: KindName::Standard, max_vcpus: 2, dirty_tracking: DirtyTracking::Bitmap },
            Call::Map { slot: id, range, readonly: false, log_dirty: false },
            Call::Msi(RouteId(0)),
            Call::CreateVcpu(VcpuId(1)),
            Call::SetMessage { route: RouteId(0), message: Some(MESSAGE) },
            Call::DropVcpu(VcpuId(1)),
            Call::DropRoute(RouteId(0)),
            Call::DropVm,
        ]
    );
}

#[test]
fn any_call_can_be_made_to_fail_once() {
    let fake = Fake::new();
    let busy = || Error::system("KVM_CREATE_VM", io::Error::from_raw_os_error(16));
    fake.fail_at(|call| matches!(call, Call::Create { .. }), busy());
    assert!(fake.create(&spec()).err().unwrap().to_string().contains("KVM_CREATE_VM"));
    let vm = fake.create(&spec()).unwrap();
    // The second slot.
    let mut maps = 0;
    let second = move |call: &Call| {
        maps += usize::from(matches!(call, Call::Map { .. }));
        maps == 2
    };
    fake.fail_at(second, busy());
    vm.memory().map(slot(0, 0x1000)).unwrap();
    assert!(vm.memory().map(slot(0x1000, 0x1000)).is_err());
    vm.memory().map(slot(0x1000, 0x1000)).unwrap();
    fake.fail_at(|call| *call == Call::Run(ZERO), busy());
    let mut vcpu = vm.create_vcpu(ZERO).unwrap();
    assert!(vcpu.run(&Devices::default()).is_err());
}

#[test]
fn state_is_what_the_vcpu_was_reset_or_restored_to() {
    let fake = Fake::new();
    let vm = fake.create(&spec()).unwrap();
    let mut vcpu = vm.create_vcpu(VcpuId(1)).unwrap();
    assert_eq!(vcpu.state().unwrap().save().unwrap().mp_state, MpState::Uninitialized);
    let regs = Registers { rip: 0x1234, ..Default::default() };
    let at = ResetState {
        cpuid: fake.caps().cpuid.clone(),
        msrs: vec![Msr { index: 0x10, value: 1 }],
        entry: Some(BootRegisters { regs, ..Default::default() }),
    };
    vcpu.reset(&at).unwrap();
    assert_eq!(fake.reset_of(VcpuId(1)), Some(at));
    let mut saved = vcpu.state().unwrap().save().unwrap();
    assert_eq!((saved.regs, saved.mp_state), (regs, MpState::Runnable));
    saved.regs.rip = 0x5678;
    let mut other = vm.create_vcpu(ZERO).unwrap();
    other.state().unwrap().restore(&saved).unwrap();
    assert_eq!(other.state().unwrap().save().unwrap(), saved);
    saved.version = 77;
    assert!(other.state().unwrap().restore(&saved).unwrap_err().to_string().contains("77"));
    vm.state().unwrap().set_clock(5).unwrap();
    assert_eq!(vm.state().unwrap().clock().unwrap(), 5);
}

#[test]
fn kinds_that_the_host_lacks_are_refused_and_others_are_as_they_are() {
    let plain = Fake::new();
    let tdx = VmSpec { kind: VmKind::Tdx(TdxSpec::default()), max_vcpus: 1, ..Default::default() };
    assert!(plain.create(&tdx).err().unwrap().to_string().contains("TDX"));
    for bad in [0, 255] {
        let spec = VmSpec { max_vcpus: bad, ..Default::default() };
        assert!(plain.create(&spec).err().unwrap().to_string().contains("1 to 254"));
    }
    assert!(plain.missing(KindName::Tdx).unwrap().contains("TDX") && plain.missing(KindName::Standard).is_none());
}

/// A host that can create trust domains, and one of them with a vCPU and 16 KiB of memory.
fn trust_domain() -> (Fake, Box<dyn Vm>, Box<dyn Vcpu>) {
    let host = Fake::with_caps(HostCaps { kinds: vec![KindName::Tdx], ..Fake::new().caps().clone() });
    let vm =
        host.create(&VmSpec { kind: VmKind::Tdx(TdxSpec::default()), max_vcpus: 2, ..Default::default() }).unwrap();
    vm.memory().map(slot(0, 0x4000)).unwrap();
    let vcpu = vm.create_vcpu(ZERO).unwrap();
    (host, vm, vcpu)
}

const PAGE: GpaRange = GpaRange { start: 0x1000, len: 0x1000 };

#[test]
fn a_trust_domain_is_launched_in_order_and_then_runs() {
    let (host, vm, mut vcpu) = trust_domain();
    assert!(vm.kind().private_memory && vm.state().is_none() && vcpu.state().is_none());
    vcpu.reset(&ResetState::default()).unwrap();
    let launch = vm.launch().unwrap();
    launch.begin(PAGE.start).unwrap();
    launch.add(PAGE, &[1; 5], true).unwrap();
    launch.finish().unwrap();
    assert_eq!(launch.changes(), []);
    let begun = host.calls().iter().position(|call| *call == Call::LaunchBegin { hand_off: 0x1000 }).unwrap();
    assert_eq!(host.calls()[begun + 1], Call::LaunchAdd { range: PAGE, bytes: 5, measured: true });
    host.script(
        ZERO,
        [
            Step::Convert { range: PAGE, to: Visibility::Shared },
            Step::Call(GuestCall::GetQuote { gpa: 0x2000, size: 0x1000 }),
            Step::MemoryFault { range: PAGE, want: Visibility::Private },
            Step::Shutdown,
        ],
    );
    /// A monitor that does what the guest wants.
    struct Converts<'a>(&'a dyn Vm);
    impl ExitHandler for Converts<'_> {
        fn pio_read(&self, _: u16, _: &mut [u8]) {}
        fn pio_write(&self, _: u16, _: &[u8]) {}
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
        fn end_of_interrupt(&self, _: u8) {}
        fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
            self.0.memory().convert(range, to).unwrap();
            assert_eq!(self.0.memory().is_shared(range), to == Visibility::Shared);
            Conversion::Done
        }
        fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
            assert_eq!(call, GuestCall::GetQuote { gpa: 0x2000, size: 0x1000 });
            GuestCallStatus::Retry
        }
    }
    assert_eq!(vcpu.run(&Converts(&*vm)).unwrap(), Exit::Shutdown);
    assert_eq!(
        host.answers(ZERO),
        [
            GuestAnswer::Conversion(Conversion::Done),
            GuestAnswer::Call(GuestCallStatus::Retry),
            GuestAnswer::Conversion(Conversion::Done),
        ]
    );
    assert_eq!(vm.memory().shared(), []);
}

#[test]
fn each_step_of_a_launch_out_of_order_is_refused() {
    let (_, vm, mut vcpu) = trust_domain();
    let launch = vm.launch().unwrap();
    let refused = |result: hal::Result<()>, why: &str| {
        let error = result.expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    refused(launch.add(PAGE, &[], false), "has not begun");
    refused(launch.finish(), "has not begun");
    refused(launch.begin(0), "has not been reset");
    refused(vcpu.run(&Devices::default()).map(|_| ()), "not sealed");
    refused(vcpu.reset(&ResetState { entry: Some(Default::default()), ..Default::default() }), "launch sets those");
    vcpu.reset(&ResetState::default()).unwrap();
    refused(vcpu.reset(&ResetState::default()), "a new VM");
    launch.begin(0).unwrap();
    refused(launch.begin(0), "begun already");
    refused(vm.create_vcpu(VcpuId(1)).map(|_| ()), "after the launch has begun");
    for (range, contents, why) in [
        (GpaRange { start: 0x800, len: 0x1000 }, 0, "whole pages"),
        (GpaRange { start: 0x1000, len: 0 }, 0, "whole pages"),
        (PAGE, 4097, "longer"),
        (GpaRange { start: 0x3000, len: 0x2000 }, 0, "private memory of one slot"),
    ] {
        refused(launch.add(range, &vec![0; contents], true), why);
    }
    vm.memory().convert(PAGE, Visibility::Shared).unwrap();
    refused(launch.add(PAGE, &[], true), "private memory of one slot");
    vm.memory().convert(PAGE, Visibility::Private).unwrap();
    launch.add(PAGE, &[], true).unwrap();
    refused(launch.add(PAGE, &[], true), "added already");
    launch.finish().unwrap();
    refused(launch.finish(), "sealed already");
    refused(launch.add(GpaRange { start: 0x2000, ..PAGE }, &[], true), "sealed");
    refused(vcpu.reset(&ResetState::default()), "a new VM");
}

#[test]
fn what_a_trust_domain_cannot_have_is_refused() {
    let (host, vm, _vcpu) = trust_domain();
    let kind = VmKind::Tdx(TdxSpec::default());
    let logged = VmSpec { kind, max_vcpus: 1, dirty_tracking: DirtyTracking::Bitmap };
    assert!(host.create(&logged).err().unwrap().to_string().contains("no log of written pages"));
    let readonly = vm.memory().map(Slot { readonly: true, ..slot(0x10_0000, 0x1000) });
    assert!(readonly.unwrap_err().to_string().contains("no read-only memory"));
    // A guest may say of addresses without memory that they are shared, and no more.
    let beyond = GpaRange { start: 0x3000, len: 0x3000 };
    vm.memory().convert(beyond, Visibility::Shared).unwrap();
    assert_eq!(vm.memory().shared(), [GpaRange { start: 0x3000, len: 0x1000 }]);
    assert!(vm.memory().convert(beyond, Visibility::Private).is_err());
    assert!(vm.memory().convert(GpaRange { start: 0x10, len: 0x1000 }, Visibility::Private).is_err());
    for ability in vm.kind().lacks {
        assert!(!ability.to_string().is_empty() && KindName::Standard.traits().has(*ability));
    }
}
