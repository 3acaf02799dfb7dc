//! A kernel as a plan: which bytes of its image go where, and how it is entered.

use std::borrow::Cow;

use hal::GpaRange;
use linux_loader::bootparam::setup_header;
use vm_memory::GuestMemoryMmap;

use super::error::KernelError;
use super::image::{self, KernelImage};
use super::map::MemoryMap;
use super::{Protocol, bzimage, elf};

/// Bytes read from the start of a kernel file at once. The headers of a bzImage lie in them, and mostly those of an
/// ELF file too.
const HEAD_SIZE: u64 = 4096;

/// A kernel image whose beginning has been read.
pub(super) struct KernelFile<'a> {
    image: &'a dyn KernelImage,
    head: Vec<u8>,
}

impl<'a> KernelFile<'a> {
    pub(super) fn open(image: &'a dyn KernelImage) -> Result<Self, KernelError> {
        if image.size() == 0 {
            return Err(KernelError::Empty);
        }
        let mut file = Self { image, head: Vec::new() };
        file.head = file.read(0, image.size().min(HEAD_SIZE))?;
        Ok(file)
    }

    /// The image's size in bytes.
    pub(super) fn size(&self) -> u64 {
        self.image.size()
    }

    /// The first bytes of the image.
    pub(super) fn head(&self) -> &[u8] {
        &self.head
    }

    /// Some bytes of the image. `what` names them in an error. The caller bounds `len`.
    pub(super) fn bytes(&self, offset: u64, len: usize, what: &str) -> Result<Cow<'_, [u8]>, KernelError> {
        let size = u64::try_from(len).unwrap_or(u64::MAX);
        self.check(offset, size, what)?;
        let in_head = usize::try_from(offset).ok().and_then(|start| self.head.get(start..start.checked_add(len)?));
        match in_head {
            Some(bytes) => Ok(Cow::Borrowed(bytes)),
            None => self.read(offset, size).map(Cow::Owned),
        }
    }

    fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, KernelError> {
        let mut bytes = Vec::new();
        let mut keep = |part: &[u8]| {
            bytes.extend_from_slice(part);
            Ok(())
        };
        self.image.read(offset, len, &mut keep).map_err(KernelError::Read)?;
        Ok(bytes)
    }

    /// Checks that `len` bytes from `offset` on are within the image.
    pub(super) fn check(&self, offset: u64, len: u64, what: &str) -> Result<(), KernelError> {
        let (needed, size) = (offset.saturating_add(len), self.size());
        if needed > size {
            return Err(KernelError::Truncated { what: what.to_owned(), needed, size });
        }
        Ok(())
    }
}

/// Bytes of a file that go to a place in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where they begin in the file.
    pub(super) file_offset: u64,
    /// Where they go, and how many.
    pub(super) to: GpaRange,
}

/// A kernel whose every number has been checked against its file and the guest's memory.
#[derive(Debug)]
pub(super) struct Kernel {
    /// What is copied from the file. All of it lies in `range`.
    pub(super) pieces: Vec<Piece>,
    /// All memory that the kernel needs before it manages memory itself.
    pub(super) range: GpaRange,
    /// The entry point of the 64-bit Linux protocol.
    pub(super) linux64_entry: u64,
    /// The entry point of the PVH protocol, where the kernel has one.
    pub(super) pvh_entry: Option<u32>,
    /// The setup header of a bzImage.
    pub(super) header: Option<setup_header>,
    /// The longest command line that the kernel takes, in bytes without the closing zero.
    pub(super) cmdline_max: u64,
    /// The highest address that an initramfs may occupy.
    pub(super) initramfs_max: u64,
}

impl Kernel {
    /// Reads the headers of a kernel file.
    pub(super) fn plan(file: &KernelFile, map: &MemoryMap) -> Result<Self, KernelError> {
        let head = file.head();
        if elf::is_elf(head) {
            elf::plan(file, map)
        } else if bzimage::is_bzimage(head) {
            bzimage::plan(file, map)
        } else {
            Err(KernelError::UnknownFormat { hint: format_hint(head) })
        }
    }

    /// The protocol to enter it by. Its entry point is code of the file.
    pub(super) fn choose_protocol(&self, wanted: Option<Protocol>) -> Result<Protocol, KernelError> {
        let (protocol, entry) = match (wanted, self.pvh_entry) {
            (None | Some(Protocol::Pvh), Some(entry)) => (Protocol::Pvh, entry.into()),
            (None | Some(Protocol::Linux64), _) => (Protocol::Linux64, self.linux64_entry),
            (Some(wanted @ Protocol::Pvh), None) => {
                let reason = if self.header.is_some() {
                    "a bzImage has no PVH entry point, only the vmlinux inside it has"
                } else {
                    "the ELF file has no note of type 18 (XEN_ELFNOTE_PHYS32_ENTRY)"
                };
                return Err(KernelError::Protocol { wanted, reason });
            }
        };
        let filled = |piece: &Piece| entry >= piece.to.start && entry - piece.to.start < piece.to.len;
        if self.pieces.iter().any(filled) { Ok(protocol) } else { Err(KernelError::Entry { protocol, entry }) }
    }

    /// Copies the kernel into guest memory; with `share`, maps what can be.
    pub(super) fn load(&self, file: &KernelFile, memory: &GuestMemoryMmap, share: bool) -> Result<(), KernelError> {
        for piece in &self.pieces {
            image::copy(file.image, piece.file_offset, piece.to, memory, share).map_err(KernelError::Read)?;
        }
        Ok(())
    }

    /// Moves the plan to another place in guest memory, a number of bytes higher. The PVH entry point stays: that
    /// protocol enters a kernel where it was linked.
    pub(super) fn move_up(&mut self, bytes: u64) {
        for piece in &mut self.pieces {
            piece.to.start += bytes;
        }
        self.range.start += bytes;
        self.linux64_entry += bytes;
    }
}

/// What a file that is no kernel looks like.
fn format_hint(head: &[u8]) -> &'static str {
    const COMPRESSED: [(&[u8], &str); 5] = [
        (b"\x1f\x8b", "it is compressed with gzip and must be decompressed first"),
        (b"\x28\xb5\x2f\xfd", "it is compressed with zstd and must be decompressed first"),
        (b"\xfd7zXZ\0", "it is compressed with xz and must be decompressed first"),
        (b"\x02\x21\x4c\x18", "it is compressed with lz4 and must be decompressed first"),
        (b"\x04\x22\x4d\x18", "it is compressed with lz4 and must be decompressed first"),
    ];
    if head.get(56..60) == Some(b"ARM\x64") {
        return "it is a kernel for another machine, aarch64";
    }
    let known = COMPRESSED.iter().find(|(magic, _)| head.starts_with(magic));
    known.map_or("it has no \"HdrS\" at byte 514 and does not begin with \"\\x7fELF\"", |(_, hint)| *hint)
}
