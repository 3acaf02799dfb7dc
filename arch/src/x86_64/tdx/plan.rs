//! What is added to a trust domain before it runs, in its order.

use std::borrow::Cow;

use hal::GpaRange;
use sha2::{Digest, Sha384};

use super::hob::{self, HobError};
use super::tdvf::{SectionKind, Tdvf, TdvfError};

static ZEROS: [u8; 4096] = [0; 4096];

/// Why a firmware cannot be launched.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    /// The file is wrong.
    #[error(transparent)]
    Tdvf(#[from] TdvfError),
    /// The firmware cannot be told of the guest's memory.
    #[error(transparent)]
    Hob(#[from] HobError),
}

/// Pages that are added with one call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchRegion<'a> {
    /// What they are for.
    pub kind: SectionKind,
    /// Where they lie: whole pages.
    pub memory: GpaRange,
    /// What they hold; behind its end, zeros.
    pub contents: Cow<'a, [u8]>,
    /// The contents are measured, and not the addresses alone.
    pub measured: bool,
}

impl LaunchRegion<'_> {
    /// The SHA-384 of all that the pages hold.
    pub fn digest(&self) -> [u8; 48] {
        let mut hash = Sha384::new();
        hash.update(&*self.contents);
        let mut left = self.memory.len.saturating_sub(self.contents.len() as u64);
        while left > 0 {
            let zeros = usize::try_from(left).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
            hash.update(ZEROS.split_at(zeros).0);
            left -= zeros as u64;
        }
        hash.finalize().into()
    }
}

/// What is added to a trust domain before it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaunchPlan<'a> {
    /// In the order of the calls, which the measurement depends on.
    pub regions: Vec<LaunchRegion<'a>>,
    /// The address of the hand-off blocks, which each vCPU is given in RCX.
    pub hand_off: u64,
}

impl<'a> LaunchPlan<'a> {
    /// The plan for a firmware file and a guest with this RAM, which is in ascending order.
    ///
    /// # Errors
    /// [`PlanError`]: what is wrong with the file, or with the RAM for it.
    pub fn from_firmware(file: &'a [u8], ram: &[GpaRange]) -> Result<Self, PlanError> {
        let tdvf = Tdvf::parse(file)?;
        let mut list = Some(hob::build(ram, &tdvf)?);
        let hand_off = tdvf.hand_off().map_or(0, |section| section.memory.start);
        let regions = tdvf.sections.into_iter().map(|section| LaunchRegion {
            kind: section.kind,
            memory: section.memory,
            contents: match section.kind {
                SectionKind::HandOff => list.take().unwrap_or_default().into(),
                _ => file.get(section.data).unwrap_or_default().into(),
            },
            measured: section.measured,
        });
        Ok(Self { regions: regions.collect(), hand_off })
    }

    /// What the hand-off blocks hold that the firmware measures: all but the block that ends them.
    pub fn measured_hand_off(&self) -> &[u8] {
        let list = self.regions.iter().find(|region| region.kind == SectionKind::HandOff);
        list.and_then(|region| region.contents.split_last_chunk::<{ hob::END_SIZE }>()).map_or(&[], |(list, _)| list)
    }
}
