//! What fails while a guest runs is told of: disks of the host, and rules that a tiny guest breaks.

use api::{DeviceConfig, Disk, Event, EventKind, IoOperation, Outcome, PhaseName, Rng, VmConfig};
use halyard_tests::tiny::{Served, config, kvm};
use tempfile::TempDir;

/// Boots a VM, and gives its events up to the end of its run.
fn events_of(served: &Served, config: &VmConfig) -> Vec<Event> {
    let mut client = served.client();
    let events = client.events(None).unwrap();
    client.create(config).unwrap();
    client.boot().unwrap();
    let mut told = Vec::new();
    for event in events {
        told.push(event.unwrap());
        if matches!(told.last().unwrap().event, EventKind::Phase { phase: PhaseName::Stopped, .. }) {
            return told;
        }
    }
    panic!("the monitor ended after {told:?}")
}

/// A guest with a command line and a device.
fn with_device(name: &str, cmdline: Option<&str>, device: DeviceConfig) -> VmConfig {
    let mut config = config(name);
    config.kernel.cmdline = cmdline.map(Into::into);
    config.devices.push(device);
    config
}

#[test]
fn a_disk_that_fails_on_the_host_is_told_of() {
    if !kvm() {
        return;
    }
    // A sparse image on a file system that is full.
    let folder = TempDir::new().unwrap();
    let full = folder.path().join("full");
    std::fs::create_dir(&full).unwrap();
    let line = format!(
        "cd {} && mount -t tmpfs -o size=64k none full && truncate -s 1M full/disk && \
         ! dd if=/dev/zero of=full/rest bs=4k 2>/dev/null",
        folder.path().display()
    );
    let served = Served::start_after(&line, "serve", [] as [&str; 0]);
    let config = with_device("blk", None, DeviceConfig::Disk(Disk::new(full.join("disk"))));
    let told = events_of(&served, &config);
    let failed: Vec<_> = told.iter().filter(|event| matches!(event.event, EventKind::IoError { .. })).collect();
    let [Event { event: EventKind::IoError { id, operation, offset, errno, reason, count }, .. }] = failed[..] else {
        panic!("one write fails: {told:?}")
    };
    assert_eq!((id.as_str(), *operation, *offset), ("disk0", IoOperation::Write, 512));
    assert_eq!((*errno, *count), (Some(28), 1));
    assert!(reason.contains("No space left on device"), "{reason}");
}

#[test]
fn a_guest_that_breaks_rules_is_told_of_and_fills_no_list() {
    if !kvm() {
        return;
    }
    let served = Served::start("serve", [] as [&str; 0]);
    let config = with_device("rules", Some("rng"), DeviceConfig::Rng(Rng::default()));
    let told = events_of(&served, &config);
    let last = &told.last().unwrap().event;
    assert!(matches!(last, EventKind::Phase { outcome: Some(Outcome::DebugExit { value: 0 }), .. }), "{last:?}");
    let mut before: Option<u64> = None;
    let mut counted = 0;
    for Event { event, time_ms, .. } in &told {
        let EventKind::DeviceFailed { id, reason, count } = event else { continue };
        assert!(id == "rng0" && !reason.is_empty(), "{event:?}");
        let at_the_end = counted + count == RULES;
        assert!(at_the_end || before.is_none_or(|before| time_ms - before >= 950), "too often: {told:?}");
        (before, counted) = (Some(*time_ms), counted + count);
    }
    assert_eq!(counted, RULES, "{told:?}");
}

/// Rules that the guest breaks, each of which needs a reset.
const RULES: u64 = 12;
