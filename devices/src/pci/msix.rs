//! MSI-X (PCI 3.0 §6.8.2): a function's interrupt vectors, their table and their pending bits.
//!
//! A device's thread interrupts without a lock: it looks at one flag and writes one event. A vector's route into the
//! guest is made at its first unmasking and changed only at a later one, so a driver that masks and unmasks pays
//! nothing at the hypervisor. An interrupt of a masked vector is kept as its pending bit.

mod latch;

/// What the lock-free part is made of.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
}

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use self::latch::Latch;
use super::ConfigSpace;
use crate::seam::{Interrupt, Interrupts, MsiMessage};

/// The MSI-X capability.
pub(crate) const CAPABILITY_MSIX: u8 = 0x11;

/// Message control: all vectors are masked.
pub(crate) const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
/// Message control: MSI-X is in use.
pub(crate) const CONTROL_ENABLE: u16 = 1 << 15;

/// Bytes per vector in the table.
pub(crate) const ENTRY_LEN: u64 = 16;
/// Vector control: the vector is masked.
const ENTRY_MASKED: u32 = 1;

/// Where the MSI-X structures of a function stand.
#[derive(Debug, Clone, Copy)]
pub struct MsixCapability {
    /// Offset of the capability in configuration space.
    offset: u16,
}

impl MsixCapability {
    /// Adds the capability for `vectors` vectors (1 to 2048), with the table and the pending bits at these offsets
    /// (multiples of 8) within base address register `bar`. `None` where it does not fit.
    pub fn add(config: &mut ConfigSpace, vectors: u16, bar: u8, table: u32, pending: u32) -> Option<Self> {
        let last = vectors.checked_sub(1).filter(|last| *last < 2048)?;
        let mut body = Vec::with_capacity(10);
        body.extend(last.to_le_bytes());
        body.extend((table & !7 | u32::from(bar & 7)).to_le_bytes());
        body.extend((pending & !7 | u32::from(bar & 7)).to_le_bytes());
        let writable = (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes();
        let offset = config.add_capability(CAPABILITY_MSIX, &body, &writable)?;
        Some(Self { offset })
    }

    /// Message control as it stands: for [`MsixVectors::set_control`] after each write of configuration space.
    pub fn control(&self, config: &ConfigSpace) -> u16 {
        let mut data = [0; 2];
        config.read(self.offset + 2, &mut data);
        u16::from_le_bytes(data)
    }
}

/// A saved MSI-X table.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// One entry per vector.
    entries: Vec<Entry>,
    /// The vectors whose pending bit is set.
    pending: Vec<u16>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    address: u64,
    data: u32,
    control: u32,
}

impl Entry {
    /// Every vector is masked after a reset.
    const RESET: Self = Self { address: 0, data: 0, control: ENTRY_MASKED };

    fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.data.to_le_bytes());
        bytes[12..].copy_from_slice(&self.control.to_le_bytes());
        bytes
    }

    /// Sets one of the four 32-bit fields.
    fn set(&mut self, field: u64, value: u32) {
        match field {
            0 => self.address = self.address & !0xffff_ffff | u64::from(value & !3),
            1 => self.address = self.address & 0xffff_ffff | u64::from(value) << 32,
            2 => self.data = value,
            _ => self.control = value & ENTRY_MASKED,
        }
    }
}

struct Vector {
    /// Open where the route is set, and neither the vector nor the function is masked.
    latch: Latch,
    interrupt: OnceLock<Box<dyn Interrupt>>,
}

struct Table {
    enabled: bool,
    function_masked: bool,
    entries: Box<[Entry]>,
}

/// The vectors of a function, shared by its registers and the threads that interrupt.
pub struct MsixVectors {
    interrupts: Arc<dyn Interrupts>,
    /// Events are written past the latches: what is masked has no route.
    direct: bool,
    vectors: Box<[Vector]>,
    /// The guest's side. A device's thread does not take this lock.
    table: Mutex<Table>,
}

impl fmt::Debug for MsixVectors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MsixVectors").field("count", &self.vectors.len()).finish_non_exhaustive()
    }
}

impl MsixVectors {
    /// `count` masked vectors.
    pub fn new(interrupts: Arc<dyn Interrupts>, count: u16) -> Self {
        Self::with(interrupts, count, false)
    }

