//! Devices, and the host side of serial ports and consoles.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::units::{ByteSize, MacAddr};

/// A device of the guest. Every device has an `id` by which requests, messages and metrics name it; without one it is
/// its type and the first free number, as in `disk0`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum DeviceConfig {
    /// A disk (virtio-blk).
    Disk(Disk),
    /// A network card (virtio-net).
    Net(Net),
    /// A console or a named serial port (virtio-console).
    Console(Console),
    /// A source of random numbers (virtio-rng).
    Rng(Rng),
    /// A PCI function of the host's, which the guest drives itself (VFIO).
    Vfio(Vfio),
}

impl DeviceConfig {
    /// The device's id; empty until [`crate::VmConfig::fill_defaults`] has given one.
    pub fn id(&self) -> &str {
        match self {
            Self::Disk(Disk { id, .. })
            | Self::Net(Net { id, .. })
            | Self::Console(Console { id, .. })
            | Self::Rng(Rng { id, .. })
            | Self::Vfio(Vfio { id, .. }) => id,
        }
    }

    /// Sets the device's id.
    pub fn set_id(&mut self, id: &str) {
        id.clone_into(self.id_mut());
    }

    pub(crate) fn id_mut(&mut self) -> &mut String {
        match self {
            Self::Disk(Disk { id, .. })
            | Self::Net(Net { id, .. })
            | Self::Console(Console { id, .. })
            | Self::Rng(Rng { id, .. })
            | Self::Vfio(Vfio { id, .. }) => id,
        }
    }

    /// The descriptors that the device is on: the field of each, and its number.
    pub fn descriptors(&self) -> impl Iterator<Item = (&'static str, i32)> {
        let (fd, iommu) = match self {
            Self::Disk(Disk { fd, .. }) | Self::Net(Net { fd, .. }) => (*fd, None),
            Self::Vfio(Vfio { fd, iommu_fd, .. }) => (*fd, *iommu_fd),
            Self::Console(_) | Self::Rng(_) => (None, None),
        };
        let named = |field| move |number| (field, number);
        fd.map(named("fd")).into_iter().chain(iommu.map(named("iommu_fd")))
    }

    /// The numbers of [`DeviceConfig::descriptors`], to be changed.
    pub fn descriptors_mut(&mut self) -> impl Iterator<Item = &mut i32> {
        let (fd, iommu) = match self {
            Self::Disk(Disk { fd, .. }) | Self::Net(Net { fd, .. }) => (fd.as_mut(), None),
            Self::Vfio(Vfio { fd, iommu_fd, .. }) => (fd.as_mut(), iommu_fd.as_mut()),
            Self::Console(_) | Self::Rng(_) => (None, None),
        };
        fd.into_iter().chain(iommu)
    }

    /// The device's `type`, as the configuration writes it.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Disk(_) => "disk",
            Self::Net(_) => "net",
            Self::Console(_) => "console",
            Self::Rng(_) => "rng",
            Self::Vfio(_) => "vfio",
        }
    }
}

/// A disk, given by path or as an open descriptor. The file's format is raw, and never guessed from its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The device's id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// A file or a block device, a multiple of 512 bytes long. Either this or `fd` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// An open descriptor of one: an inherited one, or one that comes with the request, the first as number 3. It must
    /// be open for writing, unless the disk is `readonly`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3))]
    pub fd: Option<i32>,
    /// The guest cannot write to it. The file is opened for reading only, and several VMs may share it.
    #[serde(default)]
    pub readonly: bool,
    /// How many of its bytes the guest sees, a multiple of 512; without it all of them. While the VM runs it can grow,
    /// once the file or device has, and each change of the disk without it has the guest see all that there is then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<ByteSize>,
    /// Go around the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// The serial number that the guest sees, at most 20 bytes of printable ASCII; without one, the id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 20))]
    pub serial: Option<String>,
    /// How many request queues the guest may use, 1 to 64.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 64))]
    pub queues: u16,
}

fn one() -> u16 {
    1
}

