//! The launch of trust domains by Halyard's own code, behind the recorder that a real QEMU ran behind (tests/recorder): what
//! both ask of KVM, and what they answer.
#![expect(unsafe_code, reason = "the recorder takes the C library's place")]

#[path = "../../tests/recorder/src/lib.rs"]
#[expect(clippy::undocumented_unsafe_blocks, reason = "it says once for a function what holds for each of its blocks")]
mod recorder;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use arch::tdx::LaunchPlan;
use arch::{CpuidTable, Topology, layout};
use hal::kvm::Kvm;
use hal::{
    Conversion, Error, Exit, ExitHandler, GpaRange, GuestCall, GuestCallStatus, Hypervisor, KindName, ResetState, Slot,
    TdxSpec, Vcpu, VcpuId, Visibility, Vm, VmKind, VmSpec,
};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

const QEMU: &str = include_str!("../../tests/recorder/qemu.txt");
const EXITS: &str = include_str!("../../tests/recorder/exits.txt");
const FOUR_GIB: u64 = 4 << 30;

/// The recorder is one for all threads.
static RECORDER: Mutex<()> = Mutex::new(());

/// Firmware and KVM, or `None` with the reason printed where a machine has no KVM.
fn host() -> Option<(Vec<u8>, Kvm)> {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(reason @ (Error::NoHypervisor { .. } | Error::NotPermitted { .. } | Error::Unusable { .. })) => {
            eprintln!("skipped: {reason}");
            return None;
        }
        Err(other) => panic!("{other}"),
    };
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let cache = folder("HALYARD_CACHE")
        .or_else(|| folder("XDG_CACHE_HOME").map(|folder| folder.join("halyard")))
        .unwrap_or_else(|| folder("HOME").unwrap().join(".cache/halyard"));
    let path = cache.join("firmware/OVMF.inteltdx.ms.fd");
    Some((
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}: scripts/install unpacks it", path.display())),
        kvm,
    ))
}

/// A trust domain that is launched, and what was written down of that.
struct Launched {
    vm: Box<dyn Vm>,
    vcpus: Vec<Box<dyn Vcpu>>,
    ram: Arc<GuestRegionMmap>,
    log: tempfile::NamedTempFile,
    calls: u64,
}

/// The parts of a trust domain with this much memory, before its launch, and the plan for that.
type Parts<'a> = (Box<dyn Vm>, Vec<Box<dyn Vcpu>>, Vec<Slot>, LaunchPlan<'a>);

fn prepare<'a>(firmware: &'a [u8], kvm: &Kvm, gib: u64, vcpus: u32) -> Parts<'a> {
    let ram = layout::ram_ranges(gib << 30);
    let plan = LaunchPlan::from_firmware(firmware, &ram).unwrap();
    let topology = Topology::flat(vcpus).unwrap();
    let cpuid = CpuidTable::new(kvm.caps(), None, topology);
    let spec = TdxSpec { cpuid: cpuid.for_vcpu(VcpuId(0)), ..Default::default() };
    let vm = kvm.create(&VmSpec { kind: VmKind::Tdx(spec), max_vcpus: vcpus, ..Default::default() }).unwrap();
    let vcpus = topology.vcpu_ids().into_iter().map(|id| {
        let mut vcpu = vm.create_vcpu(id).unwrap();
        vcpu.reset(&ResetState { cpuid: cpuid.for_vcpu(id), ..Default::default() }).unwrap();
        vcpu
    });
    let vcpus = vcpus.collect();
    // Firmware is memory that ends at 4 GiB.
    let len = firmware.len() as u64;
    let slots = ram.into_iter().chain([GpaRange { start: FOUR_GIB - len, len }]).map(slot);
    let slots = slots.inspect(|slot| _ = vm.memory().map(slot.clone()).unwrap()).collect();
    (vm, vcpus, slots, plan)
}

impl Launched {
    fn new(firmware: &[u8], kvm: &Kvm, gib: u64, vcpus: u32) -> Self {
        let log = tempfile::NamedTempFile::new().unwrap();
        recorder::log::to(Some(log.reopen().unwrap()));
        let (vm, vcpus, slots, plan) = prepare(firmware, kvm, gib, vcpus);
        let launch = vm.launch().unwrap();
        launch.begin(plan.hand_off).unwrap();
        plan.regions.iter().for_each(|region| launch.add(region.memory, &region.contents, region.measured).unwrap());
        launch.finish().unwrap();
        Self { vm, vcpus, ram: slots[0].region.clone(), log, calls: recorder::log::calls() }
    }

