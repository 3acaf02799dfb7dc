//! Memory that comes and goes while a stock Debian kernel runs, with a busy disk beside it.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::{ByteSize, DeviceConfig, Disk, EventKind, JobState, MemoryPatch, Outcome, VmConfig};
use halyard_tests::service::{Service, guest};
use halyard_tests::tiny::{self, Run, Served, debug_exit};
use halyard_tests::{Client, Host, Kernel, Lent, Process};

const KERNEL: Kernel = Kernel::Debian6_12Cloud;
const GIB: u64 = 1 << 30;
/// MiB that the guest writes to its new memory. More takes minutes in a lab; see `soak.rs`.
const WRITTEN: u64 = 256;
/// How long the host may take to count what it was given back.
const SETTLED: Duration = Duration::from_secs(20);

/// A guest with 1 to 4 GiB of memory, which puts into a zone that it can give back what is plugged.
fn config() -> Result<VmConfig> {
    let mut config = guest(KERNEL)?;
    config.kernel.cmdline = Some("console=ttyS0 quiet panic=-1 memhp_default_state=online_movable".into());
    (config.memory.size, config.memory.max) = (ByteSize::new(GIB), Some(ByteSize::new(4 * GIB)));
    Ok(config)
}

fn ask(guest: &Client, command: &str) -> Result<String> {
    guest.run(command)?.ok().with_context(|| command.to_owned())
}

