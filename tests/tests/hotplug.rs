//! Hot-plug of every type of device into stock Debian kernels, in the sandbox and with load beside it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use api::{Console, DeviceConfig, Disk, Endpoint, JobState, Net, PhaseName, Rng, Shutdown, TimeSpan, VmConfig};
use halyard_tests::service::{Service, guest};
use halyard_tests::tiny::{Tiny, debug_exit};
use halyard_tests::{Client, Host, Kernel, Lent, Process, Status};
use serde_json::json;

const KERNEL: Kernel = Kernel::Debian6_12Cloud;

/// The most exits that an empty port may cost a boot. Linux reads some 200 of its registers, and writes these.
const EXITS_OF_A_PORT: u64 = 60;

fn config(ports: u8) -> Result<VmConfig> {
    let mut config = guest(KERNEL)?;
    config.pci.hotplug_ports = ports;
    Ok(config)
}

/// What a command in the guest says.
fn ask(guest: &Client, command: &str) -> Result<String> {
    guest.run(command)?.ok().with_context(|| command.to_owned())
}

/// Waits until a test holds in the guest.
fn wait_in(guest: &Client, test: &str) -> Result<()> {
    ask(guest, &format!("until {test}; do usleep 20000; done")).map(drop)
}

/// A disk image of `mib` MiB at a path of the host.
fn image(folder: &str, host: &Host, name: &str, mib: u32) -> Result<String> {
    let path = format!("{folder}/{name}.img");
    host.run(format!("truncate -s {mib}M {path}"))?.ok()?;
    Ok(path)
}

fn disk(path: &str) -> DeviceConfig {
    DeviceConfig::Disk(Disk::new(path))
}

/// Writes to a disk of the guest and sees the same in its file on the host.
fn write_and_compare(host: &Host, guest: &Client, device: &str, path: &str) -> Result<()> {
    let line = format!(
        "head -c 1048576 /dev/urandom >/file && dd if=/file of=/dev/{device} bs=64k seek=16 conv=fsync 2>/dev/null && \
         sha256sum </file"
    );
    let written = ask(guest, &line)?;
    let read = host.run(format!("dd if={path} bs=1M skip=1 count=1 2>/dev/null | sha256sum"))?.ok()?;
    ensure!(written == read, "{device}: {written} was written, {read} is in {path}");
    Ok(())
}

/// Work for the first disk that does not end.
fn load(guest: &Client) -> Result<Process> {
    let load =
        guest.spawn("while dd if=/dev/zero of=/dev/vda bs=64k count=256 conv=fsync 2>/dev/null; do echo went; done")?;
    load.wait_line("went")?;
    Ok(load)
}

/// Descriptors and threads of a process.
fn census(host: &Host, pid: u32) -> Result<String> {
    host.run(format!("ls /proc/{pid}/fd | wc -l; ls /proc/{pid}/task | wc -l"))?.ok()
}

/// The guest's port leads into a file for a while, and then to clients of the API again.
fn lead_elsewhere_and_back(
    host: &Host,
    folder: &str,
    service: &mut Service,
    guest: &Client,
    mut port: impl Read,
) -> Result<UnixStream> {
    let file = format!("{folder}/port");
    service.client.patch_device("port", &json!({"endpoint": {"type": "file", "path": file}}))?;
    ensure!(port.read(&mut [0])? == 0, "the client is told that the console leads elsewhere");
    ask(
        guest,
        "port=$(grep -l org.halyard.test /sys/class/virtio-ports/*/name); port=${port%/name}; echo out >/dev/${port##*/}",
    )?;
    host.run(format!("until grep -qx out {file}; do sleep 0.1; done"))?.ok()?;
    service.client.patch_device("port", &json!({"endpoint": {"type": "api", "path": null}}))?;
    Ok(service.client.console("port", false)?)
}