    /// The lines of the recorder, without leaves of CPUID, and without what the machine says of numbers in them.
    fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(self.log.path()).unwrap();
        let machines = |word: &&str| ["entries=", "xfam=", "room="].iter().all(|start| !word.starts_with(start));
        let lines = text.lines().filter(|line| !line.starts_with("  cpuid "));
        let nothing = format!("={}", "0".repeat(96));
        lines
            .map(|line| line.split(' ').filter(machines).collect::<Vec<_>>().join(" ").replace(&nothing, "=0"))
            .collect()
    }

    /// Runs the first vCPU as a script says, until it shuts down or crashes. What came after the launch is given.
    fn run(&mut self, script: &str) -> (Exit, Vec<String>) {
        let before = self.lines().len();
        recorder::exits::script(script);
        let (vm, vcpu) = (&*self.vm, &mut self.vcpus[0]);
        let exit = vcpu.run(&Converts(vm)).unwrap();
        (exit, self.lines().split_off(before))
    }
}

fn slot(range: GpaRange) -> Slot {
    let mapping = MmapRegion::new(usize::try_from(range.len).unwrap()).unwrap();
    Slot::new(Arc::new(GuestRegionMmap::new(mapping, GuestAddress(range.start)).unwrap()))
}

/// Converts memory as the guest wants it, and knows no quotes.
struct Converts<'a>(&'a dyn Vm);

impl ExitHandler for Converts<'_> {
    fn pio_read(&self, _: u16, _: &mut [u8]) {}
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: u64, _: &[u8]) {}
    fn end_of_interrupt(&self, _: u8) {}

    fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        match self.0.memory().convert(range, to) {
            Ok(()) => Conversion::Done,
            Err(Error::Invalid { .. }) => Conversion::Invalid,
            Err(other) => panic!("{other}"),
        }
    }

    fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
        match call {
            GuestCall::SetupEventNotify { vector: 32..=255, .. } => GuestCallStatus::Success,
            GuestCall::SetupEventNotify { .. } => GuestCallStatus::InvalidOperand,
            GuestCall::GetQuote { .. } => GuestCallStatus::Unsupported,
        }
    }
}

/// What QEMU asks for once more than Halyard does: KVM does as much without (a time stamp counter as the host's, the exits
/// that are there already), or the TDX module has its own value (the version of microcode).
fn needless(line: &str, seen: &mut BTreeSet<String>) -> bool {
    line == "SET_TSC_KHZ khz=0"
        || line.starts_with("SET_MSRS ")
        || line.starts_with("ENABLE_CAP cap=201 ") && !seen.insert(line.to_owned())
}

#[test]
fn a_launch_asks_of_kvm_what_a_real_qemu_asks() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    let recorded = QEMU.split("-- ").next().unwrap();
    for launch in recorded.split("== ").skip(1) {
        let (title, lines) = launch.trim_end().split_once('\n').unwrap();
        let (gib, vcpus) = title.split_once("G ").unwrap();
        let (gib, vcpus) = (gib.parse().unwrap(), vcpus.parse().unwrap());
        let launched = Launched::new(&firmware, &kvm, gib, vcpus);

        // A guest_memfd is asked for at another time: QEMU has one for all RAM, Halyard one for each slot.
        let mut seen = BTreeSet::new();
        let not_files = |line: &&str| !line.starts_with("CREATE_GUEST_MEMFD ") && *line != "KVM_RUN";
        let qemu: Vec<&str> = lines.lines().filter(not_files).filter(|line| !needless(line, &mut seen)).collect();
        let own = launched.lines();
        let own_calls: Vec<&str> = own.iter().map(String::as_str).filter(not_files).collect();
        let size = |line: &str| u64::from_str_radix(line.split("size=0x").nth(1)?.split(' ').next()?, 16).ok();
        let files = own.iter().filter(|line| line.starts_with("CREATE_GUEST_MEMFD "));
        assert_eq!(files.filter_map(|line| size(line)).sum::<u64>(), (gib << 30) + firmware.len() as u64, "{title}");

        // From 3 GiB on RAM is split elsewhere, which its slots and the hand-off blocks tell.
        let comparable = |line: &&&str| {
            let told = line.contains("start=0x0 ") || line.contains("start=0x100000000 ");
            gib == 2 || !(told || line.starts_with("  hob ") || line.contains("start=0x809000 "))
        };
        let compared = |lines: &[&str]| {
            let lines = lines.iter().filter(comparable);
            lines.map(|line| if gib == 2 { (*line).to_owned() } else { line.replace(" slot=2", " slot=1") }).collect()
        };
        let (qemu, own_calls): (Vec<String>, Vec<String>) = (compared(&qemu), compared(&own_calls));
        assert_eq!(own_calls, qemu, "{title}");

        // QEMU's calls of KVM until its first run, of whatever kind, where these lines were recorded.
        let qemus = match vcpus {
            1 => 154,
            2 => 190,
            _ => 406,
        };
        println!("{title}: {} calls of KVM, and {qemus} of QEMU's", launched.calls);
        assert!(launched.calls < qemus, "{title}");
    }
}

