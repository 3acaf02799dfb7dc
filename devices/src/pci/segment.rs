//! A PCI segment with its root bus and the buses behind its root ports: configuration accesses through ECAM
//! (PCIe 5.0 §7.2.2), and base address registers that follow the guest's wishes on the bus of memory-mapped registers.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::{BarKind, Bars, Indicator, PciFunction, RootPort, SlotObserver};
use crate::bus::{Bus, BusDevice};
use crate::seam::Interrupts;

/// Bytes of configuration space per function.
const FUNCTION_LEN: u64 = FUNCTION_PAGE as u64;
const FUNCTION_PAGE: usize = 4096;
/// Bytes of configuration space per device, and per bus.
const DEVICE_LEN: u64 = 8 * FUNCTION_LEN;
const BUS_LEN: u64 = 32 * DEVICE_LEN;
/// The most root ports: 28 devices of eight functions, which leaves the host bridge and three devices more.
pub const MAX_PORTS: u8 = 224;
/// Functions per device.
const FUNCTIONS: u8 = 8;
/// Ports are the functions of this device, of the one before it, and so on.
const FIRST_PORT_DEVICE: u8 = 31;
/// Bytes of a port's 32-bit memory window.
const PORT_WINDOW: u64 = 2 << 20;
/// The most bytes of a port's 64-bit memory window.
const MAX_PORT_WINDOW: u64 = 32 << 30;
/// Windows of a port are multiples of this, in bytes.
const WINDOW_GRANULE: u64 = 1 << 20;

/// The header type register, whose bit 7 tells of further functions in a device (PCI 3.0 §6.2.1).
const HEADER_TYPE: u16 = 0x0e;

/// A device and function number on a bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Device, 0 to 31.
    pub device: u8,
    /// Function, 0 to 7.
    pub function: u8,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device, self.function)
    }
}

/// Guest physical addresses that base address registers may have. The platform's tables tell the guest the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// Below 4 GiB.
    pub low: Range<u64>,
    /// Above 4 GiB, for 64-bit registers.
    pub high: Range<u64>,
}

/// Why a function cannot be added.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No such device or function number, or it is taken.
    #[error("PCI address {0} is taken or does not exist")]
    Taken(Address),
    /// All 32 devices are there.
    #[error("no PCI device number is free on the root bus")]
    Full,
    /// A base address register finds no place.
    #[error("no room for {size:#x} bytes of PCI memory")]
    NoRoom {
        /// The register's size in bytes.
        size: u64,
    },
    /// There is no such root port, or a device is behind it.
    #[error("there is no root port {0}, or a device is behind it already")]
    Occupied(u8),
}

struct Slot {
    /// The function's address, or that of the root port that it is behind.
    address: Address,
    function: Arc<dyn PciFunction>,
    /// Where each base address register answers.
    mapped: [Option<u64>; 6],
}

/// A root port, and what is behind it.
struct Port {
    bridge: Arc<RootPort>,
    /// Its memory windows, as they were assigned: the 32-bit one first.
    windows: [Range<u64>; 2],
    device: Option<Slot>,
    /// Where the memory of a device that is gone reads as zeros, until the guest is through with it.
    remains: Vec<u64>,
}

/// Addresses of all ports' windows.
struct PortWindows {
    low: Range<u64>,
    high: Range<u64>,
    /// Bytes of the high one for each port.
    share: u64,
}

#[derive(Default)]
struct Functions {
    root: Vec<Slot>,
    ports: Vec<Port>,
}

impl Functions {
    /// The function at an address of the root bus, and whether its device has others.
    fn on_root(&self, address: Address) -> Option<(Arc<dyn PciFunction>, bool)> {
        if let Some(port) = port_at(address).and_then(|number| self.ports.get(number)) {
            // A port knows itself whether it has others.
            return Some((port.bridge.clone(), false));
        }
        let slot = self.root.iter().find(|slot| slot.address == address)?;
        let siblings = self.root.iter().filter(|other| other.address.device == address.device);
        Some((slot.function.clone(), siblings.count() > 1))
    }

    /// The function behind the port that leads to `bus`.
    fn behind(&self, bus: u8) -> Option<Arc<dyn PciFunction>> {
        let port = self.ports.iter().find(|port| port.device.is_some() && port.bridge.bus() == Some(bus))?;
        port.device.as_ref().map(|slot| slot.function.clone())
    }

