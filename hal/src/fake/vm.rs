//! A scripted VM: memory, interrupts, doorbells, launch, dirty pages and clock.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use super::launch::LaunchState;
use super::vcpu::FakeVcpu;
use super::{Bell, Call, MappedSlot, Route, RouteId, State, TSC_KHZ, VmNumber, World, new_event};
use crate::{
    Ability, DirtyLog, DirtyTracking, Doorbell, DoorbellMatch, Error, GpaRange, IoAddr, Irqs, KindName, KindTraits,
    Launch, Memory, MsiMessage, MsiRoute, Result, SharedRanges, Slot, SlotId, Vcpu, VcpuId, Visibility, Vm, VmSpec,
    VmState,
};

const PAGE: u64 = 4096;
const PINS: u8 = 24;

/// A scripted VM.
pub(super) struct FakeVm(Arc<Shared>);

/// What lives until the VM's last part is dropped.
pub(super) struct Shared {
    pub(super) world: Arc<World>,
    number: VmNumber,
    kind: KindName,
    max_vcpus: u32,
    dirty_tracking: DirtyTracking,
    vcpus: Mutex<BTreeSet<VcpuId>>,
    /// What a confidential kind has shared, and how far its launch is.
    shared: Mutex<SharedRanges>,
    pub(super) launch: Mutex<LaunchState>,
    clock: AtomicU64,
    routes_held: Arc<AtomicUsize>,
}

impl FakeVm {
    pub(super) fn create(world: &Arc<World>, spec: &VmSpec) -> Result<Self> {
        let kind = spec.kind.name();
        world.call(Call::Create { kind, max_vcpus: spec.max_vcpus, dirty_tracking: spec.dirty_tracking })?;
        check(world, spec)?;
        let mut state = world.state();
        state.created_vms += 1;
        state.live_vms += 1;
        Ok(Self(Arc::new(Shared {
            world: world.clone(),
            number: VmNumber(state.created_vms),
            kind,
            max_vcpus: spec.max_vcpus,
            dirty_tracking: spec.dirty_tracking,
            vcpus: Mutex::default(),
            shared: Mutex::default(),
            launch: Mutex::default(),
            clock: AtomicU64::new(0),
            routes_held: Arc::default(),
        })))
    }
}

fn check(world: &World, spec: &VmSpec) -> Result<()> {
    let (caps, kind) = (&world.caps, spec.kind.name());
    let tracking = caps.dirty_tracking;
    let problem = if !caps.kinds.contains(&kind) {
        format!("VMs of the kind {kind} are not in its script")
    } else if spec.max_vcpus == 0 || spec.max_vcpus > caps.max_vcpus {
        format!("{} vCPUs were asked for, and it allows 1 to {}", spec.max_vcpus, caps.max_vcpus)
    } else {
        match spec.dirty_tracking {
            DirtyTracking::Bitmap | DirtyTracking::Ring { .. } if !kind.traits().has(Ability::DirtyLog) => {
                format!("a VM of the kind {kind} has no log of written pages")
            }
            DirtyTracking::Bitmap if !tracking.bitmap => "it keeps no dirty bitmaps".into(),
            DirtyTracking::Ring { entries } if !entries.is_power_of_two() || entries > tracking.ring_entries => {
                format!("a dirty ring of {entries} entries was asked for, and it allows {}", tracking.ring_entries)
            }
            _ => return Ok(()),
        }
    };
    Err(Error::Unsupported(problem))
}

impl Vm for FakeVm {
    fn kind(&self) -> &KindTraits {
        self.0.kind.traits()
    }

    fn memory(&self) -> &dyn Memory {
        &*self.0
    }

    fn irqs(&self) -> &dyn Irqs {
        &self.0
    }

    fn tsc_khz(&self) -> Option<u32> {
        Some(TSC_KHZ)
    }

    fn create_vcpu(&self, id: VcpuId) -> Result<Box<dyn Vcpu>> {
        self.0.world.call(Call::CreateVcpu(id))?;
        let refused = |problem| Err(Error::Invalid { what: "vCPU", problem });
        if u32::from(id.0) >= self.0.max_vcpus {
            return refused(format!("number {} was asked for, and this VM has {}", id.0, self.0.max_vcpus));
        }
        if self.0.launch().has_begun() {
            return refused(format!("number {} comes after the launch has begun", id.0));
        }
        let mut vcpus = self.0.vcpus.lock().unwrap_or_else(PoisonError::into_inner);
        if !vcpus.insert(id) {
            return refused(format!("number {} exists", id.0));
        }
        Ok(Box::new(FakeVcpu::create(&self.0, id, self.0.has(Ability::Registers))?))
    }

