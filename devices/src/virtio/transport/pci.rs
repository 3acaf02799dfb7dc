//! Virtio over PCI (virtio 1.2 §4.1), without the legacy interface.
//!
//! One 64-bit base address register holds all structures, each in a page of its own:
//!
//! ```text
//!   0x0000 common configuration    0x3000 notification, 4 bytes per queue
//!   0x1000 ISR status              0x4000 MSI-X table
//!   0x2000 device configuration    0x7000 MSI-X pending bits
//! ```

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use super::super::saved;
use super::super::{Error, Result, Resumed, StateSink, StateSource, VirtioDevice};
use super::core::Core;
use super::signals::Signals;
use super::slot::Area;
use crate::pci::{
    BarKind, Bars, ConfigSpace, ConfigState, Identity, MsixCapability, MsixState, MsixVectors, PciFunction,
};
use crate::seam::{Doorbells, Interrupts};

/// The base address register with all structures.
const BAR: u8 = 0;
const BAR_LEN: u64 = 0x8000;
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PENDING: u32 = 0x7000;
/// Each structure's room; the MSI-X table has three of these.
const PAGE: u32 = 0x1000;

/// Length of the common configuration structure, up to queue_device.
const COMMON_LEN: u32 = 0x38;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// As many queues as fit the MSI-X table, with a vector for each and one for the configuration.
const MAX_QUEUES: usize = 767;

/// No vector: the driver polls.
const NO_VECTOR: u16 = 0xffff;

const VENDOR_VIRTIO: u16 = 0x1af4;
const CAPABILITY_VENDOR: u8 = 0x09;
/// Types of virtio structures (virtio 1.2 §4.1.4).
const CFG_COMMON: u8 = 1;
const CFG_NOTIFY: u8 = 2;
const CFG_ISR: u8 = 3;
const CFG_DEVICE: u8 = 4;
const CFG_PCI: u8 = 5;

/// ISR status bits (virtio 1.2 §4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

const SECTION: &str = "virtio-pci";
const SECTION_VERSION: u32 = 1;

/// The driver's choice of vectors, and the interrupts that go by it.
struct PciSignals {
    msix: Arc<MsixVectors>,
    config_vector: AtomicU16,
    queue_vectors: Box<[AtomicU16]>,
    isr: AtomicU8,
}

impl PciSignals {
    fn signal(&self, vector: &AtomicU16, isr: u8) {
        match vector.load(Ordering::Acquire) {
            NO_VECTOR => drop(self.isr.fetch_or(isr, Ordering::AcqRel)),
            vector => self.msix.signal(vector),
        }
    }

    /// Sets a vector. One that does not exist reads back as none.
    fn set_vector(&self, slot: Option<&AtomicU16>, vector: u16) {
        let exists = vector < self.msix.count();
        if let Some(slot) = slot {
            slot.store(if exists { vector } else { NO_VECTOR }, Ordering::Release);
        }
    }

    fn queue_vector(&self, index: u16) -> Option<&AtomicU16> {
        self.queue_vectors.get(usize::from(index))
    }

    fn reset(&self) {
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
        self.isr.store(0, Ordering::Release);
        self.msix.clear_pending();
    }
}

impl Signals for PciSignals {
    fn queue(&self, index: u16) {
        if let Some(vector) = self.queue_vector(index) {
            self.signal(vector, ISR_QUEUE);
        }
    }

