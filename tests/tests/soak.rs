//! Long stories, for `make soak`: much of the same in a row, much at once, and drivers that come and go under load.
//! `cargo test` leaves them out; `cargo test -p halyard-tests --test soak` runs them, one after another. Each says at its
//! end what it has done in figures (with `--nocapture`).

use std::fs;
use std::io::ErrorKind::WouldBlock;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use halyard_tests::abuse;
use halyard_tests::bench::{Series, many};
use halyard_tests::census::Census;
use halyard_tests::loads::{self, Load};
use halyard_tests::service::{self, Service};
use halyard_tests::story::{PATIENCE, Story, ask, boot, power_off};
use halyard_tests::tiny::{Served, Tiny, debug_exit, kvm};
use halyard_tests::{Cmd, Host, Kernel, Lent, Tap, VmSpec};

/// Guests booted one after another: twice each pair of kernel and format, with one and with two processors.
const BOOTS: u32 = 24;
/// Reboots of one guest.
const RESETS: u32 = 12;
/// Size of the disk whose driver comes and goes, in MiB.
const DISK: u32 = 512;
/// Bytes typed into a serial port; Linux takes some kilobytes a second there in an emulated host.
const TYPED: usize = 256 << 10;
/// Tiny guests one after another; at once, and how often.
const TINY_GUESTS: u32 = 5000;
const TINY_AT_ONCE: usize = 50;
const TINY_ROUNDS: usize = 50;
/// Resets of a tiny guest, and after which of them its monitor's heap has settled.
const TINY_RESETS: u32 = 2000;
const TINY_SETTLED: u32 = 1000;
const TINY_GROWTH: f64 = 48.0;
/// Disks that are added, written, compared and removed under load, unless SOAK_PLUGS says how many; at once; and after
/// how many their monitor's heap has settled.
const PLUGS: usize = 500;
const PLUGS_AT_ONCE: usize = 10;
const PLUGS_SETTLED: usize = 20;
/// The most events that a monitor keeps.
const EVENTS_KEPT: u64 = 2048;
/// How many interrupt routes the hypervisor has given to a machine.
const ROUTES: &str = "halyard_interrupt_routes";
/// How long each kind of abuse of the API lasts, connections that come at once with it, and how often clients are killed.
const ABUSE: Duration = Duration::from_secs(20);
/// How long a client of the API may be silent between its requests.
const SILENCE: Duration = Duration::from_secs(60);
/// How much longer than beside another monitor with the same abuse a vCPU may stand still.
const STALL: Duration = Duration::from_millis(10);
/// Examples for each operation of the API, unless CONTRACT_EXAMPLES says how many.
const EXAMPLES: &str = "300";
const ABUSE_CONNECTIONS: usize = 10_000;
const KILLED_CLIENTS: usize = 100;
/// VMs through one process, and each in a process of its own; and all at once.
const VMS: usize = 1000;
const VMS_AT_ONCE: usize = 100;
/// How much more memory of its own, in KiB, a monitor may have after all resets than after the first ones. Its heap takes
/// some hundred resets to find the size that it keeps.
const GROWTH: f64 = 128.0;

/// No monitor that this host was told to start runs, and none has left its socket behind.
fn nothing_is_left(host: &Host) -> Result<()> {
    let folder = host.folder()?;
    let (folders, _) = folder.rsplit_once('/').context("a folder in that of the host")?;
    let monitors = host.run(Cmd::new("pgrep").args(["-a", "-f", "--", &format!(" run .*socket={folders}/")]))?;
    ensure!(!monitors.status.success(), "left behind: {}", monitors.ok()?);
    let sockets = host.run(Cmd::new("find").args([folders, "-type", "s"]))?.ok()?;
    ensure!(sockets.is_empty(), "left behind: {sockets}");
    Ok(())
}

