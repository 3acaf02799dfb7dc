//! The metadata of firmware for TDX (Intel TDX Virtual Firmware Design Guide, §11): which parts of the file, and which
//! further memory, belong to a trust domain from the start.
//!
//! Where the descriptor lies is told by a table of GUIDs at the end of the file, which is read backwards. All numbers are
//! little-endian.

use std::ops::Range;

use hal::GpaRange;

use super::super::layout::PAGE_SIZE;

/// Bytes behind the table of GUIDs: the reset vector's.
const BEHIND_TABLE: usize = 0x20;
/// Bytes of an entry beside its data: its length, which counts them, and its GUID.
const ENTRY_SIZE: usize = 18;
/// 96b582de-1fb2-45f7-baea-a366c55a082d, the table's last entry. Its length is the whole table's.
const TABLE_GUID: [u8; 16] =
    [0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d];
/// e47a6535-984a-4798-865e-4685a7bf8ec2: the distance of the descriptor from the end of the file.
const DESCRIPTOR_GUID: [u8; 16] =
    [0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2];
const SIGNATURE: [u8; 4] = *b"TDVF";
const VERSION: u32 = 1;
const HEADER_SIZE: usize = 16;
const SECTION_SIZE: usize = 32;
/// The largest file that is firmware.
const MAX_SIZE: u64 = 64 << 20;
const FOUR_GIB: u64 = 4 << 30;

/// Attributes of a section: its contents are measured (bit 0); its pages are added by the guest, later (bit 1).
const ATTRIBUTE_MEASURED: u32 = 1;
const ATTRIBUTE_LATER: u32 = 1 << 1;

/// Why a file is no firmware for TDX.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TdvfError {
    /// It has another size.
    #[error("it is {0} bytes long: firmware is a whole number of pages of 4096 bytes, and at most 64 MiB")]
    Size(u64),
    /// There is no descriptor.
    #[error(
        "it is not for TDX: it has no {0}; Debian's firmware for TDX is in the package ovmf-inteltdx \
         (/usr/share/ovmf/OVMF.inteltdx.ms.fd)"
    )]
    NoDescriptor(&'static str),
    /// The descriptor is wrong.
    #[error("its TDVF descriptor {0}")]
    Descriptor(String),
    /// A section is wrong.
    #[error("section {number} of its TDVF descriptor {problem}")]
    Section {
        /// Its number, from 0.
        number: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// What a section is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SectionKind {
    /// The firmware's code and data (BFV).
    BootVolume,
    /// Its variables as they are at each start (CFV).
    ConfigurationVolume,
    /// Where the monitor tells of memory (TD HOB).
    HandOff,
    /// Stack, heap and mailbox.
    Temporary,
    /// Pages of an IGVM file, whatever they are for.
    Page,
    /// What the monitor tells those by, as an IGVM file wants it.
    Parameters,
}

impl SectionKind {
    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::BootVolume => "boot volume",
            Self::ConfigurationVolume => "configuration volume",
            Self::HandOff => "hand-off blocks",
            Self::Temporary => "temporary memory",
            Self::Page => "pages",
            Self::Parameters => "parameters",
        }
    }
}

/// A part of a trust domain's first memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// What it is for.
    pub kind: SectionKind,
    /// Its contents in the file; what is missing up to the end of `memory` is zeros.
    pub data: Range<usize>,
    /// Where it lies: whole pages.
    pub memory: GpaRange,
    /// Its contents are a part of the measurement, and not its addresses alone.
    pub measured: bool,
}

/// What a firmware file says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tdvf {
    /// Its sections, in the file's order, which is the order of the measurement.
    pub sections: Vec<Section>,
}

