//! Where a kernel's bytes come from, and how they get into guest memory.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use hal::GpaRange;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Bytes that are read from a file at once.
const CHUNK: u64 = 256 << 10;
/// Bytes of a guest page.
const PAGE: usize = 4096;
/// Less than this, in bytes, is copied where pages could be shared: each mapping costs the host memory, too.
const WORTH_A_MAPPING: usize = 64 << 10;
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

    /// Maps `len` bytes from `offset` over this process's memory at `to`, so that the host keeps one copy for all that
    /// do so, until somebody writes to a page. `false` where the image is not in a file that can be mapped.
    ///
    /// # Errors
    /// The host refuses. The memory is as it was.
    ///
    /// # Safety
    /// `to` is the start of `len` bytes of private memory of a mapping that outlives all accesses, and nobody accesses
    /// them now. All three numbers are multiples of the page size.
    #[expect(unsafe_code, reason = "it takes a raw address and replaces what is there")]
    unsafe fn map_over(&self, _offset: u64, _len: usize, _to: NonNull<u8>) -> io::Result<bool> {
        Ok(false)
    }
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
pub(in super::super) struct FileImage<'a> {
    file: &'a File,
    size: u64,
}

impl<'a> FileImage<'a> {
    /// `None` where it is a directory, a device or a pipe.
    pub(in super::super) fn new(file: &'a File) -> io::Result<Option<Self>> {
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
/// behind them is not touched. With `share`, pages are mapped where the image can be, and guest memory is private.
pub(super) fn copy(
    image: &dyn KernelImage,
    offset: u64,
    to: GpaRange,
    memory: &GuestMemoryMmap,
    share: bool,
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
            let mapped = if share { map_pages(image, offset + (at - to.start), filled, at, memory)? } else { 0 };
            let (_, copied) = run.split_at(mapped);
            memory.write_slice(copied, GuestAddress(at + mapped as u64)).map_err(io::Error::other)?;
            at += filled as u64;
            rest = tail;
        }
        Ok(())
    })
}

/// Maps the whole pages at the start of `len` bytes of an image into guest memory at `at`, and tells how many bytes that
/// are.
#[expect(unsafe_code, reason = "a part of the mapping that is guest memory is replaced")]
fn map_pages(
    image: &dyn KernelImage,
    offset: u64,
    len: usize,
    at: u64,
    memory: &GuestMemoryMmap,
) -> Result<usize, io::Error> {
    let len = len & !(PAGE - 1);
    if len < WORTH_A_MAPPING || !offset.is_multiple_of(PAGE as u64) || !at.is_multiple_of(PAGE as u64) {
        return Ok(0);
    }
    let slice = memory.get_slice(GuestAddress(at), len).map_err(io::Error::other)?;
    let Some(to) = NonNull::new(slice.ptr_guard_mut().as_ptr()) else { return Ok(0) };
    // SAFETY: the range lies in one region of guest memory, which the caller says is private; no guest runs yet, and
    // nobody else has a reference to it. Pages of the image and of guest memory are equally large.
    let mapped = unsafe { image.map_over(offset, len, to) }?;
    Ok(if mapped { len } else { 0 })
}

fn is_zero(page: &[u8]) -> bool {
    ZEROS.get(..page.len()) == Some(page)
}
