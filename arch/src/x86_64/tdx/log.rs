//! What a guest's firmware and kernel say that they have extended a trust domain's registers with: the event log that Linux
//! shows as `/sys/firmware/acpi/tables/data/CCEL` (TCG PC Client Platform Firmware Profile, §10.2; ACPI 6.5, §5.2.34). All
//! numbers are little-endian. A log is a claim: only registers of a quote say whether it is true.

use super::events::EV_EFI_VARIABLES;
use super::measure::{Digest384, Event};

/// The largest log that is read, in bytes.
pub const MAX_LOG: usize = 1 << 20;

/// The first event is of an older form: register, type, a SHA-1, the length of what is behind them.
const FIRST_HEAD: usize = 32;
const FIRST_LENGTH: usize = 28;
const NO_ACTION: u32 = 3;
/// What it holds: a signature, and behind 24 bytes the digests that each event has, as pairs of algorithm and length.
const SIGNATURE: &[u8] = b"Spec ID Event03\0";
const ALGORITHMS: usize = 24;
/// SHA-384.
const SHA384: u16 = 0xc;
/// What fills the rest of the memory that a log may take.
const FILLERS: [[u8; 4]; 2] = [[0; 4], [0xff; 4]];
/// In a variable's data, behind its vendor: the lengths of name, in characters, and contents.
const NAME_LENGTH: usize = 16;
const NAME: usize = 32;
/// The most characters that are told of an event.
const MAX_TEXT: usize = 80;

/// Why a log cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum LogError {
    /// It is something else.
    #[error(
        "it is no event log of a trust domain: it does not begin with \"Spec ID Event03\" and the lengths of digests, \
         SHA-384 among them; Linux has the log as /sys/firmware/acpi/tables/data/CCEL"
    )]
    Header,
    /// One of its events.
    #[error("its event {number}, at byte {at}, {problem}")]
    Event {
        /// Its number, from 1 on.
        number: usize,
        /// Where it begins.
        at: usize,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Reads a log: the events that were extended, in their order.
///
/// # Errors
/// [`LogError`].
pub fn read(log: &[u8]) -> Result<Vec<Event>, LogError> {
    let (algorithms, mut rest) = header(log).ok_or(LogError::Header)?;
    let mut events = Vec::new();
    let mut number = 1;
    while !rest.is_empty() && !FILLERS.iter().any(|filler| rest.starts_with(filler)) {
        let at = log.len() - rest.len();
        let wrong = |problem| LogError::Event { number, at, problem };
        let (register, kind) = (number_at(rest, 0), number_at(rest, 4));
        let (digest, data, next) = body(rest, &algorithms).ok_or_else(|| wrong("is cut off, or has other digests"))?;
        // 0 is MRTD, which no event extends.
        let register = register.and_then(|register| u8::try_from(register).ok()?.checked_sub(1));
        let register = register.filter(|register| *register < 4).ok_or_else(|| wrong("is of no register"))?;
        let kind = kind.unwrap_or_default();
        if kind != NO_ACTION {
            events.push(Event { register, kind, what: describe(kind, data).into(), digest });
        }
        rest = next;
        number += 1;
    }
    Ok(events)
}

/// An algorithm, and how many bytes its digests have.
type Algorithm = (u16, usize);

/// The algorithms of digests, and what is behind the first event.
fn header(log: &[u8]) -> Option<(Vec<Algorithm>, &[u8])> {
    let length = usize::try_from(number_at(log, FIRST_LENGTH)?).ok()?;
    let (first, rest) = log.get(FIRST_HEAD..)?.split_at_checked(length)?;
    if number_at(log, 4)? != NO_ACTION || !first.starts_with(SIGNATURE) {
        return None;
    }
    let count = usize::try_from(number_at(first, ALGORITHMS)?).ok()?;
    let pairs = first.get(ALGORITHMS + 4..)?.get(..count.checked_mul(4)?)?;
    let half = |bytes: &[u8]| bytes.first_chunk().map_or(0, |two| u16::from_le_bytes(*two));
    let algorithms: Vec<_> = pairs.chunks_exact(4).map(|pair| (half(pair), usize::from(half(&pair[2..])))).collect();
    algorithms.contains(&(SHA384, size_of::<Digest384>())).then_some((algorithms, rest))
}

/// The SHA-384 of an event, its data, and what is behind it.
fn body<'a>(event: &'a [u8], algorithms: &[Algorithm]) -> Option<(Digest384, &'a [u8], &'a [u8])> {
    let count = number_at(event, 8)?;
    let mut rest = event.get(12..)?;
    let mut sha384 = None;
    for _ in 0..count {
        let (algorithm, behind) = rest.split_first_chunk()?;
        let algorithm = u16::from_le_bytes(*algorithm);
        let (_, length) = algorithms.iter().find(|(other, _)| *other == algorithm)?;
        let (digest, behind) = behind.split_at_checked(*length)?;
        if algorithm == SHA384 {
            sha384 = digest.try_into().ok();
        }
        rest = behind;
    }
    let length = usize::try_from(number_at(rest, 0)?).ok()?;
    let (data, next) = rest.get(4..)?.split_at_checked(length)?;
    Some((sha384?, data, next))
}