#[test]
fn soak_guests_boot_one_after_another() -> Result<()> {
    let story = Story::begin("boots");
    let host = &Lent::take()?;
    let mut times = Vec::new();
    for number in 0..BOOTS {
        let kernel = if number % 2 == 0 { Kernel::Debian6_12Cloud } else { Kernel::Debian6_1Cloud };
        let spec = if number % 3 == 0 { VmSpec::elf_guest(kernel)? } else { VmSpec::guest(kernel)? };
        let began = Instant::now();
        let vm = boot(host, &spec.cpus(1 + number / 2 % 2)).with_context(|| format!("boot {number} of {BOOTS}"))?;
        times.push(began.elapsed().as_secs_f64());
        assert_eq!(ask(&vm, "uname -r")?, kernel.version()?);
        power_off(&vm)?;
    }
    nothing_is_left(host)?;
    let (first, Series { median, least, .. }) = (times[0], Series::new("boots", times));
    story.tell(&format!("{BOOTS} guests: user space after {median:.1} s (median; least {least:.1}, first {first:.1})"));
    Ok(())
}

#[test]
fn soak_a_guest_that_reboots_leaves_nothing_in_its_monitor() -> Result<()> {
    let story = Story::begin("resets");
    let host = &Lent::take()?;
    let image = image(host, "8M")?;
    let tap = host.tap(None)?;
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.cpus(2).disk(&format!("path={image}"));
    let spec = spec.network(tap.name(), "52:54:00:00:00:01").args(["--rng"]);
    let mut vm = boot(host, &spec)?;
    let work = "dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null; head -c 4096 /dev/hwrng >/dev/null; ip link set eth0 up";
    let mut counts = Vec::new();
    for _ in 0..RESETS {
        ask(&vm, work)?;
        counts.push(Census::in_host(host, vm.pid())?);
        // The answer is that it comes up again.
        let _last = vm.spawn("reboot -f");
        vm.process().wait_line_for("HALYARD-GUEST ready", PATIENCE).with_context(|| format!("after {counts:?}"))?;
        vm.forget_agent();
    }
    ask(&vm, work)?;
    let last = Census::in_host(host, vm.pid())?;
    // The run after the first reset has all that a reset leaves once.
    last.check_since(&counts[1], GROWTH)?;
    let Census { descriptors, threads, memory, .. } = last;
    story.tell(&format!(
        "{RESETS} resets, {descriptors} descriptors and {threads} threads as before; {} KiB of memory, then {memory}",
        counts[1].memory
    ));
    power_off(&vm)
}

/// A sparse image in a folder of the host.
fn image(host: &Host, size: &str) -> Result<String> {
    let path = format!("{}/disk.img", host.folder()?);
    host.run(format!("truncate -s {size} {path}"))?.ok()?;
    Ok(path)
}

