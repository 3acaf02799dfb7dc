//! Changes of a VM's devices, processors and memory in its configuration, before it runs.

use api::{EventKind, HostFacts, VmConfig};

use super::phase::Prepared;
use crate::request::{Answer, Change, Refusal};

/// Changes the configuration of a VM that does not run yet. The event that tells of it, where something changed.
pub(super) fn change_config(
    prepared: &mut Prepared,
    facts: &HostFacts,
    change: Change,
) -> Result<(Answer, Option<EventKind>), Refusal> {
    match change {
        Change::PutDevice { device, descriptors } => {
            let id = device.id().to_owned();
            let same = prepared.given.devices.contains(&device);
            Ok(match prepared.put_device(*device, |config| api::validate(config, facts), descriptors)? {
                true => (Answer::Created, Some(EventKind::DeviceAdded { id })),
                false => (Answer::Done, (!same).then_some(EventKind::DeviceChanged { id })),
            })
        }
        Change::RemoveDevice { id, .. } => {
            prepared.remove_device(&id)?;
            Ok((Answer::Done, Some(EventKind::DeviceRemoved { id, forced: false })))
        }
        Change::Vcpus(patch) => {
            prepared.change(facts, |config| {
                if config.cpus.count != patch.count {
                    config.cpus = api::Cpus { count: patch.count, topology: None };
                }
            })?;
            Ok((Answer::Done, Some(EventKind::ConfigChanged {})))
        }
        Change::Memory(patch) => {
            prepared.change(facts, |config| config.memory.size = patch.size)?;
            Ok((Answer::Done, Some(EventKind::ConfigChanged {})))
        }
    }
}

/// What can only be changed before the machine exists.
pub(super) fn not_while_it_runs() -> Refusal {
    let what = "the number of vCPUs cannot be changed while the VM runs";
    Refusal::Unsupported(format!("{what}: it is not built yet"))
}

/// Both configurations with those devices only that `shown` picks by their ids.
pub(super) fn shown(prepared: &Prepared, shown: impl Fn(&str) -> bool) -> (VmConfig, VmConfig) {
    let (mut given, mut config) = (prepared.given.clone(), prepared.config.clone());
    // Ids that were left open are filled in in one of them only; both have the same devices in the same order.
    let mut keep = config.devices.iter().map(|device| shown(device.id())).collect::<Vec<_>>().into_iter();
    given.devices.retain(|_| keep.next().unwrap_or(true));
    config.devices.retain(|device| shown(device.id()));
    (given, config)
}
