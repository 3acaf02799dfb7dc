//! Which device is which PCI function of a machine, and how one comes and goes while the machine runs.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::{Duration, Instant};

use api::{DeviceConfig, Problem};
use devices::pci::{Indicator, PciFunction, PciSegment, RootPort};
use devices::seam::DmaMap;
use devices::vfio::{HostFunction, Seams, VfioFunction};
use devices::virtio::VirtioDevice;
use devices::virtio::mem::{Mem, MemControl, MemOptions};
use devices::virtio::transport::VirtioPci;
use hal::GpaRange;
use vm_memory::{GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};

use crate::Failure;
use crate::devices::{Created, DeviceControl, DeviceCounters, Made, io_thread};
use crate::inbox::{Event, Inbox};
use crate::machine::Parts;
use crate::memory::Ram;
use crate::pluggable::{PluggableMemory, PluggedMemory};
use crate::reach::Reach;
use crate::seams::VmSeam;
use crate::troubles::Troubles;

/// How long a vCPU may be in the middle of one access to a device.
const LONGEST_ACCESS: Duration = Duration::from_secs(10);
/// How often it is looked whether it still is.
const LOOK: Duration = Duration::from_micros(100);

/// Stands in messages, and names the thread, of the device that memory is plugged by.
const MEMORY_ID: &str = "memory";

/// The devices of a machine, in their order.
pub struct Functions {
    pci: Arc<PciSegment>,
    seam: VmSeam,
    reach: Reach,
    list: Vec<Function>,
    /// Address space of memory that can be plugged.
    reserved: Option<Arc<GuestRegionMmap>>,
}

struct Function {
    id: String,
    pci: Pci,
    /// The root port that it is behind; without one it is on the root bus.
    port: Option<u8>,
    counters: DeviceCounters,
    control: DeviceControl,
    troubles: Arc<Troubles>,
}

/// A device as a PCI function.
enum Pci {
    Virtio(Arc<VirtioPci>),
    Vfio(Arc<VfioFunction>),
}

impl Pci {
    fn function(&self) -> Arc<dyn PciFunction> {
        match self {
            Self::Virtio(virtio) => virtio.clone(),
            Self::Vfio(vfio) => vfio.clone(),
        }
    }

    /// It, where the monitor has a hand in what it does.
    fn virtio(&self) -> Option<&Arc<VirtioPci>> {
        match self {
            Self::Virtio(virtio) => Some(virtio),
            Self::Vfio(_) => None,
        }
    }

    fn on_driver(&self, tell: impl Fn() + Send + Sync + 'static) {
        match self {
            Self::Virtio(virtio) => virtio.on_driver(tell),
            Self::Vfio(vfio) => vfio.on_driver(tell),
        }
    }

    fn is_in_use(&self) -> bool {
        match self {
            Self::Virtio(virtio) => virtio.is_in_use(),
            Self::Vfio(vfio) => vfio.is_in_use(),
        }
    }
}

/// A device that is not in its place yet.
struct New {
    id: String,
    created: Created,
    troubles: Arc<Troubles>,
}

/// Where a device goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// To the root bus, before the guest runs.
    Root,
    /// Behind this root port, before the guest runs.
    Port(u8),
    /// Behind this root port, and the guest is told.
    Plugged(u8),
}

/// The troubles of the device with this id, which the owner is told of.
fn troubles_of(id: &str, inbox: &Inbox) -> Arc<Troubles> {
    let (inbox, id) = (inbox.clone(), id.to_owned());
    Arc::new(Troubles::new(move || inbox.post(Event::DeviceFails { id: id.clone() })))
}

impl Functions {
    /// None yet.
    pub fn new(pci: Arc<PciSegment>, seam: VmSeam, reach: Reach) -> Self {
        Self { pci, seam, reach, list: Vec::new(), reserved: None }
    }

    /// Makes a device and puts it in its place. While all `stand`, its queues do, too.
    ///
    /// # Errors
    /// [`Failure::Host`]; nothing is left of it then.
    pub fn add(&mut self, device: &DeviceConfig, place: Place, parts: &Parts, stand: bool) -> Result<(), Failure> {
        let troubles = troubles_of(device.id(), parts.inbox);
        let created = crate::devices::create(device, parts, &troubles)?;
        self.put(New { id: device.id().to_owned(), created, troubles }, place, parts.inbox, stand)
    }

