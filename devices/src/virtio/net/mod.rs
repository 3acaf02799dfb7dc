//! Virtio network device (virtio 1.2 §5.1) on a [`Tap`]: one pair of queues, no control queue.

mod rx;
#[cfg(test)]
mod tests;
mod tx;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::config::read_from_config;
use super::{DeviceInfo, Error, QueueState, Result, Resumed, RunningQueue, StateSink, StateSource, VirtioDevice};
use crate::io_thread::{IoThread, Running};
use crate::net::{Offloads, Tap};
use rx::RxWorker;
use tx::TxWorker;

/// Segmentation of UDP by the receiver, IPv4 and IPv6, and by the sender (virtio 1.2 §5.1.3 as amended).
const F_GUEST_USO4: u32 = 54;
const F_GUEST_USO6: u32 = 55;
const F_HOST_USO: u32 = 56;

/// Index of the receive queue.
const RX: u16 = 0;
/// Index of the transmit queue.
const TX: u16 = 1;

/// Length in bytes of the configuration: address, status, number of pairs, MTU.
const CONFIG_LEN: u32 = 12;

/// What a network device is made with.
#[derive(Debug, Clone)]
pub struct NetOptions {
    /// Names its thread and messages.
    pub id: String,
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// The largest packet, in bytes, that the guest is told to send; `None` leaves it at what its driver takes for
    /// usual.
    pub mtu: Option<u16>,
    /// Size of each queue in descriptors, a power of two of 16 to 1024.
    pub queue_size: u16,
}

impl NetOptions {
    /// Queues of 256 descriptors.
    pub fn new(id: &str, mac: [u8; 6]) -> Self {
        Self { id: id.to_owned(), mac, mtu: None, queue_size: 256 }
    }
}

/// What has gone through a network device since it was made. Bytes are those of frames, without virtio's header.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Frames to the guest.
    pub rx_packets: AtomicU64,
    /// Bytes to the guest.
    pub rx_bytes: AtomicU64,
    /// Frames for which the guest had no buffers that fit.
    pub rx_dropped: AtomicU64,
    /// Frames from the guest.
    pub tx_packets: AtomicU64,
    /// Bytes from the guest.
    pub tx_bytes: AtomicU64,
    /// Frames that the host did not take.
    pub tx_dropped: AtomicU64,
    /// Times that the driver told the worker of buffers for frames. Several kicks before it listens are one.
    pub rx_kicks: AtomicU64,
    /// Times that the driver told the worker of frames to send.
    pub tx_kicks: AtomicU64,
}

/// Whether a card's cable is plugged in, so to speak. While it is not, frames of both directions are dropped.
#[derive(Debug)]
pub struct Link(AtomicBool);

impl Link {
    /// Whether frames pass.
    pub fn is_up(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Lets frames pass from now on, or drops them. The device's driver is still to be told.
    pub fn set(&self, up: bool) {
        self.0.store(up, Ordering::Relaxed);
    }
}

/// What a worker moves frames by.
struct Wire {
    tap: Tap,
    counters: Arc<NetCounters>,
    link: Arc<Link>,
}

/// A virtio network device.
pub struct Net {
    options: NetOptions,
    tap: Tap,
    counters: Arc<NetCounters>,
    link: Arc<Link>,
    thread: Option<Arc<IoThread>>,
    rx: Option<Running<RxWorker>>,
    tx: Option<Running<TxWorker>>,
}

impl Net {
    /// A device on `tap`.
    pub fn new(tap: Tap, options: &NetOptions) -> Self {
        let mut options = options.clone();
        options.queue_size = options.queue_size.clamp(16, 1024).next_power_of_two();
        let link = Arc::new(Link(AtomicBool::new(true)));
        Self { options, tap, counters: Arc::default(), link, thread: None, rx: None, tx: None }
    }

    /// Serves the queues on this thread instead of one that is made when the driver starts them.
    #[must_use]
    pub fn on_thread(mut self, thread: Arc<IoThread>) -> Self {
        self.thread = Some(thread);
        self
    }

    /// What has gone through it so far.
    pub fn counters(&self) -> Arc<NetCounters> {
        Arc::clone(&self.counters)
    }

    /// Its link, which is up at first.
    pub fn link(&self) -> Arc<Link> {
        Arc::clone(&self.link)
    }

