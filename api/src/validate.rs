//! What is wrong with a configuration, as far as it can be told without opening anything that it names.

mod conflicts;

use std::path::Path;

use crate::config::{Cpus, Hugepages, Kernel, KernelCache, Memory, Pci, VmConfig};
use crate::device::{Console, DeviceConfig, Disk, Endpoint, Net, Vfio};
use crate::host::HostFacts;
use crate::problem::Problem;
use crate::units::{ByteSize, TimeSpan, shorten};

/// The most vCPUs of a VM: local APIC ids are 8 bits wide (xAPIC), 255 is broadcast and the I/O APIC takes one.
pub const MAX_VCPUS: u32 = 254;
/// The least memory of a VM in bytes: the first megabyte, which holds the platform's tables, and a tiny guest.
pub const MIN_MEMORY: u64 = 2 << 20;
/// The least memory of a VM with firmware in bytes.
const MIN_FIRMWARE_MEMORY: u64 = 128 << 20;
/// The size of a page in bytes: memory is a multiple of it.
pub const PAGE_SIZE: u64 = 4096;
/// The longest kernel command line in bytes: Linux's COMMAND_LINE_SIZE on x86 without the closing NUL.
pub const MAX_CMDLINE_BYTES: usize = 2047;

/// The longest path of a Unix socket in bytes (`sun_path` without the closing NUL, unix(7)).
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// The longest name of a network interface in bytes (IFNAMSIZ without the closing NUL).
const MAX_INTERFACE_NAME_BYTES: usize = 15;
/// The longest id of a device and name of a port in bytes.
const MAX_NAME_BYTES: usize = 64;
/// The longest serial number of a disk in bytes (VIRTIO_BLK_ID_BYTES, virtio 1.2 §5.2.6).
const MAX_DISK_SERIAL_BYTES: usize = 20;
/// The most queues of a disk.
const MAX_QUEUES: u16 = 64;
/// Bytes of a disk's sector.
const SECTOR: u64 = 512;
/// The smallest MTU that a network card may advise (virtio 1.2 §5.1.4.1).
const MIN_MTU: u16 = 68;
/// The longest time that a guest may be given to switch itself off: a day.
const MAX_SHUTDOWN_TIMEOUT: TimeSpan = TimeSpan::from_millis(86_400_000);
/// The longest time that a guest may be given to take a device or to let go of one: a day.
const MAX_HOTPLUG_TIMEOUT: TimeSpan = MAX_SHUTDOWN_TIMEOUT;
/// The longest time that a guest may take to have more or less memory, without any progress: a day.
const MAX_RESIZE_TIMEOUT: TimeSpan = MAX_SHUTDOWN_TIMEOUT;
/// The most hot-plug ports: 28 devices of eight functions of the root bus.
const MAX_HOTPLUG_PORTS: u8 = 224;
/// The id of the serial port, which is no device.
const SERIAL_ID: &str = "serial";

/// Every problem of `config` on a host with these abilities. Nothing is opened: whether files exist and may be used is
/// for the machine to find out.
pub fn validate(config: &VmConfig, host: &HostFacts) -> Vec<Problem> {
    let mut problems = validate_running(config, host);
    // Memory that comes and goes is a device, too.
    let others = config.pci.devices_of_ports() + u32::from(config.memory.pluggable() > 0);
    let room = host.max_devices.saturating_sub(others);
    if config.devices.len() > usize::try_from(room).unwrap_or(usize::MAX) {
        let why = if room < host.max_devices { " beside its hot-plug ports" } else { "" };
        problems.push(Problem::new(
            "devices",
            format!("{} devices are too many", config.devices.len()),
            format!("a VM has room for {room}{why}"),
        ));
    }
    problems
}

