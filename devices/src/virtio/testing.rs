//! The other side of virtio, for tests and fuzz targets: a driver that keeps the rules or breaks them, and the
//! interrupts and doorbells of a machine that is not there.
//!
//! [`PciDriver`] drives a device as a guest would, through configuration space and BAR accesses. [`DriverQueue`] is
//! the driver's half of a ring. Helpers panic where a test has gone wrong; nothing here is for use in a monitor.

mod driver;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::driver::{PciDriver, TIMEOUT};
use super::{QueueState, Result, StateSink, StateSource};
use crate::seam::{Doorbells, Interrupt, Interrupts, MsiMessage};

/// A descriptor continues in its `next`.
pub const NEXT: u16 = 1;
/// A descriptor is device-writable.
pub const WRITE: u16 = 2;
/// A descriptor names an indirect table.
pub const INDIRECT: u16 = 4;

/// A saved state in memory: version and bytes of each section, by its name.
#[derive(Clone, Debug, Default)]
pub struct Sections(pub BTreeMap<String, (u32, Vec<u8>)>);

impl StateSink for Sections {
    fn section(&mut self, name: &str, version: u32, data: &[u8]) -> Result<()> {
        let before = self.0.insert(name.into(), (version, data.into()));
        assert!(before.is_none(), "two sections are called {name}");
        Ok(())
    }
}

impl StateSource for Sections {
    fn section(&mut self, name: &str) -> Result<Option<(u32, Vec<u8>)>> {
        Ok(self.0.get(name).cloned())
    }
}

/// Guest memory of `len` bytes from address 0.
pub fn guest_memory(len: usize) -> GuestMemoryAtomic<GuestMemoryMmap> {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)]);
    GuestMemoryAtomic::new(memory.expect("guest memory"))
}

/// Waits until an event is signalled, and takes the signal. False after `timeout`.
pub fn wait(event: &EventFd, timeout: Duration) -> bool {
    let epoll = Epoll::new().expect("epoll");
    watch(&epoll, event);
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
        match epoll.wait(left, &mut [EpollEvent::default()]) {
            Ok(count) => return count > 0 && event.read().is_ok(),
            // A fuzzer has an alarm clock.
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => panic!("waiting for an event: {e}"),
        }
    }
}

fn watch(epoll: &Epoll, event: &EventFd) {
    let added = epoll.ctl(ControlOperation::Add, event.as_raw_fd(), EpollEvent::new(EventSet::IN, 0));
    added.expect("waiting for an event");
}

struct FakeLine {
    event: EventFd,
    message: Mutex<Option<MsiMessage>>,
    settings: Mutex<u32>,
}

struct Handle(Arc<FakeLine>);

impl Interrupt for Handle {
    fn event(&self) -> &EventFd {
        &self.0.event
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut current = lock(&self.0.message);
        if *current != message {
            *current = message;
            *lock(&self.0.settings) += 1;
        }
        Ok(())
    }
}

/// Interrupts that tests can look at, numbered in the order of their making.
#[derive(Clone, Default)]
pub struct FakeInterrupts(Arc<Mutex<Vec<Arc<FakeLine>>>>);

impl FakeInterrupts {
    /// No interrupts yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A new interrupt.
    pub fn line(&self) -> Box<dyn Interrupt> {
        let line = Arc::new(FakeLine {
            event: EventFd::new(EFD_NONBLOCK).expect("an event"),
            message: Mutex::default(),
            settings: Mutex::default(),
        });
        lock(&self.0).push(Arc::clone(&line));
        Box::new(Handle(line))
    }

    /// How many interrupts were made.
    pub fn count(&self) -> usize {
        lock(&self.0).len()
    }

    /// The message that an interrupt now delivers.
    pub fn message(&self, number: usize) -> Option<MsiMessage> {
        *lock(&lock(&self.0).get(number)?.message)
    }

    /// How often messages were changed, all interrupts together: each costs the hypervisor a call.
    pub fn settings(&self) -> u32 {
        lock(&self.0).iter().map(|line| *lock(&line.settings)).sum()
    }

    /// How often an interrupt was raised since the last look.
    pub fn take(&self, number: usize) -> u64 {
        lock(&self.0).get(number).and_then(|line| line.event.read().ok()).unwrap_or(0)
    }

    /// The event of the interrupt whose message carries `data`.
    pub fn event(&self, data: u32) -> Option<EventFd> {
        let lines = lock(&self.0);
        let mut lines = lines.iter();
        let line = lines.find(|line| lock(&line.message).is_some_and(|message| message.data == data))?;
        line.event.try_clone().ok()
    }
}

