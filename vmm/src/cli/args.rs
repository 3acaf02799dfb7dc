//! What the command line looks like. The comments are the help pages.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Command, FromArgMatches};

use super::ctl::args::CtlArgs;
use super::help;
use crate::logging::{Format, Level};

/// What was asked.
#[derive(Debug, PartialEq)]
pub struct Cli {
    /// What to do.
    pub action: Action,
    /// How to log.
    pub log: LogArgs,
}

/// What to do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Start a virtual machine.
    Run(Box<RunArgs>, ServiceArgs),
    /// Serve clients of an API socket.
    Serve(Box<ServeArgs>),
    /// Look for the problems of a configuration.
    Validate(Box<RunArgs>),
    /// Say what the host can do.
    Probe(ProbeArgs),
    /// Foretell the measurements of a trust domain.
    Measure(MeasureArgs),
    /// Check a quote of a trust domain.
    Verify(VerifyArgs),
    /// Ask something of a running monitor.
    Ctl(Box<CtlArgs>),
    /// Complete a command line, for a shell.
    Complete(CompleteArgs),
    /// Write the manual's pages.
    Man(ManArgs),
    /// Print the configuration's JSON schema.
    Schema,
}

impl Cli {
    /// Reads a command line, the program's name first.
    ///
    /// # Errors
    /// What clap prints and ends with: help and version too.
    pub fn read<I, T>(words: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString> + Clone,
    {
        let matches = command().try_get_matches_from(words)?;
        // Clap has ended a command line without a subcommand, and with an unknown one, already.
        let action = match matches.subcommand() {
            Some(("run", args)) => {
                Action::Run(Box::new(RunArgs::from_arg_matches(args)?), ServiceArgs::from_arg_matches(args)?)
            }
            Some(("serve", args)) => Action::Serve(Box::new(ServeArgs::from_arg_matches(args)?)),
            Some(("validate", args)) => Action::Validate(Box::new(RunArgs::from_arg_matches(args)?)),
            Some(("probe", args)) => Action::Probe(ProbeArgs::from_arg_matches(args)?),
            Some(("measure", args)) => Action::Measure(MeasureArgs::from_arg_matches(args)?),
            Some(("verify", args)) => Action::Verify(VerifyArgs::from_arg_matches(args)?),
            Some(("ctl", args)) => Action::Ctl(Box::new(CtlArgs::from_arg_matches(args)?)),
            Some(("complete", args)) => Action::Complete(CompleteArgs::from_arg_matches(args)?),
            Some(("man", args)) => Action::Man(ManArgs::from_arg_matches(args)?),
            _ => Action::Schema,
        };
        Ok(Self { action, log: LogArgs::from_arg_matches(&matches)? })
    }
}

/// The command line. A subcommand's flags are put together only when it is asked for: the monitor's start is measured
/// in microseconds.
pub fn command() -> Command {
    LogArgs::augment_args(Command::new("halyard"))
        .version(env!("CARGO_PKG_VERSION"))
        .about("A virtual machine monitor: one process, one virtual machine")
        .after_help(help::TOP)
        .disable_help_subcommand(true)
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(subcommand("run", help::RUN_TITLE, |run| {
            ServiceArgs::augment_args(RunArgs::augment_args(run))
                .about(help::RUN_TITLE)
                .long_about(help::RUN_ABOUT)
                .after_help(help::RUN_SHORT)
                .after_long_help(help::RUN)
        }))
        .subcommand(subcommand("serve", help::SERVE_TITLE, |serve| {
            let serve = ServeArgs::augment_args(serve).about(help::SERVE_TITLE);
            serve.long_about(help::SERVE_ABOUT).after_help(help::SERVE)
        }))
        .subcommand(subcommand("validate", help::VALIDATE_TITLE, |validate| {
            let validate = RunArgs::augment_args(validate).about(help::VALIDATE_TITLE);
            validate.long_about(help::VALIDATE_ABOUT).after_help(help::VALIDATE)
        }))
        .subcommand(subcommand("probe", help::PROBE_TITLE, |probe| {
            ProbeArgs::augment_args(probe).about(help::PROBE_TITLE).after_help(help::PROBE)
        }))
        .subcommand(subcommand("measure", help::MEASURE_TITLE, |measure| {
            let measure = MeasureArgs::augment_args(measure).about(help::MEASURE_TITLE);
            measure.long_about(help::MEASURE_ABOUT).after_help(help::MEASURE)
        }))
        .subcommand(subcommand("verify", help::VERIFY_TITLE, |verify| {
            let verify = VerifyArgs::augment_args(verify).about(help::VERIFY_TITLE);
            verify.long_about(help::VERIFY_ABOUT).after_help(help::VERIFY)
        }))
        .subcommand(subcommand("ctl", help::CTL_TITLE, |ctl| {
            CtlArgs::augment_args(ctl).about(help::CTL_TITLE).long_about(help::CTL_ABOUT).after_help(help::CTL)
        }))
        .subcommand(subcommand("schema", help::SCHEMA_TITLE, |schema| schema.after_help(help::SCHEMA)))
        .subcommand(subcommand("complete", help::COMPLETE_TITLE, CompleteArgs::augment_args).hide(true))
        .subcommand(subcommand("man", help::MAN_TITLE, ManArgs::augment_args).hide(true))
}

/// A subcommand that `rest` completes when it is asked for. The comment on a struct of flags would be its title there.
fn subcommand(name: &'static str, title: &'static str, rest: fn(Command) -> Command) -> Command {
    Command::new(name).about(title).defer(rest)
}

/// How to log.
#[derive(Debug, Clone, Copy, PartialEq, Args)]
pub struct LogArgs {
    /// How much to log on standard error: error, warn, info, debug or trace
    #[arg(long = "log-level", global = true, value_enum, value_name = "LEVEL", default_value = "info")]
    #[arg(hide_possible_values = true, help_heading = "Log")]
    pub level: Level,

