//! The worker of one of a disk's queues.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_FLUSH};
use vmm_sys_util::epoll::EventSet;

use super::request::{Bounds, HEADER_LEN, Parsed, Status, parse};
use super::{IoFailure, MAX_DISCARD, SERIAL_LEN, Shared};
use crate::disk::{Completion, DiskBackend, Operation, Request};
use crate::virtio::{Chain, Fault, QueueState, RunningQueue, Served};

const KICK: u32 = 0;
const COMPLETION: u32 = 1;

/// Serves one queue: takes requests to the backend, and completions back to the driver.
pub(super) struct BlkWorker {
    queue: RunningQueue,
    service: Service,
    /// Chains wait in the ring since as many as the queue has descriptors are in flight.
    full: bool,
}

/// Everything of a worker but its queue.
struct Service {
    backend: Box<dyn DiskBackend>,
    shared: Arc<Shared>,
    /// What the driver did not ask for a cache by `writeback` decides whether it has one.
    cache: CacheMode,
    /// The time of this wakeup: one look at the clock serves all requests that are taken or done in it.
    now: Instant,
}

/// Whether a completed write may be in a cache (virtio 1.2 §5.2.6.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CacheMode {
    /// As the configuration's `writeback` says at the time.
    Configured,
    /// It may: the driver knows how to flush.
    WriteBack,
    /// It may not: the driver does not know of flushes.
    WriteThrough,
}

impl CacheMode {
    fn of(features: u64) -> Self {
        if features & (1 << VIRTIO_BLK_F_CONFIG_WCE) != 0 {
            Self::Configured
        } else if features & (1 << VIRTIO_BLK_F_FLUSH) != 0 {
            Self::WriteBack
        } else {
            Self::WriteThrough
        }
    }
}

impl BlkWorker {
    pub(super) fn new(queue: RunningQueue, backend: Box<dyn DiskBackend>, shared: Arc<Shared>) -> Self {
        let cache = CacheMode::of(queue.features());
        Self { queue, service: Service { backend, shared, cache, now: Instant::now() }, full: false }
    }

    /// Waits for what is in flight, and gives the queue's state back.
    pub(super) fn stop(mut self) -> QueueState {
        while self.service.backend.in_flight() > 0 {
            if let Err(e) = self.service.commit_and_wait() {
                // Dropping the backend waits on, or keeps the memory.
                self.queue.events().broken(&format!("disk {}: {e}", self.service.shared.id));
                break;
            }
            if let Err(fault) = self.service.reap(&mut self.queue) {
                self.queue.fail(&fault);
            }
        }
        self.queue.into_state()
    }

    fn serve(&mut self) {
        let Self { queue, service, full } = self;
        service.now = Instant::now();
        *full = false;
        queue.serve(|queue, chain| {
            if service.backend.in_flight() >= usize::from(queue.size()) {
                queue.put_back(chain);
                *full = true;
                return Ok(Served::Enough);
            }
            service.take(queue, chain)?;
            Ok(Served::More)
        });
        if let Err(e) = service.backend.commit() {
            let reason = format!("disk {}: {e}", service.shared.id);
            queue.events().broken(&reason);
        }
        self.reap();
    }

    fn reap(&mut self) {
        if let Err(fault) = self.service.reap(&mut self.queue) {
            self.queue.fail(&fault);
        }
    }
}

impl Service {
    fn take(&mut self, queue: &mut RunningQueue, chain: Chain) -> Result<(), Fault> {
        let disk = &self.shared.disk;
        let bounds = Bounds { size: disk.size(), readonly: disk.readonly(), max_discard: MAX_DISCARD };
        let request = match parse(&chain, bounds)? {
            Ok(Parsed::Read { offset, len }) => Request::read(chain, offset, len)?,
            Ok(Parsed::Write { offset }) => Request::write(chain, offset, HEADER_LEN, !self.writeback())?,
            Ok(Parsed::Flush) => Request::flush(chain),
            Ok(Parsed::Range { operation, offset, len }) => Request::range(chain, operation, offset, len),
            Ok(Parsed::Id) => {
                let mut writer = chain.writer();
                let len = writer.remaining().saturating_sub(1).min(SERIAL_LEN);
                writer.write_all(self.shared.serial.get(..len).unwrap_or_default())?;
                return end(queue, chain, Status::Ok);
            }
            Err(status) => {
                count(&self.shared.counters.errors, 1);
                return end(queue, chain, status);
            }
        };
        self.backend.submit(request.taken_at(self.now));
        Ok(())
    }

