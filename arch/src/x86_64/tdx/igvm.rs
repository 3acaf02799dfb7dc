//! IGVM files (Independent Guest Virtual Machine, <https://docs.rs/igvm_defs>): the pages of a trust domain as somebody has
//! put them together, in the order of their measurement.

use hal::GpaRange;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader};
use igvm_defs::{IGVM_MAGIC_VALUE, IgvmPlatformType};

use super::super::layout::PAGE_SIZE;
use super::plan::{LaunchPlan, LaunchRegion};
use super::tdvf::SectionKind;

/// The largest file, and the largest part of it that is headers: 65,536 pages.
const MAX_FILE: usize = 256 << 20;
const MAX_HEADERS: usize = 2 << 20;
/// The most bytes that all areas of parameters, and documents, have together.
const MAX_PARAMETERS: u64 = 16 << 20;
/// The fixed header: the offset and the size of all others.
const HEADERS_OFFSET: usize = 8;
const HEADERS_SIZE: usize = 12;
const FIXED_SIZE: usize = 24;
/// A header begins with its type and its length; the next is at a multiple of eight bytes.
const HEADER_START: usize = 8;
const HEADER_ALIGNMENT: usize = 8;
/// Types of headers that name a place in the file, and where in their body: areas of parameters, which begin with their size,
/// pages, processors' registers; and CoRIM documents and signatures, which have their size, too.
const PARAMETER_AREA: u32 = 0x301;
const CORIM: [u32; 2] = [0x104, 0x105];
const CORIM_SIZE: usize = 8;
const REGISTERS: u32 = 0x304;
const PLACES: [(u32, usize); 5] = [(PARAMETER_AREA, 12), (0x302, 12), (REGISTERS, 12), (CORIM[0], 4), (CORIM[1], 4)];
/// No trust domain has memory from here on: the bit that makes an address a shared one.
const ADDRESS_END: u64 = 1 << 51;

/// Why an IGVM file cannot be launched.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum IgvmError {
    /// It is of another format, or too large.
    #[error("it is no IGVM file that can be launched: {0}")]
    File(String),
    /// It is for other platforms.
    #[error("it is not for TDX: it supports {0}; a file for the platform TDX is needed")]
    Platform(String),
    /// What it has at an address cannot be there.
    #[error("{what} at {at:#x} {problem}")]
    Page {
        /// Pages or parameters.
        what: &'static str,
        /// Their address.
        at: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

impl LaunchPlan<'static> {
    /// The plan of an IGVM file, of what it has for TDX.
    ///
    /// # Errors
    /// [`IgvmError`]: what is wrong with it.
    pub fn from_igvm(file: &[u8]) -> Result<Self, IgvmError> {
        check_sizes(file).map_err(|problem| IgvmError::File(problem.to_owned()))?;
        let all = IgvmFile::new_from_binary(file, None).map_err(|error| IgvmError::File(error.to_string()))?;
        let platforms = all.platforms().iter().map(|IgvmPlatformHeader::SupportedPlatform(info)| info);
        let mask = platforms
            .clone()
            .find(|info| info.platform_type == IgvmPlatformType::TDX)
            .map(|info| info.compatibility_mask)
            .ok_or_else(|| {
                let names: Vec<_> = platforms.map(|info| format!("{:?}", info.platform_type)).collect();
                IgvmError::Platform(names.join(", "))
            })?;
        let mut regions = Vec::new();
        let mut areas = Vec::new();
        for directive in all.directives() {
            if directive.compatibility_mask().is_none_or(|other| other & mask != 0) {
                add(directive, &mut regions, &mut areas)?;
            }
        }
        check_places(&regions)?;
        Ok(Self { regions, hand_off: 0 })
    }
}

/// Appends pages, to the last ones where they go on.
fn join(regions: &mut Vec<LaunchRegion<'static>>, next: LaunchRegion<'static>) {
    if let Some(last) = regions.last_mut()
        && (last.kind, last.measured) == (next.kind, next.measured)
        && last.memory.start.checked_add(last.memory.len) == Some(next.memory.start)
    {
        let contents = last.contents.to_mut();
        contents.resize(usize::try_from(last.memory.len).unwrap_or(contents.len()), 0);
        contents.extend_from_slice(&next.contents);
        last.memory.len += next.memory.len;
    } else {
        regions.push(next);
    }
}

