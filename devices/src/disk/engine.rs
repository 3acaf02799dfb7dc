//! One request's way through partial results, shared by the backends.

use std::io;
use std::os::fd::RawFd;

use super::{Completion, Operation, RawDisk, Request};

/// A request that a backend works on.
#[derive(Debug)]
pub(super) struct Job {
    request: Request,
    /// What is to be done next; differs from the request's where the host lacks an operation.
    step: Step,
    /// Bytes of the disk that are done.
    done: u64,
}

/// The system call that a job needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// `preadv` of the buffers left.
    Read,
    /// `pwritev2` of the buffers left.
    Write {
        /// With `RWF_DSYNC`.
        durable: bool,
    },
    /// `fdatasync`.
    Flush,
    /// `fallocate` of this mode, over the whole range.
    Allocate(i32),
}

/// What a step's result leads to.
#[derive(Debug)]
pub(super) enum Next {
    /// Another step.
    Again(Job),
    /// The end.
    Done(Completion),
}

impl Job {
    pub(super) fn new(request: Request) -> Self {
        let step = match request.operation {
            Operation::Read => Step::Read,
            Operation::Write { durable } => Step::Write { durable },
            Operation::Flush => Step::Flush,
            Operation::Discard | Operation::WriteZeroes { unmap: true } => {
                Step::Allocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
            }
            Operation::WriteZeroes { unmap: false } => {
                Step::Allocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE)
            }
        };
        Self { request, step, done: 0 }
    }

    pub(super) fn step(&self) -> Step {
        self.step
    }

    /// Where on the disk the next step starts, in bytes.
    pub(super) fn offset(&self) -> u64 {
        self.request.offset + self.done
    }

    /// Bytes of the disk not yet done.
    pub(super) fn left(&self) -> u64 {
        self.request.len - self.done
    }

    pub(super) fn buffers(&self) -> &[libc::iovec] {
        self.request.buffers.left()
    }

    /// The descriptor to work on: past the host's page cache where the disk was opened so and the buffers allow it.
    pub(super) fn fd(&self, disk: &RawDisk) -> RawFd {
        match self.step {
            Step::Read | Step::Write { .. } => disk.fd_for(&self.request.buffers, self.offset()),
            Step::Flush | Step::Allocate(_) => disk.fd(),
        }
    }

    /// Takes a step's result: bytes moved, or a negated error number, as the kernel gives them.
    pub(super) fn advance(mut self, result: i32) -> Next {
        let moved = match u64::try_from(result) {
            Ok(moved) => moved,
            Err(_) => return self.failed(io::Error::from_raw_os_error(-result)),
        };
        if matches!(self.step, Step::Flush | Step::Allocate(_)) {
            return self.end(Ok(()));
        }
        if moved == 0 {
            // The image became shorter than it was when it was opened, or the host's file system is at an end.
            return self.end(Err(io::Error::from(io::ErrorKind::UnexpectedEof)));
        }
        self.done += moved;
        self.request.buffers.advance(usize::try_from(moved).unwrap_or(usize::MAX));
        if self.left() == 0 { self.end(Ok(())) } else { Next::Again(self) }
    }

    fn failed(mut self, error: io::Error) -> Next {
        match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Next::Again(self),
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => match self.request.operation {
                Operation::Discard => self.end(Ok(())),
                Operation::WriteZeroes { .. } if matches!(self.step, Step::Allocate(_)) => {
                    let len = usize::try_from(self.request.len).unwrap_or(usize::MAX);
                    self.request.buffers.extend_zeroes(len);
                    self.step = Step::Write { durable: false };
                    Next::Again(self)
                }
                _ => self.end(Err(error)),
            },
            _ => self.end(Err(error)),
        }
    }

    pub(super) fn end(self, result: io::Result<()>) -> Next {
        Next::Done(Completion { request: self.request, result })
    }
}
