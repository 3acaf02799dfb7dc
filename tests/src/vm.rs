//! A virtual machine that the `halyard` executable runs in a host.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::cache;
use crate::client::{Client, PATIENCE, Witness};
use crate::command::{Cmd, Output};
use crate::host::Host;
use crate::images;
use crate::kernels::Kernel;
use crate::process::Process;
use crate::protocol::Status;

/// Arguments of `halyard run`.
#[derive(Clone, Debug, Default)]
pub struct VmSpec {
    kernel: Option<String>,
    initramfs: Option<String>,
    words: String,
    cpus: String,
    memory: String,
    serial: Option<String>,
    arguments: Vec<String>,
    agent: bool,
}

impl VmSpec {
    /// A kernel at a path of the host, 1 processor, 256 MiB, the serial port on standard input and output.
    ///
    /// The kernel is quiet by default: a line of its log costs two exits a character, and in an emulated host all of
    /// the log as long as the rest of the boot.
    pub fn kernel(path: impl Into<String>) -> Self {
        Self {
            kernel: Some(path.into()),
            cpus: "1".into(),
            memory: "256M".into(),
            serial: Some("stdio".into()),
            words: "console=ttyS0 quiet panic=-1".into(),
            ..Self::default()
        }
    }

    /// A stock kernel as a bzImage with the test guest's initramfs and agent.
    ///
    /// # Errors
    /// Where one of them is missing.
    pub fn guest(kernel: Kernel) -> Result<Self> {
        let mut spec = Self::kernel(kernel.bzimage()?.display().to_string());
        spec.initramfs = Some(images::guest(kernel)?.display().to_string());
        spec.agent = true;
        Ok(spec)
    }

    /// As [`VmSpec::guest`], with the kernel as an ELF file.
    ///
    /// # Errors
    /// Where one of them is missing.
    pub fn elf_guest(kernel: Kernel) -> Result<Self> {
        let mut spec = Self::guest(kernel)?;
        spec.kernel = Some(kernel.vmlinux()?.display().to_string());
        Ok(spec)
    }

    /// Another file of the same kernel, at a path of the host.
    #[must_use]
    pub fn kernel_file(mut self, path: &std::path::Path) -> Self {
        self.kernel = Some(path.display().to_string());
        self
    }

    /// No kernel: firmware finds one on a disk, with its command line and initramfs.
    #[must_use]
    pub fn kernel_on_disk(mut self) -> Self {
        self.kernel = None;
        self
    }

    /// Processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus.to_string();
        self
    }

    /// Processors with their grouping, as `--cpus` takes them: `4,cores=2,threads=2`.
    #[must_use]
    pub fn topology(mut self, cpus: &str) -> Self {
        self.cpus = cpus.into();
        self
    }

    /// Memory, as the command line takes it: `512M`, `6G`.
    #[must_use]
    pub fn memory(mut self, size: &str) -> Self {
        self.memory = size.into();
        self
    }

    /// An initramfs at a path of the host.
    #[must_use]
    pub fn initramfs(mut self, path: impl Into<String>) -> Self {
        self.initramfs = Some(path.into());
        self
    }

    /// The kernel's whole command line.
    #[must_use]
    pub fn cmdline(mut self, words: &str) -> Self {
        self.words = words.into();
        self
    }

    /// Words behind the kernel's command line.
    #[must_use]
    pub fn words(mut self, words: &str) -> Self {
        self.words = format!("{} {words}", self.words);
        self
    }

    /// A disk, as `--disk` takes it.
    #[must_use]
    pub fn disk(self, disk: &str) -> Self {
        self.args(["--disk", disk])
    }

    /// A network card at a tap.
    #[must_use]
    pub fn network(self, tap: &str, address: &str) -> Self {
        self.args(["--net".to_owned(), format!("tap={tap},mac={address}")])
    }

    /// Where the serial port leads, as `--serial` takes it; `None` leaves the flag out.
    #[must_use]
    pub fn serial(mut self, serial: Option<&str>) -> Self {
        self.serial = serial.map(Into::into);
        self
    }

    /// No agent and no console for it.
    #[must_use]
    pub fn without_agent(mut self) -> Self {
        self.agent = false;
        self
    }

    /// Arguments behind all others.
    #[must_use]
    pub fn args<T: Into<String>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    fn command(&self, halyard: &str, agent: &str) -> Cmd {
        let mut command = Cmd::new(halyard).arg("run");
        if let Some(kernel) = &self.kernel {
            command = command.args(["--kernel", kernel, "--cmdline", &self.words]);
            if let Some(initramfs) = &self.initramfs {
                command = command.args(["--initramfs", initramfs]);
            }
        }
        command = command.args(["--cpus", &self.cpus, "--memory", &self.memory]);
        if let Some(serial) = &self.serial {
            command = command.args(["--serial", serial]);
        }
        command = command.args(self.arguments.iter().cloned());
        if self.agent {
            command = command.args(["--console".to_owned(), format!("socket={agent},name=org.halyard.agent")]);
        }
        command
    }
}

