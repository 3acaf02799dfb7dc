//! A scripted hypervisor: the traits of this crate without a host's help, for tests of everything above them.
//!
//! A test makes a [`Fake`], writes what each vCPU's guest will do ([`Fake::script`]) and hands it, as a
//! [`Hypervisor`], to what it tests. Then it looks: at every call in order ([`Fake::calls`]), at what the guest read
//! ([`Fake::reads`]), at interrupts ([`Fake::wait_for`]), doorbells and memory, at what is still alive
//! ([`Fake::live`]). Any call can be made to fail ([`Fake::fail_at`]). Drops are calls too, so that order and leaks
//! show. Kicks are not, since they come from other threads at any time.
//!
//! ```
//! use hal::fake::{Call, Fake, Step};
//! use hal::{Hypervisor, VcpuId, VmSpec};
//!
//! let fake = Fake::new();
//! fake.script(VcpuId(0), [Step::pio_write(0x3f8, b"A"), Step::Shutdown]);
//! let vm = fake.create(&VmSpec { max_vcpus: 1, ..Default::default() }).unwrap();
//! drop(vm);
//! assert_eq!(fake.calls().last(), Some(&Call::DropVm));
//! ```

mod launch;
mod vcpu;
mod vm;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub use vcpu::{GuestAnswer, GuestRead, Step};

use crate::{
    CpuidEntry, DirtyTracking, DirtyTrackingCaps, DoorbellMatch, Error, GpaRange, HostCaps, Hypervisor, IoAddr,
    KindName, MsiMessage, ResetState, Result, Slot, SlotId, VcpuId, Visibility, Vm, VmSpec,
};

/// The time stamp counter of every scripted VM, in kHz.
pub const TSC_KHZ: u32 = 2_000_000;

/// A call of the hypervisor's traits, as the log holds it. A call that fails is in the log, too.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "each variant is the method of that name with its arguments")]
pub enum Call {
    Create {
        kind: KindName,
        max_vcpus: u32,
        dirty_tracking: DirtyTracking,
    },
    Map {
        slot: SlotId,
        range: GpaRange,
        readonly: bool,
        log_dirty: bool,
    },
    Unmap(SlotId),
    Convert {
        range: GpaRange,
        to: Visibility,
    },
    CreateVcpu(VcpuId),
    /// What it was reset to is told by [`Fake::reset_of`].
    Reset(VcpuId),
    Run(VcpuId),
    StoodStill(VcpuId),
    Save(VcpuId),
    Restore(VcpuId),
    Msi(RouteId),
    Line {
        route: RouteId,
        pin: u8,
    },
    SetMessage {
        route: RouteId,
        message: Option<MsiMessage>,
    },
    Doorbell {
        at: IoAddr,
        on: DoorbellMatch,
    },
    CollectDirty(SlotId),
    Clock,
    SetClock(u64),
    LaunchBegin {
        hand_off: u64,
    },
    LaunchAdd {
        range: GpaRange,
        bytes: usize,
        measured: bool,
    },
    LaunchFinish,
    DropVcpu(VcpuId),
    DropRoute(RouteId),
    DropDoorbell {
        at: IoAddr,
        on: DoorbellMatch,
    },
    /// A VM goes when the last of its handles, vCPUs, routes and doorbells is gone.
    DropVm,
}

/// The name of an interrupt route. Names are never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RouteId(pub u32);

/// A live interrupt route, as a test sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RouteView {
    /// Its name.
    pub id: RouteId,
    /// The I/O APIC pin that it stands for; `None` for a plain message-signalled interrupt.
    pub pin: Option<u8>,
    /// Its message; `None` while it is masked.
    pub message: Option<MsiMessage>,
}

/// How much is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[expect(missing_docs, reason = "the names say all")]
pub struct Live {
    pub vms: usize,
    pub vcpus: usize,
    pub slots: usize,
    pub routes: usize,
    pub doorbells: usize,
}

/// A scripted hypervisor. Clones share everything.
#[derive(Clone)]
pub struct Fake(Arc<World>);

/// What a [`Fake`], its VMs and all their parts share.
struct World {
    caps: HostCaps,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    failures: Vec<Failure>,
    scripts: HashMap<VcpuId, VecDeque<Step>>,
    reads: HashMap<VcpuId, Vec<GuestRead>>,
    answers: HashMap<VcpuId, Vec<GuestAnswer>>,
    resets: HashMap<VcpuId, ResetState>,
    slots: BTreeMap<(VmNumber, SlotId), MappedSlot>,
    routes: BTreeMap<RouteId, Route>,
    bells: Vec<Bell>,
    /// Told when routes or their messages change.
    watchers: Vec<Weak<EventFd>>,
    created_vms: u32,
    created_routes: u32,
    live_vms: usize,
    live_vcpus: usize,
}

/// Tells VMs of one [`Fake`] apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct VmNumber(u32);

