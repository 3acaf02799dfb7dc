//! Virtio block device (virtio 1.2 §5.2) on a [`RawDisk`].
//!
//! Each queue has a thread and a disk backend of its own.

mod on_thread;
mod request;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use vm_memory::{ByteValued, Le16, Le32, Le64};

use super::config::read_from_config;
use super::{
    DeviceInfo, Error, QueueState, Result, Resumed, RunningQueue, StateSink, StateSource, VirtioDevice, saved,
};
use crate::disk::{DiskBackend, MAX_WRITE_ZEROES, Operation, RawDisk, SECTOR, Topology};
use crate::io_thread::{IoThread, Running};
use on_thread::run_on;
use worker::BlkWorker;

/// Length in bytes of a disk's serial number (virtio 1.2 §5.2.6).
pub const SERIAL_LEN: usize = 20;

/// The most bytes that one request may discard. It bounds how long one may take.
const MAX_DISCARD: u64 = 1 << 30;

/// Offset of `writeback` in the configuration.
const WRITEBACK_OFFSET: u32 = 32;

/// A disk's configuration up to and with `write_zeroes_may_unmap` (virtio 1.2 §5.2.4).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Config {
    capacity: Le64,
    size_max: Le32,
    seg_max: Le32,
    cylinders: Le16,
    heads: u8,
    sectors: u8,
    blk_size: Le32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: Le16,
    opt_io_size: Le32,
    writeback: u8,
    unused0: u8,
    num_queues: Le16,
    max_discard_sectors: Le32,
    max_discard_seg: Le32,
    discard_sector_alignment: Le32,
    max_write_zeroes_sectors: Le32,
    max_write_zeroes_seg: Le32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
    /// Beyond the configuration: the structure's size is a multiple of 8.
    padding: [u8; 4],
}

#[expect(unsafe_code, reason = "a structure read as bytes")]
// SAFETY: plain integers, no padding: each field lies at a multiple of its size.
unsafe impl ByteValued for Config {}

const _: () = assert!(size_of::<Config>() == 64);

/// Length in bytes of what the driver sees of [`Config`].
const CONFIG_LEN: u32 = 60;

/// What the devices of a disk are made with.
#[derive(Debug, Clone)]
pub struct BlkOptions {
    /// Names threads and messages.
    pub id: String,
    /// What the guest reads as the disk's serial number: its first [`SERIAL_LEN`] bytes.
    pub serial: String,
    /// Number of queues, 1 to 64.
    pub queues: u16,
    /// Size of each queue in descriptors, a power of two of 4 to 1024.
    pub queue_size: u16,
}

impl BlkOptions {
    /// One queue of 256 descriptors; the serial number is `id`.
    pub fn new(id: &str) -> Self {
        Self { id: id.to_owned(), serial: id.to_owned(), queues: 1, queue_size: 256 }
    }
}

/// What a disk has done since it was made.
#[derive(Debug, Default)]
pub struct BlkCounters {
    /// Read requests done.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Write requests done.
    pub writes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Flushes done.
    pub flushes: AtomicU64,
    /// Discards and writes of zeroes done.
    pub discards: AtomicU64,
    /// Requests that failed, whoever's fault it was.
    pub errors: AtomicU64,
    /// Those of them that failed on the host.
    pub host_errors: AtomicU64,
    /// Nanoseconds that reads took, from queue to completion, all added up.
    pub read_nanoseconds: AtomicU64,
    /// The same of writes.
    pub write_nanoseconds: AtomicU64,
    /// The same of flushes.
    pub flush_nanoseconds: AtomicU64,
    /// The same of discards and writes of zeroes.
    pub discard_nanoseconds: AtomicU64,
    /// Times that the driver told a queue's worker of requests. Several kicks before it listens are one.
    pub kicks: AtomicU64,
}

/// A request that failed on the host.
#[derive(Debug)]
pub struct IoFailure {
    /// What was asked for.
    pub operation: Operation,
    /// Where on the disk, in bytes.
    pub offset: u64,
    /// Why it failed.
    pub error: std::io::Error,
}

/// Told of each request that fails on the host, on the disk's thread: it must not wait.
type OnFailure = dyn Fn(IoFailure) + Send + Sync;

/// What the device and its workers share.
struct Shared {
    id: String,
    serial: [u8; SERIAL_LEN],
    disk: Arc<RawDisk>,
    /// Writes may stay in the host's cache until a flush.
    writeback: AtomicBool,
    counters: Arc<BlkCounters>,
    on_failure: OnceLock<Box<OnFailure>>,
}

/// Makes the backend of a queue, with its depth.
type MakeBackend = dyn Fn(u16) -> std::io::Result<Box<dyn DiskBackend>> + Send + Sync;

/// A virtio block device.
pub struct Blk {
    shared: Arc<Shared>,
    make_backend: Arc<MakeBackend>,
    queue_size: u16,
    queues: Vec<QueueSlot>,
}

#[derive(Default)]
struct QueueSlot {
    thread: Option<Arc<IoThread>>,
    running: Option<Running<BlkWorker>>,
}

impl Blk {
    /// A device that shows `disk`. The disk stays open, and locked, while any copy of the `Arc` lives.
    pub fn new(disk: Arc<RawDisk>, options: &BlkOptions) -> Self {
        let backend_disk = Arc::clone(&disk);
        Self::with_backend(disk, options, Arc::new(move |depth| backend_disk.backend(depth)))
    }