    fn config(&self) {
        self.signal(&self.config_vector, ISR_CONFIG);
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedPci {
    config: ConfigState,
    msix: MsixState,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
}

struct Inner {
    config: ConfigSpace,
    msix: MsixCapability,
    /// Offset of the capability for access through configuration space.
    window: u16,
    core: Core,
    /// Where the base address register answers.
    mapped: Option<u64>,
    /// Told when a driver begins to run the device.
    on_driver: Option<Box<dyn Fn() + Send>>,
    /// The address that `doorbells` were made for.
    rung_at: Option<u64>,
    doorbells: Vec<Box<dyn Send + Sync>>,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    msix: Arc<MsixVectors>,
    signals: Arc<PciSignals>,
    doorbells: Arc<dyn Doorbells>,
    /// The driver's side. Devices' threads do not take this lock.
    inner: Mutex<Inner>,
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci").field("core", &self.lock().core).finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts a device behind PCI registers. `name` stands in messages.
    ///
    /// # Errors
    /// [`Error::State`] where the device has more queues or a longer configuration than fit.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
        interrupts: Arc<dyn Interrupts>,
        doorbells: Arc<dyn Doorbells>,
    ) -> Result<Self> {
        let info = device.info();
        let queues = info.queue_sizes.len();
        if queues > MAX_QUEUES || info.config_len > PAGE {
            return Err(Error::State(format!(
                "{name}: {queues} queues and {} bytes of configuration do not fit a PCI function",
                info.config_len
            )));
        }
        let vectors = u16::try_from(queues + 1).unwrap_or(u16::MAX);
        let msix = Arc::new(MsixVectors::new(interrupts, vectors));
        let signals = Arc::new(PciSignals {
            msix: Arc::clone(&msix),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            isr: AtomicU8::new(0),
        });
        let (config, capability, window) = config_space(info.device_type, info.config_len, vectors)
            .ok_or_else(|| Error::State(format!("{name}: capabilities do not fit")))?;
        let core = Core::new(name, device, memory, Arc::clone(&signals) as Arc<dyn Signals>)?;
        Ok(Self {
            msix,
            signals,
            doorbells,
            inner: Mutex::new(Inner {
                config,
                msix: capability,
                window,
                core,
                mapped: None,
                on_driver: None,
                rung_at: None,
                doorbells: Vec::new(),
            }),
        })
    }

    /// How often the driver broke a rule, or the device could not go on.
    pub fn faults(&self) -> u64 {
        self.fault_counter().load(Ordering::Relaxed)
    }

    /// What [`VirtioPci::faults`] reads.
    pub fn fault_counter(&self) -> Arc<AtomicU64> {
        self.lock().core.faults()
    }

    /// Calls `tell` with the reason each time that the device is marked as one that needs a reset: see [`Core::on_broken`].
    pub fn on_broken(&self, tell: impl Fn(&str) + Send + Sync + 'static) {
        self.lock().core.on_broken(tell);
    }

    /// Tells drivers that the device reaches only shared memory: see [`Core::require_access_platform`].
    pub fn require_access_platform(&self) {
        self.lock().core.require_access_platform();
    }

    /// Whether a driver runs the device: from DRIVER_OK until a reset.
    pub fn driver_is_ok(&self) -> bool {
        self.lock().core.is_live()
    }

    /// Calls `tell` each time that a driver begins to run the device (DRIVER_OK), on the vCPU's thread and with the
    /// function locked: it must not wait, nor use the function.
    pub fn on_driver(&self, tell: impl Fn() + Send + 'static) {
        self.lock().on_driver = Some(Box::new(tell));
    }

    /// Whether the guest lets the function answer to memory accesses, or a driver runs it.
    pub fn is_in_use(&self) -> bool {
        let inner = self.lock();
        inner.config.memory_enabled() || inner.core.is_live()
    }

    /// What lies at an offset into the base address register, for messages.
    pub fn structure_at(offset: u64) -> &'static str {
        match split(offset).0 {
            COMMON => "common configuration",
            ISR => "ISR status",
            DEVICE => "device configuration",
            NOTIFY => "notification",
            MSIX_PENDING => "MSI-X pending bits",
            _ => "MSI-X table",
        }
    }

    /// Changes what the driver reads as the device's configuration, with no access of the driver's in between, and tells
    /// the driver (virtio 1.2 §2.5).
    pub fn change_config(&self, change: impl FnOnce()) {
        let inner = self.lock();
        change();
        inner.core.config_changed();
    }

    /// Stops all queues, drained, and keeps where they stand.
    pub fn suspend(&self) {
        self.lock().core.suspend();
    }

    /// Starts the queues that the driver wants to run.
    pub fn resume(&self) {
        let mut inner = self.lock();
        inner.core.resume();
        self.follow_doorbells(&mut inner);
    }

