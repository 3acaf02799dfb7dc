//! A VM from its configuration to its outcome.

use api::{Outcome, Problems, VmConfig};
use hal::Hypervisor;

use crate::endpoints::Endpoints;
use crate::inbox::Inbox;
use crate::inputs::Inputs;
use crate::machine::{Machine, Parts};
use crate::owner::{Reports, Verdict};
use crate::trace::{Milestone, Outputs, Trace, Watching};
use crate::{boot, host};

/// Why there is no outcome.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The configuration, or a file that it names, cannot be used. Nothing was changed.
    #[error("{0}")]
    BadInput(Problems),
    /// The host failed.
    #[error("{0}")]
    Host(String),
}

/// What turns into [`Failure::Host`] with its own words.
macro_rules! host_failures {
    ($($error:ty),*) => { $(
        impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Host(error.to_string())
            }
        }
    )* };
}
host_failures!(
    hal::Error,
    crate::memory::Error,
    arch::acpi::AcpiError,
    std::io::Error,
    devices::pci::Error,
    devices::virtio::Error,
    devices::virtio::console::ConsoleError
);

/// Runs a VM on this host's hypervisor until it ends, its boot watched as `watching` says.
///
/// # Errors
/// [`Failure::BadInput`] with every problem at once, before anything was touched; [`Failure::Host`] where the host
/// fails, at any time.
pub fn run(config: VmConfig, watching: &Watching) -> Result<Outcome, Failure> {
    run_watched(hal::open(), config, watching)
}

/// As [`run`], on a hypervisor that was opened, or was tried to be: a configuration that cannot be right is told before
/// a host that cannot run it.
///
/// # Errors
/// As [`run`].
pub fn run_on(hypervisor: hal::Result<Box<dyn Hypervisor>>, config: VmConfig) -> Result<Outcome, Failure> {
    run_watched(hypervisor, config, &Watching::default())
}

/// As [`run_on`], with the boot watched as `watching` says.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    hypervisor: hal::Result<Box<dyn Hypervisor>>,
    mut config: VmConfig,
    watching: &Watching,
) -> Result<Outcome, Failure> {
    config.fill_defaults();
    let mut trace = Trace::new(&config, watching);
    let inbox = Inbox::new()?;
    let mut reports = Reports::new(inbox.clone())?;

    let facts = match &hypervisor {
        Ok(hypervisor) => host::facts(hypervisor.caps()),
        Err(_) => api::HostFacts::unlimited(),
    };
    let mut problems = api::validate(&config, &facts);
    let inputs = Inputs::open(&config).map_err(|found| problems.extend(found));
    let (Ok(inputs), true) = (inputs, problems.is_empty()) else {
        return Err(Failure::BadInput(Problems(problems)));
    };
    let hypervisor = hypervisor?;
    trace.mark(Milestone::Configuration);

    let mut loaded = boot::load(&config, hypervisor.caps(), &inputs, &trace)?;
    // Only now, when nothing in the input can be wrong any more, does anything appear on the host.
    let endpoints = Endpoints::open(&config)?;
    if let Some(path) = &watching.boot_trace {
        trace.write_to(Outputs::create(path)?);
    }
    reports.listen_for_quit(endpoints.quit())?;
    loop {
        endpoints.watch(&config, &trace);
        let parts = Parts {
            config: &config,
            hypervisor: &*hypervisor,
            inputs: &inputs,
            endpoints: &endpoints,
            inbox: &inbox,
            trace: &trace,
        };
        let machine = Machine::create(&parts, loaded)?;
        let verdict = watch(&machine, &mut reports, &config)?;
        drop(machine);
        match verdict {
            Verdict::Stop(outcome) => {
                endpoints.drain();
                return Ok(outcome);
            }
            _ => tracing::info!("the guest boots again"),
        }
        inbox.clear();
        trace = Trace::again(&config);
        loaded = boot::load(&config, hypervisor.caps(), &inputs, &trace)?;
    }
}

/// Serves the machine until it is to be stopped or made anew.
fn watch(machine: &Machine, reports: &mut Reports, config: &VmConfig) -> Result<Verdict, Failure> {
    loop {
        match reports.next(&config.lifecycle)? {
            Verdict::GoOn => {}
            Verdict::PressPowerButton => machine.press_power_button(),
            verdict => return Ok(verdict),
        }
    }
}
