//! What the driver asks of a disk (virtio 1.2 §5.2.6), checked against the disk's bounds.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{ByteValued, Le32, Le64};

use crate::disk::{MAX_WRITE_ZEROES, Operation, SECTOR};
use crate::virtio::{Chain, Fault};

/// Length in bytes of a request's header.
pub(super) const HEADER_LEN: usize = 16;

/// The status byte that ends a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// A request's header.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Header {
    kind: Le32,
    reserved: Le32,
    sector: Le64,
}

/// A range to discard or to fill with zeroes.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Range {
    sector: Le64,
    sectors: Le32,
    flags: Le32,
}

#[expect(unsafe_code, reason = "structures read as bytes")]
mod bytes {
    use super::{ByteValued, Header, Range};

    // SAFETY: plain integers, no padding: each field lies at a multiple of its size.
    unsafe impl ByteValued for Header {}
    // SAFETY: as above.
    unsafe impl ByteValued for Range {}
}

/// A request that may be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Parsed {
    /// Read `len` bytes at `offset`.
    Read { offset: u64, len: u32 },
    /// Write what follows the header at `offset`.
    Write { offset: u64 },
    /// Flush.
    Flush,
    /// Give the serial number.
    Id,
    /// Discard or fill with zeroes.
    Range { operation: Operation, offset: u64, len: u64 },
}

/// The bounds that requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// The disk's size in bytes.
    pub(super) size: u64,
    pub(super) readonly: bool,
    /// The most bytes that one request may discard.
    pub(super) max_discard: u64,
}

/// Reads a request. The inner error is the status to answer with.
///
/// # Errors
/// A chain that has no room for a header or a status: the driver cannot even be answered.
pub(super) fn parse(chain: &Chain, bounds: Bounds) -> Result<Result<Parsed, Status>, Fault> {
    let mut reader = chain.reader();
    let header: Header = reader.read_obj()?;
    let Some(room) = chain.writable_len().checked_sub(1) else {
        return Err(Fault::Request("no room for a status byte"));
    };
    let data_out = reader.remaining() as u64;
    let sector = header.sector.to_native();
    Ok(match header.kind.to_native() {
        VIRTIO_BLK_T_IN => bounds.check(sector, u64::from(room)).map(|offset| Parsed::Read { offset, len: room }),
        VIRTIO_BLK_T_OUT if bounds.readonly => Err(Status::IoError),
        VIRTIO_BLK_T_OUT => bounds.check(sector, data_out).map(|offset| Parsed::Write { offset }),
        VIRTIO_BLK_T_FLUSH => Ok(Parsed::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Parsed::Id),
        kind @ (VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES) if !bounds.readonly => {
            match reader.read_obj::<Range>() {
                // One range for each request, as the configuration says.
                Ok(range) if reader.remaining() == 0 => bounds.range(kind, range),
                _ => Err(Status::IoError),
            }
        }
        _ => Err(Status::Unsupported),
    })
}

impl Bounds {
    /// The offset in bytes of a range that lies on the disk and is of whole sectors, at least one.
    fn check(&self, sector: u64, len: u64) -> Result<u64, Status> {
        let offset = sector.checked_mul(SECTOR).ok_or(Status::IoError)?;
        let end = offset.checked_add(len).ok_or(Status::IoError)?;
        if len == 0 || !len.is_multiple_of(SECTOR) || end > self.size {
            return Err(Status::IoError);
        }
        Ok(offset)
    }

    fn range(&self, kind: u32, range: Range) -> Result<Parsed, Status> {
        let len = u64::from(range.sectors.to_native()) * SECTOR;
        let flags = range.flags.to_native();
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        let known_flags = if kind == VIRTIO_BLK_T_DISCARD { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        if flags & !known_flags != 0 {
            return Err(Status::Unsupported);
        }
        let (operation, limit) = if kind == VIRTIO_BLK_T_DISCARD {
            (Operation::Discard, self.max_discard)
        } else {
            (Operation::WriteZeroes { unmap }, MAX_WRITE_ZEROES)
        };
        if len > limit {
            return Err(Status::IoError);
        }
        let offset = self.check(range.sector.to_native(), len)?;
        Ok(Parsed::Range { operation, offset, len })
    }
}