    fn launch(&self) -> Option<&dyn Launch> {
        self.0.is_launched().then_some(&*self.0 as &dyn Launch)
    }

    fn dirty_log(&self) -> Option<&dyn DirtyLog> {
        (self.0.dirty_tracking != DirtyTracking::Off).then_some(&*self.0 as &dyn DirtyLog)
    }

    fn state(&self) -> Option<&dyn VmState> {
        self.0.has(Ability::Registers).then_some(&*self.0 as &dyn VmState)
    }
}

impl Shared {
    /// Whether the VM's kind has an ability.
    pub(super) fn has(&self, ability: Ability) -> bool {
        self.kind.traits().has(ability)
    }

    /// Whether a launch chooses the first instruction.
    pub(super) fn is_launched(&self) -> bool {
        self.kind.traits().boot == crate::Boot::Measured
    }

    pub(super) fn launch(&self) -> MutexGuard<'_, LaunchState> {
        self.launch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn shared(&self) -> MutexGuard<'_, SharedRanges> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The vCPUs that there are.
    pub(super) fn vcpus(&self) -> BTreeSet<VcpuId> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether a range is private memory of one slot.
    pub(super) fn is_private(&self, range: GpaRange) -> bool {
        let len = usize::try_from(range.len).unwrap_or(usize::MAX);
        let mut state = self.world.state();
        self.slot_at(&mut state, range.start, len).is_some() && !self.shared().overlaps(range)
    }

    /// A guest's write of memory; `false` where no slot takes it.
    pub(super) fn write_memory(&self, gpa: u64, data: &[u8]) -> bool {
        let mut state = self.world.state();
        let Some(mapped) = self.slot_at(&mut state, gpa, data.len()) else { return false };
        if mapped.slot.readonly {
            return false;
        }
        let offset = gpa - mapped.slot.range().start;
        if mapped.slot.region.write_slice(data, MemoryRegionAddress(offset)).is_err() {
            return false;
        }
        if mapped.slot.log_dirty {
            let last = offset + u64::try_from(data.len()).unwrap_or(0).max(1) - 1;
            for page in offset / PAGE..=last / PAGE {
                let word = usize::try_from(page / 64).ok().and_then(|word| mapped.dirty.get_mut(word));
                if let Some(word) = word {
                    *word |= 1 << (page % 64);
                }
            }
        }
        true
    }

    /// A guest's read of memory; `false` where no slot has it.
    pub(super) fn read_memory(&self, gpa: u64, data: &mut [u8]) -> bool {
        let mut state = self.world.state();
        let Some(mapped) = self.slot_at(&mut state, gpa, data.len()) else { return false };
        let offset = MemoryRegionAddress(gpa - mapped.slot.range().start);
        mapped.slot.region.read_slice(data, offset).is_ok()
    }

    /// The slot that holds all of a range.
    fn slot_at<'a>(&self, state: &'a mut State, gpa: u64, len: usize) -> Option<&'a mut MappedSlot> {
        let end = gpa.checked_add(u64::try_from(len).ok()?)?;
        let mut own = state.slots.iter_mut().filter(|((vm, _), _)| *vm == self.number).map(|(_, mapped)| mapped);
        own.find(|mapped| {
            let GpaRange { start, len } = mapped.slot.range();
            start <= gpa && end <= start + len
        })
    }

    /// Signals the doorbell that a write rings.
    pub(super) fn ring(&self, at: IoAddr, data: &[u8]) -> bool {
        let state = self.world.state();
        let rung = state.bells.iter().find(|bell| {
            let matches = match bell.on {
                DoorbellMatch::Any => true,
                DoorbellMatch::U16(value) => data == value.to_le_bytes(),
                DoorbellMatch::U32(value) => data == value.to_le_bytes(),
            };
            bell.vm == self.number && bell.at == at && matches
        });
        // A full counter has been signalled already.
        rung.map(|bell| bell.event.write(1)).is_some()
    }

    pub(super) fn drop_vcpu(&self, id: VcpuId) {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let mut state = self.world.state();
        state.slots.retain(|(vm, _), _| *vm != self.number);
        state.live_vms -= 1;
        // A drop cannot fail; an injected failure would have no one to go to.
        let _ = state.call(Call::DropVm);
    }
}

