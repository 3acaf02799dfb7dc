//! What the configuration names on the host and the machine only reads or takes over: kernel, initramfs, disks, taps,
//! functions of the host's.
//!
//! All of it is opened before anything is made, and everything that is wrong is reported at once. It stays open across
//! resets of the guest, so that a disk's lock and a tap's queue are never given up in between.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use api::{DeviceConfig, Problem, VmConfig};
use devices::disk::{DiskError, DiskOptions, RawDisk};
use devices::net::Tap;
use devices::vfio::{Container, HostFunction};

use crate::kernel::Kernels;
use crate::request::Descriptors;

/// The opened inputs of a VM.
pub struct Inputs {
    /// The firmware that boots first.
    pub firmware: Option<File>,
    /// The kernel file; none where firmware looks for one.
    pub kernel: Option<File>,
    /// What makes it ready to be loaded.
    pub kernels: Kernels,
    /// The initial file system.
    pub initramfs: Option<File>,
    /// The kernel's System.map, where one is named, or one is wanted and found.
    pub system_map: Option<File>,
    /// What devices take over, by the device's id.
    pub devices: BTreeMap<String, DeviceInput>,
    /// What functions of the host's reach.
    pub container: Arc<Container>,
}

/// What a device takes over from the host.
pub enum DeviceInput {
    /// A disk's file.
    Disk(Arc<RawDisk>),
    /// A network card's tap.
    Tap(Tap),
    /// A function of the host's.
    Vfio(Arc<HostFunction>),
    /// Nothing that is opened beforehand.
    None,
}

impl Inputs {
    /// Opens everything that `config` names.
    ///
    /// # Errors
    /// Every problem, each with its field.
    pub fn open(config: &VmConfig, descriptors: &mut Descriptors) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let kernel = if config.kernel.is_none() {
            None
        } else {
            open_regular(&config.kernel.path, "kernel.path", "a bzImage or an ELF kernel", &mut problems)
        };
        let initramfs = config
            .kernel
            .initramfs
            .as_ref()
            .map(|path| open_regular(path, "kernel.initramfs", "a cpio archive", &mut problems));
        let firmware = config
            .firmware
            .as_ref()
            .map(|firmware| open_regular(&firmware.path, "firmware.path", "OVMF, in one file", &mut problems));
        let system_map = system_map(config, &mut problems);
        let (mut devices, container) = (BTreeMap::new(), Arc::new(Container::default()));
        for (index, device) in config.devices.iter().enumerate() {
            match DeviceInput::open(device, descriptors, &container) {
                Ok(opened) => drop(devices.insert(device.id().to_owned(), opened)),
                Err((field, problem)) => problems.push(Problem::new(format!("devices[{index}].{field}"), problem, "")),
            }
        }
        if !problems.is_empty() {
            return Err(problems);
        }
        let (firmware, initramfs) = (firmware.flatten(), initramfs.flatten());
        Ok(Self { firmware, kernel, kernels: Kernels::default(), initramfs, system_map, devices, container })
    }
}

/// Adds problems of fields that have none yet: of what is badly written nobody needs to know that it cannot be opened.
pub fn add_new(problems: &mut Vec<Problem>, found: Vec<Problem>) {
    for problem in found {
        if problems.iter().all(|known| known.field != problem.field) {
            problems.push(problem);
        }
    }
}

impl DeviceInput {
    /// Opens what one device names.
    ///
    /// # Errors
    /// The device's field, and what is wrong with it.
    pub fn open(
        device: &DeviceConfig,
        descriptors: &mut Descriptors,
        container: &Container,
    ) -> Result<Self, (&'static str, String)> {
        match device {
            DeviceConfig::Disk(disk) => {
                let size = disk.size.map(api::ByteSize::bytes);
                let options = DiskOptions { readonly: disk.readonly, direct: disk.direct, size };
                let wrong = |field| {
                    move |error: DiskError| (if error.is_of_size() { "size" } else { field }, error.to_string())
                };
                let opened = match (&disk.path, disk.fd) {
                    (Some(path), _) => RawDisk::open(path, options).map_err(wrong("path"))?,
                    (None, Some(number)) => {
                        let fd = take(number, descriptors)?;
                        RawDisk::from_file(&format!("fd {number}"), fd.into(), options).map_err(wrong("fd"))?
                    }
                    (None, None) => return Err(("path", "is missing; name a file, or a descriptor with fd".into())),
                };
                Ok(Self::Disk(Arc::new(opened)))
            }
            DeviceConfig::Net(net) => open_tap(net, descriptors).map(Self::Tap),
            DeviceConfig::Vfio(vfio) => {
                open_function(vfio, descriptors, container).map(|function| Self::Vfio(Arc::new(function)))
            }
            DeviceConfig::Console(_) | DeviceConfig::Rng(_) => Ok(Self::None),
        }
    }
}

