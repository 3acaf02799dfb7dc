//! Virtio devices (virtio 1.2): the contract between a device and its transport.
//!
//! The transport owns negotiation, the status machine and stopped queues. A running queue is owned by the worker
//! that serves it, so the data path takes no lock; pause, snapshot, reset, unplug and migration are all "stop the
//! queues" and "start them again".

pub mod blk;
pub mod chain;
mod config;
pub mod console;
pub mod mem;
pub mod net;
pub mod queue;
pub mod rng;
mod saved;
pub mod testing;
pub mod transport;

use std::io;

pub use chain::{Chain, Fault, Reader, Writer};
pub use queue::{QueueEvents, QueueState, RunningQueue, Served};

/// What a transport must know of a device before the driver sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// The device type's number (virtio 1.2 §5).
    pub device_type: u16,
    /// Feature bits of the device type offered to the driver (bits 0 to 23 and 50 to 63). The transport adds its
    /// own (VERSION_1, and the ring's).
    pub features: u64,
    /// The largest size of each queue, each a power of two of at most 32768.
    pub queue_sizes: Vec<u16>,
    /// Length of the device-specific configuration in bytes.
    pub config_len: u32,
}

/// Why a device cannot do what its transport asked. The transport marks the device as needing reset.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The driver broke a rule of the specification.
    #[error("driver error: {0}")]
    Driver(String),
    /// The host failed.
    #[error("{what}: {source}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
    /// A saved state does not fit this device.
    #[error("saved state: {0}")]
    State(String),
}

/// The result of a transport's request to a device.
pub type Result<T> = std::result::Result<T, Error>;

/// A device's saved state goes here, in named and versioned sections.
pub trait StateSink {
    /// Adds a section. `data` is self-describing (JSON), small, and of one writer's `version`.
    ///
    /// # Errors
    /// [`Error::Host`] where it cannot be written.
    fn section(&mut self, name: &str, version: u32, data: &[u8]) -> Result<()>;
}

/// A device's saved state comes from here.
pub trait StateSource {
    /// A section's version and data, or `None` where the writer had none of that name.
    ///
    /// # Errors
    /// [`Error::Host`] where it cannot be read.
    fn section(&mut self, name: &str) -> Result<Option<(u32, Vec<u8>)>>;
}

/// Why a device that was stopped runs again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resumed {
    /// From a snapshot of its own past.
    Restored,
    /// On another host.
    Migrated,
    /// As one of several copies.
    Cloned,
}

/// A virtio device, as its transport sees it. Everything but the queues is called under the transport's lock.
pub trait VirtioDevice: Send {
    /// Type, features, queue sizes, length of configuration. Does not change over the device's life.
    fn info(&self) -> DeviceInfo;

    /// Reads device configuration. `offset + data.len()` is within [`DeviceInfo::config_len`].
    fn read_config(&self, offset: u32, data: &mut [u8]);

    /// Writes device configuration, under the same bounds. A field that the specification makes read-only ignores
    /// the write.
    fn write_config(&mut self, offset: u32, data: &[u8]);

    /// Starts to serve a queue, after DRIVER_OK. The device's worker owns it until [`VirtioDevice::stop_queue`].
    ///
    /// # Errors
    /// [`Error::Host`] where a thread or event cannot be made.
    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()>;

    /// Stops serving a queue and hands its state back, once every request in flight is completed; `None` where the
    /// queue was not running.
    ///
    /// # Errors
    /// [`Error::Host`] where the worker is gone.
    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>>;

    /// Forgets what the driver set; every queue has been stopped.
    fn reset(&mut self);

    /// Saves what the device itself holds (queues and negotiation are the transport's), while stopped.
    ///
    /// # Errors
    /// See [`StateSink`].
    fn save(&self, into: &mut dyn StateSink) -> Result<()>;

    /// Puts back what [`VirtioDevice::save`] wrote, while stopped.
    ///
    /// # Errors
    /// [`Error::State`] where a section is damaged or does not fit.
    fn restore(&mut self, from: &mut dyn StateSource) -> Result<()>;

    /// Tells that the device runs again after [`VirtioDevice::restore`]: announce an address, reset connections.
    fn resumed(&mut self, why: Resumed);
}
