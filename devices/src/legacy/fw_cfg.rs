//! The firmware configuration device, by which firmware asks for what it is to boot (QEMU, `docs/specs/fw_cfg.rst`).
//!
//! Each item has a number. Those from 0x20 on have a name, too, in the directory, which is item 0x19. An item is selected, and
//! then read byte by byte from a port, or written into guest memory at once. Nothing can be written to an item.
//!
//! ```text
//!   0 selector, two bytes, write only   1 data, a byte   4 address of a request, eight bytes, big-endian
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap};

use crate::bus::BusDevice;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;
const REQUEST_HIGH: u64 = 4;
const REQUEST_LOW: u64 = 8;

/// Items by which the device is known, and the list of the named ones.
const ITEM_SIGNATURE: u16 = 0x00;
const ITEM_FEATURES: u16 = 0x01;
const ITEM_DIRECTORY: u16 = 0x19;
/// The first item with a name, and the number of those that there can be.
const FIRST_NAMED: u16 = 0x20;
const MOST_NAMED: u16 = 0x1000;
/// What the device can do: the selector and data ports, and requests.
const FEATURES: u32 = 1 | 1 << 1;
/// What the register of requests reads as.
const REQUEST_SIGNATURE: [u8; 8] = *b"QEMU CFG";

/// Bits of a request's control word; the upper half is the item to select.
const CONTROL_ERROR: u32 = 1;
const CONTROL_READ: u32 = 1 << 1;
const CONTROL_SKIP: u32 = 1 << 2;
const CONTROL_SELECT: u32 = 1 << 3;
const CONTROL_WRITE: u32 = 1 << 4;

/// Bytes of a name in the directory, with the zero byte that ends it.
const NAME_SIZE: usize = 56;
/// Bytes that are copied at once.
const CHUNK: usize = 64 << 10;

/// What an item holds.
#[derive(Debug)]
pub enum FwCfgContents {
    /// These bytes.
    Bytes(Vec<u8>),
    /// A part of a file. Where the file has become shorter, a request for what is missing fails.
    File(File, Range<u64>),
}

impl FwCfgContents {
    fn len(&self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.len() as u64,
            Self::File(_, range) => range.end.saturating_sub(range.start),
        }
    }

    /// Fills `to` with what there is from `offset` on, which is at least as much.
    fn read(&self, offset: u64, to: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Bytes(bytes) => {
                let from = usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)?.get(..to.len()));
                to.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::File(file, range) => file.read_exact_at(to, range.start.saturating_add(offset)),
        }
    }
}

/// Why an item cannot be there.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// Its length is a number of 32 bits.
    #[error("fw_cfg: an item of {0} bytes is too long: less than 4 GiB are possible")]
    TooLong(u64),
    /// Its name is too long, or taken, or there are too many.
    #[error("fw_cfg: there is no room for an item named «{0}»")]
    Name(String),
    /// There is an item with this number, or the number belongs to a named one.
    #[error("fw_cfg: item {0:#x} is taken")]
    Number(u16),
}

/// What firmware finds.
#[derive(Debug, Default)]
pub struct FwCfgItems {
    numbered: BTreeMap<u16, FwCfgContents>,
    named: BTreeMap<String, FwCfgContents>,
}

impl FwCfgItems {
    /// Adds an item by its number, below 0x20.
    ///
    /// # Errors
    /// [`FwCfgError::TooLong`] and [`FwCfgError::Number`].
    pub fn add(&mut self, number: u16, contents: FwCfgContents) -> Result<(), FwCfgError> {
        check_length(&contents)?;
        let own = [ITEM_SIGNATURE, ITEM_FEATURES, ITEM_DIRECTORY].contains(&number);
        if own || number >= FIRST_NAMED || self.numbered.contains_key(&number) {
            return Err(FwCfgError::Number(number));
        }
        self.numbered.insert(number, contents);
        Ok(())
    }

    /// Adds an item by its name, of at most 55 bytes.
    ///
    /// # Errors
    /// [`FwCfgError::TooLong`] and [`FwCfgError::Name`].
    pub fn add_named(&mut self, name: &str, contents: FwCfgContents) -> Result<(), FwCfgError> {
        check_length(&contents)?;
        let full = self.named.len() >= usize::from(MOST_NAMED);
        if full || name.len() >= NAME_SIZE || name.contains('\0') || self.named.contains_key(name) {
            return Err(FwCfgError::Name(name.to_owned()));
        }
        self.named.insert(name.to_owned(), contents);
        Ok(())
    }

    /// All items by their numbers: named ones are numbered in the order of their names.
    fn numbered(self) -> BTreeMap<u16, FwCfgContents> {
        let Self { numbered: mut items, named } = self;
        let mut directory = u32::try_from(named.len()).unwrap_or(0).to_be_bytes().to_vec();
        for (number, (name, contents)) in (FIRST_NAMED..).zip(named) {
            // Its length was checked when it was added.
            directory.extend_from_slice(&u32::try_from(contents.len()).unwrap_or(0).to_be_bytes());
            directory.extend_from_slice(&number.to_be_bytes());
            directory.extend_from_slice(&[0; 2]);
            directory.extend_from_slice(name.as_bytes());
            directory.resize(directory.len() + NAME_SIZE - name.len(), 0);
            items.insert(number, contents);
        }
        items.insert(ITEM_DIRECTORY, FwCfgContents::Bytes(directory));
        items.insert(ITEM_SIGNATURE, FwCfgContents::Bytes(b"QEMU".to_vec()));
        items.insert(ITEM_FEATURES, FwCfgContents::Bytes(FEATURES.to_le_bytes().to_vec()));
        items
    }
}

