//! A virtqueue in service: the split ring (virtio 1.2 §2.7) with what its worker needs.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ring::{VIRTIO_RING_F_INDIRECT_DESC, VRING_AVAIL_F_NO_INTERRUPT};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::chain::{Chain, Fault};
use super::chain::{Spare, Table};

/// Where a stopped queue stands: addresses, size and ring indices.
pub type QueueState = virtio_queue::QueueState;

/// Chains served per wakeup before other queues of the same thread have their turn.
const CHAINS_PER_WAKEUP: usize = 256;

/// What a queue's worker tells its transport. None of these takes a lock or waits.
pub trait QueueEvents: Send + Sync {
    /// Used buffers wait for the driver.
    fn used(&self);
    /// The device configuration has changed.
    fn config_changed(&self);
    /// The driver broke a rule, or the device cannot go on: DEVICE_NEEDS_RESET is set (virtio 1.2 §2.1.2), the
    /// driver is told, the fault is counted, and the worker touches the queue no more until it is stopped.
    fn broken(&self, reason: &str);
}

/// What a device makes of a chain in [`RunningQueue::serve`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// Go on with the next chain.
    More,
    /// The device cannot take another now. It calls [`RunningQueue::serve`] again when it can.
    Enough,
}

/// A queue that its worker owns while it runs.
pub struct RunningQueue {
    ring: Queue,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    kick: EventFd,
    events: Arc<dyn QueueEvents>,
    features: u64,
    spare: Vec<Spare>,
    /// Chains have been completed since the driver was last told.
    unannounced: bool,
    broken: bool,
}

impl fmt::Debug for RunningQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RunningQueue").field("ring", &self.ring).field("broken", &self.broken).finish_non_exhaustive()
    }
}

impl RunningQueue {
    /// Puts a queue into service. `features` are the negotiated feature bits.
    ///
    /// # Errors
    /// [`Fault::Ring`] where the state is not that of a usable queue, [`Fault::OutsideMemory`] where a ring is not
    /// within guest memory.
    pub fn new(
        state: QueueState,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        kick: EventFd,
        events: Arc<dyn QueueEvents>,
        features: u64,
    ) -> Result<Self, Fault> {
        let ring = Queue::try_from(state).map_err(ring_fault)?;
        if !ring.ready() {
            return Err(Fault::Ring("the driver did not enable the queue".into()));
        }
        if !ring.is_valid(&*memory.memory()) {
            return Err(Fault::Ring("a ring lies outside guest memory".into()));
        }
        Ok(Self { ring, memory, kick, events, features, spare: Vec::new(), unannounced: false, broken: false })
    }

    /// Signalled when the driver has made buffers available: what a worker waits for.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// The way to the driver.
    pub fn events(&self) -> &Arc<dyn QueueEvents> {
        &self.events
    }

    /// The feature bits that were negotiated.
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The queue's size in descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Serves available chains, a bounded number of them, then tells the driver of those completed, and marks the
    /// queue broken where `each` or the ring gives a fault. Call it when [`RunningQueue::kick`] is readable, or when
    /// the device that had [`Served::Enough`] has room again.
    ///
    /// Where chains are left over after the bound, the kick is signalled again, so that the worker comes back after
    /// the other workers of its thread.
    pub fn serve(&mut self, mut each: impl FnMut(&mut Self, Chain) -> Result<Served, Fault>) {
        // Level or edge: an event that was there already is no error.
        let _ = self.kick.read();
        let served = self.serve_chains(&mut each).and_then(|left| {
            self.notify()?;
            Ok(left)
        });
        match served {
            Ok(true) => {
                if let Err(e) = self.kick.write(1) {
                    tracing::warn!("queue's own kick: {e}");
                }
            }
            Ok(false) => {}
            Err(fault) => self.fail(&fault),
        }
    }

