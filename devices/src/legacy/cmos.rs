//! The real-time clock of a PC, as far as firmware reads it: the host's date and time in UTC (Motorola MC146818A).
//!
//! What is written is not kept, but for the index of the register that is read next: no alarm, no interrupt, no memory.
//!
//! ```text
//!   0 index   1 data
//! ```

use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

const DATA: u64 = 1;
/// Bits of the index; the upper one masks an interrupt that there is not.
const INDEX_MASK: u8 = 0x7f;
/// Register A: the divider of a clock that runs, and no update in progress.
const STATUS_A: u8 = 0x26;
/// Register B: hours from 0 to 23, all numbers binary coded decimals.
const STATUS_B: u8 = 0x02;
/// Register D: the clock has not been without power.
const STATUS_D: u8 = 0x80;
const SECONDS_OF_DAY: u64 = 86_400;

/// The clock.
#[derive(Debug, Default)]
pub struct Cmos {
    index: AtomicU8,
}

impl Cmos {
    /// Length of its range in bytes.
    pub const LEN: u64 = 2;
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (DATA, [byte]) = (offset, data) {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
            *byte = register(self.index.load(Ordering::Relaxed), now);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, [index]) = (offset, data) {
            self.index.store(index & INDEX_MASK, Ordering::Relaxed);
        }
    }
}

/// A register at a time in seconds since 1970.
fn register(index: u8, now: u64) -> u8 {
    let (days, second) = (now / SECONDS_OF_DAY, now % SECONDS_OF_DAY);
    let (year, month, day) = date(days);
    let number = match index {
        0x00 => second % 60,
        0x02 => second / 60 % 60,
        0x04 => second / 3600,
        // 1970 began on a Thursday, and the week begins on Sunday, with 1.
        0x06 => (days + 4) % 7 + 1,
        0x07 => day,
        0x08 => month,
        0x09 => year % 100,
        0x32 => year / 100,
        0x0a => return STATUS_A,
        0x0b => return STATUS_B,
        0x0d => return STATUS_D,
        _ => return 0,
    };
    u8::try_from(number / 10 % 10 * 16 + number % 10).unwrap_or(0)
}

/// Year, month and day of the Gregorian calendar, of days since 1970. It counts from a first of March, so that a leap day
/// is the last of its year: 400 years have 146,097 days, and five months from March or August on have 153.
fn date(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let (day, month, later) =
        (day - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 }, u64::from(month >= 10));
    (era * 400 + year + later, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (days, expected) in [
            (0, (1970, 1, 1)),
            (11_016, (2000, 2, 29)),
            (11_017, (2000, 3, 1)),
            (19_722, (2023, 12, 31)),
            (19_723, (2024, 1, 1)),
            (47_540, (2100, 2, 28)),
            (47_541, (2100, 3, 1)),
        ] {
            assert_eq!(date(days), expected, "day {days}");
        }
    }

    #[test]
    fn numbers_are_decimal_digits() {
        // 2026-11-27 (a Friday) 23:59:58.
        let now = 1_795_823_998;
        let registers = [0x00, 0x02, 0x04, 0x06, 0x07, 0x08, 0x09, 0x32].map(|index| register(index, now));
        assert_eq!(registers, [0x58, 0x59, 0x23, 6, 0x27, 0x11, 0x26, 0x20]);
        assert_eq!([0x0a, 0x0b, 0x0c, 0x0d, 0x34].map(|index| register(index, now)), [0x26, 2, 0, 0x80, 0]);
    }

    #[test]
    fn the_index_chooses_what_is_read() {
        let clock = Cmos::default();
        let mut data = [0];
        clock.write(0, &[0x8d]);
        clock.write(1, &[0]);
        clock.read(DATA, &mut data);
        assert_eq!(data, [STATUS_D]);
        clock.read(0, &mut data);
        assert_eq!(data, [0xff]);
    }
}
