//! Tiny guests in Halyard on this machine's own KVM: the platform, interrupts, PCI, virtio queues and many processors.

use std::fs;
use std::io::Write;
use std::time::Duration;

use halyard_tests::tiny::{Run, Running, Tiny, debug_exit, guest};
use nix::sys::signal::Signal;
use tempfile::{NamedTempFile, TempDir};

/// Exit codes of `halyard run`.
const POWERED_OFF: i32 = 0;
const RESET: i32 = 3;
const PANICKED: i32 = 4;
const CRASHED: i32 = 5;

/// Starts a test on a guest, or ends it where there is no KVM.
macro_rules! tiny {
    ($name:expr) => {
        match Tiny::new($name) {
            Some(guest) => guest.args(["--memory", "64M"]),
            None => return,
        }
    };
}

/// The run of a guest that ended as it should, with `EXIT 0`.
#[track_caller]
fn success(run: Run) -> Run {
    run.expect_code(debug_exit(0))
}

/// The hexadecimal numbers in the line that begins with `label`, without the words between them.
#[track_caller]
fn numbers(run: &Run, label: &str) -> Vec<u64> {
    let output = run.output();
    let line = output.lines().find_map(|line| line.strip_prefix(label));
    let line = line.unwrap_or_else(|| panic!("no line begins with {label:?}\n{run}"));
    // Numbers have at least eight digits, so that no word is one.
    line.split_whitespace()
        .filter(|word| word.len() >= 8)
        .filter_map(|word| u64::from_str_radix(word, 16).ok())
        .collect()
}

#[test]
fn the_first_byte_arrives() {
    let run = success(tiny!("first-byte").run());
    assert_eq!(run.output(), "H");
}

#[test]
fn the_exit_code_carries_the_guests_number_and_a_failed_guest_says_why() {
    let run = tiny!("exception").run().expect_code(debug_exit(31));
    assert!(run.output().starts_with("before\nFAILED: exception 00000006 error 00000000 at 0010"), "{run}");
}

#[test]
fn pvh_hands_over_command_line_memory_map_initramfs_and_acpi() {
    let mut initramfs = NamedTempFile::new().unwrap();
    initramfs.write_all(b"070701 and more").unwrap();
    let initramfs = initramfs.path().to_str().unwrap();
    let run = success(tiny!("start-info").cmdline("one  two=3 \u{e4}").args(["--initramfs", initramfs]).run());
    let output = run.output();
    assert!(output.contains("magic 336ec578 version 00000001\ncmdline one  two=3 \u{e4}\n"), "{run}");
    assert_eq!(numbers(&run, "initramfs"), [15, u64::from(u32::from_le_bytes(*b"0707"))]);
    assert_eq!(
        numbers(&run, "acpi"),
        [u64::from(u32::from_le_bytes(*b"RSD ")) << 32 | u64::from(u32::from_le_bytes(*b"PTR "))]
    );

    // Base, length, type: all RAM (type 1) is within 64 MiB, and most of it is there.
    let entries = output.lines().filter_map(|line| line.strip_prefix("memory "));
    let entries: Vec<Vec<u64>> =
        entries.map(|line| line.split(' ').map(|word| u64::from_str_radix(word, 16).unwrap()).collect()).collect();
    let ram: Vec<_> = entries.iter().filter(|entry| entry[2] == 1).collect();
    assert!(ram.iter().all(|entry| entry[0] + entry[1] <= 64 << 20), "{run}");
    assert!(ram.iter().map(|entry| entry[1]).sum::<u64>() > 63 << 20, "{run}");
    assert!(entries.iter().any(|entry| entry[0] == 0xe000_0000 && entry[2] == 2), "ECAM is reserved\n{run}");
}

#[test]
fn an_elf_without_a_pvh_note_enters_in_long_mode() {
    assert_eq!(success(tiny!("long-mode").run()).output(), "long mode\n");
}

#[test]
fn a_halted_processor_is_woken_by_its_timer() {
    let run = success(tiny!("timer").run());
    assert_eq!(run.output(), "awake after 00000001 ticks\nawake after 00000002 ticks\nawake after 00000003 ticks\n");
}