/// As [`validate`], for a machine that exists: a device that was added to it is behind a hot-plug port, and needs no room
/// among those that are there from the start.
pub fn validate_running(config: &VmConfig, host: &HostFacts) -> Vec<Problem> {
    let mut report = Report::default();
    kernel(&mut report, &config.kernel, config.firmware.is_some());
    firmware(&mut report, config);
    cpus(&mut report, &config.cpus, host);
    memory(&mut report, &config.memory, host);
    max_memory(&mut report, &config.memory, host);
    let kind = config.kind();
    if !host.kinds.contains(&kind) {
        let known: Vec<&str> = host.kinds.iter().map(|kind| kind.as_str()).collect();
        report.add(
            "confidential.kind",
            format!("this host cannot run VMs of the kind «{kind}»"),
            match known.as_slice() {
                [] => "`halyard probe` says why".to_owned(),
                _ => format!("it can run: {}; `halyard probe` says why", known.join(", ")),
            },
        );
    }
    if config.lifecycle.shutdown_timeout > MAX_SHUTDOWN_TIMEOUT {
        report.add(
            "lifecycle.shutdown_timeout",
            format!("{} is too long", config.lifecycle.shutdown_timeout),
            format!("{MAX_SHUTDOWN_TIMEOUT} is the most"),
        );
    }
    pci(&mut report, &config.pci);
    if config.lifecycle.boot_timeout.is_some_and(|time| time.duration().is_zero()) {
        report.add(
            "lifecycle.boot_timeout",
            "no guest boots in no time",
            "write 30s, or leave it out to wait for ever",
        );
    }
    if let Some(serial) = &config.serial {
        endpoint(&mut report, "serial", serial);
    }
    for (index, device) in config.devices.iter().enumerate() {
        let at = format!("devices[{index}]");
        device_id(&mut report, &at, device.id());
        match device {
            DeviceConfig::Disk(it) => disk(&mut report, &at, it),
            DeviceConfig::Net(it) => net(&mut report, &at, it),
            DeviceConfig::Console(it) => console(&mut report, &at, it),
            DeviceConfig::Vfio(it) => vfio(&mut report, &at, it),
            DeviceConfig::Rng(_) => {}
        }
    }
    shared_kernel(&mut report, config);
    conflicts::conflicts(&mut report, config);
    report.problems
}

#[derive(Default)]
struct Report {
    problems: Vec<Problem>,
}

impl Report {
    fn add(&mut self, field: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem::new(field, problem, remedy));
    }
}

fn kernel(report: &mut Report, kernel: &Kernel, firmware: bool) {
    match (kernel.is_none(), firmware) {
        (false, _) => path(report, "kernel.path", &kernel.path),
        (true, false) => {
            let remedy = "name a bzImage (vmlinuz) or an ELF kernel (vmlinux), or firmware that finds one on a disk";
            report.add("kernel.path", "no kernel is named", remedy);
        }
        (true, true) => for_no_kernel(report, kernel),
    }
    if let Some(initramfs) = &kernel.initramfs {
        path(report, "kernel.initramfs", initramfs);
    }
    if let Some(map) = &kernel.system_map {
        path(report, "kernel.system_map", map);
    }
    let Some(cmdline) = &kernel.cmdline else { return };
    if let Some(position) = cmdline.find(|c: char| c.is_control() && c != '\t') {
        report.add(
            "kernel.cmdline",
            format!("it has a control character (a line break or NUL, for example) at byte {position}"),
            "write it as one line; in YAML, a text folded with `>-` ends without a line break",
        );
    }
    if cmdline.len() > MAX_CMDLINE_BYTES {
        report.add(
            "kernel.cmdline",
            format!("it is {} bytes long", cmdline.len()),
            format!("the kernel takes at most {MAX_CMDLINE_BYTES}"),
        );
    }
}

/// What would be a kernel's, where firmware finds one on a disk.
fn for_no_kernel(report: &mut Report, kernel: &Kernel) {
    let initramfs = kernel.initramfs.as_ref().map(|_| "kernel.initramfs");
    let cmdline = kernel.cmdline.as_ref().map(|_| "kernel.cmdline");
    let system_map = kernel.system_map.as_ref().map(|_| "kernel.system_map");
    for field in [initramfs, cmdline, system_map].into_iter().flatten() {
        let problem = "no kernel is named that it would be for: firmware goes by what is on the disk";
        report.add(field, problem, "name a kernel, or leave it out");
    }
}

fn firmware(report: &mut Report, config: &VmConfig) {
    let Some(firmware) = &config.firmware else { return };
    if firmware.path.as_os_str().is_empty() {
        report.add("firmware.path", "no firmware is named", "name a file, or leave firmware out");
    } else {
        path(report, "firmware.path", &firmware.path);
    }
    let size = config.memory.size;
    if size.bytes() < MIN_FIRMWARE_MEMORY {
        report.add("memory.size", format!("{size} are too little for firmware"), "give the VM 128M or more");
    }
    if config.pci.hotplug_ports > 0 {
        report.add(
            "pci.hotplug_ports",
            "hot-plug ports would be where firmware looks for its chipset",
            "leave them out, or leave firmware out",
        );
    }
    if config.memory.share_kernel {
        report.add(
            "memory.share_kernel",
            "firmware loads the kernel, and no page of it is shared",
            "leave it out, or leave firmware out",
        );
    }
}

