//! `halyard ctl`: the API for people and scripts.

pub mod args;
mod change;
mod console;
mod events;
mod failed;
mod jobs;
mod show;
mod table;
mod top;

use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use api::{Client, PhaseName, Shutdown, VmConfig, VmInfo, to_yaml};
use serde::Serialize;

use self::args::{ConfigArgs, CtlArgs, DevicesVerb, JobsVerb, Output, ShutdownArgs, Verb};
use self::failed::{Done, Failed};
use super::probe;
use crate::logging::Format;

/// A monitor, and how its answers are printed.
struct Ctl {
    client: Client,
    output: Output,
    /// How the monitor is called where it is shown.
    name: String,
}

/// Does what the command line says.
pub fn ctl(args: &CtlArgs, format: Format) -> ExitCode {
    match carry_out(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => failed.tell(format),
    }
}

/// Connects to a monitor.
///
/// # Errors
/// There is none, or nothing says which.
pub fn connect(args: &CtlArgs, timeout: Duration) -> Done<Client> {
    let Some(path) = &args.socket else {
        return Err(Failed::bad("--socket", "no socket is named", "give --socket PATH, or set HALYARD_SOCKET"));
    };
    Ok(Client::connect_within(path, Some(timeout))?)
}

fn carry_out(args: &CtlArgs) -> Done {
    let timeout = args.timeout.duration();
    if timeout.is_zero() {
        return Err(Failed::bad("--timeout", "in no time nothing is answered", "write a time, as in 30s"));
    }
    // What is wrong with a file is told whether a monitor is there or not.
    let input = change::Input::read(&args.verb)?;
    let name = args.socket.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    let mut ctl = Ctl { client: connect(args, timeout)?, output: args.output, name };
    ctl.carry_out(&args.verb, input)
}

impl Ctl {
    fn carry_out(&mut self, verb: &Verb, input: change::Input) -> Done {
        let client = &mut self.client;
        match verb {
            Verb::Ping => {
                let pong = client.ping()?;
                self.answer(&pong, |pong| format!("the monitor is there: process {}\n", pong.pid))
            }
            Verb::Version => {
                let version = client.version()?;
                self.answer(&version, show::version)
            }
            Verb::Host => {
                let host = client.host()?;
                self.answer(&host, probe::text)
            }
            Verb::Create(_) => self.create(input),
            Verb::Show => {
                let vm = client.vm()?;
                self.answer(&vm, show::vm)
            }
            Verb::Config(which) => self.config(which),
            Verb::Phase => {
                let phase: PhaseName = client.vm()?.phase;
                self.answer(&phase, |phase| format!("{phase}\n"))
            }
            Verb::Boot => Ok(client.boot()?),
            Verb::Pause => Ok(client.pause()?),
            Verb::Resume => Ok(client.resume()?),
            Verb::Reset => Ok(client.reset()?),
            Verb::Nmi => Ok(client.nmi()?),
            Verb::Destroy => Ok(client.destroy()?),
            Verb::Shutdown(how) => self.shutdown(how),
            Verb::Devices(verb) => self.devices(verb, input),
            Verb::Vcpus { count: Some(count), no_wait } => self.set_vcpus(*count, *no_wait),
            Verb::Vcpus { count: None, .. } => {
                let vcpus = client.vcpus()?;
                self.answer(&vcpus, show::vcpus)
            }
            Verb::Memory { size: Some(size), no_wait } => self.set_memory(*size, *no_wait),
            Verb::Memory { size: None, .. } => {
                let memory = client.memory()?;
                self.answer(&memory, show::memory)
            }
            Verb::Quotes => {
                let quotes = client.quotes()?;
                self.answer(&quotes, show::quotes)
            }
            Verb::Jobs(verb) => self.jobs(verb),
            Verb::Events(which) => self.events(which),
            Verb::Console(which) => console::console(client, &which.id, which.take_over),
            Verb::Metrics => put(&client.metrics()?),
            Verb::Openapi => put(&client.openapi()?),
            Verb::Top => self.top(),
        }
    }

    /// Prints an answer.
    fn answer<T: Serialize>(&self, value: &T, table: impl FnOnce(&T) -> String) -> Done {
        let text = match self.output {
            Output::Table => Ok(table(value)),
            Output::Json => serde_json::to_string_pretty(value).map(|text| text + "\n"),
            Output::Yaml => to_yaml(value),
        };
        put(&text.map_err(|error| Failed::here(format!("the answer cannot be written: {error}")))?)
    }

    fn config(&mut self, which: &ConfigArgs) -> Done {
        let VmInfo { config, running, .. } = self.client.vm()?;
        let Some(config) = (if which.running { running } else { config }) else {
            return Err(Failed::missing("there is no VM, and no configuration"));
        };
        let yaml = |config: &VmConfig| to_yaml(config).unwrap_or_default();
        self.answer(&config, yaml)
    }

    fn shutdown(&mut self, how: &ShutdownArgs) -> Done {
        // Before it is asked, so that the end is not missed.
        let events = how.wait.then(|| self.client.events(None)).transpose()?;
        let job = self.client.shutdown(&Shutdown { deadline: how.deadline, force: how.force })?;
        match events {
            Some(events) => self.wait_for(job, events),
            None => self.answer(&job, show::job),
        }
    }

    fn devices(&mut self, verb: &DevicesVerb, input: change::Input) -> Done {
        match verb {
            DevicesVerb::List => {
                let devices = self.client.devices()?;
                self.answer(&devices, |devices| show::devices(devices))
            }
            DevicesVerb::Show { id } => {
                let device = self.client.device(id)?;
                self.answer(&device, show::device)
            }
            DevicesVerb::Add(how) => self.add(how, input),
            DevicesVerb::Change(what) => self.change(what),
            DevicesVerb::Remove(how) => self.remove(how),
        }
    }

    fn jobs(&mut self, verb: &JobsVerb) -> Done {
        match verb {
            JobsVerb::List => {
                let jobs = self.client.jobs()?;
                self.answer(&jobs, |jobs| show::jobs(jobs))
            }
            JobsVerb::Show(which) => {
                let job = self.client.job(which.id)?;
                self.answer(&job, show::job)
            }
            JobsVerb::Cancel(which) => Ok(self.client.cancel_job(which.id)?),
            JobsVerb::Wait(which) => {
                let events = self.client.events(None)?;
                let job = self.client.job(which.id)?;
                self.wait_for(job, events)
            }
        }
    }
}

/// Writes to standard output. Nothing more is wanted where the reader has gone away, as `head` does.
fn put(text: &str) -> Done {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failed::unheard()),
        Err(error) => Err(Failed::here(format!("standard output: {error}"))),
    }
}