    /// `count` masked vectors for who writes to their [events](Self::events), and knows nothing of masks: a masked vector has
    /// no route into the guest, and what comes meanwhile waits in its event, with no pending bit.
    pub fn direct(interrupts: Arc<dyn Interrupts>, count: u16) -> Self {
        Self::with(interrupts, count, true)
    }

    fn with(interrupts: Arc<dyn Interrupts>, count: u16, direct: bool) -> Self {
        let vectors = (0..count).map(|_| Vector { latch: Latch::new(), interrupt: OnceLock::new() });
        Self {
            interrupts,
            direct,
            vectors: vectors.collect(),
            table: Mutex::new(Table {
                enabled: false,
                function_masked: false,
                entries: vec![Entry::RESET; usize::from(count)].into(),
            }),
        }
    }

    /// How many vectors there are.
    pub fn count(&self) -> u16 {
        // It was made from a u16.
        u16::try_from(self.vectors.len()).unwrap_or(u16::MAX)
    }

    /// The event of each vector, whether it has a route or not.
    ///
    /// # Errors
    /// No interrupt is free, or the hypervisor refused.
    pub fn events(&self) -> io::Result<Vec<&EventFd>> {
        let _only_who_sets_them = self.lock();
        self.vectors.iter().map(|vector| Ok(self.interrupt(vector)?.event())).collect()
    }

    /// Interrupts the guest by `vector`, or keeps its pending bit while it is masked. No lock, no waiting.
    pub fn signal(&self, vector: u16) {
        let Some(vector) = self.vectors.get(usize::from(vector)) else {
            return;
        };
        vector.latch.signal(|| vector.ring());
    }