impl Tdvf {
    /// Reads the descriptor of a firmware file. No two sections overlap, those with contents lie in the last bytes below
    /// 4 GiB, where the file appears, and just one is for the monitor's hand-off.
    ///
    /// # Errors
    /// [`TdvfError`] names the section and what was wrong.
    pub fn parse(file: &[u8]) -> Result<Self, TdvfError> {
        let size = file.len() as u64;
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(PAGE_SIZE) {
            return Err(TdvfError::Size(size));
        }
        let descriptor = descriptor(file)?;
        let mut sections = Vec::with_capacity(descriptor.len());
        for (number, words) in descriptor.iter().enumerate() {
            let section = section(words, size).map_err(|problem| TdvfError::Section { number, problem })?;
            sections.push(section);
        }
        check_overlap(&sections)?;
        for (kind, name) in [(SectionKind::HandOff, "TD HOB"), (SectionKind::BootVolume, "boot volume (BFV)")] {
            let count = sections.iter().filter(|section| section.kind == kind).count();
            if count == 0 || count > 1 && kind == SectionKind::HandOff {
                return Err(TdvfError::Descriptor(format!("has {count} sections of the kind {name} instead of one")));
            }
        }
        Ok(Self { sections })
    }

    /// The section in which the monitor tells of memory.
    pub fn hand_off(&self) -> Option<&Section> {
        self.sections.iter().find(|section| section.kind == SectionKind::HandOff)
    }
}

/// The sections as they stand in the file.
fn descriptor(file: &[u8]) -> Result<&[[u8; SECTION_SIZE]], TdvfError> {
    let wrong = |problem: String| TdvfError::Descriptor(problem);
    let distance = descriptor_distance(file)?;
    let start = usize::try_from(distance).ok().and_then(|distance| file.len().checked_sub(distance));
    let descriptor = start
        .and_then(|start| file.get(start..))
        .ok_or_else(|| wrong(format!("lies {distance:#x} bytes before the end, which is before the file's start")))?;
    let (header, rest) =
        descriptor.split_first_chunk::<HEADER_SIZE>().ok_or_else(|| wrong("is cut off by the file's end".into()))?;
    let [signature, length, version, count] = words(header);
    if signature.to_le_bytes() != SIGNATURE {
        return Err(wrong(format!("begins with {signature:#x} instead of \"TDVF\"")));
    }
    if version != VERSION {
        return Err(wrong(format!("has version {version}; version {VERSION} is known")));
    }
    let size = u64::from(count) * SECTION_SIZE as u64;
    if u64::from(length) != HEADER_SIZE as u64 + size {
        return Err(wrong(format!("is said to be {length} bytes long, and to have {count} sections of 32 bytes")));
    }
    let sections = usize::try_from(size).ok().and_then(|size| rest.get(..size));
    let sections = sections.ok_or_else(|| wrong(format!("has {count} sections, which end behind the file's end")))?;
    Ok(sections.as_chunks().0)
}

/// How many bytes before the end of the file the descriptor begins, from the table of GUIDs.
fn descriptor_distance(file: &[u8]) -> Result<u32, TdvfError> {
    const NO_TABLE: TdvfError = TdvfError::NoDescriptor("table of GUIDs at its end");
    let end = file.len().checked_sub(BEHIND_TABLE).ok_or(NO_TABLE)?;
    let mut table = file.get(..end).ok_or(NO_TABLE)?;
    let (rest, length, guid) = last_entry(table).ok_or(NO_TABLE)?;
    if guid != TABLE_GUID {
        return Err(NO_TABLE);
    }
    let entries = length.checked_sub(ENTRY_SIZE).and_then(|entries| rest.len().checked_sub(entries));
    let entries = entries.and_then(|start| rest.get(start..));
    table =
        entries.ok_or_else(|| TdvfError::Descriptor(format!("cannot be found: its table is {length} bytes long")))?;
    while !table.is_empty() {
        let entry = last_entry(table).and_then(|(rest, length, guid)| {
            let (rest, data) = rest.split_at_checked(rest.len().checked_sub(length.checked_sub(ENTRY_SIZE)?)?)?;
            Some((rest, data, guid))
        });
        let (rest, data, guid) =
            entry.ok_or_else(|| TdvfError::Descriptor("cannot be found: an entry of its table is cut off".into()))?;
        if guid == DESCRIPTOR_GUID {
            let distance = data.try_into().map(u32::from_le_bytes);
            return distance
                .map_err(|_| TdvfError::Descriptor(format!("is told of in {} bytes instead of 4", data.len())));
        }
        table = rest;
    }
    Err(TdvfError::NoDescriptor("TDVF entry in the table of GUIDs at its end"))
}

