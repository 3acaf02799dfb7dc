//! A host to start monitors in: this machine where it has hardware virtualization, else one that QEMU emulates.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cache;
use crate::client::{Client, Witness};
use crate::command::{Cmd, Output};
use crate::forward::Forward;
use crate::images;
use crate::kernels::Kernel;
use crate::process::{Process, Socket};
use crate::qemu;
use crate::text::Text;

/// How long an emulated host may take to start.
const START: Duration = Duration::from_secs(90);

/// Which host a test gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// This machine itself.
    Direct,
    /// A host in QEMU's software emulation, with this machine's root file system.
    Emulated,
}

impl Kind {
    /// As `HALYARD_LAB` (`direct` or `tcg`) says, else by what this machine can do; and why.
    ///
    /// # Errors
    /// Where `HALYARD_LAB` says something else.
    pub fn choose() -> Result<(Self, String)> {
        match std::env::var("HALYARD_LAB").as_deref() {
            Ok("direct") => return Ok((Self::Direct, "HALYARD_LAB says so".into())),
            Ok("tcg") => return Ok((Self::Emulated, "HALYARD_LAB says so".into())),
            Ok("") | Err(_) => {}
            Ok(other) => bail!("HALYARD_LAB is {other}; direct or tcg is what it may be"),
        }
        let facts = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
        let flag = facts
            .lines()
            .filter(|line| line.starts_with("flags"))
            .flat_map(str::split_whitespace)
            .find(|flag| ["vmx", "svm"].contains(flag));
        Ok(match flag {
            Some(flag) => (Self::Direct, format!("/proc/cpuinfo shows {flag}")),
            None => (Self::Emulated, "/proc/cpuinfo shows neither vmx nor svm".into()),
        })
    }
}

/// What a host shall have. On this machine itself, only what it has is there.
#[derive(Clone, Debug)]
pub struct HostSpec {
    pub(crate) cpus: u32,
    pub(crate) memory_mib: u64,
    pub(crate) nodes: u32,
    pub(crate) disks: Vec<(u64, u32)>,
    pub(crate) iommu: bool,
    pub(crate) options: Vec<String>,
    pub(crate) words: String,
    pub(crate) kernel: Kernel,
    kind: Option<Kind>,
    show_console: bool,
}

impl Default for HostSpec {
    fn default() -> Self {
        Self {
            cpus: 1,
            memory_mib: 8192,
            nodes: 1,
            disks: Vec::new(),
            iommu: false,
            options: Vec::new(),
            words: String::new(),
            kernel: Kernel::Lab,
            kind: None,
            show_console: std::env::var_os("HALYARD_LAB_CONSOLE").is_some(),
        }
    }
}

impl HostSpec {
    /// One processor, 8 GiB of memory, no disks. Of hosts of several, guests were lost (see `qemu::keep_processors_apart`).
    pub fn new() -> Self {
        Self::default()
    }

    /// Processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Memory in MiB; the machine gives it as it is touched.
    #[must_use]
    pub fn memory_mib(mut self, mebibytes: u64) -> Self {
        self.memory_mib = mebibytes;
        self
    }

    /// NUMA nodes, which share processors and memory evenly; at most 8.
    #[must_use]
    pub fn numa_nodes(mut self, nodes: u32) -> Self {
        self.nodes = nodes;
        self
    }

    /// One NVMe disk more, of so many bytes, at a NUMA node.
    #[must_use]
    pub fn nvme(mut self, bytes: u64, node: u32) -> Self {
        self.disks.push((bytes, node));
        self
    }

    /// An IOMMU, switched on.
    #[must_use]
    pub fn iommu(mut self) -> Self {
        self.iommu = true;
        self
    }

    /// Options for QEMU, one more at its end.
    #[must_use]
    pub fn qemu<T: Into<String>>(mut self, options: impl IntoIterator<Item = T>) -> Self {
        self.options.extend(options.into_iter().map(Into::into));
        self
    }

    /// Another kernel, for which the host is an emulated one wherever it runs.
    #[must_use]
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self.kind(Kind::Emulated)
    }

    /// Words for the host kernel's command line.
    #[must_use]
    pub fn kernel_words(mut self, words: &str) -> Self {
        self.words = words.to_owned();
        self
    }

    /// Shows its console on standard error as it comes. The environment can ask for it too: `HALYARD_LAB_CONSOLE=1`.
    #[must_use]
    pub fn show_console(mut self) -> Self {
        self.show_console = true;
        self
    }

    /// This kind of host, instead of the one that [`Kind::choose`] would take.
    #[must_use]
    pub fn kind(mut self, kind: Kind) -> Self {
        self.kind = Some(kind);
        self
    }
}

/// A host. With it end all processes that were started in it.
pub struct Host {
    client: Client,
    kind: Kind,
    console: Console,
    machine: Mutex<Child>,
    next: AtomicU32,
    /// Removed by the process that [`Host::machine`] is, so that it goes even where the harness is killed.
    files: PathBuf,
}

