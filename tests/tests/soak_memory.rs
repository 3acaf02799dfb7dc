//! Long stories, for `make soak`: memory that comes and goes under stress-ng, and devices that use memory that came.

use anyhow::{Context, Result, ensure};
use api::{ByteSize, DeviceConfig, Disk, MemoryPatch, Net, TimeSpan, VmConfig};
use halyard_tests::loads::{self, Load};
use halyard_tests::service::{self, Service};
use halyard_tests::story::{PATIENCE, Story};
use halyard_tests::{Cmd, Host, Kernel, Lent};

/// How often memory grows and shrinks, unless SOAK_MEMORY_ROUNDS says; each time the guest fills more than it booted with.
const ROUNDS: usize = 6;
/// After how many of them the monitor's heap has settled, and by how many KiB it may have grown at the end.
const SETTLED: usize = 2;
const GROWTH: f64 = 128.0;
/// Works on memory all the time, while it grows and shrinks.
const LOAD: &str = "--vm 1 --vm-bytes 256m --vm-keep";
/// MiB that are filled while there are 4 GiB, with zeros or ones, and how often at least.
const FILLED: u64 = 2048;
const FILLS: u32 = 1;

/// A guest whose memory can grow, and which has a load to run. `online` is what it does with the memory that comes.
fn config(host: &Host, load: Load, mib: u64, online: &str) -> Result<VmConfig> {
    let mut config = service::guest(Kernel::Debian6_12Cloud)?;
    config.kernel.cmdline = Some(format!("console=ttyS0 quiet panic=-1 memhp_default_state={online}"));
    (config.memory.size, config.memory.max) = (ByteSize::new(mib << 20), Some(ByteSize::mib(4096)));
    config.memory.resize_timeout = TimeSpan::from_millis(600_000);
    load.give(host, &mut config)?;
    Ok(config)
}

fn resize(service: &mut Service, mib: u32) -> Result<()> {
    let job = service.client.set_memory(&MemoryPatch { size: ByteSize::mib(mib) });
    service.success_of(job?).with_context(|| format!("{mib} MiB"))
}

/// MiB of the process that are in the host's memory.
fn resident(host: &Host, pid: u32) -> Result<u64> {
    let kib = host.run(format!("sed -n 's/^VmRSS:\\s*\\([0-9]*\\) kB/\\1/p' /proc/{pid}/status"))?.ok()?;
    Ok(kib.trim().parse::<u64>()? >> 10)
}

#[test]
fn soak_memory_comes_and_goes_under_stress_ng() -> Result<()> {
    let story = Story::begin("memory");
    let rounds =
        std::env::var("SOAK_MEMORY_ROUNDS").map_or(Ok(ROUNDS), |text| text.parse().context("SOAK_MEMORY_ROUNDS"))?;
    let host = &Lent::take()?;
    let mut service = Service::start(host, &[])?;
    let guest = service.boot(&config(host, Load::StressNg, 1024, "online_movable")?)?;
    let pid = service.process().pid();
    let load = guest.spawn(loads::stress_ng(LOAD))?;
    load.wait_line_for("dispatching hogs", PATIENCE)?;
    let (mut settled, mut figures) = (None, String::new());
    for round in 1..=rounds {
        let during = || format!("in round {round}");
        resize(&mut service, 4096).with_context(during)?;
        let fill = format!("--vm 2 --vm-bytes {FILLED}m --vm-keep --vm-method zero-one --vm-ops {FILLS}");
        let fill = loads::stress_ng(&fill);
        guest.run(Cmd::shell(fill).patience(PATIENCE))?.ok().with_context(during)?;
        let full = resident(host, pid)?;
        ensure!(full > FILLED, "{full} MiB are resident when {FILLED} were filled, {}", during());
        resize(&mut service, 1024).with_context(during)?;
        // The rest is the first GiB, the monitor and its program.
        let left = resident(host, pid)?;
        ensure!(left < 1100, "{left} MiB are resident of a guest with 1 GiB, {}", during());
        figures = format!("{full} MiB resident, then {left}");
        println!("round {round}: {figures}");
        if round == SETTLED {
            settled = Some(service.census(host)?);
        }
    }
    let last = service.census(host)?;
    ensure!(load.status().is_none(), "the load goes on: {}", load.last_words());
    let settled = settled.context("too few rounds to tell")?;
    last.check_since(&settled, GROWTH)?;
    service.finish()?;
    story.tell(&format!(
        "{rounds} times 1 to 4 to 1 GiB, {figures}; {settled:?} after {SETTLED}, {last:?} after the last"
    ));
    Ok(())
}

