//! The configuration of a VM.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::confidential::Confidential;
use crate::device::{DeviceConfig, Endpoint};
use crate::host::KindName;
use crate::units::{ByteSize, TimeSpan};

/// A VM: what it boots, its processors and memory, its devices, and what happens when it stops.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// What the VM boots. It may be left out where there is firmware, which then looks for something to boot on the disks.
    #[serde(default, skip_serializing_if = "Kernel::is_default")]
    pub kernel: Kernel,
    /// Firmware that boots first, and then starts the kernel. Without it: the kernel is entered directly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<Firmware>,
    /// Its processors.
    #[serde(default)]
    pub cpus: Cpus,
    /// Its memory.
    #[serde(default)]
    pub memory: Memory,
    /// What hides it from its host. Without it: a plain VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidential: Option<Confidential>,
    /// Fixed parts of the machine that can be switched on and off.
    #[serde(default)]
    pub platform: Platform,
    /// Its PCI buses.
    #[serde(default, skip_serializing_if = "Pci::is_default")]
    pub pci: Pci,
    /// What happens when the guest resets or panics.
    #[serde(default)]
    pub lifecycle: Lifecycle,
    /// Where the serial port (the guest's ttyS0) leads. Without it: to standard input and output if no console does,
    /// else nowhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<Endpoint>,
    /// Its devices, in the order in which the guest finds them.
    #[serde(default)]
    pub devices: Vec<DeviceConfig>,
}

impl VmConfig {
    /// Its kind.
    pub fn kind(&self) -> KindName {
        self.confidential.as_ref().map_or(KindName::Standard, Confidential::name)
    }

    /// Whether memory of the guest's is to stay in the host's.
    pub fn locks_memory(&self) -> bool {
        self.memory.lock || self.has_vfio()
    }

    /// Whether there are functions of the host's among its devices.
    pub fn has_vfio(&self) -> bool {
        self.devices.iter().any(|device| matches!(device, DeviceConfig::Vfio(_)))
    }

    /// A VM that boots `kernel`, all else by default.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: Kernel { path: kernel.into(), ..Kernel::default() },
            firmware: None,
            cpus: Cpus::default(),
            memory: Memory::default(),
            confidential: None,
            platform: Platform::default(),
            pci: Pci::default(),
            lifecycle: Lifecycle::default(),
            serial: None,
            devices: Vec::new(),
        }
    }
}

/// What the VM boots.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// A Linux kernel: a bzImage (vmlinuz) or an ELF file (vmlinux, or any kernel with a PVH entry).
    pub path: PathBuf,
    /// The initial file system, as a cpio archive that the kernel can unpack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line, at most 2047 bytes. Without it: a `console=` for the serial port, where it leads
    /// somewhere, and one for the first console, so that the guest's log appears.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// The kernel's `System.map`, by which addresses in it get names where a boot takes too long. Without it: one beside
    /// the kernel or in /boot with the kernel's version in its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_map: Option<PathBuf>,
    /// Where unpacked kernels are kept, so that the next VM need not unpack the same bzImage again: `user` is the
    /// directory `halyard/unpacked` where this user's caches are, `off` keeps none, and else it is a directory of its
    /// own. Only its owner may be able to write to it.
    #[serde(default, skip_serializing_if = "KernelCache::is_default")]
    pub cache: KernelCache,
}

