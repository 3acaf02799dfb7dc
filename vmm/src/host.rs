//! What this host can do: facts for validation, and the report of `halyard probe`.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;

use api::{Check, HostFacts, HostReport, KindName, KindReport};
use hal::{HostCaps, Hypervisor};

/// PCI device numbers beside the host bridge on the root bus.
const MAX_DEVICES: u32 = 31;

/// All kinds of VM, in the order of the report.
const KINDS: [hal::KindName; 4] =
    [hal::KindName::Standard, hal::KindName::Tdx, hal::KindName::Snp, hal::KindName::SoftwareProtected];

/// What validation must know of the host.
pub fn facts(caps: &HostCaps) -> HostFacts {
    HostFacts {
        max_vcpus: caps.max_vcpus,
        physical_address_bits: caps.physical_address_bits,
        max_memory: arch::layout::max_ram(caps.physical_address_bits),
        max_devices: MAX_DEVICES,
        kinds: caps.kinds.iter().copied().map(kind).collect(),
    }
}

fn kind(name: hal::KindName) -> KindName {
    match name {
        hal::KindName::Standard => KindName::Standard,
        hal::KindName::Tdx => KindName::Tdx,
        hal::KindName::Snp => KindName::Snp,
        hal::KindName::SoftwareProtected => KindName::SoftwareProtected,
    }
}

/// Looks at everything that a VM may need.
pub fn probe() -> HostReport {
    report(&hal::open())
}

/// What a VM may need of the host, with a hypervisor that was opened, or was tried to be.
pub fn report(opened: &hal::Result<Box<dyn Hypervisor>>) -> HostReport {
    let caps = opened.as_ref().ok().map(|hypervisor| hypervisor.caps());
    let facts = caps.map(facts);
    let mut checks = vec![hypervisor_check(opened)];
    checks.extend([hardware_check(), tap_check(), huge_pages_check(), io_uring_check()]);
    HostReport {
        version: env!("CARGO_PKG_VERSION").into(),
        hypervisor: caps.map(|caps| caps.backend.into()),
        max_vcpus: facts.as_ref().map(|facts| facts.max_vcpus),
        physical_address_bits: facts.as_ref().map(|facts| facts.physical_address_bits),
        max_memory: facts.as_ref().map(|facts| facts.max_memory),
        dirty_tracking: caps.map(dirty_tracking).unwrap_or_default(),
        kinds: KINDS.into_iter().map(|name| kind_report(name, opened)).collect(),
        checks,
    }
}

fn dirty_tracking(caps: &HostCaps) -> Vec<String> {
    let mut ways = Vec::new();
    if caps.dirty_tracking.bitmap {
        ways.push("bitmap".into());
    }
    if caps.dirty_tracking.ring_entries > 0 {
        ways.push(format!("ring of {}", caps.dirty_tracking.ring_entries));
    }
    ways
}

fn kind_report(name: hal::KindName, opened: &hal::Result<Box<dyn Hypervisor>>) -> KindReport {
    let missing = match opened {
        Ok(hypervisor) => hypervisor.missing(name),
        Err(_) => Some("the hypervisor cannot be opened".into()),
    };
    KindReport { kind: kind(name), available: missing.is_none(), reason: missing.unwrap_or_default() }
}

fn hypervisor_check(opened: &hal::Result<Box<dyn Hypervisor>>) -> Check {
    let (ok, detail) = match opened {
        Ok(hypervisor) => (true, format!("{} opened", hypervisor.caps().backend)),
        Err(error) => (false, error.to_string()),
    };
    Check { name: "hypervisor".into(), ok, required: true, detail, remedy: String::new() }
}

/// The flags of the first processor. A host with hundreds of them takes long to write them all.
fn first_flags() -> Option<String> {
    let lines = BufReader::new(fs::File::open("/proc/cpuinfo").ok()?).lines();
    lines.map_while(Result::ok).find(|line| line.starts_with("flags"))
}

fn hardware_check() -> Check {
    let flags = first_flags().unwrap_or_default();
    let has = |wanted: &str| flags.split_whitespace().any(|flag| flag == wanted);
    let (ok, detail) = match (has("vmx"), has("svm")) {
        (true, _) => (true, "Intel VT-x (vmx)"),
        (_, true) => (true, "AMD-V (svm)"),
        _ => (false, "neither vmx nor svm in /proc/cpuinfo: guests run in software, if at all"),
    };
    let remedy =
        if ok { "" } else { "enable virtualization in the firmware, or nested virtualization in the outer host" };
    Check { name: "hardware virtualization".into(), ok, required: false, detail: detail.into(), remedy: remedy.into() }
}

fn tap_check() -> Check {
    let opened = fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun");
    let (ok, detail, remedy) = match opened {
        Ok(_) => (true, "/dev/net/tun can be opened".to_string(), ""),
        Err(error) => (false, format!("/dev/net/tun: {error}"), "load the module tun, or hand tap descriptors over"),
    };
    Check { name: "tap networks".into(), ok, required: false, detail, remedy: remedy.into() }
}

fn huge_pages_check() -> Check {
    let free = |size: &str| {
        let path = Path::new("/sys/kernel/mm/hugepages").join(format!("hugepages-{size}")).join("free_hugepages");
        fs::read_to_string(path).ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    let (small, large) = (free("2048kB"), free("1048576kB"));
    Check {
        name: "reserved huge pages".into(),
        ok: small + large > 0,
        required: false,
        detail: format!("{small} of 2 MiB and {large} of 1 GiB are free"),
        remedy: if small + large > 0 { String::new() } else { "set vm.nr_hugepages where guests need them".into() },
    }
}

fn io_uring_check() -> Check {
    let (ok, detail, remedy) = match devices::disk::io_uring_available() {
        Ok(()) => (true, "disks use it".to_string(), ""),
        Err(error) => (false, format!("{error}: disks fall back to synchronous reads and writes"), "allow its calls"),
    };
    Check { name: "io_uring".into(), ok, required: false, detail, remedy: remedy.into() }
}