#[test]
fn exits_are_answered_as_a_real_qemu_answers_them() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    let mut launched = Launched::new(&firmware, &kvm, 2, 1);
    let (exit, own) = launched.run(&EXITS.replace("end", "shutdown"));
    assert_eq!(exit, Exit::Shutdown);
    let qemu: Vec<&str> =
        QEMU.split_once("-- exits").unwrap().1.lines().skip(1).filter(|line| *line != "end").collect();
    assert_eq!(own.strip_suffix(&["shutdown".to_owned()]).unwrap(), qemu);
    // What was shared page by page is one range.
    let shared = [(0x10_1000, 0x1_f000), (0xffc0_0000, 0x1000)].map(|(start, len)| GpaRange { start, len });
    assert_eq!(launched.vm.memory().shared(), shared);
    assert!(launched.vm.memory().is_shared(GpaRange { start: 0x10_8000, len: 0x1_0000 }));
    assert!(!launched.vm.memory().is_shared(GpaRange { start: 0x10_0000, len: 0x2000 }));
}

/// Where QEMU stops its guest for good.
#[test]
fn what_a_guest_should_not_want_is_refused_to_it_and_its_own_end_is_told() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    let mut launched = Launched::new(&firmware, &kvm, 2, 1);
    let (exit, lines) = launched.run(
        "map fec00000 1 private\nmap 7ffff000 2 private\nmap 7ffff000 2 shared\nmap 7ffff000 1 private\n\
         map fffffffffffff000 2 private\nmap 1000 fffffffffffff 2 shared\nfault fec00000 1000 private",
    );
    let range = GpaRange { start: 0xfec0_0000, len: 0x1000 };
    assert_eq!(exit, Exit::MemoryFault { range, want: Visibility::Private });
    let answers: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("  answered ")).collect();
    assert_eq!(answers, ["22", "22", "0", "0", "22", "22"]);
    assert_eq!(launched.vm.memory().shared(), []);
    let (exit, _) = launched.run("poison 200000 1000 private");
    assert!(matches!(exit, Exit::Crash(info) if info.reason.contains("broken on the host")));
    let (exit, _) = launched.run("fatal 1=8 3=2121706d65706f c=8000000000010000 d=7000");
    let Exit::Crash(info) = exit else { panic!("{exit:?}") };
    assert_eq!(
        info.to_string(),
        "the guest reported a fatal error of its own, code 0x10000, about the address 0x7000: \"opemp!!\""
    );
    // No call for registers that a trust domain does not have.
    assert!(launched.lines().iter().all(|line| !line.contains("registers")));
    assert!(launched.vcpus[0].state().is_none() && launched.vm.state().is_none());
}

/// The guest_memfds of this process, which the recorder makes of plain files.
fn private_files() -> Vec<File> {
    let links = fs::read_dir("/proc/self/fd").unwrap().map(|entry| entry.unwrap().path());
    let private = links.filter(|path| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().contains("guest_memfd")));
    private.map(|path| File::options().read(true).write(true).open(path).unwrap()).collect()
}

#[test]
fn the_copy_that_is_not_seen_any_more_is_given_back() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    let mut launched = Launched::new(&firmware, &kvm, 2, 1);
    let ram = private_files().into_iter().find(|file| file.metadata().unwrap().len() == 2 << 30).unwrap();
    let (at, other) = (0x10_0000, 0x10_1000);
    let private = |offset| {
        let mut byte = [0];
        ram.read_exact_at(&mut byte, offset).unwrap();
        byte[0]
    };
    [at, other].iter().for_each(|offset| ram.write_all_at(&[1], *offset).unwrap());
    launched.run("map 100000 1 shared\nshutdown");
    assert_eq!((private(at), private(other)), (0, 1));
    let shared = |launched: &Launched, at| launched.ram.read_obj::<u8>(MemoryRegionAddress(at)).unwrap();
    [at, other].iter().for_each(|at| launched.ram.write_obj(2_u8, MemoryRegionAddress(*at)).unwrap());
    launched.run("map 100000 1 private\nshutdown");
    assert_eq!((shared(&launched, at), shared(&launched, other)), (0, 2));
}

