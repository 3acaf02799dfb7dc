//! What a monitor holds of its host, counted at two moments.

use std::fs;

use anyhow::{Result, ensure};

use crate::bench::memory::private_dirty;
use crate::host::Host;

/// What a monitor has.
#[derive(Debug)]
pub struct Census {
    /// Open descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: usize,
    /// All that it has mapped, the guest's memory too, in KiB.
    pub mapped: u64,
    /// Private memory beside the guest's, in KiB.
    pub memory: f64,
}

impl Census {
    /// Of a process of a host.
    ///
    /// # Errors
    /// It is not there.
    pub fn in_host(host: &Host, pid: u32) -> Result<Self> {
        let count = |folder: &str| anyhow::Ok(host.run(format!("ls /proc/{pid}/{folder} | wc -l"))?.ok()?.parse()?);
        Self::new(count, &host.run(format!("cat /proc/{pid}/smaps"))?.ok()?)
    }

    /// Of a process of this machine.
    ///
    /// # Errors
    /// It is not there.
    pub fn here(pid: u32) -> Result<Self> {
        let count = |folder: &str| anyhow::Ok(fs::read_dir(format!("/proc/{pid}/{folder}"))?.count());
        Self::new(count, &fs::read_to_string(format!("/proc/{pid}/smaps"))?)
    }

    fn new(count: impl Fn(&str) -> Result<usize>, smaps: &str) -> Result<Self> {
        let sizes = smaps.lines().filter_map(|line| line.strip_prefix("Size:")?.trim().strip_suffix(" kB"));
        let mapped = sizes.map(str::parse::<u64>).sum::<Result<_, _>>()?;
        Ok(Self { descriptors: count("fd")?, threads: count("task")?, mapped, memory: private_dirty(smaps) })
    }

    /// Checks that nothing has grown, but private memory by no more than so many KiB, and mappings by less than a guest's
    /// memory.
    ///
    /// # Errors
    /// Something has.
    pub fn check_since(&self, before: &Self, growth: f64) -> Result<()> {
        let sound = (self.descriptors, self.threads) == (before.descriptors, before.threads)
            && self.mapped < before.mapped + (64 << 10)
            && self.memory <= before.memory + growth;
        ensure!(sound, "left behind in a monitor: {before:?}, then {self:?}");
        Ok(())
    }
}