/// Sends text by pieces, each when the one before it has come back; then much at once.
fn echoes(guest: &Tiny, mode: &str) {
    let mut running = guest.clone().cmdline(mode).start();
    running.wait_for(&format!("{mode}\n"));
    for text in
        ["a", "hello", "\u{1}\0\u{7f}", "more than the sixteen bytes that its buffer could take on real hardware"]
    {
        running.send(text.as_bytes());
        running.wait_for(text);
    }
    let long: String = (0..2000).map(|number| format!("{number} ")).collect();
    running.send(long.as_bytes());
    running.wait_for(&long);
    running.send(b"q");
    success(running.finish());
}

#[test]
fn serial_input_is_read_by_polling() {
    echoes(&tiny!("echo"), "polled");
}

#[test]
fn serial_input_interrupts_through_the_io_apic() {
    echoes(&tiny!("echo"), "interrupt");
}

#[test]
fn a_string_instruction_writes_thousands_of_bytes() {
    let run = success(tiny!("string-io").run());
    let expected: String = ('a'..='z').cycle().take(5000).collect();
    assert_eq!(run.output(), format!("{expected}\nffffffff\n"));
}

#[test]
fn ports_and_addresses_that_belong_to_no_one_read_all_ones() {
    let run = success(tiny!("holes").run());
    let widths = "000000ff 0000ffff ffffffff\n";
    assert_eq!(run.output(), format!("{widths}{widths}ffffffff\n"));
}

/// Starts the guest that does as it is told, and waits until it listens.
fn commanded(guest: &Tiny) -> Running {
    let mut running = guest.start();
    running.wait_for("ready\n");
    running
}

/// Tells the guest one thing, and returns how the run ended.
fn told(guest: &Tiny, command: &[u8]) -> Run {
    let mut running = commanded(guest);
    running.send(command);
    running.finish()
}

#[test]
fn power_off_ends_the_run_with_0() {
    told(&tiny!("commands"), b"o").expect_code(POWERED_OFF);
}

#[test]
fn the_debug_exit_port_ends_the_run_with_64_and_more() {
    told(&tiny!("commands"), b"q").expect_code(debug_exit(7));
}

#[test]
fn a_reset_ends_the_run_with_3_where_asked_for() {
    told(&tiny!("commands").args(["--on-reset", "exit"]), b"r").expect_code(RESET);
}

#[test]
fn a_reset_boots_the_guest_again_and_again() {
    let mut running = commanded(&tiny!("commands"));
    for _ in 0..5 {
        running.send(b"r");
        running.wait_for("ready\n");
    }
    running.send(b"q");
    let run = running.finish().expect_code(debug_exit(7));
    assert_eq!(run.output().matches("ready").count(), 6, "{run}");
}

#[test]
fn input_that_waits_at_a_reset_is_not_lost_to_the_next_boot() {
    let mut running = commanded(&tiny!("commands"));
    running.send(b"r");
    running.wait_for("ready\n");
    running.send(b"x");
    running.wait_for("what?\n");
    running.send(b"q");
    running.finish().expect_code(debug_exit(7));
}

#[test]
fn a_panic_ends_the_run_with_4() {
    told(&tiny!("commands"), b"p").expect_code(PANICKED);
}

#[test]
fn a_panic_is_ignored_where_asked_for() {
    let mut running = commanded(&tiny!("commands").args(["--on-panic", "ignore"]));
    running.send(b"p");
    running.wait_for("after the panic\n");
    running.send(b"q");
    running.finish().expect_code(debug_exit(7));
}

#[test]
fn a_panic_boots_the_guest_again_where_asked_for() {
    let mut running = commanded(&tiny!("commands").args(["--on-panic", "restart"]));
    running.send(b"p");
    running.wait_for("ready\n");
    running.send(b"q");
    running.finish().expect_code(debug_exit(7));
}

