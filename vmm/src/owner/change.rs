//! Changes of a VM's devices, processors and memory: in its configuration before it runs, by hot-plug afterwards.

use api::{EventKind, HostFacts};
use hal::Hypervisor;

use super::phase::{Live, Prepared, no_device};
use crate::inbox::Inbox;
use crate::machine::Parts;
use crate::request::{Answer, Change, Refusal};
use crate::trace::Trace;

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
            Ok(match prepared.put_device(*device, facts, descriptors)? {
                true => (Answer::Created, Some(EventKind::DeviceAdded { id })),
                false => (Answer::Done, (!same).then_some(EventKind::DeviceChanged { id })),
            })
        }
        Change::RemoveDevice(id) => {
            prepared.remove_device(&id)?;
            Ok((Answer::Done, Some(EventKind::DeviceRemoved { id })))
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

/// Changes a machine that exists: hot-plug.
pub(super) fn change_machine(
    live: &mut Live,
    hypervisor: &dyn Hypervisor,
    inbox: &Inbox,
    change: Change,
) -> Result<Answer, Refusal> {
    let Live { machine, endpoints, prepared: Prepared { config, inputs, .. } } = live;
    let exists = |id: &str| config.devices.iter().any(|device| device.id() == id);
    match change {
        Change::PutDevice { device, .. } if exists(device.id()) => {
            let id = device.id();
            return Err(Refusal::Unsupported(format!(
                "«{id}» cannot be changed while the VM runs: it is not built yet"
            )));
        }
        Change::PutDevice { device, .. } => {
            let parts = Parts { config, hypervisor, inputs, endpoints, inbox, trace: &Trace::off() };
            machine.add_device(&parts, &device)?;
        }
        Change::RemoveDevice(id) if exists(&id) => machine.remove_device(&id)?,
        Change::RemoveDevice(id) => return Err(no_device(&id)),
        Change::Vcpus(_) | Change::Memory(_) => {
            let what = "the number of vCPUs and the size of memory cannot be changed while the VM runs";
            return Err(Refusal::Unsupported(format!("{what}: it is not built yet")));
        }
    }
    Ok(Answer::Done)
}
