//! The machine: everything between a loaded guest and its running processors, made in one function that reads from
//! top to bottom, and taken apart in the order of the fields.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use api::{DeviceConfig, Problem, VmConfig};
use arch::{CpuidTable, Platform, Slide, layout};
use devices::bus::{Bus, BusDevice};
use devices::ioapic::IoApic;
use devices::legacy::{AcpiRegisters, DebugExit, I8042, Processors, PvPanic, Serial};
use devices::pci::{PciSegment, PlatformFunction, RootPort, SlotObserver, Windows};
use devices::seam::Interrupts;
use devices::virtio::mem::MemControl;
use hal::{Ability, Boot, BootRegisters, GpaRange, Hypervisor, MsiRoute, Slot, Vcpu, VcpuId, Vm, VmSpec};
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use crate::Failure;
use crate::boot::Loaded;
use crate::confidential::{self, Guest};
use crate::devices::DeviceCounters;
use crate::endpoints::Endpoints;
use crate::firmware;
use crate::functions::{Functions, Place};
use crate::inbox::Inbox;
use crate::inputs::Inputs;
use crate::memory::Ram;
use crate::pluggable::PluggableMemory;
use crate::processors::{Pluggable, VcpuMaker};
use crate::quotes::QuoteCounters;
use crate::seams::VmSeam;
use crate::trace::{Attached, Milestone, Trace, View};
use crate::troubles::Troubles;
use crate::vcpu::{ExitBuses, Mode, VcpuCounters, VcpuThreads};

/// What a machine is made from beside the loaded guest.
pub struct Parts<'a> {
    /// The VM's configuration.
    pub config: &'a VmConfig,
    /// The host's hypervisor.
    pub hypervisor: &'a dyn Hypervisor,
    /// Files and taps that devices take over.
    pub inputs: &'a Inputs,
    /// The host side of serial port and consoles.
    pub endpoints: &'a Endpoints,
    /// The hot-plug ports that devices are behind, by their ids; all others are on the root bus.
    pub ports: &'a BTreeMap<String, u8>,
    /// Where the machine's events go.
    pub inbox: &'a Inbox,
    /// Who looks at the boot, if somebody does.
    pub trace: &'a Trace,
}

/// A VM with all its parts. Dropping it stops the vCPUs, then completes what devices have in flight, then frees memory.
pub struct Machine {
    vcpus: Option<VcpuThreads>,
    watcher: Option<Attached>,
    functions: Functions,
    /// Plugs memory, where some can be plugged.
    memory: Option<MemControl>,
    /// The vCPUs that can come and go, where some can.
    pluggable: Option<Pluggable>,
    platform: PlatformDevices,
    mmio: Arc<Bus>,
    ecam_base: u64,
    /// Interrupts all vCPUs, once it was needed.
    nmi: Option<Box<dyn MsiRoute>>,
    /// Dropped after the vCPUs, and by no thread of theirs.
    confidential: Option<Arc<Guest>>,
    /// What was measured of a trust domain before it ran.
    mrtd: Option<String>,
    vm: Arc<dyn Vm>,
}

/// What the parts of a machine count, as they do their work.
#[derive(Debug, Default)]
pub struct MachineCounters {
    /// Each vCPU's, with its number.
    pub vcpus: Vec<(u8, Arc<VcpuCounters>)>,
    /// Each device's, with its id.
    pub devices: Vec<(String, DeviceCounters)>,
    /// How often each device needed a reset, with its id.
    pub faults: Vec<(String, Arc<AtomicU64>)>,
    /// Where the guest's memory lies in this process.
    pub memory: Vec<Range<u64>>,
    /// Interrupt routes of the hypervisor's that devices hold.
    pub routes: Arc<AtomicUsize>,
    /// Quotes, of a machine whose guest can ask for them.
    pub quotes: Option<Arc<QuoteCounters>>,
}

/// Address and data of the message that is a non-maskable interrupt for all processors (Intel SDM, volume 3, §11.11).
const NMI: hal::MsiMessage = hal::MsiMessage { address: 0xfeef_f000, data: 0x400 };

/// The platform's registers that the machine itself has to do with.
struct PlatformDevices {
    acpi: Arc<AcpiRegisters>,
    ioapic: Arc<IoApic>,
    processors: Option<Arc<Processors>>,
}

