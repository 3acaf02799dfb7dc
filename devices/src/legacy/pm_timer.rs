//! What firmware uses of a chipset's power management registers: the timer by which it waits, and the register by which it
//! switches the machine off when an operating system asks it to (Intel I/O Controller Hub 9 datasheet, §13.8.3).
//!
//! ```text
//!   4 PM1 control, two bytes   8 PM timer, four bytes, read only
//! ```

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::{PlatformEvent, PlatformEvents};
use crate::bus::BusDevice;

const CONTROL: u64 = 4;
const TIMER: u64 = 8;
/// PM1 control: enter the sleep state, of which there is one, off.
const SLEEP_ENABLE: u8 = 1 << 5;
/// The timer's ticks in a second, and the bits that it has (ACPI 6.5 §4.8.2.1).
const FREQUENCY: u128 = 3_579_545;
const TIMER_MASK: u128 = 0xff_ffff;

/// The registers, for firmware alone: no table tells an operating system of them.
pub struct PmTimer {
    platform: Arc<dyn PlatformEvents>,
    start: Instant,
}

impl PmTimer {
    /// Length of their range in bytes.
    pub const LEN: u64 = 12;

    /// The registers; the timer begins at zero.
    pub fn new(platform: Arc<dyn PlatformEvents>) -> Self {
        Self { platform, start: Instant::now() }
    }
}

impl fmt::Debug for PmTimer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PmTimer").field("start", &self.start).finish_non_exhaustive()
    }
}

impl BusDevice for PmTimer {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == TIMER {
            let ticks = self.start.elapsed().as_nanos() * FREQUENCY / 1_000_000_000;
            let ticks = ticks & TIMER_MASK;
            data.iter_mut().zip(ticks.to_le_bytes()).for_each(|(to, from)| *to = from);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (CONTROL, [_, high]) = (offset, data)
            && high & SLEEP_ENABLE != 0
        {
            self.platform.event(PlatformEvent::Shutdown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;

    #[test]
    fn the_timer_goes_on_with_the_hosts_clock() {
        let timer = PmTimer::new(Asked::new());
        let ticks = || {
            let mut data = [0xff; 4];
            timer.read(TIMER, &mut data);
            u32::from_le_bytes(data)
        };
        // Read between two readings of the host's clock, which may lie far apart where the test is not the only one to run.
        let mut last = 0;
        while last < FREQUENCY / 1000 {
            let clock = || timer.start.elapsed().as_nanos() * FREQUENCY / 1_000_000_000;
            let (before, now, after) = (clock(), ticks().into(), clock());
            assert!((before..=after).contains(&now), "{now} is not within {before} and {after}");
            last = now;
        }
        assert!(ticks() <= 0xff_ffff);
    }

    #[test]
    fn it_switches_off_when_it_is_told_to_sleep() {
        let asked = Asked::new();
        let timer = PmTimer::new(asked.clone());
        timer.write(CONTROL, &[1, 0]);
        timer.write(CONTROL, &[0x20]);
        timer.write(TIMER, &[0, 0x20]);
        assert_eq!(asked.take(), []);
        timer.write(CONTROL, &[1, 0x20]);
        assert_eq!(asked.take(), [PlatformEvent::Shutdown]);
    }
}