impl Host {
    /// Starts a host and says which on standard error.
    ///
    /// # Errors
    /// Where something is missing that it is made of, or it does not come up in time: with its console's last lines.
    pub fn start(spec: &HostSpec) -> Result<Self> {
        let (kind, reason) = match spec.kind {
            Some(kind) => (kind, "the test says so".to_owned()),
            None => Kind::choose()?,
        };
        let begun = Instant::now();
        let host = match kind {
            Kind::Direct => Self::direct()?,
            Kind::Emulated => Self::emulated(spec)?,
        };
        let what = match kind {
            Kind::Direct => "this machine itself".to_owned(),
            Kind::Emulated => {
                format!("a host in software emulation, {} processors, {} MiB", spec.cpus, spec.memory_mib)
            }
        };
        // Not eprintln: that would be captured as a test's own output.
        let _ = writeln!(std::io::stderr(), "lab: {what} ({reason}), up in {:.1} s", begun.elapsed().as_secs_f64());
        Ok(host)
    }

    /// The host that all tests of this process share; it is started for the first of them, and ends with the process.
    ///
    /// # Errors
    /// As [`Host::start`]; every test gets the same error.
    pub fn shared() -> Result<&'static Self> {
        static SHARED: OnceLock<Result<Host, String>> = OnceLock::new();
        SHARED
            .get_or_init(|| Self::start(&HostSpec::new()).map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|reason| anyhow::anyhow!("{reason}"))
    }

    /// Which kind of host it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Is it this machine itself?
    pub fn is_direct(&self) -> bool {
        self.kind == Kind::Direct
    }

    /// What its console said so far; nothing for this machine itself.
    pub fn console(&self) -> String {
        self.console.all()
    }

    /// Runs a command to its end; see [`Client::run`].
    ///
    /// # Errors
    /// As there.
    pub fn run(&self, command: impl Into<Cmd>) -> Result<Output> {
        self.client.run(command)
    }

    /// Starts a command; see [`Client::spawn`].
    ///
    /// # Errors
    /// As there.
    pub fn spawn(&self, command: impl Into<Cmd>) -> Result<Process> {
        self.client.spawn(command)
    }

    /// Connects to a Unix socket; see [`Client::connect`].
    ///
    /// # Errors
    /// As there.
    pub fn connect(&self, path: &str) -> Result<Socket> {
        self.client.connect(path)
    }

    /// A socket of the host at a path of this machine; see [`Forward::new`].
    ///
    /// # Errors
    /// As there.
    pub fn forward(&self, path: &str) -> Result<Forward> {
        Forward::new(&self.client, path)
    }

    /// Content of a file of the host.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn read_file(&self, path: &str) -> Result<Vec<u8>> {
        let output = self.run(Cmd::new("cat").arg(path))?;
        ensure!(output.status.success(), "{path}: {}", String::from_utf8_lossy(&output.stderr).trim_end());
        Ok(output.stdout)
    }

    /// Writes a file of the host.
    ///
    /// # Errors
    /// Where it cannot be written.
    pub fn write_file(&self, path: &str, content: impl Into<Vec<u8>>) -> Result<()> {
        let command = Cmd::shell("cat >\"$0\"").arg(path).input(content);
        self.run(command)?.ok().with_context(|| path.to_owned())?;
        Ok(())
    }

    /// Binds a PCI function to vfio-pci, in the words of Halyard's own hint.
    ///
    /// # Errors
    /// Where it cannot be bound.
    pub fn pass_through(&self, function: &str) -> Result<()> {
        let path = format!("/sys/bus/pci/devices/{function}");
        self.run(format!(
            "echo vfio-pci >{path}/driver_override && {{ [ ! -e {path}/driver ] || echo {function} >{path}/driver/unbind; }} && \
             echo {function} >/sys/bus/pci/drivers_probe"
        ))?
        .ok()?;
        Ok(())
    }

    /// A name that nothing else of this host has, at most 15 bytes long, as those of network devices are.
    pub fn unique(&self, prefix: &str) -> String {
        // On this machine itself, tests of several processes are at work at once.
        let own = if self.is_direct() { std::process::id() % 100_000 } else { 0 };
        format!("{prefix}{own}n{}", self.next.fetch_add(1, Ordering::Relaxed))
    }

    /// A new folder of the host, for what a test leaves behind. In an emulated host it lies in memory.
    ///
    /// # Errors
    /// Where it cannot be made.
    pub fn folder(&self) -> Result<String> {
        let base = if self.is_direct() { self.files.display().to_string() } else { "/run/halyard".to_owned() };
        let path = format!("{base}/{}", self.unique("t"));
        self.run(Cmd::new("mkdir").arg("-p").arg(&path))?.ok()?;
        Ok(path)
    }

    /// Ends an emulated host at once, as a loss of power would. For tests of what happens then.
    ///
    /// # Errors
    /// Where it cannot be ended.
    pub fn power_off(&self) -> Result<()> {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        // The guard kills QEMU when this end is closed.
        drop(machine.stdin.take());
        machine.wait().context("waiting for the host's end")?;
        Ok(())
    }

    fn direct() -> Result<Self> {
        let (ours, its) = UnixStream::pair().context("a pair of sockets")?;
        let agent = cache::agent()?;
        let mut machine = Command::new(&agent);
        let files = tempfile::Builder::new().prefix("halyard-").tempdir_in("/tmp")?.keep();
        machine.arg("socket").arg(&files).process_group(0).stdin(Stdio::from(OwnedFd::from(its))).stdout(Stdio::null());
        let child = machine.spawn().with_context(|| agent.display().to_string())?;
        drop(machine); // it holds the other end
        let witness: Witness = Arc::new(String::new);
        let client = Client::open("this machine", ours, START, witness)?;
        let (next, console) = (AtomicU32::new(0), Console::default());
        Ok(Self { client, kind: Kind::Direct, console, machine: Mutex::new(child), next, files })
    }

    fn emulated(spec: &HostSpec) -> Result<Self> {
        let initramfs = images::lab(spec.kernel)?;
        let files = tempfile::Builder::new().prefix("halyard-lab-").tempdir()?.keep();
        let path = files.join("agent");
        let listener = UnixListener::bind(&path).with_context(|| path.display().to_string())?;
        let mut disks: Vec<(PathBuf, u32)> = Vec::new();
        for (index, (bytes, node)) in spec.disks.iter().enumerate() {
            let path = files.join(format!("nvme{index}"));
            File::create(&path)?.set_len(*bytes).with_context(|| path.display().to_string())?;
            disks.push((path, *node));
        }
        let arguments = qemu::arguments(spec, &initramfs, &path, &disks)?;
        let mut child = Command::new(cache::agent()?)
            .arg("guard")
            .arg(&files)
            .args(arguments)
            // A terminal's Ctrl-C is not for it: it ends in order when the harness has.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("the guard of QEMU")?;
        let console = Console::default();
        console.follow(child.stdout.take().context("QEMU's output")?, spec.show_console);
        console.follow(child.stderr.take().context("QEMU's error output")?, spec.show_console);
        let stream = match accept(listener, &mut child) {
            Ok(stream) => stream,
            Err(error) => bail!("{error:#}{}", console.tail()),
        };
        let told = console.clone();
        let witness: Witness = Arc::new(move || told.tail());
        let client = Client::open("lab host", stream, START, witness)?;
        if spec.cpus > 1 {
            qemu::keep_processors_apart(child.id())?;
        }
        let next = AtomicU32::new(0);
        Ok(Self { client, kind: Kind::Emulated, console, machine: Mutex::new(child), next, files })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let mut machine = self.machine.lock().unwrap_or_else(PoisonError::into_inner);
        // Whichever leads to it: the guard ends with its input, an agent of this machine with its session.
        drop(machine.stdin.take());
        self.client.close();
        let _ = machine.wait();
        // Gone already, unless that was killed.
        let _ = fs::remove_dir_all(&self.files);
    }
}

