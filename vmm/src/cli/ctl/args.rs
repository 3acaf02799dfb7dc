//! What `halyard ctl` looks like. The comments are the help pages.

use std::path::PathBuf;

use api::{ByteSize, TimeSpan};
use clap::{Args, Subcommand, ValueEnum};

/// Which monitor, and what is asked of it.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct CtlArgs {
    /// The monitor's API socket
    #[arg(long, short, global = true, env = "HALYARD_SOCKET", hide_env_values = true)]
    #[arg(value_name = "PATH", help_heading = "Connection")]
    pub socket: Option<PathBuf>,

    /// Give up when connecting, or a request with its answer, takes longer than this
    #[arg(long, global = true, value_name = "TIME", default_value = "1m", help_heading = "Connection")]
    pub timeout: TimeSpan,

    /// How to print what is answered: as a table for people, as json or yaml for programs
    #[arg(long, short, global = true, value_enum, value_name = "FORMAT", default_value = "table")]
    #[arg(hide_possible_values = true, help_heading = "Output")]
    pub output: Output,

    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people
    Table,
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum Verb {
    /// Say whether the monitor is there
    Ping,
    /// Say which program answers
    Version,
    /// Say what the monitor's host can do for virtual machines
    Host,
    /// Create the VM from a configuration: all that it names is opened, nothing runs yet
    Create(CreateArgs),
    /// Show the VM: phase, configuration, outcome
    Show,
    /// Print the VM's configuration, as YAML unless --output says otherwise
    Config(ConfigArgs),
    /// Print the VM's phase in one word
    Phase,
    /// Boot the VM
    Boot,
    /// Let the VM stand still
    Pause,
    /// Let a VM that stands still run on
    Resume,
    /// Reset the VM, as its reset button would
    Reset,
    /// Press the guest's power button; a job waits for it to switch itself off
    Shutdown(ShutdownArgs),
    /// Send all vCPUs a non-maskable interrupt
    Nmi,
    /// Destroy the VM: there is none afterwards
    Destroy,
    /// List, show, add, change and remove devices
    #[command(subcommand)]
    Devices(DevicesVerb),
    /// Show the VM's processors, or change how many there are
    Vcpus {
        /// How many there shall be
        #[arg(value_name = "COUNT")]
        count: Option<u32>,

        /// Do not wait where a running guest must answer first
        #[arg(long)]
        no_wait: bool,
    },
    /// Show the VM's memory, or change its size
    Memory {
        /// How much there shall be, as in 2G
        #[arg(value_name = "SIZE")]
        size: Option<ByteSize>,
        /// Do not wait for a guest that runs to have as much
        #[arg(long, requires = "size")]
        no_wait: bool,
    },
    /// Show what became of the quotes that a trust domain asked for
    Quotes,
    /// List, show, cancel and wait for jobs
    #[command(subcommand)]
    Jobs(JobsVerb),
    /// Print what happened, and what happens
    Events(EventsArgs),
    /// Connect this terminal to a console of the VM; Ctrl-a x leaves it
    Console(ConsoleArgs),
    /// Print counters and gauges in Prometheus' text format
    Metrics,
    /// Print the description of the API (OpenAPI 3.1)
    Openapi,
    /// Watch vCPUs, disks, networks and memory, once a second; q ends it
    Top,
}

/// What to create.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct CreateArgs {
    /// The configuration in YAML or JSON, or "-" for standard input.
    ///
    /// A device on a descriptor (fd: N) is on one that this command was started with.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

/// Which configuration.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ConfigArgs {
    /// As the machine has it, with everything that was left open filled in; else as it was given
    #[arg(long)]
    pub running: bool,
}

/// How to shut down.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ShutdownArgs {
    /// How long the guest has, as in 30s [default: the configuration's lifecycle.shutdown_timeout]
    #[arg(long, value_name = "TIME")]
    pub deadline: Option<TimeSpan>,

    /// Destroy the VM at the deadline; else it runs on and the job fails
    #[arg(long)]
    pub force: bool,

    /// Wait for the end of the job
    #[arg(long)]
    pub wait: bool,
}

