//! An unpacked kernel in a file: its bytes in blocks, a table with a checksum of each block, and a footer. A damaged
//! block is found when it is read, and what is not read costs nothing.
//!
//! | Part   | Bytes               | Content                                                                         |
//! |--------|---------------------|---------------------------------------------------------------------------------|
//! | blocks | 256 KiB each        | the kernel, zeros behind its end; a block of zeros is a hole in the file        |
//! | table  | 8 a block           | bit 63: the block is not all zeros; bits 62 to 0: those of its checksum         |
//! | footer | 32                  | [`MAGIC`], the kernel's bytes (64 bits), checksum of the table (64 bits)        |
//!
//! All numbers are little-endian. The checksum is rapidhash, version 3: a kernel is checked at each boot, and this takes
//! no longer than a CRC does with a processor's help, and a quarter of the time where that help is emulated.

use std::fs::File;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use arch::{KernelImage, Sink};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use rapidhash::v3::rapidhash_v3;
use vm_memory::{FileOffset, MmapRegion};

const MAGIC: &[u8; 16] = b"halyard kernel 2";
const BLOCK: usize = 256 << 10;
const FOOTER: usize = 32;
/// In the table: the block is in the file.
const FILLED: u64 = 1 << 63;
/// No kernel is longer.
const MAX_SIZE: u64 = 1 << 30;

/// An unpacked kernel in a file.
#[derive(Debug)]
pub struct Entry {
    /// The file's blocks.
    mapping: MmapRegion,
    size: u64,
    table: Vec<u64>,
    /// What a block that is not in the file holds. As a constant it would take as much room in the program.
    zeros: Vec<u8>,
}

impl Entry {
    /// Reads footer and table of a file.
    ///
    /// # Errors
    /// Reading failed, or they are damaged.
    pub(super) fn open(file: File) -> io::Result<Self> {
        let len = file.metadata()?.len();
        let mut footer = [0; FOOTER];
        let footer_at = len.checked_sub(FOOTER as u64).ok_or_else(damaged)?;
        file.read_exact_at(&mut footer, footer_at)?;
        let field = |range: std::ops::Range<usize>| {
            footer.get(range).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
        };
        let size = field(16..24);
        let blocks = size.div_ceil(BLOCK as u64);
        if !footer.starts_with(MAGIC) || size > MAX_SIZE || footer_at != blocks * (BLOCK as u64 + 8) {
            return Err(damaged());
        }
        let mut table = vec![0; usize::try_from(blocks * 8).map_err(io::Error::other)?];
        file.read_exact_at(&mut table, blocks * BLOCK as u64)?;
        if rapidhash_v3(&table) != field(24..32) {
            return Err(damaged());
        }
        let table: Vec<u64> = table.as_chunks().0.iter().map(|word: &[u8; 8]| u64::from_le_bytes(*word)).collect();
        let len = table.len() * BLOCK;
        let (protection, flags) = (libc::PROT_READ, libc::MAP_PRIVATE | libc::MAP_NORESERVE);
        // A copy by read(2) would take longer than all that is done with the bytes.
        let mapping = MmapRegion::build(Some(FileOffset::new(file, 0)), len, protection, flags);
        Ok(Self { mapping: mapping.map_err(io::Error::other)?, size, table, zeros: vec![0; BLOCK] })
    }

    /// Writes a file that [`Entry::open`] reads.
    pub(super) fn write(file: &File, kernel: &[u8]) -> io::Result<()> {
        let mut table = Vec::new();
        for (number, block) in kernel.chunks(BLOCK).enumerate() {
            let filled = block.iter().any(|byte| *byte != 0);
            let mut word = 0;
            if filled {
                let mut padded = block.to_vec();
                padded.resize(BLOCK, 0);
                file.write_all_at(&padded, (number * BLOCK) as u64)?;
                word = FILLED | rapidhash_v3(&padded);
            }
            table.extend_from_slice(&word.to_le_bytes());
        }
        let table_at = kernel.len().div_ceil(BLOCK) * BLOCK;
        let mut footer = [0; FOOTER];
        footer[..16].copy_from_slice(MAGIC);
        footer[16..24].copy_from_slice(&(kernel.len() as u64).to_le_bytes());
        footer[24..].copy_from_slice(&rapidhash_v3(&table).to_le_bytes());
        file.write_all_at(&table, table_at as u64)?;
        file.write_all_at(&footer, (table_at + table.len()) as u64)
    }