#[test]
fn a_trust_domain_lets_go_of_all_it_has() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    let launched = Launched::new(&firmware, &kvm, 4, 2);
    assert_eq!(private_files().len(), 3);
    assert!(kvm.missing(KindName::Tdx).is_none());
    assert!(launched.vm.create_vcpu(VcpuId(0)).err().unwrap().to_string().contains("after the launch has begun"));
    drop(launched);
    assert_eq!(private_files().len(), 0);
}

#[test]
fn each_step_of_a_launch_out_of_order_is_refused() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    let log = tempfile::NamedTempFile::new().unwrap();
    recorder::log::to(Some(log.reopen().unwrap()));
    let (vm, mut vcpus, _, plan) = prepare(&firmware, &kvm, 2, 1);
    let launch = vm.launch().unwrap();
    let refused = |result: hal::Result<()>, why: &str| {
        let error = result.expect_err(why).to_string();
        assert!(error.contains(why), "{error}");
    };
    let page = GpaRange { start: 0x10_0000, len: 0x1000 };
    refused(launch.add(page, &[], false), "has not begun");
    refused(launch.finish(), "has not begun");
    refused(vcpus[0].run(&Converts(&*vm)).map(|_| ()), "not sealed");
    refused(vcpus[0].reset(&ResetState::default()), "a new VM");
    refused(vcpus[0].reset(&ResetState { entry: Some(Default::default()), ..Default::default() }), "TDX module sets");
    refused(
        vm.memory().map(Slot { readonly: true, ..slot(GpaRange { start: 1 << 40, ..page }) }).map(|_| ()),
        "read-only",
    );
    refused(
        vm.memory().map(Slot { log_dirty: true, ..slot(GpaRange { start: 1 << 40, ..page }) }).map(|_| ()),
        "dirty",
    );
    refused(vm.create_vcpu(VcpuId(1)).map(|_| ()), "there are 0 to 0");
    launch.begin(plan.hand_off).unwrap();
    refused(launch.begin(plan.hand_off), "begun already");
    refused(vm.create_vcpu(VcpuId(0)).map(|_| ()), "after the launch has begun");
    for (range, contents, why) in [
        (GpaRange { start: page.start + 8, ..page }, 0, "whole pages"),
        (GpaRange { len: 0, ..page }, 0, "whole pages"),
        (page, 4097, "longer"),
        (GpaRange { start: 0xfec0_0000, ..page }, 0, "private memory of one slot"),
        (GpaRange { start: (2 << 30) - 0x1000, len: 0x2000 }, 0, "private memory of one slot"),
    ] {
        refused(launch.add(range, &vec![0; contents], true), why);
    }
    vm.memory().convert(page, Visibility::Shared).unwrap();
    refused(launch.add(page, &[], true), "private memory of one slot");
    launch.finish().unwrap();
    refused(launch.finish(), "sealed already");
    refused(launch.add(GpaRange { start: 0x20_0000, ..page }, &[], true), "sealed");
    // Nothing of this reached the kernel to be refused there.
    assert!(!fs::read_to_string(log.path()).unwrap().contains("refused"));
    for spec in [
        VmSpec { dirty_tracking: hal::DirtyTracking::Bitmap, max_vcpus: 1, kind: VmKind::Tdx(TdxSpec::default()) },
        VmSpec { max_vcpus: 0, kind: VmKind::Tdx(TdxSpec::default()), ..Default::default() },
        VmSpec {
            max_vcpus: 1,
            kind: VmKind::Tdx(TdxSpec { attributes: 1, ..Default::default() }),
            ..Default::default()
        },
    ] {
        assert!(matches!(kvm.create(&spec), Err(Error::Unsupported(_))), "{spec:?}");
    }
}

/// A guest that shares every second page makes the monitor remember as many pieces as that.
#[test]
fn memory_is_shared_in_so_many_pieces_and_no_more() {
    let _alone = RECORDER.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((firmware, kvm)) = host() else { return };
    recorder::log::to(None);
    let (vm, _vcpus, _, _) = prepare(&firmware, &kvm, 2, 1);
    let page = |number: u64| GpaRange { start: number * 0x2000, len: 0x1000 };
    (0..65_536).for_each(|number| vm.memory().convert(page(number), Visibility::Shared).unwrap());
    assert!(vm.memory().convert(page(65_536), Visibility::Shared).unwrap_err().to_string().contains("too many pieces"));
    vm.memory().convert(page(7), Visibility::Private).unwrap();
    vm.memory().convert(page(65_536), Visibility::Shared).unwrap();
}