/// What an event says that it is of: a variable's name, or the longest text in its data.
fn describe(kind: u32, data: &[u8]) -> String {
    if EV_EFI_VARIABLES.contains(&kind)
        && let Some(length) = number_at(data, NAME_LENGTH).and_then(|length| usize::try_from(length).ok())
        && let Some(name) = length.checked_mul(2).and_then(|length| data.get(NAME..)?.get(..length))
    {
        let units = name.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
        let name =
            char::decode_utf16(units).map(|unit| unit.ok().filter(|unit| unit.is_ascii_graphic()).unwrap_or('?'));
        return name.take(MAX_TEXT).collect();
    }
    let texts = data.split(|byte| !byte.is_ascii_graphic() && *byte != b' ');
    let longest = texts.max_by_key(|text| text.len()).unwrap_or_default();
    longest.iter().take(MAX_TEXT).map(|byte| char::from(*byte)).collect()
}

fn number_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes))
}

/// Where an event was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It was foretold, and is in the log.
    Both,
    /// It was foretold, and is not in the log, or not in that place.
    Foretold,
    /// It is in the log, and was not foretold.
    Logged,
}

/// The events of RTMR0 to 2, register by register, with where they were found: the fewest that one of the two has alone.
pub fn compare<'a>(foretold: &'a [Event], logged: &'a [Event]) -> Vec<(&'a Event, Found)> {
    let of = |events: &'a [Event], register| -> Vec<&'a Event> {
        events.iter().filter(|event| event.register == register).collect()
    };
    (0..3).flat_map(|register| align(&of(foretold, register), &of(logged, register))).collect()
}

/// Two lists as one, by their longest common part.
fn align<'a>(foretold: &[&'a Event], logged: &[&'a Event]) -> Vec<(&'a Event, Found)> {
    let same = |one: &Event, other: &Event| (one.kind, one.digest) == (other.kind, other.digest);
    // How many events are common to what is behind each pair of places.
    let width = logged.len() + 1;
    let mut common = vec![0_u32; (foretold.len() + 1) * width];
    for (row, one) in foretold.iter().enumerate().rev() {
        for (column, other) in logged.iter().enumerate().rev() {
            let at = row * width + column;
            common[at] =
                if same(one, other) { common[at + width + 1] + 1 } else { common[at + width].max(common[at + 1]) };
        }
    }
    let (mut row, mut column, mut all) = (0, 0, Vec::new());
    loop {
        let at = row * width + column;
        match (foretold.get(row), logged.get(column)) {
            (Some(one), Some(other)) if same(one, other) => {
                all.push((*one, Found::Both));
                (row, column) = (row + 1, column + 1);
            }
            (Some(one), other) if other.is_none() || common[at + width] >= common[at + 1] => {
                all.push((*one, Found::Foretold));
                row += 1;
            }
            (_, Some(other)) => {
                all.push((*other, Found::Logged));
                column += 1;
            }
            _ => return all,
        }
    }
}