impl Machine {
    /// Makes the machine around a loaded guest, whose vCPUs run or stand as `mode` says.
    ///
    /// # Errors
    /// [`Failure::Host`] where the hypervisor or the host refuses; nothing is left behind.
    pub fn create(parts: &Parts, loaded: Loaded, mode: Mode) -> Result<Self, Failure> {
        let Loaded { memory, pluggable, platform, entry, slide, firmware, measured, first_pages } = loaded;
        let count = at_boot(&platform)?;
        let mut threads = VcpuThreads::spawn(parts.hypervisor.caps().backend, count, parts.inbox)?;
        let vm = create_vm(parts, &platform, &memory, pluggable.as_ref())?;
        parts.trace.mark(Milestone::Vm);
        let seam = VmSeam(vm.clone());
        let (pio, mmio) = (Arc::new(Bus::new()), Arc::new(Bus::new()));

        let devices = add_platform_devices(parts, &platform, &seam, &pio)?;
        let ioapic = devices.ioapic.clone();
        insert(&mmio, layout::IOAPIC.start, layout::IOAPIC.len, ioapic.clone())?;

        let (pci, ecam_base) = add_pci(parts, &platform, &seam, &mmio)?;
        let reach = confidential::reach(&*vm, &memory, pluggable.as_ref());
        let confidential = Guest::of_machine(parts, &seam, &memory, &reach)?;
        match firmware {
            Some(items) => firmware::add_chipset(items, reach.map().clone(), &pci, &pio, parts.inbox, ecam_base)?,
            None => drop(pci.add(Arc::new(PlatformFunction::host_bridge()))?),
        }
        let ecam = ecam_base..ecam_base + pci.ecam_len();
        let mut machine = Self {
            vcpus: None,
            watcher: None,
            functions: Functions::new(pci, seam, reach),
            memory: None,
            pluggable: None,
            platform: devices,
            mmio: mmio.clone(),
            ecam_base,
            nmi: None,
            confidential: confidential.clone(),
            mrtd: None,
            vm: vm.clone(),
        };
        for device in &parts.config.devices {
            let place = parts.ports.get(device.id()).map_or(Place::Root, |port| Place::Port(*port));
            machine.functions.add(device, place, parts, false)?;
        }
        let control = pluggable.map(|pluggable| machine.functions.add_memory(pluggable, &memory, parts.inbox));
        machine.memory = control.transpose()?;

        let maker = VcpuMaker::new(parts.hypervisor.caps(), &*vm, platform.topology);
        let vcpus = create_vcpus(&maker, &*vm, count, &entry)?;
        measured.as_ref().map_or(Ok(()), |measured| measured.launch(&*vm))?;
        parts.trace.mark(Milestone::Vcpus);
        machine.watcher = machine.watch(parts, ecam, memory.map, slide)?;
        let exits = Arc::new(ExitBuses { pio, mmio, ioapic, confidential });
        if mode == Mode::Stand {
            machine.functions.suspend();
        }
        threads.run(vcpus, &exits, parts.trace, mode);
        if let Some(pages) = first_pages {
            parts.inputs.kernels.populate(pages);
        }
        machine.vcpus = Some(threads);
        machine.mrtd = measured.map(|measured| measured.mrtd()).transpose()?;
        machine.pluggable =
            machine.platform.processors.clone().map(|registers| Pluggable::new(maker, registers, exits));
        Ok(machine)
    }

    /// Stops the vCPUs between two instructions, and then the devices' queues, with everything completed that was in
    /// flight.
    ///
    /// # Errors
    /// [`Failure::Host`] where a vCPU does not stop; all runs on then.
    pub fn pause(&self) -> Result<(), Failure> {
        if let Some(vcpus) = &self.vcpus {
            vcpus.pause()?;
        }
        self.functions.suspend();
        Ok(())
    }

    /// Lets devices and vCPUs go on.
    pub fn resume(&self) {
        self.functions.resume();
        if let Some(vcpus) = &self.vcpus {
            vcpus.resume();
        }
    }

    /// Sends all vCPUs a non-maskable interrupt.
    ///
    /// # Errors
    /// [`Failure::Host`] where the hypervisor has no interrupt left.
    pub fn nmi(&mut self) -> Result<(), Failure> {
        let route = match self.nmi.take() {
            Some(route) => route,
            None => self.vm.irqs().msi()?,
        };
        route.set(Some(NMI))?;
        route.event().write(1)?;
        self.nmi = Some(route);
        Ok(())
    }

