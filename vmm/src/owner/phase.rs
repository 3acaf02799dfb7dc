//! The phases of a VM, and what is admitted in which.

use std::collections::BTreeMap;
use std::fmt;

use api::{DeviceConfig, Outcome, PhaseName, Problem, Problems, VmConfig};

use crate::Failure;
use crate::endpoints::Endpoints;
use crate::inputs::{self, DeviceInput, Inputs};
use crate::kinds;
use crate::machine::Machine;
use crate::request::{Descriptors, Refusal};

/// Where the VM is in its life. Each phase carries what exists in it, so that nothing else can be asked of it.
pub enum Phase {
    /// There is no VM.
    Empty,
    /// It is configured.
    Ready(Prepared),
    /// It runs.
    Running(Live),
    /// It stands still.
    Paused(Live),
    /// Its run ended so.
    Stopped(Outcome),
}

/// A configuration, and what it names on the host.
pub struct Prepared {
    /// The configuration as it was given.
    pub given: VmConfig,
    /// The same with everything filled in that was left open.
    pub config: VmConfig,
    /// Files and taps, opened.
    pub inputs: Inputs,
    /// The hot-plug ports that devices of the machine are behind, by their ids: they stay there over a reset.
    pub ports: BTreeMap<String, u8>,
}

/// A VM with its machine. Fields are dropped in their order: the machine first.
pub struct Live {
    /// The machine.
    pub machine: Machine,
    /// The host side of serial port and consoles.
    pub endpoints: Endpoints,
    /// What it was made from.
    pub prepared: Prepared,
}

impl Phase {
    /// The phase without what it carries.
    pub fn name(&self) -> PhaseName {
        match self {
            Self::Empty => PhaseName::Empty,
            Self::Ready(_) => PhaseName::Ready,
            Self::Running(_) => PhaseName::Running,
            Self::Paused(_) => PhaseName::Paused,
            Self::Stopped(_) => PhaseName::Stopped,
        }
    }

    /// The configuration, where there is a VM.
    pub fn prepared(&self) -> Option<&Prepared> {
        match self {
            Self::Ready(prepared) => Some(prepared),
            Self::Running(live) | Self::Paused(live) => Some(&live.prepared),
            Self::Empty | Self::Stopped(_) => None,
        }
    }

    /// The measurement of a trust domain's beginning, where there is one.
    pub fn mrtd(&self) -> Option<String> {
        match self {
            Self::Running(live) | Self::Paused(live) => live.machine.mrtd().map(str::to_owned),
            _ => None,
        }
    }

    /// The VM with its machine, where it has one.
    pub fn live(&mut self) -> Option<&mut Live> {
        match self {
            Self::Running(live) | Self::Paused(live) => Some(live),
            _ => None,
        }
    }
}

/// What can be asked of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// A VM of a configuration.
    Create,
    /// The same once more, with the configuration that the VM has.
    CreateAgain,
    /// That it runs.
    Boot,
    /// That it stands still.
    Pause,
    /// That it runs on.
    Resume,
    /// That it boots again.
    Reset,
    /// That the guest switches itself off.
    Shutdown,
    /// A non-maskable interrupt.
    Nmi,
    /// That there is none.
    Destroy,
    /// Another configuration.
    Change,
    /// The place of a console's client.
    OpenConsole,
}

impl RequestKind {
    /// Every kind of request.
    pub const ALL: [Self; 11] = [
        Self::Create,
        Self::CreateAgain,
        Self::Boot,
        Self::Pause,
        Self::Resume,
        Self::Reset,
        Self::Shutdown,
        Self::Nmi,
        Self::Destroy,
        Self::Change,
        Self::OpenConsole,
    ];
}

impl fmt::Display for RequestKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create | Self::CreateAgain => "created",
            Self::Boot => "booted",
            Self::Pause => "paused",
            Self::Resume => "resumed",
            Self::Reset => "reset",
            Self::Shutdown => "shut down",
            Self::Nmi => "sent an NMI",
            Self::Destroy => "destroyed",
            Self::Change => "changed",
            Self::OpenConsole => "reached through a console",
        })
    }
}

/// Whether a request is carried out in a phase. The same table is in the README.
///
/// # Errors
/// [`Refusal::Phase`], with both.
pub fn admit(phase: PhaseName, kind: RequestKind) -> Result<(), Refusal> {
    use PhaseName::{Empty, Paused, Ready, Running, Stopped};
    let admitted = match kind {
        RequestKind::Create => matches!(phase, Empty | Stopped),
        RequestKind::CreateAgain => matches!(phase, Ready | Running | Paused),
        RequestKind::Boot => phase == Ready,
        RequestKind::Pause | RequestKind::Shutdown | RequestKind::Nmi => phase == Running,
        RequestKind::Resume => phase == Paused,
        RequestKind::Reset | RequestKind::OpenConsole => matches!(phase, Running | Paused),
        RequestKind::Destroy => true,
        RequestKind::Change => matches!(phase, Ready | Running | Paused),
    };
    if admitted { Ok(()) } else { Err(Refusal::Phase { phase, kind }) }
}

