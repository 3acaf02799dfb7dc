//! The guest before its devices: memory with the kernel, its boot data and the platform's tables in it.

use std::fs::File;

use api::{Problem, Problems, VmConfig};
use arch::payload::PayloadError;
use arch::{BootError, BootSource, KernelError, LoadedKernel, Platform, Slide, Topology};
use devices::legacy::FwCfgItems;
use devices::virtio::rng::kernel_random;
use hal::{BootRegisters, GpaRange, HostCaps};

use crate::Failure;
use crate::confidential::{self, Measured};
use crate::firmware;
use crate::inputs::Inputs;
use crate::kernel::{self, Image, Kept};
use crate::memory::{self, FirstPages, Ram};
use crate::pluggable::PluggableMemory;
use crate::trace::{Milestone, Trace};

/// A guest ready to be given processors and devices.
pub struct Loaded {
    /// Its memory.
    pub memory: Ram,
    /// What can be plugged while it runs.
    pub pluggable: Option<PluggableMemory>,
    /// What the platform shows.
    pub platform: Platform,
    /// Where the boot processor begins.
    pub entry: BootRegisters,
    /// How far the kernel was moved, where it is known.
    pub slide: Option<Slide>,
    /// What firmware finds by fw_cfg, where it boots.
    pub firmware: Option<FwCfgItems>,
    /// What it begins with, where that is measured.
    pub measured: Option<Measured>,
    /// What is worth populating beside the guest ([`crate::kernel::Kernels::populate`]).
    pub first_pages: Option<FirstPages>,
}

/// Makes guest memory and loads the kernel into it.
///
/// # Errors
/// [`Failure::BadInput`] where kernel, initramfs or command line cannot be booted; [`Failure::Host`] where the host has
/// no such memory.
pub fn load(config: &VmConfig, caps: &HostCaps, inputs: &Inputs, trace: &Trace) -> Result<Loaded, Failure> {
    let (platform, pluggable) = platform(config, caps.physical_address_bits)?;
    let ram = config.memory.size.bytes();
    if let Some(file) = &inputs.firmware {
        return firmware::load(file, platform, pluggable, config, inputs, trace);
    }
    let file = inputs.kernel.as_ref().ok_or_else(|| bad("kernel.path", "no kernel is named"))?;
    let image = inputs.kernels.begin(file, &config.kernel.cache, Kept::Taken);
    let (ranges, made) = (arch::layout::ram_ranges(ram), confidential::memory(config));
    let mut memory = memory::create(&ranges, &made)?;
    let pluggable = pluggable.map(|range| PluggableMemory::reserve(range, &config.memory)).transpose()?;
    trace.mark(Milestone::Memory);
    let cmdline = config.cmdline();
    let mut image = image.wait();
    if image.unpacked().is_some() {
        trace.mark(Milestone::KernelDecompressed);
    }
    let kernel = loop {
        let source = BootSource {
            kernel: file,
            unpacked: image.unpacked(),
            share: config.memory.share_kernel,
            random: image.unpacked().map(|_| random()).transpose()?,
            initramfs: inputs.initramfs.as_ref(),
            cmdline: &cmdline,
            protocol: None,
            gigabyte_pages: arch::gigabyte_pages(&caps.cpuid),
        };
        match arch::load_kernel(&memory.map, &platform, &source) {
            Ok(kernel) => break kernel,
            Err(error) => {
                image = next_best(image, error, config, (inputs, file)).map_err(|error| bad_boot(config, &error))?
            }
        }
        // A part of the kernel may be there already. The host may not have as much memory again.
        drop(memory);
        memory = memory::create(&ranges, &made)?;
    };
    arch::acpi::write(&memory.map, &platform)?;
    trace.mark(Milestone::Kernel);
    tell(&kernel, &image, config.memory.share_kernel);
    let first_pages = image.unpacked().and_then(|_| memory.first_pages(&config.memory));
    let LoadedKernel { registers: entry, slide, .. } = kernel;
    Ok(Loaded { memory, pluggable, platform, entry, slide, firmware: None, measured: None, first_pages })
}

/// What the guest is shown, and where memory lies that can be plugged, if any can.
///
/// # Errors
/// [`Failure::BadInput`] where memory or vCPUs cannot be so.
pub fn platform(config: &VmConfig, physical_address_bits: u8) -> Result<(Platform, Option<GpaRange>), Failure> {
    let topology = topology(config)?;
    let (pluggable, most) = pluggable(&config.memory)?;
    let field = if pluggable.is_some() { "memory.max" } else { "memory.size" };
    let make = if config.firmware.is_some() { Platform::firmware_boot } else { Platform::direct_boot };
    let mut platform = make(most, physical_address_bits, topology).map_err(|error| bad(field, &error.to_string()))?;
    platform.serial = config.serial_endpoint() != (api::Endpoint::Off {});
    platform.pvpanic = config.platform.pvpanic;
    platform.pluggable = config.cpus.max.map(|_| config.cpus.count);
    for bridge in &mut platform.host_bridges {
        bridge.last_bus = config.pci.hotplug_ports;
    }
    Ok((platform, pluggable))
}

