//! The machine on a scripted hypervisor: what it asks for and in which order, how a run ends, and that nothing is left
//! behind when the host fails at any call.

use std::fs;
use std::path::PathBuf;

use api::{BootUntil, DeviceConfig, Endpoint, OnPanic, OnReset, Outcome, TimeSpan, VmConfig};
use arch::layout;
use hal::fake::{Call, Fake, Live, Step};
use hal::{Error, Hypervisor, IoAddr, VcpuId};
use vmm::owner::Until;
use vmm::{Failure, Plan, Watching, carry_out_on};

mod guest;

use guest::elf;

struct Bench {
    folder: tempfile::TempDir,
    fake: Fake,
    config: VmConfig,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, elf()).unwrap();
        let mut config = VmConfig::new(kernel);
        config.serial = Some(Endpoint::File { path: folder.path().join("serial") });
        Self { folder, fake: Fake::new(), config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The boot processor does `steps`.
    fn script(&self, steps: impl IntoIterator<Item = Step>) {
        self.fake.script(VcpuId(0), steps);
    }

    fn run(&self) -> Result<Outcome, Failure> {
        self.run_watched(Watching::default())
    }

    fn run_watched(&self, watching: Watching) -> Result<Outcome, Failure> {
        let hypervisor: Box<dyn Hypervisor> = Box::new(self.fake.clone());
        let (config, until) = (Some(self.config.clone()), Until::VmEnds);
        let outcome =
            carry_out_on(Ok(hypervisor), Plan { config, boot: true, api: None, pid_file: None, watching, until });
        assert_eq!(self.fake.live(), Live::default(), "something is left behind");
        outcome.map(|outcome| outcome.expect("a VM that booted has an outcome"))
    }
}

fn out(port: u16, byte: u8) -> Step {
    Step::Write { at: IoAddr::Pio(port), data: vec![byte] }
}

fn power_off() -> Step {
    out(layout::ACPI_SLEEP_CONTROL_PORT, layout::ACPI_SLEEP_CONTROL_S5)
}

#[test]
fn a_guest_writes_to_its_serial_port_and_powers_off() {
    let bench = Bench::new();
    bench.script(b"hello".iter().map(|byte| out(layout::COM1_PORT, *byte)).chain([power_off()]));
    assert_eq!(bench.run().unwrap(), Outcome::PoweredOff);
    assert_eq!(fs::read(bench.path("serial")).unwrap(), b"hello");
}

#[test]
fn memory_comes_before_vcpus_and_every_vcpu_is_reset_before_any_runs() {
    let mut bench = Bench::new();
    bench.config.cpus.count = 3;
    bench.script([power_off()]);
    bench.run().unwrap();
    let calls = bench.fake.calls();
    let first = |wanted: &dyn Fn(&Call) -> bool| calls.iter().position(wanted).expect("the call was made");
    let last = |wanted: &dyn Fn(&Call) -> bool| calls.iter().rposition(wanted).expect("the call was made");
    assert_eq!(first(&|call| matches!(call, Call::Create { .. })), 0);
    assert!(last(&|call| matches!(call, Call::Map { .. })) < first(&|call| matches!(call, Call::CreateVcpu(_))));
    assert!(last(&|call| matches!(call, Call::Reset(_))) < first(&|call| matches!(call, Call::Run(_))));
    let entries: Vec<bool> = (0..3).map(|id| bench.fake.reset_of(VcpuId(id)).unwrap().entry.is_some()).collect();
    assert_eq!(entries, [true, false, false], "only the boot processor has an entry point");
}

