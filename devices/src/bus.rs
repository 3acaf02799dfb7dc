//! The address map of a machine's I/O ports or of its memory-mapped registers: which device answers where.
//!
//! Readers take no lock: they look into a map that never changes, and a change puts another map in its place. A
//! device may therefore change the bus that it is being called through, as a PCI function does when its registers
//! move.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;

/// A device that answers to a range of addresses.
pub trait BusDevice: Send + Sync {
    /// Reads `data.len()` bytes (1 to 8) at `offset` from the start of the device's range, little-endian. The access
    /// lies within the range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Writes, under the same bounds.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device cannot have a range of addresses.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Another device has part of the range.
    #[error("addresses {base:#x} to {last:#x} overlap a device at {other:#x}")]
    Overlap {
        /// First address wanted.
        base: u64,
        /// Last address wanted.
        last: u64,
        /// First address of the other device.
        other: u64,
    },
    /// A range of no length, or beyond the end of the address space.
    #[error("{len:#x} addresses from {base:#x} are no range")]
    Range {
        /// First address wanted.
        base: u64,
        /// Length wanted.
        len: u64,
    },
    /// No device starts at this address.
    #[error("no device starts at {base:#x}")]
    Absent {
        /// The address.
        base: u64,
    },
}

#[derive(Clone)]
struct Entry {
    base: u64,
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// An address map. Unclaimed addresses, and accesses across the end of a device, read as all ones and ignore
/// writes.
#[derive(Default)]
pub struct Bus {
    /// Sorted by address; ranges do not overlap.
    map: ArcSwap<Vec<Entry>>,
    /// Held while one map is made from another.
    changing: Mutex<()>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let map = self.map.load();
        let ranges = map.iter().map(|entry| (entry.base, entry.last));
        f.debug_list().entries(ranges).finish()
    }
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives `device` the `len` addresses from `base`.
    ///
    /// # Errors
    /// [`Error::Overlap`] and [`Error::Range`].
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let _changing = self.lock();
        let mut map = Vec::clone(&self.map.load());
        insert(&mut map, base, len, device)?;
        self.map.store(Arc::new(map));
        Ok(())
    }

    /// Takes the device that starts at `base` off the bus. A call into it that another thread began before may
    /// still be under way.
    ///
    /// # Errors
    /// [`Error::Absent`].
    pub fn remove(&self, base: u64) -> Result<Arc<dyn BusDevice>, Error> {
        let _changing = self.lock();
        let mut map = Vec::clone(&self.map.load());
        let entry = remove(&mut map, base)?;
        self.map.store(Arc::new(map));
        Ok(entry.device)
    }

    /// Reads from the device at `address`. False, and all ones, where there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let map = self.map.load();
        let Some(entry) = find(&map, address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        entry.device.read(address - entry.base, data);
        true
    }

    /// Writes to the device at `address`. False where there is none.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let map = self.map.load();
        let Some(entry) = find(&map, address, data.len()) else {
            return false;
        };
        entry.device.write(address - entry.base, data);
        true
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // It guards no data that a panic could leave half changed.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn find(map: &[Entry], address: u64, len: usize) -> Option<&Entry> {
    let after = map.partition_point(|entry| entry.base <= address);
    let entry = map.get(after.checked_sub(1)?)?;
    let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
    (last <= entry.last).then_some(entry)
}

fn insert(map: &mut Vec<Entry>, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
    let last = len.checked_sub(1).and_then(|most| base.checked_add(most)).ok_or(Error::Range { base, len })?;
    let at = map.partition_point(|entry| entry.last < base);
    match map.get(at) {
        Some(other) if other.base <= last => Err(Error::Overlap { base, last, other: other.base }),
        _ => {
            map.insert(at, Entry { base, last, device });
            Ok(())
        }
    }
}

fn remove(map: &mut Vec<Entry>, base: u64) -> Result<Entry, Error> {
    match map.binary_search_by_key(&base, |entry| entry.base) {
        Ok(at) => Ok(map.remove(at)),
        Err(_) => Err(Error::Absent { base }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads as its own number in every byte, and keeps the last write.
    struct Stub(u8, Mutex<Option<(u64, Vec<u8>)>>);

    impl BusDevice for Stub {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0.wrapping_add(u8::try_from(offset).unwrap()));
        }

        fn write(&self, offset: u64, data: &[u8]) {
            *self.1.lock().unwrap() = Some((offset, data.to_vec()));
        }
    }

    fn stub(number: u8) -> Arc<Stub> {
        Arc::new(Stub(number, Mutex::new(None)))
    }

    fn read(bus: &Bus, address: u64, len: usize) -> Option<Vec<u8>> {
        let mut data = vec![0; len];
        let claimed = bus.read(address, &mut data);
        if !claimed {
            assert!(data.iter().all(|byte| *byte == 0xff));
        }
        claimed.then_some(data)
    }

    #[test]
    fn finds_the_device_of_an_address() {
        let bus = Bus::new();
        let device = stub(1);
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        bus.insert(0x110, 0x10, stub(0x40)).unwrap();
        assert_eq!(read(&bus, 0x102, 2), Some(vec![3, 3]));
        assert_eq!(read(&bus, 0x110, 1), Some(vec![0x40]));
        assert_eq!(read(&bus, 0xff, 1), None);
        assert_eq!(read(&bus, 0x120, 1), None);
        assert!(bus.write(0x10f, &[7]));
        assert_eq!(*device.1.lock().unwrap(), Some((0xf, vec![7])));
    }

    #[test]
    fn refuses_what_crosses_a_devices_end() {
        let bus = Bus::new();
        let device = stub(1);
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        assert_eq!(read(&bus, 0x10e, 4), None);
        assert!(!bus.write(0x10e, &[0; 4]));
        assert!(device.1.lock().unwrap().is_none());
        assert_eq!(read(&bus, u64::MAX, 8), None);
    }

    #[test]
    fn the_end_of_the_address_space_is_no_trap() {
        let bus = Bus::new();
        bus.insert(u64::MAX - 3, 4, stub(1)).unwrap();
        assert_eq!(read(&bus, u64::MAX - 3, 4), Some(vec![1; 4]));
        assert_eq!(read(&bus, u64::MAX, 2), None);
        assert!(matches!(bus.insert(u64::MAX, 2, stub(2)), Err(Error::Range { .. })));
        assert!(matches!(bus.insert(0, 0, stub(2)), Err(Error::Range { .. })));
    }

    #[test]
    fn refuses_overlaps_and_lets_devices_move() {
        let bus = Bus::new();
        bus.insert(0x100, 0x10, stub(1)).unwrap();
        bus.insert(0x200, 0x10, stub(2)).unwrap();
        for (base, len) in [(0xff, 2), (0x10f, 1), (0x100, 0x10), (0, 0x1000), (0x108, 2)] {
            assert!(matches!(bus.insert(base, len, stub(3)), Err(Error::Overlap { .. })));
        }
        let device = bus.remove(0x100).unwrap();
        bus.insert(0x108, 0x10, device).unwrap();
        assert_eq!(read(&bus, 0x100, 1), None);
        assert_eq!(read(&bus, 0x108, 1), Some(vec![1]));
        bus.remove(0x108).unwrap();
        assert_eq!(bus.remove(0x108).err(), Some(Error::Absent { base: 0x108 }));
        assert_eq!(read(&bus, 0x108, 1), None);
    }
}