    /// The first number behind those of the devices that root ports are.
    fn devices_end(&self) -> u8 {
        let taken = self.ports.len().div_ceil(usize::from(FUNCTIONS));
        FIRST_PORT_DEVICE + 1 - u8::try_from(taken).unwrap_or(FIRST_PORT_DEVICE)
    }

    /// Every function that may have base address registers, with the port that it is behind.
    fn each(&mut self) -> impl Iterator<Item = (&mut Slot, Option<&RootPort>)> {
        let behind = self.ports.iter_mut().filter_map(|port| Some((port.device.as_mut()?, Some(&*port.bridge))));
        self.root.iter_mut().map(|slot| (slot, None)).chain(behind)
    }
}

/// The number of the root port that would be at this address.
fn port_at(address: Address) -> Option<usize> {
    let device = FIRST_PORT_DEVICE.checked_sub(address.device)?;
    Some(usize::from(device) * usize::from(FUNCTIONS) + usize::from(address.function))
}

fn address_of_port(number: u8) -> Address {
    Address { device: FIRST_PORT_DEVICE - number / FUNCTIONS, function: number % FUNCTIONS }
}

/// A segment with one root bus, number 0, and a bus behind each root port.
pub struct PciSegment {
    mmio: Arc<Bus>,
    windows: Windows,
    /// Locked before a function's own lock, never while one is held.
    functions: Mutex<Functions>,
}

impl fmt::Debug for PciSegment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let functions = self.lock();
        f.debug_list().entries(functions.root.iter().map(|slot| slot.address)).finish()
    }
}

impl PciSegment {
    /// A segment without functions, whose base address registers appear on `mmio` within `windows`.
    pub fn new(mmio: Arc<Bus>, windows: Windows) -> Self {
        Self { mmio, windows, functions: Mutex::default() }
    }

    /// Adds `count` root ports, at most [`MAX_PORTS`], as functions of the last devices of the root bus. Port `n` leads to
    /// bus `n + 1`. To be called before other functions are added.
    ///
    /// # Errors
    /// [`Error::Full`] where there are too many, [`Error::Taken`] where functions or ports were added before, and
    /// [`Error::NoRoom`] where their memory windows do not fit.
    pub fn add_ports(
        &self,
        count: u8,
        interrupts: &Arc<dyn Interrupts>,
        observer: &Arc<dyn SlotObserver>,
    ) -> Result<(), Error> {
        let mut functions = self.lock();
        if let Some(slot) = functions.root.first().filter(|_| count > 0) {
            return Err(Error::Taken(slot.address));
        }
        if count > MAX_PORTS {
            return Err(Error::Full);
        }
        let PortWindows { low, high, share } = self.port_windows(count)?;
        for number in 0..count {
            let bridge = RootPort::new(number, interrupts.clone(), observer.clone()).ok_or(Error::Full)?;
            let windows = [part(&low, number, PORT_WINDOW), part(&high, number, share)];
            bridge.assign(number + 1, &windows[0], &windows[1]);
            if address_of_port(number).function == 0 && number + 1 < count {
                bridge.set_multifunction();
            }
            functions.ports.push(Port { bridge: Arc::new(bridge), windows, device: None, remains: Vec::new() });
        }
        Ok(())
    }

    /// The part of ECAM in which the devices have their configuration space that root ports are functions of. Empty without
    /// ports.
    pub fn ports_ecam(&self) -> Range<u64> {
        u64::from(self.lock().devices_end()) * DEVICE_LEN..BUS_LEN
    }

    /// Shows the ports' configuration space in new memory, which the caller puts where [`PciSegment::ports_ecam`] says, for
    /// the guest to read only: it reads there without an exit what it would else be told by an access to this segment. Its
    /// writes must still come here.
    ///
    /// # Errors
    /// [`Error::NoRoom`] where the memory is too short.
    pub fn show_ports(&self, pages: &Arc<GuestRegionMmap>) -> Result<(), Error> {
        let Range { start, end } = self.ports_ecam();
        let size = end - start;
        if pages.len() < size {
            return Err(Error::NoRoom { size });
        }
        let functions = self.lock();
        for at in (0..size).step_by(FUNCTION_PAGE) {
            let port = decode(start + at, 0).and_then(|(_, address, _)| functions.ports.get(port_at(address)?));
            match port {
                Some(port) => port.bridge.show(pages.clone(), at),
                // What an access says where there is no function.
                None => pages
                    .write_slice(&[0xff; FUNCTION_PAGE], MemoryRegionAddress(at))
                    .map_err(|_| Error::NoRoom { size })?,
            }
        }
        Ok(())
    }

