//! Interrupts that the monitor sends a trust domain by message: at once, or through an event that a route leads from.
//!
//! Events are kept from the real KVM, whose VM has nobody to interrupt.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::c_int;
use std::fmt;
use std::slice;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::abi::{self, Irqfd, Msi, Route, Routing};

/// A message.
#[derive(Clone, Copy)]
pub struct Message {
    address: u64,
    data: u32,
}

impl Message {
    fn new(low: u32, high: u32, data: u32) -> Self {
        Self { address: u64::from(high) << 32 | u64::from(low), data }
    }
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "msi address={:#x} data={:#x}", self.address, self.data)
    }
}

/// What is known of interrupts.
struct Interrupts {
    /// The message of each route, by its number.
    routes: BTreeMap<u32, Message>,
    /// The event that each route is taken from.
    events: BTreeMap<u32, c_int>,
    sent: VecDeque<Message>,
}

static INTERRUPTS: Mutex<Interrupts> =
    Mutex::new(Interrupts { routes: BTreeMap::new(), events: BTreeMap::new(), sent: VecDeque::new() });

fn interrupts() -> MutexGuard<'static, Interrupts> {
    INTERRUPTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// KVM_SIGNAL_MSI.
pub fn signal(msi: &Msi) {
    interrupts().sent.push_back(Message::new(msi.address_low, msi.address_high, msi.data));
}

/// KVM_IRQFD.
pub fn attach(irqfd: &Irqfd) {
    let mut interrupts = interrupts();
    if irqfd.flags & abi::IRQFD_DEASSIGN != 0 {
        interrupts.events.remove(&irqfd.route);
    } else {
        interrupts.events.insert(irqfd.route, irqfd.event.cast_signed());
    }
}

/// KVM_SET_GSI_ROUTING.
///
/// # Safety
/// As many routes as the table says lie behind it.
pub unsafe fn route(table: *const Routing) {
    // SAFETY (of both): the caller's promise.
    let count = usize::try_from(unsafe { (*table).count }).unwrap_or(0);
    let routes = unsafe { slice::from_raw_parts(table.add(1).cast::<Route>(), count) };
    let messages = routes.iter().filter(|route| route.kind == abi::ROUTE_MSI);
    interrupts().routes =
        messages.map(|route| (route.number, Message::new(route.address_low, route.address_high, route.data))).collect();
}

/// The next message, if there is one in time.
pub fn next(patience: Duration) -> Option<Message> {
    let deadline = Instant::now() + patience;
    loop {
        let mut interrupts = interrupts();
        let signalled = interrupts.events.iter().find(|(_, event)| take(**event)).map(|(route, _)| *route);
        let message = signalled.and_then(|route| interrupts.routes.get(&route).copied());
        if let Some(message) = interrupts.sent.pop_front().or(message) {
            return Some(message);
        }
        drop(interrupts);
        if Instant::now() >= deadline {
            return None;
        }
        rest(1);
    }
}

/// Whether an event was signalled, which is no longer so then.
fn take(event: c_int) -> bool {
    let mut poll = libc::pollfd { fd: event, events: libc::POLLIN, revents: 0 };
    let mut count = [0_u8; 8];
    // SAFETY (of both): there is room for what the calls write.
    unsafe { libc::poll(&raw mut poll, 1, 0) == 1 && libc::read(event, count.as_mut_ptr().cast(), 8) == 8 }
}

/// Waits for some milliseconds, by a call that a thread in its sandbox may make. False where a signal came meanwhile.
pub fn rest(milliseconds: c_int) -> bool {
    // SAFETY: there is nothing to look at.
    unsafe { libc::poll(std::ptr::null_mut(), 0, milliseconds) == 0 }
}
