//! The TD HOB: hand-off blocks by which the monitor tells the firmware of a trust domain where memory lies (UEFI Platform
//! Initialization Specification 1.8, volume 3, §5; Intel TDX Virtual Firmware Design Guide, §7.3). All numbers are
//! little-endian.

use hal::GpaRange;

use super::tdvf::{SectionKind, Tdvf};

const TYPE_HANDOFF: u16 = 1;
const TYPE_RESOURCE: u16 = 3;
const TYPE_END: u16 = 0xffff;
const HANDOFF_VERSION: u32 = 9;
/// Bytes of each sort of block, and of the header that they have in common.
const HEADER_SIZE: u16 = 8;
const HANDOFF_SIZE: u16 = 56;
const RESOURCE_SIZE: u16 = 48;
/// Memory that the trust domain has already.
const SYSTEM_MEMORY: u32 = 0;
/// Memory that the guest must accept before its first access.
const UNACCEPTED_MEMORY: u32 = 7;
/// Present, initialized, tested.
const ATTRIBUTES: u32 = 7;

/// Why firmware cannot be told of memory.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum HobError {
    /// There is no memory where a section is to be.
    #[error("the firmware needs memory from {start:#x} to {end:#x}, which is not RAM: give the guest more memory")]
    NotRam {
        /// First address.
        start: u64,
        /// Behind the last.
        end: u64,
    },
    /// The list is too long.
    #[error("its TD HOB section has {room} bytes, and {needed} are needed")]
    Full {
        /// Bytes that there are.
        room: u64,
        /// Bytes that would be needed.
        needed: u64,
    },
}

/// Bytes that end the list, which the firmware does not measure.
pub(super) const END_SIZE: usize = HEADER_SIZE as usize;

/// The list for a guest with this RAM: what the firmware uses from the start is system memory, all else must be accepted.
/// `ram` is in ascending order, and its ranges do not overlap.
pub(super) fn build(ram: &[GpaRange], tdvf: &Tdvf) -> Result<Vec<u8>, HobError> {
    let mut used: Vec<GpaRange> = tdvf
        .sections
        .iter()
        .filter(|section| matches!(section.kind, SectionKind::HandOff | SectionKind::Temporary))
        .map(|section| section.memory)
        .collect();
    used.sort_unstable_by_key(|range| range.start);
    for range in &used {
        let end = range.start + range.len;
        if !ram.iter().any(|ram| ram.start <= range.start && end <= ram.start + ram.len) {
            return Err(HobError::NotRam { start: range.start, end });
        }
    }

    let mut resources = Vec::new();
    for range in ram {
        let (mut at, end) = (range.start, range.start + range.len);
        for used in used.iter().filter(|used| range.start <= used.start && used.start < end) {
            resources.push((UNACCEPTED_MEMORY, at, used.start - at));
            resources.push((SYSTEM_MEMORY, used.start, used.len));
            at = used.start + used.len;
        }
        resources.push((UNACCEPTED_MEMORY, at, end - at));
    }
    resources.retain(|(_, _, len)| *len > 0);

    let place = tdvf.hand_off().map_or(GpaRange { start: 0, len: 0 }, |section| section.memory);
    let needed = (usize::from(HANDOFF_SIZE) + resources.len() * usize::from(RESOURCE_SIZE) + END_SIZE) as u64;
    if needed > place.len {
        return Err(HobError::Full { room: place.len, needed });
    }
    let mut list = header(TYPE_HANDOFF, HANDOFF_SIZE).to_vec();
    list.extend_from_slice(&HANDOFF_VERSION.to_le_bytes());
    // The boot mode (with full configuration), and limits of free memory that only older phases of firmware have.
    list.extend_from_slice(&[0; 4 + 4 * 8]);
    list.extend_from_slice(&(place.start + needed).to_le_bytes());
    for (kind, start, len) in resources {
        list.extend_from_slice(&header(TYPE_RESOURCE, RESOURCE_SIZE));
        // No owner.
        list.extend_from_slice(&[0; 16]);
        list.extend_from_slice(&kind.to_le_bytes());
        list.extend_from_slice(&ATTRIBUTES.to_le_bytes());
        list.extend_from_slice(&start.to_le_bytes());
        list.extend_from_slice(&len.to_le_bytes());
    }
    list.extend_from_slice(&header(TYPE_END, HEADER_SIZE));
    Ok(list)
}

/// Type, length and four reserved bytes.
fn header(kind: u16, length: u16) -> [u8; HEADER_SIZE as usize] {
    let ([k0, k1], [l0, l1]) = (kind.to_le_bytes(), length.to_le_bytes());
    [k0, k1, l0, l1, 0, 0, 0, 0]
}