#[test]
fn story_devices_of_every_type_come_and_go_beside_a_busy_disk() -> Result<()> {
    let host = &Lent::take()?;
    let folder = &host.folder()?;
    let (first, second) = (image(folder, host, "first", 64)?, image(folder, host, "second", 16)?);
    let grants = [folder.as_str(), "/dev/net/tun"];
    let boot = [config(8)?.kernel.path, config(8)?.kernel.initramfs.context("an initramfs")?];
    let boot = boot.map(|path| path.display().to_string());
    let grants = grants.into_iter().chain(boot.iter().map(String::as_str)).flat_map(|path| ["--grant", path]);
    let mut service = Service::start(host, &grants.collect::<Vec<_>>())?;
    let mut config = config(8)?;
    config.devices.insert(0, disk(&first));
    let guest = service.boot(&config)?;
    let load = load(&guest)?;
    let before = census(host, service.process().pid())?;

    let took = service.add("second", &disk(&second))?;
    println!("a disk: {took:?} from the request to the guest's answer");
    wait_in(&guest, "[ -b /dev/vdb ]")?;
    write_and_compare(host, &guest, "vdb", &second)?;
    let tap = host.tap(None)?;
    host.run(format!("ip addr add 10.8.0.1/24 dev {}", tap.name()))?.ok()?;
    service.add("card", &DeviceConfig::Net(Net { tap: Some(tap.name().into()), ..Net::default() }))?;
    let name = Some("org.halyard.test".into());
    service.add("port", &DeviceConfig::Console(Console { id: String::new(), name, endpoint: Endpoint::Api {} }))?;
    service.add("dice", &DeviceConfig::Rng(Rng::default()))?;
    ask(&guest, "ip addr add 10.8.0.2/24 dev eth0 && ip link set eth0 up && ping -c 2 -w 30 10.8.0.1")?;
    let mut port = service.client.console("port", false)?;
    let echo = guest.spawn(
        "until port=$(grep -l org.halyard.test /sys/class/virtio-ports/*/name); do usleep 20000; done; \
         port=${port%/name}; head -n 1 </dev/${port##*/}",
    )?;
    port.write_all(b"to the guest\n")?;
    echo.wait_line("to the guest")?;
    let mut port = lead_elsewhere_and_back(host, folder, &mut service, &guest, port)?;
    wait_in(&guest, "grep -q virtio_rng /sys/class/misc/hw_random/rng_current")?;
    ask(&guest, "head -c 32 /dev/hwrng >/dev/null")?;
    let all = service.client.devices()?;
    ensure!(all.len() == 6, "{all:?}");

    service.remove(&["second", "card", "port", "dice"])?;
    ensure!(port.read(&mut [0])? == 0, "the console's client is told");
    wait_in(&guest, "[ ! -b /dev/vdb -a ! -e /sys/class/net/eth0 ]")?;
    ensure!(service.client.devices()?.len() == 2, "they are gone");
    let after = census(host, service.process().pid())?;
    ensure!(before == after, "left behind: {before}, then {after}");
    ensure!(load.status().is_none(), "the busy disk goes on: {}", load.last_words());

    // What was not granted is refused, and what was there at boot stays.
    let refused = service.client.put_device("other", &disk("/etc/hostname")).map(drop).unwrap_err().to_string();
    ensure!(refused.contains("/etc/hostname"), "{refused}");
    let refused = service.client.remove_device("disk0", false).map(drop).unwrap_err().to_string();
    ensure!(refused.contains("when the VM booted"), "{refused}");
    service.finish()
}

