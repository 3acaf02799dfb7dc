//! Loading a kernel: from the files a user names to a boot processor at its first instruction.
//!
//! A kernel file is first turned into a plan ([`plan::Kernel`]) by [`bzimage`], [`payload`] or [`elf`], with every number
//! checked against the file's size and the guest's RAM. Only then is anything written to guest memory.

mod bzimage;
mod efi;
mod elf;
mod error;
mod image;
mod kaslr;
mod linux64;
mod map;
pub mod payload;
mod plan;
mod pvh;
pub(super) mod registers;
mod relocation;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;

use hal::{BootRegisters, CpuidEntry, GpaRange};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub(super) use self::efi::{EfiKernel, initramfs_size, kernel as efi_kernel, setup_with_loader};
pub use self::error::{BootError, CmdlineError, InitramfsError, KernelError, MemoryError};
pub(super) use self::image::FileImage;
pub use self::image::{KernelImage, Sink};
pub use self::kaslr::Slide;
use self::map::MemoryMap;
use self::plan::{Kernel, KernelFile};
use self::relocation::Relocations;
use super::layout::{self, PAGE_SIZE};
use super::platform::Platform;

/// The bit of the setup header's `loadflags` by which a decompressor tells the kernel that it was placed at random: then
/// the kernel places its modules and memory maps at random too (boot.rst, `KASLR_FLAG`).
const KASLR_FLAG: u8 = 1 << 1;
const RESET_PORT: [u8; 2] = layout::ACPI_RESET_PORT.to_le_bytes();
/// Real-mode code that resets the machine: `mov dx, port; mov al, value; out dx, al; hlt; jmp` back to the `hlt`.
///
/// Linux comes here for a reboot: on a hardware-reduced platform it asks for EFI, finds none, and tries the BIOS next,
/// not the reset register.
const RESET_CODE: [u8; 9] =
    [0xba, RESET_PORT[0], RESET_PORT[1], 0xb0, layout::ACPI_RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The 64-bit Linux boot protocol (Linux, `Documentation/arch/x86/boot.rst`): long mode, RSI at the zero page.
    Linux64,
    /// The PVH protocol (Xen, `docs/misc/pvh.pandoc`): 32-bit protected mode, EBX at the start info.
    Pvh,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Linux64 => "64-bit Linux",
            Self::Pvh => "PVH",
        })
    }
}

/// What to boot.
#[derive(Debug, Clone, Copy)]
pub struct BootSource<'a> {
    /// The kernel: a bzImage or an x86-64 ELF executable.
    pub kernel: &'a File,
    /// The kernel inside a bzImage, where it has been unpacked ([`payload`]). It is entered instead of the bzImage's own
    /// decompressor.
    pub unpacked: Option<&'a dyn KernelImage>,
    /// Pages of an unpacked kernel that is in a file ([`KernelImage::map_over`]) are mapped, so that guests share those
    /// that none of them changes. Only for guest memory that is private to this process.
    pub share: bool,
    /// Two random numbers, for an unpacked kernel to be placed at random where it can be (KASLR); `None` leaves it at the
    /// address that it is linked for.
    pub random: Option<[u64; 2]>,
    /// An initramfs, handed to the kernel as it is.
    pub initramfs: Option<&'a File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
    /// The protocol, for a kernel that was not unpacked; `None` takes PVH for an ELF file that offers it, and the 64-bit Linux protocol otherwise.
    pub protocol: Option<Protocol>,
    /// vCPUs can map pages of 1 GiB ([`gigabyte_pages`]), which saves page tables.
    pub gigabyte_pages: bool,
}

/// A kernel in guest memory.
#[derive(Debug, Clone)]
pub struct LoadedKernel {
    /// How it is entered.
    pub protocol: Protocol,
    /// The boot processor's registers at the entry point.
    pub registers: BootRegisters,
    /// The memory that the kernel occupies, from its lowest address to its highest, with what it clears or
    /// decompresses into.
    pub kernel: GpaRange,
    /// Where the initramfs lies.
    pub initramfs: Option<GpaRange>,
    /// How far the kernel was moved from the addresses that it is linked for; `None` where it was not to be, or cannot
    /// be, placed at random. A bzImage that unpacks itself chooses later.
    pub slide: Option<Slide>,
}

