//! From exec to user space of a stock Debian kernel, beside QEMU's machines, in one host.
//!
//! The first program in user space is busybox's `printf` as `init`, so nothing is measured but the way there. Each
//! monitor gets the same kernel, initramfs, command line and one vCPU with 256 MiB, and QEMU's machines are given the
//! options with which they were fastest: without its clock, `microvm` makes Linux wait for one for a second and more.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::{Finding, Series};
use crate::{Cmd, Host, HostSpec, Kernel, images, vm};

/// The most that Halyard may take, as a multiple of the faster QEMU machine.
const LIMIT: f64 = 0.8;
/// What user space says. The command line, which the kernel might print, does not have it in one piece.
const MARKER: &str = "HALYARD-user-space";
/// QEMU's machines with the options with which they boot Linux fastest.
pub(super) const MICROVM: &str = "microvm,rtc=on";
pub(super) const Q35: &str = "q35,usb=off,vmport=off,smbus=off,sata=off,hpet=off";
/// How long a boot may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(120);

/// Measures Halyard and QEMU's `microvm` and `q35`, in turn, in a host of their own. Says each boot as it is done.
///
/// # Errors
/// Where the host does not start, or a guest does not get to user space.
pub fn measure(rounds: usize) -> Result<Finding> {
    let kernel = Kernel::Debian6_12Cloud;
    let image = kernel.bzimage()?.display().to_string();
    let initramfs = images::guest(kernel)?.display().to_string();
    // The kernel hands what stands behind "--" to init. When it ends, the kernel panics and the monitor exits.
    let words = "console=ttyS0 quiet panic=-1 rdinit=/bin/printf -- HALYARD-%s\\n user-space";
    // One processor: nothing that an emulated host does beside its guest then changes what is measured.
    let host = Host::start(&HostSpec::new().cpus(1))?;
    let halyard = vm::halyard()?.display().to_string();
    let own = ["run", "--cpus", "1", "--memory", "256M", "--on-reset", "exit", "--on-panic", "exit"];
    let own_files = ["--kernel", &image, "--initramfs", &initramfs, "--cmdline", words];
    let files = ["-kernel", &image, "-initrd", &initramfs, "-append", words];
    let monitors = [
        ("halyard", Cmd::new(halyard).args(own).args(own_files)),
        ("qemu microvm", qemu(MICROVM, &files)),
        ("qemu q35", qemu(Q35, &files)),
    ];
    let mut times = monitors.each_ref().map(|_| Vec::new());
    for round in 0..rounds {
        for ((name, command), times) in monitors.iter().zip(&mut times) {
            let took = boot(&host, command).with_context(|| (*name).to_owned())?;
            eprintln!("  boot {} of {rounds}: {name} {took:.2} s", round + 1);
            times.push(took);
        }
    }
    let series = monitors.iter().zip(times).map(|((name, _), times)| Series::new(*name, times)).collect();
    let what = format!("From exec to user space, Debian's {}, 1 vCPU, 256 MiB", kernel.version()?);
    Ok(Finding::ratio(what, "s", series, LIMIT))
}

/// QEMU with one of its machines and the common options.
pub(super) fn qemu(machine: &str, files: &[&str]) -> Cmd {
    let common = ["-enable-kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none"];
    let command = Cmd::new("qemu-system-x86_64").args(["-M", machine]).args(common);
    command.args(["-no-reboot", "-serial", "stdio"]).args(files.iter().copied())
}

/// Seconds from right before the start to the first words from user space.
fn boot(host: &Host, command: &Cmd) -> Result<f64> {
    let started = Instant::now();
    let process = host.spawn(command.clone())?;
    process.wait_line_for(MARKER, PATIENCE)?;
    let took = started.elapsed().as_secs_f64();
    // The next one has the host for itself.
    process.wait()?;
    Ok(took)
}
