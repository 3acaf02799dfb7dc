//! The one match from a device's configuration to the device.

use api::DeviceConfig;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Blk, BlkOptions};
use devices::virtio::console::{Console, Port};
use devices::virtio::net::{Net, NetOptions};
use devices::virtio::rng::Rng;

use crate::Failure;
use crate::machine::Parts;

/// Makes the device that `config` describes, on what was opened for it.
///
/// # Errors
/// [`Failure::Host`] where the host side of the device is not there or cannot be attached.
pub fn create(config: &DeviceConfig, parts: &Parts) -> Result<Box<dyn VirtioDevice>, Failure> {
    let missing = || Failure::Host(format!("{}: its host side was not opened", config.id()));
    Ok(match config {
        DeviceConfig::Disk(disk) => {
            let opened = parts.inputs.disks.get(&disk.id).ok_or_else(missing)?;
            let mut options = BlkOptions::new(&disk.id);
            options.queues = disk.queues;
            if let Some(serial) = &disk.serial {
                options.serial.clone_from(serial);
            }
            Box::new(Blk::new(opened.clone(), &options))
        }
        DeviceConfig::Net(net) => {
            let tap = parts.inputs.taps.get(&net.id).ok_or_else(missing)?.try_clone()?;
            let mac = net.mac.ok_or_else(missing)?;
            let mut options = NetOptions::new(&net.id, mac.bytes());
            options.mtu = net.mtu;
            Box::new(Net::new(tap, &options))
        }
        DeviceConfig::Console(console) => {
            let endpoint = parts.endpoints.console(&console.id).ok_or_else(missing)?;
            let name = console.name.clone().unwrap_or_default();
            let port = Port { console: name.is_empty(), name, endpoint };
            Box::new(Console::new(&console.id, vec![port], None)?)
        }
        DeviceConfig::Rng(rng) => Box::new(Rng::new(&rng.id)),
    })
}