    /// How to log: text for people, or json, an object in each line
    #[arg(long = "log-format", global = true, value_enum, value_name = "FORMAT", default_value = "text")]
    #[arg(hide_possible_values = true, help_heading = "Log")]
    pub format: Format,
}

/// A command line that is not finished.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct CompleteArgs {
    /// Its words, the program's name first; the last, which may be empty, is the one to complete
    #[arg(value_name = "WORD", trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<String>,
}

/// Where the manual goes.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ManArgs {
    /// An existing folder for the pages
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// What to say of the host.
#[derive(Debug, Clone, Copy, PartialEq, Args)]
pub struct ProbeArgs {
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// A trust domain as it would be launched.
#[derive(Debug, Clone, PartialEq, Default, Args)]
pub struct DomainArgs {
    /// Firmware for TDX, as in Debian's package ovmf-inteltdx
    #[arg(long, value_name = "FILE")]
    pub firmware: Option<String>,

    /// The pages are those of this IGVM file instead of a firmware's
    #[arg(long, value_name = "FILE", conflicts_with_all = ["firmware", "config", "kernel", "initramfs", "cmdline", "cpus", "memory"])]
    pub igvm: Option<PathBuf>,

    /// Read the trust domain's configuration from a file, as for halyard run; other flags change it
    #[arg(long, value_name = "FILE")]
    pub config: Option<String>,

    /// The kernel that the firmware is given: a bzImage, or another EFI executable
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<String>,

    /// The kernel's initial file system
    #[arg(long, value_name = "FILE")]
    pub initramfs: Option<String>,

    /// The kernel's command line; without it, that of halyard run
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub cmdline: Option<String>,

    /// How many vCPUs the trust domain has [default: 1]
    #[arg(long, value_name = "N[,KEY=N]…")]
    pub cpus: Option<String>,

    /// How much memory the trust domain has, in bytes or with K, M, G or T in steps of 1024 [default: 512M]
    #[arg(long, value_name = "SIZE[,KEY=VALUE]…")]
    pub memory: Option<String>,
}

/// The trust domain whose measurements are wanted.
#[derive(Debug, Clone, PartialEq, Default, Args)]
pub struct MeasureArgs {
    /// The trust domain.
    #[command(flatten)]
    pub domain: DomainArgs,