/// Loads a kernel with its initramfs, command line and boot data into guest memory.
///
/// `memory` must hold the RAM of [`layout::ram_ranges`], reading as zeros: a kernel's zero-initialized data is not
/// written, so that its pages stay untouched. After a reset the monitor empties memory before it loads again.
///
/// The ACPI tables are not written here ([`super::acpi::write`] does that), but the kernel is told of them.
///
/// # Errors
/// [`BootError`], which tells apart what is wrong with the kernel, its payload, the initramfs, the command line and the
/// memory. The messages do not name the files. After [`BootError::Payload`] nothing was written, and the kernel can be
/// loaded without [`BootSource::unpacked`].
pub fn load_kernel(
    memory: &GuestMemoryMmap,
    platform: &Platform,
    source: &BootSource,
) -> Result<LoadedKernel, BootError> {
    let map = MemoryMap::new(memory, platform)?;
    let file = FileImage::new(source.kernel).map_err(KernelError::Read)?.ok_or(KernelError::NotAFile)?;
    let mut file = KernelFile::open(&file)?;
    let (mut kernel, mut relocations) = (Kernel::plan(&file, &map)?, None);
    let mut protocol = kernel.choose_protocol(source.protocol)?;
    if let Some(unpacked) = source.unpacked {
        (file, kernel, relocations) = payload::plan(&file, unpacked, &map)?;
        protocol = Protocol::Linux64;
    }
    check_cmdline(source.cmdline, kernel.cmdline_max)?;
    let initramfs = source.initramfs.map(|file| place_initramfs(file, &kernel, &map)).transpose()?;
    let slide = place_at_random(&mut kernel, relocations.as_ref(), initramfs, &map, source);
    kernel.move_up(slide.map_or(0, |slide| slide.physical));

    kernel.load(&file, memory, source.share)?;
    if let (Some(slide), Some(relocations)) = (slide, &relocations) {
        relocations.apply(memory, kernel.range.start, slide.virt)?;
    }
    if let (Some(file), Some(range)) = (source.initramfs, initramfs) {
        load_initramfs(file, range, memory)?;
    }
    write_cmdline(source.cmdline, memory)?;
    write_boot_data(memory, "the reset vector", layout::RESET_VECTOR, &RESET_CODE)?;
    let registers = match protocol {
        Protocol::Linux64 => linux64::prepare(memory, &map, &kernel, initramfs, source.gigabyte_pages)?,
        Protocol::Pvh => pvh::prepare(memory, &map, &kernel, initramfs)?,
    };
    Ok(LoadedKernel { protocol, registers, kernel: kernel.range, initramfs, slide })
}

/// Chooses a random place for an unpacked kernel that can be moved, and tells the kernel by its header.
fn place_at_random(
    kernel: &mut Kernel,
    relocations: Option<&Relocations>,
    initramfs: Option<GpaRange>,
    map: &MemoryMap,
    source: &BootSource,
) -> Option<Slide> {
    let (header, random) = (kernel.header.as_mut()?, source.random?);
    relocations?;
    let candidate = kaslr::Candidate { linked: kernel.range, align: header.kernel_alignment.into(), taken: initramfs };
    let slide = kaslr::choose(&candidate, map, source.cmdline, random)?;
    header.loadflags |= KASLR_FLAG;
    Some(slide)
}

/// Whether vCPUs with these leaves can map pages of 1 GiB (bit 26 of EDX in leaf 0x80000001).
pub fn gigabyte_pages(cpuid: &[CpuidEntry]) -> bool {
    cpuid.iter().any(|leaf| leaf.function == 0x8000_0001 && leaf.edx & 1 << 26 != 0)
}

pub(super) fn check_cmdline(cmdline: &str, kernel_max: u64) -> Result<(), CmdlineError> {
    let max = kernel_max.min(layout::CMDLINE_MAX - 1);
    let bytes = cmdline.len();
    if u64::try_from(bytes).map_or(true, |bytes| bytes > max) {
        return Err(CmdlineError::TooLong { bytes, max });
    }
    match cmdline.find('\0') {
        Some(at) => Err(CmdlineError::Nul { at }),
        None => Ok(()),
    }
}

fn write_cmdline(cmdline: &str, memory: &GuestMemoryMmap) -> Result<(), BootError> {
    let mut bytes = Vec::with_capacity(cmdline.len() + 1);
    bytes.extend_from_slice(cmdline.as_bytes());
    bytes.push(0);
    write_boot_data(memory, "the command line", layout::CMDLINE, &bytes)
}

/// Finds the place of an initramfs: as high in low RAM as the kernel can reach, above the kernel itself.
fn place_initramfs(file: &File, kernel: &Kernel, map: &MemoryMap) -> Result<GpaRange, InitramfsError> {
    let size = FileImage::new(file).map_err(InitramfsError::Read)?.ok_or(InitramfsError::NotAFile)?.size();
    if size == 0 {
        return Err(InitramfsError::Empty);
    }
    let floor = kernel.range.start.saturating_add(kernel.range.len);
    let ceiling = map.kernel_ram().end().min(kernel.initramfs_max.saturating_add(1));
    let start = ceiling.checked_sub(size).map(|start| start & !(PAGE_SIZE - 1)).filter(|start| *start >= floor);
    match start {
        Some(start) => Ok(GpaRange { start, len: size }),
        None => Err(InitramfsError::TooLarge { size, floor, ceiling, room: ceiling.saturating_sub(floor) }),
    }
}

fn load_initramfs(file: &File, range: GpaRange, memory: &GuestMemoryMmap) -> Result<(), InitramfsError> {
    let image = FileImage::new(file).map_err(InitramfsError::Read)?.ok_or(InitramfsError::NotAFile)?;
    image::copy(&image, 0, range, memory, false).map_err(InitramfsError::Read)
}

/// Writes boot data below 1 MiB.
fn write_boot_data(memory: &GuestMemoryMmap, what: &'static str, at: u64, bytes: &[u8]) -> Result<(), BootError> {
    memory.write_slice(bytes, GuestAddress(at)).map_err(|source| BootError::Write { what, at, source })
}