#[test]
fn a_crash_kernel_is_left_to_its_work() {
    let mut running = commanded(&tiny!("commands"));
    running.send(b"c");
    running.wait_for("crash kernel\n");
    running.send(b"q");
    running.finish().expect_code(debug_exit(7));
}

#[test]
fn without_a_panic_device_its_port_belongs_to_no_one() {
    let mut running = commanded(&tiny!("commands").args(["--pvpanic", "off"]));
    running.send(b"p");
    running.wait_for("after the panic\n");
    running.send(b"q");
    running.finish().expect_code(debug_exit(7));
}

#[test]
fn a_triple_fault_ends_the_run_with_5_and_says_so() {
    let run = told(&tiny!("commands"), b"t").expect_code(CRASHED);
    assert!(run.stderr.contains("triple fault"), "{run}");
}

#[test]
fn a_second_interrupt_signal_ends_a_guest_that_halts_for_ever() {
    let mut running = commanded(&tiny!("commands"));
    running.send(b"h");
    running.signal(Signal::SIGINT);
    running.wait_for_message("power button pressed");
    running.signal(Signal::SIGINT);
    running.finish().expect_code(128 + 2);
}

#[test]
fn a_termination_signal_is_the_power_button() {
    let mut running = commanded(&tiny!("power-button"));
    running.signal(Signal::SIGTERM);
    running.wait_for("event 00000001 then 00000000\n");
    running.finish().expect_code(POWERED_OFF);
}

#[test]
fn a_second_termination_signal_ends_a_guest_that_ignores_the_first() {
    let mut running = commanded(&tiny!("power-button").cmdline("ignore"));
    running.signal(Signal::SIGTERM);
    running.wait_for("event 00000001 then 00000000\n");
    running.signal(Signal::SIGTERM);
    running.finish().expect_code(128 + 15);
}

#[test]
fn pci_functions_are_found_by_enumeration() {
    let disk = disk();
    let run = success(tiny!("pci-list").args(["--rng", "--disk", disk.path().to_str().unwrap()]).run());
    let lines: Vec<Vec<u32>> = run
        .output()
        .lines()
        .map(|line| line.split(' ').map(|word| u32::from_str_radix(word, 16).unwrap()).collect())
        .collect();
    let [bridge, disk, rng] = lines.as_slice() else { panic!("three functions\n{run}") };
    assert_eq!((bridge[0], bridge[2] >> 8), (0, 0x06_00_00), "a host bridge as 00:00.0\n{run}");
    assert_eq!((disk[0], disk[1], disk[2] >> 16), (1, 0x1042_1af4, 0x0100), "{run}");
    assert_eq!((rng[0], rng[1]), (2, 0x1044_1af4), "{run}");
    assert!(
        [disk, rng].iter().all(|function| function[2] & 0xff >= 1),
        "modern devices have revision 1 or more\n{run}"
    );
}

#[test]
fn a_bar_is_sized_and_moved() {
    let run = success(tiny!("bar").args(["--rng"]).run());
    let size = !(numbers(&run, "sizing")[0] & !0xf) + 1;
    assert_eq!(numbers(&run, "sizing")[0] & 0xf, 4, "64-bit memory, not prefetchable\n{run}");
    assert!(size.is_power_of_two() && size >= 0x1000, "size {size:#x}\n{run}");
    let (alive, dead) = (1, 0xffff);
    assert_eq!(numbers(&run, "here"), [alive]);
    assert_eq!(numbers(&run, "moved"), [dead, alive]);
    assert_eq!(numbers(&run, "off"), [dead, alive]);
    let bridge = numbers(&run, "over RAM")[1];
    assert_eq!(numbers(&run, "over RAM"), [0x5aa5_5aa5, bridge, alive]);
    assert_ne!(bridge & 0xffff, 0xffff, "the host bridge still answers\n{run}");
}

#[test]
fn read_only_configuration_registers_stay_as_they_are() {
    let run = success(tiny!("config-space").args(["--rng"]).run());
    assert!(run.output().starts_with("unchanged\n"), "{run}");
    assert_eq!(numbers(&run, "command"), [0x0406, 0x0010], "memory, bus master and INTx disable\n{run}");
    // An access across two functions is two accesses: the last bytes of one, which are zero, and those of nobody.
    let (nobody, across) = (0xffff_ffff, 0xffff_0000);
    assert_eq!(numbers(&run, "nobody"), [nobody, nobody, 0, across]);
}