#[test]
fn a_reset_makes_the_machine_anew_or_ends_the_run() {
    let mut bench = Bench::new();
    let reset = || out(layout::ACPI_RESET_PORT, layout::ACPI_RESET_VALUE);
    // A guest goes on for a moment after it has written the register, as one that waits for its reset does.
    let boot = |byte| [out(layout::COM1_PORT, byte), reset(), Step::WaitForKick];
    bench.script(boot(b'1').into_iter().chain(boot(b'2')).chain([out(layout::COM1_PORT, b'3'), power_off()]));
    assert_eq!(bench.run().unwrap(), Outcome::PoweredOff);
    assert_eq!(fs::read(bench.path("serial")).unwrap(), b"123");
    let created = bench.fake.calls().iter().filter(|call| matches!(call, Call::Create { .. })).count();
    assert_eq!(created, 3);

    bench.config.lifecycle.on_reset = OnReset::Exit;
    bench.script([reset()]);
    assert_eq!(bench.run().unwrap(), Outcome::Reset);
}

#[test]
fn a_panic_is_an_outcome_unless_it_is_to_be_ignored() {
    let mut bench = Bench::new();
    bench.script([out(layout::PVPANIC_PORT, 1), Step::WaitForKick]);
    assert_eq!(bench.run().unwrap(), Outcome::Panicked);
    bench.config.lifecycle.on_panic = OnPanic::Ignore;
    bench.script([out(layout::PVPANIC_PORT, 1), power_off()]);
    assert_eq!(bench.run().unwrap(), Outcome::PoweredOff);
}