    /// Puts memory that can be plugged into its place on the root bus, behind a device of its own.
    ///
    /// # Errors
    /// [`Failure::Host`].
    pub fn add_memory(&mut self, memory: PluggableMemory, ram: &Ram, inbox: &Inbox) -> Result<MemControl, Failure> {
        let GpaRange { start, len } = memory.range();
        let id = MEMORY_ID.to_owned();
        let options = MemOptions { id: id.clone(), start, len, block_size: memory.block() };
        self.reserved = Some(memory.region().clone());
        let plugged = PluggedMemory::new(memory, self.reach.clone(), ram.regions.clone(), inbox.clone());
        let device = Mem::new(options, Box::new(plugged))?.on_thread(io_thread(MEMORY_ID)?);
        let control = device.control();
        let troubles = troubles_of(MEMORY_ID, inbox);
        self.put(New { id, created: Created::plain(device), troubles }, Place::Root, inbox, false)?;
        Ok(control)
    }

    /// Puts a device in its place.
    fn put(&mut self, new: New, place: Place, inbox: &Inbox, stand: bool) -> Result<(), Failure> {
        let done = self.try_to_put(new, place, inbox, stand);
        self.let_go_of_memory();
        done
    }

    fn try_to_put(&mut self, new: New, place: Place, inbox: &Inbox, stand: bool) -> Result<(), Failure> {
        let New { id, created: Created { device, counters, control }, troubles } = new;
        let pci = match device {
            Made::Virtio(device) => Pci::Virtio(self.virtio(&id, device, &troubles, stand)?),
            Made::Vfio(function, dma) => Pci::Vfio(self.vfio(function, &dma)?),
        };
        let port = match place {
            Place::Root => {
                self.pci.add(pci.function())?;
                None
            }
            Place::Port(port) | Place::Plugged(port) => {
                let inbox = inbox.clone();
                pci.on_driver(move || inbox.post(Event::DriverCame { port }));
                self.pci.plug(port, pci.function(), matches!(place, Place::Port(_)))?;
                Some(port)
            }
        };
        self.list.push(Function { id, pci, port, counters, control, troubles });
        Ok(())
    }

    fn virtio(
        &self,
        id: &str,
        device: Box<dyn VirtioDevice>,
        troubles: &Arc<Troubles>,
        stand: bool,
    ) -> Result<Arc<VirtioPci>, Failure> {
        let seam = Arc::new(self.seam.clone());
        let pci = Arc::new(VirtioPci::new(id, device, self.reach.map().clone(), seam.clone(), seam)?);
        let told = troubles.clone();
        pci.on_broken(move |reason| told.broken(reason));
        if self.seam.0.kind().dma_needs_sharing {
            pci.require_access_platform();
        }
        if stand {
            pci.suspend();
        }
        Ok(pci)
    }

    fn vfio(&self, function: Arc<HostFunction>, dma: &Arc<dyn DmaMap>) -> Result<Arc<VfioFunction>, Failure> {
        self.reach.lead(dma)?;
        let seam = Arc::new(self.seam.clone());
        let seams = Seams { interrupts: seam.clone(), memory: seam };
        Ok(Arc::new(VfioFunction::new(function, seams)?))
    }

    /// Takes a device out from behind its root port, and drops it, with everything completed that was in flight. False
    /// where there is no such device.
    pub fn take_out(&mut self, id: &str) -> bool {
        let Some(at) = self.list.iter().position(|function| function.id == id && function.port.is_some()) else {
            return false;
        };
        let Function { pci, port, .. } = self.list.remove(at);
        drop(port.and_then(|port| self.pci.unplug(port)));
        match pci {
            Pci::Virtio(virtio) => {
                virtio.suspend();
                drop_here(virtio, id);
            }
            Pci::Vfio(vfio) => drop_here(vfio, id),
        }
        self.let_go_of_memory();
        true
    }

    /// Where there are no functions of the host's, the IOMMU has no mappings for any.
    fn let_go_of_memory(&self) {
        if self.passed_through().next().is_none() {
            self.reach.leave();
        }
    }

    /// Changes of a device what can be changed while it runs, and tells its driver. False where it is as it is wanted.
    ///
    /// # Errors
    /// The field that cannot be so, and why.
    pub fn change(&self, wanted: &DeviceConfig) -> Result<bool, Problem> {
        let function = self.list.iter().find(|function| function.id == wanted.id());
        let Some((function, pci)) = function.and_then(|function| Some((function, function.pci.virtio()?))) else {
            return Ok(false);
        };
        match (&function.control, wanted) {
            (DeviceControl::Disk(disk), DeviceConfig::Disk(wanted)) => {
                let size = disk.next_size(wanted.size.map(api::ByteSize::bytes));
                let size = size.map_err(|error| Problem::new("size", error.to_string(), ""))?;
                let changes = size != disk.size();
                if changes {
                    pci.change_config(|| disk.grow(size));
                }
                Ok(changes)
            }
            (DeviceControl::Net(link), DeviceConfig::Net(wanted)) => {
                let up = wanted.link.is_up();
                let changes = up != link.is_up();
                if changes {
                    pci.change_config(|| link.set(up));
                }
                Ok(changes)
            }
            _ => Ok(false),
        }
    }