    fn features(&self) -> u64 {
        let host = self.tap.supported();
        let mut bits = vec![VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF];
        let offered = [
            (host.checksum, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
            (host.tso4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4),
            (host.tso6, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6),
            (host.ecn, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN),
            (host.ufo, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO),
            (host.uso, F_HOST_USO, F_GUEST_USO4),
            (host.uso, F_HOST_USO, F_GUEST_USO6),
        ];
        for (supported, sending, receiving) in offered {
            if supported {
                bits.extend([sending, receiving]);
            }
        }
        if self.options.mtu.is_some() {
            bits.push(VIRTIO_NET_F_MTU);
        }
        bits.into_iter().fold(0, |all, bit| all | 1 << bit)
    }
}

/// What a driver with these features does itself with what it receives.
fn offloads_of(features: u64) -> Offloads {
    let has = |bit: u32| features & (1 << bit) != 0;
    Offloads {
        checksum: has(VIRTIO_NET_F_GUEST_CSUM),
        tso4: has(VIRTIO_NET_F_GUEST_TSO4),
        tso6: has(VIRTIO_NET_F_GUEST_TSO6),
        ecn: has(VIRTIO_NET_F_GUEST_ECN),
        ufo: has(VIRTIO_NET_F_GUEST_UFO),
        // The kernel has one without the other only in name.
        uso: has(F_GUEST_USO4) && has(F_GUEST_USO6),
    }
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}

fn host_error(what: &'static str) -> impl Fn(std::io::Error) -> Error {
    move |source| Error::Host { what, source }
}

impl VirtioDevice for Net {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            device_type: u16::try_from(VIRTIO_ID_NET).unwrap_or_default(),
            features: self.features(),
            queue_sizes: vec![self.options.queue_size; 2],
            config_len: CONFIG_LEN,
        }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let mut config = self.options.mac.to_vec();
        let status = if self.link.is_up() { VIRTIO_NET_S_LINK_UP } else { 0 };
        config.extend(u16::try_from(status).unwrap_or_default().to_le_bytes());
        config.extend(1_u16.to_le_bytes());
        config.extend(self.options.mtu.unwrap_or_default().to_le_bytes());
        read_from_config(&config, offset, data);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // All fields are the device's (virtio 1.2 §5.1.4).
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()> {
        let id = &self.options.id;
        let thread = match &self.thread {
            Some(thread) => thread,
            None => {
                let thread = IoThread::spawn(id).map_err(host_error("network thread"))?;
                self.thread.insert(thread)
            }
        };
        let tap = self.tap.try_clone().map_err(host_error("tap"))?;
        let wire = Wire { tap, counters: Arc::clone(&self.counters), link: Arc::clone(&self.link) };
        match index {
            RX => {
                wire.tap.set_offloads(offloads_of(queue.features())).map_err(host_error("tap offloads"))?;
                let worker = RxWorker::new(queue, wire, self.options.mtu);
                let running = thread.add(worker);
                self.rx = Some(running.map_err(host_error("network thread"))?);
            }
            TX => {
                let running = thread.add(TxWorker::new(queue, wire));
                self.tx = Some(running.map_err(host_error("network thread"))?);
            }
            _ => return Err(Error::Driver(format!("{id}: there is no queue {index}"))),
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>> {
        let error = host_error("network thread");
        Ok(match index {
            RX => match self.rx.take() {
                Some(running) => Some(running.remove().map_err(error)?.stop()),
                None => None,
            },
            TX => match self.tx.take() {
                Some(running) => Some(running.remove().map_err(error)?.stop()),
                None => None,
            },
            _ => None,
        })
    }

    fn reset(&mut self) {
        if let Err(e) = self.tap.set_offloads(Offloads::default()) {
            tracing::warn!("tap {}: {e}", self.tap.name());
        }
    }

    fn save(&self, _into: &mut dyn StateSink) -> Result<()> {
        // Address and MTU are configuration, and offloads follow from the features that the transport saves.
        Ok(())
    }

    fn restore(&mut self, _from: &mut dyn StateSource) -> Result<()> {
        Ok(())
    }

    fn resumed(&mut self, _why: Resumed) {
        // Announcing the guest's address needs the control queue, which is not there yet: bridges learn the new
        // place from the guest's next frame.
    }
}
