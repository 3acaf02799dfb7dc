//! The host's side of each device that a fuzzed guest may have.

mod blk;
mod console;
mod mem;
mod net;
mod rng;

use devices::virtio::VirtioDevice;
use devices::virtio::testing::PciDriver;

use crate::input::Step;

/// The host's side of one device.
pub trait Host {
    /// The device. Called once, before all else.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// A device of the same shape, to restore a saved state into. It is never run.
    fn twin(&mut self) -> Box<dyn VirtioDevice>;

    /// Does what the host's users may do at any time.
    fn act(&mut self, step: Step);

    /// The header that the device wants before a request, 16 bytes at the most.
    fn header(&self, step: Step) -> Vec<u8>;

    /// Sees that the device, which was just reset, does what it is for.
    fn check(&mut self, driver: &mut PciDriver);
}

/// The kinds of hosts, by number.
pub const KINDS: u8 = 7;

/// A host by the number of its kind.
pub fn host(kind: u8) -> Box<dyn Host> {
    match kind % KINDS {
        0 => Box::new(blk::Disk::new(false, 1)),
        1 => Box::new(blk::Disk::new(true, 2)),
        2 => Box::new(net::Wire::new()),
        3 => Box::new(console::Terminal::new(&[""])),
        4 => Box::new(console::Terminal::new(&["", "agent", "log"])),
        5 => Box::new(rng::Entropy),
        _ => Box::<mem::Memory>::default(),
    }
}

/// Makes what all hosts share, so that it does not look as if an input had left it behind.
pub fn warm_up() {
    (0..KINDS).for_each(|kind| drop(host(kind)));
}

/// Gets a device ready as a driver that keeps the rules does, but for its queues.
fn begin(driver: &PciDriver, features: u64) {
    driver.negotiate(features);
    driver.setup_config_vector();
}
