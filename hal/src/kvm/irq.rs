//! Interrupt routes and doorbells.
//!
//! A route is one global interrupt number (GSI) with an irqfd on it. KVM takes its routing table only as a whole, so
//! one lock holds the table and every change goes through [`Routes::change`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KVM_MAX_IRQ_ROUTES, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_irq_routing_msi__bindgen_ty_1,
};
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::failed;
use super::vm::Shared;
use crate::{Doorbell, DoorbellMatch, Error, IoAddr, Irqs, MsiMessage, MsiRoute, Result};

/// Pins of the monitor's I/O APIC, whose routes are the GSIs 0 to 23.
pub(super) const IOAPIC_PINS: u8 = 24;

/// The routing table of a VM.
pub(super) struct Routes {
    table: Mutex<Table>,
    /// How many GSIs are given out.
    held: Arc<AtomicUsize>,
}

struct Table {
    /// The message of each GSI that has one: what the kernel has been told.
    messages: BTreeMap<u32, MsiMessage>,
    /// Pins that are taken.
    pins: u32,
    /// GSIs that were given back, to be used before new ones.
    free: Vec<u32>,
    /// The lowest GSI that was never given out.
    next: u32,
}

impl Routes {
    pub(super) fn new() -> Self {
        let table = Table { messages: BTreeMap::new(), pins: 0, free: Vec::new(), next: IOAPIC_PINS.into() };
        Self { table: Mutex::new(table), held: Arc::default() }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_gsi(&self) -> Result<u32> {
        let mut table = self.table();
        let gsi = match table.free.pop() {
            Some(gsi) => gsi,
            None if usize::try_from(table.next).is_ok_and(|gsi| gsi < KVM_MAX_IRQ_ROUTES) => {
                table.next += 1;
                table.next - 1
            }
            None => {
                let problem = format!("all {KVM_MAX_IRQ_ROUTES} routes of the VM are in use");
                return Err(Error::Invalid { what: "interrupt route", problem });
            }
        };
        self.held.fetch_add(1, Ordering::Relaxed);
        Ok(gsi)
    }

    fn take_pin(&self, pin: u8) -> Result<u32> {
        let refused = |problem| Error::Invalid { what: "I/O APIC pin", problem };
        if pin >= IOAPIC_PINS {
            return Err(refused(format!("{pin} was asked for, and the pins are 0 to {}", IOAPIC_PINS - 1)));
        }
        let mut table = self.table();
        let bit = 1 << pin;
        if table.pins & bit != 0 {
            return Err(refused(format!("{pin} is taken")));
        }
        table.pins |= bit;
        self.held.fetch_add(1, Ordering::Relaxed);
        Ok(pin.into())
    }

    fn give_back(&self, gsi: u32) {
        let mut table = self.table();
        self.held.fetch_sub(1, Ordering::Relaxed);
        if gsi < IOAPIC_PINS.into() {
            table.pins &= !(1 << gsi);
        } else {
            table.free.push(gsi);
        }
    }

    /// Gives `gsi` another message. The order matters: a host has been seen to crash when a route changed under an
    /// attached irqfd, so the irqfd goes first and comes back last. Events written in between stay in the eventfd,
    /// and KVM delivers them when the irqfd is attached again.
    fn change(&self, fd: &VmFd, gsi: u32, event: &EventFd, message: Option<MsiMessage>) -> Result<()> {
        let mut table = self.table();
        let old = table.messages.get(&gsi).copied();
        if old == message {
            return Ok(());
        }
        if old.is_some() {
            fd.unregister_irqfd(event, gsi).map_err(failed("KVM_IRQFD(deassign)"))?;
        }
        match message {
            Some(message) => table.messages.insert(gsi, message),
            None => table.messages.remove(&gsi),
        };
        if let Err(error) = table.load(fd) {
            // The kernel still has the old table, but no irqfd on this route: the same as masked.
            table.messages.remove(&gsi);
            return Err(error);
        }
        if message.is_some() {
            fd.register_irqfd(event, gsi).map_err(|error| {
                // Without an irqfd the route counts as masked; the next change loads the table without it.
                table.messages.remove(&gsi);
                failed("KVM_IRQFD")(error)
            })?;
        }
        Ok(())
    }
}

impl Table {
    fn load(&self, fd: &VmFd) -> Result<()> {
        let entries: Vec<_> = self.messages.iter().map(|(gsi, message)| entry(*gsi, *message)).collect();
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| Error::Invalid {
            what: "interrupt route",
            problem: format!("more than {KVM_MAX_IRQ_ROUTES} routes"),
        })?;
        fd.set_gsi_routing(&table).map_err(failed("KVM_SET_GSI_ROUTING"))
    }
}