    /// A block that has been checked.
    #[expect(unsafe_code, reason = "a mapping has no safe way to be looked at without a copy")]
    fn block(&self, number: usize) -> io::Result<&[u8]> {
        let word = self.table.get(number).copied().ok_or(io::ErrorKind::UnexpectedEof)?;
        if word & FILLED == 0 {
            return Ok(&self.zeros);
        }
        // SAFETY: the mapping has a block for each word of the table and lives as long as `self`. Nobody changes the
        // file: only its owner may write to it, and an entry is written under another name and then renamed.
        let block = unsafe { std::slice::from_raw_parts(self.mapping.as_ptr().add(number * BLOCK), BLOCK) };
        if word == FILLED | rapidhash_v3(block) { Ok(block) } else { Err(damaged()) }
    }
}

#[expect(unsafe_code, reason = "a part of guest memory is replaced")]
impl KernelImage for Entry {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, len: u64, sink: &mut Sink) -> io::Result<()> {
        let mut at = usize::try_from(offset).map_err(io::Error::other)?;
        let end = usize::try_from(offset.saturating_add(len).min(self.size)).map_err(io::Error::other)?;
        while at < end {
            let (number, start) = (at / BLOCK, at % BLOCK);
            let block = self.block(number)?;
            let part = block.get(start..BLOCK.min(start + end - at)).ok_or_else(damaged)?;
            sink(part)?;
            at += part.len();
        }
        Ok(())
    }

    // SAFETY: the caller's, as the trait says.
    unsafe fn map_over(&self, offset: u64, len: usize, to: NonNull<u8>) -> io::Result<bool> {
        let (Some(file), Some(size)) = (self.mapping.file_offset(), NonZeroUsize::new(len)) else { return Ok(false) };
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED | MapFlags::MAP_NORESERVE;
        // SAFETY: the range may be replaced, as the caller says. The file changes no more than for `block`.
        unsafe { mmap(Some(to.addr()), size, protection, flags, file.file(), offset) }?;
        Ok(true)
    }
}

fn damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it is damaged")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Vec<u8> {
        let mut kernel: Vec<u8> = (0..=252_u8).cycle().take(3 * BLOCK + 5000).collect();
        kernel[BLOCK..2 * BLOCK].fill(0);
        kernel
    }

    fn written(kernel: &[u8]) -> File {
        let file = tempfile::tempfile().unwrap();
        Entry::write(&file, kernel).unwrap();
        file
    }

    fn read(entry: &Entry, offset: u64, len: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        entry.read(offset, len, &mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })?;
        Ok(bytes)
    }

    #[test]
    fn what_was_written_is_read_from_any_place() {
        let kernel = kernel();
        let entry = Entry::open(written(&kernel)).unwrap();
        assert_eq!(entry.size(), kernel.len() as u64);
        for (start, len) in [(0, kernel.len()), (5, 10), (BLOCK - 3, 7), (2 * BLOCK - 1, BLOCK + 2), (4, 0)] {
            assert_eq!(read(&entry, start as u64, len as u64).unwrap(), kernel[start..start + len], "{start} {len}");
        }
    }

    #[test]
    fn a_damaged_byte_is_found_wherever_it_is() {
        let kernel = kernel();
        let len = written(&kernel).metadata().unwrap().len();
        let places = [0, BLOCK as u64 * 2, 3 * BLOCK as u64 + 6000, len - 40, len - 30, len - 10, len - 6];
        for at in places {
            let file = written(&kernel);
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
            let result = Entry::open(file).and_then(|entry| read(&entry, 0, kernel.len() as u64));
            assert!(result.is_err(), "byte {at} was changed, and nobody saw it");
        }
        for len in [0, 31, 32, 1000, len - 1] {
            let file = written(&kernel);
            file.set_len(len).unwrap();
            assert!(Entry::open(file).is_err(), "{len}");
        }
    }
}
