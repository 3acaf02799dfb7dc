//! Many VMs: one after another through one process, each in a process of its own, and many at once.
//!
//! Each is created over the socket, boots a tiny guest, which is heard, and is destroyed.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::{Client, PhaseName, VmConfig};
use nix::sys::signal::Signal;

use super::memory::private_memory;
use super::{Finding, Series};
use crate::tiny::{Served, config};

const PATIENCE: Duration = Duration::from_secs(120);
/// The most private memory, in MiB, of a VM of 64 MiB that has done nothing yet, its guest's included.
const MEMORY_LIMIT: f64 = 4.0;
/// The most that a VM of 64 MiB may take, from its creation until it is gone, in milliseconds.
const TIME_LIMIT: f64 = 50.0;

/// What many at once were.
#[derive(Debug)]
pub struct AtOnce {
    /// Started and heard, in a second.
    pub rate: f64,
    /// Private memory of each, its guest's included, in MiB.
    pub mebibytes: f64,
}

/// Measures so many one after another and a tenth of them at once.
///
/// # Errors
/// Where one does not boot, or is not gone afterwards.
pub fn measure(count: usize) -> Result<Vec<Finding>> {
    let (through_one, _) = through_one_process(count, |_| Ok(()))?;
    let processes = one_after_another(count)?;
    let crowd = (count / 10).max(1);
    let AtOnce { rate, mebibytes } = at_once(crowd)?;
    let each = |rate: f64| vec![1000.0 / rate];
    let time = |how: &str, rate| {
        let what = format!("Time of each VM of 64 MiB, created, booted and destroyed: {how}, {rate:.1} a second");
        Finding::amount(what, "ms", Series::new("halyard", each(rate)), TIME_LIMIT)
    };
    let what = format!("Private memory of each of {crowd} VMs at once, 1 vCPU, 64 MiB, its guest's included");
    Ok(vec![
        time(&format!("{count} through one process"), through_one),
        time(&format!("{count} processes one after another"), processes),
        time(&format!("{crowd} processes at once"), rate),
        Finding::amount(what, "MiB", Series::new("halyard", vec![mebibytes]), MEMORY_LIMIT),
    ])
}

/// Creates, boots, hears and destroys a VM.
fn live(client: &mut Client, config: &VmConfig) -> Result<()> {
    client.create(config)?;
    client.boot()?;
    hear(client)?;
    client.destroy()?;
    let phase = client.vm()?.phase;
    ensure!(phase == PhaseName::Empty, "a destroyed VM is {phase}");
    Ok(())
}

/// Waits for the guest's first word.
fn hear(client: &Client) -> Result<()> {
    let mut console = client.console("serial", false)?;
    console.set_read_timeout(Some(PATIENCE))?;
    // Its first word may be said before anybody listens: it answers to this one.
    console.write_all(b"x")?;
    let mut said = Vec::new();
    while !said.ends_with(b"what?\n") {
        let mut byte = [0];
        console.read_exact(&mut byte).with_context(|| format!("after {:?}", String::from_utf8_lossy(&said)))?;
        said.push(byte[0]);
    }
    Ok(())
}

/// VMs in a second through one process, with a look at the process when it holds as many events as it ever will,
/// which is after six tenths of a thousand, and after all.
///
/// # Errors
/// Where one does not boot, or the process does not end.
pub fn through_one_process<T>(count: usize, look: impl Fn(u32) -> Result<T>) -> Result<(f64, Vec<T>)> {
    let served = Served::start("serve", ["--log-level", "error"]).patient(PATIENCE * 5);
    let (mut client, config) = (served.client(), config("commands"));
    let mut looks = Vec::new();
    let began = Instant::now();
    for number in 1..=count {
        live(&mut client, &config).with_context(|| format!("VM {number} of {count}"))?;
        if number == count * 6 / 10 || number == count {
            looks.push(look(served.pid())?);
        }
    }
    let rate = rate(count, began);
    drop(client);
    served.signal(Signal::SIGTERM);
    ensure!(served.finish().code() == Some(0), "the process has failed");
    Ok((rate, looks))
}

/// VMs in a second, each through a process of its own.
///
/// # Errors
/// Where one does not boot, or its process does not end or leaves its socket behind.
pub fn one_after_another(count: usize) -> Result<f64> {
    let config = config("commands");
    let began = Instant::now();
    for number in 0..count {
        let served = Served::start("serve", ["--log-level", "error"]);
        live(&mut served.client(), &config).with_context(|| format!("VM {number} of {count}"))?;
        served.signal(Signal::SIGTERM);
        ensure!(served.finish().code() == Some(0), "process {number} has failed");
    }
    Ok(rate(count, began))
}

/// VMs that all run at the same time.
///
/// # Errors
/// As [`one_after_another`].
pub fn at_once(count: usize) -> Result<AtOnce> {
    let config = config("commands");
    let began = Instant::now();
    let mut all = Vec::new();
    for _ in 0..count {
        let served = Served::start("serve", ["--log-level", "error"]).patient(PATIENCE * 5);
        let mut client = served.client();
        client.create(&config)?;
        client.boot()?;
        hear(&client)?;
        // A guest that waits for input in a loop would take the time of the others.
        client.pause()?;
        all.push((served, client));
    }
    let rate = rate(count, began);
    let mut kibibytes = 0.0;
    for (served, _) in &all {
        kibibytes += private_memory(served.pid())?;
    }
    for (served, mut client) in all {
        client.destroy()?;
        drop(client);
        served.signal(Signal::SIGTERM);
        ensure!(served.finish().code() == Some(0), "a process has failed");
    }
    Ok(AtOnce { rate, mebibytes: kibibytes / 1024.0 / number(count) })
}

fn rate(count: usize, began: Instant) -> f64 {
    number(count) / began.elapsed().as_secs_f64()
}

fn number(count: usize) -> f64 {
    u32::try_from(count).map_or(f64::NAN, f64::from)
}