/// What is before the last entry's length, that length, and its GUID.
fn last_entry(table: &[u8]) -> Option<(&[u8], usize, [u8; 16])> {
    let (rest, guid) = table.split_last_chunk::<16>()?;
    let (rest, length) = rest.split_last_chunk::<2>()?;
    Some((rest, u16::from_le_bytes(*length).into(), *guid))
}

/// Reads a section and checks what can be checked of it alone.
fn section(bytes: &[u8; SECTION_SIZE], file_size: u64) -> Result<Section, String> {
    let [offset, raw, start_low, start_high, len_low, len_high, kind, attributes] = words(bytes);
    let wide = |low: u32, high: u32| u64::from(high) << 32 | u64::from(low);
    let memory = GpaRange { start: wide(start_low, start_high), len: wide(len_low, len_high) };
    let kind = match kind {
        0 => SectionKind::BootVolume,
        1 => SectionKind::ConfigurationVolume,
        2 => SectionKind::HandOff,
        3 => SectionKind::Temporary,
        4..=6 => return Err(format!("is of type {kind}, which only td-shim has, and not firmware")),
        _ => return Err(format!("is of type {kind}; 0 to 3 are known")),
    };
    if attributes & !ATTRIBUTE_MEASURED != 0 {
        let what =
            if attributes & ATTRIBUTE_LATER != 0 { "has pages that are to be added later (bit 1)" } else { "is" };
        return Err(format!("{what}: attributes {attributes:#x}; 0 and 1 (measured) are known"));
    }
    let end = memory.start.checked_add(memory.len).filter(|end| memory.len > 0 && *end <= FOUR_GIB);
    let end = end.ok_or_else(|| format!("has {:#x} bytes at {:#x}, not below 4 GiB", memory.len, memory.start))?;
    if !memory.start.is_multiple_of(PAGE_SIZE) || !memory.len.is_multiple_of(PAGE_SIZE) {
        return Err(format!("has {:#x} bytes at {:#x}, which are no whole pages", memory.len, memory.start));
    }
    let from_file = matches!(kind, SectionKind::BootVolume | SectionKind::ConfigurationVolume);
    if from_file != (raw > 0) {
        return Err(format!("has {raw} bytes in the file; only volumes have some, and they must"));
    }
    let data_end = u64::from(offset) + u64::from(raw);
    if from_file && (data_end > file_size || u64::from(raw) > memory.len) {
        let size = memory.len;
        return Err(format!(
            "has {raw:#x} bytes at {offset:#x} in a file of {file_size:#x} bytes, for {size:#x} bytes of memory"
        ));
    }
    if from_file && memory.start < FOUR_GIB - file_size {
        return Err(format!(
            "lies from {:#x} to {end:#x}, and the file's place is its own size below 4 GiB",
            memory.start
        ));
    }
    let data = if from_file { index(u64::from(offset))..index(data_end) } else { 0..0 };
    Ok(Section { kind, data, memory, measured: attributes & ATTRIBUTE_MEASURED != 0 })
}

fn check_overlap(sections: &[Section]) -> Result<(), TdvfError> {
    let mut order: Vec<(usize, GpaRange)> =
        sections.iter().enumerate().map(|(number, section)| (number, section.memory)).collect();
    order.sort_unstable_by_key(|(number, memory)| (memory.start, *number));
    for pair in order.windows(2) {
        if let [(first, below), (number, above)] = *pair
            && below.start + below.len > above.start
        {
            let problem = format!("overlaps section {first} at {:#x}", above.start);
            return Err(TdvfError::Section { number, problem });
        }
    }
    Ok(())
}

/// Little-endian words.
fn words<const BYTES: usize, const WORDS: usize>(bytes: &[u8; BYTES]) -> [u32; WORDS] {
    const { assert!(BYTES == WORDS * 4) };
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks().0) {
        *word = u32::from_le_bytes(*bytes);
    }
    words
}

/// An offset in a file that is in memory.
fn index(offset: u64) -> usize {
    usize::try_from(offset).unwrap_or(usize::MAX)
}
