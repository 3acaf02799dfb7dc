//! The debug-exit port, by which a test guest ends its run with a value.

use std::fmt;
use std::sync::Arc;

use super::{PlatformEvent, PlatformEvents};
use crate::bus::BusDevice;

/// A register of four bytes; a write of up to that many is the value.
pub struct DebugExit(Arc<dyn PlatformEvents>);

impl DebugExit {
    /// Length of its range in bytes.
    pub const LEN: u64 = 4;

    /// The device.
    pub fn new(events: Arc<dyn PlatformEvents>) -> Self {
        Self(events)
    }
}

impl fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DebugExit")
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        let value = data.iter().take(4).rev().fold(0, |value, byte| value << 8 | u32::from(*byte));
        self.0.event(PlatformEvent::DebugExit(value));
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;

    #[test]
    fn a_write_of_any_width_is_the_value() {
        let asked = Asked::new();
        let device = DebugExit::new(asked.clone());
        device.write(0, &[0x2a]);
        device.write(0, &[1, 2, 3, 4]);
        assert_eq!(asked.take(), [PlatformEvent::DebugExit(0x2a), PlatformEvent::DebugExit(0x0403_0201)]);
    }
}