impl Kernel {
    /// None is named.
    pub fn is_none(&self) -> bool {
        self.path.as_os_str().is_empty()
    }

    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Firmware for PCs, such as OVMF.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Firmware {
    /// A file of code and variables in one, of whole pages and at most 16 MiB: Debian's package `ovmf-inteltdx` has one.
    /// What the guest changes in its variables is lost when it is reset.
    pub path: PathBuf,
}

/// Where unpacked kernels are kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(from = "PathBuf", into = "PathBuf")]
#[schemars(with = "String")]
pub enum KernelCache {
    /// Where this user's caches are.
    #[default]
    User,
    /// Nowhere.
    Off,
    /// In this directory.
    Directory(PathBuf),
}

impl KernelCache {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl From<PathBuf> for KernelCache {
    fn from(text: PathBuf) -> Self {
        match text.to_str() {
            Some("user") => Self::User,
            Some("off") => Self::Off,
            _ => Self::Directory(text),
        }
    }
}

impl From<KernelCache> for PathBuf {
    fn from(cache: KernelCache) -> Self {
        match cache {
            KernelCache::User => "user".into(),
            KernelCache::Off => "off".into(),
            KernelCache::Directory(path) => path,
        }
    }
}

/// The VM's processors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cpus {
    /// How many vCPUs, 1 to 254.
    #[schemars(range(min = 1, max = 254))]
    pub count: u32,
    /// How many there may be while the VM runs, where vCPUs are to come and go: at least `count`. Without it there are
    /// always `count`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 254))]
    pub max: Option<u32>,
    /// How they are grouped, those that may come included. Without it: one socket with cores of one thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,
}

impl Cpus {
    /// How many vCPUs there may ever be.
    pub fn most(&self) -> u32 {
        self.max.unwrap_or(self.count)
    }
}

impl Default for Cpus {
    fn default() -> Self {
        Self { count: 1, max: None, topology: None }
    }
}

/// How vCPUs are grouped: `sockets` × `cores` × `threads` is the number of vCPUs, or how many there may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Topology {
    /// Processor packages.
    #[schemars(range(min = 1))]
    pub sockets: u32,
    /// Cores in a socket.
    #[schemars(range(min = 1))]
    pub cores: u32,
    /// Threads in a core.
    #[schemars(range(min = 1))]
    pub threads: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self { sockets: 1, cores: 1, threads: 1 }
    }
}

/// The VM's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Memory {
    /// How much the guest has when it boots.
    pub size: ByteSize,
    /// How much it can have while it runs (`PATCH /api/v1/vm/memory`): `size` and a multiple of 128M, or of 1G with huge
    /// pages of that size. The guest needs a driver for virtio-mem. Without it: `size`, and no more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max: Option<ByteSize>,
    /// How long a guest that is to have more or less memory may take without any progress. At most 24h.
    #[serde(skip_serializing_if = "Memory::is_usual_timeout")]
    pub resize_timeout: TimeSpan,
    /// Take the memory from the host's reserved huge pages (hugetlbfs) of this size.
    pub hugepages: Hugepages,
    /// Let the host back the memory with transparent huge pages. Without meaning where `hugepages` is set.
    pub transparent_huge_pages: bool,
    /// Populate all memory before the guest starts instead of when it is first touched.
    pub prefault: bool,
    /// Memory is a file (memfd) that other processes can map, as vhost-user devices need it; otherwise it is
    /// anonymous.
    pub shared: bool,
    /// Keep the memory in the host's: it is populated before the guest starts and never swapped out.
    pub lock: bool,
    /// Guests of one kernel share those of its pages that none of them changes, where it is kept (`kernel.cache`) from
    /// an earlier run: some 17 MiB of Debian's. It costs the kernel its huge pages.
    pub share_kernel: bool,
}

impl Default for Memory {
    fn default() -> Self {
        Self {
            size: ByteSize::mib(512),
            max: None,
            resize_timeout: TimeSpan::from_millis(60_000),
            hugepages: Hugepages::Off,
            transparent_huge_pages: true,
            prefault: false,
            shared: false,
            lock: false,
            share_kernel: false,
        }
    }
}

impl Memory {
    /// Bytes of memory that can be added while the guest runs.
    pub fn pluggable(&self) -> u64 {
        self.max.map_or(0, |max| max.bytes().saturating_sub(self.size.bytes()))
    }

    /// Bytes that are added or taken away at once: 2 MiB, or a larger huge page.
    pub fn block(&self) -> u64 {
        self.hugepages.bytes().unwrap_or(0).max(2 << 20)
    }