#[test]
fn virtio_rng_fills_a_buffer() {
    let guest = tiny!("rng").args(["--rng"]);
    let random = || {
        let run = success(guest.run());
        // The random number is too long for one of them.
        assert_eq!(numbers(&run, "used"), [16, 0x1111_1111], "bytes used, and what lies behind the buffer\n{run}");
        run.output().split(' ').nth(3).unwrap().to_owned()
    };
    let first = random();
    assert_eq!(first.len(), 32, "{first}");
    assert_ne!(first, random());
}

#[test]
fn msix_interrupts_arrive_are_masked_and_wait() {
    let run = success(tiny!("msix").args(["--rng"]).run());
    assert_eq!(numbers(&run, "masked at reset"), [1]);
    assert_eq!(numbers(&run, "vector 9"), [0xffff, 0], "a vector that is not there is refused\n{run}");
    assert!(run.output().contains("\ninterrupt\n"), "{run}");
    assert_eq!(numbers(&run, "masked: interrupts"), [1]);
    assert_eq!(numbers(&run, "unmasked: pending"), [0]);
    assert_eq!(numbers(&run, "suppressed: interrupts"), [3]);
}

/// A disk of 1 MiB with a text in its first sector.
fn disk() -> NamedTempFile {
    let mut disk = NamedTempFile::new().unwrap();
    disk.write_all(b"written by the host").unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    disk
}

#[test]
fn virtio_blk_reads_writes_and_flushes() {
    let disk = disk();
    let argument = format!("path={},id=root", disk.path().display());
    let run = success(tiny!("blk").args(["--disk", &argument]).run());
    assert_eq!(
        run.output(),
        "sectors 00000800\n\
         read 00000000 written by the host\n\
         write 00000000\n\
         flush 00000000\n\
         read 00000000 written by the guest\n\
         beyond the end 00000001 00000001\n\
         unknown 00000002\n\
         id 00000000 root\n"
    );
    let bytes = fs::read(disk.path()).unwrap();
    assert_eq!(bytes.len(), 1 << 20);
    assert!(bytes[512..].starts_with(b"written by the guest\0"));
    assert!(bytes[..512].starts_with(b"written by the host\0"));
    assert!(bytes[1024..].iter().all(|byte| *byte == 0));
}

#[test]
fn virtio_blk_refuses_writes_to_a_readonly_disk() {
    let disk = disk();
    let argument = format!("path={},readonly", disk.path().display());
    let run = success(tiny!("blk").args(["--disk", &argument]).run());
    assert_eq!(numbers(&run, "write"), [1], "VIRTIO_BLK_S_IOERR");
    assert!(fs::read(disk.path()).unwrap()[512..].iter().all(|byte| *byte == 0));
}

#[test]
fn virtio_console_sends_to_a_file() {
    let directory = TempDir::new().unwrap();
    let file = directory.path().join("console");
    let run = success(
        tiny!("console").args(["--serial", "stdio", "--console"]).args([format!("file={}", file.display())]).run(),
    );
    assert_eq!(run.output(), "sent\n");
    assert_eq!(fs::read_to_string(&file).unwrap(), "hello from port 0\n");
}

/// What becomes of each rule that the guest breaks, in order.
const BROKEN: [&str; 12] = [
    "descriptor loop",
    "descriptor that follows itself",
    "address outside memory",
    "address that wraps around",
    "huge length",
    "chain longer than 4 GiB",
    "head beyond the queue",
    "next beyond the queue",
    "available index jump",
    "indirect not negotiated",
    "readable after writable",
    "ring outside memory",
];
const FROZEN: [&str; 4] =
    ["ring moved while running", "size changed while running", "queue enabled again", "features changed while running"];

