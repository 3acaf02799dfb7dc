//! What the API answers, for people.

use api::{DeviceConfig, Endpoint, Event, Job, MemoryInfo, QuoteServiceState, Quotes, Vcpus, Version, VmInfo};
use serde::Serialize;
use serde_json::Value;

use super::events::detail;
use super::table::{Table, clean};

/// A value of choice, as the API writes it.
pub fn word(value: &impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        other => other.map(|value| value.to_string()).unwrap_or_default(),
    }
}

/// A table of names and values.
fn facts(facts: impl IntoIterator<Item = (&'static str, String)>) -> String {
    let mut table = Table::new(&[]);
    for (name, value) in facts {
        table.row([name.to_owned(), value]);
    }
    table.text()
}

/// The program that answers.
pub fn version(version: &Version) -> String {
    format!("{} {}, API {}\n", clean(&version.name), clean(&version.version), clean(&version.api))
}

/// A VM.
pub fn vm(vm: &VmInfo) -> String {
    let mut lines = vec![
        ("phase", format!("{} ({})", vm.phase, word(&vm.reason))),
        ("since", time(vm.since_ms)),
        ("last event", vm.sequence.to_string()),
    ];
    lines.extend(vm.outcome.as_ref().map(|outcome| ("outcome", outcome.to_string())));
    lines.extend(vm.mrtd.as_ref().map(|mrtd| ("MRTD", mrtd.clone())));
    let Some(config) = vm.running.as_ref().or(vm.config.as_ref()) else { return facts(lines) };
    let path = |path: &std::path::Path| path.display().to_string();
    lines.extend(config.firmware.as_ref().map(|firmware| ("firmware", path(&firmware.path))));
    if !config.kernel.is_none() {
        lines.push(("kernel", path(&config.kernel.path)));
    }
    lines.extend(config.kernel.initramfs.as_ref().map(|initramfs| ("initramfs", path(initramfs))));
    lines.extend(config.kernel.cmdline.as_ref().map(|cmdline| ("command line", cmdline.clone())));
    lines.push(("vCPUs", config.cpus.count.to_string()));
    lines.push(("memory", config.memory.size.to_string()));
    lines.extend(config.serial.as_ref().map(|serial| ("serial port", endpoint(serial))));
    let text = facts(lines);
    if config.devices.is_empty() { text } else { format!("{text}\n{}", devices(&config.devices)) }
}

/// A list of devices.
pub fn devices(devices: &[DeviceConfig]) -> String {
    let mut table = Table::new(&["DEVICE", "TYPE", "ON", "MORE"]);
    for device in devices {
        let (on, more) = columns(device);
        table.row([device.id().to_owned(), device.type_name().to_owned(), on, more.join(", ")]);
    }
    table.text()
}

/// A device.
pub fn device(device: &DeviceConfig) -> String {
    devices(std::slice::from_ref(device))
}

/// What a device is on, and what else is to be said of it.
fn columns(device: &DeviceConfig) -> (String, Vec<String>) {
    let on_fd = |fd: Option<i32>| fd.map(|fd| format!("fd {fd}")).unwrap_or_default();
    let mut more = Vec::new();
    let on = match device {
        DeviceConfig::Disk(disk) => {
            more.extend(disk.readonly.then(|| "readonly".to_owned()));
            more.extend(disk.size.map(|size| size.to_string()));
            more.extend(disk.direct.then(|| "direct".to_owned()));
            more.extend(disk.serial.as_ref().map(|serial| format!("serial {serial}")));
            more.extend((disk.queues > 1).then(|| format!("{} queues", disk.queues)));
            disk.path.as_ref().map_or_else(|| on_fd(disk.fd), |path| path.display().to_string())
        }
        DeviceConfig::Net(net) => {
            more.extend(net.mac.map(|mac| mac.to_string()));
            more.extend(net.mtu.map(|mtu| format!("mtu {mtu}")));
            more.extend((!net.link.is_up()).then(|| "link down".to_owned()));
            net.tap.clone().unwrap_or_else(|| on_fd(net.fd))
        }
        DeviceConfig::Console(console) => {
            more.extend(console.name.as_ref().map(|name| format!("port {name}")));
            endpoint(&console.endpoint)
        }
        DeviceConfig::Rng(_) => String::new(),
        DeviceConfig::Vfio(vfio) => vfio.host.clone().unwrap_or_else(|| on_fd(vfio.fd)),
    };
    (on, more)
}

fn endpoint(endpoint: &Endpoint) -> String {
    match endpoint {
        Endpoint::Stdio {} => "stdio".to_owned(),
        Endpoint::File { path } => format!("file {}", path.display()),
        Endpoint::Socket { path } => format!("socket {}", path.display()),
        Endpoint::Pty {} => "pty".to_owned(),
        Endpoint::Api {} => "api".to_owned(),
        Endpoint::Off {} => "off".to_owned(),
    }
}

/// The VM's processors.
pub fn vcpus(vcpus: &Vcpus) -> String {
    let mut lines = vec![("configured", vcpus.config.count.to_string()), ("present", vcpus.present.to_string())];
    lines.extend(vcpus.config.max.map(|max| ("at most", max.to_string())));
    lines.extend(vcpus.config.topology.map(|topology| {
        let (sockets, cores, threads) = (topology.sockets, topology.cores, topology.threads);
        ("topology", format!("{sockets} sockets of {cores} cores of {threads} threads"))
    }));
    facts(lines)
}

/// The VM's memory.
pub fn memory(memory: &MemoryInfo) -> String {
    let config = &memory.config;
    let on = |on: bool| if on { "on" } else { "off" }.to_owned();
    let mut lines = vec![("configured", config.size.to_string())];
    lines.extend(config.max.map(|max| ("at most", max.to_string())));
    lines.extend([
        ("present", api::ByteSize::new(memory.present).to_string()),
        ("wanted", api::ByteSize::new(memory.wanted).to_string()),
        ("huge pages", word(&config.hugepages)),
        ("transparent huge pages", on(config.transparent_huge_pages)),
        ("shared", on(config.shared)),
        ("locked", on(config.lock)),
    ]);
    facts(lines)
}

/// A trust domain's quotes.
pub fn quotes(quotes: &Quotes) -> String {
    let service = match &quotes.service {
        QuoteServiceState::Off => "none".to_owned(),
        QuoteServiceState::Unknown => "not asked yet".to_owned(),
        QuoteServiceState::Answers => "answers".to_owned(),
        QuoteServiceState::Fails { reason } => format!("fails: {reason}"),
    };
    facts(vec![
        ("service", service),
        ("in flight", quotes.in_flight.to_string()),
        ("given", quotes.given.to_string()),
        ("absent", quotes.absent.to_string()),
        ("late", quotes.late.to_string()),
        ("failed", quotes.failed.to_string()),
        ("invalid", quotes.invalid.to_string()),
        ("to be repeated", quotes.retried.to_string()),
        ("longest", format!("{} µs", quotes.longest_us)),
    ])
}

/// A list of jobs.
pub fn jobs(jobs: &[Job]) -> String {
    let mut table = Table::new(&["JOB", "KIND", "STATE", "PROGRESS", "STARTED", "ENDED", "ERROR"]);
    for job in jobs {
        table.row([
            job.id.to_string(),
            word(&job.kind),
            word(&job.state),
            job.progress.map(|percent| format!("{percent} %")).unwrap_or_default(),
            time(job.started_ms),
            job.ended_ms.map(time).unwrap_or_default(),
            job.error.as_ref().map(|error| error.detail.clone()).unwrap_or_default(),
        ]);
    }
    table.text()
}

/// A job.
pub fn job(job: &Job) -> String {
    jobs(std::slice::from_ref(job))
}

/// An event: when, its number, what, and what more is to be said.
pub fn event(event: &Event) -> String {
    let (time, number, what) = (time(event.time_ms), event.sequence, event.event.type_name());
    let line = format!("{time}  {number:>5}  {what:<15}  {}", clean(&detail(&event.event)));
    format!("{}\n", line.trim_end())
}

/// A moment in milliseconds since 1970, as RFC 3339 writes it, in UTC.
pub fn time(since_1970_ms: u64) -> String {
    let (seconds, milliseconds) = (since_1970_ms / 1000, since_1970_ms % 1000);
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let (year, month, day) = date(days);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Year, month and day of a number of days since 1970, in the Gregorian calendar. A year is counted from March, so that
/// the leap day is its last.
fn date(days: u64) -> (u64, u64, u64) {
    const FOUR_HUNDRED_YEARS: u64 = 146_097;
    // From the 1st of March of the year 0.
    let days = days + 719_468;
    let (era, day) = (days / FOUR_HUNDRED_YEARS, days % FOUR_HUNDRED_YEARS);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    (era * 400 + year + next, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use api::{Outcome, PhaseName, Reason, VmConfig};

    #[test]
    fn moments_are_written_in_utc() {
        for (ms, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (951_868_800_000, "2000-03-01T00:00:00.000Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
            (1_764_176_658_042, "2025-11-26T17:04:18.042Z"),
        ] {
            assert_eq!(time(ms), expected);
        }
    }

    #[test]
    fn a_vm_is_read_at_a_glance() {
        let mut config = VmConfig::new("k");
        config
            .devices
            .push(serde_json::from_str(r#"{"type": "disk", "path": "d", "id": "d0", "readonly": true}"#).unwrap());
        config.devices.push(serde_json::from_str(r#"{"type": "net", "fd": 3, "id": "n0", "mtu": 1500}"#).unwrap());
        let info = VmInfo {
            sequence: 7,
            phase: PhaseName::Stopped,
            reason: Reason::Crash,
            since_ms: 0,
            outcome: Some(Outcome::Crashed { reason: "\u{1b}[2J".into() }),
            config: Some(config),
            running: None,
            mrtd: None,
        };
        assert_eq!(
            vm(&info),
            "\
phase       stopped (crash)
since       1970-01-01T00:00:00.000Z
last event  7
outcome     the guest crashed: \\u{1b}[2J
kernel      k
vCPUs       1
memory      512M

DEVICE  TYPE  ON    MORE
d0      disk  d     readonly
n0      net   fd 3  mtu 1500
"
        );
    }
}