    /// True where chains may be left after the bound on one wakeup.
    fn serve_chains(
        &mut self,
        each: &mut impl FnMut(&mut Self, Chain) -> Result<Served, Fault>,
    ) -> Result<bool, Fault> {
        self.disable_notification()?;
        for _ in 0..CHAINS_PER_WAKEUP {
            let chain = match self.next_chain()? {
                Some(chain) => chain,
                // Looked at once more after enabling, since a kick before that was not sent.
                None if !self.enable_notification()? => return Ok(false),
                None => {
                    self.disable_notification()?;
                    continue;
                }
            };
            if each(self, chain)? == Served::Enough {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes the next available chain, checked; `None` where there is none.
    ///
    /// # Errors
    /// The rule that the driver broke. The caller passes it to [`RunningQueue::fail`].
    pub fn next_chain(&mut self) -> Result<Option<Chain>, Fault> {
        if self.broken {
            return Ok(None);
        }
        let memory = self.memory.memory();
        let (next, size) = (self.ring.next_avail(), self.ring.size());
        let head = match self.ring.iter(&*memory) {
            Ok(mut chains) => chains.next().map(|chain| chain.head_index()),
            Err(virtio_queue::Error::InvalidAvailRingIndex) => {
                return Err(Fault::AvailableIndex { next, size });
            }
            Err(e) => return Err(ring_fault(e)),
        };
        let Some(head) = head else {
            return Ok(None);
        };
        let table = Table {
            memory: memory.into_inner(),
            address: self.ring.desc_table(),
            size,
            indirect: self.features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
        };
        table.walk(head, self.spare.pop().unwrap_or_default()).map(Some)
    }

    /// Gives the chain taken last back, untouched, to be taken again. Chains are put back in the opposite order of
    /// their taking, and only before any taken later is completed.
    pub fn put_back(&mut self, chain: Chain) {
        self.ring.go_to_previous_position();
        self.recycle(chain);
    }

    /// Returns a chain to the driver, the first `written` bytes of whose device-writable part were written. The
    /// driver learns of it at the next [`RunningQueue::notify`].
    ///
    /// This is the one place where written guest memory leaves a device's hands, so it is where it is to be marked
    /// dirty, io_uring's writes included.
    ///
    /// # Errors
    /// [`Fault::Ring`] where the used ring cannot be written any more.
    pub fn complete(&mut self, chain: Chain, written: u32) -> Result<(), Fault> {
        if !self.broken {
            let written = written.min(chain.writable_len());
            self.ring.add_used(&*self.memory.memory(), chain.head(), written).map_err(ring_fault)?;
            self.unannounced = true;
        }
        self.recycle(chain);
        Ok(())
    }

    fn recycle(&mut self, chain: Chain) {
        // One list for each chain that a device is likely to have at once.
        if self.spare.len() < 8 {
            self.spare.push(chain.into_spare());
        }
    }

    /// Interrupts the driver where chains have been completed since the last call and the driver wants to know
    /// (virtio 1.2 §2.7.7).
    ///
    /// # Errors
    /// [`Fault::Ring`] where the ring cannot be read any more.
    pub fn notify(&mut self) -> Result<(), Fault> {
        if self.broken || !std::mem::take(&mut self.unannounced) {
            return Ok(());
        }
        let memory = self.memory.memory();
        // With EVENT_IDX the driver's used_event decides and its flags are to be ignored; without, the flags do.
        let wanted = self.ring.needs_notification(&*memory).map_err(ring_fault)?
            && (self.ring.event_idx_enabled() || !self.interrupts_suppressed(&memory)?);
        if wanted {
            self.events.used();
        }
        Ok(())
    }

    fn interrupts_suppressed(&self, memory: &GuestMemoryMmap) -> Result<bool, Fault> {
        let flags: u16 = memory
            .load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)
            .map_err(|e| Fault::Ring(e.to_string()))?;
        Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
    }

    /// Asks the driver for kicks. True where buffers became available meanwhile, for which no kick may come.
    ///
    /// # Errors
    /// [`Fault::Ring`] where the ring cannot be accessed any more.
    pub fn enable_notification(&mut self) -> Result<bool, Fault> {
        if self.broken {
            return Ok(false);
        }
        let memory = self.memory.memory();
        self.ring.enable_notification(&*memory).map_err(ring_fault)
    }

    /// Spares the driver kicks while the worker looks at the ring anyway.
    ///
    /// # Errors
    /// [`Fault::Ring`] where the ring cannot be accessed any more.
    pub fn disable_notification(&mut self) -> Result<(), Fault> {
        if self.broken {
            return Ok(());
        }
        let memory = self.memory.memory();
        self.ring.disable_notification(&*memory).map_err(ring_fault)
    }

    /// Marks the device as needing a reset. From here on the queue gives no chain and takes none into the ring.
    pub fn fail(&mut self, fault: &Fault) {
        if !std::mem::replace(&mut self.broken, true) {
            self.events.broken(&fault.to_string());
        }
    }

    /// The state to hand back when the queue stops. Tells the driver of what was completed and not announced.
    pub fn into_state(mut self) -> QueueState {
        if let Err(fault) = self.notify() {
            self.fail(&fault);
        }
        self.ring.state()
    }
}

fn ring_fault(error: virtio_queue::Error) -> Fault {
    Fault::Ring(error.to_string())
}

/// A new event for a queue's kick.
///
/// # Errors
/// The operating system's answer.
pub fn kick_event() -> io::Result<EventFd> {
    EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)
}

#[cfg(test)]
mod tests;