fn check_length(contents: &FwCfgContents) -> Result<(), FwCfgError> {
    let len = contents.len();
    u32::try_from(len).map_or(Err(FwCfgError::TooLong(len)), |_| Ok(()))
}

/// Where the guest reads.
#[derive(Debug, Default, Clone, Copy)]
struct Position {
    item: u16,
    offset: u64,
    /// The upper half of a request's address.
    high: u32,
}

/// A request, as it lies in guest memory: three big-endian numbers of 4, 4 and 8 bytes.
#[derive(Debug, Clone, Copy)]
struct Request {
    control: u32,
    length: u32,
    address: u64,
}

/// The firmware configuration device.
pub struct FwCfg {
    items: BTreeMap<u16, FwCfgContents>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    position: Mutex<Position>,
}

impl fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FwCfg").field("items", &self.items.keys()).finish_non_exhaustive()
    }
}

impl FwCfg {
    /// Length of its range in bytes.
    pub const LEN: u64 = 12;

    /// The device with these items, which writes into `memory` what is asked for.
    pub fn new(items: FwCfgItems, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Self {
        Self { items: items.numbered(), memory, position: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Position> {
        // It guards three numbers, all of which are sound at any time.
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads what is next of the selected item; behind its end, and where there is no such item, zeros.
    fn read_next(&self, position: &mut Position, to: &mut [u8]) -> io::Result<()> {
        let item = self.items.get(&position.item);
        let left = item.map_or(0, |item| item.len().saturating_sub(position.offset));
        let (there, beyond) = to.split_at_mut(usize::try_from(left).map_or(to.len(), |left| left.min(to.len())));
        beyond.fill(0);
        // The guest may have skipped beyond the end.
        if let Some(item) = item.filter(|_| !there.is_empty()) {
            item.read(position.offset, there)?;
        }
        position.offset = position.offset.saturating_add(there.len() as u64);
        Ok(())
    }

    /// Does what a request at `at` in guest memory asks for, and says there whether it failed.
    fn request(&self, position: &mut Position, at: u64) {
        let memory = self.memory.memory();
        let mut bytes = [0; 16];
        if let Err(error) = memory.read_slice(&mut bytes, GuestAddress(at)) {
            tracing::debug!("fw_cfg: a request at {at:#x}: {error}");
            return;
        }
        // Four bytes, four, and eight.
        let number = |from: usize, len: usize| {
            bytes.iter().skip(from).take(len).fold(0_u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let low = |number: u64| u32::try_from(number).unwrap_or(0);
        let request = Request { control: low(number(0, 4)), length: low(number(4, 4)), address: number(8, 8) };
        let failed = self.transfer(position, request, &memory).inspect_err(|error| {
            tracing::debug!("fw_cfg: item {:#x}: {error}", position.item);
        });
        let outcome = if failed.is_err() { CONTROL_ERROR } else { 0 };
        if let Err(error) = memory.write_slice(&outcome.to_be_bytes(), GuestAddress(at)) {
            tracing::debug!("fw_cfg: the outcome of a request at {at:#x}: {error}");
        }
    }

    fn transfer(&self, position: &mut Position, request: Request, memory: &GuestMemoryMmap) -> io::Result<()> {
        let Request { control, length, address } = request;
        if control & CONTROL_SELECT != 0 {
            *position = Position { item: u16::try_from(control >> 16).unwrap_or(0), offset: 0, ..*position };
        }
        let mut left = usize::try_from(length).map_err(io::Error::other)?;
        if control & CONTROL_READ != 0 {
            // Before anything is written. It also bounds what one request can cost: guest memory is filled once.
            if !memory.check_range(GuestAddress(address), left) {
                return Err(io::Error::other(format!("{length:#x} bytes at {address:#x} are not guest memory")));
            }
            let mut buffer = vec![0; left.min(CHUNK)];
            let mut at = address;
            while left > 0 {
                let (part, _) = buffer.split_at_mut(left.min(CHUNK));
                self.read_next(position, part)?;
                memory.write_slice(part, GuestAddress(at)).map_err(io::Error::other)?;
                at = at.saturating_add(part.len() as u64);
                left -= part.len();
            }
        } else if control & CONTROL_WRITE != 0 {
            return Err(io::Error::other("nothing can be written"));
        } else if control & CONTROL_SKIP != 0 {
            position.offset = position.offset.saturating_add(length.into());
        }
        Ok(())
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (DATA, [byte]) = (offset, &mut *data) {
            if let Err(error) = self.read_next(&mut self.lock(), std::slice::from_mut(byte)) {
                tracing::debug!("fw_cfg: {error}");
                *byte = 0;
            }
            return;
        }
        for (at, byte) in (offset..).zip(data) {
            let index = at.checked_sub(REQUEST_HIGH).and_then(|index| usize::try_from(index).ok());
            *byte = index.and_then(|index| REQUEST_SIGNATURE.get(index)).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut position = self.lock();
        match (offset, data) {
            (SELECTOR, [low, high]) => {
                *position = Position { item: u16::from_le_bytes([*low, *high]), offset: 0, ..*position };
            }
            (REQUEST_HIGH, [a, b, c, d]) => position.high = u32::from_be_bytes([*a, *b, *c, *d]),
            (REQUEST_LOW, [a, b, c, d]) => {
                let at = u64::from(position.high) << 32 | u64::from(u32::from_be_bytes([*a, *b, *c, *d]));
                position.high = 0;
                self.request(&mut position, at);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
