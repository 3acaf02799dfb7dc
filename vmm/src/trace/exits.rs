//! The exit handler of a watched vCPU: it notes each exit, hands it on, and sees milestones go by.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arch::layout;
use hal::{Conversion, ExitHandler, GpaRange, GuestCall, GuestCallStatus, Vcpu, Visibility};

use super::names::PCI_CONFIG_PORTS;
use super::recorder::{ExitSeen, Reason, Recorder};
use super::sight::Sight;
use super::{Milestone, View, Word};
use crate::vcpu::ExitBuses;

/// A vCPU's way to the buses while its boot is watched.
pub struct WatchedExits {
    recorder: Arc<Recorder>,
    number: usize,
    buses: Arc<ExitBuses>,
    view: Arc<View>,
    entered: AtomicBool,
}

impl WatchedExits {
    /// For the vCPU with this number; `None` where no machine is looked at.
    pub(super) fn new(recorder: Arc<Recorder>, number: usize, buses: Arc<ExitBuses>) -> Option<Self> {
        let view = recorder.view()?;
        Some(Self { recorder, number, buses, view, entered: AtomicBool::new(false) })
    }

    /// To be called before each entry, which is the first one or comes after a kick.
    pub fn before_entry(&self, vcpu: &mut dyn Vcpu) {
        if self.recorder.wants(self.number) {
            self.recorder.show(self.number, Sight::of(vcpu));
        }
        if !self.entered.swap(true, Ordering::Relaxed) {
            if self.number == 0 {
                self.recorder.mark(Milestone::FirstEntry);
            }
        } else if !self.recorder.is_over() {
            self.note(Reason::Kick, 0, &[]);
        }
    }

    fn note(&self, reason: Reason, address: u64, data: &[u8]) {
        let value = data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        let exit = ExitSeen { at: self.recorder.now(), reason, address, size: data.len(), value };
        self.recorder.exit(self.number, exit);
    }

    fn see_port(&self, port: u16) {
        if PCI_CONFIG_PORTS.contains(&port) {
            self.recorder.mark(Milestone::Pci);
        }
    }

    fn see_memory(&self, gpa: u64) {
        if self.view.ecam.contains(&gpa) {
            self.recorder.mark(Milestone::Pci);
        }
    }

    /// Notes devices whose drivers have come with this write.
    fn see_drivers(&self) {
        for (id, function) in &self.view.functions {
            if function.driver_is_ok() {
                self.recorder.mark(Milestone::DriverOk(id.clone()));
            }
        }
    }
}

impl ExitHandler for WatchedExits {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        if self.recorder.is_over() {
            return self.buses.pio_read(port, data);
        }
        self.see_port(port);
        self.buses.pio_read(port, data);
        self.note(Reason::PioRead, port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if self.recorder.is_over() {
            return self.buses.pio_write(port, data);
        }
        self.see_port(port);
        self.note(Reason::PioWrite, port.into(), data);
        self.buses.pio_write(port, data);
        if port == layout::BOOT_MARKER_PORT {
            self.recorder.mark(Milestone::UserSpace(Word::Marker));
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        if self.recorder.is_over() {
            return self.buses.mmio_read(gpa, data);
        }
        self.see_memory(gpa);
        self.buses.mmio_read(gpa, data);
        self.note(Reason::MmioRead, gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if self.recorder.is_over() {
            return self.buses.mmio_write(gpa, data);
        }
        self.see_memory(gpa);
        self.note(Reason::MmioWrite, gpa, data);
        self.buses.mmio_write(gpa, data);
        self.see_drivers();
    }

    fn end_of_interrupt(&self, vector: u8) {
        if !self.recorder.is_over() {
            self.note(Reason::EndOfInterrupt, vector.into(), &[]);
        }
        self.buses.end_of_interrupt(vector);
    }

    fn convert(&self, range: GpaRange, to: Visibility) -> Conversion {
        self.buses.convert(range, to)
    }

    fn guest_call(&self, call: GuestCall) -> GuestCallStatus {
        self.buses.guest_call(call)
    }
}