    /// Puts a device behind a hot-plug port and tells the guest; its queues `stand` while the machine does.
    ///
    /// # Errors
    /// [`Failure::Host`] where it cannot be made; nothing is left of it then.
    pub fn add_device(&mut self, parts: &Parts, device: &DeviceConfig, port: u8, stand: bool) -> Result<(), Failure> {
        self.functions.add(device, Place::Plugged(port), parts, stand)
    }

    /// Takes a device out from behind its hot-plug port, and tells the guest.
    pub fn take_device_out(&mut self, id: &str) {
        if !self.functions.take_out(id) {
            tracing::error!("«{id}» is behind no hot-plug port");
        }
    }

    /// Changes a device while it runs: see [`Functions::change`].
    ///
    /// # Errors
    /// The field that cannot be so, and why.
    pub fn change_device(&self, wanted: &DeviceConfig) -> Result<bool, Problem> {
        self.functions.change(wanted)
    }

    /// The ids of its devices.
    pub fn device_ids(&self) -> Vec<String> {
        self.functions.counters().into_iter().map(|(id, _)| id).collect()
    }

    /// What goes wrong with a device.
    pub fn troubles(&self, id: &str) -> Option<&Troubles> {
        self.functions.troubles(id)
    }

    /// A hot-plug port without a device.
    pub fn free_port(&self) -> Option<u8> {
        self.functions.free_port()
    }

    /// A hot-plug port.
    pub fn port(&self, number: u8) -> Option<Arc<RootPort>> {
        self.functions.port(number)
    }

    /// Whether the guest uses the device behind a hot-plug port.
    pub fn in_use(&self, port: u8) -> bool {
        self.functions.in_use(port)
    }

    /// Asks the guest to plug this many bytes of memory, in whole blocks.
    pub fn request_memory(&self, bytes: u64) {
        if let Some(memory) = &self.memory {
            memory.request(bytes);
        }
    }

    /// The measurement of a trust domain's beginning (MRTD), in hexadecimal digits.
    pub fn mrtd(&self) -> Option<&str> {
        self.mrtd.as_deref()
    }

    /// Bytes of memory that the guest has plugged.
    pub fn plugged_memory(&self) -> u64 {
        self.memory.as_ref().map_or(0, MemControl::plugged)
    }

    /// Gives the guest a vCPU, or asks it anew to take one that it has not let go of. To be followed by
    /// [`Machine::show_processors`].
    ///
    /// # Errors
    /// [`Failure::Host`] where it cannot be made; nothing is left of it then.
    pub fn add_vcpu(&mut self, number: u8) -> Result<(), Failure> {
        match (&mut self.pluggable, &mut self.vcpus) {
            (Some(pluggable), Some(threads)) => pluggable.add(number, &*self.vm, threads),
            _ => Err(Failure::Host("the machine was made without vCPUs that can come and go".into())),
        }
    }

    /// Asks the guest to let go of a vCPU. To be followed by [`Machine::show_processors`].
    pub fn ask_for_vcpu(&self, number: u8) {
        if let Some(pluggable) = &self.pluggable {
            pluggable.registers.ask_to_eject(number);
        }
    }

    /// Takes back what the guest was asked about a vCPU. False where it may be at work on it.
    pub fn take_vcpu_question_back(&self, number: u8) -> bool {
        self.pluggable.as_ref().is_none_or(|pluggable| pluggable.registers.take_back(number))
    }

    /// Takes a vCPU away. It stands still from now on, until it is added again.
    pub fn take_vcpu(&mut self, number: u8) {
        if let (Some(pluggable), Some(threads)) = (&mut self.pluggable, &mut self.vcpus) {
            pluggable.take(number, threads);
        }
    }

    /// Whether there is a vCPU of this number, whether the guest has taken it or not.
    pub fn has_vcpu(&self, number: u8) -> bool {
        self.vcpus.as_ref().is_some_and(|threads| threads.has(number))
    }

    /// Has the guest look at what it is asked about its vCPUs.
    pub fn show_processors(&self) {
        if let Err(error) = self.platform.acpi.show_processors() {
            tracing::error!("telling the guest of its processors: {error}");
        }
    }