/// Waits for QEMU to connect, or to end instead.
fn accept(listener: UnixListener, child: &mut Child) -> Result<UnixStream> {
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || sender.send(listener.accept().map(|(stream, _)| stream)));
    let deadline = Instant::now() + START;
    loop {
        if let Ok(stream) = receiver.recv_timeout(Duration::from_millis(50)) {
            return stream.context("QEMU's connection");
        }
        if let Some(status) = child.try_wait()? {
            bail!("QEMU did not start: {status}");
        }
        ensure!(Instant::now() < deadline, "QEMU did not connect to the harness");
    }
}

/// The console of an emulated host, and what QEMU itself says.
#[derive(Clone, Default)]
struct Console {
    text: Arc<Mutex<Text>>,
}

impl Console {
    fn follow(&self, from: impl Read + Send + 'static, show: bool) {
        let text = self.text.clone();
        thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while matches!(from.read_until(b'\n', &mut line), Ok(1..)) {
                if show {
                    let _ = std::io::stderr().write_all(&line);
                }
                text.lock().unwrap_or_else(PoisonError::into_inner).push(&line);
                line.clear();
            }
        });
    }

    fn all(&self) -> String {
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(text.bytes()).into_owned()
    }

    fn tail(&self) -> String {
        let text = self.text.lock().unwrap_or_else(PoisonError::into_inner);
        if text.is_empty() {
            return String::new();
        }
        // A kernel that dies says why first, and then much else.
        let all = String::from_utf8_lossy(text.bytes());
        let why = all.lines().find(|line| ["Kernel panic", "Oops", "BUG:"].iter().any(|sign| line.contains(sign)));
        let why = why.map_or_else(String::new, |line| format!("\n--- the host's console ---\n{line}"));
        format!("{why}\n--- the host's console ends ---\n{}", text.tail())
    }
}