/// Writes each MiB of a disk once, in an order of its own, while another process takes the driver from the device and
/// gives it back. The model is: MiB n of the disk holds MiB (7 n mod 16) of the source.
#[test]
fn soak_a_disk_keeps_what_was_written_while_its_driver_comes_and_goes() -> Result<()> {
    let story = Story::begin("disk");
    let host = &Lent::take()?;
    let (target, source) = (image(host, &format!("{DISK}M"))?, image(host, "16M")?);
    host.run(format!("head -c 16M /dev/urandom >{source}"))?.ok()?;
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.cpus(2).disk(&format!("path={target}"));
    let vm = boot(host, &spec.disk(&format!("path={source},readonly")))?;
    // The second disk is a copy in memory from here on; the first is found by its size, whatever it is called by then.
    ask(&vm, "cat /dev/vdb >/source")?;
    let bus = ask(&vm, "readlink /sys/block/vda/device | sed 's,.*/,,'")?;
    let bind = "/sys/bus/virtio/drivers/virtio_blk";
    let restless = vm.spawn(format!(
        "n=0; until [ -e /done ]; do echo {bus} >{bind}/unbind; echo {bus} >{bind}/bind; n=$((n + 1)); \
         usleep 1500000; done; echo came and went $n times"
    ))?;
    // A node of its own: writing to a name in /dev whose device is gone would make a file there.
    let retried = ask(
        &vm,
        &format!(
            "write() {{
                dev=
                for d in /sys/block/vd*; do
                    if [ \"$(cat $d/size)\" = $(({DISK} * 2048)) ]; then dev=$(cat $d/dev); fi
                done
                [ -n \"$dev\" ] || return 1
                node=/node-$dev
                [ -b $node ] || mknod $node b ${{dev%:*}} ${{dev#*:}}
                dd if=/source of=$node bs=1M skip=$(($1 * 7 % 16)) seek=$1 count=1 conv=notrunc,fsync
            }}
            b=0 retried=0
            while [ $b -lt {DISK} ]; do
                until write $((b * 389 % {DISK})) 2>/err; do
                    retried=$((retried + 1))
                    [ $retried -lt 10000 ] || {{ cat /err >&2; exit 1; }}
                done
                b=$((b + 1))
            done
            touch /done; echo $retried"
        ),
    )?;
    let told = restless.wait_line("came and went")?;
    let times: u32 = told.split(' ').nth(3).context("a number")?.parse()?;
    ensure!(times >= 5 && retried != "0", "the driver came and went {times} times, {retried} writes were tried again");
    power_off(&vm)?;
    let compare = format!(
        "b=0; while [ $b -lt {DISK} ]; do cmp -n 1M -i $((b * 7 % 16))M:${{b}}M {source} {target} || exit 1; \
         b=$((b + 1)); done"
    );
    host.run(Cmd::shell(compare).patience(PATIENCE))?.ok()?;
    story.tell(&format!(
        "{DISK} MiB are sound: the driver came and went {times} times, {retried} writes were tried again"
    ));
    Ok(())
}

#[test]
fn soak_networks_live_on_after_a_flood_of_datagrams() -> Result<()> {
    let story = Story::begin("flood");
    let host = &Lent::take()?;
    let bridge = host.bridge()?;
    host.run(format!("ip addr add 10.0.0.9/24 dev {}", bridge.name()))?.ok()?;
    let taps: [Tap; 2] = [host.tap(Some(&bridge))?, host.tap(Some(&bridge))?];
    let mut guests = Vec::new();
    for (number, tap) in (1..).zip(&taps) {
        let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.network(tap.name(), &format!("52:54:00:00:00:0{number}"));
        let vm = boot(host, &spec)?;
        ask(&vm, &format!("ip addr add 10.0.0.{number}/24 dev eth0 && ip link set eth0 up"))?;
        ask(&vm, "ping -c 1 -w 30 10.0.0.9")?;
        guests.push(vm);
    }
    // To all hosts of the bridge at once, since nobody answers such that there is no one to receive them.
    let flood = "for sender in 1 2 3; do timeout 10 dd if=/dev/zero bs=1400 >/dev/udp/224.0.0.1/9 & done; wait";
    host.run(format!("ip route add 224.0.0.0/4 dev {}", bridge.name()))?.ok()?;
    for round in 0..3 {
        host.run(Cmd::new("bash").args(["-c", flood]).patience(PATIENCE))?.ok()?;
        for (vm, peer) in guests.iter().zip([2, 1]) {
            ask(vm, &format!("ping -c 3 -w 60 10.0.0.{peer}")).with_context(|| format!("after flood {round}"))?;
        }
    }
    let count = |tap: &Tap, what: &str| {
        let counted = host.run(format!("cat /sys/class/net/{}/statistics/tx_{what}", tap.name()))?.ok()?;
        counted.parse::<u64>().with_context(|| counted.clone())
    };
    let (mut passed, mut dropped) = (0, 0);
    for tap in &taps {
        let lost = count(tap, "dropped")?;
        ensure!(lost != 0, "{}: the guest was never behind, so nothing was tried", tap.name());
        (passed, dropped) = (passed + count(tap, "packets")?, dropped + lost);
    }
    let [server, client] = &guests[..] else { anyhow::bail!("two guests") };
    let receiver = server.spawn("nc -l -p 5000 | sha256sum")?;
    ask(server, "until netstat -ltn | grep -q :5000; do :; done")?;
    let sent = ask(client, "head -c 33554432 /dev/urandom >/big && nc 10.0.0.1 5000 </big && sha256sum </big")?;
    receiver.wait_line_for(&sent, PATIENCE).context("both sums must be equal")?;
    story.tell(&format!("two guests got {passed} datagrams and missed {dropped}, then sent 32 MiB with equal sums"));
    guests.iter().try_for_each(power_off)
}

/// Bytes that no text conversion leaves alone.
fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_be_bytes()[0]
    };
    (0..len).map(|_| next()).collect()
}