/// MiB of memory that the guest sees.
fn total(guest: &Client) -> Result<u64> {
    let kib: u64 = ask(guest, "sed -n 's/^MemTotal:\\s*\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?.trim().parse()?;
    Ok(kib >> 10)
}

/// MiB of the process that are in the host's memory.
fn resident(host: &Host, pid: u32) -> Result<u64> {
    let kib: u64 =
        host.run(format!("sed -n 's/^VmRSS:\\s*\\([0-9]*\\) kB/\\1/p' /proc/{pid}/status"))?.ok()?.trim().parse()?;
    Ok(kib >> 10)
}

fn resize(service: &mut Service, gib: u64) -> Result<Duration> {
    let began = Instant::now();
    let job = service.client.set_memory(&MemoryPatch { size: ByteSize::new(gib * GIB) })?;
    service.success_of(job)?;
    let memory = service.client.memory()?;
    ensure!((memory.present, memory.wanted) == (gib * GIB, gib * GIB), "{memory:?}");
    Ok(began.elapsed())
}

/// Work for the first disk that does not end.
fn load(guest: &Client) -> Result<Process> {
    let load =
        guest.spawn("while dd if=/dev/zero of=/dev/vda bs=64k count=256 conv=fsync 2>/dev/null; do echo went; done")?;
    load.wait_line("went")?;
    Ok(load)
}

#[test]
fn story_memory_grows_and_shrinks_beside_a_busy_disk() -> Result<()> {
    let host = &Lent::take()?;
    let path = format!("{}/disk.img", host.folder()?);
    host.run(format!("truncate -s 512M {path}"))?.ok()?;
    let mut service = Service::start(host, &[])?;
    let mut config = config()?;
    config.devices.insert(0, DeviceConfig::Disk(Disk::new(&path)));
    let guest = service.boot(&config)?;
    let load = load(&guest)?;
    let pid = service.process().pid();
    let (total_before, before) = (total(&guest)?, resident(host, pid)?);
    ensure!(total_before < 1024, "{total_before} MiB");

    let grew = resize(&mut service, 4)?;
    let after = total(&guest)?;
    ensure!(after > total_before + 2900, "{after} MiB after {total_before}");
    // Linux takes such memory first where it can, buffers of the disk included.
    ask(&guest, "mkdir -p /big && mount -t tmpfs -o size=3g none /big")?;
    ask(&guest, "head -c 16777216 /dev/urandom >/piece && for i in $(seq 16); do cat /piece; done >/big/file")?;
    let written = ask(&guest, "md5sum </big/file")?;
    let used = resident(host, pid)?;
    ensure!(used > before + WRITTEN, "{used} MiB are resident, {before} before");
    ask(&guest, "dd if=/big/file of=/dev/vda bs=1M count=16 seek=128 oflag=direct 2>/dev/null")?;
    ask(
        &guest,
        "dd if=/dev/vda of=/big/back bs=1M count=16 skip=128 iflag=direct 2>/dev/null && cmp /piece /big/back",
    )?;
    ensure!(ask(&guest, "md5sum </big/file")? == written, "the file changed");

    ask(&guest, "umount /big && rm /piece && echo 3 >/proc/sys/vm/drop_caches")?;
    let shrank = resize(&mut service, 1)?;
    let back = total(&guest)?;
    ensure!(back.abs_diff(total_before) < 64, "{back} MiB after {total_before}");
    let deadline = Instant::now() + SETTLED;
    let mut left = resident(host, pid)?;
    // What is plugged is gone, all of it; the rest the guest may have touched meanwhile.
    while left + WRITTEN > used {
        ensure!(Instant::now() < deadline, "{left} MiB are resident, {used} before");
        left = resident(host, pid)?;
    }
    ensure!(load.status().is_none(), "the busy disk goes on: {}", load.last_words());
    ask(&guest, "dd if=/dev/vda of=/dev/null bs=1M count=16 iflag=direct 2>/dev/null")?;
    println!("1 to 4 GiB: {grew:?}, back: {shrank:?}; resident {before}, {used}, {left} MiB");

    // What is asked for while nobody drives it is there after a reset, and a guest that has it boots well.
    resize(&mut service, 2)?;
    drop(guest);
    service.client.reset()?;
    let guest = service.guest()?;
    service.wait_for("memory after the reset", |event| {
        matches!(event, EventKind::MemoryResized { present } if *present == 2 * GIB).then_some(())
    })?;
    let again = total(&guest)?;
    ensure!(again > total_before + 900, "{again} MiB after the reset");
    service.finish()
}

#[test]
fn story_a_guest_that_cannot_give_memory_back_is_told_of_and_still_asked() -> Result<()> {
    let host = &Lent::take()?;
    let mut service = Service::start(host, &[])?;
    let mut config = config()?;
    config.memory.resize_timeout = api::TimeSpan::from_millis(6000);
    (config.memory.size, config.memory.max) = (ByteSize::mib(256), Some(ByteSize::mib(1280)));
    let guest = service.boot(&config)?;
    resize(&mut service, 1)?;
    ask(&guest, "mkdir -p /big && mount -t tmpfs -o size=1g none /big && head -c 419430400 /dev/zero >/big/file")?;
    let job = service.client.set_memory(&MemoryPatch { size: ByteSize::mib(256) })?.context("a job")?;
    let job = service.end_of(&job)?;
    let why = job.error.map(|error| error.detail).unwrap_or_default();
    ensure!(job.state == JobState::Failed && why.contains("still asked"), "{why}");
    let memory = service.client.memory()?;
    ensure!(memory.wanted == GIB / 4 && memory.present > GIB / 4 && memory.present < GIB, "{memory:?}");
    println!("{why}");
    // It gives the rest back when it can.
    ask(&guest, "rm /big/file")?;
    service.wait_for("the rest", |event| {
        matches!(event, EventKind::MemoryResized { present } if *present == GIB / 4).then_some(())
    })?;
    drop(guest);
    service.client.destroy()?;

    // A guest that writes to what it has given back ends its run, and no more than that.
    let mut config = tiny::config("mem");
    (config.memory.max, config.kernel.cmdline) = (Some(ByteSize::mib(192)), Some("w".into()));
    service.client.create(&config)?;
    service.client.boot()?;
    service.client.set_memory(&MemoryPatch { size: ByteSize::mib(66) })?.context("a job")?;
    let outcome = service.wait_for("its end", |event| match event {
        EventKind::Phase { outcome: Some(outcome), .. } if *outcome != Outcome::Destroyed => Some(outcome.clone()),
        _ => None,
    })?;
    let told = matches!(&outcome, Outcome::Crashed { reason } if reason.contains("memory that it does not have"));
    ensure!(told, "{outcome}");
    service.finish()
}

/// Runs a guest that plugs a block and does with it what its command line says. `None` where there is no KVM.
fn plugs(command: &str, memory: &str) -> Option<Run> {
    if !tiny::kvm() {
        return None;
    }
    let kernel = tiny::guest("mem").display().to_string();
    let served = Served::start("run", ["--kernel", &kernel, "--memory", memory, "--cmdline", command, "--debug-exit"]);
    let mut client = served.client();
    assert!(client.set_memory(&MemoryPatch { size: ByteSize::mib(66) }).unwrap().is_some(), "a job waits");
    Some(served.finish())
}

const PLUGGED_AND_GONE: &str = "before 00000000\nplugged 600df00d600df00d\nunplug 00000000 then 0000000000000000\n";

#[test]
fn memory_that_is_unplugged_reads_as_zeroes() {
    for memory in ["64M,max=192M", "64M,max=192M,shared=on", "64M,max=192M,prefault=on,transparent_huge_pages=off"] {
        let Some(run) = plugs("r", memory) else { return };
        let run = run.expect_code(debug_exit(0));
        assert_eq!(run.output(), PLUGGED_AND_GONE, "{memory}");
    }
}

/// Where KVM emulates the guest's instructions it takes such a write for one to a device that is not there; see
/// `story_a_guest_that_cannot_give_memory_back_is_told_of_and_still_asked` for what it does else.
#[test]
fn a_write_to_memory_that_is_not_plugged_is_for_nothing() {
    let Some(run) = plugs("w", "64M,max=192M") else { return };
    let goes_on = format!("{PLUGGED_AND_GONE}writes\nreads 00000000\n");
    if run.output() == goes_on {
        run.expect_code(debug_exit(1));
    } else {
        let run = run.expect_code(5).expect_messages(&["memory that it does not have"]);
        assert_eq!(run.output(), format!("{PLUGGED_AND_GONE}writes\n"));
    }
}

#[test]
fn ctl_waits_for_memory_and_shows_it() {
    if !tiny::kvm() {
        return;
    }
    let kernel = tiny::guest("mem").display().to_string();
    let arguments = ["--kernel", &kernel, "--memory", "64M,max=192M", "--cmdline", "p", "--debug-exit"];
    let served = Served::start("run", arguments);
    let socket = served.path("api").display().to_string();
    let ctl = |words: &[&str]| tiny::run_halyard(["ctl", "--socket", &socket].iter().chain(words));
    let grown = ctl(&["memory", "66M"]).expect_code(0);
    assert!(grown.output().contains("resize-memory") && grown.output().contains("succeeded"), "{grown}");
    let shown = ctl(&["memory"]).expect_code(0).output();
    for line in ["at most                 192M", "present                 66M", "wanted                  66M"] {
        assert!(shown.contains(line), "{shown}");
    }
    let refused = ctl(&["memory", "65M"]).expect_messages(&["a multiple of 2M"]);
    assert_ne!(refused.code(), Some(0), "{refused}");
    let metrics = ctl(&["metrics"]).expect_code(0).output();
    for line in ["halyard_vm_memory_bytes 69206016\n", "halyard_vm_memory_wanted_bytes 69206016\n"] {
        assert!(metrics.contains(line), "{metrics}");
    }
    ctl(&["destroy"]).expect_code(0);
    served.finish().expect_code(7);
}

#[test]
fn a_device_does_not_use_memory_that_is_not_plugged() {
    let Some(run) = plugs("d", "64M,max=192M") else { return };
    let run = run.expect_code(debug_exit(0));
    assert_eq!(run.output(), format!("{PLUGGED_AND_GONE}needs reset\n"));
}
