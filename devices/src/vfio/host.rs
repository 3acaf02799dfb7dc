//! A function of the host's by its address, and why it cannot be had.

use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::Path;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_REGION_INFO_FLAG_MMAP,
};
use vfio_ioctls::{VfioDevice, VfioError, VfioRegionInfoCap};
use vmm_sys_util::eventfd::EventFd;

use super::container::Backend;
use super::{Container, Mapping, Physical, Region, Signals};

/// The driver that a function must be bound to.
const DRIVER: &str = "vfio-pci";

/// Why a function of the host's cannot be passed through.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is none.
    #[error("the host has no PCI function {0}; `lspci -D` lists those that it has")]
    Missing(String),
    /// No IOMMU would keep it from memory that is not the guest's.
    #[error(
        "{0} is behind no IOMMU that is switched on: it takes the firmware's setting (VT-d, AMD-Vi) and, with Intel's, \
         intel_iommu=on on the host kernel's command line"
    )]
    NoIommu(String),
    /// Another driver has it, or none.
    #[error(
        "{function} is bound to {driver}, not to vfio-pci; bind it: `driverctl set-override {function} vfio-pci`, or by hand: \
         `echo vfio-pci > {path}/driver_override`, `echo {function} > {path}/driver/unbind` where it has a driver, \
         `echo {function} > /sys/bus/pci/drivers_probe`"
    )]
    OtherDriver {
        /// The function's address.
        function: String,
        /// What it is bound to.
        driver: String,
        /// Its folder.
        path: String,
    },
    /// The others of its IOMMU group are in use by the host.
    #[error(
        "{function} cannot be had without the others of its IOMMU group, {others}: each must be bound to vfio-pci, or to no \
         driver"
    )]
    Group {
        /// The function's address.
        function: String,
        /// The addresses of the others.
        others: String,
    },
    /// A function by descriptor needs an open `/dev/iommu`, and there is none.
    #[error("there is no open /dev/iommu; the VM's first function by descriptor brings one")]
    NoIommufd,
    /// What was given as an open `/dev/iommu` is none.
    #[error("it is no open /dev/iommu: {0}")]
    NotIommufd(VfioError),
    /// Functions by address and by descriptor are reached by different ways.
    #[error("{0}: functions by address and functions by descriptor cannot be in one VM")]
    Mixed(String),
    /// VFIO refuses.
    #[error("{function}: {error}")]
    Vfio {
        /// The function's address.
        function: String,
        /// What it says.
        error: String,
    },
}

impl OpenError {
    /// Whether it is about the descriptor of the IOMMU.
    pub fn is_of_iommu(&self) -> bool {
        matches!(self, Self::NoIommufd | Self::NotIommufd(_))
    }
}

/// A function of the host's.
pub struct HostFunction {
    device: VfioDevice,
    name: String,
}

impl std::fmt::Debug for HostFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("HostFunction").field(&self.name).finish()
    }
}

impl HostFunction {
    /// Takes a function by its address (`0000:01:00.0`, and nothing else). It is the process's alone until it is dropped.
    ///
    /// # Errors
    /// [`OpenError`] says what is missing.
    pub fn open(address: &str, container: &Container) -> Result<Self, OpenError> {
        let path = Path::new("/sys/bus/pci/devices").join(address);
        check(address, &path)?;
        let wrong = |error: VfioError| refused(address, &path, &error);
        let groups = container.groups().map_err(wrong)?.ok_or_else(|| OpenError::Mixed(address.to_owned()))?;
        let device = VfioDevice::new(&path, groups, false).map_err(wrong)?;
        Ok(Self { device, name: address.to_owned() })
    }

    /// Takes a function by its open descriptor, `/dev/vfio/devices/vfioN`, as [`HostFunction::open`] does; what it reaches is up to
    /// an open `/dev/iommu`: that of the first such function, which must bring one.
    ///
    /// # Errors
    /// [`OpenError`] says what is missing.
    pub fn from_file(
        name: &str,
        function: File,
        iommu: Option<File>,
        container: &Container,
    ) -> Result<Self, OpenError> {
        let wrong = |error: VfioError| OpenError::Vfio { function: name.to_owned(), error: error.to_string() };
        let iommu = match container.iommufd(iommu).map_err(OpenError::NotIommufd)? {
            Backend::Iommufd(iommu) => iommu,
            Backend::Missing => return Err(OpenError::NoIommufd),
            Backend::Other => return Err(OpenError::Mixed(name.to_owned())),
        };
        let device = VfioDevice::new_from_fd(function, iommu, true).map_err(wrong)?;
        Ok(Self { device, name: name.to_owned() })
    }
}