fn entry(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let [low, high] = halves(message.address);
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: low,
                address_hi: high,
                data: message.data,
                __bindgen_anon_1: kvm_irq_routing_msi__bindgen_ty_1 { pad: 0 },
            },
        },
        ..Default::default()
    }
}

/// The low and the high 32 bits.
fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// A route on one GSI. While it is masked nothing reads its event, so that an event written then waits.
struct KvmRoute {
    vm: Arc<Shared>,
    gsi: u32,
    event: EventFd,
}

impl KvmRoute {
    fn create(vm: &Arc<Shared>, gsi: u32) -> Result<Box<dyn MsiRoute>> {
        match EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC) {
            Ok(event) => Ok(Box::new(Self { vm: vm.clone(), gsi, event })),
            Err(error) => {
                vm.routes.give_back(gsi);
                Err(Error::system("eventfd", error))
            }
        }
    }
}

impl MsiRoute for KvmRoute {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn set(&self, message: Option<MsiMessage>) -> Result<()> {
        self.vm.routes.change(&self.vm.fd, self.gsi, &self.event, message)
    }
}

impl Drop for KvmRoute {
    fn drop(&mut self) {
        // A route that the kernel refuses to free is not used again.
        if self.set(None).is_ok() {
            self.vm.routes.give_back(self.gsi);
        }
    }
}

/// A guest write that signals an event (`KVM_IOEVENTFD`).
struct KvmDoorbell {
    vm: Arc<Shared>,
    at: IoAddr,
    on: DoorbellMatch,
    event: EventFd,
}

impl Doorbell for KvmDoorbell {
    fn event(&self) -> &EventFd {
        &self.event
    }
}

impl Drop for KvmDoorbell {
    fn drop(&mut self) {
        // It was attached with the same arguments, so nothing is left to be done where this fails.
        let _ = ioeventfd(&self.vm.fd, self.at, self.on, &self.event, Attach::No);
    }
}

enum Attach {
    Yes,
    No,
}

fn ioeventfd(
    fd: &VmFd,
    at: IoAddr,
    on: DoorbellMatch,
    event: &EventFd,
    attach: Attach,
) -> std::result::Result<(), errno::Error> {
    let at = match at {
        IoAddr::Pio(port) => IoEventAddress::Pio(port.into()),
        IoAddr::Mmio(gpa) => IoEventAddress::Mmio(gpa),
    };
    // A match without a value has length 0: any width rings, and KVM looks no further than the address.
    match (attach, on) {
        (Attach::Yes, DoorbellMatch::Any) => fd.register_ioevent(event, &at, NoDatamatch),
        (Attach::Yes, DoorbellMatch::U16(value)) => fd.register_ioevent(event, &at, value),
        (Attach::Yes, DoorbellMatch::U32(value)) => fd.register_ioevent(event, &at, value),
        (Attach::No, DoorbellMatch::Any) => fd.unregister_ioevent(event, &at, NoDatamatch),
        (Attach::No, DoorbellMatch::U16(value)) => fd.unregister_ioevent(event, &at, value),
        (Attach::No, DoorbellMatch::U32(value)) => fd.unregister_ioevent(event, &at, value),
    }
}

impl Irqs for Arc<Shared> {
    fn msi(&self) -> Result<Box<dyn MsiRoute>> {
        KvmRoute::create(self, self.routes.take_gsi()?)
    }

    fn line(&self, pin: u8) -> Result<Box<dyn MsiRoute>> {
        KvmRoute::create(self, self.routes.take_pin(pin)?)
    }

    fn doorbell(&self, at: IoAddr, on: DoorbellMatch, event: EventFd) -> Result<Box<dyn Doorbell>> {
        ioeventfd(&self.fd, at, on, &event, Attach::Yes).map_err(failed("KVM_IOEVENTFD"))?;
        Ok(Box::new(KvmDoorbell { vm: self.clone(), at, on, event }))
    }

    fn routes_held(&self) -> Arc<AtomicUsize> {
        self.routes.held.clone()
    }
}
