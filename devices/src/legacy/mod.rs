//! The platform's few registers outside PCI: serial ports, power management, panic and reset, and what firmware looks for.

mod acpi;
mod cmos;
mod debug_exit;
mod fw_cfg;
mod i8042;
mod pm_timer;
mod processors;
mod pvpanic;
mod serial;

pub use acpi::AcpiRegisters;
pub use cmos::Cmos;
pub use debug_exit::DebugExit;
pub use fw_cfg::{FwCfg, FwCfgContents, FwCfgError, FwCfgItems};
pub use i8042::I8042;
pub use pm_timer::PmTimer;
pub use processors::{ProcessorObserver, Processors};
pub use pvpanic::PvPanic;
pub use serial::{Serial, SerialPeer, SerialState};

/// What a guest asks of the machine through a platform register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PlatformEvent {
    /// Switch the machine off (ACPI S5).
    Shutdown,
    /// Reset the machine.
    Reset,
    /// The guest's kernel has panicked.
    Panicked,
    /// The guest's kernel has panicked, and its crash kernel takes over.
    CrashLoaded,
    /// A test guest is done, with this value.
    DebugExit(u32),
}

/// Receives what guests ask for. Called on a vCPU's thread, in the middle of its access.
pub trait PlatformEvents: Send + Sync {
    /// The guest asked for `event`.
    fn event(&self, event: PlatformEvent);
}

#[cfg(test)]
pub(crate) mod testing {
    use std::sync::{Arc, Mutex};

    use super::*;

    /// Keeps what was asked for.
    #[derive(Default)]
    pub struct Asked(Mutex<Vec<PlatformEvent>>);

    impl Asked {
        pub fn new() -> Arc<Self> {
            Arc::default()
        }

        pub fn take(&self) -> Vec<PlatformEvent> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    impl PlatformEvents for Asked {
        fn event(&self, event: PlatformEvent) {
            self.0.lock().unwrap().push(event);
        }
    }
}
