//! What a configuration leaves open is filled in here, once, so that the machine meets no open questions.

use std::collections::HashSet;

use crate::config::VmConfig;
use crate::device::{Console, DeviceConfig, Endpoint};
use crate::units::MacAddr;

impl VmConfig {
    /// Fills in what the configuration leaves open: ids of devices, hardware addresses of network cards, where the
    /// serial port leads, and the kernel's command line. What is given already stays as it is, so that a second call
    /// changes nothing.
    pub fn fill_defaults(&mut self) {
        self.fill_ids();
        for device in &mut self.devices {
            if let DeviceConfig::Net(net) = device {
                net.mac.get_or_insert_with(MacAddr::random);
            }
        }
        let serial = self.serial_endpoint();
        self.serial.get_or_insert(serial);
        if !self.kernel.is_none() {
            let cmdline = self.cmdline();
            self.kernel.cmdline.get_or_insert(cmdline);
        }
    }

    /// Where the serial port leads: as configured, else to standard input and output unless a console does.
    pub fn serial_endpoint(&self) -> Endpoint {
        match &self.serial {
            Some(endpoint) => endpoint.clone(),
            None if self.consoles().any(|console| console.endpoint == Endpoint::Stdio {}) => Endpoint::Off {},
            None => Endpoint::Stdio {},
        }
    }

    /// The kernel's command line: as configured, else one that brings the guest's log to the serial port and the
    /// first console, as far as they lead somewhere. Linux takes the last `console=` for its `/dev/console`.
    pub fn cmdline(&self) -> String {
        if let Some(cmdline) = &self.kernel.cmdline {
            return cmdline.clone();
        }
        let mut words = Vec::new();
        if self.serial_endpoint() != (Endpoint::Off {}) {
            words.push("console=ttyS0");
        }
        let first = self.consoles().find(|console| console.name.is_none());
        if first.is_some_and(|console| console.endpoint != Endpoint::Off {}) {
            words.push("console=hvc0");
        }
        words.join(" ")
    }

    fn consoles(&self) -> impl Iterator<Item = &Console> {
        self.devices.iter().filter_map(|device| match device {
            DeviceConfig::Console(console) => Some(console),
            _ => None,
        })
    }

    /// Gives each device without an id its type and the first free number, as in `disk0`.
    pub fn fill_ids(&mut self) {
        let mut taken: HashSet<String> = self.devices.iter().map(|device| device.id().to_owned()).collect();
        for device in &mut self.devices {
            if !device.id().is_empty() {
                continue;
            }
            let type_name = device.type_name();
            let free = (0..).map(|number| format!("{type_name}{number}")).find(|id| taken.insert(id.clone()));
            *device.id_mut() = free.unwrap_or_default();
        }
    }
}
