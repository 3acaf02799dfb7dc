//! Runs one command in a host of the lab, with its output as it comes: for exploring.

use std::io::{self, Write};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use halyard_tests::{Cmd, Host, HostSpec, Kernel, Kind, Status, images};

const USAGE: &str = "usage: lab [OPTION…] COMMAND…

Runs COMMAND (one word: a line for sh) as root in a host of the lab: this machine itself where it has hardware
virtualization, else one in QEMU's software emulation that sees this machine's root file system, read-only under an
overlay in memory. Exits with the command's exit code.

  -c N       processors (1)
  -m MIB     memory (8192)
  -n N       NUMA nodes (1)
  -d MIB[@N] an NVMe disk, at NUMA node N (0); repeatable
  -i         an IOMMU
  -q OPTION  an option for QEMU; repeatable
  -a WORDS   words for the host kernel's command line
  -k         the kernel whose KVM has software-protected VMs (scripts/install soak builds it)
  -t         emulate even where this machine could do it itself
  -v         show the host's console
  -p         only build the kernels' ELF files and the initramfs, and print their paths";

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1).peekable();
    let mut spec = HostSpec::new();
    while let Some(option) = arguments.next_if(|argument| argument.starts_with('-')) {
        let mut value = || arguments.next().with_context(|| format!("{option} needs a value"));
        if option == "-p" {
            return print_paths().map_or_else(fail, |()| ExitCode::SUCCESS);
        }
        let result = apply(spec, &option, &mut value);
        spec = match result {
            Ok(Some(spec)) => spec,
            Ok(None) => {
                println!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            Err(error) => {
                eprintln!("lab: {error:#}\n{USAGE}");
                return ExitCode::from(2);
            }
        };
        if option == "--" {
            break;
        }
    }
    let words: Vec<String> = arguments.collect();
    run(&spec, words).unwrap_or_else(fail)
}

fn fail(error: anyhow::Error) -> ExitCode {
    eprintln!("lab: {error:#}");
    ExitCode::FAILURE
}

fn print_paths() -> Result<()> {
    build_agent()?;
    for kernel in Kernel::GUESTS {
        println!("{:10} bzImage   {}", kernel.label(), kernel.bzimage()?.display());
        println!("{:10} ELF       {}", kernel.label(), kernel.vmlinux()?.display());
        println!("{:10} initramfs {}", kernel.label(), images::guest(kernel)?.display());
    }
    Ok(())
}

/// Applies an option; `None` where help is asked for.
fn apply(spec: HostSpec, option: &str, value: &mut dyn FnMut() -> Result<String>) -> Result<Option<HostSpec>> {
    Ok(Some(match option {
        "-c" => spec.cpus(value()?.parse().context("-c takes a number")?),
        "-m" => spec.memory_mib(value()?.parse().context("-m takes a number of MiB")?),
        "-n" => spec.numa_nodes(value()?.parse().context("-n takes a number")?),
        "-d" => {
            let value = value()?;
            let (size, node) = value.split_once('@').unwrap_or((&value, "0"));
            let size: u64 = size.parse().context("-d takes a number of MiB")?;
            spec.nvme(size << 20, node.parse().context("-d takes a number of a node behind the @")?)
        }
        "-i" => spec.iommu(),
        "-q" => spec.qemu(value()?.split_whitespace()),
        "-a" => spec.kernel_words(&value()?),
        "-k" => spec.kernel(Kernel::Protected),
        "-t" => spec.kind(Kind::Emulated),
        "-v" => spec.show_console(),
        "--" => spec,
        "-h" | "--help" => return Ok(None),
        _ => anyhow::bail!("unknown option {option}"),
    }))
}

fn run(spec: &HostSpec, mut words: Vec<String>) -> Result<ExitCode> {
    ensure!(!words.is_empty(), "no command\n{USAGE}");
    build_agent()?;
    let host = Host::start(spec)?;
    let command = if words.len() == 1 {
        Cmd::shell(words.remove(0))
    } else {
        let program = words.remove(0);
        Cmd::new(program).args(words)
    };
    let folder = std::env::current_dir().context("the working directory")?;
    let process = host.spawn(command.folder(folder.display().to_string()))?;
    process.close_input()?;
    let status = process.copy_to(&mut io::stdout(), &mut io::stderr())?;
    io::stdout().flush()?;
    Ok(match status {
        Status::Exited(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Status::Killed(signal) => {
            eprintln!("lab: the command was killed by signal {signal}");
            ExitCode::from(u8::try_from(128 + signal).unwrap_or(1))
        }
    })
}

/// `cargo run --bin lab` builds this executable alone, and the agent is needed beside it.
fn build_agent() -> Result<()> {
    let Some(cargo) = std::env::var_os("CARGO") else { return Ok(()) };
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "-p", "halyard-tests", "--bin", "agent"]);
    // The folder beside which it shall lie is named after the profile.
    if halyard_tests::cache::build_folder()?.ends_with("release") {
        build.arg("--release");
    }
    ensure!(build.status().context("cannot run cargo")?.success(), "the agent cannot be built");
    Ok(())
}
