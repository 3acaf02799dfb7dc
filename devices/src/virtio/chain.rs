//! Descriptor chains (virtio 1.2 §2.7.5), checked whole before a device sees one.
//!
//! Each descriptor is read once, so what was checked is what is used, whatever the driver writes to the table
//! afterwards. A [`Chain`] keeps the guest memory that its buffers lie in mapped for as long as it lives.

use std::io;
use std::mem::size_of;
use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

/// The most descriptors that one chain may hold, those of an indirect table included. It bounds what a driver can
/// make the monitor allocate.
pub const MAX_CHAIN_LENGTH: usize = 1024;

/// Length of a descriptor in bytes.
const DESCRIPTOR_LEN: u32 = 16;

/// A rule of the specification that the driver broke. The device needs a reset before it goes on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The available index claims more chains than the queue can hold.
    #[error("available index jumps ahead of {next} by more than the queue's size {size}")]
    AvailableIndex {
        /// The next entry that the device would have taken.
        next: u16,
        /// The queue's size.
        size: u16,
    },
    /// The available ring or a descriptor names a descriptor that does not exist.
    #[error("descriptor index {index} is outside the table of {size}")]
    DescriptorIndex {
        /// The index named.
        index: u16,
        /// The table's size.
        size: u16,
    },
    /// A chain has more descriptors than its table, so it loops, or more than [`MAX_CHAIN_LENGTH`].
    #[error("descriptor chain is longer than {limit}")]
    ChainTooLong {
        /// The limit that was passed.
        limit: usize,
    },
    /// A device-readable buffer follows a device-writable one.
    #[error("device-readable descriptor follows a device-writable one")]
    ReadableAfterWritable,
    /// A buffer of no length.
    #[error("descriptor of length 0")]
    ZeroLength,
    /// A buffer or a ring lies outside guest memory.
    #[error("{len} bytes at {address:#x} are outside guest memory")]
    OutsideMemory {
        /// The first guest physical address.
        address: u64,
        /// The length in bytes.
        len: u64,
    },
    /// The buffers of a chain are longer than 2^32 - 1 bytes together.
    #[error("descriptor chain is longer than 4 GiB")]
    TotalLength,
    /// An indirect table breaks a rule (virtio 1.2 §2.7.5.3).
    #[error("indirect descriptor: {0}")]
    Indirect(&'static str),
    /// The ring itself cannot be used.
    #[error("ring: {0}")]
    Ring(String),
    /// A request breaks a rule of its device type.
    #[error("request: {0}")]
    Request(&'static str),
}

#[derive(Debug, Clone, Copy)]
struct Buffer {
    address: GuestAddress,
    len: u32,
}

/// A checked chain of buffers, which its device holds until it completes the chain.
#[derive(Debug)]
pub struct Chain {
    memory: Arc<GuestMemoryMmap>,
    head: u16,
    buffers: Vec<Buffer>,
    /// How many of the buffers, from the first, are device-readable.
    readable_count: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    /// The index of the chain's first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The length in bytes of the device-readable part.
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// The length in bytes of the device-writable part.
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// Reads what the driver wrote.
    pub fn reader(&self) -> Reader<'_> {
        Reader(self.cursor(0..self.readable_count, self.readable_len))
    }

    /// Writes what the driver will read.
    pub fn writer(&self) -> Writer<'_> {
        Writer(self.cursor(self.readable_count..self.buffers.len(), self.writable_len))
    }

    fn cursor(&self, range: std::ops::Range<usize>, len: u32) -> Cursor<'_> {
        Cursor {
            memory: &self.memory,
            buffers: self.buffers.get(range).unwrap_or_default(),
            offset: 0,
            // Both are of 32 bits or more on every host that Halyard runs on.
            remaining: usize::try_from(len).unwrap_or(usize::MAX),
            consumed: 0,
        }
    }

    /// The buffer list, emptied, for the next chain.
    pub(super) fn into_spare(mut self) -> Spare {
        self.buffers.clear();
        Spare(self.buffers)
    }
}

/// An empty buffer list, kept so that taking a chain seldom allocates.
#[derive(Debug, Default)]
pub(super) struct Spare(Vec<Buffer>);

/// What a walk of a chain must know of its queue.
pub(super) struct Table {
    pub(super) memory: Arc<GuestMemoryMmap>,
    pub(super) address: u64,
    pub(super) size: u16,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub(super) indirect: bool,
}

impl Table {
    /// Reads and checks the chain that starts at `head`.
    pub(super) fn walk(self, head: u16, spare: Spare) -> Result<Chain, Fault> {
        let mut chain =
            Chain { memory: self.memory, head, buffers: spare.0, readable_count: 0, readable_len: 0, writable_len: 0 };
        let last = chain.follow(self.address, self.size, head)?;
        if let Some(table) = last {
            if !self.indirect {
                return Err(Fault::Indirect("the feature was not negotiated"));
            }
            chain.follow_indirect(table)?;
        }
        Ok(chain)
    }
}

