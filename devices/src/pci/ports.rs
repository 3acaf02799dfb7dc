//! Configuration accesses through I/O ports (PCI 3.0 §3.2.2.3.2), and the reset register between them. Firmware uses them
//! before it knows where ECAM lies, and for a reset.
//!
//! ```text
//!   0 address, four bytes   1 reset control, a byte   4 to 7 data
//! ```

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::PciSegment;
use crate::bus::BusDevice;
use crate::legacy::{PlatformEvent, PlatformEvents};

const ADDRESS: u64 = 0;
const RESET: u64 = 1;
const DATA: u64 = 4;
/// Address: an access to the data port goes to configuration space.
const ENABLED: u32 = 1 << 31;
/// Bits of the address that are bus, device, function and register, the latter a multiple of four.
const ADDRESS_MASK: u32 = 0x00ff_fffc;
/// Reset control: now.
const RESET_CPU: u8 = 1 << 2;

/// The ports 0xcf8 to 0xcff.
pub struct ConfigPorts {
    segment: Arc<PciSegment>,
    platform: Arc<dyn PlatformEvents>,
    address: AtomicU32,
}

impl fmt::Debug for ConfigPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigPorts").field("address", &self.address).finish_non_exhaustive()
    }
}

impl ConfigPorts {
    /// Length of their range in bytes.
    pub const LEN: u64 = 8;

    /// The ports of a segment.
    pub fn new(segment: Arc<PciSegment>, platform: Arc<dyn PlatformEvents>) -> Self {
        Self { segment, platform, address: AtomicU32::new(0) }
    }

    /// The place in ECAM of an access of `len` bytes at `offset` from the first port, where it goes to configuration space.
    fn place(&self, offset: u64, len: usize) -> Option<u64> {
        let address = self.address.load(Ordering::Relaxed);
        let within = offset.checked_sub(DATA).filter(|within| *within < 4)?;
        let aligned = matches!(len, 1 | 2 | 4) && within.is_multiple_of(u64::try_from(len).ok()?);
        let (function, register) = (u64::from(address & ADDRESS_MASK) >> 8, u64::from(address & 0xfc));
        (address & ENABLED != 0 && aligned).then_some(function << 12 | register | within)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let ecam = self.place(offset, data.len()).filter(|place| *place < self.segment.ecam_len());
        match (offset, data.len(), ecam) {
            (ADDRESS, 4, _) => data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes()),
            (_, _, Some(place)) => self.segment.read(place, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (ADDRESS, [a, b, c, d]) => self.address.store(u32::from_le_bytes([*a, *b, *c, *d]), Ordering::Relaxed),
            (RESET, [control]) if control & RESET_CPU != 0 => self.platform.event(PlatformEvent::Reset),
            _ => {
                if let Some(place) = self.place(offset, data.len()).filter(|place| *place < self.segment.ecam_len()) {
                    self.segment.write(place, data);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Address, PlatformFunction, Windows};
    use super::*;
    use crate::bus::Bus;
    use crate::legacy::testing::Asked;

    fn ports() -> (Arc<Asked>, ConfigPorts) {
        let windows = Windows { low: 0xf000_0000..0xfc00_0000, high: 1 << 32..1 << 40 };
        let segment = Arc::new(PciSegment::new(Arc::new(Bus::new()), windows));
        segment.add(Arc::new(PlatformFunction::q35_host_bridge(0xe000_0000))).unwrap();
        let lpc = Arc::new(PlatformFunction::ich9_lpc(0x600));
        segment.add_at(Address { device: 31, function: 0 }, lpc).unwrap();
        let asked = Asked::new();
        (asked.clone(), ConfigPorts::new(segment, asked))
    }

    fn read(ports: &ConfigPorts, address: u32, offset: u64, len: usize) -> Vec<u8> {
        ports.write(ADDRESS, &address.to_le_bytes());
        let mut data = vec![0xee; len];
        ports.read(offset, &mut data);
        data
    }

    #[test]
    fn accesses_go_to_the_function_and_register_of_the_address() {
        let (_, ports) = ports();
        assert_eq!(read(&ports, ENABLED, 4, 4), [0x86, 0x80, 0xc0, 0x29]);
        assert_eq!(read(&ports, ENABLED, 6, 2), [0xc0, 0x29]);
        assert_eq!(read(&ports, ENABLED | 31 << 11 | 0x40, 5, 1), [6]);
        assert_eq!(read(&ports, ENABLED, 0, 4), ENABLED.to_le_bytes());
        ports.write(ADDRESS, &(ENABLED | 31 << 11 | 0x3c).to_le_bytes());
        ports.write(DATA, &[7]);
        assert_eq!(read(&ports, ENABLED | 31 << 11 | 0x3c, 4, 1), [7]);
    }

    #[test]
    fn what_is_nowhere_reads_as_ones() {
        let (_, ports) = ports();
        for (address, offset, len) in [
            (0, 4, 4),
            (ENABLED | 1 << 16, 4, 4),
            (ENABLED | 2 << 11, 4, 2),
            (ENABLED, 5, 2),
            (ENABLED, 0, 1),
            (0, 1, 1),
        ] {
            assert_eq!(read(&ports, address, offset, len), vec![0xff; len], "{address:#x} {offset} {len}");
        }
        ports.write(ADDRESS, &(ENABLED | 0xff << 16).to_le_bytes());
        ports.write(DATA, &[0; 4]);
        ports.write(5, &[0; 4]);
    }

    #[test]
    fn only_bit_2_of_reset_control_resets() {
        let (asked, ports) = ports();
        for control in [[0], [2], [0xfb]] {
            ports.write(RESET, &control);
        }
        assert_eq!(asked.take(), []);
        ports.write(RESET, &[6]);
        assert_eq!(asked.take(), [PlatformEvent::Reset]);
    }
}
