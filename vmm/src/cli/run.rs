//! `halyard run` and `halyard validate`.

use std::path::Path;
use std::process::ExitCode;

use api::{ConfigText, DeviceConfig, HostFacts, Problem, Problems, VmConfig};
use vmm::Failure;
use vmm::inputs::Inputs;
use vmm::request::Descriptors;
use vmm::sandbox;

use super::args::RunArgs;
use super::flags::Flags;
use super::{BAD_INPUT, HOST_FAILED, complain, print};
use crate::logging::Format;

/// A configuration from a file, flags or both, and what is wrong with them.
pub struct Source {
    file: Option<ConfigText>,
    flags: Flags,
    sandbox: sandbox::Mode,
    /// What could be understood; `None` where the file could not.
    config: Option<VmConfig>,
    problems: Vec<Problem>,
}

impl Source {
    /// Reads the file, if one is named, and changes what it says as the flags do.
    pub fn read(args: &RunArgs) -> Self {
        let mut source = Self {
            file: None,
            flags: Flags::default(),
            sandbox: sandbox::Mode::On,
            config: Some(VmConfig::new("")),
            problems: Vec::new(),
        };
        if let Some(path) = &args.config {
            source.config = source.read_file(Path::new(path));
        }
        // Flags that change a broken file are looked at for their own problems all the same.
        let mut scratch = VmConfig::new("");
        source.flags.apply(args, source.config.as_mut().unwrap_or(&mut scratch));
        source.sandbox = source.flags.sandbox(args);
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

    fn refuse(&self, mut problems: Vec<Problem>, format: Format) -> ExitCode {
        for (told, problem) in self.told(&mut problems).iter().zip(&problems) {
            complain(format, &problem.field, told);
        }
        BAD_INPUT.into()
    }
}

/// Runs a VM until it ends.
pub fn run(args: &RunArgs, format: Format) -> ExitCode {
    let source = Source::read(args);
    if let Err(error) = prepare(&source, args, format) {
        complain(format, "", &error.to_string());
        return HOST_FAILED.into();
    }
    let config = source.config(|config| {
        let mut problems = api::validate(config, &HostFacts::unlimited());
        problems.extend(Inputs::open(config, &mut Descriptors::Inherited).err().unwrap_or_default());
        problems
    });
    let outcome = config.map_err(|problems| Failure::BadInput(Problems(problems))).and_then(vmm::run);
    match outcome {
        Ok(outcome) => {
            tracing::info!("{outcome}");
            outcome.exit_code().into()
        }
        Err(Failure::BadInput(Problems(problems))) => source.refuse(problems, format),
        Err(Failure::Host(reason)) => {
            complain(format, "", &reason);
            HOST_FAILED.into()
        }
    }
}

/// What has to be settled for the whole process before it opens anything.
fn prepare(source: &Source, args: &RunArgs, format: Format) -> std::io::Result<()> {
    let devices = source.config.iter().flat_map(|config| &config.devices);
    sandbox::close_unclaimed(devices.filter_map(DeviceConfig::fd));
    if !args.core_dumps {
        sandbox::forbid_core_dumps()?;
    }
    if format == Format::Json {
        sandbox::report_as_json();
    }
    sandbox::begin(source.sandbox);
    Ok(())
}

/// Prints a configuration with its defaults filled in, or its problems.
pub fn validate(args: &RunArgs, format: Format) -> ExitCode {
    let source = Source::read(args);
    let check = |config: &VmConfig| api::validate(config, &HostFacts::unlimited());
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
