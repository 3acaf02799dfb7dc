//! The buffer through which a guest asks for a quote (Intel TDX Guest-Hypervisor Communication Interface,
//! TDG.VP.VMCALL<GetQuote>): shared memory that begins with a header, little-endian.
//!
//! ```text
//!   0 version, u64: 1   8 status, u64   16 bytes of the report, u32   20 bytes of the quote, u32   24 report, then quote
//! ```
//!
//! The guest may write to all of it at any time. So the header is read once, what was read is what counts, and the status
//! is written last, when everything else can be seen.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use hal::{GpaRange, GuestCallStatus};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};

use super::SharedMemory;
use super::wire::REPORT_LEN;

/// Bytes of the header.
const HEADER_LEN: usize = 24;
const STATUS: usize = 8;
const QUOTE_LEN: usize = 20;
/// The header's version.
const VERSION: u64 = 1;
/// The most bytes of a buffer.
const LONGEST: u64 = 128 << 10;
const PAGE: u64 = 4096;

/// What a guest reads of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// The quote is there.
    Done,
    /// It is not there yet.
    InFlight,
    /// There will be none.
    Failed,
    /// There is none because the service is not there, or does not answer: another time there may be.
    Unavailable,
}

impl Status {
    /// As it stands in the header.
    pub fn code(self) -> u64 {
        match self {
            Self::Done => 0,
            Self::InFlight => u64::MAX,
            Self::Failed => 1 << 63,
            Self::Unavailable => (1 << 63) + 1,
        }
    }
}

/// A guest's buffer, which lies in a single region of its shared memory.
pub struct Buffer {
    memory: GuestMemoryMmap,
    shared: Arc<dyn SharedMemory>,
    range: GpaRange,
}

/// A buffer with what was in it when the guest asked.
pub struct Asked {
    /// Where the answer goes.
    pub buffer: Buffer,
    /// The report; `None` where what the guest gave has not a report's length.
    pub report: Option<Box<[u8; REPORT_LEN]>>,
}

impl Buffer {
    /// Takes what a guest asks for in `len` bytes at `gpa`.
    ///
    /// # Errors
    /// What the call is to return: a buffer that is empty, too long, not of whole pages, not in one piece of shared
    /// memory, or whose header says what it cannot.
    pub fn take(
        memory: &GuestMemoryMmap,
        shared: &Arc<dyn SharedMemory>,
        gpa: u64,
        len: u64,
    ) -> Result<Asked, GuestCallStatus> {
        if len == 0 {
            return Err(GuestCallStatus::InvalidOperand);
        }
        if !gpa.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(GuestCallStatus::AlignError);
        }
        let range = GpaRange { start: gpa, len };
        if len > LONGEST || gpa.checked_add(len).is_none() || !shared.is_shared(range) {
            return Err(GuestCallStatus::InvalidOperand);
        }
        let buffer = Self { memory: memory.clone(), shared: shared.clone(), range };
        let slice = buffer.slice().ok_or(GuestCallStatus::InvalidOperand)?;
        let mut header = [0; HEADER_LEN];
        slice.read_slice(&mut header, 0).map_err(|_| GuestCallStatus::InvalidOperand)?;
        let [.., a, b, c, d, _, _, _, _] = header;
        let report_len = u32::from_le_bytes([a, b, c, d]);
        if !header.starts_with(&VERSION.to_le_bytes()) || u64::from(report_len) > len - HEADER_LEN as u64 {
            return Err(GuestCallStatus::InvalidOperand);
        }
        let report = if report_len as usize == REPORT_LEN {
            let mut report = Box::new([0; REPORT_LEN]);
            slice.read_slice(&mut *report, HEADER_LEN).map_err(|_| GuestCallStatus::InvalidOperand)?;
            Some(report)
        } else {
            None
        };
        Ok(Asked { buffer, report })
    }

    /// Bytes of a quote that have room.
    pub fn room(&self) -> usize {
        usize::try_from(self.range.len).unwrap_or(0).saturating_sub(HEADER_LEN)
    }

    /// Tells the guest how it is with its request, without a quote. Nothing is written to memory that is not shared any
    /// more.
    pub fn tell(&self, status: Status) {
        self.write(&[], status);
    }

    /// Gives the guest its quote, which has room.
    pub fn answer(&self, quote: &[u8]) {
        self.write(quote, Status::Done);
    }

    fn write(&self, quote: &[u8], status: Status) {
        let Some(slice) = self.slice().filter(|_| self.shared.is_shared(self.range)) else { return };
        let len = u32::try_from(quote.len()).unwrap_or(0);
        // The slice is one of at least a page, and the quote has room: neither write nor store can fail.
        let written = slice.write_slice(quote, HEADER_LEN).and_then(|()| slice.write_obj(len.to_le(), QUOTE_LEN));
        let told = if written.is_ok() { status } else { Status::Failed };
        // Whoever sees the status sees what was written before it.
        let _ = slice.store(told.code().to_le(), STATUS, Ordering::Release);
    }

    fn slice(&self) -> Option<VolatileSlice<'_>> {
        let len = usize::try_from(self.range.len).ok()?;
        self.memory.get_slice(GuestAddress(self.range.start), len).ok()
    }
}
