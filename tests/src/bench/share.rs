//! What it saves that guests share the pages of a kept kernel, and what it costs.
//!
//! A number of guests boots one after the other in one host, and all stay. What each takes is the memory that the host
//! has no more when the last of them is in user space, divided by their number. Pages of files are memory that the host
//! has: it can drop them.

use anyhow::{Context, Result};

use super::boot::{FIRST_WORDS, PATIENCE, WORDS, mount_counters};
use super::{Finding, Series};
use crate::process::Process;
use crate::{Cmd, Host, HostSpec, Kernel, images, vm};

/// The most memory of a guest that shares, as a multiple of that of one that does not: less would not be seen.
const MEMORY_LIMIT: f64 = 0.9;
/// The most page faults and the most time of a guest that shares, likewise.
const COST_LIMIT: f64 = 1.1;
/// MiB of the host for each guest, and for the host itself.
const EACH: u64 = 112;
const HOST: u64 = 1024;

/// What a guest takes, on the average of all.
struct Taken {
    mebibytes: f64,
    faults: f64,
    seconds: f64,
}

/// Measures `guests` that share and as many that do not, in a host of their own each.
///
/// # Errors
/// Where the host does not start, or a guest does not get to user space.
pub fn measure(guests: usize) -> Result<Vec<Finding>> {
    let [shared, own] = ["on", "off"].map(|share| boot_all(guests, share));
    let (shared, own) = (shared?, own?);
    let series = |name: &str, value| Series::new(name, vec![value]);
    let finding = |what: &str, unit, value: fn(&Taken) -> f64, limit| {
        let both = vec![series("share_kernel=on", value(&shared)), series("share_kernel=off", value(&own))];
        Finding::ratio(format!("{what} of each of {guests} guests of one kernel, 1 vCPU, 256 MiB"), unit, both, limit)
    };
    Ok(vec![
        finding("Memory", "MiB", |taken| taken.mebibytes, MEMORY_LIMIT),
        finding("Nested page faults until user space", "", |taken| taken.faults, COST_LIMIT),
        finding("Seconds until user space", "s", |taken| taken.seconds, COST_LIMIT),
    ])
}

fn boot_all(guests: usize, share: &str) -> Result<Taken> {
    let kernel = Kernel::Debian6_12Cloud;
    let memory = HOST + EACH * u64::try_from(guests)?;
    let host = Host::start(&HostSpec::new().cpus(1).memory_mib(memory).qemu(["-mem-prealloc"]))?;
    mount_counters(&host)?;
    let command = Cmd::new(vm::halyard()?.display().to_string())
        .args(["run", "--memory", &format!("256M,share_kernel={share}"), "--kernel-cache", "/tmp/kernels"])
        .args(["--kernel", &kernel.bzimage()?.display().to_string()])
        .args(["--initramfs", &images::guest(kernel)?.display().to_string(), "--cmdline", WORDS]);
    // The first one makes the entry that all others share.
    boot(&host, &command)?.kill(9)?;
    let number = |command: &str| -> Result<f64> {
        let text = host.run(Cmd::shell(command))?.ok()?;
        text.trim().parse().with_context(|| format!("{text:?} from {command}"))
    };
    let available = || number("sync; sed -n 's/^MemAvailable: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
    let faults = || number("cat /sys/kernel/debug/kvm/pf_taken");
    let (memory, taken, started) = (available()?, faults()?, std::time::Instant::now());
    let running = (0..guests).map(|_| boot(&host, &command)).collect::<Result<Vec<_>>>()?;
    let seconds = started.elapsed().as_secs_f64();
    let (memory, taken) = (memory - available()?, faults()? - taken);
    drop(running);
    let guests = f64::from(u32::try_from(guests)?);
    let taken = Taken { mebibytes: memory / 1024.0 / guests, faults: taken / guests, seconds: seconds / guests };
    eprintln!("  share_kernel={share}: {:.1} MiB, {:.2} s each", taken.mebibytes, taken.seconds);
    Ok(taken)
}

/// A guest that is in user space, and waits.
fn boot(host: &Host, command: &Cmd) -> Result<Process> {
    let process = host.spawn(command.clone())?;
    process.wait_line_for(FIRST_WORDS, PATIENCE)?;
    Ok(process)
}