/// What can be seen to be missing before VFIO is asked.
fn check(address: &str, path: &Path) -> Result<(), OpenError> {
    if !path.exists() {
        return Err(OpenError::Missing(address.to_owned()));
    }
    if !path.join("iommu_group").exists() {
        return Err(OpenError::NoIommu(address.to_owned()));
    }
    let driver = fs::read_link(path.join("driver")).ok();
    let driver = match driver.as_deref().and_then(Path::file_name) {
        Some(name) if name == DRIVER => return Ok(()),
        Some(name) => format!("the driver {}", name.display()),
        None => "no driver".to_owned(),
    };
    Err(OpenError::OtherDriver { function: address.to_owned(), driver, path: path.display().to_string() })
}

fn refused(address: &str, path: &Path, error: &VfioError) -> OpenError {
    let function = address.to_owned();
    if matches!(error, VfioError::GroupViable) {
        let members = fs::read_dir(path.join("iommu_group/devices")).into_iter().flatten().flatten();
        let members = members.map(|entry| entry.file_name().to_string_lossy().into_owned());
        let others: Vec<String> = members.filter(|other| other != address).collect();
        return OpenError::Group { function, others: others.join(", ") };
    }
    let hint = match error {
        VfioError::OpenContainer(_) => "; `modprobe vfio-pci` makes it",
        VfioError::OpenGroup(error, _) if error.kind() == io::ErrorKind::ResourceBusy => "; another process has it",
        VfioError::OpenGroup(error, _) if error.kind() == io::ErrorKind::PermissionDenied => {
            "; it belongs to another user"
        }
        _ => "",
    };
    OpenError::Vfio { function, error: format!("{error}{hint}") }
}

fn index(region: Region) -> u32 {
    match region {
        Region::Bar(bar) => bar.into(),
        Region::Config => VFIO_PCI_CONFIG_REGION_INDEX,
    }
}

fn irq_index(kind: Signals) -> u32 {
    match kind {
        Signals::Msi => VFIO_PCI_MSI_IRQ_INDEX,
        Signals::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

impl Physical for HostFunction {
    fn name(&self) -> &str {
        &self.name
    }

    fn len(&self, region: Region) -> u64 {
        self.device.get_region_size(index(region))
    }

    fn mappable(&self, bar: u8) -> Vec<Range<u64>> {
        let index = u32::from(bar);
        if self.device.get_region_flags(index) & VFIO_REGION_INFO_FLAG_MMAP == 0 {
            return Vec::new();
        }
        let sparse = self.device.get_region_caps(index).into_iter().find_map(|capability| match capability {
            VfioRegionInfoCap::SparseMmap(sparse) => Some(sparse.areas),
            _ => None,
        });
        let whole = 0..self.len(Region::Bar(bar));
        sparse.map_or_else(
            || vec![whole],
            |areas| areas.iter().map(|area| area.offset..area.offset.saturating_add(area.size)).collect(),
        )
    }

    #[expect(unsafe_code, reason = "the crate gives the device's descriptor as a number")]
    fn map(&self, bar: u8, part: &Range<u64>) -> io::Result<Mapping> {
        let start = self.device.get_region_offset(bar.into());
        let part = start.saturating_add(part.start)..start.saturating_add(part.end);
        // SAFETY: the descriptor is the device's, which is open as long as this borrow.
        let file = unsafe { BorrowedFd::borrow_raw(self.device.as_raw_fd()) };
        Mapping::of(&File::from(file.try_clone_to_owned()?), &part)
    }

    fn read(&self, region: Region, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        self.device.region_read(index(region), data, offset);
    }

    fn write(&self, region: Region, offset: u64, data: &[u8]) {
        self.device.region_write(index(region), data, offset);
    }

    fn signals(&self, kind: Signals) -> u16 {
        let count = self.device.get_irq_info(irq_index(kind)).map_or(0, |irq| irq.count);
        u16::try_from(count).unwrap_or(u16::MAX)
    }

    fn signal_to(&self, kind: Signals, events: &[&EventFd]) -> io::Result<()> {
        let index = irq_index(kind);
        let done = match events {
            [] => self.device.disable_irq(index),
            events => self.device.enable_irq(index, events.to_vec()),
        };
        done.map_err(io::Error::other)
    }

    fn reset(&self) {
        self.device.reset();
    }
}
