//! Where the time and the exits of a boot go, from exec to user space, under Halyard and under QEMU's machines.
//!
//! Each boots the same kernel and initramfs once, in one host of its own, one after the other. The exits are KVM's own
//! count, which is there for every program (`/sys/kernel/debug/kvm`), read when the guest's first program has said that
//! it runs, and waits. The time is the harness's clock from start to those words, and inside of it the guest's own: the
//! stamps of its kernel's log. The kernel's clock begins to run after the kernel has been decompressed, and loses ticks
//! in an emulated host.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::Value;

use super::boot::{
    FIRST_WORDS, MICROVM, PATIENCE, Q35, SMALL_PAGES, WORDS, kernel_time, mount_counters, put_away, qemu,
};
use super::{Finding, Series};
use crate::{Cmd, Host, HostSpec, Kernel, images, vm};

/// The most exits that Halyard may have, as a multiple of the better QEMU machine's.
const LIMIT: f64 = 0.5;
const LAST_WORDS: &str = "HALYARD-GUEST last words";

/// Lines of the kernel's log that part its work, and what it did until there.
const STEPS: [(&str, &str); 4] = [
    ("smpboot: Total of ", "kernel: memory, interrupts, clocks, processors"),
    ("Serial: 8250/16550 driver", "kernel: ACPI, PCI, subsystems"),
    ("Freeing unused kernel image (initmem)", "kernel: drivers, initramfs, late work"),
    ("Run /bin/agent as init process", "kernel: freeing, to init"),
];

/// KVM's counters that the table shows, and what they count.
const COUNTERS: [(&str, &str); 8] = [
    ("exits", "all exits from the guest"),
    ("io_exits", "I/O ports"),
    ("mmio_exits", "memory-mapped registers"),
    ("halt_exits", "halts"),
    ("irq_window_exits", "interrupt windows"),
    ("irq_injections", "interrupts delivered"),
    ("insn_emulation", "instructions emulated"),
    ("pf_taken", "page faults of nested paging"),
];

/// Why processors with SVM leave a guest (AMD APM vol. 2, appendix C), those with VMX (Intel SDM vol. 3, appendix C), and
/// what it is called here.
const REASONS: [(u64, u64, &str); 14] = [
    (0x60, 1, "the host's interrupts"),
    (0x64, 7, "interrupt window"),
    (0x72, 10, "CPUID"),
    (0x78, 12, "halt"),
    (0x7b, 30, "I/O port"),
    (0x7c, 32, "write of an MSR (with SVM: read or write)"),
    (0x7c, 31, "read of an MSR"),
    (0x400, 48, "page without mapping (with SVM: memory-mapped registers, too)"),
    (0x400, 49, "memory-mapped registers"),
    (0x10, 28, "control register"),
    (0x14, 28, "control register"),
    (0x65, 28, "control register"),
    (0x8d, 55, "XSETBV"),
    (0x401, 56, "virtual APIC write"),
];
/// The trigger by which the host's kernel counts exits by their reason.
const TRIGGER: &str = "/sys/kernel/tracing/events/kvm/kvm_exit/trigger";
const COUNT_REASONS: &str = "hist:keys=isa,exit_reason";

/// What one program's boot was like.
#[derive(Debug, Clone, Serialize)]
pub struct Boot {
    /// The program.
    pub program: String,
    /// Seconds from exec to the guest's first program.
    pub total: f64,
    /// The guest's clock then, in seconds.
    pub kernel: f64,
    /// Seconds of each step, in the order of [`Table::steps`]; those whose end the kernel's log does not show are in the
    /// next one that it does.
    pub steps: Vec<Option<f64>>,
    /// KVM's counters by name.
    pub counters: Vec<(String, u64)>,
}

/// The boots side by side.
#[derive(Debug, Clone, Serialize)]
pub struct Table {
    /// What was booted.
    pub what: String,
    /// What happened in each step.
    pub steps: Vec<String>,
    /// Halyard first.
    pub boots: Vec<Boot>,
    /// The report of Halyard's own boot trace, of a boot apart.
    pub trace: Value,
    /// All exits of that boot by the processor's reason, most first; empty where the host's kernel cannot count them.
    pub reasons: Vec<(String, u64)>,
}