    fn writeback(&self) -> bool {
        match self.cache {
            CacheMode::Configured => self.shared.writeback.load(Ordering::Relaxed),
            CacheMode::WriteBack => true,
            CacheMode::WriteThrough => false,
        }
    }

    fn commit_and_wait(&mut self) -> std::io::Result<()> {
        self.backend.commit()?;
        self.backend.wait()
    }

    /// Takes completions to the driver.
    fn reap(&mut self, queue: &mut RunningQueue) -> Result<(), Fault> {
        let mut flushes = false;
        self.now = Instant::now();
        while let Some(Completion { request, result }) = self.backend.complete() {
            if result.is_ok() && self.needs_flush(request.operation()) {
                // The same chain, whose flush is now what completes it.
                self.backend.submit(Request::flush(request.into_chain()));
                flushes = true;
                continue;
            }
            let status = match result {
                Ok(()) => self.account(&request),
                Err(error) => self.failed(&request, error),
            };
            end(queue, request.into_chain(), status)?;
        }
        if flushes && let Err(e) = self.backend.commit() {
            tracing::warn!("disk {}: {e}", self.shared.id);
        }
        queue.notify()
    }

    /// A write is made durable by itself; other changes of the disk need a flush for it.
    fn needs_flush(&self, operation: Operation) -> bool {
        matches!(operation, Operation::Discard | Operation::WriteZeroes { .. }) && !self.writeback()
    }

    fn failed(&self, request: &Request, error: std::io::Error) -> Status {
        let counters = &self.shared.counters;
        if counters.host_errors.load(Ordering::Relaxed) == 0 {
            tracing::warn!("disk {}: {error} (further errors are counted)", self.shared.id);
        }
        count(&counters.errors, 1);
        count(&counters.host_errors, 1);
        if let Some(tell) = self.shared.on_failure.get() {
            tell(IoFailure { operation: request.operation(), offset: request.offset(), error });
        }
        Status::IoError
    }

    fn account(&self, request: &Request) -> Status {
        let counters = &self.shared.counters;
        let time = match request.operation() {
            Operation::Read => {
                count(&counters.reads, 1);
                count(&counters.read_bytes, request.len());
                &counters.read_nanoseconds
            }
            Operation::Write { .. } => {
                count(&counters.writes, 1);
                count(&counters.written_bytes, request.len());
                &counters.write_nanoseconds
            }
            Operation::Flush => {
                count(&counters.flushes, 1);
                &counters.flush_nanoseconds
            }
            Operation::Discard | Operation::WriteZeroes { .. } => {
                count(&counters.discards, 1);
                &counters.discard_nanoseconds
            }
        };
        count(time, u64::try_from(request.age(self.now).as_nanos()).unwrap_or(u64::MAX));
        Status::Ok
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

/// Completes a request with its status: the last byte of the device-writable part, which `parse` found to be there.
fn end(queue: &mut RunningQueue, chain: Chain, status: Status) -> Result<(), Fault> {
    let mut writer = chain.writer();
    writer.skip(writer.remaining().saturating_sub(1));
    writer.write_obj(status as u8)?;
    // The whole part, since its last byte was written; after an error the bytes before it may be old ones.
    let written = writer.written();
    queue.complete(chain, written)
}

impl MutEventSubscriber for BlkWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let events = [
            Events::with_data(self.queue.kick(), KICK, EventSet::IN),
            Events::with_data(self.service.backend.event(), COMPLETION, EventSet::IN),
        ];
        for event in events {
            if let Err(e) = ops.add(event) {
                self.queue.events().broken(&format!("disk {}: events: {e}", self.service.shared.id));
                return;
            }
        }
    }

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        match events.data() {
            KICK => {
                count(&self.service.shared.counters.kicks, 1);
                self.serve();
            }
            _ => {
                let _ = self.service.backend.event().read();
                self.reap();
                if self.full {
                    self.serve();
                }
            }
        }
    }
}
