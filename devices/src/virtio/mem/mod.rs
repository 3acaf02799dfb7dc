//! Virtio memory device (virtio 1.2 §5.15): a region of guest physical addresses, of which the driver plugs and unplugs
//! blocks until they add up to what the monitor asks for.
//!
//! Which blocks are plugged is the device's business; what that means for the host's memory is the monitor's, behind
//! [`Backing`]. Blocks stay plugged over a reset of the device by its driver: a kernel that follows another finds them so,
//! and unplugs all.

mod blocks;
mod worker;

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use self::blocks::Blocks;
use self::worker::MemWorker;
use super::config::read_from_config;
use super::{
    DeviceInfo, Error, QueueEvents, QueueState, Result, Resumed, RunningQueue, StateSink, StateSource, VirtioDevice,
    saved,
};
use crate::io_thread::{IoThread, Running};

/// The device type's number (virtio 1.2 §5.15.1).
const DEVICE_TYPE: u16 = 24;
/// The driver leaves unplugged memory alone (virtio 1.2 §5.15.3). One that does not know the feature may read it.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
/// Size of the queue in descriptors. A driver has one request at work.
const QUEUE_SIZE: u16 = 64;
/// Length of the configuration (virtio 1.2 §5.15.4).
const CONFIG_LEN: u32 = 56;

const SECTION: &str = "virtio-mem";
const SECTION_VERSION: u32 = 1;

/// The monitor's side of the region. All ranges are of bytes from the region's start, in whole blocks.
pub trait Backing: Send {
    /// Lets guest and devices use a range that they could not use. It reads as zeroes.
    ///
    /// # Errors
    /// The host has no memory for it now: nothing is changed, and the driver tries again.
    fn plug(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Takes a range away from guest and devices and gives its memory back to the host.
    ///
    /// # Errors
    /// It is in use, or the host refuses: nothing is changed, and the driver tries again.
    fn unplug(&mut self, range: Range<u64>) -> io::Result<()>;

    /// The plugged blocks now add up to this many bytes.
    fn resized(&self, plugged: u64);
}

/// What a memory device is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemOptions {
    /// The device's thread is named after it.
    pub id: String,
    /// Guest physical address of the region, a multiple of the block size.
    pub start: u64,
    /// Length of the region in bytes, a multiple of the block size.
    pub len: u64,
    /// Bytes of a block, a power of two.
    pub block_size: u64,
}

/// What monitor, registers and worker share without waiting for each other.
#[derive(Default)]
struct Sizes {
    /// Bytes that the monitor asks for.
    requested: AtomicU64,
    /// Bytes of all plugged blocks.
    plugged: AtomicU64,
    /// The way to the driver, while the queue runs.
    events: Mutex<Option<Arc<dyn QueueEvents>>>,
}

impl Sizes {
    fn events(&self) -> MutexGuard<'_, Option<Arc<dyn QueueEvents>>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the driver look at the configuration, where one is there.
    fn tell(&self) {
        if let Some(events) = &*self.events() {
            events.config_changed();
        }
    }
}

/// The blocks, and what is behind them.
struct Region {
    blocks: Blocks,
    backing: Box<dyn Backing>,
}

/// The monitor's hold on a memory device.
#[derive(Clone)]
pub struct MemControl(Arc<Sizes>);

impl MemControl {
    /// Asks the driver for blocks of this many bytes, a multiple of the block size up to the region's length. It is told
    /// now, or when there is one.
    pub fn request(&self, bytes: u64) {
        self.0.requested.store(bytes, Ordering::Release);
        self.0.tell();
    }

    /// Bytes of all plugged blocks.
    pub fn plugged(&self) -> u64 {
        self.0.plugged.load(Ordering::Acquire)
    }
}

/// A virtio memory device.
pub struct Mem {
    options: MemOptions,
    sizes: Arc<Sizes>,
    /// The worker's while the queue runs.
    region: Arc<Mutex<Region>>,
    thread: Option<Arc<IoThread>>,
    running: Option<Running<MemWorker>>,
}

/// What is saved: the requested size, and the runs of plugged blocks in bytes from the region's start.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    block_size: u64,
    requested: u64,
    plugged: Vec<Range<u64>>,
}

