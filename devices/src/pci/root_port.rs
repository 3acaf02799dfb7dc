//! A PCI Express root port with a slot that devices are plugged into and taken out of while the guest runs
//! (PCIe 5.0 §6.7, native hot-plug).
//!
//! The slot has an attention button, a power indicator and presence detection, and nothing that takes time: commands
//! complete with the write (§6.7.3.2), there is no power controller, and the link is up when a device is there. The port
//! interrupts by MSI. Behind it lies one bus with one device, function 0.
//!
//! How a device leaves: the button is pressed, the indicator blinks for five seconds in which a second press cancels, the
//! guest lets go of the device, and the indicator goes off (§6.7.1.1.2).

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestRegionMmap;

use super::config::{CAPABILITY_MSI, CAPABILITY_PCIE};
use super::{Bars, ConfigSpace, Identity, PciFunction};
use crate::seam::{Interrupt, Interrupts, MsiMessage};

/// Registers of the header.
const HEADER_TYPE: usize = 0x0e;
const SECONDARY_BUS: u16 = 0x19;
const BUS_NUMBERS: usize = 0x18;
const MEMORY_WINDOW: u16 = 0x20;
const PREFETCHABLE_WINDOW: u16 = 0x24;

/// Header type: a bridge, and one of several functions of its device.
const BRIDGE: u8 = 1;
const MULTIFUNCTION: u8 = 1 << 7;

/// Memory windows begin and end at multiples of this, in bytes.
const WINDOW_GRANULE: u64 = 1 << 20;

const MSI_LEN: u16 = 14;
const MSI_ENABLE: u16 = 1;

/// Registers of the PCI Express capability (PCIe 5.0 §7.5.3), from its start.
const LINK_CONTROL: u16 = 0x10;
const LINK_STATUS: u16 = 0x12;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;
/// Length of the capability without its id and link.
const PCIE_LEN: usize = 0x3a;

/// Link control: the link is switched off.
const LINK_DISABLE: u16 = 1 << 4;
/// Link status: 2.5 GT/s, one lane, and the data link layer is active.
const LINK_UP: u16 = 1 | 1 << 4 | 1 << 13;

/// Events of a slot, in its status register: button pressed, presence changed, data link layer changed.
const BUTTON: u16 = 1 << 0;
const PRESENCE: u16 = 1 << 3;
const LINK_CHANGED: u16 = 1 << 8;
const EVENTS: u16 = BUTTON | PRESENCE | LINK_CHANGED;
/// Slot status: something is in the slot.
const OCCUPIED: u16 = 1 << 6;

/// Slot control: which events interrupt.
const BUTTON_ENABLE: u16 = 1 << 0;
const PRESENCE_ENABLE: u16 = 1 << 3;
const HOT_PLUG_INTERRUPT: u16 = 1 << 5;
const LINK_ENABLE: u16 = 1 << 12;
/// Slot control: the power indicator.
const INDICATOR_SHIFT: u16 = 8;
const INDICATOR: u16 = 3 << INDICATOR_SHIFT;

/// What the slot can do (§7.5.3.9): attention button, power indicator, surprise removal, hot-plug, no command completed.
const SLOT_CAPABILITIES: u32 = 1 << 0 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 18;
/// Where the slot's number stands in there.
const SLOT_NUMBER_SHIFT: u32 = 19;

/// What a slot's power indicator shows: the guest's word on what it does with the device (PCIe 5.0 §6.7.1.1.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Indicator {
    /// The device is in use.
    On,
    /// The guest is about to begin or to end its use.
    Blinking,
    /// The device may be taken out.
    Off,
}

impl Indicator {
    /// From the two bits of slot control. The reserved value changes nothing.
    fn new(control: u16) -> Option<Self> {
        match (control & INDICATOR) >> INDICATOR_SHIFT {
            1 => Some(Self::On),
            2 => Some(Self::Blinking),
            3 => Some(Self::Off),
            _ => None,
        }
    }

    fn bits(self) -> u16 {
        let value = match self {
            Self::On => 1,
            Self::Blinking => 2,
            Self::Off => 3,
        };
        value << INDICATOR_SHIFT
    }
}

/// Hears what guests do to slots. It is called on a vCPU's thread and must not wait.
pub trait SlotObserver: Send + Sync {
    /// The power indicator of port `port` shows something else.
    fn indicator(&self, port: u8, shows: Indicator);
}