impl Interrupts for FakeInterrupts {
    fn create(&self) -> io::Result<Box<dyn Interrupt>> {
        Ok(self.line())
    }
}

type DoorbellTable = Arc<Mutex<HashMap<u64, EventFd>>>;

/// Doorbells that tests ring by hand.
#[derive(Clone, Default)]
pub struct FakeDoorbells(DoorbellTable);

struct FakeDoorbell {
    table: DoorbellTable,
    at: u64,
}

impl Drop for FakeDoorbell {
    fn drop(&mut self) {
        lock(&self.table).remove(&self.at);
    }
}

impl FakeDoorbells {
    /// No doorbells yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A guest's write to `at`. False where no doorbell is there.
    pub fn write(&self, at: u64) -> bool {
        lock(&self.0).get(&at).is_some_and(|event| event.write(1).is_ok())
    }

    /// True where every doorbell that rang has been heard, so that its queue has at least begun to be served.
    pub fn heard(&self) -> bool {
        let table = lock(&self.0);
        let epoll = Epoll::new().expect("epoll");
        for event in table.values() {
            watch(&epoll, event);
        }
        epoll.wait(0, &mut [EpollEvent::default()]).is_ok_and(|ringing| ringing == 0)
    }

    /// The addresses with a doorbell, in order.
    pub fn addresses(&self) -> Vec<u64> {
        let mut addresses: Vec<u64> = lock(&self.0).keys().copied().collect();
        addresses.sort_unstable();
        addresses
    }
}

impl Doorbells for FakeDoorbells {
    fn ring_on_write(&self, at: u64, event: &EventFd) -> io::Result<Box<dyn Send + Sync>> {
        let mut table = lock(&self.0);
        if table.contains_key(&at) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        table.insert(at, event.try_clone()?);
        Ok(Box::new(FakeDoorbell { table: Arc::clone(&self.0), at }))
    }
}

/// A buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Buf {
    /// Guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// The device writes it.
    pub writable: bool,
}

impl Buf {
    /// A buffer that the device reads.
    pub fn readable(address: u64, len: u32) -> Self {
        Self { address, len, writable: false }
    }

    /// A buffer that the device writes.
    pub fn writable(address: u64, len: u32) -> Self {
        Self { address, len, writable: true }
    }
}

/// A chain that the device has returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// The chain's head.
    pub id: u32,
    /// Bytes that the device says it wrote.
    pub len: u32,
}

/// The driver's half of a split ring.
pub struct DriverQueue {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    /// Number of descriptors.
    pub size: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used_ring: u64,
    free: Vec<u16>,
    chains: HashMap<u16, Vec<u16>>,
    next_available: u16,
    next_used: u16,
}

impl DriverQueue {
    /// A ring of `size` descriptors at `base` (a multiple of 16), zeroed. It takes [`DriverQueue::bytes`].
    pub fn new(memory: &GuestMemoryAtomic<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        let available = base + 16 * u64::from(size);
        let used_ring = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let queue = Self {
            memory: memory.clone(),
            size,
            descriptors: base,
            available,
            used_ring,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_available: 0,
            next_used: 0,
        };
        let zeros = vec![0; usize::try_from(Self::bytes(size)).expect("a ring's size")];
        memory.memory().write_slice(&zeros, GuestAddress(base)).expect("a ring in memory");
        queue
    }

    /// Bytes that a ring of `size` descriptors takes.
    pub fn bytes(size: u16) -> u64 {
        16 * u64::from(size) + 6 + 2 * u64::from(size) + 4 + 6 + 8 * u64::from(size)
    }

    /// The state of this ring as a device sees it before its first chain, without EVENT_IDX.
    pub fn state(&self) -> QueueState {
        QueueState {
            max_size: self.size,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used_ring,
            ..QueueState::default()
        }
    }

    /// Writes a descriptor of the ring's table.
    pub fn set_descriptor(&self, index: u16, descriptor: Descriptor) {
        self.set_descriptor_at(self.descriptors + 16 * u64::from(index), descriptor);
    }

    /// Writes a descriptor anywhere, as into an indirect table.
    pub fn set_descriptor_at(&self, address: u64, descriptor: Descriptor) {
        let raw = RawDescriptor::from(descriptor);
        self.memory.memory().write_obj(raw, GuestAddress(address)).expect("a descriptor in memory");
    }

