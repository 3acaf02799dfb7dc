//! A guest's event log of any content: it is refused with a reason, or compared with others.

use arch::tdx::events::registers;
use arch::tdx::log::{Found, compare, read};
use arch::tdx::measure::Event;

use crate::allocated;

/// What reading may take for each byte of a log, and beside it.
const FOR_EACH_BYTE: usize = 16;
const BESIDE: usize = 4096;
/// The most events that are foretold.
const FORETOLD: usize = 20;

/// Reads a log, and compares it with each other of its own events.
pub fn read_and_compare(content: &[u8]) {
    let (events, taken) = allocated::during(|| read(content));
    assert!(taken <= BESIDE + FOR_EACH_BYTE * content.len(), "{taken} bytes were allocated for {}", content.len());
    let events = match events {
        Ok(events) => events,
        Err(error) => return assert!(!error.to_string().is_empty(), "{error:?} says nothing"),
    };
    assert!(events.iter().all(|event| event.register < 4 && event.what.chars().count() <= 80));
    let foretold: Vec<Event> = events.iter().step_by(2).take(FORETOLD).cloned().collect();
    let compared = compare(&foretold, &events);
    for (events, alone) in [(&foretold, Found::Foretold), (&events, Found::Logged)] {
        let both = |found: Found| found == Found::Both || found == alone;
        let told: Vec<Event> =
            compared.iter().filter(|(_, found)| both(*found)).map(|(event, _)| Event::clone(event)).collect();
        assert_eq!(registers(&told), registers(events));
    }
    // All that was foretold is there.
    assert!(compared.iter().all(|(_, found)| *found != Found::Foretold), "{compared:?}");
}

/// A log whose events have a SHA-384 each, of these registers' numbers, types and data.
pub fn log(events: &[(u32, u32, &[u8])]) -> Vec<u8> {
    let mut log = [&[0, 0, 0, 0, 3, 0, 0, 0][..], &[0; 20], &[33, 0, 0, 0], b"Spec ID Event03\0", &[0; 8]].concat();
    log.extend_from_slice(&[1, 0, 0, 0, 12, 0, 48, 0, 0]);
    for (number, (index, kind, data)) in (1..).zip(events) {
        log.extend([*index, *kind, 1].into_iter().flat_map(u32::to_le_bytes));
        log.extend_from_slice(&[12, 0]);
        log.extend_from_slice(&[number; 48]);
        log.extend_from_slice(&u32::try_from(data.len()).expect("a short text").to_le_bytes());
        log.extend_from_slice(data);
    }
    log
}