struct Inner {
    config: ConfigSpace,
    /// Where the PCI Express capability stands.
    pcie: u16,
    /// Where the MSI capability stands.
    msi: u16,
    /// There once the guest has enabled the message.
    interrupt: Option<Box<dyn Interrupt>>,
    /// The condition for an interrupt holds: another is sent when it does not, and then does again (§6.7.3.4).
    asserted: bool,
}

/// A root port.
pub struct RootPort {
    number: u8,
    interrupts: Arc<dyn Interrupts>,
    observer: Arc<dyn SlotObserver>,
    inner: Mutex<Inner>,
}

impl fmt::Debug for RootPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RootPort").field("number", &self.number).finish_non_exhaustive()
    }
}

impl RootPort {
    /// Port `number`, whose slot is empty. `None` where its capabilities do not fit, which cannot be.
    pub fn new(number: u8, interrupts: Arc<dyn Interrupts>, observer: Arc<dyn SlotObserver>) -> Option<Self> {
        let mut config = ConfigSpace::bridge(&Identity {
            // Red Hat's number for a virtual PCIe root port.
            vendor: 0x1b36,
            device: 0x000c,
            revision: 0,
            class: 0x06_04_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        let pcie = add_pcie(&mut config, number)?;
        let msi = add_msi(&mut config)?;
        let inner = Inner { config, pcie, msi, interrupt: None, asserted: false };
        Some(Self { number, interrupts, observer, inner: Mutex::new(inner) })
    }

    /// Gives the port its bus and its memory windows, multiples of 1 MiB, as a firmware would. An empty 64-bit window is
    /// none.
    pub fn assign(&self, bus: u8, low: &Range<u64>, high: &Range<u64>) {
        let mut inner = self.lock();
        inner.config.set(BUS_NUMBERS, &[0, bus, bus]);
        // Bits 31 to 20 of a 32-bit window's first and last address.
        let register = |address: u64| u16::try_from(address >> 16 & 0xfff0).unwrap_or(0).to_le_bytes();
        let bytes = [register(low.start), register(low.end.saturating_sub(1))].concat();
        inner.config.write(MEMORY_WINDOW, &bytes);
        let (first, last) = if high.is_empty() { (WINDOW_GRANULE, 0) } else { (high.start, high.end - 1) };
        inner.config.write(PREFETCHABLE_WINDOW, &[register(first), register(last)].concat());
        let upper = |address: u64| u32::try_from(address >> 32).unwrap_or(0).to_le_bytes();
        inner.config.write(PREFETCHABLE_WINDOW + 4, &[upper(first), upper(last)].concat());
    }

    /// Says in the header that the port's device has more functions (PCI 3.0 §6.2.1).
    pub fn set_multifunction(&self) {
        self.lock().config.set(HEADER_TYPE, &[BRIDGE | MULTIFUNCTION]);
    }

    /// Shows the port's configuration space in memory: see [`ConfigSpace::show`]. Reading it does nothing else.
    pub fn show(&self, pages: Arc<GuestRegionMmap>, at: u64) {
        self.lock().config.show(pages, at);
    }

    /// Puts a device into the slot, and tells the guest; or, where the guest has not run yet, it has been there always.
    pub fn insert(&self, cold: bool) {
        let mut inner = self.lock();
        inner.set_occupied(true);
        if cold {
            let (status, control) = (inner.slot_status() & !EVENTS, inner.slot_control() & !INDICATOR);
            inner.set(SLOT_STATUS, status);
            inner.set(SLOT_CONTROL, control | Indicator::On.bits());
        }
        inner.signal();
    }

    /// Takes the device out of the slot, and tells the guest.
    pub fn take_out(&self) {
        let mut inner = self.lock();
        inner.set_occupied(false);
        inner.signal();
    }

    /// Presses the attention button.
    pub fn press(&self) {
        let mut inner = self.lock();
        let status = inner.slot_status() | BUTTON;
        inner.set(SLOT_STATUS, status);
        inner.signal();
    }

    /// What the power indicator shows.
    pub fn indicator(&self) -> Indicator {
        self.lock().indicator()
    }

    /// The bus that the port leads to, while its link is up.
    pub fn bus(&self) -> Option<u8> {
        let inner = self.lock();
        let mut bus = [0];
        inner.config.read(SECONDARY_BUS, &mut bus);
        inner.link_is_up().then_some(bus[0])
    }

    /// Whether accesses to these addresses reach the device behind the port.
    pub fn forwards(&self, range: &Range<u64>) -> bool {
        let inner = self.lock();
        let within = |window: Range<u64>| window.start <= range.start && range.end <= window.end;
        inner.config.memory_enabled() && inner.link_is_up() && inner.windows().into_iter().any(within)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.config.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    /// Sets a register of the PCI Express capability.
    fn set(&mut self, register: u16, value: u16) {
        self.config.set(usize::from(self.pcie + register), &value.to_le_bytes());
    }

    fn slot_control(&self) -> u16 {
        self.word(self.pcie + SLOT_CONTROL)
    }

    fn slot_status(&self) -> u16 {
        self.word(self.pcie + SLOT_STATUS)
    }

    fn indicator(&self) -> Indicator {
        Indicator::new(self.slot_control()).unwrap_or(Indicator::Off)
    }

    fn link_is_up(&self) -> bool {
        self.word(self.pcie + LINK_STATUS) & LINK_UP == LINK_UP
    }

    fn set_occupied(&mut self, occupied: bool) {
        let before = self.slot_status();
        let bit = if occupied { OCCUPIED } else { 0 };
        let changed = if before & OCCUPIED == bit { 0 } else { PRESENCE };
        self.set(SLOT_STATUS, before & !OCCUPIED | bit | changed);
        self.train();
    }

    /// The link is up while there is a device and the guest has not switched it off.
    fn train(&mut self) {
        let disabled = self.word(self.pcie + LINK_CONTROL) & LINK_DISABLE != 0;
        let up = self.slot_status() & OCCUPIED != 0 && !disabled;
        if up != self.link_is_up() {
            self.set(LINK_STATUS, if up { LINK_UP } else { 0 });
            let status = self.slot_status() | LINK_CHANGED;
            self.set(SLOT_STATUS, status);
        }
    }

    /// The 32-bit and the 64-bit prefetchable window, as they stand. One that ends before it begins has no addresses.
    fn windows(&self) -> [Range<u64>; 2] {
        let address = |offset| u64::from(self.word(offset) & 0xfff0) << 16;
        let upper = |offset| u64::from(self.config.dword(offset)) << 32;
        let window = |first: u64, last: u64| first..last | (WINDOW_GRANULE - 1);
        let prefetchable = PREFETCHABLE_WINDOW;
        [
            window(address(MEMORY_WINDOW), address(MEMORY_WINDOW + 2)),
            window(
                address(prefetchable) | upper(prefetchable + 4),
                address(prefetchable + 2) | upper(prefetchable + 8),
            ),
        ]
        // The last address is in the window.
        .map(|window| window.start..window.end.saturating_add(1))
    }

    /// What the guest wrote to events clears them (§7.5.3.11).
    fn clear_events(&mut self, offset: u16, data: &[u8]) {
        let at = self.pcie + SLOT_STATUS;
        let written = (offset..).zip(data).filter_map(|(byte, value)| match byte.checked_sub(at)? {
            shift @ (0 | 1) => Some(u16::from(*value) << (8 * shift)),
            _ => None,
        });
        let clear = written.fold(0, |all, bits| all | bits) & EVENTS;
        let status = self.slot_status() & !clear;
        self.set(SLOT_STATUS, status);
    }

    /// Makes the interrupt what the guest says of its message.
    fn follow_message(&mut self, interrupts: &dyn Interrupts) {
        let message = self.message();
        if message.is_some() && self.interrupt.is_none() {
            match interrupts.create() {
                Ok(interrupt) => self.interrupt = Some(interrupt),
                Err(e) => tracing::warn!("a root port cannot interrupt: {e}"),
            }
        }
        if let Some(interrupt) = &self.interrupt
            && let Err(e) = interrupt.set(message)
        {
            tracing::warn!("a root port cannot interrupt: {e}");
        }
    }

    fn message(&self) -> Option<MsiMessage> {
        let enabled = self.word(self.msi + 2) & MSI_ENABLE != 0;
        let address = u64::from(self.config.dword(self.msi + 8)) << 32 | u64::from(self.config.dword(self.msi + 4));
        enabled.then(|| MsiMessage { address, data: u32::from(self.word(self.msi + 12)) })
    }

    /// Interrupts the guest where the condition for it has just become true (§6.7.3.4).
    fn signal(&mut self) {
        let (control, status) = (self.slot_control(), self.slot_status());
        let pairs = [(BUTTON_ENABLE, BUTTON), (PRESENCE_ENABLE, PRESENCE), (LINK_ENABLE, LINK_CHANGED)];
        let enabled = pairs.into_iter().any(|(enable, event)| control & enable != 0 && status & event != 0);
        let due = enabled && control & HOT_PLUG_INTERRUPT != 0 && self.message().is_some();
        if due
            && !self.asserted
            && let Some(interrupt) = &self.interrupt
            && let Err(e) = interrupt.event().write(1)
        {
            tracing::warn!("interrupting the guest: {e}");
        }
        self.asserted = due;
    }
}

impl PciFunction for RootPort {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        let before = inner.indicator();
        inner.clear_events(offset, data);
        inner.config.write(offset, data);
        if Indicator::new(inner.slot_control()).is_none() {
            let control = inner.slot_control() & !INDICATOR | before.bits();
            inner.set(SLOT_CONTROL, control);
        }
        inner.train();
        let end = usize::from(offset) + data.len();
        if offset < inner.msi + MSI_LEN && end > usize::from(inner.msi) {
            inner.follow_message(&*self.interrupts);
        }
        inner.signal();
        let now = inner.indicator();
        drop(inner);
        if now != before {
            self.observer.indicator(self.number, now);
        }
    }

    fn bars(&self) -> Bars {
        Bars::default()
    }

    fn place_bar(&self, _index: usize, _address: u64) {}

    fn memory_enabled(&self) -> bool {
        self.lock().config.memory_enabled()
    }

    fn bar_read(&self, _index: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn bar_write(&self, _index: usize, _offset: u64, _data: &[u8]) {}

    fn bar_mapped(&self, _index: usize, _at: Option<u64>) {}
}

/// Adds the PCI Express capability of a root port with a slot. Returns its offset.
fn add_pcie(config: &mut ConfigSpace, number: u8) -> Option<u16> {
    let (mut body, mut writable) = ([0_u8; PCIE_LEN], [0_u8; PCIE_LEN]);
    let mut set = |register: u16, value: u32, mask: u32| {
        // The body begins behind id and link.
        let at = usize::from(register) - 2;
        let parts = [(&mut body, value), (&mut writable, mask)];
        for (bytes, value) in parts {
            if let Some(bytes) = bytes.get_mut(at..at + 4) {
                bytes.copy_from_slice(&value.to_le_bytes());
            }
        }
    };
    // Device capabilities: role-based error reporting. Device control: error reporting enables.
    set(0x04, 1 << 15, 0);
    set(0x08, 0, 0x000f);
    // Link: 2.5 GT/s, one lane, data link layer active reporting, the port's number. Two spare bits and the switch.
    let port = u32::from(number);
    set(0x0c, 1 | 1 << 4 | 1 << 20 | port << 24, 0);
    set(LINK_CONTROL, 0, u32::from(LINK_DISABLE) | 0xc3);
    // Slots are numbered from 1.
    set(0x14, SLOT_CAPABILITIES | (port + 1) << SLOT_NUMBER_SHIFT, 0);
    let control = BUTTON_ENABLE | PRESENCE_ENABLE | HOT_PLUG_INTERRUPT | LINK_ENABLE | INDICATOR;
    set(SLOT_CONTROL, u32::from(Indicator::Off.bits()), u32::from(control));
    // Link capabilities 2: 2.5 GT/s. Link control 2: that is the target.
    set(0x2c, 1 << 1, 0);
    set(0x30, 1, 0);
    // PCI Express capabilities: version 2, root port, with a slot.
    let register = 2 | 4 << 4 | 1_u16 << 8;
    body[..2].copy_from_slice(&register.to_le_bytes());
    config.add_capability(CAPABILITY_PCIE, &body, &writable)
}

/// Adds the MSI capability. Returns its offset.
fn add_msi(config: &mut ConfigSpace) -> Option<u16> {
    // Message control: 64-bit addresses, one message.
    let body = [0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    // Enable and how many messages the guest grants; address; data.
    let writable = [0x71, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
    config.add_capability(CAPABILITY_MSI, &body, &writable)
}

#[cfg(test)]
mod tests;
