//! The other side of a function of the host's, for tests and fuzz targets: one that is played, and a guest's memory map.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{Mapping, Physical, Region, Signals};
use crate::seam::DeviceMemory;

/// Interrupts of the played function, by MSI-X and by MSI.
pub const VECTORS: u16 = 5;
/// As [`VECTORS`].
pub const MESSAGES: u16 = 8;

/// Where capabilities of [`disk`] stand: power management.
pub const POWER: u16 = 0x40;
/// MSI.
pub const MSI: u16 = 0x50;
/// MSI-X.
pub const MSIX: u16 = 0x70;
/// PCI Express.
pub const PCIE: u16 = 0x80;

/// Configuration space like that of an NVMe disk, with I/O ports more.
pub fn disk() -> Vec<u8> {
    let mut config = vec![0; 256];
    let mut set = |at: u16, bytes: &[u8]| config[usize::from(at)..][..bytes.len()].copy_from_slice(bytes);
    set(0x00, &[0x36, 0x1b, 0x10, 0x00, 0x03, 0x05, 0x10, 0x00, 0x02, 0x02, 0x08, 0x01]);
    set(0x0e, &[0x80]); // one function of several
    set(0x10, &0xc000_0004_u32.to_le_bytes());
    set(0x18, &0xe001_u32.to_le_bytes()); // I/O ports
    set(0x1c, &0xd000_0000_u32.to_le_bytes());
    set(0x30, &0xf000_0001_u32.to_le_bytes());
    set(0x34, &[0x40]);
    set(0x3c, &[11, 1]);
    set(POWER, &[0x01, 0x50, 0x03, 0, 0x08]);
    // Eight messages, addresses of 64 bits, masks.
    set(MSI, &[0x05, 0x70, 0x86, 0x01]);
    set(MSIX, &[0x11, 0x80, 4, 0x00, 0x00, 0x20, 0, 0, 0x00, 0x30, 0, 0]);
    // The list of capabilities ends where it begins.
    set(PCIE, &[0x10, 0x40, 2, 0]);
    config
}

/// What was done with the function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    /// These bytes were written.
    Wrote(Region, u64, Vec<u8>),
    /// So many interrupts were switched on.
    Signals(Signals, usize),
    /// It was reset.
    Reset,
}

/// A function with memory of 16 KiB in register 0, which is mapped, I/O ports in register 2, and memory of 4 KiB in register 3.
pub struct Played {
    config: Vec<u8>,
    done: Mutex<Vec<Done>>,
    memory: File,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Played {
    /// A function with this configuration space.
    pub fn new(config: Vec<u8>) -> Self {
        let memory = File::from(memfd_create(c"function", MFdFlags::MFD_CLOEXEC).expect("a file"));
        memory.set_len(1 << 20).expect("room");
        Self { config, done: Mutex::default(), memory }
    }

    /// What was done since the last look.
    pub fn done(&self) -> Vec<Done> {
        std::mem::take(&mut lock(&self.done))
    }
}

impl Physical for Played {
    fn name(&self) -> &str {
        "0000:01:00.0"
    }

    fn len(&self, region: Region) -> u64 {
        match region {
            Region::Bar(0) => 0x4000,
            Region::Bar(2) => 32,
            Region::Bar(3) => 0x1000,
            Region::Bar(_) => 0,
            Region::Config => 256,
        }
    }

    fn mappable(&self, bar: u8) -> Vec<Range<u64>> {
        Some(0..0x4000).filter(|_| bar == 0).into_iter().collect()
    }

    fn map(&self, bar: u8, part: &Range<u64>) -> io::Result<Mapping> {
        assert_eq!((bar, part.start % 4096, part.end % 4096), (0, 0, 0));
        Mapping::of(&self.memory, part)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        assert!(region != Region::Bar(2) || self.config[0x18] & 1 == 0, "nobody asks for ports");
        if region == Region::Config {
            for (at, byte) in (usize::try_from(offset).expect("a small offset")..).zip(data) {
                *byte = self.config.get(at).copied().unwrap_or(0xff);
            }
        }
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) {
        lock(&self.done).push(Done::Wrote(region, offset, data.to_vec()));
    }

    fn signals(&self, kind: Signals) -> u16 {
        if kind == Signals::Msi { MESSAGES } else { VECTORS }
    }

    fn signal_to(&self, kind: Signals, events: &[&EventFd]) -> io::Result<()> {
        lock(&self.done).push(Done::Signals(kind, events.len()));
        Ok(())
    }

    fn reset(&self) {
        lock(&self.done).push(Done::Reset);
    }
}

/// A guest's memory map.
#[derive(Clone, Default)]
pub struct Shown(Arc<Mutex<Vec<(u64, u64)>>>);

impl Shown {
    /// Address and length of each part that is shown.
    pub fn parts(&self) -> Vec<(u64, u64)> {
        lock(&self.0).clone()
    }
}

struct Part(Shown, (u64, u64));

impl Drop for Part {
    fn drop(&mut self) {
        lock(&self.0.0).retain(|part| *part != self.1);
    }
}

impl DeviceMemory for Shown {
    fn show(&self, region: Arc<GuestRegionMmap>) -> io::Result<Box<dyn Send + Sync>> {
        let part = (region.start_addr().0, region.len());
        lock(&self.0).push(part);
        Ok(Box::new(Part(self.clone(), part)))
    }
}
