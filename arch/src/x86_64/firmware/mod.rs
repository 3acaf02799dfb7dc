//! Booting firmware: where its file goes, how a processor begins in it, and what it finds of the machine ([`items`]).

mod authenticode;
mod items;
#[cfg(test)]
mod test_kernel;
#[cfg(test)]
mod tests;

use hal::{BootRegisters, GpaRange};

pub use self::authenticode::{Executable, PeError};
pub use self::items::{GivenKernel, Item, ItemContents, ItemKey, items};
use super::boot::registers;
use super::layout::{self, PAGE_SIZE};

/// Why a file is no firmware.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    /// It has another size.
    #[error("it is {0} bytes long: firmware is a whole number of pages of 4096 bytes, and at most 16 MiB")]
    Size(u64),
    /// A processor would find nothing at its first instruction.
    #[error(
        "it has nothing 16 bytes before its end, where a processor begins: firmware for PCs is needed, such as OVMF.fd"
    )]
    NoResetVector,
}

/// The memory that a firmware file of `size` bytes fills: it ends at 4 GiB.
///
/// # Errors
/// [`ImageError::Size`].
pub fn place(size: u64) -> Result<GpaRange, ImageError> {
    if size == 0 || !size.is_multiple_of(PAGE_SIZE) || size > layout::FIRMWARE.len {
        return Err(ImageError::Size(size));
    }
    Ok(GpaRange { start: layout::HOLE_END - size, len: size })
}

/// Checks a file's last 16 bytes, the first that a processor reads.
///
/// # Errors
/// [`ImageError::NoResetVector`], where all of them are zeros or ones.
pub fn check_reset_vector(last: &[u8; 16]) -> Result<(), ImageError> {
    if [[0; 16], [0xff; 16]].contains(last) { Err(ImageError::NoResetVector) } else { Ok(()) }
}

/// The boot processor's registers after power-on: it begins at the last 16 bytes below 4 GiB, in real mode (Intel SDM
/// volume 3, §10.1.4).
pub fn entry() -> BootRegisters {
    registers::power_on()
}
