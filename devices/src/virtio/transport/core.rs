//! The status machine of a virtio device (virtio 1.2 §2 and §3), whichever registers a driver sees it through.
//!
//! ```text
//!   0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK        a status of 0 leads back from anywhere
//!                                      queues are set up │ queues run
//! ```
//!
//! Features are fixed at FEATURES_OK and queues at DRIVER_OK: later writes to them change nothing. A reset is done
//! when the write of status 0 returns: every queue has stopped with its requests in flight completed.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::super::queue::kick_event;
use super::super::saved;
use super::super::{DeviceInfo, Error, Result, Resumed, RunningQueue, StateSink, StateSource, VirtioDevice};
use super::signals::{Events, Shared, Signals};
use super::slot::{Area, SavedQueue, Slot, check_rings};

/// Device status bits (virtio 1.2 §2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;
/// The bits that a driver sets.
const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;

/// Features of the ring and the transport, offered for every device.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;

/// The name and version of the section that [`Core::save`] writes.
const SECTION: &str = "virtio";
const SECTION_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedCore {
    status: u8,
    driver_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    generation: u8,
    queues: Vec<SavedQueue>,
}

/// A device with its negotiation and its queues.
pub struct Core {
    device: Box<dyn VirtioDevice>,
    info: DeviceInfo,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    shared: Arc<Shared>,
    status: u8,
    driver_features: u64,
    slots: Vec<Slot>,
    /// The driver must know that the device does not reach all of the guest's memory.
    access_platform: bool,
    /// Queues do not run although the driver wants it, until [`Core::resume`].
    suspended: bool,
    /// Which half of the device's features the driver reads.
    pub device_feature_select: u32,
    /// Which half of its features the driver writes.
    pub driver_feature_select: u32,
    /// Which queue the driver sets up.
    pub queue_select: u16,
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("name", &self.shared.name)
            .field("info", &self.info)
            .field("status", &self.status)
            .finish_non_exhaustive()
    }
}