fn bad_slot(problem: String) -> Error {
    Error::Invalid { what: "memory slot", problem }
}

impl Memory for Shared {
    fn map(&self, slot: Slot) -> Result<SlotId> {
        let mut state = self.world.state();
        let range = slot.range();
        let free = (0..self.world.caps.max_memory_slots)
            .map(SlotId)
            .find(|id| !state.slots.contains_key(&(self.number, *id)))
            .ok_or_else(|| bad_slot(format!("all {} slots are in use", self.world.caps.max_memory_slots)))?;
        let (readonly, log_dirty) = (slot.readonly, slot.log_dirty);
        state.call(Call::Map { slot: free, range, readonly, log_dirty })?;
        if range.len == 0 || !range.start.is_multiple_of(PAGE) || !range.len.is_multiple_of(PAGE) {
            return Err(bad_slot(format!("{:#x} + {:#x} must be multiples of {PAGE}", range.start, range.len)));
        }
        let mut own = state.slots.iter().filter(|((vm, _), _)| *vm == self.number).map(|(_, m)| m.slot.range());
        if let Some(other) = own.find(|o| o.start < range.start + range.len && range.start < o.start + o.len) {
            return Err(bad_slot(format!("{:#x} overlaps a slot at {:#x}", range.start, other.start)));
        }
        if readonly && !self.has(Ability::ReadonlyMemory) {
            return Err(bad_slot(format!("a VM of the kind {} has no read-only memory", self.kind)));
        }
        if log_dirty && self.dirty_tracking == DirtyTracking::Off {
            return Err(bad_slot("a dirty log was asked for in a VM created without".into()));
        }
        let words = usize::try_from(slot.region.len().div_ceil(PAGE * 64)).unwrap_or(0);
        state.slots.insert((self.number, free), MappedSlot { slot, dirty: vec![0; words] });
        if self.kind.traits().private_memory && self.kind.traits().begins() == Visibility::Shared {
            self.shared().insert(range);
        }
        Ok(free)
    }

    fn unmap(&self, id: SlotId) -> Result<Slot> {
        let mut state = self.world.state();
        state.call(Call::Unmap(id))?;
        let mapped = state.slots.remove(&(self.number, id));
        let slot = mapped.map(|mapped| mapped.slot).ok_or_else(|| bad_slot(format!("there is no slot {}", id.0)))?;
        self.shared().remove(slot.range());
        Ok(slot)
    }

    fn convert(&self, range: GpaRange, to: Visibility) -> Result<()> {
        let mut state = self.world.state();
        state.call(Call::Convert { range, to })?;
        let refused = |problem: &str| Err(Error::Invalid { what: "visibility", problem: problem.into() });
        if !self.kind.traits().private_memory {
            return refused("this kind of VM has no private memory");
        }
        let GpaRange { start, len } = range;
        if !start.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) || start.checked_add(len).is_none() {
            return refused("the range is not of whole pages");
        }
        let own = state.slots.iter().filter(|((vm, _), _)| *vm == self.number).map(|(_, mapped)| mapped.slot.range());
        let mapped: Vec<_> = own.filter_map(|slot| slot.common(range)).collect();
        if to == Visibility::Private && mapped.iter().map(|part| part.len).sum::<u64>() != len {
            return refused("the range is not mapped");
        }
        for part in mapped {
            match to {
                Visibility::Private => self.shared().remove(part),
                Visibility::Shared => self.shared().insert(part),
            }
        }
        Ok(())
    }

    fn is_shared(&self, range: GpaRange) -> bool {
        !self.kind.traits().private_memory || self.shared().contains(range)
    }

    fn shared(&self) -> Vec<GpaRange> {
        self.shared().ranges()
    }
}