/// The device needs a reset after each broken rule, works after the reset, and never harms the monitor.
fn breaks_rules(run: Run) {
    let run = success(run);
    let output = run.output();
    for rule in BROKEN {
        assert!(output.contains(&format!("{rule}: needs reset\n")), "{rule}\n{run}");
    }
    for rule in FROZEN {
        assert!(output.contains(&format!("{rule}: served\n")), "{rule}\n{run}");
    }
    assert!(output.ends_with("end\n"), "{run}");
}

#[test]
fn rules_broken_on_virtio_rng_need_a_reset() {
    breaks_rules(tiny!("rules").cmdline("rng").args(["--rng"]).run());
}

#[test]
fn rules_broken_on_virtio_blk_need_a_reset() {
    let disk = disk();
    breaks_rules(tiny!("rules").cmdline("blk").args(["--disk", disk.path().to_str().unwrap()]).run());
    assert!(fs::read(disk.path()).unwrap().starts_with(b"written by the host\0"));
}

/// Starts all processors, and compares the local APIC ids that they say.
fn all_processors_start(guest: &Tiny, count: u64) {
    let arguments = ["--cpus".to_owned(), count.to_string()];
    let run = success(guest.clone().cmdline(&format!("{count:03}")).args(arguments).run());
    let output = run.output();
    let mut ids: Vec<u64> = output
        .lines()
        .filter_map(|line| line.strip_prefix("processor "))
        .map(|id| u64::from_str_radix(id, 16).unwrap())
        .collect();
    assert_eq!(ids.first(), Some(&0), "the boot processor is the first\n{run}");
    ids.sort_unstable();
    assert!(ids.iter().copied().eq(0..count), "{run}");
    assert_eq!(numbers(&run, "all"), [count]);
}

#[test]
fn four_processors_start() {
    all_processors_start(&tiny!("smp"), 4);
}

#[test]
fn as_many_processors_as_there_may_be_start() {
    all_processors_start(&tiny!("smp").deadline(Duration::from_secs(120)), 254);
}

#[test]
fn guests_are_built_once() {
    let before = guest("first-byte");
    let made = fs::metadata(&before).unwrap().modified().unwrap();
    assert_eq!(guest("first-byte"), before);
    assert_eq!(fs::metadata(&before).unwrap().modified().unwrap(), made);
}

/// The report that a run's `--boot-trace` wrote, and its picture.
fn trace_of(guest: &Tiny, code: i32) -> (serde_json::Value, String, Run) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("boot.json");
    let run = guest.clone().args(["--boot-trace", path.to_str().unwrap()]).run().expect_code(code);
    let report = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    (report, fs::read_to_string(path.with_extension("svg")).unwrap(), run)
}

/// How often a place was accessed, in all of its addresses.
fn accesses(exits: &serde_json::Value, reason: &str, name: &str) -> u64 {
    let places = exits["by_place"].as_array().unwrap().iter();
    let fitting = places.filter(|place| place["reason"] == reason && place["name"] == name);
    fitting.map(|place| place["count"].as_u64().unwrap()).sum()
}

