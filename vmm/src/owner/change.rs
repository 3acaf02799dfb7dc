//! Changes of a VM's devices, processors and memory in its configuration, before it runs; and which of a device's fields
//! can be changed afterwards.

use std::collections::BTreeSet;

use api::{DeviceConfig, EventKind, HostFacts, Problem, Problems, VmConfig};

use super::phase::Prepared;
use super::vcpus;
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
            Ok(match prepared.put_device(*device, |config| crate::kinds::validate(config, facts), descriptors)? {
                true => (Answer::Created, Some(EventKind::DeviceAdded { id })),
                false => (Answer::Done, (!same).then_some(EventKind::DeviceChanged { id })),
            })
        }
        Change::RemoveDevice { id, .. } => {
            prepared.remove_device(&id)?;
            Ok((Answer::Done, Some(EventKind::DeviceRemoved { id, forced: false })))
        }
        Change::Vcpus(patch) => {
            vcpus::check_count(&prepared.config.cpus, patch.count)?;
            let changed = prepared.change(facts, |config| {
                // A grouping is that of all that there may be.
                if config.cpus.max.is_none() && config.cpus.count != patch.count {
                    config.cpus.topology = None;
                }
                config.cpus.count = patch.count;
            });
            changed.map_err(|refusal| of_part(refusal, "cpus."))?;
            Ok((Answer::Done, Some(EventKind::ConfigChanged {})))
        }
        Change::Memory(patch) => {
            prepared.change(facts, |config| config.memory.size = patch.size)?;
            Ok((Answer::Done, Some(EventKind::ConfigChanged {})))
        }
    }
}

/// A request that is about a part of the configuration names its fields without that.
fn of_part(refusal: Refusal, part: &str) -> Refusal {
    let Refusal::Problems(Problems(problems)) = refusal else { return refusal };
    let named = problems.into_iter().map(|problem| {
        let field = problem.field.strip_prefix(part).unwrap_or(&problem.field).to_owned();
        Problem { field, ..problem }
    });
    Refusal::Problems(Problems(named.collect()))
}

/// The fields of a device that can be changed while it runs.
fn changeable(device: &DeviceConfig) -> &'static [&'static str] {
    match device {
        DeviceConfig::Disk(_) => &["size"],
        DeviceConfig::Net(_) => &["link"],
        DeviceConfig::Console(_) => &["endpoint"],
        DeviceConfig::Rng(_) | DeviceConfig::Vfio(_) => &[],
    }
}

/// Whether a device that the machine has can become `wanted`. What was left open may also be named as it was filled in.
///
/// # Errors
/// [`Refusal::Problems`], with each field that cannot be changed.
pub(super) fn allowed_while_it_runs(prepared: &Prepared, wanted: &DeviceConfig) -> Result<(), Refusal> {
    let id = wanted.id();
    let filled = prepared.config.devices.iter().find(|device| device.id() == id);
    let (given, filled, new) = (fields(prepared.given_device(id)), fields(filled), fields(Some(wanted)));
    let names: BTreeSet<&String> = given.keys().chain(new.keys()).collect();
    let is_as_before = |name: &str| [&given, &filled].iter().any(|old| old.get(name) == new.get(name));
    let remedy = match prepared.ports.contains_key(id) {
        true => "remove the device and add it anew",
        false => "it can be changed before the VM boots",
    };
    let problems: Vec<Problem> = names
        .into_iter()
        .filter(|name| !is_as_before(name) && !changeable(wanted).contains(&name.as_str()))
        .map(|name| Problem::new(name.as_str(), "cannot be changed while the VM runs", remedy))
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(Refusal::Problems(Problems(problems))) }
}

fn fields(device: Option<&DeviceConfig>) -> serde_json::Map<String, serde_json::Value> {
    match serde_json::to_value(device) {
        Ok(serde_json::Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    }
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