#[test]
fn what_ends_a_vcpu_ends_the_run_with_a_reason() {
    let bench = Bench::new();
    let ends = [
        (Step::Shutdown, "a triple fault"),
        (Step::Crash("it broke".into()), "it broke"),
        (Step::Debug, "a debug exit that nobody armed"),
    ];
    for (step, expected) in ends {
        bench.script([step]);
        match bench.run().unwrap() {
            Outcome::Crashed { reason } => assert!(reason.contains(expected), "{reason}"),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn unclaimed_addresses_read_as_ones_and_ignore_writes() {
    let bench = Bench::new();
    let gpa = layout::MMIO32.start + 0x123;
    bench.script([
        Step::pio_read(0x71, 1),
        Step::Read { at: IoAddr::Mmio(gpa), size: 8 },
        Step::Write { at: IoAddr::Mmio(gpa), data: vec![1; 8] },
        out(0x64, 0xfe),
        power_off(),
    ]);
    assert_eq!(bench.run().unwrap(), Outcome::PoweredOff);
    for read in bench.fake.reads(VcpuId(0)) {
        assert!(read.data.iter().all(|byte| *byte == 0xff), "{read:?}");
    }
}

/// The report of a watched run.
fn report(bench: &Bench, expected: &Outcome) -> serde_json::Value {
    let path = bench.path("boot.json");
    assert_eq!(bench.run_watched(Watching { boot_trace: Some(path.clone()) }).unwrap(), *expected);
    assert!(fs::read_to_string(path.with_extension("svg")).unwrap().ends_with("</svg>\n"));
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn a_boot_trace_ends_at_user_space_or_with_the_machine() {
    let bench = Bench::new();
    let marker = out(layout::BOOT_MARKER_PORT, 1);
    let reads = |count| (0..count).map(|_| Step::pio_read(0x71, 1));
    bench.script([out(layout::COM1_PORT, b'x')].into_iter().chain(reads(3)).chain([marker]).chain(reads(5)));
    bench.script([power_off()]);
    let told = report(&bench, &Outcome::PoweredOff);
    assert_eq!((&told["user_space"], &told["guest"]["exits"]), (&true.into(), &5.into()), "{told:#}");
    assert_eq!(told["guest"]["hypervisor"]["exits"], 5);

    // Resets before it: the trace is of the first boot alone.
    let reset = || out(layout::ACPI_RESET_PORT, layout::ACPI_RESET_VALUE);
    bench.script(reads(2).chain([reset(), Step::WaitForKick]).chain(reads(7)).chain([power_off()]));
    let told = report(&bench, &Outcome::PoweredOff);
    assert_eq!((&told["user_space"], &told["guest"]["by_reason"]["pio-read"]), (&false.into(), &2.into()), "{told:#}");
}

#[test]
fn a_boot_that_takes_too_long_ends_the_run_and_so_does_one_after_a_reset() {
    let mut bench = Bench::new();
    bench.config.cpus.count = 3;
    bench.config.lifecycle.boot_timeout = Some(TimeSpan::from_millis(300));
    let Outcome::BootTimeout { reason } = bench.run().unwrap() else { panic!("it must not come up") };
    assert!(reason.contains("touched no device; last milestone: first-entry"), "{reason}");
    let saved = bench.fake.calls().iter().filter(|call| matches!(call, Call::Save(_))).count();
    assert!(saved >= 6, "each of three vCPUs is looked at, twice at the end: {saved}");

    bench.config.lifecycle.boot_until = BootUntil::Told;
    // Long enough for a machine that is busy with other things.
    bench.config.lifecycle.boot_timeout = Some(TimeSpan::from_millis(2000));
    let reset = out(layout::ACPI_RESET_PORT, layout::ACPI_RESET_VALUE);
    bench.script([out(layout::BOOT_MARKER_PORT, 1), reset, Step::WaitForKick, out(layout::COM1_PORT, b'2')]);
    let Outcome::BootTimeout { reason } = bench.run().unwrap() else { panic!("the second must not come up") };
    assert!(reason.contains("last milestone: first-output serial"), "{reason}");
}

#[test]
fn a_hypervisor_that_fails_at_any_call_leaves_nothing_behind() {
    for boot_timeout in [None, Some(TimeSpan::from_millis(60_000))] {
        nothing_is_left_behind(boot_timeout);
    }
}

fn nothing_is_left_behind(boot_timeout: Option<TimeSpan>) {
    let mut bench = Bench::new();
    bench.config.lifecycle.boot_timeout = boot_timeout;
    let disk = bench.path("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    bench.config.devices = vec![DeviceConfig::Disk(api::Disk::new(disk)), DeviceConfig::Rng(api::Rng::default())];
    bench.config.cpus.count = 2;
    bench.script([power_off()]);
    bench.run().unwrap();
    let calls = bench.fake.calls();
    let until_run = calls.iter().position(|call| matches!(call, Call::Run(_))).expect("it ran");
    for (number, call) in calls.iter().enumerate().take(until_run) {
        let mut before = number;
        let error = Error::Invalid { what: "test", problem: format!("call {number} was to fail") };
        let this_one = move |_: &Call| before.checked_sub(1).inspect(|left| before = *left).is_none();
        bench.fake.fail_at(this_one, error);
        let failure = bench.run().expect_err("the failure must be told").to_string();
        assert!(failure.contains("was to fail"), "{call:?}: {failure}");
    }
}

#[test]
fn bad_input_is_told_before_anything_is_touched() {
    let mut bench = Bench::new();
    bench.config.kernel.path = bench.path("missing");
    bench.config.cpus.count = 300;
    bench.config.devices = vec![DeviceConfig::Disk(api::Disk::new(bench.path("no-disk")))];
    let Err(Failure::BadInput(problems)) = bench.run() else { panic!("it must be refused") };
    let fields: Vec<&str> = problems.0.iter().map(|problem| problem.field.as_str()).collect();
    assert_eq!(fields, ["cpus.count", "kernel.path", "devices[0].path"]);
    assert_eq!(bench.fake.calls(), []);
    assert!(!bench.path("serial").exists(), "the serial port's file was made");
}

#[test]
fn a_file_that_is_no_kernel_is_told_before_anything_appears() {
    let bench = Bench::new();
    fs::write(bench.path("kernel"), b"#!/bin/sh\n").unwrap();
    let Err(Failure::BadInput(problems)) = bench.run() else { panic!("it must be refused") };
    assert!(problems.to_string().contains("neither a bzImage nor an ELF"), "{problems}");
    assert_eq!(bench.fake.calls(), []);
    assert!(!bench.path("serial").exists());
}

#[test]
fn a_kind_that_the_host_lacks_is_one_clear_error() {
    let mut bench = Bench::new();
    bench.config.confidential = Some(api::Confidential::Snp {});
    let Err(Failure::BadInput(problems)) = bench.run() else { panic!("it must be refused") };
    assert!(problems.to_string().contains("«snp»"), "{problems}");
}
