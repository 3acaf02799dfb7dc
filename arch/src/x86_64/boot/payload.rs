//! The kernel inside a bzImage: an ELF executable, compressed, with the kernel's relocation table behind it (Linux,
//! `arch/x86/boot/compressed/Makefile`; `payload_offset` in `Documentation/arch/x86/boot.rst`).
//!
//! A monitor that unpacks it spares the guest its own decompressor. Whatever is wrong with a payload is no error of
//! the kernel file: the bzImage can still be entered as it is.

use std::fs::File;
use std::io::{self, Read};

use linux_loader::bootparam::setup_header;

use super::error::KernelError;
use super::image::{FileImage, KernelImage};
use super::map::MemoryMap;
use super::plan::{Kernel, KernelFile};
use super::relocation::Relocations;
use super::{KASLR_FLAG, Protocol, bzimage, elf};

/// Longer than any compressed kernel, in bytes.
const MAX_PACKED: u64 = 256 << 20;
/// No kernel can be longer, in bytes: it is mapped into so many virtual addresses (Linux, `KERNEL_IMAGE_SIZE`).
const MAX_UNPACKED: u32 = 1 << 30;
/// The unpacked size, a little-endian number of 32 bits, ends each payload.
const SIZE_FIELD: u64 = 4;
/// The most memory that an xz decoder may take, in KiB. Kernels are packed with a dictionary of 128 MiB since Linux 6.12,
/// of 32 MiB before (Linux, `scripts/xz_wrap.sh`).
const XZ_MEMORY: u32 = 132 << 10;
/// The longest block of the old lz4 format that Linux uses, in bytes unpacked.
const LZ4_BLOCK: usize = 8 << 20;

/// Why a kernel cannot be unpacked here.
#[derive(Debug, thiserror::Error)]
pub enum PayloadError {
    /// The file is no bzImage.
    #[error("it is no bzImage")]
    None,
    /// Reading the file failed, or nobody is there to do it.
    #[error("its payload cannot be read: {0}")]
    Read(io::Error),
    /// A field of the setup header is wrong.
    #[error("its setup header gives {is}")]
    Header {
        /// What the header says, and what would be right.
        is: String,
    },
    /// It is packed in another way than those known here.
    #[error("its payload begins with {0:02x?}, which is neither zstd, lz4, gzip nor xz")]
    UnknownFormat([u8; 4]),
    /// The payload is damaged, or unpacks to more than it says.
    #[error("its payload cannot be unpacked ({format}): {problem}")]
    Damaged {
        /// How it is packed.
        format: &'static str,
        /// What the decoder found.
        problem: String,
    },
    /// What came out is no kernel that can be entered.
    #[error("what is in its payload cannot be entered: {0}")]
    Kernel(Box<KernelError>),
    /// The relocation table behind the kernel is wrong.
    #[error("its relocation table {problem}")]
    Relocations {
        /// What is wrong with it.
        problem: String,
    },
}

/// Where a bzImage keeps its kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packed {
    offset: u64,
    len: u64,
    /// What the header reserves for the kernel and its unpacking, in bytes.
    init_size: u32,
}

impl Packed {
    /// Finds the payload of a bzImage.
    ///
    /// # Errors
    /// [`PayloadError::None`] for any other file, [`PayloadError::Header`] where the fields tell of no payload, or of one that
    /// lies outside the file.
    pub fn find(kernel: &File) -> Result<Self, PayloadError> {
        let image = FileImage::new(kernel).ok().flatten().ok_or(PayloadError::None)?;
        let file = KernelFile::open(&image).map_err(|_| PayloadError::None)?;
        if !bzimage::is_bzimage(file.head()) {
            return Err(PayloadError::None);
        }
        let header = bzimage::read_header(&file).map_err(|_| PayloadError::None)?;
        let (offset, len) = (u64::from(header.payload_offset), u64::from(header.payload_length));
        if len == 0 {
            return Err(PayloadError::Header { is: "no payload: its length is 0".to_owned() });
        }
        if !(2 * SIZE_FIELD..=MAX_PACKED).contains(&len) {
            return Err(PayloadError::Header {
                is: format!("a payload of {len} bytes, and 8 to {MAX_PACKED} are read"),
            });
        }
        let offset = bzimage::setup_size(&header) + offset;
        if offset + len > file.size() {
            let is = format!("a payload from {offset:#x} up to {:#x} of {:#x} bytes", offset + len, file.size());
            return Err(PayloadError::Header { is });
        }
        Ok(Self { offset, len, init_size: header.init_size })
    }