    /// Makes a chain of buffers available and returns its head. Panics where the ring is full.
    pub fn add(&mut self, buffers: &[Buf]) -> u16 {
        let indices: Vec<u16> = buffers.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (at, (buffer, index)) in buffers.iter().zip(&indices).enumerate() {
            let next = indices.get(at + 1).copied();
            self.set_descriptor(*index, descriptor(buffer, next));
        }
        let head = *indices.first().expect("a chain has a buffer");
        self.chains.insert(head, indices);
        self.publish(head);
        head
    }

    /// Makes a chain available whose descriptors are in an indirect table, written at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buf]) -> u16 {
        for (at, buffer) in (0..).zip(buffers) {
            let next = (usize::from(at) + 1 < buffers.len()).then_some(at + 1);
            self.set_descriptor_at(table + 16 * u64::from(at), descriptor(buffer, next));
        }
        let head = self.free.pop().expect("a free descriptor");
        let len = 16 * u32::try_from(buffers.len()).expect("a table's length");
        self.set_descriptor(head, Descriptor::new(table, len, INDIRECT, 0));
        self.chains.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Makes descriptors available just as they are, from index 0 on; `head` need not exist.
    pub fn add_raw(&mut self, descriptors: &[Descriptor], head: u16) {
        for (index, descriptor) in (0..).zip(descriptors) {
            self.set_descriptor(index, *descriptor);
        }
        self.publish(head);
    }

    /// Puts `head` into the available ring.
    pub fn publish(&mut self, head: u16) {
        let slot = self.available + 4 + 2 * u64::from(self.next_available % self.size);
        self.memory.memory().write_obj(head.to_le(), GuestAddress(slot)).expect("the available ring");
        self.jump(1);
    }

    /// Moves the available index, without an entry of the ring.
    pub fn jump(&mut self, by: u16) {
        self.next_available = self.next_available.wrapping_add(by);
        let at = GuestAddress(self.available + 2);
        self.memory.memory().store(self.next_available.to_le(), at, Ordering::Release).expect("the available ring");
    }

    /// Takes a chain that the device has returned.
    pub fn used(&mut self) -> Option<Used> {
        let memory = self.memory.memory();
        let index: u16 = memory.load(GuestAddress(self.used_ring + 2), Ordering::Acquire).expect("the used ring");
        if u16::from_le(index) == self.next_used {
            return None;
        }
        let slot = self.used_ring + 4 + 8 * u64::from(self.next_used % self.size);
        let id: u32 = memory.read_obj(GuestAddress(slot)).expect("the used ring");
        let len: u32 = memory.read_obj(GuestAddress(slot + 4)).expect("the used ring");
        self.next_used = self.next_used.wrapping_add(1);
        let used = Used { id: u32::from_le(id), len: u32::from_le(len) };
        let head = u16::try_from(used.id).ok();
        self.free.extend(head.and_then(|head| self.chains.remove(&head)).into_iter().flatten());
        Some(used)
    }

    /// Asks for an interrupt at the next used chain (with EVENT_IDX). True where one is there already.
    pub fn ask_for_interrupt(&self) -> bool {
        let memory = self.memory.memory();
        let used_event = GuestAddress(self.available + 4 + 2 * u64::from(self.size));
        memory.store(self.next_used.to_le(), used_event, Ordering::SeqCst).expect("the available ring");
        std::sync::atomic::fence(Ordering::SeqCst);
        let index: u16 = memory.load(GuestAddress(self.used_ring + 2), Ordering::Acquire).expect("the used ring");
        u16::from_le(index) != self.next_used
    }

    /// True where the device asks to be kicked for the chain made available last.
    pub fn wants_kick(&self, event_idx: bool) -> bool {
        std::sync::atomic::fence(Ordering::SeqCst);
        let at = match event_idx {
            true => self.used_ring + 4 + 8 * u64::from(self.size),
            false => self.used_ring,
        };
        let value: u16 = self.memory.memory().load(GuestAddress(at), Ordering::SeqCst).expect("the used ring");
        match event_idx {
            true => u16::from_le(value) == self.next_available.wrapping_sub(1),
            false => u16::from_le(value) & 1 == 0,
        }
    }

    /// Sets the available ring's flags: 1 asks for no interrupts (without EVENT_IDX).
    pub fn set_flags(&self, flags: u16) {
        let at = GuestAddress(self.available);
        self.memory.memory().store(flags.to_le(), at, Ordering::SeqCst).expect("the available ring");
    }
}

fn descriptor(buffer: &Buf, next: Option<u16>) -> Descriptor {
    let write = if buffer.writable { WRITE } else { 0 };
    let follow = if next.is_some() { NEXT } else { 0 };
    Descriptor::new(buffer.address, buffer.len, write | follow, next.unwrap_or(0))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
