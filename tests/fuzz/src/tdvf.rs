//! Firmware for trust domains, of any content: it is refused with a reason, or what is launched of it lies where it may.

use arch::tdx::measure::{first_events, mrtd};
use arch::tdx::{LaunchPlan, SectionKind, Tdvf};

use crate::allocated;
use crate::seeds::put;

const PAGE: usize = 4096;
const FOUR_GIB: u64 = 4 << 30;
/// What reading may take beside the file, for each byte of it: a section's description is larger here than in the file.
const FOR_EACH_BYTE: usize = 4;
/// More pages, in bytes, are not measured: it takes long, and is the same for each.
const MEASURED: u64 = 4 << 20;

/// Plans the launch of a file that ends with `content`, for a guest of `mib` MiB of memory, and measures it.
pub fn plan_and_measure(mib: u8, content: &[u8]) {
    let mut file = vec![0; content.len().next_multiple_of(PAGE) - content.len()];
    file.extend_from_slice(content);
    let (tdvf, taken) = allocated::during(|| Tdvf::parse(&file));
    assert!(taken <= PAGE + FOR_EACH_BYTE * file.len(), "{taken} bytes were allocated for {}", file.len());
    let tdvf = match tdvf {
        Ok(tdvf) => tdvf,
        Err(error) => return assert!(!error.to_string().is_empty(), "{error:?} says nothing"),
    };
    for (number, section) in tdvf.sections.iter().enumerate() {
        let (start, end) = (section.memory.start, section.memory.start + section.memory.len);
        assert!(start < end && end <= FOUR_GIB, "section {number} lies from {start:#x} to {end:#x}");
        assert!(section.data.len() as u64 <= section.memory.len && file.get(section.data.clone()).is_some());
        for other in tdvf.sections.iter().take(number) {
            let apart = other.memory.start >= end || other.memory.start + other.memory.len <= start;
            assert!(apart, "section {number} lies where another does");
        }
    }

    let ram = arch::layout::ram_ranges(u64::from(mib) << 20);
    let Ok(plan) = LaunchPlan::from_firmware(&file, &ram) else { return };
    for region in &plan.regions {
        let (start, end) = (region.memory.start, region.memory.start + region.memory.len);
        let own = matches!(region.kind, SectionKind::BootVolume | SectionKind::ConfigurationVolume);
        let in_file = start >= FOUR_GIB - file.len() as u64;
        let in_ram = ram.iter().any(|ram| ram.start <= start && end <= ram.start + ram.len);
        assert!(if own { in_file } else { in_ram }, "{:?} from {start:#x} to {end:#x}", region.kind);
        assert!(region.contents.len() as u64 <= region.memory.len);
    }
    assert!(plan.measured_hand_off().len() >= 56, "the hand-off blocks are not even begun");
    if plan.regions.iter().map(|region| region.memory.len).sum::<u64>() <= MEASURED {
        assert_ne!(mrtd(&plan), [0; 48]);
        assert!(!first_events(&plan).is_empty());
    }
}

/// A section: its place in the file, its place in memory, type, attributes.
pub type Section = (u32, u32, u64, u64, u32, u32);

/// A firmware file of four pages with these sections.
pub fn firmware(sections: &[Section]) -> Vec<u8> {
    let mut file = vec![0x90; 4 * PAGE];
    let descriptor = 2 * PAGE;
    let count = u32::try_from(sections.len()).expect("a few");
    put(&mut file, descriptor, b"TDVF");
    for (at, word) in (4..).step_by(4).zip([16 + 32 * count, 1, count]) {
        put(&mut file, descriptor + at, &word.to_le_bytes());
    }
    for (number, (offset, raw, start, len, kind, attributes)) in sections.iter().enumerate() {
        let at = descriptor + 16 + 32 * number;
        put(&mut file, at, &[offset.to_le_bytes(), raw.to_le_bytes()].concat());
        put(&mut file, at + 8, &[start.to_le_bytes(), len.to_le_bytes()].concat());
        put(&mut file, at + 24, &[kind.to_le_bytes(), attributes.to_le_bytes()].concat());
    }
    let end = file.len() - 0x20;
    put(&mut file, end - 16, b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d");
    put(&mut file, end - 18, &40_u16.to_le_bytes());
    put(&mut file, end - 34, b"\x35\x65\x7a\xe4\x4a\x98\x98\x47\x86\x5e\x46\x85\xa7\xbf\x8e\xc2");
    put(&mut file, end - 36, &22_u16.to_le_bytes());
    let distance = u32::try_from(file.len() - descriptor).expect("a small file");
    put(&mut file, end - 40, &distance.to_le_bytes());
    file
}