impl Chain {
    /// Follows descriptors of one table from `index`. Returns the descriptor of an indirect table that ends them.
    fn follow(&mut self, table: u64, size: u16, index: u16) -> Result<Option<Descriptor>, Fault> {
        let mut index = index;
        for _ in 0..size {
            if index >= size {
                return Err(Fault::DescriptorIndex { index, size });
            }
            let descriptor = self.descriptor(table, index)?;
            if descriptor.refers_to_indirect_table() {
                if descriptor.has_next() {
                    return Err(Fault::Indirect("both NEXT and INDIRECT are set"));
                }
                return Ok(Some(descriptor));
            }
            self.push(descriptor)?;
            if !descriptor.has_next() {
                return Ok(None);
            }
            index = descriptor.next();
        }
        Err(Fault::ChainTooLong { limit: usize::from(size) })
    }

    fn follow_indirect(&mut self, table: Descriptor) -> Result<(), Fault> {
        if table.len() == 0 || !table.len().is_multiple_of(DESCRIPTOR_LEN) {
            return Err(Fault::Indirect("the table's length is no multiple of 16"));
        }
        let size = u16::try_from(table.len() / DESCRIPTOR_LEN)
            .map_err(|_| Fault::Indirect("the table has more than 65535 entries"))?;
        self.check(table.addr(), table.len())?;
        match self.follow(table.addr().0, size, 0)? {
            None => Ok(()),
            Some(_) => Err(Fault::Indirect("a table within a table")),
        }
    }

    fn descriptor(&self, table: u64, index: u16) -> Result<Descriptor, Fault> {
        let outside = Fault::OutsideMemory { address: table, len: u64::from(DESCRIPTOR_LEN) * (u64::from(index) + 1) };
        let Some(address) = table.checked_add(u64::from(DESCRIPTOR_LEN) * u64::from(index)) else {
            return Err(outside);
        };
        self.memory.read_obj(GuestAddress(address)).map_err(|_| outside)
    }

    fn push(&mut self, descriptor: Descriptor) -> Result<(), Fault> {
        let len = descriptor.len();
        if len == 0 {
            return Err(Fault::ZeroLength);
        }
        if self.buffers.len() >= MAX_CHAIN_LENGTH {
            return Err(Fault::ChainTooLong { limit: MAX_CHAIN_LENGTH });
        }
        if self.readable_len.checked_add(self.writable_len).and_then(|total| total.checked_add(len)).is_none() {
            return Err(Fault::TotalLength);
        }
        if descriptor.is_write_only() {
            self.writable_len += len;
        } else if self.writable_len > 0 {
            return Err(Fault::ReadableAfterWritable);
        } else {
            self.readable_len += len;
            self.readable_count += 1;
        }
        self.check(descriptor.addr(), len)?;
        self.buffers.push(Buffer { address: descriptor.addr(), len });
        Ok(())
    }

    fn check(&self, address: GuestAddress, len: u32) -> Result<(), Fault> {
        let outside = Fault::OutsideMemory { address: address.0, len: u64::from(len) };
        match usize::try_from(len) {
            Ok(len) if self.memory.check_range(address, len) => Ok(()),
            _ => Err(outside),
        }
    }
}

/// A place within a run of buffers.
#[derive(Debug, Clone)]
struct Cursor<'a> {
    memory: &'a GuestMemoryMmap,
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are behind.
    offset: u32,
    /// Bytes ahead that belong to this cursor.
    remaining: usize,
    consumed: usize,
}

impl<'a> Cursor<'a> {
    /// The next piece of at most `limit` bytes that lies in one buffer: its address and length.
    fn piece(&self, limit: usize) -> Option<(GuestAddress, usize)> {
        let buffer = self.buffers.first()?;
        let left = usize::try_from(buffer.len.checked_sub(self.offset)?).ok()?;
        let len = left.min(limit).min(self.remaining);
        let address = buffer.address.0.checked_add(u64::from(self.offset))?;
        (len > 0).then_some((GuestAddress(address), len))
    }

    fn advance(&mut self, count: usize) {
        let mut count = count.min(self.remaining);
        while count > 0 {
            let Some((_, len)) = self.piece(count) else {
                return;
            };
            count -= len;
            self.remaining -= len;
            self.consumed += len;
            // A piece is no longer than its buffer, whose length is of 32 bits.
            self.offset += u32::try_from(len).unwrap_or(0);
            if self.buffers.first().is_some_and(|buffer| self.offset == buffer.len) {
                self.buffers = self.buffers.get(1..).unwrap_or_default();
                self.offset = 0;
            }
        }
    }