impl Disk {
    /// A writable disk on `path`, all else by default.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            id: String::new(),
            path: Some(path.into()),
            fd: None,
            readonly: false,
            size: None,
            direct: false,
            serial: None,
            queues: one(),
        }
    }
}

/// A network card on a tap interface of the host, given by name or as an open descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Net {
    /// The device's id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The name of a tap interface. Either this or `fd` is needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 15))]
    pub tap: Option<String>,
    /// A descriptor of a tap interface, opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR: an inherited one, or one that
    /// comes with the request, the first as number 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3))]
    pub fd: Option<i32>,
    /// The card's address. Without one a random, locally administered address is taken, another at each start.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// The largest packet that the guest is told to send, in bytes without the Ethernet header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 68))]
    pub mtu: Option<u16>,
    /// Whether its link is up. While it is down, the guest sees no carrier, and frames of both directions are dropped.
    #[serde(default, skip_serializing_if = "Link::is_up")]
    pub link: Link,
}

/// The link of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Link {
    /// Frames pass.
    #[default]
    Up,
    /// They do not.
    Down,
}

impl Link {
    /// Whether frames pass.
    pub fn is_up(&self) -> bool {
        *self == Self::Up
    }
}

/// A console. Without a name it is one that the guest can use as its own (hvc0, hvc1, … in the order of the
/// configuration); with a name it is a serial port for programs in the guest (`/dev/virtio-ports/NAME`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// The device's id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The port's name in the guest: 1 to 64 letters, digits, `.`, `_` and `-`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 64))]
    pub name: Option<String>,
    /// Where it leads on the host.
    pub endpoint: Endpoint,
}

/// A source of random numbers: those of the host's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Rng {
    /// The device's id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
}

/// A PCI function of the host's that is bound to its driver vfio-pci. The guest drives it, and it reaches the guest's memory,
/// all of which the host keeps in place for it (of a confidential guest's, what is shared). Its interrupts are MSI-X or MSI.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Vfio {
    /// The device's id.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub id: String,
    /// The function's address on the host: domain, bus, device and function, as in `0000:01:00.0`. Either this or `fd` is
    /// needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = "^[0-9a-f]{4}:[0-9a-f]{2}:[01][0-9a-f]\\.[0-7]$"))]
    pub host: Option<String>,
    /// An open descriptor of the function (`/dev/vfio/devices/vfioN`): an inherited one, or one that comes with the request,
    /// the first as number 3.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3))]
    pub fd: Option<i32>,
    /// An open descriptor of `/dev/iommu`, which a function by descriptor needs unless the VM has another one already: they
    /// share it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 3))]
    pub iommu_fd: Option<i32>,
}

impl Vfio {
    /// Whether this is an address of a PCI function as Linux writes them.
    pub fn is_address(text: &str) -> bool {
        let digits =
            |text: &str, len| text.len() == len && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        let parts: Vec<&str> = text.split([':', '.']).collect();
        let [domain, bus, device, function] = parts.as_slice() else { return false };
        digits(domain, 4)
            && digits(bus, 2)
            && digits(device, 2)
            && device.starts_with(['0', '1'])
            && matches!(function.as_bytes(), [b'0'..=b'7'])
            && text == format!("{domain}:{bus}:{device}.{function}")
    }
}

/// Where a serial port or a console leads on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Endpoint {
    /// The monitor's standard input and output; a terminal is put into raw mode while the guest runs.
    Stdio {},
    /// A file that receives the output: made if missing, appended to if not. There is no input.
    File {
        /// The file's path.
        path: PathBuf,
    },
    /// A listening Unix socket, which serves one client at a time.
    Socket {
        /// The socket's path, at most 107 bytes.
        path: PathBuf,
    },
    /// A new pseudo-terminal, whose name is logged.
    Pty {},
    /// Clients of the API socket, one at a time (`/api/v1/vm/consoles/{id}`).
    Api {},
    /// Nowhere: output is dropped, there is no input.
    Off {},
}

impl Endpoint {
    /// The path that it names on the host, where it names one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path } | Self::Socket { path } => Some(path),
            Self::Stdio {} | Self::Pty {} | Self::Api {} | Self::Off {} => None,
        }
    }
}
