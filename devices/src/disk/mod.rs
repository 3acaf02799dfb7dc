//! Disks on the host: opening an image, and reading and writing it without waiting.
//!
//! [`RawDisk`] is an open image; it outlives the devices that show it to a guest. A [`DiskBackend`] carries the
//! requests of one queue to it, through io_uring where the host allows that and with plain system calls elsewhere.

mod engine;
mod ioctls;
mod raw;
mod sync;
#[cfg(test)]
mod tests;
mod uring;

use std::io;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::EventFd;

use crate::iovec::IoVectors;
use crate::virtio::{Chain, Fault};

pub use raw::{DiskError, DiskOptions, RawDisk, Topology};
pub use sync::SyncBackend;
pub use uring::UringBackend;

/// Bytes in a sector, the unit in which a disk's size is counted.
pub const SECTOR: u64 = 512;

/// The most bytes that one request may write zeroes to: what one system call can write where the host's file system
/// cannot zero a range by itself.
pub const MAX_WRITE_ZEROES: u64 = 32 << 20;

/// Whether disks of this process can use io_uring.
///
/// # Errors
/// What the kernel answers where it cannot: it is too old, or its calls are not allowed here.
pub fn io_uring_available() -> io::Result<()> {
    io_uring::IoUring::new(1).map(drop)
}

/// What is done to a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Reads into guest memory.
    Read,
    /// Writes from guest memory. A `durable` write is on stable storage when it completes.
    Write {
        /// Whether to wait for stable storage.
        durable: bool,
    },
    /// Puts all completed writes on stable storage.
    Flush,
    /// Tells that a range's content is needed no more. A hint: what the host cannot do is done by doing nothing.
    Discard,
    /// Makes a range read as zeroes, giving its storage back where `unmap` is set and the host can.
    WriteZeroes {
        /// Whether storage may be given back.
        unmap: bool,
    },
}

/// One request to a disk. It owns the chain whose memory the kernel works on, until its completion hands both back.
#[derive(Debug)]
pub struct Request {
    operation: Operation,
    /// Where on the disk, in bytes.
    offset: u64,
    /// How much of the disk, in bytes.
    len: u64,
    buffers: IoVectors,
    chain: Chain,
    /// When it was taken from its queue, where that is measured.
    taken: Option<Instant>,
}

impl Request {
    /// Reads `len` bytes at `offset` into the front of the chain's device-writable part.
    ///
    /// # Errors
    /// [`Fault::Request`] where the chain is shorter.
    pub fn read(chain: Chain, offset: u64, len: u32) -> Result<Self, Fault> {
        let mut data = chain.writer();
        data.split_at(usize::try_from(len).unwrap_or(usize::MAX))?;
        let mut buffers = IoVectors::new();
        buffers.extend(data.slices());
        Ok(Self { operation: Operation::Read, offset, len: u64::from(len), buffers, chain, taken: None })
    }

    /// Writes at `offset` what follows the first `skip` bytes of the chain's device-readable part.
    ///
    /// # Errors
    /// [`Fault::Request`] where the chain is shorter.
    pub fn write(chain: Chain, offset: u64, skip: usize, durable: bool) -> Result<Self, Fault> {
        let data = chain.reader().split_at(skip)?;
        let mut buffers = IoVectors::new();
        buffers.extend(data.slices());
        Ok(Self {
            operation: Operation::Write { durable },
            offset,
            len: buffers.len() as u64,
            buffers,
            chain,
            taken: None,
        })
    }

    /// A flush.
    pub fn flush(chain: Chain) -> Self {
        Self::range(chain, Operation::Flush, 0, 0)
    }

    /// An operation on `len` bytes at `offset` that moves no data of the chain's.
    pub fn range(chain: Chain, operation: Operation, offset: u64, len: u64) -> Self {
        Self { operation, offset, len, buffers: IoVectors::new(), chain, taken: None }
    }

    /// The same, with the time at which it was taken from its queue.
    #[must_use]
    pub fn taken_at(self, at: Instant) -> Self {
        Self { taken: Some(at), ..self }
    }

    /// How long ago it was taken from its queue; nothing where that is not known.
    pub fn age(&self, now: Instant) -> Duration {
        self.taken.map_or(Duration::ZERO, |taken| now.saturating_duration_since(taken))
    }

    /// What is asked for.
    pub fn operation(&self) -> Operation {
        self.operation
    }

    /// Where on the disk, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// How much of the disk it is about, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// True for a request that is about no bytes, as a flush.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The chain, given back.
    pub fn into_chain(self) -> Chain {
        self.chain
    }
}

/// The end of a request.
#[derive(Debug)]
pub struct Completion {
    /// The request, with its chain.
    pub request: Request,
    /// Whether all of it was done.
    pub result: io::Result<()>,
}

/// Carries requests to a disk without waiting for them, for one queue.
///
/// The caller keeps the number in flight within the depth that the backend was made for. Dropping a backend waits
/// for what is in flight.
pub trait DiskBackend: Send {
    /// Signalled when [`DiskBackend::complete`] may have something to give.
    fn event(&self) -> &EventFd;

    /// Takes a request. It may wait for [`DiskBackend::commit`] before it starts.
    fn submit(&mut self, request: Request);

    /// Starts all requests taken.
    ///
    /// # Errors
    /// The host's answer where it refuses even to take requests. They stay in flight, and another commit tries again.
    fn commit(&mut self) -> io::Result<()>;

    /// Gives one completed request, in the order of completion.
    fn complete(&mut self) -> Option<Completion>;

    /// Requests taken and not yet given back.
    fn in_flight(&self) -> usize;

    /// Waits until [`DiskBackend::complete`] has something to give. Only called with requests in flight.
    ///
    /// # Errors
    /// The host's answer.
    fn wait(&mut self) -> io::Result<()>;
}
