//! The one match from a device's configuration to the device.

use std::sync::Arc;

use api::DeviceConfig;
use devices::disk::RawDisk;
use devices::io_thread::IoThread;
use devices::seam::DmaMap;
use devices::vfio::HostFunction;
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Blk, BlkCounters, BlkOptions};
use devices::virtio::console::{Console, Port};
use devices::virtio::net::{Link, Net, NetCounters, NetOptions};
use devices::virtio::rng::Rng;

use crate::Failure;
use crate::inputs::DeviceInput;
use crate::machine::Parts;
use crate::sandbox::{self, Thread};
use crate::troubles::Troubles;

/// What is put into its place in a machine.
pub enum Made {
    /// A virtio device.
    Virtio(Box<dyn VirtioDevice>),
    /// A function of the host's, and what such functions reach.
    Vfio(Arc<HostFunction>, Arc<dyn DmaMap>),
}

/// A device, what it counts, and what can be changed of it while it runs.
pub struct Created {
    /// The device.
    pub device: Made,
    /// What it counts.
    pub counters: DeviceCounters,
    /// What can be changed of it.
    pub control: DeviceControl,
}

impl Created {
    /// A device that counts nothing, and of which nothing can be changed.
    pub fn plain(device: impl VirtioDevice + 'static) -> Self {
        Self::uncounted(Made::Virtio(Box::new(device)))
    }

    fn uncounted(device: Made) -> Self {
        Self { device, counters: DeviceCounters::None, control: DeviceControl::None }
    }
}

/// What can be changed of a device while it runs.
#[derive(Debug)]
pub enum DeviceControl {
    /// A disk's size.
    Disk(Arc<RawDisk>),
    /// A network card's link.
    Net(Arc<Link>),
    /// Nothing.
    None,
}

/// What a device counts, as it does its work.
#[derive(Debug, Clone)]
pub enum DeviceCounters {
    /// A disk's.
    Disk(Arc<BlkCounters>),
    /// A network card's.
    Net(Arc<NetCounters>),
    /// It counts nothing.
    None,
}

/// Makes the device that `config` describes, on what was opened for it. What goes wrong with its requests goes to `troubles`.
///
/// # Errors
/// [`Failure::Host`] where the host side of the device is not there or cannot be attached.
pub fn create(config: &DeviceConfig, parts: &Parts, troubles: &Arc<Troubles>) -> Result<Created, Failure> {
    let missing = || Failure::Host(format!("{}: its host side was not opened", config.id()));
    Ok(match config {
        DeviceConfig::Disk(disk) => {
            let Some(DeviceInput::Disk(opened)) = parts.inputs.devices.get(&disk.id) else { return Err(missing()) };
            let mut options = BlkOptions::new(&disk.id);
            options.queues = disk.queues;
            if let Some(serial) = &disk.serial {
                options.serial.clone_from(serial);
            }
            let threads: Result<Vec<_>, _> = (0..disk.queues).map(|_| io_thread(&disk.id)).collect();
            let troubles = troubles.clone();
            let device = Blk::new(opened.clone(), &options).on_threads(threads?);
            let device = device.on_failure(move |failure| troubles.io(failure));
            let counters = DeviceCounters::Disk(device.counters());
            let device = Made::Virtio(Box::new(device));
            Created { device, counters, control: DeviceControl::Disk(opened.clone()) }
        }
        DeviceConfig::Net(net) => {
            let Some(DeviceInput::Tap(tap)) = parts.inputs.devices.get(&net.id) else { return Err(missing()) };
            let mac = net.mac.ok_or_else(missing)?;
            let mut options = NetOptions::new(&net.id, mac.bytes());
            options.mtu = net.mtu;
            let device = Net::new(tap.try_clone()?, &options).on_thread(io_thread(&net.id)?);
            let (counters, link) = (DeviceCounters::Net(device.counters()), device.link());
            link.set(net.link.is_up());
            Created { device: Made::Virtio(Box::new(device)), counters, control: DeviceControl::Net(link) }
        }
        DeviceConfig::Console(console) => {
            let endpoint = parts.endpoints.console(&console.id).ok_or_else(missing)?;
            let name = console.name.clone().unwrap_or_default();
            let port = Port { console: name.is_empty(), name, endpoint };
            Created::plain(Console::new(&console.id, vec![port], None)?.on_thread(io_thread(&console.id)?))
        }
        DeviceConfig::Rng(rng) => Created::plain(Rng::new(&rng.id).on_thread(io_thread(&rng.id)?)),
        DeviceConfig::Vfio(vfio) => {
            let Some(DeviceInput::Vfio(function)) = parts.inputs.devices.get(&vfio.id) else { return Err(missing()) };
            Created::uncounted(Made::Vfio(function.clone(), parts.inputs.container.clone()))
        }
    })
}

/// A thread for a device's queues. It is made here, and not when the guest's driver starts the queues: a thread that is
/// made by a vCPU's has no more rights than that.
///
/// # Errors
/// It cannot be made.
pub fn io_thread(id: &str) -> std::io::Result<Arc<IoThread>> {
    let thread = IoThread::spawn_with(id, || sandbox::enter(Thread::Io))?;
    // Its loop makes a descriptor without the flag.
    sandbox::close_on_exec();
    Ok(thread)
}
