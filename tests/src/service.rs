//! A virtual machine that is driven through the API, in a host.

use std::io::{BufRead, BufReader};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::census::Census;
use crate::client::{Client, PATIENCE, Witness};
use crate::command::Cmd;
use crate::forward::Forward;
use crate::host::Host;
use crate::images;
use crate::kernels::Kernel;
use crate::process::Process;
use crate::protocol::Status;
use crate::vm::halyard;

/// A `halyard serve`. Dropping it kills it.
pub struct Service {
    process: Process,
    socket: String,
    forward: Forward,
    /// Its client.
    pub client: api::Client,
    events: api::Events,
}

/// The configuration of a guest of a stock kernel with the agent of the tests, both reached through the API: 1 processor,
/// 256 MiB.
///
/// # Errors
/// Where the kernel or what it boots is missing.
pub fn guest(kernel: Kernel) -> Result<api::VmConfig> {
    let mut config = api::VmConfig::new(kernel.bzimage()?);
    config.kernel.initramfs = Some(images::guest(kernel)?);
    config.kernel.cmdline = Some("console=ttyS0 quiet panic=-1".into());
    config.memory.size = api::ByteSize::mib(256);
    config.serial = Some(api::Endpoint::Api {});
    let agent =
        api::Console { id: "agent".into(), name: Some("org.halyard.agent".into()), endpoint: api::Endpoint::Api {} };
    config.devices.push(api::DeviceConfig::Console(agent));
    Ok(config)
}

impl Service {
    /// Starts `halyard serve` in a host, with these arguments beside its socket.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn start(host: &Host, arguments: &[&str]) -> Result<Self> {
        let socket = format!("{}/api", host.folder()?);
        let command = Cmd::new(halyard()?.display().to_string()).args(["serve", "--api-socket", &socket]);
        Self::of(host, host.spawn(command.args(arguments.iter().copied()))?, &socket)
    }

    /// The service that a process is, at its socket.
    ///
    /// # Errors
    /// Where it does not answer.
    pub fn of(host: &Host, process: Process, socket: &str) -> Result<Self> {
        let forward = host.forward(socket)?;
        let mut client = loop {
            // The socket is there a moment after its process.
            match api::Client::connect(forward.path()).and_then(|mut client| client.version().map(|_| client)) {
                Ok(client) => break client,
                Err(error) => {
                    let ended = process.wait_for(Duration::from_millis(50));
                    ensure!(ended.is_err(), "{error}{}", process.last_words());
                }
            }
        };
        client.set_timeout(Some(PATIENCE))?;
        let events = client.events(None)?;
        Ok(Self { process, socket: socket.to_owned(), forward, client, events })
    }

    /// The process.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Its socket in its host.
    pub fn socket(&self) -> &str {
        &self.socket
    }

    /// Creates and boots a VM, and waits for its guest's user space.
    ///
    /// # Errors
    /// Where one of these fails.
    pub fn boot(&mut self, config: &api::VmConfig) -> Result<Client> {
        self.client.create(config)?;
        self.client.boot()?;
        self.guest()
    }

    /// The guest's agent, once its user space is reached.
    ///
    /// # Errors
    /// Where it is not, with what the guest said.
    pub fn guest(&self) -> Result<Client> {
        // What the agent's port says before there is an agent is nothing.
        let mut console = BufReader::new(self.client.console("serial", true)?);
        let mut told = String::new();
        while !told.contains("HALYARD-GUEST ready") {
            ensure!(console.read_line(&mut told)? > 0, "the guest ended: {told}{}", self.process.last_words());
        }
        let witness: Witness = Arc::new(String::new);
        Client::open("guest", self.client.console("agent", true)?, PATIENCE, witness)
    }

    /// What it holds of its host, which is to be the one that it was started in.
    ///
    /// # Errors
    /// It is not there.
    pub fn census(&mut self, host: &Host) -> Result<Census> {
        // It ends a connection without requests after a minute: this has the client connected each time.
        self.client.version()?;
        Census::in_host(host, self.process.pid())
    }

    /// A metric without labels.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn metric(&mut self, name: &str) -> Result<u64> {
        let text = self.client.metrics()?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("{name} is not in\n{text}"))?.parse()?)
    }

    /// Waits for an event that `wanted` picks.
    ///
    /// # Errors
    /// Where the service ends before.
    pub fn wait_for<T>(&mut self, what: &str, wanted: impl Fn(&api::EventKind) -> Option<T>) -> Result<T> {
        let mut seen = Vec::new();
        for event in &mut self.events {
            let event = event.map_err(|error| anyhow!("{what} did not come, {error}, after {seen:?}"))?.event;
            if let Some(found) = wanted(&event) {
                return Ok(found);
            }
            seen.push(event);
        }
        bail!("the service ended before {what}{}", self.process.last_words())
    }

    /// Waits for the end of a job.
    ///
    /// # Errors
    /// Where the service ends before.
    pub fn end_of(&mut self, job: &api::Job) -> Result<api::Job> {
        let found = self.client.job(job.id)?;
        if found.state != api::JobState::Running {
            return Ok(found);
        }
        let number = job.id;
        self.wait_for("the end of a job", |event| match event {
            api::EventKind::Job { job } if job.id == number && job.state != api::JobState::Running => Some(job.clone()),
            _ => None,
        })
    }

    /// Waits for a job that must succeed.
    ///
    /// # Errors
    /// Where it does not.
    pub fn success_of(&mut self, job: Option<api::Job>) -> Result<()> {
        let job = self.end_of(&job.context("a job does it")?)?;
        ensure!(job.state == api::JobState::Succeeded, "{job:?}{}", self.process.last_words());
        Ok(())
    }

    /// Adds a device and waits until the guest has taken it. How long that took.
    ///
    /// # Errors
    /// Where it is refused.
    pub fn add(&mut self, id: &str, device: &api::DeviceConfig) -> Result<Duration> {
        let began = Instant::now();
        let job = self.client.put_device(id, device)?;
        self.success_of(job)?;
        Ok(began.elapsed())
    }

    /// Removes devices, all at once, and waits until the guest has let go of them.
    ///
    /// # Errors
    /// Where it does not.
    pub fn remove(&mut self, ids: &[&str]) -> Result<()> {
        let jobs: Vec<_> = ids.iter().map(|id| self.client.remove_device(id, false)).collect();
        jobs.into_iter().try_for_each(|job| self.success_of(job?))
    }

    /// Ends the service with its VM.
    ///
    /// # Errors
    /// Where it does not end well.
    pub fn finish(mut self) -> Result<()> {
        self.client.destroy()?;
        self.process.kill(15)?;
        let status = self.process.wait()?;
        drop(self.forward);
        ensure!(status == Status::Exited(0), "{status}{}", self.process.last_words());
        Ok(())
    }
}
