//! What only one part of a configuration may have.

use std::collections::HashMap;
use std::path::Path;

use super::{Report, shorten};
use crate::{DeviceConfig, Disk, Endpoint, VmConfig};

/// What only one of several may have.
pub(super) fn conflicts(report: &mut Report, config: &VmConfig) {
    let mut ids = Taken::default();
    let mut taps = Taken::default();
    let mut descriptors = Taken::default();
    let mut macs = Taken::default();
    let mut functions = Taken::default();
    let mut ports = Taken::default();
    let mut endpoints = Endpoints::default();
    let mut disks: HashMap<&Path, (usize, bool)> = HashMap::new();
    if let Some(serial) = &config.serial {
        endpoints.take(report, "serial".to_owned(), serial);
    }
    for (index, device) in config.devices.iter().enumerate() {
        let at = format!("devices[{index}]");
        if !device.id().is_empty() {
            ids.take(report, format!("{at}.id"), device.id(), "a device's id must be its own");
        }
        for (field, number) in device.descriptors() {
            let remedy = "each device needs a descriptor of its own";
            descriptors.take(report, format!("{at}.{field}"), &number.to_string(), remedy);
        }
        match device {
            DeviceConfig::Disk(Disk { path: Some(path), readonly, .. }) if !path.as_os_str().is_empty() => {
                let (first, all_readonly) = disks.entry(path).or_insert((index, true));
                *all_readonly &= readonly;
                if *first != index && !*all_readonly {
                    report.add(
                        format!("{at}.path"),
                        format!("{} is the disk of devices[{first}] already", shorten(&path.to_string_lossy())),
                        "two disks may share a file only where both are `readonly`",
                    );
                }
            }
            DeviceConfig::Net(net) => {
                if let Some(tap) = &net.tap {
                    taps.take(report, format!("{at}.tap"), tap, "each network card needs a tap interface of its own");
                }
                if let Some(mac) = net.mac {
                    let remedy = "each network card needs an address of its own";
                    macs.take(report, format!("{at}.mac"), &mac.to_string(), remedy);
                }
            }
            DeviceConfig::Console(console) => {
                if let Some(port) = &console.name {
                    ports.take(report, format!("{at}.name"), port, "each port needs a name of its own");
                }
                endpoints.take(report, format!("{at}.endpoint"), &console.endpoint);
            }
            DeviceConfig::Vfio(vfio) => {
                let Some(host) = &vfio.host else { continue };
                functions.take(report, format!("{at}.host"), host, "a function of the host's can be one device only");
            }
            DeviceConfig::Disk(_) | DeviceConfig::Rng(_) => {}
        }
    }
}

/// Values that are taken, each with the field that took it first.
#[derive(Default)]
struct Taken(HashMap<String, String>);

impl Taken {
    fn take(&mut self, report: &mut Report, field: String, value: &str, remedy: &str) {
        if let Some(first) = self.0.get(value) {
            report.add(field, format!("«{}» is taken by {first} already", shorten(value)), remedy);
        } else {
            self.0.insert(value.to_owned(), field);
        }
    }
}

/// Endpoints that only one can use: standard input and output, files and sockets.
#[derive(Default)]
struct Endpoints {
    paths: Taken,
    stdio: Option<String>,
}

impl Endpoints {
    fn take(&mut self, report: &mut Report, field: String, endpoint: &Endpoint) {
        if let Some(path) = endpoint.path() {
            let remedy = "each needs a file or socket of its own";
            self.paths.take(report, format!("{field}.path"), &path.to_string_lossy(), remedy);
        }
        if *endpoint != (Endpoint::Stdio {}) {
            return;
        }
        if let Some(first) = &self.stdio {
            report.add(
                field,
                format!("standard input and output are used by {first} already"),
                "choose file, socket, pty or off for one of them",
            );
        } else {
            self.stdio = Some(field);
        }
    }
}
