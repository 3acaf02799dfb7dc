//! A function of the host's on the guest's bus.

use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::config::{COMMAND, Config, Msix, Structure};
use super::msi::Msi;
use super::{Mapping, Physical, Region, Signals};
use crate::pci::{Bars, MsixVectors, PciFunction};
use crate::seam::{DeviceMemory, Interrupts};

const PAGE: u64 = 4096;
/// Command: the function may write to memory.
const BUS_MASTER: u8 = 1 << 2;

/// What such a function needs of the machine.
#[derive(Clone)]
pub struct Seams {
    /// Makes its interrupts.
    pub interrupts: Arc<dyn Interrupts>,
    /// Puts its memory into the guest.
    pub memory: Arc<dyn DeviceMemory>,
}

/// A part of a base address register's memory that the guest reaches without an exit.
struct Window {
    bar: usize,
    /// Offset into the memory.
    start: u64,
    mapping: Mapping,
}

/// A function of the host's that the guest drives.
pub struct VfioFunction {
    physical: Arc<dyn Physical>,
    seams: Seams,
    vectors: Option<MsixVectors>,
    /// Dropped before the windows, which it shows.
    inner: Mutex<Inner>,
    windows: Vec<Window>,
}

struct Inner {
    config: Config,
    /// Its interrupts are those of the MSI-X table.
    msix_is_on: bool,
    /// Windows that the guest reaches now, with the register that each is of.
    shown: Vec<(usize, Box<dyn Send + Sync>)>,
    on_driver: Option<Box<dyn Fn() + Send>>,
    stopped: bool,
}

impl fmt::Debug for VfioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VfioFunction").field(&self.physical.name()).finish()
    }
}

impl VfioFunction {
    /// A function as the guest finds it: reset.
    ///
    /// # Errors
    /// Its memory cannot be mapped.
    pub fn new(physical: Arc<dyn Physical>, seams: Seams) -> std::io::Result<Self> {
        physical.reset();
        let config = Config::new(&*physical);
        let mut windows = Vec::new();
        for (number, bar) in (0_u8..).zip(config.bars()) {
            let size = bar.map_or(0, |bar| bar.size);
            for part in mappable(&*physical, &config, number, size) {
                let mapping = physical.map(number, &part)?;
                windows.push(Window { bar: number.into(), start: part.start, mapping });
            }
        }
        let vectors = config.msix.as_ref().map(|msix| MsixVectors::direct(seams.interrupts.clone(), msix.vectors()));
        let inner = Inner { config, msix_is_on: false, shown: Vec::new(), on_driver: None, stopped: false };
        Ok(Self { physical, seams, vectors, inner: Mutex::new(inner), windows })
    }

    /// Calls `tell` each time that a driver begins to let the function be a bus master, on the vCPU's thread and with the
    /// function locked: it must not wait, nor use the function.
    pub fn on_driver(&self, tell: impl Fn() + Send + 'static) {
        self.lock().on_driver = Some(Box::new(tell));
    }

    /// Whether the guest lets the function answer to memory accesses.
    pub fn is_in_use(&self) -> bool {
        self.lock().config.memory_enabled()
    }