impl Prepared {
    /// Opens everything that a configuration names, once its own problems are none.
    ///
    /// # Errors
    /// [`Failure::BadInput`] with every problem.
    pub fn open(given: VmConfig, facts: &api::HostFacts, mut descriptors: Descriptors) -> Result<Self, Failure> {
        let mut config = given.clone();
        config.fill_defaults();
        let mut problems = kinds::validate(&config, facts);
        let inputs = Inputs::open(&config, &mut descriptors).map_err(|found| inputs::add_new(&mut problems, found));
        match inputs {
            Ok(inputs) if problems.is_empty() => Ok(Self { given, config, inputs, ports: BTreeMap::new() }),
            _ => Err(Failure::BadInput(Problems(problems))),
        }
    }

    /// A device as it was given.
    pub fn given_device(&self, id: &str) -> Option<&DeviceConfig> {
        let at = self.config.devices.iter().position(|device| device.id() == id)?;
        self.given.devices.get(at)
    }

    /// Adds a device, or puts it in the place of the one with its id, where `validate` finds no problem with the
    /// configuration then. Whether it was added.
    ///
    /// # Errors
    /// [`Refusal::Problems`], whose fields are the device's.
    pub fn put_device(
        &mut self,
        device: DeviceConfig,
        validate: impl Fn(&VmConfig) -> Vec<Problem>,
        mut descriptors: Descriptors,
    ) -> Result<bool, Refusal> {
        let id = device.id().to_owned();
        let at = self.config.devices.iter().position(|other| other.id() == id);
        let index = at.unwrap_or(self.config.devices.len());
        if self.given.devices.get(index) == Some(&device) {
            return Ok(false);
        }
        let config = self.with_device(index, device.clone(), validate)?;
        // The device that makes room lets go of its file first: the new one may be on the same.
        self.inputs.devices.remove(&id);
        match DeviceInput::open(&device, &mut descriptors, &self.inputs.container) {
            Ok(opened) => drop(self.inputs.devices.insert(id, opened)),
            Err((field, problem)) => {
                self.reopen(index);
                return Err(Refusal::Problems(Problems(vec![Problem::new(field, problem, "")])));
            }
        }
        self.config = config;
        put(&mut self.given.devices, index, device);
        Ok(at.is_none())
    }

    /// The configuration with another device at this place, where `validate` finds no problem with it.
    ///
    /// # Errors
    /// [`Refusal::Problems`], whose fields are the device's.
    fn with_device(
        &self,
        index: usize,
        device: DeviceConfig,
        validate: impl Fn(&VmConfig) -> Vec<Problem>,
    ) -> Result<VmConfig, Refusal> {
        let mut config = self.config.clone();
        put(&mut config.devices, index, device);
        config.fill_defaults();
        let of_device = format!("devices[{index}]");
        let mut checked = config.clone();
        // Each request numbers its descriptors anew: those of others are no longer what they were named.
        let others = checked.devices.iter_mut().enumerate().filter(|(at, _)| *at != index);
        for (number, other) in (0..).zip(others.flat_map(|(_, other)| other.descriptors_mut())) {
            *other = i32::MAX - number;
        }
        let problems = validate(&checked).into_iter().map(|problem| {
            // What is wrong elsewhere is the device's doing too: two of something where one is possible.
            let field = problem.field.strip_prefix(&of_device).map(|rest| rest.trim_start_matches('.').to_owned());
            Problem { field: field.unwrap_or_default(), ..problem }
        });
        let problems: Vec<Problem> = problems.collect();
        if problems.is_empty() { Ok(config) } else { Err(Refusal::Problems(Problems(problems))) }
    }

    /// The configuration with another in the place of a device that there is, where `validate` finds no problem with it.
    ///
    /// # Errors
    /// [`Refusal::Missing`]; [`Refusal::Problems`], whose fields are the device's.
    pub fn with_changed(
        &self,
        device: DeviceConfig,
        validate: impl Fn(&VmConfig) -> Vec<Problem>,
    ) -> Result<VmConfig, Refusal> {
        let at = self.config.devices.iter().position(|other| other.id() == device.id());
        self.with_device(at.ok_or_else(|| no_device(device.id()))?, device, validate)
    }