    /// The last addresses of both windows, of the high one at most a half.
    fn port_windows(&self, count: u8) -> Result<PortWindows, Error> {
        let Windows { low, high } = &self.windows;
        let size = PORT_WINDOW * u64::from(count);
        let end = low.end - low.end % WINDOW_GRANULE;
        let start = end.checked_sub(size).filter(|start| *start >= low.start).ok_or(Error::NoRoom { size })?;
        let share = (high.end.saturating_sub(high.start) / 2 / u64::from(count.max(1))).min(MAX_PORT_WINDOW);
        // A power of two, so that large registers find an aligned place.
        let share = share.checked_ilog2().map_or(0, |log| 1 << log) / WINDOW_GRANULE * WINDOW_GRANULE;
        let top = high.end - high.end.checked_rem(share).unwrap_or(0);
        Ok(PortWindows { low: start..end, high: top - share * u64::from(count)..top, share })
    }

    /// Puts a function behind a root port, with addresses of the port's window for its base address registers, and tells
    /// the guest; `cold`, where the guest has not run yet and finds it as if it had been there always.
    ///
    /// # Errors
    /// [`Error::Occupied`] and [`Error::NoRoom`].
    pub fn plug(&self, port: u8, function: Arc<dyn PciFunction>, cold: bool) -> Result<(), Error> {
        let mut functions = self.lock();
        let free = functions.ports.get_mut(usize::from(port)).filter(|port| port.device.is_none());
        let slot = free.ok_or(Error::Occupied(port))?;
        self.clear_remains(slot);
        let mut taken = Vec::new();
        for (index, bar) in function.bars().into_iter().enumerate() {
            let Some(bar) = bar else { continue };
            // None of them is prefetchable, so none may go into a bridge's 64-bit window.
            let place = first_fit(&slot.windows[0], &taken, bar.size).ok_or(Error::NoRoom { size: bar.size })?;
            taken.push(place..place + bar.size);
            function.place_bar(index, place);
        }
        slot.device = Some(Slot { address: address_of_port(port), function, mapped: [None; 6] });
        slot.bridge.insert(cold);
        self.map_bars(&mut functions);
        Ok(())
    }

    /// Takes the function behind a root port out, and tells the guest. It answers nowhere any more, but a call of it that
    /// another thread began before may still be under way.
    ///
    /// Its memory reads as zeros until the guest is through with it. What a memory read gives that nobody completes is the
    /// root complex's choice (PCIe 5.0 §2.3.2), and drivers of virtio devices wait for a status of zero after the reset with
    /// which they end.
    pub fn unplug(&self, port: u8) -> Option<Arc<dyn PciFunction>> {
        let mut functions = self.lock();
        let slot = functions.ports.get_mut(usize::from(port))?;
        let mut device = slot.device.take()?;
        let sizes = device.function.bars().map(|bar| bar.map_or(0, |bar| bar.size));
        let memory: Vec<_> = device.mapped.iter().zip(sizes).filter_map(|(at, size)| Some(((*at)?, size))).collect();
        self.unmap_where(&mut device, |_, _| true);
        let used = slot.bridge.indicator() != Indicator::Off;
        for (at, size) in memory.into_iter().filter(|_| used) {
            if self.mmio.insert(at, size, Arc::new(Gone)).is_ok() {
                slot.remains.push(at);
            }
        }
        slot.bridge.take_out();
        self.map_bars(&mut functions);
        Some(device.function)
    }

    fn clear_remains(&self, port: &mut Port) {
        for at in port.remains.drain(..) {
            if let Err(e) = self.mmio.remove(at) {
                tracing::warn!("what a device left at {at:#x}: {e}");
            }
        }
    }

    /// Whether the guest is through with what was behind a port: it says so by the indicator, or moves windows.
    fn follow_remains(&self, functions: &mut Functions, address: Address, register: u16) {
        let port = port_at(address).and_then(|number| functions.ports.get_mut(number));
        if let Some(port) = port.filter(|port| register < 0x30 || port.bridge.indicator() == Indicator::Off) {
            self.clear_remains(port);
        }
    }

    /// A root port.
    pub fn port(&self, number: u8) -> Option<Arc<RootPort>> {
        self.lock().ports.get(usize::from(number)).map(|port| port.bridge.clone())
    }

