//! Where a kernel's bytes come from, and how they get into guest memory.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use hal::GpaRange;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Bytes that are read from a file at once.
const CHUNK: u64 = 256 << 10;
/// Bytes of a guest page.
const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// Takes what is read, piece by piece.
pub type Sink<'a> = dyn FnMut(&[u8]) -> io::Result<()> + 'a;

/// Bytes that can be read at any place, like a file's.
pub trait KernelImage: Debug + Sync {
    /// How many bytes there are.
    fn size(&self) -> u64;

    /// Hands `len` bytes from `offset` on to `sink`, in order, in pieces of any length. The caller has compared with
    /// [`KernelImage::size`].
    ///
    /// # Errors
    /// Reading failed, there is less than was said, or `sink` failed.
    fn read(&self, offset: u64, len: u64, sink: &mut Sink) -> io::Result<()>;
}

impl KernelImage for Vec<u8> {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read(&self, offset: u64, len: u64, sink: &mut Sink) -> io::Result<()> {
        let part = usize::try_from(offset).ok().zip(usize::try_from(len).ok());
        let bytes = part.and_then(|(start, len)| self.get(start..)?.get(..len));
        sink(bytes.ok_or(io::ErrorKind::UnexpectedEof)?)
    }
}

/// A regular file.
#[derive(Debug)]
pub(super) struct FileImage<'a> {
    file: &'a File,
    size: u64,
}

impl<'a> FileImage<'a> {
    /// `None` where it is a directory, a device or a pipe.
    pub(super) fn new(file: &'a File) -> io::Result<Option<Self>> {
        let metadata = file.metadata()?;
        Ok(metadata.is_file().then_some(Self { file, size: metadata.len() }))
    }
}

impl KernelImage for FileImage<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&self, offset: u64, len: u64, sink: &mut Sink) -> io::Result<()> {
        let mut buffer = vec![0; usize::try_from(len.min(CHUNK)).map_err(io::Error::other)?];
        let (mut at, end) = (offset, offset.saturating_add(len));
        while at < end {
            let wanted = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
            let chunk = &mut buffer[..wanted];
            self.file.read_exact_at(chunk, at)?;
            sink(chunk)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }
}

/// Copies a part of an image into guest memory that reads as zeros. Pages of zeros are not written, so that memory
/// behind them is not touched.
pub(super) fn copy(
    image: &dyn KernelImage,
    offset: u64,
    to: GpaRange,
    memory: &GuestMemoryMmap,
) -> Result<(), io::Error> {
    let mut at = to.start;
    image.read(offset, to.len, &mut |bytes| {
        let mut rest = bytes;
        while !rest.is_empty() {
            let zeros: usize = rest.chunks(PAGE).take_while(|page| is_zero(page)).map(<[u8]>::len).sum();
            let (_, tail) = rest.split_at(zeros);
            let filled: usize = tail.chunks(PAGE).take_while(|page| !is_zero(page)).map(<[u8]>::len).sum();
            let (run, tail) = tail.split_at(filled);
            at += zeros as u64;
            memory.write_slice(run, GuestAddress(at)).map_err(io::Error::other)?;
            at += filled as u64;
            rest = tail;
        }
        Ok(())
    })
}

fn is_zero(page: &[u8]) -> bool {
    ZEROS.get(..page.len()) == Some(page)
}