    /// After [`VirtioPci::restore`] and [`VirtioPci::resume`]: tells the device and its driver.
    pub fn resumed(&self, why: Resumed) {
        self.lock().core.resumed(why);
    }

    /// Saves function, negotiation, queues and device, while suspended.
    ///
    /// # Errors
    /// Those of [`Core::save`].
    pub fn save(&self, into: &mut dyn StateSink) -> Result<()> {
        let inner = self.lock();
        let vectors = self.signals.queue_vectors.iter();
        let saved = SavedPci {
            config: inner.config.save(),
            msix: self.msix.save(),
            config_vector: self.signals.config_vector.load(Ordering::Acquire),
            queue_vectors: vectors.map(|vector| vector.load(Ordering::Acquire)).collect(),
            isr: self.signals.isr.load(Ordering::Acquire),
        };
        saved::save(into, SECTION, SECTION_VERSION, &saved)?;
        inner.core.save(into)
    }

    /// Puts a saved state into this device, which no driver has touched. It stays suspended. The segment is to look
    /// at base address registers again ([`crate::pci::PciSegment::refresh`]).
    ///
    /// # Errors
    /// [`Error::State`] where a section is missing, damaged, or of another kind of device.
    pub fn restore(&self, from: &mut dyn StateSource) -> Result<()> {
        let saved: SavedPci = saved::restore(from, SECTION, SECTION_VERSION)?;
        let mut inner = self.lock();
        inner.config.restore(&saved.config);
        self.msix.restore(&saved.msix).map_err(Error::State)?;
        self.msix.set_control(inner.msix.control(&inner.config));
        self.signals.set_vector(Some(&self.signals.config_vector), saved.config_vector);
        for (slot, vector) in self.signals.queue_vectors.iter().zip(saved.queue_vectors) {
            self.signals.set_vector(Some(slot), vector);
        }
        self.signals.isr.store(saved.isr, Ordering::Release);
        inner.core.restore(from)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes kicks ring where the queues' notification addresses now are, while the driver may kick.
    fn follow_doorbells(&self, inner: &mut Inner) {
        let wanted = inner.mapped.filter(|_| inner.core.is_live());
        if inner.rung_at == wanted {
            return;
        }
        inner.doorbells.clear();
        inner.rung_at = wanted;
        let Some(base) = wanted else { return };
        for (index, kick) in inner.core.kicks() {
            let at = base + u64::from(NOTIFY) + u64::from(index) * u64::from(NOTIFY_MULTIPLIER);
            match self.doorbells.ring_on_write(at, kick) {
                Ok(doorbell) => inner.doorbells.push(doorbell),
                // Kicks then come as writes to the notification structure.
                Err(e) => tracing::warn!("queue {index} has no doorbell: {e}"),
            }
        }
    }

    fn read_structure(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        let (structure, within) = split(offset);
        match structure {
            COMMON => self.read_common(inner, within, data),
            ISR => {
                data.fill(0);
                if let (0, Some(byte)) = (within, data.first_mut()) {
                    *byte = self.signals.isr.swap(0, Ordering::AcqRel);
                }
            }
            DEVICE => inner.core.read_config(within, data),
            NOTIFY => data.fill(0),
            MSIX_PENDING => self.msix.read_pending(within, data),
            _ => self.msix.read_table(offset - u64::from(MSIX_TABLE), data),
        }
    }

    fn write_structure(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let (structure, within) = split(offset);
        match structure {
            COMMON => {
                let before = inner.core.is_live();
                self.write_common(inner, within, data);
                self.follow_doorbells(inner);
                if let (false, true, Some(tell)) = (before, inner.core.is_live(), &inner.on_driver) {
                    tell();
                }
            }
            DEVICE => inner.core.write_config(within, data),
            NOTIFY => {
                if let Ok(index) = u16::try_from(within / u64::from(NOTIFY_MULTIPLIER)) {
                    inner.core.kick(index);
                }
            }
            ISR | MSIX_PENDING => {}
            _ => self.msix.write_table(offset - u64::from(MSIX_TABLE), data),
        }
    }

    /// Reads any part of the common configuration (virtio 1.2 §4.1.4.3).
    fn read_common(&self, inner: &Inner, offset: u64, data: &mut [u8]) {
        let core = &inner.core;
        let queue = core.queue_select;
        let load = |vector: &AtomicU16| vector.load(Ordering::Acquire);
        let vector = self.signals.queue_vector(queue).map_or(NO_VECTOR, load);
        let exists = queue < core.queue_count();
        let mut image = Vec::with_capacity(64);
        image.extend(core.device_feature_select.to_le_bytes());
        image.extend(core.device_features().to_le_bytes());
        image.extend(core.driver_feature_select.to_le_bytes());
        image.extend(core.driver_features().to_le_bytes());
        image.extend(load(&self.signals.config_vector).to_le_bytes());
        image.extend(core.queue_count().to_le_bytes());
        image.extend([core.status(), core.config_generation()]);
        image.extend(queue.to_le_bytes());
        image.extend(core.queue_size().to_le_bytes());
        image.extend(vector.to_le_bytes());
        image.extend(u16::from(core.queue_enabled()).to_le_bytes());
        image.extend(if exists { queue } else { 0 }.to_le_bytes());
        for area in [Area::Descriptors, Area::Driver, Area::Device] {
            image.extend(core.queue_address(area).to_le_bytes());
        }
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, byte) in (at..).zip(data) {
            *byte = image.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes one register of the common configuration, whole; a 64-bit one in halves or whole. Any other write is
    /// ignored.
    fn write_common(&self, inner: &mut Inner, offset: u64, data: &[u8]) {
        let core = &mut inner.core;
        let mut bytes = [0; 8];
        let Some(part) = bytes.get_mut(..data.len()) else {
            return;
        };
        part.copy_from_slice(data);
        let [b0, b1, b2, b3, b4, b5, b6, b7] = bytes;
        let (short, low) = (u16::from_le_bytes([b0, b1]), u32::from_le_bytes([b0, b1, b2, b3]));
        let high = u32::from_le_bytes([b4, b5, b6, b7]);
        match (offset, data.len()) {
            (0x00, 4) => core.device_feature_select = low,
            (0x08, 4) => core.driver_feature_select = low,
            (0x0c, 4) => core.set_driver_features(low),
            (0x10, 2) => self.signals.set_vector(Some(&self.signals.config_vector), short),
            (0x14, 1) => {
                core.set_status(b0);
                if b0 == 0 {
                    self.signals.reset();
                }
            }
            (0x16, 2) => core.queue_select = short,
            (0x18, 2) => core.set_queue_size(short),
            (0x1a, 2) => {
                let vector = self.signals.queue_vector(core.queue_select);
                self.signals.set_vector(vector, short);
            }
            (0x1c, 2) if short == 1 => core.enable_queue(),
            (0x20..0x38, 4 | 8) if offset.is_multiple_of(data.len() as u64) => {
                let area = match offset {
                    0x20..0x28 => Area::Descriptors,
                    0x28..0x30 => Area::Driver,
                    _ => Area::Device,
                };
                core.set_queue_address(area, offset % 8 == 4, low);
                if data.len() == 8 {
                    core.set_queue_address(area, true, high);
                }
            }
            _ => {}
        }
    }

    /// Offset of the window's data in configuration space, where `offset` and `len` touch it.
    fn touches_window(inner: &Inner, offset: u16, len: usize) -> bool {
        let (start, data) = (usize::from(offset), usize::from(inner.window) + 16);
        start < data + 4 && data < start + len
    }

    /// The access that the driver asks for through configuration space (virtio 1.2 §4.1.4.9): offset and length.
    fn window(inner: &Inner) -> Option<(u64, usize)> {
        let at = inner.window;
        let bar = inner.config.dword(at + 4) & 0xff;
        let offset = inner.config.dword(at + 8);
        let len = inner.config.dword(at + 12);
        let fits = u64::from(offset) + u64::from(len) <= BAR_LEN;
        let aligned = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        (bar == u32::from(BAR) && aligned && fits).then_some((u64::from(offset), usize::try_from(len).ok()?))
    }
}

impl PciFunction for VirtioPci {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut inner = self.lock();
        if Self::touches_window(&inner, offset, data.len())
            && let Some((at, len)) = Self::window(&inner)
        {
            let mut bytes = [0; 4];
            if let Some(part) = bytes.get_mut(..len) {
                self.read_structure(&inner, at, part);
            }
            let register = usize::from(inner.window) + 16;
            inner.config.set(register, &bytes);
        }
        inner.config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.config.write(offset, data);
        self.msix.set_control(inner.msix.control(&inner.config));
        if Self::touches_window(&inner, offset, data.len())
            && let Some((at, len)) = Self::window(&inner)
        {
            let bytes = inner.config.dword(inner.window + 16).to_le_bytes();
            self.write_structure(&mut inner, at, bytes.get(..len).unwrap_or_default());
        }
    }

    fn bars(&self) -> Bars {
        self.lock().config.bars()
    }

    fn place_bar(&self, index: usize, address: u64) {
        self.lock().config.place_bar(index, address);
    }

    fn memory_enabled(&self) -> bool {
        self.lock().config.memory_enabled()
    }

    fn bar_read(&self, _index: usize, offset: u64, data: &mut [u8]) {
        self.read_structure(&self.lock(), offset, data);
    }

    fn bar_write(&self, _index: usize, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.lock(), offset, data);
    }