/// Boots everything once.
///
/// # Errors
/// Where the host does not start, a guest does not get to user space, or KVM's counters cannot be read.
pub fn measure() -> Result<Table> {
    let kernel = Kernel::Debian6_12Cloud;
    let image = kernel.bzimage()?.display().to_string();
    let initramfs = images::guest(kernel)?.display().to_string();
    // The clock in the log's stamps is exact from the start only where the kernel trusts the time stamp counter.
    let words = WORDS;
    let host = Host::start(&HostSpec::new().cpus(1).qemu(["-mem-prealloc"]))?;
    mount_counters(&host)?;
    let halyard = vm::halyard()?.display().to_string();
    let own = ["run", "--cpus", "1", "--memory", "256M", "--on-reset", "exit", "--on-panic", "exit"];
    let own_files = ["--kernel", &image, "--initramfs", &initramfs];
    let own = |words: &str| Cmd::new(&*halyard).args(own).args(own_files).args(["--cmdline", words]);
    let files = ["-kernel", &image, "-initrd", &initramfs, "-append", words];
    let monitors = [
        ("halyard", own(words)),
        ("qemu microvm", qemu(MICROVM, &files).args(["-m", "256"])),
        ("qemu q35", qemu(Q35, &files).args(["-m", "256"])),
    ];
    // The cache is warm from the first boot on.
    boot(&host, "halyard", &monitors[0].1, counters)?;
    put_away(&host, SMALL_PAGES)?;
    let mut boots = Vec::new();
    for (name, command) in &monitors {
        let boot = boot(&host, name, command, counters).with_context(|| (*name).to_owned())?;
        eprintln!("  {name} {:.2} s", boot.total);
        boots.push(boot);
        put_away(&host, SMALL_PAGES)?;
    }
    let path = format!("{}/boot.json", host.folder()?);
    let trigger =
        format!("[ -e {TRIGGER} ] || mount -t tracefs tracefs /sys/kernel/tracing; echo '{COUNT_REASONS}' >{TRIGGER}");
    let counts = host.run(Cmd::shell(&trigger))?.status.success();
    let traced = own(&format!("{words} marker")).args(["--boot-trace", &path]);
    let reasons = |host: &Host, _| if counts { reasons(host) } else { Ok(Vec::new()) };
    let reasons = boot(&host, "halyard", &traced, reasons).context("the boot trace")?.counters;
    let trace = serde_json::from_slice(&host.read_file(&path)?).context("the boot trace")?;
    let first = "monitor, firmware, decompression";
    let steps = std::iter::once(first)
        .chain(STEPS.map(|(_, step)| step))
        .chain(["first program, and time that the kernel's clock lost"]);
    let what = format!("Debian's {}, 1 vCPU, 256 MiB", kernel.version()?);
    Ok(Table { what, steps: steps.map(str::to_owned).collect(), boots, trace, reasons })
}

/// Boots once; what was counted then is asked of `count` at the guest's first words.
fn boot(
    host: &Host,
    name: &str,
    command: &Cmd,
    count: impl Fn(&Host, u32) -> Result<Vec<(String, u64)>>,
) -> Result<Boot> {
    let started = Instant::now();
    let process = host.spawn(command.clone())?;
    process.wait_line_for(FIRST_WORDS, PATIENCE)?;
    let total = started.elapsed().as_secs_f64();
    let counters = count(host, process.pid())?;
    let kernel = kernel_time(&process)?;
    process.write(b"\n")?;
    process.wait_line_for(LAST_WORDS, PATIENCE)?;
    let log: Vec<String> = process.output().lines().map(str::to_owned).collect();
    process.wait()?;
    let steps = steps(&log, kernel, total);
    Ok(Boot { program: name.to_owned(), total, kernel, steps, counters })
}

/// Seconds of each step: the time before the kernel's clock, what the log's stamps part, and the rest.
fn steps(log: &[String], kernel: f64, total: f64) -> Vec<Option<f64>> {
    let mut steps = vec![Some(total - kernel)];
    let mut before = 0.0;
    for (text, _) in STEPS {
        let stamp = log.iter().find(|line| line.contains(text)).and_then(|line| stamp(line));
        steps.push(stamp.map(|stamp| stamp - before));
        before = stamp.unwrap_or(before);
    }
    steps.push(Some(kernel - before));
    steps
}

/// The time in front of a line of the kernel's log: `<6>[    1.234567] text`.
fn stamp(line: &str) -> Option<f64> {
    line.split_once('[')?.1.split_once(']')?.0.trim().parse().ok()
}

/// What the host's kernel counted, and the end of its counting.
fn reasons(host: &Host) -> Result<Vec<(String, u64)>> {
    let command = format!("cat {}; echo '!{COUNT_REASONS}' >{TRIGGER}", TRIGGER.replace("trigger", "hist"));
    let text = host.run(Cmd::shell(&command))?.ok().context("the histogram of exits")?;
    let mut sums = BTreeMap::new();
    for (name, count) in text.lines().filter_map(reason) {
        *sums.entry(name).or_default() += count;
    }
    let mut reasons: Vec<(String, u64)> = sums.into_iter().collect();
    reasons.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    Ok(reasons)
}