#[test]
fn the_boot_trace_has_each_step_and_counts_each_exit() {
    let (report, picture, run) = trace_of(&tiny!("boot-marker").args(["--rng"]), debug_exit(0));
    assert_eq!(run.output(), "up\nafter\n");
    let steps = report["milestones"].as_array().unwrap();
    let names: Vec<&str> = steps.iter().map(|step| step["name"].as_str().unwrap()).collect();
    let expected = [
        "exec",
        "configuration",
        "memory",
        "kernel",
        "vm",
        "vcpus",
        "first-entry",
        "first-pci-access",
        "driver-ok",
        "first-output",
        "user-space",
    ];
    assert_eq!(names, expected);
    let times: Vec<u64> = steps.iter().map(|step| step["at_us"].as_u64().unwrap()).collect();
    assert!(times.is_sorted() && times[0] == 0 && times[1] > 0, "{times:?}");
    assert_eq!(report["devices"][0]["id"], "rng0");
    assert_eq!(report["devices"][0]["driver_ok_us"], times[8]);
    assert_eq!((&report["user_space"], &report["end_us"]), (&true.into(), &times[10].into()));

    // The eighth read of the clock and the second text come after user space.
    assert_eq!(accesses(&report["guest"], "pio-read", "clock (CMOS)"), 7);
    assert_eq!(accesses(&report["guest"], "pio-write", "serial"), 3);
    assert_eq!(accesses(&report["guest"], "pio-write", "boot marker"), 1);
    // Status 0, ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK, and what is set up in between.
    assert!(accesses(&report["guest"], "mmio-write", "rng0 common configuration") > 5, "{report:#}");
    let phases = report["phases"].as_array().unwrap();
    let entry = phases.iter().find(|phase| phase["after"] == "first-entry").unwrap();
    assert_eq!((&entry["exits"], &entry["by_reason"]["pio-read"]), (&7.into(), &7.into()));
    let sum: u64 = phases.iter().map(|phase| phase["exits"].as_u64().unwrap()).sum();
    assert_eq!(report["guest"]["exits"], sum);
    if let Some(all) = report["guest"]["hypervisor"]["exits"].as_u64() {
        assert!(all >= sum, "{all} exits by the hypervisor's count, {sum} by ours");
    }
    assert!(picture.starts_with("<svg") && picture.contains("driver-ok rng0"), "{picture}");
}

#[test]
fn a_boot_trace_without_user_space_tells_how_far_it_came() {
    let (report, picture, _) = trace_of(&tiny!("first-byte"), debug_exit(0));
    assert_eq!(report["user_space"], false);
    let last = report["milestones"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["name"], &last["subject"]), (&"first-output".into(), &"serial".into()));
    assert_eq!(report["guest"]["exits"], 2);
    assert!(picture.contains("no user space"), "{picture}");
}

#[test]
fn a_boot_trace_that_cannot_be_written_is_refused() {
    for (path, says) in [("/nowhere/boot.json", "No such file"), ("boot.svg", "name the JSON file")] {
        let run = tiny!("first-byte").args(["--boot-trace", path]).run().expect_code(2);
        run.expect_messages(&["--boot-trace", says]);
    }
}

/// Exit code of a run that `--boot-timeout` ended.
const NOT_UP: i32 = 6;

#[test]
fn a_guest_that_loops_is_ended_with_what_it_does() {
    let guest = tiny!("stuck").cmdline("loop").args(["--boot-timeout", "400ms", "--disk"]);
    let disk = disk();
    let run = guest.args([disk.path()]).run().expect_code(NOT_UP);
    run.expect_messages(&[
        "no user space after 0.",
        "has said nothing and touched no device; last milestone: first-entry",
        "without a driver: disk0",
        "vCPU 0: running, instruction pointer 0x10",
        "vCPU 0's last exits:",
        "read 0xff (1 bytes) from clock (CMOS) 0x71",
        "what may help: «console=ttyS0»",
        "the guest did not come up: no user space after",
    ]);
}

#[test]
fn a_guest_that_stops_itself_is_ended_with_what_it_did_last() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("boot.json");
    let guest = tiny!("stuck").cmdline("halt").args(["--cpus", "2", "--boot-timeout", "400ms,until=told"]);
    let run = guest.args(["--boot-trace", path.to_str().unwrap()]).run().expect_code(NOT_UP);
    assert_eq!(run.output(), "so far\n");
    run.expect_messages(&[
        "its kernel runs, but has not looked for devices; last milestone: first-output serial",
        "vCPU 0: halted with interrupts off, which nothing ends, instruction pointer 0x10",
        "vCPU 1: not started by the guest",
        "wrote 0xa (1 bytes) to serial 0x3f8",
        "every vCPU has stopped itself for good",
    ]);
    let report: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert!(report["diagnosis"][0].as_str().unwrap().starts_with("no user space after"), "{report:#}");
}

#[test]
fn a_guest_that_comes_up_in_time_goes_on() {
    let run = success(tiny!("boot-marker").args(["--rng", "--boot-timeout", "20s,until=told"]).run());
    assert_eq!(run.output(), "up\nafter\n");
}
