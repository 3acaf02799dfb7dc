//! A disk by plain system calls, for hosts that refuse io_uring (as many containers do).

#![expect(unsafe_code, reason = "vectored I/O on guest memory")]

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::engine::{Job, Next, Step};
use super::{Completion, DiskBackend, RawDisk, Request};

/// Does each request in the calling thread, when it is submitted.
#[derive(Debug)]
pub struct SyncBackend {
    disk: Arc<RawDisk>,
    event: EventFd,
    done: VecDeque<Completion>,
}

impl SyncBackend {
    /// A backend for one queue.
    ///
    /// # Errors
    /// The event cannot be made.
    pub fn new(disk: Arc<RawDisk>) -> io::Result<Self> {
        Ok(Self { disk, event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?, done: VecDeque::new() })
    }

    fn step(&self, job: &Job) -> i32 {
        let fd = job.fd(&self.disk);
        let buffers = job.buffers();
        let count = i32::try_from(buffers.len()).unwrap_or(i32::MAX);
        let (Ok(offset), Ok(len)) = (i64::try_from(job.offset()), i64::try_from(job.left())) else {
            return -libc::EFBIG;
        };
        let result = match job.step() {
            // SAFETY: the buffers are those of the job's chain, which keeps them mapped, and of zeroes, which are
            // only read; `count` is their number.
            Step::Read => unsafe { libc::preadv(fd, buffers.as_ptr(), count, offset) },
            Step::Write { durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                unsafe { libc::pwritev2(fd, buffers.as_ptr(), count, offset, flags) }
            }
            // SAFETY: the descriptor is open as long as the disk.
            Step::Flush => unsafe { libc::fdatasync(fd) as isize },
            // SAFETY: as above.
            Step::Allocate(mode) => unsafe { libc::fallocate(fd, mode, offset, len) as isize },
        };
        if result < 0 {
            return -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO);
        }
        // One call moves less than 2 GiB (MAX_RW_COUNT).
        i32::try_from(result).unwrap_or(i32::MAX)
    }
}

impl SyncBackend {
    /// Does a job to its end.
    pub(super) fn run(&mut self, mut job: Job) {
        loop {
            let result = self.step(&job);
            match job.advance(result) {
                Next::Again(again) => job = again,
                Next::Done(completion) => break self.done.push_back(completion),
            }
        }
    }
}

impl DiskBackend for SyncBackend {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn submit(&mut self, request: Request) {
        self.run(Job::new(request));
    }

    fn commit(&mut self) -> io::Result<()> {
        if !self.done.is_empty() {
            self.event.write(1)?;
        }
        Ok(())
    }

    fn complete(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.done.len()
    }

    fn wait(&mut self) -> io::Result<()> {
        Ok(())
    }
}
