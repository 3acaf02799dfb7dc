//! The keyboard controller's reset line: all that is left of it, for platforms whose guests reset by it.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vm_superio::{I8042Device, Trigger};

use super::{PlatformEvent, PlatformEvents};
use crate::bus::BusDevice;

struct Reset(Arc<dyn PlatformEvents>);

impl Trigger for Reset {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.event(PlatformEvent::Reset);
        Ok(())
    }
}

/// A keyboard controller without a keyboard, for ports 0x60 to 0x64. The command 0xfe resets the machine.
pub struct I8042(Mutex<I8042Device<Reset>>);

impl I8042 {
    /// Length of its range in bytes.
    pub const LEN: u64 = 5;

    /// The device.
    pub fn new(events: Arc<dyn PlatformEvents>) -> Self {
        Self(Mutex::new(I8042Device::new(Reset(events))))
    }
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("I8042")
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.lock().unwrap_or_else(PoisonError::into_inner).read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let mut device = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Its only error is the trigger's, which has none.
            let _ = device.write(offset, *byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::Asked;
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let asked = Asked::new();
        let device = I8042::new(asked.clone());
        device.write(0, &[0xfe]);
        device.write(4, &[0xff]);
        device.write(4, &[0xfe, 0xfe]);
        assert_eq!(asked.take(), []);
        device.write(4, &[0xfe]);
        assert_eq!(asked.take(), [PlatformEvent::Reset]);
    }
}