    /// Opens a device's file again, where its successor could not be.
    fn reopen(&mut self, index: usize) {
        let Some(device) = self.config.devices.get(index) else { return };
        match DeviceInput::open(device, &mut Descriptors::sent([]), &self.inputs.container) {
            Ok(opened) => drop(self.inputs.devices.insert(device.id().to_owned(), opened)),
            // It will be missed, and said so, when the VM boots.
            Err((field, problem)) => tracing::warn!("{}: {field}: {problem}", device.id()),
        }
    }

    /// Takes over from a device's new configuration what can be changed while it runs. Whether that is another now.
    pub fn set_changeable(&mut self, wanted: &DeviceConfig) -> bool {
        let Some(at) = self.config.devices.iter().position(|device| device.id() == wanted.id()) else { return false };
        let mut changed = false;
        for device in [self.config.devices.get_mut(at), self.given.devices.get_mut(at)].into_iter().flatten() {
            match (device, wanted) {
                (DeviceConfig::Disk(device), DeviceConfig::Disk(wanted)) => {
                    changed |= std::mem::replace(&mut device.size, wanted.size) != wanted.size;
                }
                (DeviceConfig::Net(device), DeviceConfig::Net(wanted)) => {
                    changed |= std::mem::replace(&mut device.link, wanted.link) != wanted.link;
                }
                (DeviceConfig::Console(device), DeviceConfig::Console(wanted)) => {
                    changed |= device.endpoint != wanted.endpoint;
                    device.endpoint.clone_from(&wanted.endpoint);
                }
                _ => {}
            }
        }
        changed
    }

    /// Removes a device.
    ///
    /// # Errors
    /// [`Refusal::Missing`].
    pub fn remove_device(&mut self, id: &str) -> Result<(), Refusal> {
        let at = self.config.devices.iter().position(|device| device.id() == id);
        let at = at.ok_or_else(|| no_device(id))?;
        self.config.devices.remove(at);
        if at < self.given.devices.len() {
            self.given.devices.remove(at);
        }
        self.inputs.devices.remove(id);
        self.ports.remove(id);
        Ok(())
    }

    /// Changes processors or memory, where the result is valid.
    ///
    /// # Errors
    /// [`Refusal::Problems`].
    pub fn change(&mut self, facts: &api::HostFacts, change: impl Fn(&mut VmConfig)) -> Result<(), Refusal> {
        let mut config = self.config.clone();
        change(&mut config);
        let problems = kinds::validate(&config, facts);
        if !problems.is_empty() {
            return Err(Refusal::Problems(Problems(problems)));
        }
        self.config = config;
        change(&mut self.given);
        Ok(())
    }
}

/// There is no device of this id.
pub fn no_device(id: &str) -> Refusal {
    Refusal::Missing(format!("there is no device «{id}»"))
}

fn put(devices: &mut Vec<DeviceConfig>, index: usize, device: DeviceConfig) {
    match devices.get_mut(index) {
        Some(slot) => *slot = device,
        None => devices.push(device),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows are requests, columns the phases empty, ready, running, paused, stopped.
    const TABLE: [(RequestKind, [bool; 5]); 11] = {
        const Y: bool = true;
        const N: bool = false;
        [
            (RequestKind::Create, [Y, N, N, N, Y]),
            (RequestKind::CreateAgain, [N, Y, Y, Y, N]),
            (RequestKind::Boot, [N, Y, N, N, N]),
            (RequestKind::Pause, [N, N, Y, N, N]),
            (RequestKind::Resume, [N, N, N, Y, N]),
            (RequestKind::Reset, [N, N, Y, Y, N]),
            (RequestKind::Shutdown, [N, N, Y, N, N]),
            (RequestKind::Nmi, [N, N, Y, N, N]),
            (RequestKind::Destroy, [Y, Y, Y, Y, Y]),
            (RequestKind::Change, [N, Y, Y, Y, N]),
            (RequestKind::OpenConsole, [N, N, Y, Y, N]),
        ]
    };

    #[test]
    fn every_pair_is_answered_as_the_table_says() {
        assert!(TABLE.iter().map(|(kind, _)| *kind).eq(RequestKind::ALL));
        for (kind, row) in TABLE {
            for (phase, expected) in PhaseName::ALL.into_iter().zip(row) {
                let admitted = admit(phase, kind);
                assert_eq!(admitted.is_ok(), expected, "{phase}, {kind:?}");
                if let Err(refusal) = admitted {
                    assert_eq!(refusal.to_string(), format!("a VM that is {phase} cannot be {kind}"));
                }
            }
        }
    }
}