    /// A device whose requests go to backends that `make_backend` makes.
    pub(crate) fn with_backend(disk: Arc<RawDisk>, options: &BlkOptions, make_backend: Arc<MakeBackend>) -> Self {
        let mut serial = [0; SERIAL_LEN];
        for (to, from) in serial.iter_mut().zip(options.serial.bytes()) {
            *to = from;
        }
        let queues = options.queues.clamp(1, 64);
        Self {
            shared: Arc::new(Shared {
                id: options.id.clone(),
                serial,
                disk,
                writeback: AtomicBool::new(true),
                counters: Arc::default(),
                on_failure: OnceLock::new(),
            }),
            make_backend,
            queue_size: options.queue_size.clamp(4, 1024).next_power_of_two(),
            queues: (0..queues).map(|_| QueueSlot::default()).collect(),
        }
    }

    /// Serves queues on these threads, one each, instead of threads that are made when the driver starts them.
    #[must_use]
    pub fn on_threads(mut self, threads: impl IntoIterator<Item = Arc<IoThread>>) -> Self {
        for (slot, thread) in self.queues.iter_mut().zip(threads) {
            slot.thread = Some(thread);
        }
        self
    }

    /// Calls `tell` of each request that fails on the host, on the disk's thread: it must not wait.
    #[must_use]
    pub fn on_failure(self, tell: impl Fn(IoFailure) + Send + Sync + 'static) -> Self {
        // Nobody has set it before.
        let _ = self.shared.on_failure.set(Box::new(tell));
        self
    }

    /// What the disk has done so far.
    pub fn counters(&self) -> Arc<BlkCounters> {
        Arc::clone(&self.shared.counters)
    }

    fn config(&self) -> Config {
        let disk = &self.shared.disk;
        let Topology { physical_block, minimum_io, optimal_io } = disk.topology();
        let sector = u32::try_from(SECTOR).unwrap_or(512);
        let sectors = |bytes: u64| Le32::from(u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX));
        Config {
            capacity: (disk.size() / SECTOR).into(),
            // Two descriptors are the header's and the status byte's.
            seg_max: u32::from(self.queue_size - 2).into(),
            blk_size: sector.into(),
            physical_block_exp: u8::try_from((physical_block / sector).max(1).ilog2()).unwrap_or(0),
            min_io_size: u16::try_from(minimum_io / sector).unwrap_or(0).into(),
            opt_io_size: (optimal_io / sector).into(),
            writeback: u8::from(self.shared.writeback.load(Ordering::Relaxed)),
            num_queues: u16::try_from(self.queues.len()).unwrap_or(u16::MAX).into(),
            max_discard_sectors: sectors(MAX_DISCARD),
            max_discard_seg: 1.into(),
            discard_sector_alignment: (physical_block / sector).max(1).into(),
            max_write_zeroes_sectors: sectors(MAX_WRITE_ZEROES),
            max_write_zeroes_seg: 1.into(),
            write_zeroes_may_unmap: 1,
            ..Config::default()
        }
    }

    fn features(&self) -> u64 {
        let mut bits = vec![VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_FLUSH];
        if self.queues.len() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.shared.disk.readonly() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }
}

impl VirtioDevice for Blk {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            device_type: u16::try_from(VIRTIO_ID_BLOCK).unwrap_or_default(),
            features: self.features(),
            queue_sizes: vec![self.queue_size; self.queues.len()],
            config_len: CONFIG_LEN,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        read_from_config(self.config().as_slice(), offset, data);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        // Only `writeback` can be written. With a disk that cannot be written there is no such feature.
        if offset == WRITEBACK_OFFSET
            && let [value] = data
            && !self.shared.disk.readonly()
        {
            self.shared.writeback.store(*value != 0, Ordering::Relaxed);
        }
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()> {
        let id = &self.shared.id;
        let slot = self
            .queues
            .get_mut(usize::from(index))
            .ok_or_else(|| Error::Driver(format!("{id}: there is no queue {index}")))?;
        let host = |what| move |source| Error::Host { what, source };
        let thread = match &slot.thread {
            Some(thread) => Arc::clone(thread),
            None => {
                let thread = IoThread::spawn(id).map_err(host("disk thread"))?;
                Arc::clone(slot.thread.insert(thread))
            }
        };
        let (make, depth) = (Arc::clone(&self.make_backend), queue.size());
        let backend =
            run_on(&thread, move || make(depth)).map_err(host("disk thread"))?.map_err(host("disk backend"))?;
        let worker = BlkWorker::new(queue, backend, Arc::clone(&self.shared));
        slot.running = Some(thread.add(worker).map_err(host("disk thread"))?);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>> {
        let Some(running) = self.queues.get_mut(usize::from(index)).and_then(|slot| slot.running.take()) else {
            return Ok(None);
        };
        let error = |source| Error::Host { what: "disk thread", source };
        let thread = Arc::clone(running.thread());
        let worker = running.remove().map_err(error)?;
        run_on(&thread, move || worker.stop()).map(Some).map_err(error)
    }

    fn reset(&mut self) {
        self.shared.writeback.store(true, Ordering::Relaxed);
    }

    fn save(&self, into: &mut dyn StateSink) -> Result<()> {
        let state = SavedBlk { writeback: self.shared.writeback.load(Ordering::Relaxed) };
        saved::save(into, "blk", 1, &state)
    }

    fn restore(&mut self, from: &mut dyn StateSource) -> Result<()> {
        let state: SavedBlk = saved::restore(from, "blk", 1)?;
        self.shared.writeback.store(state.writeback, Ordering::Relaxed);
        Ok(())
    }

    fn resumed(&mut self, _why: Resumed) {
        // A disk has no connection or address to make known again.
    }
}

/// What a disk saves, version 1.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct SavedBlk {
    writeback: bool,
}