struct MappedSlot {
    slot: Slot,
    /// One bit a page, as [`crate::DirtyLog::collect`] gives them.
    dirty: Vec<u64>,
}

struct Route {
    vm: VmNumber,
    pin: Option<u8>,
    message: Option<MsiMessage>,
    event: Arc<EventFd>,
}

struct Bell {
    vm: VmNumber,
    at: IoAddr,
    on: DoorbellMatch,
    event: Arc<EventFd>,
}

struct Failure {
    at: Box<dyn FnMut(&Call) -> bool + Send>,
    error: Option<Error>,
}

impl Fake {
    /// A host that can do everything plain VMs need, on a processor with few but real CPUID leaves.
    pub fn new() -> Self {
        Self::with_caps(HostCaps {
            backend: "a script",
            kinds: vec![KindName::Standard],
            max_vcpus: 254,
            physical_address_bits: 46,
            cpuid: cpuid(),
            tsc_deadline: true,
            dirty_tracking: DirtyTrackingCaps { bitmap: true, ring_entries: 65536 },
            max_memory_slots: 512,
        })
    }

    /// A host with these abilities. Creating a VM beyond them is refused, as on a real one.
    pub fn with_caps(caps: HostCaps) -> Self {
        Self(Arc::new(World { caps, state: Mutex::default() }))
    }

    /// Adds to what the guest does on a vCPU, in this VM or the next. When nothing is left to do it halts.
    pub fn script(&self, vcpu: VcpuId, steps: impl IntoIterator<Item = Step>) {
        let mut state = self.0.state();
        state.scripts.entry(vcpu).or_default().extend(steps);
        // A vCPU that halts may have something to do now.
        state.notify();
    }

    /// Makes the next call that `at` accepts fail with `error`, once. `at` sees each call until then, so that it can
    /// count; an earlier `fail_at` that is still waiting goes first.
    pub fn fail_at(&self, at: impl FnMut(&Call) -> bool + Send + 'static, error: Error) {
        self.0.state().failures.push(Failure { at: Box::new(at), error: Some(error) });
    }

    /// All calls so far, in order.
    pub fn calls(&self) -> Vec<Call> {
        self.0.state().calls.clone()
    }

    /// What the guest read on a vCPU, in order.
    pub fn reads(&self, vcpu: VcpuId) -> Vec<GuestRead> {
        self.0.state().reads.get(&vcpu).cloned().unwrap_or_default()
    }

    /// What the guest was answered on a vCPU when it asked for a conversion or made a call, in order.
    pub fn answers(&self, vcpu: VcpuId) -> Vec<GuestAnswer> {
        self.0.state().answers.get(&vcpu).cloned().unwrap_or_default()
    }

    /// What a vCPU was last reset to.
    pub fn reset_of(&self, vcpu: VcpuId) -> Option<ResetState> {
        self.0.state().resets.get(&vcpu).cloned()
    }

    /// The routes that are alive, oldest first.
    pub fn routes(&self) -> Vec<RouteView> {
        let state = self.0.state();
        state.routes.iter().map(|(id, route)| RouteView { id: *id, pin: route.pin, message: route.message }).collect()
    }

    /// The doorbells that are alive, oldest first.
    pub fn doorbells(&self) -> Vec<(IoAddr, DoorbellMatch)> {
        self.0.state().bells.iter().map(|bell| (bell.at, bell.on)).collect()
    }

    /// The guest physical addresses that are mapped, by slot.
    pub fn slots(&self) -> Vec<(SlotId, GpaRange)> {
        self.0.state().slots.iter().map(|((_, id), mapped)| (*id, mapped.slot.range())).collect()
    }

    /// Writes to a guest's memory, as the guest would, or reads it: `access` is given the region and where in it `gpa` is.
    ///
    /// # Panics
    /// Where no memory is mapped there.
    pub fn memory<T>(&self, gpa: u64, access: impl FnOnce(&GuestRegionMmap, MemoryRegionAddress) -> T) -> T {
        let at = |slot: &Slot| slot.region.to_region_addr(GuestAddress(gpa)).map(|at| (slot.region.clone(), at));
        let found = self.0.state().slots.values().find_map(|mapped| at(&mapped.slot));
        let (region, at) = found.unwrap_or_else(|| panic!("no memory at {gpa:#x}"));
        access(&region, at)
    }

    /// How much is alive.
    pub fn live(&self) -> Live {
        let state = self.0.state();
        Live {
            vms: state.live_vms,
            vcpus: state.live_vcpus,
            slots: state.slots.len(),
            routes: state.routes.len(),
            doorbells: state.bells.len(),
        }
    }