fn cpus(report: &mut Report, cpus: &Cpus, host: &HostFacts) {
    let most = MAX_VCPUS.min(host.max_vcpus);
    let whose = if most < MAX_VCPUS { "on this host" } else { "in a VM" };
    if cpus.count == 0 {
        report.add("cpus.count", "a VM without vCPUs cannot run", format!("1 to {most} are possible"));
    }
    for (field, count) in [("cpus.count", Some(cpus.count)), ("cpus.max", cpus.max)] {
        if let Some(count) = count.filter(|count| *count > most) {
            report.add(field, format!("{count} vCPUs are too many"), format!("1 to {most} are possible {whose}"));
        }
    }
    if let Some(max) = cpus.max.filter(|max| *max < cpus.count) {
        let problem = format!("there cannot be {} vCPUs where there may be {max}", cpus.count);
        report.add("cpus.max", problem, "give at least cpus.count, or leave it out");
    }
    let Some(topology) = cpus.topology else { return };
    let parts = [("sockets", topology.sockets), ("cores", topology.cores), ("threads", topology.threads)];
    let zeros = parts.iter().filter(|(_, value)| *value == 0);
    for (name, _) in zeros.clone() {
        report.add(format!("cpus.topology.{name}"), format!("0 {name} leave no vCPU"), "at least 1 is needed");
    }
    let product: u128 = parts.iter().map(|(_, value)| u128::from(*value)).product();
    if zeros.count() == 0 && product != u128::from(cpus.most()) {
        report.add(
            "cpus.topology",
            format!(
                "{} sockets × {} cores × {} threads are {product} vCPUs, not {}",
                topology.sockets,
                topology.cores,
                topology.threads,
                cpus.most()
            ),
            match cpus.max {
                Some(_) => "the product must be cpus.max",
                None => "the product must be the number of vCPUs",
            },
        );
    }
}

/// Pages are shared by private mappings of a file, which is not what memory of these kinds is.
fn shared_kernel(report: &mut Report, config: &VmConfig) {
    let memory = &config.memory;
    if !memory.share_kernel {
        return;
    }
    let against = [
        (memory.shared, "memory.shared", "other processes map this memory, and would not see the kernel's pages"),
        (memory.hugepages != Hugepages::Off, "memory.hugepages", "huge pages cannot be shared"),
        (memory.prefault, "memory.prefault", "a page that is populated is not shared"),
        (memory.lock, "memory.lock", "a page that is locked is not shared"),
        (
            config.has_vfio(),
            "a device of the type vfio",
            "it reaches all pages, and each is kept in place for it alone",
        ),
        (config.kernel.cache == KernelCache::Off, "kernel.cache", "only the pages of a kept kernel can be shared"),
    ];
    for (_, field, why) in against.into_iter().filter(|(is, ..)| *is) {
        report.add("memory.share_kernel", format!("it cannot be had with {field}: {why}"), "leave out one of the two");
    }
}

fn memory(report: &mut Report, memory: &Memory, host: &HostFacts) {
    let field = "memory.size";
    let size = memory.size.bytes();
    let (page, what) = match memory.hugepages.bytes() {
        Some(page) => (page, "huge pages"),
        None => (PAGE_SIZE, "pages"),
    };
    if size == 0 {
        report.add(
            field,
            "a VM without memory cannot run",
            format!("at least {} are needed", ByteSize::new(MIN_MEMORY)),
        );
        return;
    }
    if size < MIN_MEMORY {
        report.add(
            field,
            format!("{size} bytes are too little"),
            format!("at least {} are needed; write 512M for 512 MiB", ByteSize::new(MIN_MEMORY)),
        );
    }
    if !size.is_multiple_of(page) {
        let below = size - size % page;
        let near = if below >= MIN_MEMORY { below } else { page.max(MIN_MEMORY) };
        report.add(
            field,
            format!("{} is not a multiple of the {} that {what} have", memory.size, ByteSize::new(page)),
            format!("{} would be one", ByteSize::new(near)),
        );
    }
    if size > host.max_memory {
        report.add(
            field,
            format!(
                "{} do not fit into this host's address space for guests ({} bits)",
                memory.size, host.physical_address_bits
            ),
            format!("at most {} fit beside the devices", ByteSize::new(host.max_memory)),
        );
    }
}