/// Bytes a second.
fn rate(bytes: usize, since: Instant) -> u128 {
    bytes as u128 * 1000 / since.elapsed().as_millis().max(1)
}

fn sum_of(host: &Host, data: &[u8]) -> Result<String> {
    host.run(Cmd::new("sha256sum").input(data))?.ok()
}

#[test]
fn soak_eight_mebibytes_go_through_a_port_both_ways() -> Result<()> {
    const LEN: usize = 8 << 20;
    let story = Story::begin("port");
    let host = &Lent::take()?;
    let path = format!("{}/port", host.folder()?);
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?;
    let vm = boot(host, &spec.args(["--console".to_owned(), format!("socket={path},name=soak")]))?;
    let port = ask(
        &vm,
        "cd /sys/class/virtio-ports && for p in *; do if [ \"$(cat $p/name)\" = soak ]; then echo $p; fi; done",
    )?;
    let mut socket = host.connect(&path)?;
    let mut writer = socket.clone();
    let both = vm.spawn(format!(
        "exec 3<>/dev/{port}; head -c {LEN} /dev/urandom >/out; head -c {LEN} <&3 >/in & cat /out >&3; wait; \
         sha256sum </out; sha256sum </in; echo both"
    ))?;
    let (data, began) = (pattern(LEN), Instant::now());
    let (sent, got) = thread::scope(|scope| {
        let sent = scope.spawn(|| writer.write_all(&data));
        let mut got = vec![0; LEN];
        let read = socket.read_exact(&mut got);
        (sent.join(), read.map(|()| got))
    });
    sent.map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    let rate = rate(LEN, began) >> 10;
    both.wait_line_for("both", PATIENCE)?;
    let sums: Vec<String> = both.output().lines().map(str::to_owned).collect();
    assert_eq!(sums[..2], [sum_of(host, &got?)?, sum_of(host, &data)?], "what was written and what was read");
    story.tell(&format!("{} MiB each way with equal sums, {rate} KiB a second", LEN >> 20));
    power_off(&vm)
}

#[test]
fn soak_serial_input_arrives_whole() -> Result<()> {
    let story = Story::begin("serial");
    let host = &Lent::take()?;
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?)?;
    let data = pattern(TYPED);
    let reader =
        vm.spawn(format!("stty -F /dev/ttyS0 raw -echo && echo go && head -c {TYPED} /dev/ttyS0 | sha256sum"))?;
    reader.wait_line("go")?;
    let began = Instant::now();
    for piece in data.chunks(64 << 10) {
        vm.write_serial(piece)?;
    }
    reader.wait_line_for(&sum_of(host, &data)?, PATIENCE)?;
    let rate = rate(TYPED, began);
    story.tell(&format!("{} KiB with equal sums, {rate} bytes a second", TYPED >> 10));
    power_off(&vm)
}