/// Opens the System.map that is named; or, where a boot has a limit, one that bears the kernel's version.
fn system_map(config: &VmConfig, problems: &mut Vec<Problem>) -> Option<File> {
    if let Some(path) = &config.kernel.system_map {
        return open_regular(path, "kernel.system_map", "the System.map of this kernel", problems);
    }
    config.lifecycle.boot_timeout?;
    // /vmlinuz and the like are links to a file with the version in its name.
    let kernel = std::fs::canonicalize(&config.kernel.path).ok()?;
    let version = kernel.file_name()?.to_str()?.split_once('-')?.1;
    let name = format!("System.map-{version}");
    [kernel.with_file_name(&name), Path::new("/boot").join(name)].iter().find_map(|path| File::open(path).ok())
}

fn open_regular(path: &Path, field: &str, expected: &str, problems: &mut Vec<Problem>) -> Option<File> {
    let problem = match File::open(path).and_then(|file| Ok((file.metadata()?, file))) {
        Ok((metadata, file)) if metadata.is_file() => return Some(file),
        Ok((metadata, _)) if metadata.is_dir() => "is a directory".to_string(),
        Ok(_) => "is not a regular file".to_string(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => "does not exist".to_string(),
        Err(error) => format!("cannot be opened: {error}"),
    };
    problems.push(Problem::new(field, format!("{} {problem}", path.display()), format!("name {expected}")));
    None
}

/// Opens a card's tap by name, or takes the inherited descriptor. On failure: the field and what is wrong.
fn open_tap(net: &api::Net, descriptors: &mut Descriptors) -> Result<Tap, (&'static str, String)> {
    match (&net.tap, net.fd) {
        (Some(name), _) => Tap::open(name).map_err(|error| ("tap", error.to_string())),
        (None, Some(number)) => {
            let fd = take(number, descriptors)?;
            Tap::from_fd(&format!("fd {number}"), fd).map_err(|error| ("fd", error.to_string()))
        }
        (None, None) => Err(("tap", "is missing; name a tap, or an inherited descriptor with fd".into())),
    }
}

/// Opens a function by its address, or takes over its descriptors. On failure: the field and what is wrong.
fn open_function(
    vfio: &api::Vfio,
    descriptors: &mut Descriptors,
    container: &Container,
) -> Result<HostFunction, (&'static str, String)> {
    let (field, opened) = match (&vfio.host, vfio.fd) {
        (Some(host), _) if !api::Vfio::is_address(host) => {
            return Err(("host", format!("«{host}» is no address of a PCI function")));
        }
        (Some(host), _) => ("host", HostFunction::open(host, container)),
        (None, Some(number)) => {
            let file = take(number, descriptors)?.into();
            let iommu = vfio.iommu_fd.map(|number| take(number, descriptors)).transpose();
            let iommu = iommu.map_err(|(_, problem)| ("iommu_fd", problem))?.map(File::from);
            ("fd", HostFunction::from_file(&format!("fd {number}"), file, iommu, container))
        }
        (None, None) => return Err(("host", "is missing; name a function, or a descriptor with fd".into())),
    };
    opened.map_err(|error| (if error.is_of_iommu() { "iommu_fd" } else { field }, error.to_string()))
}

fn take(number: i32, descriptors: &mut Descriptors) -> Result<OwnedFd, (&'static str, String)> {
    descriptors.take(number).map_err(|error| ("fd", format!("descriptor {number}: {error}")))
}