#[test]
fn story_a_device_is_forced_out_and_a_guest_that_does_not_answer_keeps_its_own() -> Result<()> {
    let host = &Lent::take()?;
    let folder = &host.folder()?;
    let (first, second) = (image(folder, host, "first", 64)?, image(folder, host, "second", 16)?);
    let mut service = Service::start(host, &[])?;
    let mut config = config(1)?;
    config.devices.insert(0, disk(&first));
    config.pci.hotplug_timeout = TimeSpan::from_millis(4500);
    let guest = service.boot(&config)?;
    let load = load(&guest)?;
    let before = census(host, service.process().pid())?;

    // Linux waits five seconds before it lets go: that is longer than it is given here, so it is to keep the disk.
    service.add("second", &disk(&second))?;
    let job = service.client.remove_device("second", false)?.context("a job")?;
    let job = service.end_of(&job)?;
    ensure!(job.state == JobState::Failed && job.error.is_some_and(|error| error.status == 504), "no time-out");
    wait_in(&guest, "[ -b /dev/vdb ]")?;
    write_and_compare(host, &guest, "vdb", &second)?;
    // Asked again, it is told in time that nobody asks any more.
    let job = service.client.remove_device("second", false)?.context("a job")?;
    service.client.cancel_job(job.id)?;
    ensure!(service.client.job(job.id)?.state == JobState::Cancelled, "it is cancelled");

    ensure!(service.client.remove_device("second", true)?.is_none(), "it is done at once");
    wait_in(&guest, "[ ! -b /dev/vdb ]")?;
    ensure!(service.client.devices()?.len() == 2, "it is gone");
    service.add("third", &disk(&second))?;
    wait_in(&guest, "[ -b /dev/vdb ]")?;
    write_and_compare(host, &guest, "vdb", &second)?;
    // Linux's driver waits for ever for what it has in flight then, but the machine goes on.
    let reader = guest.spawn("while dd if=/dev/vdb of=/dev/null bs=64k 2>/dev/null; do echo read; done")?;
    reader.wait_line("read")?;
    ensure!(service.client.remove_device("third", true)?.is_none(), "it is done at once");
    let after = census(host, service.process().pid())?;
    ensure!(before == after, "left behind: {before}, then {after}");
    ensure!(load.status().is_none(), "the busy disk goes on: {}", load.last_words());
    service.finish()
}

#[test]
fn story_devices_are_added_before_the_boot_while_paused_during_reset_and_shutdown() -> Result<()> {
    let host = &Lent::take()?;
    let folder = &host.folder()?;
    let images: Vec<String> =
        ["a", "b", "c", "d"].iter().map(|name| image(folder, host, name, 16)).collect::<Result<_>>()?;
    let taps = [host.tap(None)?, host.tap(None)?, host.tap(None)?, host.tap(None)?];
    let mut service = Service::start(host, &[])?;
    let socket = service.socket().to_owned();
    // The cards come as descriptors, which a program there sends.
    let card = |number: usize| {
        let (put, tap) = (env!("CARGO_BIN_EXE_put-device"), taps[number].name());
        host.spawn(format!("exec {put} {socket} card{number} net --tap {tap}"))
    };
    let done = |put: Process| -> Result<()> {
        let status = put.wait()?;
        ensure!(status == Status::Exited(0), "{status}{}", put.last_words());
        Ok(())
    };
    service.client.create(&config(8)?)?;
    ensure!(service.client.put_device("a", &disk(&images[0]))?.is_none(), "no guest is asked");
    done(card(0)?)?;
    service.client.boot()?;
    let guest = service.guest()?;
    ask(&guest, "[ -b /dev/vda ] && [ -e /sys/class/net/eth0 ]")?;

    service.client.pause()?;
    let (job, put) = (service.client.put_device("b", &disk(&images[1]))?, card(1)?);
    put.wait_line("asked")?;
    ensure!(service.client.jobs()?.iter().all(|job| job.state == JobState::Running), "it stands");
    service.client.resume()?;
    service.success_of(job)?;
    done(put)?;
    wait_in(&guest, "[ -b /dev/vdb -a -e /sys/class/net/eth1 ]")?;
    write_and_compare(host, &guest, "vdb", &images[1])?;

    drop(guest);
    service.client.reset()?;
    let (job, put) = (service.client.put_device("c", &disk(&images[2]))?, card(2)?);
    let guest = service.guest()?;
    service.success_of(job)?;
    done(put)?;
    ask(&guest, "[ -b /dev/vda ] && [ -b /dev/vdb ] && [ -b /dev/vdc ] && [ -e /sys/class/net/eth2 ]")?;
    write_and_compare(host, &guest, "vdc", &images[2])?;
    service.remove(&["b", "card2"])?;

    let patience = Some(TimeSpan::from_millis(60_000));
    service.client.shutdown(&Shutdown { deadline: patience, force: false })?;
    let during = service.client.put_device("d", &disk(&images[3]))?.context("a job")?;
    let put = card(3)?;
    service.wait_for("the end", |event| {
        matches!(event, api::EventKind::Phase { phase: PhaseName::Stopped, .. }).then_some(())
    })?;
    ensure!(service.end_of(&during)?.state != JobState::Running, "nobody waits for a guest that is off");
    // It may have been taken, or have come too late; it does not wait either way.
    put.wait()?;
    service.finish()
}