    fn bar_mapped(&self, _index: usize, at: Option<u64>) {
        let mut inner = self.lock();
        inner.mapped = at;
        self.follow_doorbells(&mut inner);
    }
}

/// The structure that an offset into the base address register lies in, and the offset within it.
fn split(offset: u64) -> (u32, u64) {
    let within = offset % u64::from(PAGE);
    (u32::try_from(offset - within).unwrap_or(MSIX_TABLE), within)
}

fn config_space(device_type: u16, config_len: u32, vectors: u16) -> Option<(ConfigSpace, MsixCapability, u16)> {
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR_VIRTIO,
        device: 0x1040_u16.checked_add(device_type)?,
        revision: 1,
        class: class(device_type),
        subsystem_vendor: VENDOR_VIRTIO,
        subsystem: 0x1100,
    });
    config.add_bar(usize::from(BAR), BarKind::Memory64, BAR_LEN);
    config.add_pcie_endpoint()?;
    let msix = MsixCapability::add(&mut config, vectors, BAR, MSIX_TABLE, MSIX_PENDING)?;
    let structures = [
        (CFG_COMMON, COMMON, COMMON_LEN, None),
        (CFG_ISR, ISR, 1, None),
        (CFG_DEVICE, DEVICE, config_len.next_multiple_of(4), None),
        (CFG_NOTIFY, NOTIFY, PAGE, Some(NOTIFY_MULTIPLIER)),
    ];
    for (kind, offset, len, extra) in structures {
        // A device without configuration has no such structure.
        if len > 0 {
            config.add_capability(CAPABILITY_VENDOR, &capability(kind, offset, len, extra), &[])?;
        }
    }
    let mut writable = [0; 18];
    // The register number, and offset, length and data.
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let window = config.add_capability(CAPABILITY_VENDOR, &capability(CFG_PCI, 0, 0, Some(0)), &writable)?;
    Some((config, msix, window))
}

/// The body of a `virtio_pci_cap` (virtio 1.2 §4.1.4), with the field that follows it in some.
fn capability(kind: u8, offset: u32, len: u32, extra: Option<u32>) -> Vec<u8> {
    let total = if extra.is_some() { 20 } else { 16 };
    let mut body = vec![total, kind, BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra.into_iter().flat_map(u32::to_le_bytes));
    body
}

/// The class code by which a guest's tools list the device; drivers go by the device number.
fn class(device_type: u16) -> u32 {
    match device_type {
        1 => 0x02_00_00,
        2 | 8 => 0x01_00_00,
        3 | 19 => 0x07_80_00,
        24 => 0x05_80_00,
        26 => 0x01_80_00,
        _ => 0xff_00_00,
    }
}