    /// Length in bytes of the ECAM window, which the machine puts on its bus with this segment as the device: up to the
    /// last bus behind a root port.
    pub fn ecam_len(&self) -> u64 {
        let buses = 1 + self.lock().ports.len();
        BUS_LEN * u64::try_from(buses).unwrap_or(1)
    }

    /// Adds a function as the next free device, and gives its base address registers addresses.
    ///
    /// # Errors
    /// [`Error::Full`] and [`Error::NoRoom`].
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<Address, Error> {
        let free = {
            let functions = self.lock();
            let free = |device: &u8| functions.root.iter().all(|slot| slot.address.device != *device);
            (0..functions.devices_end()).find(free)
        };
        let address = Address { device: free.ok_or(Error::Full)?, function: 0 };
        self.add_at(address, function)?;
        Ok(address)
    }

    /// Adds a function at a given address, and gives its base address registers addresses.
    ///
    /// # Errors
    /// [`Error::Taken`] and [`Error::NoRoom`].
    pub fn add_at(&self, address: Address, function: Arc<dyn PciFunction>) -> Result<(), Error> {
        let mut functions = self.lock();
        let exists = address.device < functions.devices_end() && address.function < FUNCTIONS;
        if !exists || functions.root.iter().any(|slot| slot.address == address) {
            return Err(Error::Taken(address));
        }
        let windows = functions.ports.iter().flat_map(|port| port.windows.clone());
        let root = functions.root.iter().flat_map(|slot| ranges(&slot.function.bars()));
        let mut taken: Vec<Range<u64>> = windows.chain(root).collect();
        for (index, bar) in function.bars().into_iter().enumerate() {
            let Some(bar) = bar else { continue };
            let place = self.place(&mut taken, bar.kind, bar.size)?;
            function.place_bar(index, place);
        }
        functions.root.push(Slot { address, function, mapped: [None; 6] });
        self.map_bars(&mut functions);
        Ok(())
    }

    /// Takes a function out: it answers nowhere any more.
    pub fn remove(&self, address: Address) -> Option<Arc<dyn PciFunction>> {
        let mut functions = self.lock();
        let at = functions.root.iter().position(|slot| slot.address == address)?;
        let mut slot = functions.root.remove(at);
        self.unmap_where(&mut slot, |_, _| true);
        self.map_bars(&mut functions);
        Some(slot.function)
    }