/// The kernel takes such memory first, since it is above 4 GiB and what the guest booted with is below: rings, buffers of
/// frames and fio's own, of which there are more than it booted with.
#[test]
fn soak_disks_and_networks_use_memory_that_came() -> Result<()> {
    let story = Story::begin("plugged");
    let host = &Lent::take()?;
    let (path, tap) = (format!("{}/disk.img", host.folder()?), host.tap(None)?);
    host.run(format!("truncate -s 1G {path}"))?.ok()?;
    host.run(format!("ip addr add 10.8.2.1/24 dev {}", tap.name()))?.ok()?;
    let mut service = Service::start(host, &[])?;
    let mut config = config(host, Load::Fio, 512, "online_kernel")?;
    config.pci.hotplug_ports = 2;
    let guest = service.boot(&config)?;
    let run = |line: &str| guest.run(Cmd::shell(line).patience(PATIENCE))?.ok().context(line.to_owned());
    let above = || {
        run("awk '$3 == \"zone\" { zone = $4 } zone == \"Normal\" && $1 == \"present\" { print $2 }' /proc/zoneinfo")
    };
    ensure!(["", "0"].contains(&&*above()?), "pages above 4 GiB at first: {}", above()?);
    resize(&mut service, 2048)?;
    ensure!(above()?.parse::<u64>()? << 12 == 1536 << 20, "pages above 4 GiB: {}", above()?);
    service.add("disk", &DeviceConfig::Disk(Disk::new(&path)))?;
    service.add("card", &DeviceConfig::Net(Net { tap: Some(tap.name().into()), ..Net::default() }))?;
    run("until [ -b /dev/vda -a -e /sys/class/net/eth0 ]; do usleep 20000; done")?;
    let disk = guest.spawn(loads::fio("/dev/vda", "--bs=1m --iodepth=768 --mem=mmap"))?;
    disk.wait_line_for("sound", PATIENCE)?;

    run("ip addr add 10.8.2.2/24 dev eth0 && ip link set eth0 up && ping -c 2 -w 60 10.8.2.1")?;
    let sums = guest.spawn("nc -l -p 5000 </dev/null | head -c 67108864 | sha256sum")?;
    run("until netstat -ltn | grep -q :5000; do usleep 20000; done")?;
    let bash = |line: String| host.run(Cmd::new("bash").args(["-c", &line]).patience(PATIENCE))?.ok();
    let file = format!("{}/file", host.folder()?);
    let sent = bash(format!("head -c 67108864 /dev/urandom | tee {file} >/dev/tcp/10.8.2.2/5000; sha256sum <{file}"))?;
    sums.wait_line_for(&sent, PATIENCE).context("what the guest received")?;
    run("head -c 67108864 /dev/urandom >/file")?;
    let sends = guest.spawn("nc -l -p 5001 </file")?;
    run("until netstat -ltn | grep -q :5001; do usleep 20000; done")?;
    let received = bash("head -c 67108864 </dev/tcp/10.8.2.2/5001 | sha256sum".into())?;
    ensure!(received == run("sha256sum </file")?, "what the guest sent");
    drop(sends);
    ensure!(disk.status().is_none(), "the disk goes on: {}", disk.last_words());
    service.finish()?;
    story.tell("1 GiB written and compared in requests of 768 MiB at once, 64 MiB each way through a network card");
    Ok(())
}
