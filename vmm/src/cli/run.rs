//! `halyard run`, `halyard serve` and `halyard validate`.

use std::path::Path;
use std::process::ExitCode;

use api::{ConfigText, HostFacts, Outcome, Problem, Problems, VmConfig};
use vmm::inputs::{self, Inputs};
use vmm::owner::Until;
use vmm::request::Descriptors;
use vmm::server::ApiSocket;
use vmm::{Failure, Plan, Watching};

use super::args::{RunArgs, ServeArgs, ServiceArgs};
use super::flags::Flags;
use super::{BAD_INPUT, HOST_FAILED, complain, print, safety};
use crate::logging::Format;

/// A configuration from a file, flags or both, and what is wrong with them.
pub struct Source {
    file: Option<ConfigText>,
    flags: Flags,
    /// What could be understood; `None` where the file could not.
    config: Option<VmConfig>,
    problems: Vec<Problem>,
}

impl Source {
    /// Reads the file, if one is named, and changes what it says as the flags do.
    pub fn read(args: &RunArgs) -> Self {
        let mut source =
            Self { file: None, flags: Flags::default(), config: Some(VmConfig::new("")), problems: Vec::new() };
        if let Some(path) = &args.config {
            source.config = source.read_file(Path::new(path));
        }
        // Flags that change a broken file are looked at for their own problems all the same.
        let mut scratch = VmConfig::new("");
        source.flags.apply(args, source.config.as_mut().unwrap_or(&mut scratch));
        source.problems.extend(source.flags.problems.iter().cloned());
        source
    }

    fn read_file(&mut self, path: &Path) -> Option<VmConfig> {
        let file = match ConfigText::read(path) {
            Ok(file) => file,
            Err(problem) => {
                self.problems.push(problem);
                return None;
            }
        };
        let parsed = file.parse();
        self.file = Some(file);
        parsed.map_err(|found| self.problems.extend(found.0)).ok()
    }

    /// The whole configuration with its defaults filled in, where all of it could be understood.
    ///
    /// # Errors
    /// What is wrong with the flags and the file, and what `check` finds in the rest.
    pub fn config(&self, check: impl FnOnce(&VmConfig) -> Vec<Problem>) -> Result<VmConfig, Vec<Problem>> {
        let mut problems = self.problems.clone();
        let config = self.config.clone().map(|mut config| {
            config.fill_defaults();
            config
        });
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            Some(config) => {
                // A flag that could not be understood left a default behind, which may break other rules.
                problems.extend(check(&config).into_iter().filter(|problem| !self.flags.left_default(problem)));
                Err(problems)
            }
            None => Err(problems),
        }
    }

    /// The configuration as it was given, without defaults, where all of it could be understood.
    pub fn given(&self) -> Option<&VmConfig> {
        self.config.as_ref()
    }

    /// The problems as they are told: with the flag, or the place in the file, that they come from.
    pub fn told(&self, problems: &mut [Problem]) -> Vec<String> {
        if let Some(file) = &self.file {
            file.locate(problems);
        }
        let tell = |problem: &Problem| match (self.flags.trace(problem), &self.file) {
            (Some(traced), _) => traced.to_string(),
            // A flag's own problem has the flag for its field.
            (None, Some(file)) if !problem.field.starts_with("--") => file.describe(problem),
            _ => problem.to_string(),
        };
        problems.iter().map(tell).collect()
    }

    /// No configuration.
    fn none() -> Self {
        Self { file: None, flags: Flags::default(), config: None, problems: Vec::new() }
    }

    /// The whole configuration; where it has problems, all of them, and those of what it names.
    fn checked(&mut self) -> Result<VmConfig, Failure> {
        let late: Vec<Problem> =
            self.flags.problems.iter().filter(|one| !self.problems.contains(one)).cloned().collect();
        self.problems.extend(late);
        let config = self.config(|config| {
            let mut problems = vmm::kinds::validate(config, &HostFacts::unlimited());
            let found = Inputs::open(config, &mut Descriptors::Inherited).err().unwrap_or_default();
            inputs::add_new(&mut problems, found);
            problems
        });
        config.map_err(|problems| Failure::BadInput(Problems(problems)))
    }

    fn without_problems(&self) -> Result<(), Failure> {
        match self.flags.problems.clone() {
            problems if problems.is_empty() => Ok(()),
            problems => Err(Failure::BadInput(Problems(problems))),
        }
    }

    fn fail(&self, failure: Failure, format: Format) -> ExitCode {
        match failure {
            Failure::BadInput(Problems(problems)) => self.refuse(problems, format),
            Failure::Host(reason) => {
                complain(format, "", &reason);
                HOST_FAILED.into()
            }
        }
    }

    /// Tells all problems.
    pub fn refuse(&self, mut problems: Vec<Problem>, format: Format) -> ExitCode {
        for (told, problem) in self.told(&mut problems).iter().zip(&problems) {
            complain(format, &problem.field, told);
        }
        BAD_INPUT.into()
    }
}

