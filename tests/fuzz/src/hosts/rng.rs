//! The host's side of an entropy device.

use devices::virtio::VirtioDevice;
use devices::virtio::rng::Rng;
use devices::virtio::testing::{Buf, PciDriver};

use super::{Host, begin};
use crate::input::Step;

/// The host's random numbers.
pub struct Entropy;

impl Host for Entropy {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Rng::new("rng0"))
    }

    fn twin(&mut self) -> Box<dyn VirtioDevice> {
        self.device()
    }

    fn act(&mut self, _step: Step) {
        // The kernel always has some.
    }

    fn header(&self, _step: Step) -> Vec<u8> {
        Vec::new()
    }

    fn check(&mut self, driver: &mut PciDriver) {
        begin(driver, u64::MAX);
        let mut queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        let at = driver.alloc(64);
        let head = queue.add(&[Buf::writable(at, 64)]);
        driver.kick(0);
        let used = driver.wait_used(0, &mut queue);
        assert_eq!((used.id, used.len), (u32::from(head), 64));
        assert_ne!(driver.bytes(at, 64), [0; 64], "random numbers");
    }
}