/// What to do with devices.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum DevicesVerb {
    /// List the VM's devices
    List,
    /// Show a device
    Show {
        /// The device
        #[arg(value_name = "DEVICE")]
        id: String,
    },
    /// Add a device
    Add(AddArgs),
    /// Change fields of a device, as in readonly=true or endpoint='{type: pty, path: null}'; while the VM runs, a disk's size, a card's link and where a console leads
    Change(ChangeArgs),
    /// Remove a device
    Remove(RemoveArgs),
}

/// A device, and how to add it.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct AddArgs {
    /// What it is.
    #[command(flatten)]
    pub device: NewDevice,

    /// The device may take the place of one with the same id
    #[arg(long)]
    pub replace: bool,

    /// Do not wait where a running guest must answer first
    #[arg(long)]
    pub no_wait: bool,
}

/// A device in the words of `halyard run`, or from a file.
#[derive(Debug, Clone, PartialEq, Args)]
#[group(required = true, multiple = false)]
pub struct NewDevice {
    /// A disk, as in "path=root.img,id=root"; see `halyard run --help`
    #[arg(long, value_name = "PATH[,KEY=VALUE]…")]
    pub disk: Option<String>,

    /// A network card, as in "tap=tap0"; see `halyard run --help`
    #[arg(long, value_name = "TAP[,KEY=VALUE]…")]
    pub net: Option<String>,

    /// A console, as in "api,id=con0" or "pty,name=agent"; see `halyard run --help`
    #[arg(long, value_name = "ENDPOINT[,KEY=VALUE]…")]
    pub console: Option<String>,

    /// A source of random numbers
    #[arg(long, value_name = "id=ID", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub rng: Option<String>,
    /// A PCI function of the host's, as `halyard run --vfio` takes it
    #[arg(long, value_name = "ADDRESS[,id=ID]")]
    pub vfio: Option<String>,

    /// A device in YAML or JSON, as a configuration has it, or "-" for standard input
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
}

/// A device, and what to change.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ChangeArgs {
    /// The device
    #[arg(value_name = "DEVICE")]
    pub id: String,

    /// Fields with their new values in YAML; null brings a default back
    #[arg(value_name = "FIELD=VALUE", required = true)]
    pub fields: Vec<String>,
}

/// A device, and how to remove it.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct RemoveArgs {
    /// The device
    #[arg(value_name = "DEVICE")]
    pub id: String,

    /// Do not ask the guest: to it, the device is torn out
    #[arg(long)]
    pub force: bool,

    /// Do not wait where a running guest must answer first
    #[arg(long)]
    pub no_wait: bool,
}

/// What to do with jobs.
#[derive(Debug, Clone, PartialEq, Subcommand)]
pub enum JobsVerb {
    /// List the jobs at work, and the last that ended
    List,
    /// Show a job
    Show(JobArgs),
    /// Cancel a job; one that has ended stays as it is
    Cancel(JobArgs),
    /// Wait for a job's end
    Wait(JobArgs),
}

/// Which job.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct JobArgs {
    /// The job's number
    #[arg(value_name = "JOB")]
    pub id: u64,
}

/// Which events.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EventsArgs {
    /// Go on with what happens from now on, until the monitor ends.
    ///
    /// A connection that breaks is made again, and goes on where it broke.
    #[arg(long, short)]
    pub follow: bool,

    /// Begin after the event with this number [default: 0, or with --follow the last]
    #[arg(long, value_name = "NUMBER")]
    pub after: Option<u64>,
}

/// Which console.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ConsoleArgs {
    /// The console's id, or "serial". Its endpoint must be api
    #[arg(value_name = "CONSOLE")]
    pub id: String,

    /// Take the console's place from the client that has it
    #[arg(long)]
    pub take_over: bool,
}