impl Core {
    /// A device that has just been reset. `name` stands in messages.
    ///
    /// # Errors
    /// [`Error::State`] where the device has a queue of a size that is no power of two or over 32768.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        signals: Arc<dyn Signals>,
    ) -> Result<Self> {
        let info = device.info();
        if let Some(size) = info.queue_sizes.iter().find(|size| Queue::new(**size).is_err()) {
            let message = format!("{name}: {size} is no size of a queue");
            return Err(Error::State(message));
        }
        Ok(Self {
            slots: info.queue_sizes.iter().map(|size| Slot::new(*size)).collect(),
            device,
            info,
            memory,
            shared: Arc::new(Shared::new(name, signals)),
            status: 0,
            driver_features: 0,
            access_platform: false,
            suspended: false,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
        })
    }

    /// What the device says of itself.
    pub fn info(&self) -> &DeviceInfo {
        &self.info
    }

    /// Counts how often the driver broke a rule, or the device could not go on.
    pub fn faults(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.shared.faults)
    }

    /// Calls `tell` with the reason each time that the device is marked as one that needs a reset, on whatever thread finds
    /// that: it must not wait. To be called once.
    pub fn on_broken(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        // Nobody has set it before.
        let _ = self.shared.on_broken.set(Box::new(tell));
    }

    /// The number of queues.
    pub fn queue_count(&self) -> u16 {
        // No transport takes a device with more than 65535.
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX)
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        match self.shared.needs_reset.load(Ordering::Acquire) {
            true => self.status | NEEDS_RESET,
            false => self.status,
        }
    }

    /// Writes the device status register. A status that clears bits, other than 0, and a step out of order are
    /// ignored.
    pub fn set_status(&mut self, status: u8) {
        if status == 0 {
            self.reset();
            return;
        }
        let wanted = status & DRIVER_BITS;
        if self.status & !wanted != 0 {
            return;
        }
        let new = wanted & !self.status;
        self.status |= new & (ACKNOWLEDGE | FAILED);
        if new & DRIVER != 0 && self.has(ACKNOWLEDGE) {
            self.status |= DRIVER;
        }
        // Where the features do not suit, the driver finds the bit still clear.
        if new & FEATURES_OK != 0 && self.has(DRIVER) && self.features_suit() {
            self.status |= FEATURES_OK;
        }
        if new & DRIVER_OK != 0 && self.has(FEATURES_OK) && !self.has(FAILED) {
            self.status |= DRIVER_OK;
            self.start_queues();
        }
    }

    fn has(&self, bit: u8) -> bool {
        self.status & bit != 0
    }

    /// True while the driver may kick queues: from DRIVER_OK until a reset.
    pub fn is_live(&self) -> bool {
        self.has(DRIVER_OK)
    }

    /// Offers VIRTIO_F_ACCESS_PLATFORM, and insists on it: the device reaches only memory that the guest has shared, and a
    /// driver that does not know of it would give the device addresses in other memory (virtio 1.2 §6.1). To be called before
    /// the guest runs.
    pub fn require_access_platform(&mut self) {
        self.access_platform = true;
    }

    /// Features without which a driver cannot run the device.
    fn required(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | u64::from(self.access_platform) << VIRTIO_F_ACCESS_PLATFORM
    }

    fn offered(&self) -> u64 {
        self.info.features | TRANSPORT_FEATURES | self.required()
    }

    fn features_suit(&self) -> bool {
        let unknown = self.driver_features & !self.offered();
        unknown == 0 && self.required() & !self.driver_features == 0
    }

    /// The selected half of the offered features.
    pub fn device_features(&self) -> u32 {
        let [low, high] = halves(self.offered());
        match self.device_feature_select {
            0 => low,
            1 => high,
            _ => 0,
        }
    }

    /// The selected half of the features that the driver chose.
    pub fn driver_features(&self) -> u32 {
        let [low, high] = halves(self.driver_features);
        match self.driver_feature_select {
            0 => low,
            1 => high,
            _ => 0,
        }
    }

    /// Chooses the selected half of the features, until FEATURES_OK.
    pub fn set_driver_features(&mut self, value: u32) {
        if !self.has(FEATURES_OK) && self.driver_feature_select < 2 {
            let half = self.driver_feature_select;
            set_half(&mut self.driver_features, half == 1, value);
        }
    }

    /// A number that changes whenever the configuration does (virtio 1.2 §2.5.1).
    pub fn config_generation(&self) -> u8 {
        self.shared.generation.load(Ordering::Acquire)
    }

    /// Tells the driver that the device's configuration is another now.
    pub fn config_changed(&self) {
        self.shared.config_changed();
    }

    /// Reads device configuration; beyond its end there are zeros.
    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some((offset, len)) = self.config_part(offset, data.len())
            && let Some(part) = data.get_mut(..len)
        {
            self.device.read_config(offset, part);
        }
    }

    /// Writes device configuration; what lies beyond its end is ignored.
    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let Some((offset, len)) = self.config_part(offset, data.len())
            && let Some(part) = data.get(..len)
        {
            self.device.write_config(offset, part);
        }
    }

    fn config_part(&self, offset: u64, len: usize) -> Option<(u32, usize)> {
        let offset = u32::try_from(offset).ok()?;
        let left = usize::try_from(self.info.config_len.checked_sub(offset)?).ok()?;
        (left > 0).then_some((offset, len.min(left)))
    }

    fn selected(&self) -> Option<&Slot> {
        self.slots.get(usize::from(self.queue_select))
    }

    /// The selected queue, while it may be set up.
    fn selected_mut(&mut self) -> Option<&mut Slot> {
        let frozen = self.has(DRIVER_OK);
        let slot = self.slots.get_mut(usize::from(self.queue_select))?;
        (!frozen && !slot.enabled).then_some(slot)
    }

    /// The selected queue's size, 0 where there is no such queue.
    pub fn queue_size(&self) -> u16 {
        self.selected().map_or(0, |slot| slot.size)
    }

    /// Sets the selected queue's size: a power of two up to the device's.
    pub fn set_queue_size(&mut self, size: u16) {
        if let Some(slot) = self.selected_mut()
            && size.is_power_of_two()
            && size <= slot.max_size
        {
            slot.size = size;
        }
    }

    /// The address of an area of the selected queue.
    pub fn queue_address(&self, area: Area) -> u64 {
        self.selected().map_or(0, |slot| match area {
            Area::Descriptors => slot.descriptors,
            Area::Driver => slot.driver,
            Area::Device => slot.device,
        })
    }

    /// Sets half an address of the selected queue.
    pub fn set_queue_address(&mut self, area: Area, high: bool, value: u32) {
        if let Some(slot) = self.selected_mut() {
            let address = match area {
                Area::Descriptors => &mut slot.descriptors,
                Area::Driver => &mut slot.driver,
                Area::Device => &mut slot.device,
            };
            set_half(address, high, value);
        }
    }

    /// True where the selected queue is enabled.
    pub fn queue_enabled(&self) -> bool {
        self.selected().is_some_and(|slot| slot.enabled)
    }

    /// Enables the selected queue, which freezes its size and addresses. A queue that cannot work stays disabled, and
    /// the device needs a reset.
    pub fn enable_queue(&mut self) {
        let (index, features) = (self.queue_select, self.driver_features);
        let memory = self.memory.clone();
        let Some(slot) = self.selected_mut() else {
            return;
        };
        let enabled = check_rings(slot.state(features), &memory)
            .and_then(|()| kick_event().map_err(|e| format!("no event for kicks: {e}")));
        match enabled {
            Ok(kick) => {
                slot.kick = Some(kick);
                slot.enabled = true;
            }
            Err(reason) => self.shared.broken(&format!("queue {index}: {reason}")),
        }
    }

    /// The events by which the driver kicks the queues that are enabled, with their numbers.
    pub fn kicks(&self) -> impl Iterator<Item = (u16, &EventFd)> {
        let slots = (0..).zip(&self.slots);
        slots.filter_map(|(index, slot)| Some((index, slot.kick.as_ref()?)))
    }

    /// Tells a running queue that its driver made buffers available.
    pub fn kick(&self, index: u16) {
        let slot = self.slots.get(usize::from(index));
        if let Some(slot) = slot.filter(|slot| slot.running)
            && let Some(kick) = &slot.kick
            && let Err(e) = kick.write(1)
        {
            tracing::warn!(device = self.shared.name, "kicking queue {index}: {e}");
        }
    }

    fn start_queues(&mut self) {
        if self.suspended || self.shared.needs_reset.load(Ordering::Acquire) {
            return;
        }
        for index in 0..self.queue_count() {
            if let Err(reason) = self.start_queue(index) {
                self.shared.broken(&format!("queue {index}: {reason}"));
                return;
            }
            // Buffers may have been made available before, or the kick have gone to nobody.
            self.kick(index);
        }
    }

    fn start_queue(&mut self, index: u16) -> std::result::Result<(), String> {
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return Ok(());
        };
        let (true, false, Some(kick)) = (slot.enabled, slot.running, &slot.kick) else {
            return Ok(());
        };
        let events = Arc::new(Events { index, shared: Arc::clone(&self.shared) });
        let queue = RunningQueue::new(
            slot.state(self.driver_features),
            self.memory.clone(),
            kick.try_clone().map_err(|e| e.to_string())?,
            events,
            self.driver_features,
        )
        .map_err(|e| e.to_string())?;
        self.device.start_queue(index, queue).map_err(|e| e.to_string())?;
        slot.running = true;
        Ok(())
    }

    fn stop_queues(&mut self) {
        for (index, slot) in (0..).zip(&mut self.slots) {
            if !std::mem::take(&mut slot.running) {
                continue;
            }
            match self.device.stop_queue(index) {
                Ok(Some(state)) => {
                    slot.next_avail = state.next_avail;
                    slot.next_used = state.next_used;
                }
                Ok(None) => {}
                Err(e) => self.shared.broken(&format!("queue {index} does not stop: {e}")),
            }
        }
    }

    fn reset(&mut self) {
        self.stop_queues();
        self.device.reset();
        self.status = 0;
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        for slot in &mut self.slots {
            *slot = Slot::new(slot.max_size);
        }
        self.shared.needs_reset.store(false, Ordering::Release);
    }

    /// Stops all queues, drained, and keeps where they stand.
    pub fn suspend(&mut self) {
        self.suspended = true;
        self.stop_queues();
    }

    /// Starts the queues that the driver wants to run.
    pub fn resume(&mut self) {
        self.suspended = false;
        if self.is_live() {
            self.start_queues();
        }
    }

    /// After [`Core::restore`] and [`Core::resume`]: tells the device, and interrupts the driver for each queue,
    /// since an interrupt under way when the state was saved may be in no part of it.
    pub fn resumed(&mut self, why: Resumed) {
        self.device.resumed(why);
        for (index, _) in (0..).zip(&self.slots).filter(|(_, slot)| slot.running) {
            self.shared.signals.queue(index);
        }
    }

    /// Saves negotiation, queues and the device itself, while suspended.
    ///
    /// # Errors
    /// [`Error::State`] while queues run, and those of [`StateSink`].
    pub fn save(&self, into: &mut dyn StateSink) -> Result<()> {
        if !self.suspended {
            return Err(Error::State("the device is not suspended".into()));
        }
        let queues = self.slots.iter().map(|slot| SavedQueue {
            size: slot.size,
            enabled: slot.enabled,
            descriptors: slot.descriptors,
            driver: slot.driver,
            device: slot.device,
            next_avail: slot.next_avail,
            next_used: slot.next_used,
        });
        let saved = SavedCore {
            status: self.status(),
            driver_features: self.driver_features,
            device_feature_select: self.device_feature_select,
            driver_feature_select: self.driver_feature_select,
            queue_select: self.queue_select,
            generation: self.config_generation(),
            queues: queues.collect(),
        };
        saved::save(into, SECTION, SECTION_VERSION, &saved)?;
        self.device.save(into)
    }

    /// Puts a saved state into this device, which no driver has touched. It stays suspended.
    ///
    /// # Errors
    /// [`Error::State`] where a section is missing, damaged, or of another kind of device.
    pub fn restore(&mut self, from: &mut dyn StateSource) -> Result<()> {
        let saved: SavedCore = saved::restore(from, SECTION, SECTION_VERSION)?;
        if saved.queues.len() != self.slots.len() {
            let (saved, own) = (saved.queues.len(), self.slots.len());
            return Err(Error::State(format!("{saved} queues, the device has {own}")));
        }
        self.suspended = true;
        self.driver_features = saved.driver_features;
        if saved.status & FEATURES_OK != 0 && !self.features_suit() {
            let features = saved.driver_features;
            return Err(Error::State(format!("features {features:#x} include some that the device does not offer")));
        }
        self.status = saved.status & DRIVER_BITS;
        self.device_feature_select = saved.device_feature_select;
        self.driver_feature_select = saved.driver_feature_select;
        self.queue_select = saved.queue_select;
        self.shared.generation.store(saved.generation, Ordering::Release);
        let needs_reset = saved.status & NEEDS_RESET != 0;
        self.shared.needs_reset.store(needs_reset, Ordering::Release);
        for (index, queue) in saved.queues.into_iter().enumerate() {
            self.restore_queue(index, queue)?;
        }
        self.device.restore(from)
    }

    fn restore_queue(&mut self, index: usize, saved: SavedQueue) -> Result<()> {
        let Some(slot) = self.slots.get_mut(index) else {
            return Ok(());
        };
        *slot = Slot {
            max_size: slot.max_size,
            size: saved.size,
            enabled: saved.enabled,
            descriptors: saved.descriptors,
            driver: saved.driver,
            device: saved.device,
            next_avail: saved.next_avail,
            next_used: saved.next_used,
            kick: None,
            running: false,
        };
        if !saved.size.is_power_of_two() || saved.size > slot.max_size {
            return Err(Error::State(format!("queue {index} has size {}", saved.size)));
        }
        if saved.enabled {
            let state = slot.state(self.driver_features);
            check_rings(state, &self.memory).map_err(|reason| Error::State(format!("queue {index}: {reason}")))?;
            slot.kick = Some(kick_event().map_err(|source| Error::Host { what: "an event for kicks", source })?);
        }
        Ok(())
    }
}

fn halves(value: u64) -> [u32; 2] {
    // Each half is of 32 bits.
    let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    [half(value), half(value >> 32)]
}

fn set_half(whole: &mut u64, high: bool, value: u32) {
    *whole = match high {
        true => *whole & 0xffff_ffff | u64::from(value) << 32,
        false => *whole & !0xffff_ffff | u64::from(value),
    };
}