    /// What can be added is a multiple of this many bytes: Linux adds memory by 128 MiB.
    pub fn step(&self) -> u64 {
        self.block().max(128 << 20)
    }

    fn is_usual_timeout(time: &TimeSpan) -> bool {
        *time == Self::default().resize_timeout
    }
}

/// The size of the host's reserved huge pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum Hugepages {
    /// Not used.
    #[default]
    #[serde(rename = "off")]
    Off,
    /// 2 MiB.
    #[serde(rename = "2M")]
    Size2M,
    /// 1 GiB.
    #[serde(rename = "1G")]
    Size1G,
}

impl Hugepages {
    /// The page size in bytes, where huge pages are used.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Off => None,
            Self::Size2M => Some(2 << 20),
            Self::Size1G => Some(1 << 30),
        }
    }
}

/// Fixed parts of the machine that can be switched on and off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Platform {
    /// The device with which a Linux guest says that it panicked.
    pub pvpanic: bool,
    /// The I/O port 0xf4 with which a test guest ends the run: a byte written there ends the monitor with 64 plus the
    /// byte's five low bits.
    pub debug_exit: bool,
}

impl Default for Platform {
    fn default() -> Self {
        Self { pvpanic: true, debug_exit: false }
    }
}

/// The VM's PCI buses.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Pci {
    /// How many devices can be added while the VM runs: each needs a hot-plug port of its own. 224 at the most; each eight
    /// take the place of a device that is there from the start.
    #[schemars(range(max = 224))]
    pub hotplug_ports: u8,
    /// How long a guest has to take a device or a vCPU that is added, or to let go of one that is removed. At most 24h.
    pub hotplug_timeout: TimeSpan,
}

impl Pci {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// How many devices fewer than without hot-plug ports can be there from the start: ports share devices by eight.
    pub fn devices_of_ports(&self) -> u32 {
        u32::from(self.hotplug_ports).div_ceil(8)
    }
}

impl Default for Pci {
    fn default() -> Self {
        Self { hotplug_ports: 0, hotplug_timeout: TimeSpan::from_millis(60_000) }
    }
}

/// What happens when the guest stops by itself, and when it is to stop. Power-off always ends the run, and so does a
/// triple fault.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Lifecycle {
    /// When the guest resets.
    pub on_reset: OnReset,
    /// When the guest's kernel panics and says so through pvpanic.
    pub on_panic: OnPanic,
    /// How long a guest has to switch itself off after its power button was pressed, where whoever pressed it did not
    /// say: a SIGTERM, or a request without a deadline. At most 24h.
    pub shutdown_timeout: TimeSpan,
    /// How long a boot may take to user space. Where it takes longer, the run ends with exit code 6 and says what holds
    /// it up. Without it: for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_timeout: Option<TimeSpan>,
    /// What tells that user space is reached, for `boot_timeout`.
    pub boot_until: BootUntil,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self {
            on_reset: OnReset::default(),
            on_panic: OnPanic::default(),
            shutdown_timeout: TimeSpan::from_millis(90_000),
            boot_timeout: None,
            boot_until: BootUntil::default(),
        }
    }
}

/// What tells that user space is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum BootUntil {
    /// A vCPU is seen in user mode, or the guest tells. Programs of an initramfs count, too.
    #[default]
    UserMode,
    /// The guest tells: a program writes to the I/O port 0x508, or to the named port of a console.
    Told,
}

/// What happens when the guest resets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnReset {
    /// It boots again.
    #[default]
    Restart,
    /// The run ends, with exit code 3.
    Exit,
}

/// What happens when the guest panics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum OnPanic {
    /// The run ends, with exit code 4.
    #[default]
    Exit,
    /// It boots again.
    Restart,
    /// It is logged, and the guest goes on: to its own reboot or crash dump, or to stand still.
    Ignore,
}
