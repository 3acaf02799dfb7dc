//! What `halyard ctl` changes: a VM is created, devices come and go.

use std::os::fd::{AsFd, OwnedFd};

use api::routes::Operation;
use api::{ClientError, ConfigText, DeviceConfig, HostFacts, Options, Problem, VmConfig, VmInfo};
use serde_json::{Map, Value};
use vmm::request::{Descriptors, FIRST_DESCRIPTOR};

use super::args::{AddArgs, ChangeArgs, DevicesVerb, NewDevice, RemoveArgs, Verb};
use super::failed::{Done, Failed, problems};
use super::{Ctl, show};
use crate::cli::args::RunArgs;
use crate::cli::run::Source;

/// What a command reads before it connects.
pub enum Input {
    /// Nothing.
    None,
    /// A VM, and the text that it comes from.
    Vm(Box<VmConfig>, Box<Source>),
    /// A device.
    Device(Box<DeviceConfig>),
}

impl Input {
    /// Reads what a command needs.
    ///
    /// # Errors
    /// Everything that is wrong with it.
    pub fn read(verb: &Verb) -> Done<Self> {
        match verb {
            Verb::Create(args) => {
                let path = args.file.display().to_string();
                vm(&RunArgs { config: Some(path), ..RunArgs::default() })
            }
            Verb::Devices(DevicesVerb::Add(AddArgs { device, .. })) => match &device.file {
                Some(path) => read_device(&ConfigText::read(path).map_err(plain)?),
                None => device_of_flags(device),
            },
            _ => Ok(Self::None),
        }
    }
}

fn plain(problem: Problem) -> Failed {
    let told = problem.to_string();
    Failed::input([(problem, told)])
}

fn told(source: &Source, mut problems: Vec<Problem>) -> Failed {
    let told = source.told(&mut problems);
    Failed::input(problems.into_iter().zip(told))
}

/// A whole configuration, with the problems that `halyard validate` would find.
fn vm(args: &RunArgs) -> Done<Input> {
    let source = Source::read(args);
    let check = |config: &VmConfig| api::validate(config, &HostFacts::unlimited());
    let config = source.config(check).and_then(|config| match check(&config) {
        problems if problems.is_empty() => Ok(config),
        problems => Err(problems),
    });
    let filled = config.map_err(|problems| told(&source, problems))?;
    // The defaults are the monitor's matter: the same file is the same VM, its random addresses included.
    let given = source.given().cloned().unwrap_or(filled);
    Ok(Input::Vm(Box::new(given), Box::new(source)))
}

/// A device in the words of `halyard run`.
fn device_of_flags(device: &NewDevice) -> Done<Input> {
    let NewDevice { disk, net, console, rng, vfio, file: _ } = device;
    let list = |one: &Option<String>| one.iter().cloned().collect();
    let args = RunArgs {
        // A VM around the device: its kernel is never looked at.
        kernel: Some("any".into()),
        disk: list(disk),
        net: list(net),
        console: list(console),
        rng: rng.clone(),
        vfio: list(vfio),
        ..RunArgs::default()
    };
    match vm(&args)? {
        Input::Vm(config, _) => {
            let device = config.devices.into_iter().next();
            device
                .map(|device| Input::Device(Box::new(device)))
                .ok_or_else(|| Failed::bad("", "no device is named", ""))
        }
        other => Ok(other),
    }
}

fn read_device(file: &ConfigText) -> Done<Input> {
    let device = file.parse_device().map_err(|problems| {
        Failed::input(problems.0.into_iter().map(|problem| {
            let told = file.describe(&problem);
            (problem, told)
        }))
    })?;
    Ok(Input::Device(Box::new(device)))
}

/// Takes the descriptors that devices name, which this process was started with, and names them as those that come with
/// a request.
fn descriptors<'a>(devices: impl IntoIterator<Item = &'a mut DeviceConfig>) -> Done<Vec<OwnedFd>> {
    let mut taken = Vec::new();
    for number in devices.into_iter().flat_map(DeviceConfig::descriptors_mut) {
        let failed = |error| Failed::bad(&format!("fd {number}"), format!("{error}"), "");
        taken.push(Descriptors::Inherited.take(*number).map_err(failed)?);
        let place = i32::try_from(taken.len()).unwrap_or(i32::MAX).saturating_sub(1);
        *number = FIRST_DESCRIPTOR.saturating_add(place);
    }
    Ok(taken)
}