/// Runs a VM until it ends.
pub fn run(args: &RunArgs, service: &ServiceArgs, format: Format) -> ExitCode {
    let mut source = Source::read(args);
    let api = source.flags.api_socket(service.api_socket.as_deref());
    let mode = source.flags.sandbox(service.sandbox.as_deref());
    if let Err(error) = safety::prepare(source.config.as_ref(), api.as_ref(), mode, service, format) {
        return source.fail(error.into(), format);
    }
    let config = source.checked();
    let ended = config.and_then(|config| {
        let (pid_file, watching) = (service.pid_file.clone(), watching(args));
        vmm::carry_out(Plan { config: Some(config), boot: true, api, pid_file, watching, until: Until::VmEnds })
    });
    match ended {
        // A request has destroyed the VM, and with it all that is to be said of it.
        Ok(outcome) => end(&outcome.unwrap_or(Outcome::Destroyed)),
        Err(failure) => source.fail(failure, format),
    }
}

/// Serves clients until a signal ends it.
pub fn serve(args: &ServeArgs, format: Format) -> ExitCode {
    let has_vm = args.vm != RunArgs::default();
    let mut source = if has_vm { Source::read(&args.vm) } else { Source::none() };
    let api = source.flags.api_socket(args.service.api_socket.as_deref()).or_else(ApiSocket::from_systemd);
    if api.is_none() {
        source.flags.missing("--api-socket", "the service has no socket", "give --api-socket PATH");
    }
    if args.boot && !has_vm {
        source.flags.missing("--boot", "there is no virtual machine to boot", "give --config FILE");
    }
    let mode = source.flags.sandbox(args.service.sandbox.as_deref());
    if let Err(error) = safety::prepare(source.config.as_ref(), api.as_ref(), mode, &args.service, format) {
        return source.fail(error.into(), format);
    }
    let config = if has_vm { source.checked().map(Some) } else { source.without_problems().map(|()| None) };
    let ended = config.and_then(|config| {
        let (pid_file, watching) = (args.service.pid_file.clone(), watching(&args.vm));
        vmm::carry_out(Plan { config, boot: args.boot, api, pid_file, watching, until: Until::Signal })
    });
    match ended {
        // A VM that had to be ended by force is the only one whose end is the service's.
        Ok(Some(outcome @ (Outcome::Signalled { .. } | Outcome::Quit))) => end(&outcome),
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => source.fail(failure, format),
    }
}

fn watching(args: &RunArgs) -> Watching {
    Watching { boot_trace: args.boot_trace.as_ref().map(Into::into) }
}

fn end(outcome: &Outcome) -> ExitCode {
    tracing::info!("{outcome}");
    outcome.exit_code().into()
}

/// Prints a configuration with its defaults filled in, or its problems.
pub fn validate(args: &RunArgs, format: Format) -> ExitCode {
    let source = Source::read(args);
    let check = |config: &VmConfig| vmm::kinds::validate(config, &HostFacts::unlimited());
    let checked = source.config(check).and_then(|config| match check(&config) {
        problems if problems.is_empty() => Ok(config),
        problems => Err(problems),
    });
    match checked.map(|config| serde_json::to_string_pretty(&config)) {
        Ok(Ok(text)) => print(&(text + "\n"), ExitCode::SUCCESS, format),
        Ok(Err(error)) => {
            complain(format, "", &format!("the configuration cannot be written: {error}"));
            HOST_FAILED.into()
        }
        Err(problems) => source.refuse(problems, format),
    }
}