    /// Reads the payload as it is packed.
    ///
    /// # Errors
    /// Reading failed.
    pub fn read(&self, kernel: &File) -> io::Result<Vec<u8>> {
        let image = FileImage::new(kernel)?.ok_or(io::ErrorKind::InvalidInput)?;
        let mut packed = Vec::new();
        image.read(self.offset, self.len, &mut |bytes| {
            packed.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(packed)
    }

    /// How long the kernel will be unpacked, in bytes, as its payload says.
    ///
    /// # Errors
    /// [`PayloadError::Header`] where no kernel can be that long, or the kernel's own decompressor would have no room
    /// for it.
    pub fn unpacked_size(&self, packed: &[u8]) -> Result<usize, PayloadError> {
        let field = packed.last_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        let max = self.init_size.min(MAX_UNPACKED);
        match usize::try_from(field) {
            Ok(size) if (1..=max).contains(&field) => Ok(size),
            _ => Err(PayloadError::Header {
                is: format!("room for {max} bytes, and its payload says that it unpacks to {field}"),
            }),
        }
    }
}

/// Unpacks a payload into memory of just its unpacked size. No more memory is taken, however long the payload is
/// really, but for what a decoder needs: up to 132 MiB with xz.
///
/// # Errors
/// [`PayloadError::UnknownFormat`], and [`PayloadError::Damaged`] where not exactly `into` is filled.
pub fn unpack(packed: &[u8], into: &mut [u8]) -> Result<(), PayloadError> {
    let magic = packed.first_chunk().copied().unwrap_or_default();
    let content = packed.split_last_chunk::<4>().map_or(packed, |(content, _)| content);
    let (format, result) = match magic {
        [0x28, 0xb5, 0x2f, 0xfd] => ("zstd", unpack_zstd(content, into)),
        [0x02, 0x21, 0x4c, 0x18] => ("lz4", unpack_lz4(content, into)),
        // The field is gzip's own.
        [0x1f, 0x8b, ..] => ("gzip", fill(flate2::read::GzDecoder::new(packed), into)),
        [0xfd, b'7', b'z', b'X'] => ("xz", fill(lzma_rust2::XzReader::new_mem_limit(content, false, XZ_MEMORY), into)),
        other => return Err(PayloadError::UnknownFormat(other)),
    };
    result.map_err(|problem| PayloadError::Damaged { format, problem })
}

fn unpack_zstd(packed: &[u8], into: &mut [u8]) -> Result<(), String> {
    let expected = into.len();
    match zstd_safe::decompress(into, packed) {
        Ok(len) if len == expected => Ok(()),
        Ok(len) => Err(format!("it holds {len} bytes instead of {expected}")),
        Err(code) => Err(zstd_safe::get_error_name(code).to_owned()),
    }
}

/// The old format of lz4: a magic number, then blocks, each with its packed length in front.
fn unpack_lz4(packed: &[u8], mut into: &mut [u8]) -> Result<(), String> {
    let mut rest = packed.get(4..).unwrap_or_default();
    while !into.is_empty() {
        let (len, tail) = rest.split_first_chunk().ok_or("it ends too early")?;
        let len = usize::try_from(u32::from_le_bytes(*len)).map_err(|error| error.to_string())?;
        let (block, tail) = tail.split_at_checked(len).ok_or("a block is longer than the payload")?;
        let room = into.len().min(LZ4_BLOCK);
        let filled = lz4_flex::block::decompress_into(block, &mut into[..room]).map_err(|error| error.to_string())?;
        if filled < room {
            return Err(format!("a block holds {filled} bytes instead of {room}"));
        }
        into = &mut into[room..];
        rest = tail;
    }
    if rest.is_empty() { Ok(()) } else { Err("it holds more than it says".to_owned()) }
}

fn fill(mut from: impl Read, into: &mut [u8]) -> Result<(), String> {
    from.read_exact(into).map_err(|error| error.to_string())?;
    match from.read(&mut [0]) {
        Ok(0) => Ok(()),
        Ok(_) => Err("it holds more than it says".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Reads the headers of an unpacked kernel, and the relocation table behind it.
pub(super) fn plan<'a>(
    file: &KernelFile,
    unpacked: &'a dyn KernelImage,
    map: &MemoryMap,
) -> Result<(KernelFile<'a>, Kernel, Option<Relocations>), PayloadError> {
    let invalid = |error| PayloadError::Kernel(Box::new(error));
    let header = bzimage::read_header(file).map_err(invalid)?;
    bzimage::check_header(&header).map_err(invalid)?;
    let image = KernelFile::open(unpacked).map_err(invalid)?;
    if !elf::is_elf(image.head()) {
        let hint = "it does not begin with \"\\x7fELF\"";
        return Err(invalid(KernelError::UnknownFormat { hint }));
    }
    let mut kernel = elf::plan(&image, map).map_err(invalid)?;
    kernel.choose_protocol(Some(Protocol::Linux64)).map_err(invalid)?;
    check_place(&header, &kernel)?;
    let end = elf::end(&image).map_err(invalid)?;
    let relocations = Relocations::read(&image, end, kernel.range)?;

    // As much as the kernel's own decompressor reserves: the kernel, or what it was unpacked to.
    kernel.range.len = kernel.range.len.max(image.size());
    kernel.cmdline_max = header.cmdline_size.into();
    kernel.initramfs_max = header.initrd_addr_max.into();
    // It tells what a decompressor did, whatever the file says.
    kernel.header = Some(setup_header { loadflags: header.loadflags & !KASLR_FLAG, ..header });
    Ok((image, kernel, relocations))
}

/// The header and the kernel must tell the same place, and an alignment that page tables allow.
fn check_place(header: &setup_header, kernel: &Kernel) -> Result<(), PayloadError> {
    let (preferred, linked) = (header.pref_address, kernel.range.start);
    if preferred != linked {
        let is = format!("{preferred:#x} as its address, and the kernel inside is linked for {linked:#x}");
        return Err(PayloadError::Header { is });
    }
    let align = header.kernel_alignment;
    if !align.is_power_of_two() || !(1 << 21..=1 << 30).contains(&align) || linked % u64::from(align) != 0 {
        let is = format!("an alignment of {align:#x}: a power of two from 2 MiB up that divides {linked:#x} is right");
        return Err(PayloadError::Header { is });
    }
    Ok(())
}