    /// Write the measurements as a CoRIM document, which verifiers read, to FILE, too
    #[arg(long, value_name = "FILE")]
    pub corim: Option<PathBuf>,

    /// List what MRTD is made of, and what the registers are extended with
    #[arg(long)]
    pub events: bool,

    /// Compare the guest's event log in FILE, event by event: Linux shows it as /sys/firmware/acpi/tables/data/CCEL
    #[arg(long, value_name = "FILE", conflicts_with = "igvm")]
    pub event_log: Option<PathBuf>,

    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// A quote, and what it is to be.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct VerifyArgs {
    /// The quote, or "-" for standard input
    #[arg(value_name = "QUOTE")]
    pub quote: PathBuf,

    /// The trust domain that it is to be of, if any is named.
    #[command(flatten)]
    pub domain: DomainArgs,

    /// What the trust domain was to put into its report: at most 64 bytes, as hexadecimal digits; zeros follow
    #[arg(long, value_name = "HEX", help_heading = "What it is to be")]
    pub report_data: Option<String>,

    /// Check the signature with this collateral: an object of JSON, as tools that fetch it from Intel's service write it
    #[arg(long, value_name = "FILE", required_unless_present = "fields_only", help_heading = "Signature")]
    pub collateral: Option<PathBuf>,

    /// The certificate that the signature is to lead to, as PEM or DER [default: Intel's]
    #[arg(long, value_name = "FILE", requires = "collateral", help_heading = "Signature")]
    pub root_ca: Option<PathBuf>,

    /// The time for which the signature is to be valid, in seconds since 1970 [default: now]
    #[arg(long, value_name = "SECONDS", requires = "collateral", help_heading = "Signature")]
    pub at: Option<u64>,

    /// Take a platform of this status beside UpToDate, as in OutOfDate; repeatable
    #[arg(long, value_name = "STATUS", requires = "collateral", help_heading = "Signature")]
    pub accept: Vec<String>,

    /// Do not check the signature: anybody can have written such a quote
    #[arg(long, conflicts_with = "collateral", help_heading = "Signature")]
    pub fields_only: bool,

    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

/// How the process is reached, and what it may do.
#[derive(Debug, Clone, PartialEq, Args, Default)]
pub struct ServiceArgs {
    /// Serve the HTTP API on a Unix socket at PATH, or on an inherited listening socket: fd=N.
    ///
    /// As in "vm.sock,mode=0660,gid=36". The file's mode is 0600 and its owner the process's user, unless mode, uid and
    /// gid say otherwise. A socket file that a process left behind is replaced; one that somebody listens at is not.
    #[arg(long, value_name = "PATH[,KEY=VALUE]…|fd=N", help_heading = "Service")]
    pub api_socket: Option<String>,

    /// Write the process's number to this file while it runs
    #[arg(long, value_name = "FILE", help_heading = "Service")]
    pub pid_file: Option<PathBuf>,

    /// What a guest that takes over a part of the monitor finds: on, off, or log [default: on]
    ///
    /// On: each thread may make the system calls that it needs and no others (one that does ends the process with exit
    /// code 8), no path can be opened but what the configuration names, and there are no capabilities. Log: as on, but
    /// calls that are not allowed are done, and the kernel's log names them. Off: none of this.
    #[arg(long, value_name = "on|off|log", help_heading = "Safety")]
    pub sandbox: Option<String>,

    /// Let a crash of the monitor write a core dump, which holds the guest's memory
    #[arg(long, help_heading = "Safety")]
    pub core_dumps: bool,

    /// Let clients of the API name what is at or below PATH: disks, kernels, sockets; repeatable.
    ///
    /// Without it they may name whatever the process's user may use. "/dev/net/tun" is for taps by their names.
    #[arg(long, value_name = "PATH", help_heading = "Safety")]
    pub grant: Vec<String>,
}

/// A service, and the virtual machine that it begins with.
#[derive(Debug, PartialEq, Args, Default)]
pub struct ServeArgs {
    /// How it is reached.
    #[command(flatten)]
    pub service: ServiceArgs,

    /// Boot the virtual machine that --config and the other flags describe
    #[arg(long, help_heading = "Service")]
    pub boot: bool,