/// A line of the histogram: `{ isa:          2, exit_reason:         96 } hitcount:       3866`.
fn reason(line: &str) -> Option<(String, u64)> {
    let number = |name: &str| -> Option<u64> {
        let text = line.split_once(name)?.1.trim_start();
        text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let (isa, code, count) = (number("isa:")?, number("exit_reason:")?, number("hitcount:")?);
    let known = REASONS.iter().find(|(svm, vmx, _)| if isa == 2 { *svm == code } else { *vmx == code });
    let name = known.map_or_else(|| format!("reason {code:#x}"), |(_, _, name)| (*name).to_owned());
    Some((name, count))
}

/// KVM's counters of the only machine of a process.
fn counters(host: &Host, pid: u32) -> Result<Vec<(String, u64)>> {
    // The numbers of all vCPUs together; each has a folder of its own beside them.
    let command = format!("cd /sys/kernel/debug/kvm/{pid}-* && grep -H '' $(find . -maxdepth 1 -type f -printf '%f ')");
    let text = host.run(Cmd::shell(&command))?.ok().context("KVM's counters")?;
    let numbers = text.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_owned(), value.parse().ok()?))
    });
    let counters: Vec<(String, u64)> = numbers.collect();
    ensure!(counters.iter().any(|(name, _)| name == "exits"), "KVM counts no exits: {text:?}");
    Ok(counters)
}

impl Boot {
    /// A counter's value.
    fn counter(&self, name: &str) -> Option<u64> {
        self.counters.iter().find(|(known, _)| known == name).map(|(_, value)| *value)
    }
}

impl Table {
    /// Halyard's exits beside the better QEMU machine's.
    pub fn exits(&self) -> Finding {
        let count = |boot: &Boot| boot.counter("exits").and_then(|exits| u32::try_from(exits).ok());
        let series = self.boots.iter().map(|boot| {
            let exits = count(boot).map_or(f64::NAN, f64::from);
            Series::new(boot.program.as_str(), vec![exits])
        });
        let what = format!("Exits from first entry to user space, {}", self.what);
        Finding::ratio(what, "exits", series.collect(), LIMIT)
    }

    fn row(&self, f: &mut fmt::Formatter<'_>, name: &str, cell: impl Fn(&Boot) -> Option<String>) -> fmt::Result {
        write!(f, "| {name} |")?;
        for boot in &self.boots {
            write!(f, " {} |", cell(boot).unwrap_or_else(|| "–".into()))?;
        }
        writeln!(f)
    }
}

/// As a table of Markdown.
impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "From exec to user space, {}, one run\n", self.what)?;
        self.row(f, "", |boot| Some(boot.program.clone()))?;
        self.row(f, "---", |_| Some("---:".into()))?;
        for (index, step) in self.steps.iter().enumerate() {
            let cell = |boot: &Boot| boot.steps.get(index).copied().flatten().map(|time| format!("{time:.2} s"));
            self.row(f, step, cell)?;
        }
        self.row(f, "**sum**", |boot| Some(format!("**{:.2} s**", boot.total)))?;
        for (name, what) in COUNTERS {
            self.row(f, what, |boot| boot.counter(name).map(|value| value.to_string()))?;
        }
        writeln!(f, "\nHalyard's exits to the monitor by what was accessed (boot trace, another boot):")?;
        let places = self.trace["guest"]["by_place"].as_array().map_or(&[][..], Vec::as_slice);
        for place in places.iter().take(12) {
            let text = |name: &str| place[name].as_str().unwrap_or_default().to_owned();
            writeln!(f, "  {:>6}  {} {} {}", place["count"], text("reason"), text("name"), text("address"))?;
        }
        if !self.reasons.is_empty() {
            writeln!(f, "\nAll exits of that boot by the processor's reason (counting them makes more of them):")?;
        }
        self.reasons.iter().try_for_each(|(name, count)| writeln!(f, "  {count:>6}  {name}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_names_on_both_kinds_of_processor() {
        let line = |isa, reason| format!("{{ isa:          {isa}, exit_reason:  {reason:>9} }} hitcount:       3866");
        assert_eq!(reason(&line(2, 96)), Some(("the host's interrupts".into(), 3866)));
        assert_eq!(reason(&line(1, 10)), Some(("CPUID".into(), 3866)));
        assert_eq!(reason(&line(1, 96)), Some(("reason 0x60".into(), 3866)));
        assert_eq!(reason("Totals:"), None);
    }

    #[test]
    fn the_log_parts_the_time() {
        let log = [
            "<6>[    0.500000] smpboot: Total of 1 processors activated",
            "<6>[    2.000000] Run /bin/agent as init process",
        ];
        let steps = steps(&log.map(str::to_owned), 2.5, 6.0);
        assert_eq!(steps, [Some(3.5), Some(0.5), None, None, Some(1.5), Some(0.5)]);
    }
}
