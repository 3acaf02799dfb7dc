//! What only the kernel knows of a disk.

#![expect(unsafe_code, reason = "ioctls of block devices, statx")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::raw::{DirectAlign, Topology};

/// What direct I/O is satisfied with on every device there is, for kernels that do not tell (before 6.1).
const SAFE_ALIGN: DirectAlign = DirectAlign { memory: 4096, offset: 4096 };

mod requests {
    nix::ioctl_read!(block_size64, 0x12, 114, u64);
    nix::ioctl_read_bad!(io_minimum, nix::request_code_none!(0x12, 120), u32);
    nix::ioctl_read_bad!(io_optimal, nix::request_code_none!(0x12, 121), u32);
    nix::ioctl_read_bad!(physical_block, nix::request_code_none!(0x12, 123), u32);
}

/// The size of a block device in bytes.
pub(super) fn block_device_size(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let mut size = 0;
    // SAFETY: BLKGETSIZE64 writes one u64.
    unsafe { requests::block_size64(fd.as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// The topology of a block device.
pub(super) fn block_device_topology(fd: BorrowedFd<'_>) -> io::Result<Topology> {
    let (mut physical_block, mut minimum_io, mut optimal_io) = (0, 0, 0);
    // SAFETY: BLKPBSZGET writes one unsigned int.
    unsafe { requests::physical_block(fd.as_raw_fd(), &raw mut physical_block) }?;
    // SAFETY: BLKIOMIN writes one unsigned int.
    unsafe { requests::io_minimum(fd.as_raw_fd(), &raw mut minimum_io) }?;
    // SAFETY: BLKIOOPT writes one unsigned int.
    unsafe { requests::io_optimal(fd.as_raw_fd(), &raw mut optimal_io) }?;
    Ok(Topology { physical_block, minimum_io, optimal_io })
}

/// What direct I/O on an open file demands.
///
/// # Errors
/// The file does not support it.
pub(super) fn direct_alignment(fd: BorrowedFd<'_>) -> io::Result<DirectAlign> {
    let mut stat = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is empty and terminated, and the structure is of the size that the kernel writes.
    let result = unsafe {
        libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN, stat.as_mut_ptr())
    };
    if result != 0 {
        return Ok(SAFE_ALIGN);
    }
    // SAFETY: all zeroes are a valid value, and statx has written over them.
    let stat = unsafe { stat.assume_init() };
    if stat.stx_mask & libc::STATX_DIOALIGN == 0 {
        return Ok(SAFE_ALIGN);
    }
    if stat.stx_dio_offset_align == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(DirectAlign {
        memory: usize::try_from(stat.stx_dio_mem_align.max(1)).unwrap_or(SAFE_ALIGN.memory),
        offset: u64::from(stat.stx_dio_offset_align),
    })
}