/// What memory can become while the guest runs.
fn max_memory(report: &mut Report, memory: &Memory, host: &HostFacts) {
    let field = "memory.resize_timeout";
    let timeout = memory.resize_timeout;
    if timeout > MAX_RESIZE_TIMEOUT {
        report.add(field, format!("{timeout} is too long"), format!("{MAX_RESIZE_TIMEOUT} is the most"));
    } else if timeout.duration().is_zero() {
        report.add(field, "no guest answers in no time", "write 60s, or leave it out");
    }
    let Some(max) = memory.max else { return };
    let (field, size, step) = ("memory.max", memory.size, memory.step());
    let more = memory.pluggable();
    if max < size {
        report.add(
            field,
            format!("{max} are less than memory.size, {size}"),
            "it is the most that the guest can have: memory.size at least",
        );
    } else if !more.is_multiple_of(step) {
        let near = ByteSize::new(size.bytes() + more - more % step);
        let next = ByteSize::new(near.bytes().saturating_add(step));
        report.add(
            field,
            format!("{max} are not memory.size, {size}, and a multiple of {}", ByteSize::new(step)),
            format!("{near} or {next} would be"),
        );
    } else if max.bytes() > host.max_memory {
        report.add(
            field,
            format!("{max} do not fit into this host's address space for guests ({} bits)", host.physical_address_bits),
            format!("at most {} fit beside the devices", ByteSize::new(host.max_memory)),
        );
    }
}

fn pci(report: &mut Report, pci: &Pci) {
    if pci.hotplug_ports > MAX_HOTPLUG_PORTS {
        report.add(
            "pci.hotplug_ports",
            format!("{} ports are too many", pci.hotplug_ports),
            format!("0 to {MAX_HOTPLUG_PORTS} are possible"),
        );
    }
    let field = "pci.hotplug_timeout";
    if pci.hotplug_timeout > MAX_HOTPLUG_TIMEOUT {
        report.add(field, format!("{} is too long", pci.hotplug_timeout), format!("{MAX_HOTPLUG_TIMEOUT} is the most"));
    } else if pci.hotplug_timeout.duration().is_zero() {
        report.add(field, "no guest answers in no time", "write 60s, or leave it out");
    }
}

fn device_id(report: &mut Report, at: &str, id: &str) {
    // An empty id has not been given yet.
    if !id.is_empty() {
        name(report, &format!("{at}.id"), id);
    }
    if id == SERIAL_ID {
        report.add(format!("{at}.id"), format!("«{SERIAL_ID}» is the serial port's id"), "choose another");
    }
}

/// An id or a port's name: it appears in paths, in messages and as a part of URLs.
fn name(report: &mut Report, field: &str, name: &str) {
    let fitting = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if name.len() > MAX_NAME_BYTES {
        report.add(field, format!("it is {} bytes long", name.len()), format!("at most {MAX_NAME_BYTES} are possible"));
    }
    if name.is_empty() || !name.chars().all(fitting) || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) {
        report.add(
            field,
            format!("«{}» cannot be a name", shorten(name)),
            "begin with a letter or a digit and go on with letters, digits, `.`, `_` and `-`",
        );
    }
}

fn path(report: &mut Report, field: &str, path: &Path) {
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() {
        report.add(field, "the path is empty", "name a file");
    }
    if bytes.contains(&0) {
        report.add(field, "the path has a NUL character in it", "a file's path cannot have one");
    }
}

fn disk(report: &mut Report, at: &str, disk: &Disk) {
    match (&disk.path, disk.fd) {
        (None, None) => report.add(at, "nothing is named that the disk is on", "give `path` or `fd`"),
        (Some(_), Some(_)) => report.add(at, "both `path` and `fd` are given", "leave one of them out"),
        (Some(named), None) => path(report, &format!("{at}.path"), named),
        (None, Some(fd)) => descriptor(report, at, fd, "a disk"),
    }
    if let Some(serial) = &disk.serial {
        let field = format!("{at}.serial");
        if serial.len() > MAX_DISK_SERIAL_BYTES {
            report.add(
                &field,
                format!("it is {} bytes long", serial.len()),
                format!("at most {MAX_DISK_SERIAL_BYTES} are possible"),
            );
        }
        if !serial.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            report.add(
                field,
                format!("«{}» has other than printable ASCII characters", shorten(serial)),
                "leave them out",
            );
        }
    }
    if let Some(size) = disk.size.map(ByteSize::bytes).filter(|size| *size == 0 || !size.is_multiple_of(SECTOR)) {
        let next = size.max(1).checked_next_multiple_of(SECTOR).unwrap_or(SECTOR);
        report.add(
            format!("{at}.size"),
            format!("{size} bytes are not a whole number of sectors of {SECTOR}"),
            format!("the next that is, is {next}"),
        );
    }
    if disk.queues == 0 || disk.queues > MAX_QUEUES {
        report.add(
            format!("{at}.queues"),
            format!("{} queues are not possible", disk.queues),
            format!("1 to {MAX_QUEUES} are"),
        );
    }
}