    /// The virtual machine.
    #[command(flatten)]
    pub vm: RunArgs,
}

/// The virtual machine.
#[derive(Debug, PartialEq, Args, Default)]
pub struct RunArgs {
    /// Read the configuration from a YAML or JSON file, or from standard input if FILE is "-".
    ///
    /// `halyard schema` prints what it may hold. Other flags given beside it change it: a flag for a single field
    /// replaces that field, a flag for a device adds a device.
    #[arg(long, value_name = "FILE", help_heading = "Configuration")]
    pub config: Option<String>,

    /// Boot this Linux kernel: a bzImage (vmlinuz) or an ELF file (vmlinux, or any kernel with a PVH entry)
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub kernel: Option<String>,

    /// Boot this firmware first, which then starts the kernel, or finds one on a disk: OVMF with code and variables in one file
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub firmware: Option<String>,

    /// Give the kernel this initial file system (a cpio archive, compressed or not)
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub initramfs: Option<String>,

    /// Give the kernel this command line.
    ///
    /// Without it: "console=ttyS0" where the serial port leads somewhere, and "console=hvc0" where the first console
    /// does, so that the guest's log appears.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = "Boot")]
    pub cmdline: Option<String>,

    /// Where unpacked kernels are kept: a directory, user or off [default: user]
    ///
    /// What is in a bzImage is unpacked once and found again by the next VM. "user" is halyard/unpacked in
    /// $XDG_CACHE_HOME or ~/.cache. At most 512 MiB are kept.
    #[arg(long, value_name = "DIR|user|off", help_heading = "Boot")]
    pub kernel_cache: Option<String>,

    /// How many vCPUs, 1 to 254, how many there may be, and how they are grouped [default: 1]
    ///
    /// As in "8,sockets=1,cores=4,threads=2", or in "1,max=8" for vCPUs that can be added, and removed again, while the
    /// VM runs. A grouping is that of all that there may be; without it: one socket with cores of one thread.
    #[arg(long, value_name = "N[,KEY=N]…", help_heading = "Processors and memory")]
    pub cpus: Option<String>,

    /// How much memory, in bytes or with K, M, G or T in steps of 1024 [default: 512M]
    ///
    /// Further keys: max=SIZE lets a guest with a driver for virtio-mem have up to as much while it runs (halyard ctl
    /// memory), and resize_timeout=TIME (default 60s) is how long it may take without progress; hugepages=off|2M|1G takes it from the host's reserved huge pages, transparent_huge_pages=on|off
    /// (default on) lets the host use transparent ones, prefault=on|off (default off) populates all of it at the
    /// start, shared=on|off (default off) makes it a memfd that other processes can map,
    /// lock=on|off (default off) keeps it from being swapped out; share_kernel=on|off (default off): guests of one kernel
    /// share its unchanged pages, in exchange for the kernel's huge pages.
    #[arg(long, value_name = "SIZE[,KEY=VALUE]…", help_heading = "Processors and memory")]
    pub memory: Option<String>,

    /// Hide the guest from its host: tdx, with sept_ve_disable=on|off, config_id=HEX, owner=HEX, owner_config=HEX,
    /// quote_service=unix:PATH|vsock:CID:PORT; snp; software-protected
    #[arg(long, value_name = "KIND", help_heading = "Processors and memory")]
    pub confidential: Option<String>,

    /// Add a disk on a raw file or a block device; repeatable.
    ///
    /// As in "path=root.img,id=root", or "fd=N" for an inherited descriptor. Further keys: readonly=on|off, direct=on|off (around the host's page cache),
    /// size=SIZE (how much of it the guest sees; all by default), serial=TEXT (at most 20 bytes), queues=N. A key of on or off alone means on; a comma in a path is written twice.
    #[arg(long, value_name = "PATH[,KEY=VALUE]…", help_heading = "Devices")]
    pub disk: Vec<String>,

    /// Add a network card on a tap interface; repeatable.
    ///
    /// As in "tap=tap0,mac=52:54:00:12:34:56", or "fd=N" for an inherited descriptor. Further keys: mtu=N, link=up|down, id=ID.
    /// Without mac, a random address is taken at each start.
    #[arg(long, value_name = "TAP[,KEY=VALUE]…", help_heading = "Devices")]
    pub net: Vec<String>,