    /// What the machine's parts count.
    pub fn counters(&self) -> Arc<MachineCounters> {
        Arc::new(MachineCounters {
            vcpus: self.vcpus.as_ref().map(VcpuThreads::counters).unwrap_or_default(),
            devices: self.functions.counters(),
            faults: self.functions.faults(),
            memory: self.functions.host_memory(),
            routes: self.vm.irqs().routes_held(),
            quotes: self.confidential.as_ref().and_then(|guest| guest.quote_counters()),
        })
    }

    /// Has the boot looked at, where somebody wants to.
    fn watch(
        &self,
        parts: &Parts,
        ecam: Range<u64>,
        memory: GuestMemoryMmap,
        slide: Option<Slide>,
    ) -> Result<Option<Attached>, Failure> {
        if !parts.trace.is_on() {
            return Ok(None);
        }
        let functions = self.functions.on_the_root_bus();
        let system_map = parts.inputs.system_map.as_ref().map(File::try_clone).transpose()?;
        let slide = slide.map_or(0, |slide| slide.virt.into());
        let view = View { functions, ecam, memory, slide, system_map };
        Ok(parts.trace.attach(view, &parts.config.lifecycle, parts.inbox)?)
    }

    /// Asks the guest to shut itself down.
    pub fn press_power_button(&self) {
        match self.platform.acpi.press_power_button() {
            Ok(()) => tracing::info!("power button pressed"),
            Err(error) => tracing::error!("power button: {error}"),
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.vcpus = None;
        self.watcher = None;
        self.functions.suspend();
        drop(self.confidential.take());
        // The bus holds the PCI segment, and the segment the bus.
        if let Err(error) = self.mmio.remove(self.ecam_base) {
            tracing::error!("taking the machine apart: {error}");
        }
    }
}

fn create_vm(
    parts: &Parts,
    platform: &Platform,
    memory: &Ram,
    pluggable: Option<&PluggableMemory>,
) -> Result<Arc<dyn Vm>, Failure> {
    // Those that may come included. Ids have gaps where a topology's counts are no powers of two.
    let max_vcpus = platform.topology.vcpu_ids().iter().map(|id| u32::from(id.0) + 1).max().unwrap_or(1);
    let caps = parts.hypervisor.caps();
    let cpuid = || CpuidTable::new(caps, None, platform.topology).for_vcpu(VcpuId(0));
    let kind = confidential::kind(parts.config.confidential.as_ref(), cpuid);
    let spec = VmSpec { kind, max_vcpus, ..VmSpec::default() };
    let vm: Arc<dyn Vm> = Arc::from(parts.hypervisor.create(&spec)?);
    for region in memory.regions.iter().chain(pluggable.map(PluggableMemory::region)) {
        vm.memory().map(Slot::new(region.clone()))?;
    }
    Ok(vm)
}

/// PCI with its root ports, and where its configuration space begins.
fn add_pci(
    parts: &Parts,
    platform: &Platform,
    seam: &VmSeam,
    mmio: &Arc<Bus>,
) -> Result<(Arc<PciSegment>, u64), Failure> {
    let bridge = platform.host_bridges.first().ok_or_else(|| Failure::Host("a platform without PCI".into()))?;
    let windows = Windows { low: addresses(bridge.mmio32), high: addresses(bridge.mmio64) };
    let pci = Arc::new(PciSegment::new(mmio.clone(), windows));
    let interrupts: Arc<dyn Interrupts> = Arc::new(seam.clone());
    let observer: Arc<dyn SlotObserver> = Arc::new(parts.inbox.clone());
    pci.add_ports(parts.config.pci.hotplug_ports, &interrupts, &observer)?;
    insert(mmio, bridge.ecam_base, pci.ecam_len(), pci.clone())?;
    show_ports(&*seam.0, &pci, bridge.ecam_base)?;
    Ok((pci, bridge.ecam_base))
}

/// Has the guest read the hot-plug ports' configuration space in memory: a booting Linux reads some 200 registers of each,
/// and each would be an exit. They stay exits for guests of a kind that cannot have such memory.
fn show_ports(vm: &dyn Vm, pci: &PciSegment, ecam: u64) -> Result<(), Failure> {
    let Range { start, end } = pci.ports_ecam();
    if start == end || !vm.kind().has(Ability::ReadonlyMemory) {
        return Ok(());
    }
    let len = usize::try_from(end - start).map_err(|_| Failure::Host("too many hot-plug ports".into()))?;
    let pages = MmapRegion::new(len).map_err(|error| Failure::Host(format!("memory of hot-plug ports: {error}")))?;
    let region = GuestRegionMmap::new(pages, GuestAddress(ecam + start));
    let region = Arc::new(region.ok_or_else(|| Failure::Host("hot-plug ports are beyond all addresses".into()))?);
    pci.show_ports(&region)?;
    vm.memory().map(Slot { readonly: true, ..Slot::new(region) })?;
    Ok(())
}

/// The vCPUs that there are at boot. Where the launch is measured, it sets the registers.
fn create_vcpus(
    maker: &VcpuMaker,
    vm: &dyn Vm,
    count: u8,
    entry: &BootRegisters,
) -> Result<Vec<Box<dyn Vcpu>>, Failure> {
    let entry = |number| (number == 0 && vm.kind().boot == Boot::Registers).then(|| entry.clone());
    (0..count).map(|number| maker.create(vm, number, entry(number))).collect()
}

/// Puts the platform's few registers on the bus of I/O ports. Only pins of the I/O APIC that a device uses are
/// connected.
fn add_platform_devices(
    parts: &Parts,
    platform: &Platform,
    seam: &VmSeam,
    pio: &Bus,
) -> Result<PlatformDevices, Failure> {
    let ports = |port: u16, len, device| insert(pio, port.into(), len, device);
    let mut ioapic = IoApic::new(platform.ioapic_pins);
    let mut connect = |pin| {
        let line = ioapic.connect(pin, seam.line(pin)?);
        line.ok_or_else(|| Failure::Host(format!("the I/O APIC has no pin {pin}")))
    };
    let events = Arc::new(parts.inbox.clone());
    let acpi = Arc::new(AcpiRegisters::new(events.clone(), connect(layout::GED_PIN)?));
    ports(layout::ACPI_SLEEP_CONTROL_PORT, AcpiRegisters::LEN, acpi.clone())?;
    if platform.serial {
        let serial = parts.endpoints.serial(connect(layout::COM1_PIN)?)?;
        ports(layout::COM1_PORT, Serial::LEN, serial)?;
    }
    if platform.i8042 {
        ports(layout::I8042_PORT, I8042::LEN, Arc::new(I8042::new(events.clone())))?;
    }
    if platform.pvpanic {
        ports(layout::PVPANIC_PORT, PvPanic::LEN, Arc::new(PvPanic::new(events.clone())))?;
    }
    if parts.config.platform.debug_exit {
        ports(layout::DEBUG_EXIT_PORT, DebugExit::LEN, Arc::new(DebugExit::new(events)))?;
    }
    let processors = add_processors(parts, platform, pio)?;
    Ok(PlatformDevices { acpi, ioapic: Arc::new(ioapic), processors })
}

/// The registers of processors that come and go, where some do.
fn add_processors(parts: &Parts, platform: &Platform, pio: &Bus) -> Result<Option<Arc<Processors>>, Failure> {
    if platform.pluggable.is_none() {
        return Ok(None);
    }
    let most = u8::try_from(platform.topology.vcpus()).unwrap_or(u8::MAX);
    let processors = Arc::new(Processors::new(most, at_boot(platform)?, Arc::new(parts.inbox.clone())));
    insert(pio, layout::PROCESSORS_PORT.into(), processors.len_of_range(), processors.clone())?;
    Ok(Some(processors))
}

/// How many vCPUs there are when the guest boots.
fn at_boot(platform: &Platform) -> Result<u8, Failure> {
    let count = platform.pluggable.unwrap_or(platform.topology.vcpus());
    u8::try_from(count).map_err(|_| Failure::Host(format!("{count} vCPUs are more than a machine can have")))
}

pub(crate) fn insert(bus: &Bus, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Failure> {
    bus.insert(base, len, device).map_err(|error| Failure::Host(format!("platform: {error}")))
}

fn addresses(range: GpaRange) -> Range<u64> {
    range.start..range.start.saturating_add(range.len)
}
