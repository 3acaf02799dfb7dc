//! What can be wrong with the files and the memory of a boot. The messages name neither file nor option: the monitor
//! knows them and puts them in front.

use std::io;

use vm_memory::GuestMemoryError;

use super::Protocol;
use super::payload::PayloadError;

/// A kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel file.
    #[error("kernel: {0}")]
    Kernel(#[from] KernelError),
    /// The kernel inside a bzImage.
    #[error("kernel: {0}")]
    Payload(#[from] PayloadError),
    /// The initramfs file.
    #[error("initramfs: {0}")]
    Initramfs(#[from] InitramfsError),
    /// The command line.
    #[error("kernel command line: {0}")]
    Cmdline(#[from] CmdlineError),
    /// The guest's memory.
    #[error("memory: {0}")]
    Memory(#[from] MemoryError),
    /// Guest memory could not be written where boot data goes.
    #[error("{what} could not be written to guest memory at {at:#x}: {source}")]
    Write {
        /// What was written.
        what: &'static str,
        /// Where.
        at: u64,
        /// Why not.
        source: GuestMemoryError,
    },
}

/// What is wrong with a kernel file.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// It is a directory, a device or a pipe.
    #[error("not a regular file: a bzImage or an ELF executable is needed")]
    NotAFile,
    /// Reading it failed.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// It has no bytes.
    #[error("the file is empty: a bzImage or an ELF executable is needed")]
    Empty,
    /// It ends too early.
    #[error("the file is truncated: {what} needs {needed} bytes of it, and it has {size}")]
    Truncated {
        /// The part that is not all there.
        what: String,
        /// How long the file would have to be, in bytes.
        needed: u64,
        /// How long it is.
        size: u64,
    },
    /// It is of no format that is known here.
    #[error("neither a bzImage nor an ELF executable: {hint}")]
    UnknownFormat {
        /// What it looks like.
        hint: &'static str,
    },
    /// An ELF file, but not one that an x86-64 processor can start.
    #[error("the ELF file {is}, and must be {must_be}")]
    Elf {
        /// What it is.
        is: String,
        /// What is needed.
        must_be: &'static str,
    },
    /// A bzImage, but not one that can be entered in 64-bit mode.
    #[error("the bzImage {is}: {remedy}")]
    BzImage {
        /// What it is.
        is: String,
        /// What is needed.
        remedy: &'static str,
    },
    /// A program header contradicts itself.
    #[error("ELF segment {index} {problem}")]
    Segment {
        /// The program header, counted from 0.
        index: usize,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// Two segments claim the same memory.
    #[error("ELF segments {first} and {second} overlap at {at:#x}: each address may belong to one segment only")]
    Overlap {
        /// A program header, counted from 0.
        first: usize,
        /// The other.
        second: usize,
        /// The first address that both claim.
        at: u64,
    },
    /// The entry point is no code of the file.
    #[error("the {protocol} entry point {entry:#x} lies in no segment that the file fills")]
    Entry {
        /// The protocol to which the entry point belongs.
        protocol: Protocol,
        /// The entry point.
        entry: u64,
    },
    /// The kernel's memory is not all there.
    #[error(
        "the kernel needs guest memory up to {end:#x}, and low RAM ends at {ram_end:#x}: give the guest at least {mib} MiB"
    )]
    DoesNotFit {
        /// The end of the kernel.
        end: u64,
        /// The end of RAM below 4 GiB.
        ram_end: u64,
        /// The memory that would do, in MiB.
        mib: u64,
    },
    /// Firmware cannot start it.
    #[error(
        "firmware starts a bzImage with an EFI stub, or another EFI executable of less than 4 GiB, and this is {0}"
    )]
    NotEfi(&'static str),
    /// The protocol that was asked for is not the kernel's.
    #[error("the kernel cannot be started by the {wanted} protocol: {reason}")]
    Protocol {
        /// What was asked for.
        wanted: Protocol,
        /// Why it cannot be.
        reason: &'static str,
    },
}

/// What is wrong with an initramfs file.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// It is a directory, a device or a pipe.
    #[error("not a regular file: a cpio archive is needed")]
    NotAFile,
    /// Reading it failed.
    #[error("cannot be read: {0}")]
    Read(io::Error),
    /// It has no bytes.
    #[error("the file is empty: a cpio archive is needed, or no initramfs at all")]
    Empty,
    /// There is no room for it.
    #[error(
        "{size} bytes do not fit into guest memory: {room} bytes are free between the kernel's end at {floor:#x} and \
         {ceiling:#x}, the end of what the kernel can reach: give the guest more memory"
    )]
    TooLarge {
        /// Its size in bytes.
        size: u64,
        /// The kernel's end.
        floor: u64,
        /// The end of the room.
        ceiling: u64,
        /// The room in bytes.
        room: u64,
    },
}

/// What is wrong with a command line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CmdlineError {
    /// It has too many bytes.
    #[error("{bytes} bytes long, and this kernel takes {max} at the most")]
    TooLong {
        /// Its length in bytes.
        bytes: usize,
        /// The kernel's limit.
        max: u64,
    },
    /// It has a zero byte inside, where the kernel would stop reading.
    #[error("byte {at} is zero, which would end it there")]
    Nul {
        /// Where, counted from 0.
        at: usize,
    },
}

/// What is wrong with the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MemoryError {
    /// There is none above 1 MiB, where kernels live.
    #[error("there is no RAM at {at:#x}, where a kernel is loaded: give the guest at least 2 MiB")]
    TooSmall {
        /// Where RAM is missing.
        at: u64,
    },
    /// It is in too many pieces.
    #[error("the memory map has {entries} entries, and a kernel can be told of {max}")]
    TooManyRanges {
        /// Entries of the map.
        entries: usize,
        /// The most that the zero page holds.
        max: usize,
    },
}
