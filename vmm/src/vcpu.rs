//! vCPU threads: each owns its vCPU and runs it until the machine stops or the guest ends.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, JoinHandle};

use devices::bus::Bus;
use devices::ioapic::IoApic;
use hal::{Exit, ExitHandler, Kick, Vcpu};

use crate::inbox::{Event, Inbox, VcpuEnd};
use crate::trace::Trace;

/// Where exits that need an answer go.
pub struct ExitBuses {
    /// I/O ports.
    pub pio: Arc<Bus>,
    /// Guest physical addresses without memory.
    pub mmio: Arc<Bus>,
    /// Told of the end of level-triggered interrupts.
    pub ioapic: Arc<IoApic>,
}

impl ExitHandler for ExitBuses {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.pio.read(port.into(), data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.pio.write(port.into(), data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.mmio.read(gpa, data);
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.mmio.write(gpa, data);
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ioapic.end_of_interrupt(vector);
    }
}

/// The running vCPU threads of a machine. Dropping it stops them.
pub struct VcpuThreads {
    threads: Vec<(Kick, JoinHandle<()>)>,
    stop: Arc<AtomicBool>,
}

impl VcpuThreads {
    /// Starts a thread for each vCPU, named `CPU n/` and the backend's name: KubeVirt finds vCPU threads by it.
    ///
    /// # Errors
    /// A thread cannot be made; those that were are stopped again.
    pub fn start(
        backend: &str,
        vcpus: Vec<Box<dyn Vcpu>>,
        buses: &Arc<ExitBuses>,
        inbox: &Inbox,
        trace: &Trace,
    ) -> io::Result<Self> {
        let mut all = Self { threads: Vec::with_capacity(vcpus.len()), stop: Arc::new(AtomicBool::new(false)) };
        for (number, vcpu) in vcpus.into_iter().enumerate() {
            let kick = vcpu.kick();
            let watched = trace.vcpu(&*vcpu, buses);
            let (buses, inbox, stop) = (buses.clone(), inbox.clone(), all.stop.clone());
            let handle = Builder::new().name(format!("CPU {number}/{backend}")).spawn(move || match watched {
                None => run(vcpu, &*buses, |_| {}, &inbox, &stop),
                Some(watched) => run(vcpu, &watched, |vcpu| watched.before_entry(vcpu), &inbox, &stop),
            })?;
            all.threads.push((kick, handle));
        }
        Ok(all)
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        for (kick, _) in &self.threads {
            kick.kick();
        }
        for (_, handle) in self.threads.drain(..) {
            if handle.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}

fn run(
    mut vcpu: Box<dyn Vcpu>,
    exits: &dyn ExitHandler,
    before_entry: impl Fn(&mut dyn Vcpu),
    inbox: &Inbox,
    stop: &AtomicBool,
) {
    while !stop.load(Ordering::Acquire) {
        before_entry(&mut *vcpu);
        let end = match vcpu.run(exits) {
            Ok(Exit::Kicked) => continue,
            Ok(Exit::Reset) => VcpuEnd::Reset,
            Ok(Exit::Shutdown) => VcpuEnd::TripleFault,
            Ok(Exit::Crash(info)) => VcpuEnd::Crash(info.to_string()),
            Ok(Exit::Debug) => VcpuEnd::Crash("a debug exit that nobody armed".into()),
            Ok(Exit::MemoryFault { range, .. }) => {
                VcpuEnd::Crash(format!("a fault on private memory at {:#x} in a VM without any", range.start))
            }
            Err(error) => VcpuEnd::Crash(error.to_string()),
        };
        inbox.post(Event::Vcpu(end));
        return;
    }
}
