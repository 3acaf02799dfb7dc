//! A disk through io_uring: many requests at once, one system call for a batch of them.

#![expect(unsafe_code, reason = "submission entries name guest memory")]

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, Probe, opcode, squeue, types};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::engine::{Job, Next, Step};
use super::{Completion, DiskBackend, RawDisk, Request};

/// How often a refused submission is tried again before the refusal is passed on.
const SUBMIT_TRIES: usize = 16;

/// Carries requests through a ring of its own.
pub struct UringBackend {
    ring: IoUring,
    disk: Arc<RawDisk>,
    event: EventFd,
    /// Requests in the kernel's hands, at the index that their entries carry as user data.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    done: VecDeque<Completion>,
}

impl UringBackend {
    /// A backend for one queue with up to `depth` requests in flight.
    ///
    /// # Errors
    /// The host does not offer io_uring, or lacks an operation that disks need ([`io::ErrorKind::Unsupported`]).
    pub fn new(disk: Arc<RawDisk>, depth: u16) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(depth.max(1)).next_power_of_two())?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self { ring, disk, event, jobs: Vec::new(), free: Vec::new(), done: VecDeque::new() })
    }

    /// Puts a job's next step into the submission queue.
    fn start(&mut self, job: Job) {
        let index = self.free.pop().unwrap_or_else(|| {
            self.jobs.push(None);
            self.jobs.len() - 1
        });
        let entry = self.entry(&job).user_data(index as u64);
        for _ in 0..SUBMIT_TRIES {
            // SAFETY: the memory that the entry names belongs to the job, which stays in `jobs` until its completion
            // has been taken from the ring (moving a job does not move its lists or its buffers), and `drop` waits.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                if let Some(slot) = self.jobs.get_mut(index) {
                    *slot = Some(job);
                }
                return;
            }
            // The queue is full: the caller went beyond its depth, or a batch met repeated steps.
            if let Err(e) = self.ring.submit() {
                tracing::debug!("io_uring: {e}; tried again");
            }
        }
        self.free.push(index);
        if let Next::Done(completion) = job.end(Err(io::ErrorKind::ResourceBusy.into())) {
            self.done.push_back(completion);
        }
    }

    fn entry(&self, job: &Job) -> squeue::Entry {
        let fd = types::Fd(job.fd(&self.disk));
        let buffers = job.buffers();
        let count = u32::try_from(buffers.len()).unwrap_or(u32::MAX);
        match job.step() {
            Step::Read => opcode::Readv::new(fd, buffers.as_ptr(), count).offset(job.offset()).build(),
            Step::Write { durable } => opcode::Writev::new(fd, buffers.as_ptr(), count)
                .offset(job.offset())
                .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
                .build(),
            Step::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Step::Allocate(mode) => opcode::Fallocate::new(fd, job.left()).offset(job.offset()).mode(mode).build(),
        }
    }

    /// Takes what the kernel has completed, and starts what needs another step.
    fn harvest(&mut self) {
        let mut again = false;
        while let Some(entry) = { self.ring.completion().next() } {
            let index = usize::try_from(entry.user_data()).unwrap_or(usize::MAX);
            let Some(job) = self.jobs.get_mut(index).and_then(Option::take) else {
                continue;
            };
            self.free.push(index);
            match job.advance(entry.result()) {
                Next::Again(job) => {
                    self.start(job);
                    again = true;
                }
                Next::Done(completion) => self.done.push_back(completion),
            }
        }
        if again && let Err(e) = self.ring.submit() {
            tracing::debug!("io_uring: {e}; tried again with the next commit");
        }
    }

    fn in_kernel(&self) -> usize {
        self.jobs.len() - self.free.len()
    }
}

/// True for refusals that end by themselves.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY))
}

impl DiskBackend for UringBackend {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn submit(&mut self, request: Request) {
        self.start(Job::new(request));
    }

    fn commit(&mut self) -> io::Result<()> {
        for _ in 0..SUBMIT_TRIES {
            match self.ring.submit() {
                Ok(_) => return Ok(()),
                // EBUSY: completions wait to be taken first.
                Err(e) if is_passing(&e) => self.harvest(),
                Err(e) => return Err(e),
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    fn complete(&mut self) -> Option<Completion> {
        if self.done.is_empty() {
            self.harvest();
        }
        self.done.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.in_kernel() + self.done.len()
    }

    fn wait(&mut self) -> io::Result<()> {
        loop {
            self.harvest();
            if !self.done.is_empty() || self.in_kernel() == 0 {
                return Ok(());
            }
            match self.ring.submit_and_wait(1) {
                Err(e) if !is_passing(&e) => return Err(e),
                _ => {}
            }
        }
    }
}

impl Drop for UringBackend {
    fn drop(&mut self) {
        while self.in_kernel() > 0 {
            self.done.clear();
            if let Err(e) = self.wait() {
                tracing::error!("io_uring: {e}; memory of requests in flight is not given back");
                // The kernel may still write to it.
                mem::forget(mem::take(&mut self.jobs));
                return;
            }
        }
    }
}
