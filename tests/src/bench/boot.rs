//! From exec to user space of a stock Debian kernel, beside QEMU's machines, in one host.
//!
//! The guest's first program is one that says how long its kernel has been up, so nothing is measured but the way there,
//! and the kernel's own part of it is known. Each monitor gets the same kernel, initramfs and command line, and QEMU's
//! machines are given the options with which they were fastest: without its clock, `microvm` makes Linux wait for one
//! for a second and more.
//!
//! An emulated host has a quirk that would tell more of the order of the programs than of themselves: when memory that
//! held a guest's code is given to another guest, the emulator drops its translations of it one by one, which takes
//! seconds. So each guest gets memory that no other had: what one has left is put away as reserved huge pages, and the
//! host has all its memory from the start. It has one processor: with a second one it disturbs itself.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Finding, Series};
use crate::kernels::Lie;
use crate::process::Process;
use crate::{Cmd, Host, HostSpec, Kernel, images, vm};

/// The most that Halyard may take, as a multiple of the faster QEMU machine with the same kernel file.
const SAME_FILE_LIMIT: f64 = 0.8;
/// The same where each gets the kernel file with which it is fastest.
const BEST_LIMIT: f64 = 0.5;
/// The most of Halyard's own part, as a share of the kernel's own time.
const SHARE_LIMIT: f64 = 0.1;
/// The most that unpacking the kernel on the host may take, as a multiple of the guest doing it.
const UNPACK_LIMIT: f64 = 1.0;
/// The command line of a guest whose first program says how long its kernel has been up, and waits.
pub(super) const WORDS: &str = "console=ttyS0 quiet panic=-1 rdinit=/bin/agent -- first";
/// What the guest's first program says first.
pub(super) const FIRST_WORDS: &str = "HALYARD-GUEST first words";
/// What it says next, behind the time that its kernel took.
const KERNEL_TIME: &str = " s of the kernel's own";
/// QEMU's machines with the options with which they boot Linux fastest.
pub(super) const MICROVM: &str = "microvm,rtc=on";
pub(super) const Q35: &str = "q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off";
/// How long a boot may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(180);
/// Where Halyard keeps unpacked kernels in these measurements.
const COLD: &str = "/tmp/cold-kernels";
const WARM: &str = "/tmp/warm-kernels";

/// The size of a guest.
struct Shape {
    cpus: &'static str,
    mib: &'static str,
    /// Huge pages, of 2 MiB, that it touches at the most.
    pages: u32,
}

const SMALL: Shape = Shape { cpus: "1", mib: "256", pages: SMALL_PAGES };
/// What a guest with 256 MiB leaves, in huge pages.
pub(super) const SMALL_PAGES: u32 = 130;
const LARGE: Shape = Shape { cpus: "8", mib: "4096", pages: 300 };

/// Ways to boot that are compared.
const CONTENDERS: usize = 7;

/// A way to boot, and what it took.
struct Contender {
    name: &'static str,
    command: Cmd,
    totals: Vec<f64>,
    kernels: Vec<f64>,
}

/// Measures Halyard and QEMU's machines, in turn, with one vCPU and with eight. Says each boot as it is done.
///
/// # Errors
/// Where the host does not start, or a guest does not get to user space.
pub fn measure(rounds: usize) -> Result<Vec<Finding>> {
    let mut findings = measure_shape(&SMALL, rounds)?;
    findings.extend(measure_shape(&LARGE, rounds.div_ceil(2))?);
    Ok(findings)
}

fn measure_shape(shape: &Shape, rounds: usize) -> Result<Vec<Finding>> {
    let boots = u64::try_from(rounds * CONTENDERS + 2)?;
    let memory = 1024 + boots * u64::from(shape.pages) * 2;
    let host = Host::start(&HostSpec::new().cpus(1).memory_mib(memory).qemu(["-mem-prealloc"]))?;
    let mut contenders = contenders(&host, shape)?;
    for round in 0..rounds {
        for contender in &mut contenders {
            let Contender { name, command, totals, kernels } = contender;
            host.run(format!("rm -rf {COLD}"))?.ok()?;
            let (total, kernel) = boot(&host, command).with_context(|| (*name).to_owned())?;
            eprintln!("  boot {} of {rounds}: {name} {total:.2} s, the kernel's own {kernel:.2} s", round + 1);
            totals.push(total);
            kernels.push(kernel);
            put_away(&host, shape.pages)?;
        }
    }
    let what = format!("{}, {} vCPU, {} MiB", Kernel::Debian6_12Cloud.version()?, shape.cpus, shape.mib);
    Ok(findings(&what, &contenders))
}

