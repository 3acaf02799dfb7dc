//! IGVM files of any content: they are refused with a reason, or what is launched of them lies where it may.

use arch::tdx::LaunchPlan;
use arch::tdx::measure::mrtd;

use crate::allocated;
use crate::seeds::put;

const PAGE: u64 = 4096;
/// Bytes of the fixed header, and where it has its checksum and the place of all other headers.
const FIXED: usize = 24;
const CHECKSUM: usize = 20;
const HEADERS: usize = 8;
/// What taking a file apart may take: a page for each header that has one, twice, and the largest parameters.
const FOR_EACH_BYTE: usize = 1024;
const PARAMETERS: usize = 32 << 20;
/// More pages, in bytes, are not measured.
const MEASURED: u64 = 4 << 20;

/// Takes a file apart, whose checksum is made right, and measures it.
pub fn plan_and_measure(content: &[u8]) {
    let mut file = content.to_vec();
    correct(&mut file);
    let (plan, taken) = allocated::during(|| LaunchPlan::from_igvm(&file));
    assert!(taken <= PARAMETERS + FOR_EACH_BYTE * file.len(), "{taken} bytes were allocated for {}", file.len());
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => return assert!(!error.to_string().is_empty(), "{error:?} says nothing"),
    };
    let mut places: Vec<_> = plan.regions.iter().map(|region| (region.memory.start, region.memory.len)).collect();
    places.sort_unstable();
    for (start, len) in &places {
        assert!(start % PAGE == 0 && *len > 0 && len % PAGE == 0, "{len:#x} bytes at {start:#x}");
    }
    for pair in places.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pair:x?} overlap");
    }
    assert!(plan.regions.iter().all(|region| region.contents.len() as u64 <= region.memory.len));
    if places.iter().map(|(_, len)| len).sum::<u64>() <= MEASURED {
        assert_ne!(mrtd(&plan), [0; 48]);
    }
}

/// Makes a file's length and checksum right, as far as it has them.
fn correct(file: &mut [u8]) {
    if file.len() < FIXED {
        return;
    }
    let len = u32::try_from(file.len()).expect("a short file");
    put(file, CHECKSUM - 4, &len.to_le_bytes());
    put(file, CHECKSUM, &[0; 4]);
    let word = |at: usize| u32::from_le_bytes([file[at], file[at + 1], file[at + 2], file[at + 3]]) as usize;
    let (start, size) = (word(HEADERS), word(HEADERS + 4));
    let Some(headers) = start.checked_add(size).and_then(|end| file.get(start..end)) else { return };
    let sum = checksum(file[..FIXED].iter().chain(headers));
    put(file, CHECKSUM, &sum.to_le_bytes());
}

/// CRC-32 of ISO 3309, bit by bit.
fn checksum<'a>(bytes: impl Iterator<Item = &'a u8>) -> u32 {
    !bytes.fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 })
    })
}

/// A file with these headers, each with its type, and pages behind them.
pub fn file(headers: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let mut all = Vec::new();
    for (kind, body) in headers {
        all.extend_from_slice(&kind.to_le_bytes());
        all.extend_from_slice(&u32::try_from(body.len()).expect("a short header").to_le_bytes());
        all.extend_from_slice(body);
        all.resize(all.len().next_multiple_of(8), 0);
    }
    let size = u32::try_from(all.len()).expect("a few headers");
    let mut file = b"IGVM".to_vec();
    for word in [1, u32::try_from(FIXED).expect("24"), size, 0, 0] {
        file.extend_from_slice(&word.to_le_bytes());
    }
    file.extend(all);
    file.resize(file.len() + 4096, 0x90);
    file
}
