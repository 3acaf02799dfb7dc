//! The seam between devices and the hypervisor: interrupts, doorbells and memory of `devices`, on those of `hal`.

use std::io;
use std::sync::Arc;

use devices::seam::{DeviceMemory, Doorbells, Interrupt, Interrupts, MsiMessage};
use hal::{DoorbellMatch, IoAddr, Slot, SlotId, Vm};
use vm_memory::GuestRegionMmap;
use vmm_sys_util::eventfd::EventFd;

/// Interrupts, doorbells and memory of one VM.
#[derive(Clone)]
pub struct VmSeam(pub Arc<dyn Vm>);

/// An interrupt on a route of the hypervisor.
struct Route(Box<dyn hal::MsiRoute>);

impl Interrupt for Route {
    fn event(&self) -> &EventFd {
        self.0.event()
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let message = message.map(|MsiMessage { address, data }| hal::MsiMessage { address, data });
        self.0.set(message).map_err(io::Error::other)
    }
}

impl VmSeam {
    /// The interrupt behind a pin of the I/O APIC.
    ///
    /// # Errors
    /// The pin is taken, or the hypervisor refused.
    pub fn line(&self, pin: u8) -> io::Result<Box<dyn Interrupt>> {
        Ok(Box::new(Route(self.0.irqs().line(pin).map_err(io::Error::other)?)))
    }
}

impl Interrupts for VmSeam {
    fn create(&self) -> io::Result<Box<dyn Interrupt>> {
        Ok(Box::new(Route(self.0.irqs().msi().map_err(io::Error::other)?)))
    }
}

/// Keeps a doorbell until it is dropped.
struct Ringing(#[expect(dead_code, reason = "held for its drop")] Box<dyn hal::Doorbell>);

impl Doorbells for VmSeam {
    fn ring_on_write(&self, at: u64, event: &EventFd) -> io::Result<Box<dyn Send + Sync>> {
        let doorbell = self.0.irqs().doorbell(IoAddr::Mmio(at), DoorbellMatch::Any, event.try_clone()?);
        Ok(Box::new(Ringing(doorbell.map_err(io::Error::other)?)))
    }
}

/// Keeps memory of a device's in the guest until it is dropped.
struct Shown {
    vm: Arc<dyn Vm>,
    slot: SlotId,
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Err(error) = self.vm.memory().unmap(self.slot) {
            tracing::error!("memory of a device stays in the guest: {error}");
        }
    }
}

impl DeviceMemory for VmSeam {
    fn show(&self, region: Arc<GuestRegionMmap>) -> io::Result<Box<dyn Send + Sync>> {
        let slot = self.0.memory().map(Slot { device: true, ..Slot::new(region) }).map_err(io::Error::other)?;
        Ok(Box::new(Shown { vm: self.0.clone(), slot }))
    }
}