    /// Resets the function: it writes to no memory any more, and interrupts nobody.
    pub fn stop(&self) {
        let mut inner = self.lock();
        if inner.stopped {
            return;
        }
        inner.stopped = true;
        // Where it cannot be reset, it may at least not master the bus.
        inner.config.write(&*self.physical, COMMAND, &[0, 0]);
        self.physical.reset();
        let msi = inner.config.msi.as_ref().is_some_and(Msi::is_on).then_some(Signals::Msi);
        for kind in msi.into_iter().chain(inner.msix_is_on.then_some(Signals::Msix)) {
            if let Err(error) = self.physical.signal_to(kind, &[]) {
                tracing::warn!("{}: {kind:?}: {error}", self.physical.name());
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the function's interrupts what its capabilities say.
    fn follow_interrupts(&self, inner: &mut Inner) {
        let physical = &*self.physical;
        if let Some(msi) = &mut inner.config.msi
            && let Err(error) = msi.apply(physical, &self.seams.interrupts)
        {
            tracing::warn!("{}: MSI: {error}", physical.name());
        }
        let (Some(msix), Some(vectors)) = (&inner.config.msix, &self.vectors) else { return };
        vectors.set_control(msix.control());
        let on = msix.is_on();
        if on == inner.msix_is_on {
            return;
        }
        let signalled = match on {
            true => vectors.events().and_then(|events| physical.signal_to(Signals::Msix, &events)),
            false => physical.signal_to(Signals::Msix, &[]),
        };
        match signalled {
            Ok(()) => inner.msix_is_on = on,
            Err(error) => tracing::warn!("{}: MSI-X: {error}", physical.name()),
        }
    }

    /// The structure of MSI-X that lies at an offset into memory of a register, and the offset into that.
    fn structure(&self, index: usize, offset: u64) -> Option<(Structure, u64)> {
        let inner = self.lock();
        let msix = inner.config.msix.as_ref()?;
        msix.structures().into_iter().find_map(|(structure, place, len)| {
            let at = offset.checked_sub(place.offset)?;
            (usize::from(place.bar) == index && at < len).then_some((structure, at))
        })
    }
}

/// Parts of a register's memory that the guest may have mapped: of whole pages, and of none in which MSI-X has a structure.
fn mappable(physical: &dyn Physical, config: &Config, bar: u8, size: u64) -> Vec<Range<u64>> {
    let pages = |range: Range<u64>| range.start.next_multiple_of(PAGE)..range.end.min(size) / PAGE * PAGE;
    let mut parts: Vec<Range<u64>> = physical.mappable(bar).into_iter().map(pages).collect();
    let structures = config.msix.iter().flat_map(Msix::structures);
    for (_, place, len) in structures.filter(|(_, place, _)| place.bar == bar) {
        let end = place.offset.saturating_add(len);
        let taken = place.offset / PAGE * PAGE..end.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let rest = |part: Range<u64>| [part.start..part.end.min(taken.start), part.start.max(taken.end)..part.end];
        parts = parts.into_iter().flat_map(rest).collect();
    }
    parts.retain(|part| !part.is_empty());
    parts
}

impl PciFunction for VfioFunction {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.lock().config.read(&*self.physical, offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut inner = self.lock();
        inner.config.write(&*self.physical, offset, data);
        self.follow_interrupts(&mut inner);
        let command = COMMAND.checked_sub(offset).and_then(|at| data.get(usize::from(at)));
        if let Some(tell) = inner.on_driver.as_ref().filter(|_| command.is_some_and(|byte| byte & BUS_MASTER != 0)) {
            tell();
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

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        match (self.structure(index, offset), &self.vectors) {
            (Some((Structure::Table, at)), Some(vectors)) => vectors.read_table(at, data),
            (Some((Structure::Pending, at)), Some(vectors)) => vectors.read_pending(at, data),
            _ => self.physical.read(bar(index), offset, data),
        }
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        match (self.structure(index, offset), &self.vectors) {
            (Some((Structure::Table, at)), Some(vectors)) => vectors.write_table(at, data),
            (Some((Structure::Pending, _)), _) => {}
            _ => self.physical.write(bar(index), offset, data),
        }
    }

    fn bar_mapped(&self, index: usize, at: Option<u64>) {
        let mut inner = self.lock();
        inner.shown.retain(|(bar, _)| *bar != index);
        let Some(at) = at else { return };
        let ends = inner.config.bar(index).map_or(0, |bar| bar.size);
        for window in self.windows.iter().filter(|window| window.bar == index && window.start < ends) {
            let shown = window.mapping.at(at.saturating_add(window.start)).and_then(|it| self.seams.memory.show(it));
            match shown {
                Ok(shown) => inner.shown.push((index, shown)),
                // It answers all the same, one exit an access.
                Err(error) => tracing::warn!("{}: BAR {index} is not mapped: {error}", self.physical.name()),
            }
        }
    }
}

fn bar(index: usize) -> Region {
    // A function has six.
    Region::Bar(u8::try_from(index).unwrap_or(u8::MAX))
}

impl Drop for VfioFunction {
    fn drop(&mut self) {
        self.stop();
    }
}