impl Ctl {
    pub(super) fn create(&mut self, input: Input) -> Done {
        let Input::Vm(mut config, source) = input else { return Ok(()) };
        let descriptors = descriptors(&mut config.devices)?;
        let sent = self.send(Operation::CreateVm, "", &config, &[], &descriptors);
        let reply = sent.map_err(|error| match error {
            // What the monitor finds is told with its place in the file, too.
            ClientError::Refused(document) if !document.problems.is_empty() => told(&source, problems(&document)),
            error => error.into(),
        })?;
        let vm: VmInfo = understood(&reply.body)?;
        self.answer(&vm, show::vm)
    }

    pub(super) fn add(&mut self, how: &AddArgs, input: Input) -> Done {
        let Input::Device(mut device) = input else { return Ok(()) };
        let vm = self.client.call(Operation::GetVm, "", &Options::default())?;
        let tag = vm.header("etag").unwrap_or("*").to_owned();
        let known = understood::<VmInfo>(&vm.body)?.running.map(|config| config.devices).unwrap_or_default();
        if device.id().is_empty() {
            let mut config = VmConfig { devices: known, ..VmConfig::new("any") };
            config.devices.push(*device);
            config.fill_ids();
            *device = config.devices.pop().ok_or_else(|| Failed::here("the device got no id"))?;
        } else if known.iter().any(|one| one.id() == device.id()) && !how.replace {
            let id = device.id();
            return Err(Failed::refused(format!("there is a device «{id}» already; give --replace to take its place")));
        }
        let id = device.id().to_owned();
        let descriptors = descriptors([device.as_mut()])?;
        let events = self.client.events(None)?;
        // Nobody else may have taken the id meanwhile.
        let reply = self.send(Operation::PutDevice, &id, &device, &[("if-match", &tag)], &descriptors)?;
        if reply.status == 202 {
            return self.follow(&reply.body, events, how.no_wait);
        }
        self.answer(&understood::<DeviceConfig>(&reply.body)?, show::device)
    }

    pub(super) fn change(&mut self, what: &ChangeArgs) -> Done {
        let mut patch = Map::new();
        for field in &what.fields {
            let wrong = |why: String| Failed::bad(field, why, "write FIELD=VALUE, as in readonly=true");
            let (name, value) = field.split_once('=').ok_or_else(|| wrong("it has no value".into()))?;
            patch.insert(name.to_owned(), api::from_yaml(value).map_err(wrong)?);
        }
        let reply = self.send(Operation::PatchDevice, &what.id, &Value::Object(patch), &[], &[])?;
        self.answer(&understood::<DeviceConfig>(&reply.body)?, show::device)
    }

    pub(super) fn remove(&mut self, how: &RemoveArgs) -> Done {
        let events = self.client.events(None)?;
        match self.client.remove_device(&how.id, how.force)? {
            Some(job) if how.no_wait => self.answer(&job, show::job),
            Some(job) => self.wait_for(job, events),
            None => Ok(()),
        }
    }

    pub(super) fn set_memory(&mut self, size: api::ByteSize, no_wait: bool) -> Done {
        let events = self.client.events(None)?;
        match self.client.set_memory(&api::MemoryPatch { size })? {
            Some(job) if no_wait => self.answer(&job, show::job),
            Some(job) => self.wait_for(job, events),
            None => {
                let memory = self.client.memory()?;
                self.answer(&memory, show::memory)
            }
        }
    }

    pub(super) fn set_vcpus(&mut self, count: u32, no_wait: bool) -> Done {
        let events = self.client.events(None)?;
        match self.client.set_vcpus(count)? {
            Some(job) if no_wait => self.answer(&job, show::job),
            Some(job) => self.wait_for(job, events),
            None => {
                let vcpus = self.client.vcpus()?;
                self.answer(&vcpus, show::vcpus)
            }
        }
    }

    /// Waits for the job that a reply is, or shows it.
    fn follow(&mut self, body: &[u8], events: api::Events, no_wait: bool) -> Done {
        let job = understood(body)?;
        if no_wait { self.answer(&job, show::job) } else { self.wait_for(job, events) }
    }

    fn send(
        &mut self,
        operation: Operation,
        id: &str,
        body: &impl serde::Serialize,
        headers: &[(&str, &str)],
        descriptors: &[OwnedFd],
    ) -> Result<api::Response, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Garbled(error.to_string()))?;
        let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        self.client.call(operation, id, &Options { headers, body: Some(&body), descriptors: &descriptors })
    }
}

fn understood<T: serde::de::DeserializeOwned>(body: &[u8]) -> Done<T> {
    let read = serde_json::from_slice(body);
    read.map_err(|error| Failed::from(ClientError::Garbled(error.to_string())))
}