#[test]
fn soak_abuse_of_the_api_disturbs_nobody() -> Result<()> {
    let story = Story::begin("abuse");
    if !kvm() {
        return Ok(());
    }
    let report = abuse::endure(&abuse::Kind::ALL, ABUSE, ABUSE_CONNECTIONS);
    story.tell(&report.to_string());
    let own = report.stall_of_its_own();
    ensure!(own <= STALL, "a vCPU stood still {own:?} longer than beside a monitor with the same abuse: {report}");
    abuse::kill_clients(KILLED_CLIENTS);
    story.tell(&format!("{KILLED_CLIENTS} times two clients were killed"));
    Ok(())
}

#[test]
fn soak_silent_clients_are_sent_away_and_others_stay() -> Result<()> {
    let story = Story::begin("silence");
    let served = Served::start("serve", ["--log-level", "error"]);
    let connect = || -> Result<UnixStream> {
        let stream = UnixStream::connect(served.path("api"))?;
        stream.set_read_timeout(Some(SILENCE / 10))?;
        Ok(stream)
    };
    let (mut silent, mut slow, mut regular) = (connect()?, connect()?, connect()?);
    slow.write_all(b"GET /api/v1/ping HTTP/1.1\r\nx-slow: ")?;
    let (began, mut gone) = (Instant::now(), [None, None]);
    while gone.contains(&None) {
        ensure!(began.elapsed() < SILENCE * 3 / 2, "clients that say nothing whole are still connected: {gone:?}");
        regular.write_all(b"GET /api/v1/ping HTTP/1.1\r\nhost: localhost\r\n\r\n")?;
        ensure!(regular.read(&mut [0; 4096])? > 0, "a client that asks now and then was sent away");
        // A byte of a head now and then is no request.
        let _ = slow.write_all(b"x");
        for (stream, gone) in [&mut silent, &mut slow].into_iter().zip(&mut gone) {
            if gone.is_none() && !matches!(stream.read(&mut [0; 64]), Err(error) if error.kind() == WouldBlock) {
                *gone = Some(began.elapsed());
            }
        }
    }
    let early = gone.iter().flatten().find(|gone| **gone < SILENCE - Duration::from_secs(1));
    ensure!(early.is_none(), "a client was sent away after {early:?}");
    story.tell(&format!("sent away after {gone:?}"));
    Ok(())
}

#[test]
fn soak_the_api_is_what_its_description_says_while_the_guest_works_on_its_disk() {
    let story = Story::begin("contract");
    if kvm() {
        let examples = std::env::var("CONTRACT_EXAMPLES").unwrap_or_else(|_| EXAMPLES.into());
        let figures = abuse::try_all_under_load(&examples);
        story.tell(&format!("{}; no write was lost", figures.join("; ")));
    }
}

#[test]
fn soak_vms_by_the_thousand_leave_nothing_behind() -> Result<()> {
    let story = Story::begin("many");
    if !kvm() {
        return Ok(());
    }
    let before = leftovers()?;
    let (figures, censuses) = many::through_one_process(VMS, Census::here)?;
    let [settled, last] = &censuses[..] else { anyhow::bail!("two counts") };
    last.check_since(settled, GROWTH)?;
    let (settled, last) = (settled.memory, last.memory);
    let processes = many::one_after_another(VMS)?;
    let at_once = many::at_once(VMS_AT_ONCE)?;
    assert_eq!(leftovers()?, before);
    story.tell(&format!(
        "{VMS} VMs through one process: {:.1} a second, {settled} KiB of memory after 600, then {last}; \
         {VMS} processes: {processes:.1} a second; {VMS_AT_ONCE} at once: {:.1} a second, {:.2} MiB each",
        figures, at_once.rate, at_once.mebibytes
    ));
    Ok(())
}

/// Descriptors of this process, and children that it has not waited for.
fn leftovers() -> Result<(usize, String)> {
    let children = fs::read_to_string(format!("/proc/self/task/{}/children", nix::unistd::gettid()))?;
    Ok((fs::read_dir("/proc/self/fd")?.count(), children))
}

