//! Booting firmware: its file in memory, and the devices that it looks for.

use std::fs::File;
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use api::VmConfig;
use arch::firmware::{self, GivenKernel, Item, ItemContents, ItemKey};
use arch::tdx::authority::{self, Verdict};
use arch::tdx::events;
use arch::{Platform, layout};
use devices::bus::Bus;
use devices::legacy::{Cmos, FwCfg, FwCfgContents, FwCfgItems, PmTimer};
use devices::pci::{Address, ConfigPorts, PciSegment, PlatformFunction};
use hal::{Boot, GpaRange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

use crate::Failure;
use crate::boot::{Loaded, bad, bad_boot};
use crate::confidential::{self, Measured};
use crate::inbox::Inbox;
use crate::inputs::Inputs;
use crate::kinds;
use crate::machine::insert;
use crate::memory::{self, Ram};
use crate::pluggable::PluggableMemory;
use crate::trace::{Milestone, Trace};

const PAGE: usize = 4096;
/// Where firmware looks for the LPC bridge.
const LPC: Address = Address { device: 31, function: 0 };

/// Makes guest memory with firmware at its end below 4 GiB, and what it is to find of the machine.
///
/// # Errors
/// [`Failure::BadInput`] where the firmware, or the kernel that it is given, cannot be booted; [`Failure::Host`] where the
/// host has no such memory.
pub fn load(
    file: &File,
    platform: Platform,
    pluggable: Option<GpaRange>,
    config: &VmConfig,
    inputs: &Inputs,
    trace: &Trace,
) -> Result<Loaded, Failure> {
    let ram = layout::ram_ranges(config.memory.size.bytes());
    let image = read(file).map_err(|problem| bad_firmware(config, &problem))?;
    let place = firmware::place(image.len() as u64).map_err(|error| bad_firmware(config, &error.to_string()))?;
    let items = items(config, &platform, &ram, inputs)?;
    let traits = kinds::name(config.kind()).traits();
    let made = confidential::memory(config);
    let memory = memory::create(&ram, &made)?.with_firmware(place, made.shared)?;
    let pluggable = pluggable.map(|range| PluggableMemory::reserve(range, &config.memory)).transpose()?;
    trace.mark(Milestone::Memory);
    let measured = if traits.boot == Boot::Measured {
        let measured = Measured { firmware: image, ram };
        let plan = measured.plan().map_err(|error| bad_firmware(config, &error.to_string()))?;
        let verdict = inputs.kernel.as_ref().and_then(|kernel| authority::of(&events::variables(&plan), kernel).ok());
        if let Some(problem) = verdict.and_then(Verdict::problem) {
            tracing::warn!("{}: {problem}", config.kernel.path.display());
        }
        Some(measured)
    } else {
        write(&memory, place, &image)?;
        None
    };
    trace.mark(Milestone::Kernel);
    let (entry, firmware) = (firmware::entry(), Some(items));
    Ok(Loaded { memory, pluggable, platform, entry, slide: None, firmware, measured, first_pages: None })
}

/// A firmware's file. It begins at the start of a page, so that a hypervisor takes pages from it as they are.
pub struct Image {
    buffer: Vec<u8>,
    start: usize,
}

impl Image {
    /// One of zeros.
    fn zeros(len: usize) -> Self {
        let buffer = vec![0; len + PAGE - 1];
        let address = buffer.as_ptr().addr();
        Self { start: address.next_multiple_of(PAGE) - address, buffer }
    }

    fn len(&self) -> usize {
        self.buffer.len() - (PAGE - 1)
    }
}

impl Deref for Image {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.buffer.get(self.start..self.start + self.len()).unwrap_or_default()
    }
}

impl DerefMut for Image {
    fn deref_mut(&mut self) -> &mut [u8] {
        let len = self.len();
        self.buffer.get_mut(self.start..self.start + len).unwrap_or_default()
    }
}