    /// Waits until a route that has this message is signalled, and takes the signal. Says whether it came in time.
    ///
    /// # Errors
    /// The operating system's, where it has no event or epoll descriptor left.
    pub fn wait_for(&self, message: MsiMessage, timeout: Duration) -> io::Result<bool> {
        let wake = Arc::new(new_event()?);
        self.0.watch(&wake);
        let deadline = Instant::now() + timeout;
        loop {
            if self.0.take_interrupt(message) {
                return Ok(true);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            self.0.wait(&wake, Some(message), Some(left))?;
        }
    }
}

impl Default for Fake {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Fake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fake").field(&self.live()).finish()
    }
}

impl Hypervisor for Fake {
    fn caps(&self) -> &HostCaps {
        &self.0.caps
    }

    fn create(&self, spec: &VmSpec) -> Result<Box<dyn Vm>> {
        Ok(Box::new(vm::FakeVm::create(&self.0, spec)?))
    }

    fn missing(&self, kind: KindName) -> Option<String> {
        let there = self.0.caps.kinds.contains(&kind);
        (!there).then(|| format!("VMs of the kind {kind} are not in its script"))
    }
}

impl World {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs a call, and fails it if a test wants so.
    fn call(&self, call: Call) -> Result<()> {
        self.state().call(call)
    }

    /// Has `wake` written whenever routes change.
    fn watch(&self, wake: &Arc<EventFd>) {
        self.state().watchers.push(Arc::downgrade(wake));
    }

    /// Takes a signal from a route with this message.
    fn take_interrupt(&self, message: MsiMessage) -> bool {
        self.state().with_message(message).any(|event| event.read().is_ok())
    }

    /// Waits until `wake` is written, which is taken, or a route with `message` is signalled, which is not.
    fn wait(&self, wake: &EventFd, message: Option<MsiMessage>, timeout: Option<Duration>) -> io::Result<()> {
        let epoll = Epoll::new()?;
        let add = |event: &EventFd| {
            let fd = event.as_raw_fd();
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))
        };
        add(wake)?;
        // Kept until the wait is over: a route that is dropped meanwhile must not take its descriptor with it.
        let events: Vec<_> = message.map(|m| self.state().with_message(m).cloned().collect()).unwrap_or_default();
        for event in &events {
            add(event)?;
        }
        // Rounded up, so that a short rest of a wait is not spent turning around.
        let timeout = timeout.map_or(-1, |left| i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX));
        match epoll.wait(timeout, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
            _ => {}
        }
        // Empty where a route ended the wait.
        let _ = wake.read();
        Ok(())
    }
}

impl State {
    fn call(&mut self, call: Call) -> Result<()> {
        let failure = self.failures.iter_mut().position(|failure| (failure.at)(&call));
        self.calls.push(call);
        match failure.and_then(|index| self.failures.remove(index).error) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// The events of routes that have this message.
    fn with_message(&self, message: MsiMessage) -> impl Iterator<Item = &Arc<EventFd>> {
        self.routes.values().filter(move |route| route.message == Some(message)).map(|route| &route.event)
    }

    fn notify(&mut self) {
        self.watchers.retain(|watcher| watcher.strong_count() > 0);
        for wake in self.watchers.iter().filter_map(Weak::upgrade) {
            // A full counter has woken its reader already.
            let _ = wake.write(1);
        }
    }
}

fn new_event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)
}

/// The leaves of a small Intel processor under KVM: enough for what builds a guest's CPUID from a host's.
fn cpuid() -> Vec<CpuidEntry> {
    let leaf = |function, index, [eax, ebx, ecx, edx]: [u32; 4]| CpuidEntry { function, index, eax, ebx, ecx, edx };
    let text = |four: [u8; 4]| u32::from_le_bytes(four);
    vec![
        leaf(0, None, [0x1f, text(*b"Genu"), text(*b"ntel"), text(*b"ineI")]),
        leaf(1, None, [0x000c_06f2, 0x0001_0800, 0xfeda_3203, 0x1f8b_fbff]),
        leaf(4, Some(0), [0x0000_0121, 0x02c0_003f, 0x0000_003f, 0]),
        leaf(7, Some(0), [0, 0x0000_0281, 0, 0]),
        leaf(0xb, Some(0), [0, 1, 0x100, 0]),
        leaf(0xb, Some(1), [0, 1, 0x201, 0]),
        leaf(0xd, Some(0), [7, 0x340, 0x340, 0]),
        leaf(0xd, Some(1), [1, 0x340, 0, 0]),
        leaf(0x15, None, [2, 160, 25_000_000, 0]),
        leaf(0x1f, Some(0), [0, 1, 0x100, 0]),
        leaf(0x4000_0000, None, [0x4000_0001, text(*b"KVMK"), text(*b"VMKV"), text(*b"M\0\0\0")]),
        leaf(0x4000_0001, None, [0x0100_007b, 0, 0, 0]),
        leaf(0x8000_0000, None, [0x8000_0008, 0, 0, 0]),
        leaf(0x8000_0001, None, [0, 0, 0x121, 0x2c10_0800]),
        leaf(0x8000_0008, None, [0x3030, 0, 0, 0]),
    ]
}
