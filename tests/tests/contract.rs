//! The API as its description has it, by programs that are not ours: schemathesis tries what the description allows and
//! what it does not, and a client that openapi-python-client makes of the description boots a VM. promtool reads
//! the metrics.

use std::process::Command;
use std::time::Duration;

use api::{Console, DeviceConfig, Disk, Endpoint, Net, Rng, VmConfig};
use halyard_tests::contract::{self, DESCRIPTION};
use halyard_tests::python::{file, program};
use halyard_tests::tiny::{Running, Served, guest, kvm};
use nix::sys::signal::Signal;

/// How long a program may take: far more than it does.
const PATIENCE: Duration = Duration::from_secs(1200);

/// A VM whose guest waits, halted, for its power button, with a device of each type that needs nothing of the host's.
fn config(served: &Served) -> VmConfig {
    let disk = served.path("disk");
    std::fs::write(&disk, vec![0; 1 << 20]).expect("a disk");
    let console = Console { id: "console0".into(), name: None, endpoint: Endpoint::Api {} };
    let mut config = VmConfig::new(guest("power-button"));
    config.memory.size = "64M".parse().expect("a size");
    config.serial = Some(Endpoint::Api {});
    // A guest that does not answer for vCPUs keeps nobody waiting for long.
    config.cpus.max = Some(4);
    config.pci.hotplug_timeout = "50ms".parse().expect("a time");
    config.devices = vec![
        DeviceConfig::Disk(Disk { id: "disk0".into(), ..Disk::new(disk) }),
        DeviceConfig::Console(console),
        DeviceConfig::Rng(Rng { id: "rng0".into() }),
    ];
    config
}

/// Tries so many examples for each operation, or as many as `CONTRACT_EXAMPLES` says: `make soak` has more time.
const EXAMPLES: &str = "10";

#[test]
fn what_the_description_says_of_the_api_is_so() {
    if !kvm() {
        return;
    }
    let examples = std::env::var("CONTRACT_EXAMPLES").unwrap_or_else(|_| EXAMPLES.into());
    let served = Served::start("serve", ["--log-level", "warn"]).patient(PATIENCE);
    let config = config(&served);
    let (served, figures) = contract::try_all(served, &config, &examples);
    for line in figures {
        println!("{line}");
    }
    served.signal(Signal::SIGTERM);
    served.finish().expect_code(0);
}

#[test]
fn a_generated_client_boots_a_vm() {
    if !kvm() {
        return;
    }
    let served = Served::start("serve", ["--log-level", "warn"]);
    let mut generate = program("openapi-python-client").unwrap_or_else(|error| panic!("{error:#}"));
    generate.args(["generate", "--fail-on-warning", "--meta", "none", "--path", DESCRIPTION, "--output-path"]);
    generate.arg(served.path("halyard_client")).current_dir(served.path(""));
    Running::start(generate, PATIENCE).finish().expect_code(0);
    let mut client = program("python3").unwrap_or_else(|error| panic!("{error:#}"));
    client.arg(file("client.py")).arg(served.path("api")).arg(guest("power-button"));
    client.env("PYTHONPATH", served.path("")).current_dir(served.path(""));
    let run = Running::start(client, PATIENCE).finish().expect_code(0);
    assert_eq!(run.output(), "the guest switched itself off\n");
    served.signal(Signal::SIGTERM);
    served.finish().expect_code(0);
}

#[test]
fn promtool_has_nothing_to_say_of_the_metrics() {
    if !kvm() {
        return;
    }
    // In a network of its own it may have a tap.
    let served = Served::start_after("ip tuntap add tap0 mode tap", "serve", ["--log-level", "warn"]);
    let mut client = served.client();
    let promtool = halyard_tests::cache::folder().expect("a cache").join("bin/promtool");
    // Without a VM, and with one that has a device of each type.
    for booted in [false, true] {
        if booted {
            let mut config = config(&served);
            let card = Net { id: "net0".into(), tap: Some("tap0".into()), ..Net::default() };
            config.devices.push(DeviceConfig::Net(card));
            client.create(&config).expect("a VM");
            client.boot().expect("a running VM");
        }
        let mut command = Command::new(&promtool);
        command.args(["check", "metrics"]);
        let mut check = Running::start(command, PATIENCE);
        check.send(client.metrics().expect("metrics").as_bytes());
        let run = check.finish().expect_code(0);
        assert_eq!((run.output().as_str(), run.stderr.as_str()), ("", ""));
    }
    let metrics = client.metrics().expect("metrics");
    let value = |name: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<f64>().ok()).unwrap_or_else(|| panic!("{name} is missing in\n{metrics}"))
    };
    let resident = value("halyard_memory_guest_resident_bytes");
    assert!(resident > 0.0 && resident <= f64::from(64 << 20), "{resident}");
    assert!(value("halyard_memory_guest_huge_bytes") <= resident);
    let overhead = value("halyard_memory_overhead_bytes");
    assert!((1e5..1e7).contains(&overhead), "{overhead}");
    for name in ["packets", "bytes", "kicks", "dropped_packets"] {
        for direction in ["rx", "tx"] {
            value(&format!("halyard_net_{name}_total{{device=\"net0\",direction=\"{direction}\"}}"));
        }
    }
    for device in ["disk0", "console0", "rng0", "net0"] {
        value(&format!("halyard_device_faults_total{{device=\"{device}\"}}"));
    }
    value("halyard_disk_host_errors_total{device=\"disk0\"}");
    value("halyard_disk_kicks_total{device=\"disk0\"}");
    value("halyard_disk_request_seconds_total{device=\"disk0\",op=\"read\"}");
}