    /// A root port without a device; one whose guest has no business with the last device any more, where there is one.
    pub fn free_port(&self) -> Option<u8> {
        let taken = |port: &u8| self.list.iter().any(|function| function.port == Some(*port));
        let free = || (0..=u8::MAX).map_while(|number| Some((number, self.pci.port(number)?)));
        let settled = free().find(|(number, port)| !taken(number) && port.indicator() == Indicator::Off);
        settled.or_else(|| free().find(|(number, _)| !taken(number))).map(|(number, _)| number)
    }

    /// A root port.
    pub fn port(&self, number: u8) -> Option<Arc<RootPort>> {
        self.pci.port(number)
    }

    /// Whether the guest uses the device behind a root port: it has powered the slot up, or lets the device answer.
    pub fn in_use(&self, port: u8) -> bool {
        let shows = self.pci.port(port).map(|port| port.indicator());
        let device = self.list.iter().find(|function| function.port == Some(port));
        shows != Some(Indicator::Off) || device.is_some_and(|function| function.pci.is_in_use())
    }

    /// Stops the queues of all devices, drained.
    pub fn suspend(&self) {
        self.virtio_functions().for_each(|(_, pci)| pci.suspend());
    }

    /// Starts them again.
    pub fn resume(&self) {
        self.virtio_functions().for_each(|(_, pci)| pci.resume());
    }

    fn virtio_functions(&self) -> impl Iterator<Item = (&Function, &Arc<VirtioPci>)> {
        self.list.iter().filter_map(|function| Some((function, function.pci.virtio()?)))
    }

    fn passed_through(&self) -> impl Iterator<Item = &Arc<VfioFunction>> {
        self.list.iter().filter_map(|function| match &function.pci {
            Pci::Virtio(_) => None,
            Pci::Vfio(vfio) => Some(vfio),
        })
    }

    /// What each device counts, with its id.
    pub fn counters(&self) -> Vec<(String, DeviceCounters)> {
        self.list.iter().map(|function| (function.id.clone(), function.counters.clone())).collect()
    }

    /// How often each device needed a reset, with its id.
    pub fn faults(&self) -> Vec<(String, Arc<AtomicU64>)> {
        self.virtio_functions().map(|(function, pci)| (function.id.clone(), pci.fault_counter())).collect()
    }

    /// What goes wrong with a device.
    pub fn troubles(&self, id: &str) -> Option<&Troubles> {
        self.list.iter().find(|function| function.id == id).map(|function| &*function.troubles)
    }

    /// Where guest memory lies in this process.
    pub fn host_memory(&self) -> Vec<Range<u64>> {
        let memory = self.reach.map().memory();
        let of_region = |region: &GuestRegionMmap| {
            let start = u64::try_from(region.as_ptr().addr()).ok()?;
            Some(start..start.checked_add(region.len())?)
        };
        let reserved = self.reserved.as_deref();
        let plugged =
            |region: &&GuestRegionMmap| reserved.is_some_and(|all| all.to_region_addr(region.start_addr()).is_some());
        memory.iter().filter(|region| !plugged(region)).chain(reserved).filter_map(of_region).collect()
    }

    /// Virtio devices that stay as long as the machine does, with their ids.
    pub fn on_the_root_bus(&self) -> Vec<(String, Arc<VirtioPci>)> {
        let stay = self.virtio_functions().filter(|(function, _)| function.port.is_none());
        stay.map(|(function, pci)| (function.id.clone(), pci.clone())).collect()
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        // They go on whether there are vCPUs or not, and the bus drops them later.
        self.passed_through().for_each(|function| function.stop());
        self.reach.leave();
    }
}

/// Drops a function on this thread, once no vCPU is in the middle of an access to it: a vCPU's thread may neither close
/// files nor wait for a device's thread.
fn drop_here<T>(mut function: Arc<T>, id: &str) {
    let began = Instant::now();
    while let Err(shared) = Arc::try_unwrap(function) {
        if began.elapsed() > LONGEST_ACCESS {
            tracing::error!("«{id}» is taken out, but something holds on to it");
            return;
        }
        function = shared;
        thread::sleep(LOOK);
    }
}