/// What can be told of a file's size before anything of it is taken apart.
fn check_sizes(file: &[u8]) -> Result<(), &'static str> {
    let word = |at: usize| file.get(at..)?.first_chunk().map(|word| u32::from_le_bytes(*word));
    if word(0) != Some(IGVM_MAGIC_VALUE) || file.len() < FIXED_SIZE {
        return Err("it does not begin with \"IGVM\"");
    }
    if file.len() > MAX_FILE {
        return Err("it is longer than 256 MiB");
    }
    let size = |at: usize| usize::try_from(word(at).unwrap_or(u32::MAX)).unwrap_or(usize::MAX);
    let (offset, size) = (size(HEADERS_OFFSET), size(HEADERS_SIZE));
    if size > MAX_HEADERS {
        return Err("its headers are longer than 2 MiB");
    }
    let headers = offset.checked_add(size).and_then(|end| file.get(offset..end));
    let mut rest = headers.ok_or("its headers end behind it")?;
    let headers_end = offset + size;
    // What a header names is copied for each that names it.
    let mut copied = 0_u64;
    while let Some((start, behind)) = rest.split_at_checked(HEADER_START) {
        let (kind, length) = start.split_at(4);
        let number = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let kind = number(kind);
        let field = |at: usize| number(behind.get(at..).unwrap_or_default());
        if kind == PARAMETER_AREA {
            copied = copied.saturating_add(behind.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes)));
        } else if CORIM.contains(&kind) {
            copied = copied.saturating_add(field(CORIM_SIZE).into());
        }
        let place = PLACES.iter().find(|(other, _)| *other == kind).map_or(0, |(_, at)| field(*at));
        // None is 0, but for registers, which are always there.
        let data = headers_end..=file.len();
        if (place != 0 || kind == REGISTERS) && usize::try_from(place).is_ok_and(|place| !data.contains(&place)) {
            return Err("a header names a place outside of its data");
        }
        let length = usize::try_from(number(length)).unwrap_or(usize::MAX);
        let next = length.checked_next_multiple_of(HEADER_ALIGNMENT).unwrap_or(usize::MAX);
        rest = behind.get(next..).unwrap_or_default();
    }
    if copied > MAX_PARAMETERS {
        return Err("its parameters and documents take more than 16 MiB");
    }
    Ok(())
}

/// Adds what a directive has the loader add. `areas` are the sizes of the areas of parameters so far, by their index.
fn add(
    directive: &IgvmDirectiveHeader,
    regions: &mut Vec<LaunchRegion<'static>>,
    areas: &mut Vec<(u32, u64)>,
) -> Result<(), IgvmError> {
    match directive {
        IgvmDirectiveHeader::PageData { gpa, flags, data, .. } if !flags.shared() => {
            if flags.is_2mb_page() {
                return Err(IgvmError::Page { what: "a page", at: *gpa, problem: "is one of 2 MiB" });
            }
            let region = LaunchRegion {
                kind: SectionKind::Page,
                memory: GpaRange { start: *gpa, len: PAGE_SIZE },
                contents: data.clone().into(),
                measured: !flags.unmeasured(),
            };
            join(regions, region);
        }
        IgvmDirectiveHeader::ParameterArea { number_of_bytes, parameter_area_index, .. } => {
            areas.push((*parameter_area_index, *number_of_bytes));
        }
        IgvmDirectiveHeader::ParameterInsert(insert) => {
            let area = areas.iter().find(|(index, _)| *index == insert.parameter_area_index);
            let Some((_, len)) = area.filter(|(_, len)| *len > 0) else {
                return Err(IgvmError::Page { what: "parameters", at: insert.gpa, problem: "have no area" });
            };
            regions.push(LaunchRegion {
                kind: SectionKind::Parameters,
                memory: GpaRange { start: insert.gpa, len: *len },
                contents: Vec::new().into(),
                measured: false,
            });
        }
        _ => {}
    }
    Ok(())
}

fn check_places(regions: &[LaunchRegion]) -> Result<(), IgvmError> {
    let mut places: Vec<_> = regions.iter().map(|region| (region.memory, region.kind.name())).collect();
    places.sort_unstable_by_key(|(memory, _)| memory.start);
    let mut end = 0;
    for (memory, what) in places {
        let problem = |problem| Err(IgvmError::Page { what, at: memory.start, problem });
        if !memory.start.is_multiple_of(PAGE_SIZE) || !memory.len.is_multiple_of(PAGE_SIZE) {
            return problem("are no whole pages");
        }
        if memory.start < end {
            return problem("lie where there are others already");
        }
        end = match memory.start.checked_add(memory.len) {
            Some(end) if end <= ADDRESS_END => end,
            _ => return problem("lie where no trust domain has memory"),
        };
    }
    Ok(())
}