impl Mem {
    /// A device without a plugged block.
    ///
    /// # Errors
    /// [`Error::State`] where the region is not one of whole blocks.
    pub fn new(options: MemOptions, backing: Box<dyn Backing>) -> Result<Self> {
        let MemOptions { id, start, len, block_size } = &options;
        let whole = |bytes: &u64| block_size.is_power_of_two() && bytes.is_multiple_of(*block_size);
        if !whole(start) || !whole(len) || *len == 0 || start.checked_add(*len).is_none() {
            let message = format!("{id}: {len:#x} bytes at {start:#x} are no region of blocks of {block_size:#x}");
            return Err(Error::State(message));
        }
        let blocks = Blocks::new(len / block_size, *block_size);
        let region = Arc::new(Mutex::new(Region { blocks, backing }));
        Ok(Self { options, sizes: Arc::default(), region, thread: None, running: None })
    }

    /// Serves the queue on this thread instead of one that is made when the driver starts it.
    #[must_use]
    pub fn on_thread(mut self, thread: Arc<IoThread>) -> Self {
        self.thread = Some(thread);
        self
    }

    /// The monitor's hold on the device.
    pub fn control(&self) -> MemControl {
        MemControl(Arc::clone(&self.sizes))
    }

    fn region(&self) -> MutexGuard<'_, Region> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VirtioDevice for Mem {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            device_type: DEVICE_TYPE,
            features: UNPLUGGED_INACCESSIBLE,
            queue_sizes: vec![QUEUE_SIZE],
            config_len: CONFIG_LEN,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let MemOptions { start, len, block_size, .. } = self.options;
        let (plugged, requested) =
            (self.sizes.plugged.load(Ordering::Acquire), self.sizes.requested.load(Ordering::Acquire));
        // The second is the node, which there is none of. All of the region is usable at any time.
        let fields = [block_size, 0, start, len, len, plugged, requested];
        read_from_config(fields.map(u64::to_le_bytes).as_flattened(), offset, data);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // All of it is read-only.
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()> {
        if index != 0 {
            return Err(Error::Driver(format!("{}: there is no queue {index}", self.options.id)));
        }
        let host = |source| Error::Host { what: "memory thread", source };
        let thread = match &self.thread {
            Some(thread) => thread,
            None => self.thread.insert(IoThread::spawn(&self.options.id).map_err(host)?),
        };
        let events = Arc::clone(queue.events());
        let worker = MemWorker::new(queue, &self.options, Arc::clone(&self.sizes), Arc::clone(&self.region));
        self.running = Some(thread.add(worker).map_err(host)?);
        *self.sizes.events() = Some(events);
        // What was asked for while the queue stood has not been told.
        self.sizes.tell();
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>> {
        if index != 0 {
            return Ok(None);
        }
        *self.sizes.events() = None;
        let Some(running) = self.running.take() else {
            return Ok(None);
        };
        let worker = running.remove().map_err(|source| Error::Host { what: "memory thread", source })?;
        Ok(Some(worker.into_state()))
    }

    fn reset(&mut self) {
        // Plugged blocks stay: see above.
    }

    fn save(&self, into: &mut dyn StateSink) -> Result<()> {
        let state = Saved {
            block_size: self.options.block_size,
            requested: self.sizes.requested.load(Ordering::Acquire),
            plugged: self.region().blocks.plugged_runs(),
        };
        saved::save(into, SECTION, SECTION_VERSION, &state)
    }

    fn restore(&mut self, from: &mut dyn StateSource) -> Result<()> {
        let saved: Saved = saved::restore(from, SECTION, SECTION_VERSION)?;
        let MemOptions { id, len, block_size, .. } = &self.options;
        let whole = |bytes: u64| bytes.is_multiple_of(*block_size) && bytes <= *len;
        let sound = |run: &Range<u64>| whole(run.start) && whole(run.end) && run.start < run.end;
        if saved.block_size != *block_size || !whole(saved.requested) || !saved.plugged.iter().all(sound) {
            return Err(Error::State(format!("{SECTION}: {id} has another region or block size")));
        }
        let mut region = self.region();
        for run in saved.plugged {
            if !region.blocks.are_all(&run, false) {
                return Err(Error::State(format!("{SECTION}: blocks are plugged twice")));
            }
            region.backing.plug(run.clone()).map_err(|source| Error::Host { what: "plugging memory", source })?;
            region.blocks.set(&run, true);
        }
        self.sizes.plugged.store(region.blocks.plugged_bytes(), Ordering::Release);
        self.sizes.requested.store(saved.requested, Ordering::Release);
        Ok(())
    }

    fn resumed(&mut self, _why: Resumed) {
        // A driver that runs is told of the requested size when its queue starts.
    }
}
