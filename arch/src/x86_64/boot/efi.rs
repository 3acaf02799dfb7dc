//! Kernels that firmware starts: EFI executables (UEFI 2.10 §2.1.1), which a bzImage with an EFI stub is, too.

use std::fs::File;

use super::bzimage;
use super::error::{InitramfsError, KernelError};
use super::image::{FileImage, KernelImage};
use super::linux64::LOADER_UNDEFINED;
use super::plan::KernelFile;

/// Where a PE file has the offset of its header, and how file and header begin.
const PE_OFFSET: usize = 0x3c;
const DOS_MAGIC: &[u8] = b"MZ";
const PE_MAGIC: &[u8] = b"PE\0\0";
/// Where a bzImage has its boot loader's number (boot.rst, `type_of_loader`).
const TYPE_OF_LOADER: usize = 0x210;
/// The longest command line where a file tells nothing of its own.
const CMDLINE_MAX: u64 = 2047;

/// What firmware is to know of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct EfiKernel {
    /// Bytes of the file.
    pub size: u32,
    /// Those in front of a bzImage's protected-mode code.
    pub setup: u32,
    /// The longest command line in bytes.
    pub cmdline_max: u64,
}

/// Reads what a kernel says of itself.
///
/// # Errors
/// [`KernelError`] where firmware cannot start it.
pub(in super::super) fn kernel(file: &File) -> Result<EfiKernel, KernelError> {
    let image = FileImage::new(file).map_err(KernelError::Read)?.ok_or(KernelError::NotAFile)?;
    let file = KernelFile::open(&image)?;
    let size = u32::try_from(file.size()).map_err(|_| KernelError::NotEfi("of 4 GiB or more"))?;
    if !file.head().starts_with(DOS_MAGIC) {
        let is = if file.head().starts_with(b"\x7fELF") { "an ELF file" } else { "no EFI executable" };
        return Err(KernelError::NotEfi(is));
    }
    let at = file.bytes(PE_OFFSET as u64, 4, "its PE header")?;
    let at = at.first_chunk().map_or(0, |at| u32::from_le_bytes(*at));
    if file.bytes(at.into(), PE_MAGIC.len(), "its PE header")? != PE_MAGIC {
        return Err(KernelError::NotEfi("no EFI executable"));
    }
    if !bzimage::is_bzimage(file.head()) {
        return Ok(EfiKernel { size, setup: 0, cmdline_max: CMDLINE_MAX });
    }
    let header = bzimage::read_header(&file)?;
    bzimage::check_header(&header)?;
    let setup = bzimage::setup_size(&header);
    file.check(setup, 1, "its protected-mode code")?;
    Ok(EfiKernel { size, setup: u32::try_from(setup).unwrap_or(size), cmdline_max: header.cmdline_size.into() })
}

/// The first `len` bytes of a kernel, with a boot loader in its header that has no number of its own: without one, Linux takes
/// no initramfs. EFI executables are started without a header of theirs being looked at.
///
/// # Errors
/// [`KernelError`] where they cannot be read.
pub(in super::super) fn setup_with_loader(file: &File, len: u32) -> Result<Vec<u8>, KernelError> {
    let image = FileImage::new(file).map_err(KernelError::Read)?.ok_or(KernelError::NotAFile)?;
    let len = usize::try_from(len).unwrap_or(usize::MAX);
    let mut setup = KernelFile::open(&image)?.bytes(0, len, "its setup code")?.into_owned();
    if let Some(loader) = setup.get_mut(TYPE_OF_LOADER) {
        *loader = LOADER_UNDEFINED;
    }
    Ok(setup)
}

/// How long an initramfs is.
///
/// # Errors
/// [`InitramfsError`], where it is no file, or has nothing in it.
pub(in super::super) fn initramfs_size(file: &File) -> Result<u32, InitramfsError> {
    let size = FileImage::new(file).map_err(InitramfsError::Read)?.ok_or(InitramfsError::NotAFile)?.size();
    match u32::try_from(size) {
        Ok(0) => Err(InitramfsError::Empty),
        Ok(size) => Ok(size),
        Err(_) => {
            let ceiling = u32::MAX.into();
            Err(InitramfsError::TooLarge { size, floor: 0, ceiling, room: ceiling })
        }
    }
}