#[test]
fn soak_tiny_guests_by_the_thousand() -> Result<()> {
    let story = Story::begin("tiny");
    let Some(guest) = Tiny::new("first-byte") else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("socket");
    let guest = guest.args(["--memory", "64M", "--console", &format!("socket={}", socket.display())]);
    guest.run().expect_code(debug_exit(0));
    let before = leftovers()?;
    for number in 0..TINY_GUESTS {
        let run = guest.run();
        assert_eq!((run.code(), run.output().as_str()), (Some(debug_exit(0)), "H"), "guest {number}\n{run}");
        ensure!(fs::read_dir(folder.path())?.next().is_none(), "guest {number} has left a file behind");
    }
    assert_eq!(leftovers()?, before);
    let each = 1000.0 * story.began().elapsed().as_secs_f64() / f64::from(TINY_GUESTS);
    story.tell(&format!("{TINY_GUESTS} guests one after another, {each:.1} ms each, nothing left behind"));
    Ok(())
}

#[test]
fn soak_many_tiny_guests_at_once() -> Result<()> {
    let story = Story::begin("at once");
    let Some(guest) = Tiny::new("echo") else { return Ok(()) };
    let guest = guest.args(["--memory", "64M"]).cmdline("interrupt").deadline(Duration::from_secs(300));
    let before = leftovers()?;
    for _ in 0..TINY_ROUNDS {
        let mut running: Vec<_> = (0..TINY_AT_ONCE).map(|_| guest.start()).collect();
        for (number, vm) in running.iter_mut().enumerate() {
            vm.wait_for("interrupt\n");
            vm.send(format!("guest {number}.").as_bytes());
        }
        for (number, vm) in running.iter_mut().enumerate() {
            vm.wait_for(&format!("guest {number}."));
            vm.send(b"q");
        }
        for vm in running {
            vm.finish().expect_code(debug_exit(0));
        }
    }
    assert_eq!(leftovers()?, before);
    story.tell(&format!("{TINY_ROUNDS} times {TINY_AT_ONCE} guests at once, nothing left behind"));
    Ok(())
}

#[test]
fn soak_a_tiny_guest_resets_by_the_hundred() -> Result<()> {
    let story = Story::begin("resets too");
    let Some(guest) = Tiny::new("commands") else { return Ok(()) };
    // Pages of the program that were just built count as dirty until they are on disk.
    fs::File::open(halyard_tests::vm::halyard()?)?.sync_all()?;
    let folder = tempfile::tempdir()?;
    let image = folder.path().join("image");
    fs::File::create(&image)?.set_len(8 << 20)?;
    let (disk, console) = (format!("path={}", image.display()), format!("socket={}/port", folder.path().display()));
    let guest = guest.args(["--memory", "256M", "--cpus", "2", "--rng", "--disk", &disk, "--console", &console]);
    let mut running = guest.deadline(PATIENCE).start();
    let mut counts = Vec::new();
    for number in 0..=TINY_RESETS {
        running.wait_for("ready\n");
        if [TINY_SETTLED, TINY_RESETS].contains(&number) {
            counts.push(Census::here(running.pid())?);
        }
        running.send(if number < TINY_RESETS { b"r" } else { b"q" });
    }
    running.finish().expect_code(debug_exit(7));
    let [settled, last] = &counts[..] else { anyhow::bail!("two counts") };
    last.check_since(settled, TINY_GROWTH)?;
    let (settled, last) = (settled.memory, last.memory);
    story.tell(&format!("{TINY_RESETS} resets of a tiny guest; {settled} KiB of memory half way, then {last}"));
    Ok(())
}

/// Fills the log of events: what grows after that is left behind by something else.
fn fill_events(service: &mut Service) -> Result<()> {
    while service.client.vm()?.sequence < EVENTS_KEPT {
        service.client.pause()?;
        service.client.resume()?;
        service.wait_for("the guest to go on", |event| match event {
            api::EventKind::Phase { phase: api::PhaseName::Running, .. } => Some(()),
            _ => None,
        })?;
    }
    Ok(())
}

