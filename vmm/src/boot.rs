//! The guest before its devices: memory with the kernel, its boot data and the platform's tables in it.

use api::{Problem, Problems, VmConfig};
use arch::{BootError, BootSource, LoadedKernel, Platform, Topology};
use hal::HostCaps;

use crate::Failure;
use crate::inputs::Inputs;
use crate::memory::{self, Ram};
use crate::trace::{Milestone, Trace};

/// A guest ready to be given processors and devices.
pub struct Loaded {
    /// Its memory.
    pub memory: Ram,
    /// What the platform shows.
    pub platform: Platform,
    /// Where the boot processor begins.
    pub kernel: LoadedKernel,
}

/// Makes guest memory and loads the kernel into it.
///
/// # Errors
/// [`Failure::BadInput`] where kernel, initramfs or command line cannot be booted; [`Failure::Host`] where the host has
/// no such memory.
pub fn load(config: &VmConfig, caps: &HostCaps, inputs: &Inputs, trace: &Trace) -> Result<Loaded, Failure> {
    let topology = topology(config)?;
    let ram = config.memory.size.bytes();
    let mut platform = Platform::direct_boot(ram, caps.physical_address_bits, topology)
        .map_err(|error| bad("memory.size", &error.to_string()))?;
    platform.serial = config.serial_endpoint() != (api::Endpoint::Off {});
    platform.pvpanic = config.platform.pvpanic;

    let memory = memory::create(&arch::layout::ram_ranges(ram), &config.memory)?;
    trace.mark(Milestone::Memory);
    let cmdline = config.cmdline();
    let source = BootSource {
        kernel: &inputs.kernel,
        initramfs: inputs.initramfs.as_ref(),
        cmdline: &cmdline,
        protocol: None,
        gigabyte_pages: arch::gigabyte_pages(&caps.cpuid),
    };
    let kernel = arch::load_kernel(&memory.map, &platform, &source).map_err(|error| bad_boot(config, &error))?;
    arch::acpi::write(&memory.map, &platform)?;
    trace.mark(Milestone::Kernel);
    tracing::debug!(protocol = %kernel.protocol, kernel = ?kernel.kernel, initramfs = ?kernel.initramfs, "kernel loaded");
    Ok(Loaded { memory, platform, kernel })
}

fn topology(config: &VmConfig) -> Result<Topology, Failure> {
    let topology = match config.cpus.topology {
        Some(given) => Topology::new(given.sockets, given.cores, given.threads),
        None => Topology::flat(config.cpus.count),
    };
    topology.map_err(|error| bad("cpus.topology", &error.to_string()))
}

fn bad(field: &str, problem: &str) -> Failure {
    Failure::BadInput(Problems(vec![Problem::new(field, problem, "")]))
}

/// Puts the field and the file in front of what is wrong with it.
fn bad_boot(config: &VmConfig, error: &BootError) -> Failure {
    let kernel = &config.kernel;
    match error {
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