fn descriptor(report: &mut Report, at: &str, fd: i32, what: &str) {
    if fd < 3 {
        report.add(
            format!("{at}.fd"),
            format!("descriptor {fd} cannot be {what}"),
            "0 to 2 are the standard streams; pass another one",
        );
    }
}

fn net(report: &mut Report, at: &str, net: &Net) {
    match (&net.tap, net.fd) {
        (None, None) => report.add(at, "nothing is named that the network card leads to", "give `tap` or `fd`"),
        (Some(_), Some(_)) => report.add(at, "both `tap` and `fd` are given", "leave one of them out"),
        _ => {}
    }
    if let Some(tap) = &net.tap {
        let field = format!("{at}.tap");
        if tap.is_empty() || matches!(tap.as_str(), "." | "..") {
            report.add(&field, format!("«{tap}» cannot be an interface's name"), "name a tap interface, as in tap0");
        }
        if tap.len() > MAX_INTERFACE_NAME_BYTES {
            report.add(
                &field,
                format!("«{}» is {} bytes long", shorten(tap), tap.len()),
                format!("an interface's name has at most {MAX_INTERFACE_NAME_BYTES}"),
            );
        }
        if tap.contains(|c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control()) {
            report.add(
                &field,
                format!("«{}» cannot be an interface's name", shorten(tap)),
                "leave out `/`, `:`, `%`, blanks and control characters",
            );
        }
    }
    if let Some(fd) = net.fd {
        descriptor(report, at, fd, "a tap interface");
    }
    if let Some(mac) = net.mac {
        let field = format!("{at}.mac");
        if mac.is_multicast() {
            report.add(&field, format!("{mac} is a group's address (multicast)"), "the first byte must be even");
        } else if mac.bytes() == [0; 6] {
            report.add(&field, format!("{mac} is nobody's address"), "leave it out for a random one");
        }
    }
    if let Some(mtu) = net.mtu.filter(|mtu| *mtu < MIN_MTU) {
        report.add(format!("{at}.mtu"), format!("{mtu} bytes are too few"), format!("{MIN_MTU} to 65535 are possible"));
    }
}

fn console(report: &mut Report, at: &str, console: &Console) {
    if let Some(port) = &console.name {
        name(report, &format!("{at}.name"), port);
    }
    endpoint(report, &format!("{at}.endpoint"), &console.endpoint);
}

fn endpoint(report: &mut Report, at: &str, endpoint: &Endpoint) {
    let field = format!("{at}.path");
    if let Some(named) = endpoint.path() {
        path(report, &field, named);
    }
    if let Endpoint::Socket { path } = endpoint {
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH_BYTES {
            report.add(
                field,
                format!("the socket's path is {length} bytes long"),
                format!("Linux allows {MAX_SOCKET_PATH_BYTES}: use a shorter directory, or a relative path"),
            );
        }
    }
}

fn vfio(report: &mut Report, at: &str, vfio: &Vfio) {
    match (&vfio.host, vfio.fd) {
        (None, None) => report.add(at, "no function of the host's is named", "give `host` or `fd`"),
        (Some(_), Some(_)) => report.add(at, "both `host` and `fd` are given", "leave one of them out"),
        (Some(host), None) if !Vfio::is_address(host) => report.add(
            format!("{at}.host"),
            format!("«{}» is no address of a PCI function", shorten(host)),
            "write it as in 0000:01:00.0, in lower case; `lspci -D` lists them",
        ),
        (Some(_), None) => {}
        (None, Some(fd)) => descriptor(report, at, fd, "a function of the host's"),
    }
    if vfio.iommu_fd.is_some() && vfio.fd.is_none() {
        report.add(format!("{at}.iommu_fd"), "it is for functions by descriptor", "give `fd`, or leave it out");
    }
}