/// One round: disks are added, written and compared, and removed.
fn plug_round(host: &Host, service: &mut Service, guest: &halyard_tests::Client, images: &[String]) -> Result<()> {
    let ids: Vec<String> = (0..images.len()).map(|number| format!("plug{number}")).collect();
    let jobs: Vec<_> = ids
        .iter()
        .zip(images)
        .map(|(id, image)| service.client.put_device(id, &api::DeviceConfig::Disk(api::Disk::new(image))))
        .collect();
    jobs.into_iter().try_for_each(|job| service.success_of(job?))?;
    for (id, image) in ids.iter().zip(images) {
        // A disk's serial number is its id.
        let line = format!(
            "until disk=$(grep -lx {id} /sys/block/vd*/serial); do usleep 20000; done; disk=${{disk%/serial}}; \
             until [ -b /dev/${{disk##*/}} ]; do usleep 20000; done; head -c 262144 /dev/urandom >/{id} && \
             dd if=/{id} of=/dev/${{disk##*/}} bs=64k conv=fsync 2>/dev/null && sha256sum </{id}"
        );
        let written = guest.run(Cmd::shell(line).patience(PATIENCE))?.ok()?;
        let read = host.run(format!("head -c 262144 {image} | sha256sum"))?.ok()?;
        ensure!(written == read, "{id}: {written} was written, {read} is in {image}");
    }
    service.remove(&ids.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn soak_disks_come_and_go_under_load() -> Result<()> {
    let story = Story::begin("plugs");
    let plugs = std::env::var("SOAK_PLUGS").map_or(Ok(PLUGS), |text| text.parse().context("SOAK_PLUGS"))?;
    let host = &Lent::take()?;
    let folder = host.folder()?;
    let image = |name: &str, mib: u32| -> Result<String> {
        let path = format!("{folder}/{name}.img");
        host.run(format!("truncate -s {mib}M {path}"))?.ok().map(|_| path)
    };
    let busy = image("busy", 64)?;
    let images: Vec<String> = (0..PLUGS_AT_ONCE).map(|number| image(&number.to_string(), 16)).collect::<Result<_>>()?;
    let mut service = Service::start(host, &[])?;
    let mut config = service::guest(Kernel::Debian6_12Cloud)?;
    config.pci.hotplug_ports = 32;
    config.pci.hotplug_timeout = api::TimeSpan::from_millis(600_000);
    config.devices.insert(0, api::DeviceConfig::Disk(api::Disk::new(&busy)));
    config.memory.size = api::ByteSize::mib(512);
    Load::Fio.give(host, &mut config)?;
    let guest = service.boot(&config)?;
    let load = guest.spawn(loads::fio("/dev/vda", ""))?;
    load.wait_line_for("sound", PATIENCE)?;
    let mut settled = None;
    let mut done = 0;
    while done < plugs {
        plug_round(host, &mut service, &guest, &images).with_context(|| format!("after {done} disks"))?;
        done += PLUGS_AT_ONCE;
        if settled.is_none() && done >= PLUGS_SETTLED {
            fill_events(&mut service)?;
            settled = Some((service.census(host)?, service.metric(ROUTES)?));
        }
    }
    let (last, routes) = (service.census(host)?, service.metric(ROUTES)?);
    ensure!(load.status().is_none(), "the busy disk goes on: {}", load.last_words());
    let (settled, routes_then) = settled.context("too few disks to tell")?;
    last.check_since(&settled, GROWTH)?;
    ensure!(routes == routes_then, "{routes_then} interrupt routes were held, then {routes}");
    let rounds = load.output().lines().count();
    service.finish()?;
    story.tell(&format!(
        "{done} disks came and went beside {rounds} rounds of fio; {routes} interrupt routes; {settled:?} after the first, \
         {last:?} after the last"
    ));
    Ok(())
}