    /// Where the serial port (ttyS0) leads: stdio, pty, api, off, file=PATH or socket=PATH.
    ///
    /// Without it: stdio, or off where a console leads to stdio.
    #[arg(long, value_name = "ENDPOINT", help_heading = "Devices")]
    pub serial: Option<String>,

    /// Add a virtio console, which leads to stdio, pty, api, off, file=PATH or socket=PATH; repeatable.
    ///
    /// The first without a name is hvc0, the next hvc1. With "name=PORT" it is a port for programs in the guest,
    /// /dev/virtio-ports/PORT. A further key: id=ID.
    #[arg(long, value_name = "ENDPOINT[,name=PORT]", help_heading = "Devices")]
    pub console: Vec<String>,

    /// Add a source of random numbers
    ///
    /// They are the host kernel's. "--rng=id=ID" gives the device a name.
    #[arg(long, value_name = "id=ID", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    #[arg(help_heading = "Devices")]
    pub rng: Option<String>,

    /// Hand the guest a PCI function of the host's, bound to vfio-pci, by its address; repeatable
    ///
    /// As in "0000:01:00.0", or "fd=N,iommu_fd=M" for inherited descriptors of /dev/vfio/devices/vfioX and /dev/iommu. A further
    /// key: id=ID. The guest's memory stays in the host's for it.
    #[arg(long, value_name = "ADDRESS[,id=ID]", help_heading = "Devices")]
    pub vfio: Vec<String>,

    /// How many devices can be added while the guest runs, 0 to 224: each needs a hot-plug port [default: 0]
    ///
    /// Eight ports take the place of a device that is there from the start.
    #[arg(long, value_name = "N", help_heading = "Devices")]
    pub hotplug_ports: Option<String>,

    /// The device with which a Linux guest says that it panicked: on or off [default: on]
    #[arg(long, value_name = "on|off", help_heading = "Devices")]
    pub pvpanic: Option<String>,

    /// Add the I/O port 0xf4, with which test guests end the run
    #[arg(long, help_heading = "Devices")]
    pub debug_exit: bool,

    /// Write where the time from exec to user space goes, as JSON to FILE and as a picture beside it (.svg).
    ///
    /// A timeline (configuration read, memory made, kernel placed, VM and vCPUs made, first entry, first output, first
    /// PCI access, each device's driver, user space), and in each stretch the exits, by reason and by what was
    /// accessed. User space is told by a write of any byte to I/O port 0x508, or by a program that writes to a
    /// console's named port. The files are written when it is reached, or else when the run ends or the guest resets.
    #[arg(long, value_name = "FILE", help_heading = "Watching the boot")]
    pub boot_trace: Option<String>,

    /// End the run with code 6, and say what holds the guest up, when it has not reached user space in this time.
    ///
    /// As in "30s", "500ms" or "2m", counted from the start of the run, and anew when the guest resets. User space is
    /// reached when a vCPU is seen in user mode, which is looked for four times a second, or when the guest tells: by a
    /// byte written to I/O port 0x508, or by a program that writes to a console's named port. Programs of an initramfs
    /// count as user space: "30s,until=told" waits for the guest's own word.
    #[arg(long, value_name = "TIME[,until=user-mode|told]", help_heading = "Watching the boot")]
    pub boot_timeout: Option<String>,

    /// Take the names of the kernel's addresses from this System.map, where --boot-timeout tells them
    ///
    /// Without it: from the running kernel's own table (kallsyms), once it is that far, else from a System.map-VERSION
    /// beside the kernel or in /boot.
    #[arg(long, value_name = "FILE", help_heading = "Watching the boot")]
    pub system_map: Option<String>,

    /// When the guest resets: restart it, or exit with code 3 [default: restart]
    #[arg(long, value_name = "restart|exit", help_heading = "When the guest stops")]
    pub on_reset: Option<String>,

    /// When the guest's kernel panics: exit with code 4, restart it, or ignore it [default: exit]
    #[arg(long, value_name = "exit|restart|ignore", help_heading = "When the guest stops")]
    pub on_panic: Option<String>,
}