    /// Moves `data.len()` bytes at most, piece by piece, and tells how many.
    fn transfer(
        &mut self,
        len: usize,
        mut with: impl FnMut(&GuestMemoryMmap, GuestAddress, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<usize> {
        let mut done = 0;
        while let Some((address, piece)) = self.piece(len - done) {
            with(self.memory, address, done..done + piece)?;
            self.advance(piece);
            done += piece;
        }
        Ok(done)
    }

    fn split_at(&mut self, offset: usize) -> Result<Self, Fault> {
        let Some(rest) = self.remaining.checked_sub(offset) else {
            return Err(Fault::Request("buffers are too short"));
        };
        let mut other = self.clone();
        other.advance(offset);
        other.remaining = rest;
        other.consumed = 0;
        self.remaining = offset;
        Ok(other)
    }

    fn slices(&self) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        let memory = self.memory;
        let mut rest = self.clone();
        std::iter::from_fn(move || {
            let (address, len) = rest.piece(usize::MAX)?;
            rest.advance(len);
            Some((address, len))
        })
        // The range was checked when the chain was taken, and this memory map does not change: no slice fails.
        .flat_map(move |(address, len)| memory.get_slices(address, len).filter_map(Result::ok))
    }
}

/// The device-readable part of a chain, read from front to back.
#[derive(Debug, Clone)]
pub struct Reader<'a>(Cursor<'a>);

impl<'a> Reader<'a> {
    /// Bytes not yet read.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Reads a structure as it lies in memory (virtio's fields are little-endian).
    ///
    /// # Errors
    /// [`Fault::Request`] where fewer bytes are left.
    pub fn read_obj<T: ByteValued>(&mut self) -> Result<T, Fault> {
        let mut object = T::zeroed();
        self.read_all(object.as_mut_slice())?;
        Ok(object)
    }

    /// Fills `data`.
    ///
    /// # Errors
    /// [`Fault::Request`] where fewer bytes are left.
    pub fn read_all(&mut self, data: &mut [u8]) -> Result<(), Fault> {
        match io::Read::read(self, data) {
            Ok(count) if count == data.len() => Ok(()),
            _ => Err(Fault::Request("buffers to read are too short")),
        }
    }

    /// Steps over `count` bytes, or to the end.
    pub fn skip(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// Keeps the next `offset` bytes, and gives those after them.
    ///
    /// # Errors
    /// [`Fault::Request`] where fewer bytes are left.
    pub fn split_at(&mut self, offset: usize) -> Result<Reader<'a>, Fault> {
        self.0.split_at(offset).map(Reader)
    }

    /// The bytes not yet read, as they lie in the monitor's own address space. They stay mapped while the chain lives.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        self.0.slices()
    }
}

impl io::Read for Reader<'_> {
    fn read(&mut self, data: &mut [u8]) -> io::Result<usize> {
        let len = data.len();
        self.0.transfer(len, |memory, address, range| {
            let part = data.get_mut(range).unwrap_or_default();
            memory.read_slice(part, address).map_err(io::Error::other)
        })
    }
}

/// The device-writable part of a chain, written from front to back.
#[derive(Debug, Clone)]
pub struct Writer<'a>(Cursor<'a>);

impl<'a> Writer<'a> {
    /// Bytes not yet written.
    pub fn remaining(&self) -> usize {
        self.0.remaining
    }

    /// Bytes written through this writer: what to complete the chain with, if it started at the front.
    pub fn written(&self) -> u32 {
        // No chain is longer than 2^32 - 1 bytes.
        u32::try_from(self.0.consumed).unwrap_or(u32::MAX)
    }

    /// Writes a structure as it lies in memory (virtio's fields are little-endian).
    ///
    /// # Errors
    /// [`Fault::Request`] where it does not fit.
    pub fn write_obj<T: ByteValued>(&mut self, object: T) -> Result<(), Fault> {
        self.write_all(object.as_slice())
    }

    /// Writes the whole of `data`.
    ///
    /// # Errors
    /// [`Fault::Request`] where it does not fit.
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), Fault> {
        match io::Write::write(self, data) {
            Ok(count) if count == data.len() => Ok(()),
            _ => Err(Fault::Request("buffers to write are too short")),
        }
    }

    /// Steps over `count` bytes (written by other means, as by the kernel into [`Writer::slices`]), or to the end.
    pub fn skip(&mut self, count: usize) {
        self.0.advance(count);
    }

    /// Keeps the next `offset` bytes, and gives those after them.
    ///
    /// # Errors
    /// [`Fault::Request`] where fewer bytes are left.
    pub fn split_at(&mut self, offset: usize) -> Result<Writer<'a>, Fault> {
        self.0.split_at(offset).map(Writer)
    }

    /// The bytes not yet written, as they lie in the monitor's own address space. They stay mapped while the chain
    /// lives.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'a>> + use<'a> {
        self.0.slices()
    }
}

impl io::Write for Writer<'_> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.transfer(data.len(), |memory, address, range| {
            let part = data.get(range).unwrap_or_default();
            memory.write_slice(part, address).map_err(io::Error::other)
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const _: () = assert!(size_of::<Descriptor>() == 16);