/// The whole file.
fn read(file: &File) -> Result<Image, String> {
    let size = file.metadata().map_err(|error| format!("cannot be read: {error}"))?.len();
    firmware::place(size).map_err(|error| error.to_string())?;
    // At most 16 MiB.
    let mut image = Image::zeros(usize::try_from(size).map_err(|error| error.to_string())?);
    file.read_exact_at(&mut image, 0).map_err(|error| format!("cannot be read: {error}"))?;
    if let Some(last) = image.last_chunk() {
        firmware::check_reset_vector(last).map_err(|error| error.to_string())?;
    }
    Ok(image)
}

fn write(memory: &Ram, place: GpaRange, image: &[u8]) -> Result<(), Failure> {
    let written = memory.map.write_slice(image, GuestAddress(place.start));
    written.map_err(|error| Failure::Host(format!("the firmware could not be written to guest memory: {error}")))
}

/// What the firmware is to find by fw_cfg.
fn items(config: &VmConfig, platform: &Platform, ram: &[GpaRange], inputs: &Inputs) -> Result<FwCfgItems, Failure> {
    let cmdline = config.cmdline();
    let given = inputs.kernel.as_ref().map(|kernel| GivenKernel {
        kernel,
        initramfs: inputs.initramfs.as_ref(),
        cmdline: &cmdline,
        // Whoever chose the firmware of a plain VM chose its kernel, too.
        unsigned: config.confidential.is_none(),
    });
    let mut items = FwCfgItems::default();
    for Item { key, contents } in
        firmware::items(platform, ram, given.as_ref()).map_err(|error| bad_boot(config, &error))?
    {
        let (file, range) = match contents {
            ItemContents::Bytes(bytes) => {
                add(&mut items, key, FwCfgContents::Bytes(bytes))?;
                continue;
            }
            ItemContents::Kernel(range) => (&inputs.kernel, range),
            ItemContents::Initramfs(range) => (&inputs.initramfs, range),
        };
        if let Some(file) = file {
            add(&mut items, key, FwCfgContents::File(file.try_clone()?, range))?;
        }
    }
    Ok(items)
}

fn add(items: &mut FwCfgItems, key: ItemKey, contents: FwCfgContents) -> Result<(), Failure> {
    let added = match key {
        ItemKey::Number(number) => items.add(number, contents),
        ItemKey::Name(name) => items.add_named(name, contents),
    };
    added.map_err(|error| Failure::Host(error.to_string()))
}

/// Puts the chipset that firmware looks for into the machine.
///
/// # Errors
/// [`Failure::Host`] where something else is in its place.
pub fn add_chipset(
    items: FwCfgItems,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    pci: &Arc<PciSegment>,
    ports: &Bus,
    inbox: &Inbox,
    ecam: u64,
) -> Result<(), Failure> {
    let events = Arc::new(inbox.clone());
    pci.add(Arc::new(PlatformFunction::q35_host_bridge(ecam)))?;
    pci.add_at(LPC, Arc::new(PlatformFunction::ich9_lpc(layout::PM_PORT)))?;
    insert(ports, layout::PM_PORT.into(), PmTimer::LEN, Arc::new(PmTimer::new(events.clone())))?;
    insert(ports, layout::CMOS_PORT.into(), Cmos::LEN, Arc::new(Cmos::default()))?;
    insert(ports, layout::PCI_CONFIG_PORT.into(), ConfigPorts::LEN, Arc::new(ConfigPorts::new(pci.clone(), events)))?;
    insert(ports, layout::FW_CFG_PORT.into(), FwCfg::LEN, Arc::new(FwCfg::new(items, memory)))
}

fn bad_firmware(config: &VmConfig, problem: &str) -> Failure {
    let path = config.firmware.as_ref().map(|firmware| firmware.path.display().to_string()).unwrap_or_default();
    bad("firmware.path", &format!("{path}: {problem}"))
}
