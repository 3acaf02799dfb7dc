//! The panic device: a port by which a guest's kernel says that it has panicked (as QEMU0001 in ACPI).

use std::fmt;
use std::sync::Arc;

use super::{PlatformEvent, PlatformEvents};
use crate::bus::BusDevice;

/// The kernel has panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel has panicked and runs its crash kernel.
const CRASH_LOADED: u8 = 1 << 1;

/// One byte: reading it tells the events that the device knows, writing it reports one.
pub struct PvPanic(Arc<dyn PlatformEvents>);

impl PvPanic {
    /// Length of its range in bytes.
    pub const LEN: u64 = 1;

    /// The device.
    pub fn new(events: Arc<dyn PlatformEvents>) -> Self {
        Self(events)
    }
}

impl fmt::Debug for PvPanic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PvPanic")
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PANICKED | CRASH_LOADED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let events = data.first().copied().unwrap_or(0);
        if events & PANICKED != 0 {
            self.0.event(PlatformEvent::Panicked);
        } else if events & CRASH_LOADED != 0 {
            self.0.event(PlatformEvent::CrashLoaded);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;

    #[test]
    fn tells_what_it_knows_and_reports_only_that() {
        let asked = Asked::new();
        let device = PvPanic::new(asked.clone());
        let mut data = [0];
        device.read(0, &mut data);
        assert_eq!(data, [3]);
        for value in [4, 0x80, 2, 1] {
            device.write(0, &[value]);
        }
        assert_eq!(asked.take(), [PlatformEvent::CrashLoaded, PlatformEvent::Panicked]);
    }
}
