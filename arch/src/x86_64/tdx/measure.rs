//! What the TDX module makes of a launch: MRTD, and the events that firmware extends first (Intel TDX Module Base
//! Architecture Specification, "Measurement and Attestation").

use std::borrow::Cow;

use sha2::{Digest, Sha384};

use super::plan::{LaunchPlan, LaunchRegion};
use super::tdvf::SectionKind;

/// A SHA-384.
pub type Digest384 = [u8; 48];

/// Bytes that are measured at once.
const CHUNK: usize = 256;
/// Bytes of what stands in front of them.
const BLOCK: usize = 128;

/// Something that firmware extends a register with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The register's number: RTMR0 to 3.
    pub register: u8,
    /// Its type (TCG PC Client Platform Firmware Profile, §10.4.1).
    pub kind: u32,
    /// What it is of.
    pub what: Cow<'static, str>,
    /// The SHA-384 that the register is extended with.
    pub digest: Digest384,
}

/// EV_EFI_PLATFORM_FIRMWARE_BLOB2, and EV_EFI_HANDOFF_TABLES2.
const FIRMWARE_BLOB: u32 = 0x8000_000a;
const HANDOFF_TABLES: u32 = 0x8000_000b;

/// MRTD: the measurement of what is added before a trust domain runs. As KVM calls the module, each page is added, and
/// then its contents are measured, before the next one.
pub fn mrtd(plan: &LaunchPlan) -> Digest384 {
    let mut hash = Sha384::new();
    plan.regions.iter().for_each(|region| add(&mut hash, region));
    hash.finalize().into()
}

/// What firmware measures before all else, into RTMR0: the hand-off blocks, and its variables.
pub fn first_events(plan: &LaunchPlan) -> Vec<Event> {
    let mut events = vec![event(0, HANDOFF_TABLES, "the hand-off blocks", plan.measured_hand_off())];
    let volumes = plan.regions.iter().filter(|region| region.kind == SectionKind::ConfigurationVolume);
    events.extend(volumes.map(|volume| event(0, FIRMWARE_BLOB, "the configuration volume", &volume.contents)));
    events
}

/// An event of these bytes.
pub(super) fn event(register: u8, kind: u32, what: &'static str, measured: &[u8]) -> Event {
    Event { register, kind, what: what.into(), digest: Sha384::digest(measured).into() }
}

/// TDH.MEM.PAGE.ADD of each page, and TDH.MR.EXTEND of what is measured, which begins with the contents and goes on with zeros.
fn add(hash: &mut Sha384, region: &LaunchRegion) {
    let pages = (region.memory.start..region.memory.start + region.memory.len).step_by(PAGE_BYTES);
    let mut rest = &*region.contents;
    // All of a page at once: a hash does two of its blocks faster than one and another.
    let mut piece = [0; BLOCK + PAGE_BYTES / CHUNK * (BLOCK + CHUNK)];
    let (added, chunks) = piece.split_at_mut(BLOCK);
    name(added, b"MEM.PAGE.ADD");
    chunks.chunks_exact_mut(BLOCK + CHUNK).for_each(|chunk| name(chunk, b"MR.EXTEND"));
    for page in pages {
        let (added, chunks) = piece.split_at_mut(BLOCK);
        address(added, page);
        if !region.measured {
            hash.update(added);
            continue;
        }
        for (at, chunk) in (page..).step_by(CHUNK).zip(chunks.chunks_exact_mut(BLOCK + CHUNK)) {
            let (extended, contents) = chunk.split_at_mut(BLOCK);
            address(extended, at);
            let here;
            (here, rest) = rest.split_at(rest.len().min(CHUNK));
            let (held, zeros) = contents.split_at_mut(here.len());
            held.copy_from_slice(here);
            zeros.fill(0);
        }
        hash.update(&piece[..]);
    }
}

const PAGE_BYTES: usize = 4096;
/// Where the address is in a call's block, behind its name; the rest is zeros.
const ADDRESS: usize = 16;

fn name(block: &mut [u8], name: &[u8]) {
    block.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
}

fn address(block: &mut [u8], address: u64) {
    block.iter_mut().skip(ADDRESS).zip(address.to_le_bytes()).for_each(|(to, from)| *to = from);
}