/// The `halyard` executable: `HALYARD_BIN`, else what cargo built beside this test.
///
/// # Errors
/// Where it is not there.
pub fn halyard() -> Result<PathBuf> {
    let path = match std::env::var_os("HALYARD_BIN") {
        Some(path) => PathBuf::from(path),
        None => cache::build_folder()?.join("halyard"),
    };
    ensure!(
        path.is_file(),
        "{} is not there: `cargo build -p vmm` builds it, HALYARD_BIN names another",
        path.display()
    );
    std::fs::canonicalize(&path).with_context(|| path.display().to_string())
}

impl Host {
    /// Starts a virtual machine. Does not wait for its guest.
    ///
    /// # Errors
    /// Where `halyard` cannot be started. What it says of its arguments is heard from the [`Vm`].
    pub fn halyard(&self, spec: &VmSpec) -> Result<Vm<'_>> {
        let agent = format!("{}/{}", self.folder()?, "agent");
        let process = self.spawn(spec.command(&halyard()?.display().to_string(), &agent))?;
        Ok(Vm { host: self, process, agent: spec.agent.then_some(agent), client: std::sync::OnceLock::new() })
    }
}

/// A virtual machine. Dropping it kills its `halyard`.
pub struct Vm<'a> {
    host: &'a Host,
    process: Process,
    agent: Option<String>,
    client: std::sync::OnceLock<Client>,
}

impl Vm<'_> {
    /// The `halyard` process, to which its standard input, output and signals belong.
    pub fn process(&self) -> &Process {
        &self.process
    }

    /// Process id of `halyard` in the host.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// Waits for a line on standard output, where the serial port leads by default; see [`Process::wait_line`].
    ///
    /// # Errors
    /// As there.
    pub fn wait_line(&self, part: &str) -> Result<String> {
        self.process.wait_line(part)
    }

    /// Writes to standard input, where the serial port leads by default.
    ///
    /// # Errors
    /// Where it is not read in time.
    pub fn write_serial(&self, bytes: &[u8]) -> Result<()> {
        self.process.write(bytes)
    }

    /// Sends `halyard` a signal, by number.
    ///
    /// # Errors
    /// Where the host is gone.
    pub fn kill(&self, signal: i32) -> Result<()> {
        self.process.kill(signal)
    }

    /// Waits for the end of `halyard`.
    ///
    /// # Errors
    /// Where it runs on, with the end of what it wrote.
    pub fn exit_status(&self) -> Result<Status> {
        self.process.wait()
    }

    /// Runs a command in the guest, whose agent is waited for the first time.
    ///
    /// # Errors
    /// Where the guest has no agent, it does not answer in time, or the command does not end in time.
    pub fn run(&self, command: impl Into<Cmd>) -> Result<Output> {
        self.guest()?.run(command).map_err(|error| self.explain(error))
    }

    /// Starts a command in the guest.
    ///
    /// # Errors
    /// As [`Vm::run`].
    pub fn spawn(&self, command: impl Into<Cmd>) -> Result<Process> {
        self.guest()?.spawn(command).map_err(|error| self.explain(error))
    }

    /// The session with the guest's agent, which is opened the first time.
    ///
    /// # Errors
    /// Where the guest has no agent, or it does not answer in time.
    pub fn guest(&self) -> Result<Client> {
        if let Some(client) = self.client.get() {
            return Ok(client.clone());
        }
        let client = self.open_agent().map_err(|error| self.explain(error))?;
        Ok(self.client.get_or_init(|| client).clone())
    }

    /// Ends the session with the guest's agent, as after a reboot, which it does not outlive. The next use opens another.
    pub fn forget_agent(&mut self) {
        self.client.take();
    }

    fn open_agent(&self) -> Result<Client> {
        let path = self.agent.as_ref().context("this guest has no agent")?;
        let deadline = Instant::now() + PATIENCE;
        // The socket is there once halyard has made its devices.
        let socket = loop {
            match self.host.connect(path) {
                Ok(socket) => break socket,
                Err(error) => {
                    ensure!(self.process.status().is_none() && Instant::now() < deadline, "{error:#}");
                    let ended = self.process.wait_for(Duration::from_millis(50));
                    ensure!(ended.is_err(), "halyard has ended");
                }
            }
        };
        let witness: Witness = std::sync::Arc::new(String::new);
        let left = deadline.saturating_duration_since(Instant::now());
        Client::open("guest", socket, left, witness)
    }

    /// Adds to an error what `halyard` and the guest said last.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let ended = match self.process.status() {
            Some(status) => format!("halyard has ended with {status}"),
            None => format!("halyard runs, process {}", self.pid()),
        };
        anyhow!("{error:#}\n{ended}{}", self.process.last_words())
    }
}