    /// Takes over the capability's message control register.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        let enabled = control & CONTROL_ENABLE != 0;
        let function_masked = control & CONTROL_FUNCTION_MASK != 0;
        if (enabled, function_masked) == (table.enabled, table.function_masked) {
            return;
        }
        table.enabled = enabled;
        table.function_masked = function_masked;
        for index in 0..self.vectors.len() {
            self.refresh(&table, index);
        }
        if !enabled {
            self.unroute();
        }
    }

    /// Reads the table: 4 or 8 aligned bytes, as the specification demands of the guest; all ones otherwise.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.entry_of(offset, data.len()).and_then(|(index, at)| {
            let table = self.lock();
            let bytes = table.entries.get(index)?.to_bytes();
            bytes.get(at..at + data.len()).map(<[u8]>::to_vec)
        });
        match bytes {
            Some(bytes) => data.copy_from_slice(&bytes),
            None => data.fill(0xff),
        }
    }

    /// Writes the table: 4 or 8 aligned bytes; any other write is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let Some((index, _)) = self.entry_of(offset, data.len()) else {
            return;
        };
        let mut table = self.lock();
        let Some(entry) = table.entries.get_mut(index) else {
            return;
        };
        for (field, bytes) in (offset % ENTRY_LEN / 4..).zip(data.chunks_exact(4)) {
            let value = bytes.try_into().map_or(0, u32::from_le_bytes);
            entry.set(field, value);
        }
        self.refresh(&table, index);
    }

    /// Reads the pending bits: 4 or 8 aligned bytes; all ones otherwise. Writes to them are ignored.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let len = data.len();
        if !matches!(len, 4 | 8) || !usize::try_from(offset).is_ok_and(|at| at.is_multiple_of(len)) {
            data.fill(0xff);
            return;
        }
        for (at, byte) in (offset..).zip(data) {
            *byte = 0;
            for bit in 0..8 {
                let vector = at.checked_mul(8).and_then(|first| usize::try_from(first + bit).ok());
                let pending =
                    vector.and_then(|vector| self.vectors.get(vector)).is_some_and(|vector| vector.latch.is_pending());
                *byte |= u8::from(pending) << bit;
            }
        }
    }

    /// Forgets pending interrupts, as when the device behind them is reset.
    pub fn clear_pending(&self) {
        for vector in &self.vectors {
            vector.latch.set_pending(false);
        }
    }

    /// What to save.
    pub fn save(&self) -> MsixState {
        let table = self.lock();
        let pending = (0..).zip(&self.vectors);
        MsixState {
            entries: table.entries.to_vec(),
            pending: pending.filter(|(_, vector)| vector.latch.is_pending()).map(|(index, _)| index).collect(),
        }
    }

    /// Puts back a saved table. [`MsixVectors::set_control`] follows.
    ///
    /// # Errors
    /// What does not fit: the table has another number of vectors.
    pub fn restore(&self, state: &MsixState) -> Result<(), String> {
        let count = self.vectors.len();
        if state.entries.len() != count {
            let saved = state.entries.len();
            return Err(format!("MSI-X table of {saved} vectors, the device has {count}"));
        }
        let mut table = self.lock();
        for (index, (entry, saved)) in table.entries.iter_mut().zip(&state.entries).enumerate() {
            entry.address = saved.address & !3;
            entry.data = saved.data;
            entry.control = saved.control & ENTRY_MASKED;
            if let Some(vector) = self.vectors.get(index) {
                let pending = state.pending.iter().any(|saved| usize::from(*saved) == index);
                vector.latch.set_pending(pending);
            }
        }
        for index in 0..count {
            self.refresh(&table, index);
        }
        Ok(())
    }

    /// The vector that a table access of `len` bytes concerns, and the offset within its entry.
    fn entry_of(&self, offset: u64, len: usize) -> Option<(usize, usize)> {
        let at = usize::try_from(offset % ENTRY_LEN).ok()?;
        let aligned = matches!(len, 4 | 8) && at.is_multiple_of(len);
        let index = usize::try_from(offset / ENTRY_LEN).ok()?;
        (aligned && index < self.vectors.len()).then_some((index, at))
    }

    /// Makes a vector's route what its table entry and the function's control say.
    fn refresh(&self, table: &Table, index: usize) {
        let (Some(vector), Some(entry)) = (self.vectors.get(index), table.entries.get(index)) else {
            return;
        };
        let masked = !table.enabled || table.function_masked || entry.control & ENTRY_MASKED != 0;
        if masked && self.direct {
            take_away(vector);
        }
        let routed = !masked && self.route(vector, entry);
        vector.latch.set_open(routed, || vector.ring());
    }

    fn route(&self, vector: &Vector, entry: &Entry) -> bool {
        let message = MsiMessage { address: entry.address, data: entry.data };
        let set = self.interrupt(vector).and_then(|interrupt| interrupt.set(Some(message)));
        if let Err(e) = &set {
            tracing::warn!("an MSI-X vector stays masked: {e}");
        }
        set.is_ok()
    }

    /// A vector's interrupt, which is made where there is none. Only the holder of the table's lock makes one.
    fn interrupt<'a>(&self, vector: &'a Vector) -> io::Result<&'a dyn Interrupt> {
        if vector.interrupt.get().is_none() {
            drop(vector.interrupt.set(self.interrupts.create()?));
        }
        vector.interrupt.get().map(|interrupt| &**interrupt).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Takes all routes away, once the guest has turned MSI-X off.
    fn unroute(&self) {
        self.vectors.iter().for_each(take_away);
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a vector's route away.
fn take_away(vector: &Vector) {
    if let Some(interrupt) = vector.interrupt.get()
        && let Err(e) = interrupt.set(None)
    {
        tracing::warn!("taking an MSI-X route away: {e}");
    }
}

impl Vector {
    fn ring(&self) {
        if let Some(interrupt) = self.interrupt.get()
            && let Err(e) = interrupt.event().write(1)
        {
            tracing::warn!("interrupting the guest: {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::virtio::testing::FakeInterrupts;

    const ENABLED: u16 = CONTROL_ENABLE;

    fn vectors(count: u16) -> (FakeInterrupts, MsixVectors) {
        let interrupts = FakeInterrupts::new();
        let msix = MsixVectors::new(Arc::new(interrupts.clone()), count);
        (interrupts, msix)
    }

    fn program(msix: &MsixVectors, vector: u64, data: u32, masked: bool) {
        msix.write_table(vector * 16, &0xfee0_1000_u64.to_le_bytes());
        msix.write_table(vector * 16 + 8, &data.to_le_bytes());
        msix.write_table(vector * 16 + 12, &u32::from(masked).to_le_bytes());
    }

    fn pending(msix: &MsixVectors) -> u64 {
        let mut data = [0; 8];
        msix.read_pending(0, &mut data);
        u64::from_le_bytes(data)
    }

    #[test]
    fn nothing_is_routed_before_all_masks_are_off() {
        let (interrupts, msix) = vectors(3);
        program(&msix, 1, 0x41, false);
        msix.set_control(ENABLED | CONTROL_FUNCTION_MASK);
        msix.signal(1);
        assert_eq!((interrupts.count(), pending(&msix)), (0, 2));
        msix.set_control(ENABLED);
        assert_eq!(interrupts.message(0), Some(MsiMessage { address: 0xfee0_1000, data: 0x41 }));
        assert_eq!((interrupts.take(0), pending(&msix)), (1, 0));
        msix.signal(1);
        msix.signal(2);
        msix.signal(3);
        assert_eq!((interrupts.take(0), pending(&msix), interrupts.count()), (1, 4, 1));
        msix.clear_pending();
        assert_eq!(pending(&msix), 0);
        msix.set_control(0);
        assert_eq!(interrupts.message(0), None);
        msix.signal(1);
        assert_eq!(interrupts.take(0), 0);
    }

    #[test]
    fn a_new_message_is_set_at_unmasking() {
        let (interrupts, msix) = vectors(1);
        msix.set_control(ENABLED);
        program(&msix, 0, 0x41, false);
        msix.write_table(12, &1_u32.to_le_bytes());
        program(&msix, 0, 0x42, true);
        assert_eq!((interrupts.settings(), interrupts.message(0).unwrap().data), (1, 0x41));
        msix.write_table(12, &0_u32.to_le_bytes());
        assert_eq!((interrupts.settings(), interrupts.message(0).unwrap().data), (2, 0x42));
    }

    #[test]
    fn the_table_is_masked_at_first_and_takes_only_aligned_accesses() {
        let (_, msix) = vectors(2);
        let mut entry = [0; 8];
        msix.read_table(8, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0]);
        msix.write_table(0, &[1, 2]);
        msix.write_table(4, &[0xff; 8]);
        msix.write_table(32, &[0xff; 4]);
        msix.read_table(0, &mut entry);
        assert_eq!(entry, [0; 8]);
        let mut data = [0; 4];
        msix.read_table(32, &mut data);
        assert_eq!(data, [0xff; 4]);
        msix.write_table(0, &[0xff; 8]);
        msix.write_table(8, &[0xff; 8]);
        msix.read_table(0, &mut entry);
        assert_eq!(entry, [0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        msix.read_table(8, &mut entry);
        assert_eq!(entry, [0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }

    #[test]
    fn no_interrupt_is_lost_to_an_unmasking_in_the_middle() {
        const ROUNDS: u64 = 2000;
        let (interrupts, msix) = vectors(1);
        msix.set_control(ENABLED);
        program(&msix, 0, 0x41, false);
        let msix = Arc::new(msix);
        let device = Arc::clone(&msix);
        let thread = std::thread::spawn(move || (0..ROUNDS).for_each(|_| device.signal(0)));
        while !thread.is_finished() {
            msix.write_table(12, &1_u32.to_le_bytes());
            msix.write_table(12, &0_u32.to_le_bytes());
        }
        thread.join().unwrap();
        assert_eq!(pending(&msix), 0, "unmasked, so nothing may be left pending");
        assert!(interrupts.take(0) > 0);
    }

    proptest! {
        #[test]
        fn no_access_panics_and_state_survives_saving(
            count in 1..70_u16,
            accesses in proptest::collection::vec((0..4_u8, any::<u64>(), 0..2048_u64, proptest::collection::vec(any::<u8>(), 1..9)), 0..100),
        ) {
            let (_interrupts, msix) = vectors(count);
            for (kind, far, near, mut data) in accesses {
                let offset = if kind == 0 { far } else { near };
                msix.write_table(offset, &data);
                msix.read_table(offset, &mut data);
                msix.read_pending(offset, &mut data);
                msix.set_control(u16::from_le_bytes([0, data[0]]));
                msix.signal(u16::from(data[0]));
            }
            let saved = msix.save();
            let (_interrupts, copy) = vectors(count);
            copy.restore(&saved).unwrap();
            prop_assert_eq!(copy.save(), saved.clone());
            let (_interrupts, other) = vectors(count + 1);
            prop_assert!(other.restore(&saved).is_err());
        }
    }
}
