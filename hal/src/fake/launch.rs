//! The launch of a scripted confidential guest, with the rules that hypervisors have for it.

use std::collections::BTreeSet;

use super::Call;
use super::vm::Shared;
use crate::{CpuidChange, Error, GpaRange, Launch, ResetState, Result, SharedRanges, VcpuId};

const PAGE: u64 = 4096;

/// How far a launch is.
#[derive(Default)]
pub(super) struct LaunchState {
    phase: Phase,
    /// The vCPUs that have their CPUID.
    reset: BTreeSet<VcpuId>,
    /// The pages that were added.
    added: SharedRanges,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    New,
    Begun,
    Finished,
}

impl LaunchState {
    pub(super) fn has_begun(&self) -> bool {
        self.phase != Phase::New
    }

    pub(super) fn is_finished(&self) -> bool {
        self.phase == Phase::Finished
    }

    /// Gives a vCPU its CPUID, once.
    pub(super) fn reset(&mut self, vcpu: VcpuId, at: &ResetState) -> Result<()> {
        if at.entry.is_some() {
            return refused("registers", "the launch sets those of this kind of VM");
        }
        if self.has_begun() || !self.reset.insert(vcpu) {
            return refused("reset", "a reset of this kind of VM is a new VM");
        }
        Ok(())
    }
}

fn refused<T>(what: &'static str, problem: &str) -> Result<T> {
    Err(Error::Invalid { what, problem: problem.into() })
}

impl Launch for Shared {
    fn begin(&self, hand_off: u64) -> Result<()> {
        self.world.call(Call::LaunchBegin { hand_off })?;
        let mut launch = self.launch();
        if launch.has_begun() {
            return refused("launch", "it has begun already");
        }
        let vcpus = self.vcpus();
        if vcpus.is_empty() || !vcpus.is_subset(&launch.reset) {
            return refused("launch", "a vCPU is missing, or has not been reset");
        }
        launch.phase = Phase::Begun;
        Ok(())
    }

    fn add(&self, range: GpaRange, contents: &[u8], measured: bool) -> Result<()> {
        self.world.call(Call::LaunchAdd { range, bytes: contents.len(), measured })?;
        let mut launch = self.launch();
        match launch.phase {
            Phase::New => return refused("launch", "it has not begun"),
            Phase::Finished => return refused("launch", "the guest is sealed"),
            Phase::Begun => {}
        }
        let GpaRange { start, len } = range;
        if len == 0 || !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return refused("launch", "the range is not of whole pages");
        }
        if contents.len() as u64 > len {
            return refused("launch", "the contents are longer than the range");
        }
        if !self.is_private(range) {
            return refused("launch", "the range is not private memory of one slot");
        }
        if launch.added.overlaps(range) {
            return refused("launch", "a page was added already");
        }
        launch.added.insert(range);
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        self.world.call(Call::LaunchFinish)?;
        let mut launch = self.launch();
        match launch.phase {
            Phase::New => refused("launch", "it has not begun"),
            Phase::Finished => refused("launch", "the guest is sealed already"),
            Phase::Begun => {
                launch.phase = Phase::Finished;
                Ok(())
            }
        }
    }

    fn changes(&self) -> Vec<CpuidChange> {
        Vec::new()
    }
}