impl DirtyLog for Shared {
    fn collect(&self, slot: SlotId) -> Result<Vec<u64>> {
        let mut state = self.world.state();
        state.call(Call::CollectDirty(slot))?;
        match state.slots.get_mut(&(self.number, slot)) {
            Some(mapped) if mapped.slot.log_dirty => {
                let clean = vec![0; mapped.dirty.len()];
                Ok(std::mem::replace(&mut mapped.dirty, clean))
            }
            Some(_) => Err(bad_slot(format!("slot {} keeps no dirty log", slot.0))),
            None => Err(bad_slot(format!("there is no slot {}", slot.0))),
        }
    }
}

impl VmState for Shared {
    fn clock(&self) -> Result<u64> {
        self.world.call(Call::Clock)?;
        Ok(self.clock.load(Ordering::SeqCst))
    }

    fn set_clock(&self, nanoseconds: u64) -> Result<()> {
        self.world.call(Call::SetClock(nanoseconds))?;
        self.clock.store(nanoseconds, Ordering::SeqCst);
        Ok(())
    }
}

struct FakeRoute {
    vm: Arc<Shared>,
    id: RouteId,
    event: Arc<EventFd>,
}

impl FakeRoute {
    fn create(vm: &Arc<Shared>, pin: Option<u8>) -> Result<Box<dyn MsiRoute>> {
        let event = Arc::new(new_event().map_err(|error| Error::system("eventfd", error))?);
        let mut state = vm.world.state();
        let id = RouteId(state.created_routes);
        state.call(match pin {
            Some(pin) => Call::Line { route: id, pin },
            None => Call::Msi(id),
        })?;
        if let Some(pin) = pin {
            let taken = state.routes.values().any(|route| route.vm == vm.number && route.pin == Some(pin));
            if pin >= PINS || taken {
                let problem = format!("{pin} {}", if taken { "is taken" } else { "is not one of 0 to 23" });
                return Err(Error::Invalid { what: "I/O APIC pin", problem });
            }
        }
        state.created_routes += 1;
        state.routes.insert(id, Route { vm: vm.number, pin, message: None, event: event.clone() });
        vm.routes_held.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Self { vm: vm.clone(), id, event }))
    }
}

impl MsiRoute for FakeRoute {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn set(&self, message: Option<MsiMessage>) -> Result<()> {
        let mut state = self.vm.world.state();
        state.call(Call::SetMessage { route: self.id, message })?;
        if let Some(route) = state.routes.get_mut(&self.id) {
            route.message = message;
        }
        state.notify();
        Ok(())
    }
}

impl Drop for FakeRoute {
    fn drop(&mut self) {
        let mut state = self.vm.world.state();
        let _ = state.call(Call::DropRoute(self.id));
        state.routes.remove(&self.id);
        self.vm.routes_held.fetch_sub(1, Ordering::Relaxed);
        state.notify();
    }
}

struct FakeDoorbell {
    vm: Arc<Shared>,
    at: IoAddr,
    on: DoorbellMatch,
    event: Arc<EventFd>,
}

impl Doorbell for FakeDoorbell {
    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for FakeDoorbell {
    fn drop(&mut self) {
        let mut state = self.vm.world.state();
        let _ = state.call(Call::DropDoorbell { at: self.at, on: self.on });
        state.bells.retain(|bell| !Arc::ptr_eq(&bell.event, &self.event));
    }
}

impl Irqs for Arc<Shared> {
    fn msi(&self) -> Result<Box<dyn MsiRoute>> {
        FakeRoute::create(self, None)
    }

    fn line(&self, pin: u8) -> Result<Box<dyn MsiRoute>> {
        FakeRoute::create(self, Some(pin))
    }

    fn doorbell(&self, at: IoAddr, on: DoorbellMatch, event: EventFd) -> Result<Box<dyn Doorbell>> {
        let mut state = self.world.state();
        state.call(Call::Doorbell { at, on })?;
        let collides = |bell: &Bell| {
            let any = bell.on == DoorbellMatch::Any || on == DoorbellMatch::Any;
            bell.vm == self.number && bell.at == at && (any || bell.on == on)
        };
        if state.bells.iter().any(collides) {
            return Err(Error::system("doorbell", io::Error::from(io::ErrorKind::AlreadyExists)));
        }
        let event = Arc::new(event);
        state.bells.push(Bell { vm: self.number, at, on, event: event.clone() });
        Ok(Box::new(FakeDoorbell { vm: self.clone(), at, on, event }))
    }

    fn routes_held(&self) -> Arc<AtomicUsize> {
        self.routes_held.clone()
    }
}
