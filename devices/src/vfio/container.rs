//! What the functions that a VM has of the host reach: one address space of the IOMMU's for all of them.
#![expect(unsafe_code, reason = "memory is named to the IOMMU by its address")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioError, VfioIommufd, VfioOps};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use crate::seam::DmaMap;

/// An address space of the IOMMU's: VFIO's container of groups where functions are named by their addresses, an IOMMUFD where they
/// come as descriptors. It is opened for the first function.
#[derive(Default)]
pub struct Container(OnceLock<Open>);

enum Open {
    Groups(Arc<VfioContainer>),
    Iommufd(Arc<VfioIommufd>),
}

/// The IOMMUFD of a VM.
pub(super) enum Backend {
    Iommufd(Arc<VfioIommufd>),
    /// None was opened yet.
    Missing,
    /// The VM's functions are reached in another way.
    Other,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Container").field("open", &self.0.get().is_some()).finish()
    }
}

impl Container {
    /// The open container of groups; `None` where functions come as descriptors.
    ///
    /// # Errors
    /// The host has no VFIO, or another one.
    pub(super) fn groups(&self) -> Result<Option<Arc<VfioContainer>>, VfioError> {
        if self.0.get().is_none() {
            let new = Open::Groups(Arc::new(VfioContainer::new(None)?));
            self.0.get_or_init(|| new);
        }
        Ok(match self.0.get() {
            Some(Open::Groups(groups)) => Some(groups.clone()),
            _ => None,
        })
    }

    /// The open IOMMUFD; where there is none, it becomes `file`.
    ///
    /// # Errors
    /// The file is no IOMMUFD, or has no room.
    pub(super) fn iommufd(&self, file: Option<File>) -> Result<Backend, VfioError> {
        if self.0.get().is_none() {
            let Some(file) = file else { return Ok(Backend::Missing) };
            let new = VfioIommufd::new(Arc::new(IommuFd::new_from_fd(file)), None, None)?;
            self.0.get_or_init(|| Open::Iommufd(Arc::new(new)));
        }
        Ok(match self.0.get() {
            Some(Open::Iommufd(iommufd)) => Backend::Iommufd(iommufd.clone()),
            _ => Backend::Other,
        })
    }

    fn opened(&self) -> io::Result<&dyn VfioOps> {
        match self.0.get() {
            Some(Open::Groups(groups)) => Ok(&**groups),
            Some(Open::Iommufd(iommufd)) => Ok(&**iommufd),
            None => Err(io::Error::other("no function of the host's is open")),
        }
    }
}

fn len(part: &Range<u64>) -> io::Result<usize> {
    let len = part.end.checked_sub(part.start).and_then(|len| usize::try_from(len).ok());
    len.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl DmaMap for Container {
    fn map(&self, region: &GuestRegionMmap, part: &Range<u64>) -> io::Result<()> {
        let outside = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = part.start.checked_sub(region.start_addr().0).ok_or_else(outside)?;
        let last = part.end.checked_sub(region.start_addr().0).ok_or_else(outside)?;
        let host = region.get_host_address(MemoryRegionAddress(offset)).map_err(io::Error::other)?;
        if last > region.len() {
            return Err(outside());
        }
        // SAFETY: the range lies in guest memory, which this process reads and writes as what others change at any time, and in
        // which Rust has no reference. What of it leaves this process stays the host kernel's until it is unmapped there.
        let mapped = unsafe { self.opened()?.vfio_dma_map(part.start, len(part)?, host) };
        mapped.map_err(|error| io::Error::other(format!("{error}; is the limit on locked memory high enough?")))
    }

    fn unmap(&self, part: &Range<u64>) -> io::Result<()> {
        self.opened()?.vfio_dma_unmap(part.start, len(part)?).map_err(io::Error::other)
    }
}