#[test]
fn story_another_user_in_a_read_only_root_is_given_devices_by_descriptors() -> Result<()> {
    let host = &Lent::take()?;
    let folder = &host.folder()?;
    let (root, socket) = (host.folder()?, format!("{folder}/api"));
    let (path, tap) = (image(folder, host, "disk", 16)?, host.tap(None)?);
    let given = config(4)?;
    let initramfs = given.kernel.initramfs.clone().context("an initramfs")?;
    let confined = halyard_tests::confined::Confined {
        root,
        helper: env!("CARGO_BIN_EXE_with-descriptors").into(),
        halyard: halyard_tests::vm::halyard()?.display().to_string(),
        files: [(given.kernel.path.clone(), "kernel"), (initramfs, "initramfs")]
            .map(|(path, name)| (path.display().to_string(), name.into()))
            .into(),
        descriptors: ["--listen", &socket].map(Into::into).into(),
        arguments: ["serve", "--api-socket", "fd=3"].map(Into::into).into(),
    };
    let mut command = confined.command().into_iter();
    let process = host.spawn(halyard_tests::Cmd::new(command.next().context("a command")?).args(command))?;
    let mut service = Service::of(host, process, &socket)?;
    let mut config = given;
    (config.kernel.path, config.kernel.initramfs) = ("/kernel".into(), Some("/initramfs".into()));
    let guest = service.boot(&config)?;

    // Descriptors cross no line to a lab: a program there sends them.
    let put = env!("CARGO_BIN_EXE_put-device");
    host.run(format!("{put} {socket} disk1 disk --file {path}"))?.ok()?;
    host.run(format!("{put} {socket} card1 net --tap {}", tap.name()))?.ok()?;
    wait_in(&guest, "[ -b /dev/vda -a -e /sys/class/net/eth0 ]")?;
    write_and_compare(host, &guest, "vda", &path)?;
    host.run(format!("ip addr add 10.9.0.1/24 dev {}", tap.name()))?.ok()?;
    ask(&guest, "ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up && ping -c 2 -w 30 10.9.0.1")?;
    service.remove(&["disk1", "card1"])?;
    let open = host.run(format!("ls -l /proc/{}/fd", service.process().pid()))?.ok()?;
    ensure!(!open.contains(&path) && !open.contains("/dev/net/tun"), "left open:\n{open}");
    service.client.destroy()?;
    service.process().kill(15)?;
    ensure!(service.process().wait_for(Duration::from_secs(20))? == Status::Exited(0), "it ends well");
    Ok(())
}

/// A guest reads its ports' configuration space in memory, and its writes are exits.
#[test]
fn what_is_written_to_a_port_is_read_in_memory_at_once() {
    let Some(guest) = Tiny::new("port") else { return };
    let run = guest.args(["--hotplug-ports", "2"]).run().expect_code(debug_exit(0));
    let expected = "port 000c1b36 00100406 header 00810000 buses 00012a00 slot 00000200 next 000c1b36 nobody ffffffff \
                    extended 00000000\n";
    assert_eq!(run.output(), expected);
}

/// Exits to the monitor since the vCPU began.
fn exits(service: &mut Service) -> Result<u64> {
    let metrics = service.client.metrics()?;
    let counts = metrics.lines().filter(|line| line.starts_with("halyard_vcpu_exits_total{"));
    counts.map(|line| Ok(line.rsplit(' ').next().context("a value")?.parse::<u64>()?)).sum()
}

