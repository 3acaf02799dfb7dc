//! What the configuration names on the host and the machine only reads or takes over: kernel, initramfs, disks, taps.
//!
//! All of it is opened before anything is made, and everything that is wrong is reported at once. It stays open across
//! resets of the guest, so that a disk's lock and a tap's queue are never given up in between.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use api::{DeviceConfig, Problem, VmConfig};
use devices::disk::{DiskOptions, RawDisk};
use devices::net::Tap;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::kernel::Kernels;

/// The opened inputs of a VM.
pub struct Inputs {
    /// The kernel file.
    pub kernel: File,
    /// What makes it ready to be loaded.
    pub kernels: Kernels,
    /// The initial file system.
    pub initramfs: Option<File>,
    /// The kernel's System.map, where one is named, or one is wanted and found.
    pub system_map: Option<File>,
    /// Disks by the id of their device.
    pub disks: BTreeMap<String, Arc<RawDisk>>,
    /// Taps by the id of their device.
    pub taps: BTreeMap<String, Tap>,
}

impl Inputs {
    /// Opens everything that `config` names.
    ///
    /// # Errors
    /// Every problem, each with its field.
    pub fn open(config: &VmConfig) -> Result<Self, Vec<Problem>> {
        let mut problems = Vec::new();
        let kernel = open_regular(&config.kernel.path, "kernel.path", "a bzImage or an ELF kernel", &mut problems);
        let initramfs = config
            .kernel
            .initramfs
            .as_ref()
            .map(|path| open_regular(path, "kernel.initramfs", "a cpio archive", &mut problems));
        let system_map = system_map(config, &mut problems);
        let mut disks = BTreeMap::new();
        let mut taps = BTreeMap::new();
        for (index, device) in config.devices.iter().enumerate() {
            let opened = match device {
                DeviceConfig::Disk(disk) => {
                    let options = DiskOptions { readonly: disk.readonly, direct: disk.direct };
                    RawDisk::open(&disk.path, options)
                        .map(|opened| drop(disks.insert(disk.id.clone(), Arc::new(opened))))
                        .map_err(|error| Problem::new(format!("devices[{index}].path"), error.to_string(), ""))
                }
                DeviceConfig::Net(net) => open_tap(net)
                    .map(|tap| drop(taps.insert(net.id.clone(), tap)))
                    .map_err(|(field, problem)| Problem::new(format!("devices[{index}].{field}"), problem, "")),
                DeviceConfig::Console(_) | DeviceConfig::Rng(_) => Ok(()),
            };
            problems.extend(opened.err());
        }
        match (kernel, initramfs) {
            (Some(kernel), initramfs) if problems.is_empty() => {
                let kernels = Kernels::default();
                Ok(Self { kernel, kernels, initramfs: initramfs.flatten(), system_map, disks, taps })
            }
            _ => Err(problems),
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
fn open_tap(net: &api::Net) -> Result<Tap, (&'static str, String)> {
    match (&net.tap, net.fd) {
        (Some(name), _) => Tap::open(name).map_err(|error| ("tap", error.to_string())),
        (None, Some(number)) => {
            let fd = inherited(number).map_err(|error| ("fd", format!("descriptor {number}: {error}")))?;
            Tap::from_fd(&format!("fd {number}"), fd).map_err(|error| ("fd", error.to_string()))
        }
        (None, None) => Err(("tap", "is missing; name a tap, or an inherited descriptor with fd".into())),
    }
}

/// Takes over a descriptor that the process was started with, and keeps it from programs started later.
#[expect(unsafe_code, reason = "an inherited descriptor is known by its number only")]
fn inherited(number: i32) -> io::Result<OwnedFd> {
    if number < 3 {
        return Err(io::Error::other("0 to 2 are the standard streams"));
    }
    // SAFETY: the borrow ends with the call, which refuses a number that is not open.
    fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, and inherited for this device: nothing of this process opened it, since the configuration
    // is opened first and validation refuses a number that is named twice.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}