fn contenders(host: &Host, shape: &Shape) -> Result<Vec<Contender>> {
    let kernel = Kernel::Debian6_12Cloud;
    let bzimage = kernel.bzimage()?.display().to_string();
    let vmlinux = kernel.vmlinux()?.display().to_string();
    let initramfs = images::guest(kernel)?.display().to_string();
    let slow = kernel.bzimage_with(Lie::NoPayload)?.display().to_string();

    let halyard = vm::halyard()?.display().to_string();
    let words = WORDS;
    let own = |kernel: &str, cache: &str| {
        let command =
            Cmd::new(&*halyard).args(["run", "--cpus", shape.cpus, "--memory"]).arg(format!("{}M", shape.mib));
        let command = command.args(["--on-reset", "exit", "--kernel", kernel, "--kernel-cache", cache]);
        command.args(["--initramfs", &initramfs, "--cmdline", words])
    };
    let qemu = |machine: &str, kernel: &str| {
        let files = ["-kernel", kernel, "-initrd", &initramfs, "-append", words];
        qemu(machine, &files).args(["-smp", shape.cpus, "-m", shape.mib])
    };
    let all: [_; CONTENDERS] = [
        ("halyard", own(&bzimage, WARM)),
        ("halyard, cold cache", own(&bzimage, COLD)),
        ("halyard, no cache", own(&bzimage, "off")),
        ("halyard, guest unpacks", own(&slow, "off")),
        ("qemu microvm", qemu(MICROVM, &bzimage)),
        ("qemu microvm, vmlinux", qemu(MICROVM, &vmlinux)),
        ("qemu q35", qemu(Q35, &bzimage)),
    ];
    // The cache is warm from the first round on.
    boot(host, &all[0].1)?;
    put_away(host, shape.pages)?;
    let contender = |(name, command)| Contender { name, command, totals: Vec::new(), kernels: Vec::new() };
    Ok(all.map(contender).into())
}

fn findings(what: &str, contenders: &[Contender]) -> Vec<Finding> {
    let series = |names: &[&str]| {
        let named = names.iter().filter_map(|name| contenders.iter().find(|contender| contender.name == *name));
        named.map(|contender| Series::new(contender.name, contender.totals.clone())).collect::<Vec<_>>()
    };
    let kernels = contenders.iter().map(|contender| Series::new("the kernel's own time", contender.kernels.clone()));
    let floor = kernels.min_by(|one, other| one.median.total_cmp(&other.median));
    // Boot by boot: how long a kernel takes varies by more than the monitor's part.
    let own = contenders.iter().filter(|contender| contender.name == "halyard").map(|contender| {
        let parts = contender.totals.iter().zip(&contender.kernels).map(|(total, kernel)| total - kernel);
        Series::new("halyard, all but the kernel", parts.collect())
    });
    let share = own.chain(floor).collect();
    let best = ["halyard", "qemu microvm", "qemu microvm, vmlinux", "qemu q35"];
    let unpacking = ["halyard, no cache", "halyard, guest unpacks", "halyard, cold cache"];
    let to = format!("From exec to user space, Debian's {what}");
    let same = series(&["halyard", "qemu microvm", "qemu q35"]);
    vec![
        Finding::ratio(format!("{to}, the same bzImage"), "s", same, SAME_FILE_LIMIT),
        Finding::ratio(format!("{to}, each with its fastest kernel file"), "s", series(&best), BEST_LIMIT),
        Finding::ratio(format!("{to}, the monitor's part"), "s", share, SHARE_LIMIT),
        Finding::ratio(
            format!("{to}, unpacked by the monitor each time"),
            "s",
            series(&unpacking)[..2].to_vec(),
            UNPACK_LIMIT,
        ),
    ]
}

/// Makes KVM's counters readable in a host, below `/sys/kernel/debug/kvm`.
pub(super) fn mount_counters(host: &Host) -> Result<()> {
    host.run(Cmd::shell("[ -d /sys/kernel/debug/kvm ] || mount -t debugfs debugfs /sys/kernel/debug"))?.ok()?;
    Ok(())
}

/// Puts memory away, in huge pages of 2 MiB, that a guest has left in an emulated host.
pub(super) fn put_away(host: &Host, pages: u32) -> Result<()> {
    if !host.is_direct() {
        let reserved = "/proc/sys/vm/nr_hugepages";
        host.run(format!("echo $(( $(cat {reserved}) + {pages} )) >{reserved}"))?.ok()?;
    }
    Ok(())
}

/// QEMU with one of its machines and the common options.
pub(super) fn qemu(machine: &str, files: &[&str]) -> Cmd {
    let common = ["-enable-kvm", "-cpu", "host", "-nodefaults", "-no-user-config", "-display", "none"];
    let command = Cmd::new("qemu-system-x86_64").args(["-M", machine]).args(common);
    command.args(["-no-reboot", "-serial", "stdio"]).args(files.iter().copied())
}

/// Seconds from right before the start to the first words from user space, and those of them that were the kernel's.
fn boot(host: &Host, command: &Cmd) -> Result<(f64, f64)> {
    let started = Instant::now();
    let process = host.spawn(command.clone())?;
    process.wait_line_for(FIRST_WORDS, PATIENCE)?;
    let total = started.elapsed().as_secs_f64();
    let kernel = kernel_time(&process)?;
    process.kill(9)?;
    // The next one has the host for itself.
    process.wait()?;
    Ok((total, kernel))
}

/// The time that a guest's kernel took, in seconds, which follows its first words.
pub(super) fn kernel_time(process: &Process) -> Result<f64> {
    let words = process.wait_line_for(KERNEL_TIME, PATIENCE)?;
    let seconds = words.split(KERNEL_TIME).next().and_then(|front| front.split_whitespace().last()).unwrap_or_default();
    seconds.parse().with_context(|| format!("the kernel's own time in {words:?}"))
}