#[test]
fn story_empty_ports_cost_a_boot_little() -> Result<()> {
    const PORTS: u8 = 32;
    let host = &Lent::take()?;
    let mut counts = Vec::new();
    for ports in [0, PORTS] {
        let mut service = Service::start(host, &[])?;
        service.boot(&config(ports)?)?;
        counts.push(exits(&mut service)?);
        service.finish()?;
    }
    let each = counts[1].saturating_sub(counts[0]) / u64::from(PORTS);
    println!("exits to the monitor: {} without ports, {} with {PORTS}: {each} each", counts[0], counts[1]);
    ensure!(each <= EXITS_OF_A_PORT, "an empty port costs {each} exits");
    Ok(())
}

#[test]
fn story_a_busy_disk_grows_and_a_link_goes_down_and_up() -> Result<()> {
    let host = &Lent::take()?;
    let folder = &host.folder()?;
    let (path, tap) = (image(folder, host, "first", 64)?, host.tap(None)?);
    let mut service = Service::start(host, &[])?;
    let mut config = config(0)?;
    config.devices.insert(0, disk(&path));
    config.devices.push(DeviceConfig::Net(Net { tap: Some(tap.name().into()), ..Net::default() }));
    let guest = service.boot(&config)?;
    let load = load(&guest)?;

    // In MiB, as the guest has it.
    let size = |guest: &Client| ask(guest, "echo $(($(cat /sys/block/vda/size) / 2048))");
    host.run(format!("truncate -s 128M {path}"))?.ok()?;
    let refused = service.client.patch_device("disk0", &json!({"size": "256M"})).map(drop).unwrap_err().to_string();
    ensure!(refused.contains("make it longer first"), "{refused}");
    ensure!(size(&guest)?.trim() == "64", "it has not grown by itself");
    service.client.patch_device("disk0", &json!({"size": "96M"}))?;
    wait_in(&guest, "[ $(cat /sys/block/vda/size) = 196608 ]")?;
    service.client.patch_device("disk0", &json!({"size": null}))?;
    wait_in(&guest, "[ $(cat /sys/block/vda/size) = 262144 ]")?;
    let written = ask(
        &guest,
        "head -c 1048576 /dev/urandom >/end && dd if=/end of=/dev/vda bs=64k seek=2032 conv=fsync 2>/dev/null && \
         sha256sum </end",
    )?;
    let read = host.run(format!("tail -c 1048576 {path} | sha256sum"))?.ok()?;
    ensure!(written == read, "{written} was written to the new end, {read} is there");
    for (patch, field) in [
        (json!({"size": "64M"}), "/size"),
        (json!({"readonly": true}), "/readonly"),
        (json!({"path": "/etc/hostname"}), "/path"),
    ] {
        let refused = service.client.patch_device("disk0", &patch).map(drop).unwrap_err();
        let api::ClientError::Refused(document) = refused else { bail!("{patch}: {refused}") };
        let named = document.problems.iter().map(|problem| problem.pointer.as_str()).collect::<Vec<_>>();
        ensure!(document.status == 422 && named == [field], "{patch}: {document:?}");
    }
    ensure!(load.status().is_none(), "the busy disk goes on: {}", load.last_words());

    host.run(format!("ip addr add 10.8.1.1/24 dev {}", tap.name()))?.ok()?;
    ask(&guest, "ip addr add 10.8.1.2/24 dev eth0 && ip link set eth0 up && ping -c 2 -w 30 10.8.1.1")?;
    service.client.patch_device("net0", &json!({"link": "down"}))?;
    wait_in(&guest, "[ $(cat /sys/class/net/eth0/carrier) = 0 ]")?;
    let lost = host.run("ping -c 1 -w 2 10.8.1.2".to_owned())?;
    ensure!(lost.ok().is_err(), "nothing passes");
    service.client.reset()?;
    let guest = service.guest()?;
    ask(&guest, "ip link set eth0 up && [ $(cat /sys/class/net/eth0/carrier) = 0 ]").context("it stays down")?;
    ensure!(size(&guest)?.trim() == "128", "it stays as large");
    service.client.patch_device("net0", &json!({"link": "up"}))?;
    wait_in(&guest, "[ $(cat /sys/class/net/eth0/carrier) = 1 ]")?;
    ask(&guest, "ip addr add 10.8.1.2/24 dev eth0 && ping -c 2 -w 30 10.8.1.1")?;
    service.finish()
}