/// Where memory lies that can be plugged, if any can, and the RAM that would reach as far up as all of it does.
fn pluggable(memory: &api::Memory) -> Result<(Option<GpaRange>, u64), Failure> {
    let (ram, more) = (memory.size.bytes(), memory.pluggable());
    if more == 0 {
        return Ok((None, ram));
    }
    let range = arch::layout::pluggable_range(ram, more);
    let range = range.ok_or_else(|| bad("memory.max", "it is larger than any address space"))?;
    Ok((Some(range), arch::layout::ram_up_to(range)))
}

/// What is tried when an image could not be loaded: a kept kernel that is damaged is unpacked anew, and what was
/// unpacked and cannot be entered unpacks itself.
fn next_best(
    image: Image,
    error: BootError,
    config: &VmConfig,
    (inputs, file): (&Inputs, &File),
) -> Result<Image, BootError> {
    match (image, error) {
        (Image::Cached(_), error) if reading_failed(&error) => {
            tracing::warn!("a kept kernel is damaged, and is unpacked anew");
            Ok(inputs.kernels.begin(file, &config.kernel.cache, Kept::Replaced).wait())
        }
        (Image::Cached(_) | Image::Unpacked(_), BootError::Payload(error)) => {
            kernel::unpacks_itself(&error);
            Ok(Image::File)
        }
        (_, error) => Err(error),
    }
}

/// Whether it was no fault of the kernel's.
fn reading_failed(error: &BootError) -> bool {
    match error {
        BootError::Kernel(error) => matches!(error, KernelError::Read(_)),
        BootError::Payload(PayloadError::Kernel(error)) => matches!(**error, KernelError::Read(_)),
        _ => false,
    }
}

fn tell(kernel: &LoadedKernel, image: &Image, share: bool) {
    if share && !matches!(image, Image::Cached(_)) {
        tracing::info!("the kernel's pages are this guest's own: only those of a kept kernel can be shared");
    }
    if image.unpacked().is_some() && kernel.slide.is_none() {
        tracing::info!(
            "the kernel is not placed at random: it has no relocation table, or its command line forbids it"
        );
    }
    tracing::debug!(
        protocol = %kernel.protocol, kernel = ?kernel.kernel, slide = ?kernel.slide, initramfs = ?kernel.initramfs,
        "kernel loaded"
    );
}

/// Two random numbers of the host kernel's.
fn random() -> Result<[u64; 2], Failure> {
    let mut bytes = [[0; 8]; 2];
    let flat = bytes.as_flattened_mut();
    if kernel_random(flat) != flat.len() {
        return Err(Failure::Host(
            "the host kernel gives no random numbers for the place of the guest's kernel".into(),
        ));
    }
    Ok(bytes.map(u64::from_le_bytes))
}

fn topology(config: &VmConfig) -> Result<Topology, Failure> {
    let topology = match config.cpus.topology {
        Some(given) => Topology::new(given.sockets, given.cores, given.threads),
        None => Topology::flat(config.cpus.most()),
    };
    topology.map_err(|error| bad("cpus.topology", &error.to_string()))
}

pub(crate) fn bad(field: &str, problem: &str) -> Failure {
    Failure::BadInput(Problems(vec![Problem::new(field, problem, "")]))
}

/// Puts the field and the file in front of what is wrong with it.
pub fn bad_boot(config: &VmConfig, error: &BootError) -> Failure {
    let kernel = &config.kernel;
    match error {
        BootError::Payload(error) => bad("kernel.path", &format!("{}: {error}", kernel.path.display())),
        BootError::Kernel(error) => bad("kernel.path", &format!("{}: {error}", kernel.path.display())),
        BootError::Initramfs(error) => {
            let path = kernel.initramfs.clone().unwrap_or_default();
            bad("kernel.initramfs", &format!("{}: {error}", path.display()))
        }
        BootError::Cmdline(error) => bad("kernel.cmdline", &error.to_string()),
        BootError::Memory(error) => bad("memory.size", &error.to_string()),
        BootError::Write { .. } => Failure::Host(error.to_string()),
    }
}