    /// Looks at all base address registers again, after functions were restored.
    pub fn refresh(&self) {
        self.map_bars(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, Functions> {
        self.functions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The function of a configuration access, and whether its device has others. The one device behind a port has one.
    fn function(&self, bus: u8, address: Address) -> Option<(Arc<dyn PciFunction>, bool)> {
        let functions = self.lock();
        if bus == 0 {
            return functions.on_root(address);
        }
        let first = address == Address { device: 0, function: 0 };
        first.then(|| functions.behind(bus)).flatten().map(|function| (function, false))
    }

    /// The lowest free place for a register, in the high window where it may go there.
    fn place(&self, taken: &mut Vec<Range<u64>>, kind: BarKind, size: u64) -> Result<u64, Error> {
        let windows = match kind {
            BarKind::Memory64 => vec![&self.windows.high, &self.windows.low],
            BarKind::Memory32 => vec![&self.windows.low],
        };
        let place = windows.into_iter().find_map(|window| first_fit(window, taken, size));
        let place = place.ok_or(Error::NoRoom { size })?;
        taken.push(place..place + size);
        Ok(place)
    }

    /// Makes the bus answer where the registers of all functions say. A register that claims another's addresses,
    /// or addresses outside the windows (the segment's, and those of the port that it is behind), answers nowhere until its
    /// address is sensible and free.
    fn map_bars(&self, functions: &mut Functions) {
        for (slot, port) in functions.each() {
            let wanted = self.wanted(slot, port);
            self.unmap_where(slot, |index, at| wanted.get(index).copied().flatten() != Some(at));
        }
        for (slot, port) in functions.each() {
            let wanted = self.wanted(slot, port);
            let bars = slot.function.bars();
            for (index, (mapped, wanted)) in slot.mapped.iter_mut().zip(wanted).enumerate() {
                let (None, Some(at), Some(Some(bar))) = (&mapped, wanted, bars.get(index)) else {
                    continue;
                };
                let memory = BarMemory { function: Arc::clone(&slot.function), index };
                if let Err(e) = self.mmio.insert(at, bar.size, Arc::new(memory)) {
                    tracing::debug!("BAR {index} of {} is not mapped: {e}", slot.address);
                    continue;
                }
                *mapped = Some(at);
                slot.function.bar_mapped(index, Some(at));
            }
        }
    }

    /// Where each register of a function should answer.
    fn wanted(&self, slot: &Slot, port: Option<&RootPort>) -> [Option<u64>; 6] {
        if !slot.function.memory_enabled() {
            return [None; 6];
        }
        slot.function.bars().map(|bar| {
            let bar = bar?;
            let last = bar.address.checked_add(bar.size - 1)?;
            let within = |window: &Range<u64>| window.contains(&bar.address) && window.contains(&last);
            let reached = port.is_none_or(|port| port.forwards(&(bar.address..last.saturating_add(1))));
            (reached && (within(&self.windows.low) || within(&self.windows.high))).then_some(bar.address)
        })
    }

    fn unmap_where(&self, slot: &mut Slot, which: impl Fn(usize, u64) -> bool) {
        for (index, mapped) in slot.mapped.iter_mut().enumerate() {
            if let Some(at) = mapped.take_if(|at| which(index, *at)) {
                if let Err(e) = self.mmio.remove(at) {
                    tracing::warn!("BAR {index} of {}: {e}", slot.address);
                }
                slot.function.bar_mapped(index, None);
            }
        }
    }
}

impl BusDevice for PciSegment {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let found = decode(offset, data.len())
            .and_then(|(bus, address, register)| Some((self.function(bus, address)?, address, register)));
        let Some(((function, multifunction), address, register)) = found else {
            data.fill(0xff);
            return;
        };
        function.config_read(register, data);
        if multifunction
            && address.function == 0
            && let Some(at) = HEADER_TYPE.checked_sub(register)
            && let Some(byte) = data.get_mut(usize::from(at))
        {
            *byte |= 0x80;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((bus, address, register)) = decode(offset, data.len()) else {
            return;
        };
        let Some((function, _)) = self.function(bus, address) else {
            return;
        };
        function.config_write(register, data);
        // The command register, the base address registers and a bridge's windows lie in 0x04 to 0x2f; a port can also
        // switch its link off.
        let mut functions = self.lock();
        let is_port = bus == 0 && address.device >= functions.devices_end();
        if is_port {
            self.follow_remains(&mut functions, address, register);
        }
        if register < 0x30 || is_port {
            self.map_bars(&mut functions);
        }
    }
}

/// The bus, the function and the register that an offset into ECAM stands for.
fn decode(offset: u64, len: usize) -> Option<(u8, Address, u16)> {
    let bus = u8::try_from(offset / BUS_LEN).ok()?;
    let register = offset % FUNCTION_LEN;
    let end = register.checked_add(u64::try_from(len).ok()?)?;
    let address =
        Address { device: u8::try_from(offset >> 15 & 31).ok()?, function: u8::try_from(offset >> 12 & 7).ok()? };
    (end <= FUNCTION_LEN).then_some((bus, address, u16::try_from(register).ok()?))
}

/// The part of a window that is a port's.
fn part(window: &Range<u64>, number: u8, size: u64) -> Range<u64> {
    let start = window.start + size * u64::from(number);
    start..start + size
}

fn ranges(bars: &Bars) -> Vec<Range<u64>> {
    let end = |address: u64, size: u64| address.saturating_add(size);
    bars.iter().flatten().map(|bar| bar.address..end(bar.address, bar.size)).collect()
}

/// The lowest multiple of `size` in `window` from which `size` addresses are free.
fn first_fit(window: &Range<u64>, taken: &[Range<u64>], size: u64) -> Option<u64> {
    let mut at = window.start.checked_next_multiple_of(size)?;
    loop {
        let end = at.checked_add(size)?;
        if end > window.end {
            return None;
        }
        match taken.iter().find(|other| other.start < end && at < other.end) {
            // Its end is beyond `at`, so this comes to an end.
            Some(other) => at = other.end.checked_next_multiple_of(size)?,
            None => return Some(at),
        }
    }
}

/// The memory of a device that is gone.
struct Gone;

impl BusDevice for Gone {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

/// The memory of one base address register, on the bus.
struct BarMemory {
    function: Arc<dyn PciFunction>,
    index: usize,
}

impl BusDevice for BarMemory {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.function.bar_read(self.index, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(self.index, offset, data);
    }
}

#[cfg(test)]
mod tests;
