//! Long stories, for `make soak`: much of the same in a row, much at once, and drivers that come and go under load.
//! `cargo test` leaves them out; `cargo test -p halyard-tests --test soak` runs them, one after another.

use std::fs;
use std::io::{Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use halyard_tests::tiny::{Tiny, debug_exit};
use halyard_tests::{Cmd, Host, Kernel, Lent, Status, Tap, Vm, VmSpec};

/// Guests booted one after another.
const BOOTS: u32 = 50;
/// Reboots of one guest.
const RESETS: u32 = 20;
/// Tiny guests one after another, and at once.
const TINY_GUESTS: u32 = 1000;
const TINY_AT_ONCE: usize = 50;
/// How long anything of a story may take.
const PATIENCE: Duration = Duration::from_secs(1200);

/// One story at a time, so that each has the machine for itself.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn boot<'a>(host: &'a Host, spec: &VmSpec) -> Result<Vm<'a>> {
    let vm = host.halyard(spec)?;
    vm.wait_line("HALYARD-GUEST ready")?;
    Ok(vm)
}

/// What a command in the guest says.
fn ask(vm: &Vm, command: &str) -> Result<String> {
    vm.run(Cmd::shell(command).patience(PATIENCE))?.ok().with_context(|| command.to_owned())
}

fn power_off(vm: &Vm) -> Result<()> {
    // The guest is gone before its agent can answer.
    let _last = vm.spawn("poweroff -f");
    ensure!(vm.exit_status()? == Status::Exited(0), "power-off must end Halyard with code 0");
    Ok(())
}

/// Descriptors and threads of a process, and its own memory in KiB.
fn census(host: &Host, pid: u32) -> Result<[u64; 3]> {
    let line = format!(
        "ls /proc/{pid}/fd | wc -l; ls /proc/{pid}/task | wc -l; \
         awk '/^Private_(Clean|Dirty):/ {{ sum += $2 }} END {{ print sum }}' /proc/{pid}/smaps_rollup"
    );
    let counted = host.run(line)?.ok()?;
    let numbers: Vec<u64> = counted.lines().map(str::trim).map(str::parse).collect::<Result<_, _>>()?;
    numbers.try_into().map_err(|_| anyhow::anyhow!("not three numbers: {counted}"))
}

#[test]
fn soak_guests_boot_one_after_another() -> Result<()> {
    let _turn = turn();
    let host = &Lent::take()?;
    for number in 0..BOOTS {
        let kernel = if number % 2 == 0 { Kernel::Debian6_12Cloud } else { Kernel::Debian6_1Cloud };
        let spec = if number % 3 == 0 { VmSpec::elf_guest(kernel)? } else { VmSpec::guest(kernel)? };
        let vm = boot(host, &spec.cpus(1 + number % 2)).with_context(|| format!("boot {number} of {BOOTS}"))?;
        assert_eq!(ask(&vm, "uname -r")?, kernel.version()?);
        power_off(&vm)?;
    }
    ensure!(!host.run("pgrep -x halyard")?.status.success(), "a monitor is left behind");
    assert_eq!(host.run("find /run/halyard /tmp -name agent -type s | wc -l")?.ok()?, "0", "sockets left behind");
    Ok(())
}

#[test]
fn soak_a_guest_that_reboots_leaves_nothing_in_its_monitor() -> Result<()> {
    let _turn = turn();
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
        counts.push(census(host, vm.pid())?);
        // The answer is that it comes up again.
        let _last = vm.spawn("reboot -f");
        vm.wait_line("HALYARD-GUEST ready").with_context(|| format!("after {counts:?}"))?;
        vm.forget_agent();
    }
    ask(&vm, work)?;
    let ([fds, threads, _], [fds_after, threads_after, _]) = (counts[0], census(host, vm.pid())?);
    assert_eq!((fds, threads), (fds_after, threads_after), "descriptors and threads of {counts:?}");
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
    let _turn = turn();
    let host = &Lent::take()?;
    let (target, source) = (image(host, "1G")?, image(host, "16M")?);
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
        "write() {
            dev=
            for d in /sys/block/vd*; do
                if [ \"$(cat $d/size)\" = 2097152 ]; then dev=$(cat $d/dev); fi
            done
            [ -n \"$dev\" ] || return 1
            node=/node-$dev
            [ -b $node ] || mknod $node b ${dev%:*} ${dev#*:}
            dd if=/source of=$node bs=1M skip=$(($1 * 7 % 16)) seek=$1 count=1 conv=notrunc,fsync
        }
        b=0 retried=0
        while [ $b -lt 1024 ]; do
            until write $((b * 389 % 1024)) 2>/err; do
                retried=$((retried + 1))
                [ $retried -lt 10000 ] || { cat /err >&2; exit 1; }
            done
            b=$((b + 1))
        done
        touch /done; echo $retried",
    )?;
    let told = restless.wait_line("came and went")?;
    let times: u32 = told.split(' ').nth(3).context("a number")?.parse()?;
    ensure!(times >= 5 && retried != "0", "the driver came and went {times} times, {retried} writes were tried again");
    power_off(&vm)?;
    let compare = format!(
        "b=0; while [ $b -lt 1024 ]; do cmp -n 1M -i $((b * 7 % 16))M:${{b}}M {source} {target} || exit 1; \
         b=$((b + 1)); done"
    );
    host.run(Cmd::shell(compare).patience(PATIENCE))?.ok()?;
    Ok(())
}

#[test]
fn soak_networks_live_on_after_a_flood_of_datagrams() -> Result<()> {
    let _turn = turn();
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
    for tap in &taps {
        let dropped = host.run(format!("cat /sys/class/net/{}/statistics/tx_dropped", tap.name()))?.ok()?;
        ensure!(dropped.trim() != "0", "{}: the guest was never behind, so nothing was tried", tap.name());
    }
    let [server, client] = &guests[..] else { anyhow::bail!("two guests") };
    let receiver = server.spawn("nc -l -p 5000 | sha256sum")?;
    ask(server, "until netstat -ltn | grep -q :5000; do :; done")?;
    let sent = ask(client, "head -c 33554432 /dev/urandom >/big && nc 10.0.0.1 5000 </big && sha256sum </big")?;
    receiver.wait_line_for(&sent, PATIENCE).context("both sums must be equal")?;
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

fn sum_of(host: &Host, data: &[u8]) -> Result<String> {
    host.run(Cmd::new("sha256sum").input(data))?.ok()
}

#[test]
fn soak_eight_mebibytes_go_through_a_port_both_ways() -> Result<()> {
    const LEN: usize = 8 << 20;
    let _turn = turn();
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
    let data = pattern(LEN);
    let (sent, got) = thread::scope(|scope| {
        let sent = scope.spawn(|| writer.write_all(&data));
        let mut got = vec![0; LEN];
        let read = socket.read_exact(&mut got);
        (sent.join(), read.map(|()| got))
    });
    sent.map_err(|_| anyhow::anyhow!("the writer panicked"))??;
    both.wait_line_for("both", PATIENCE)?;
    let sums: Vec<String> = both.output().lines().map(str::to_owned).collect();
    assert_eq!(sums[..2], [sum_of(host, &got?)?, sum_of(host, &data)?], "what was written and what was read");
    power_off(&vm)
}

#[test]
fn soak_a_mebibyte_of_serial_input_arrives_whole() -> Result<()> {
    let _turn = turn();
    let host = &Lent::take()?;
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?)?;
    let data = pattern(1 << 20);
    let reader = vm.spawn("stty -F /dev/ttyS0 raw -echo && echo go && head -c 1048576 /dev/ttyS0 | sha256sum")?;
    reader.wait_line("go")?;
    for piece in data.chunks(64 << 10) {
        vm.write_serial(piece)?;
    }
    reader.wait_line_for(&sum_of(host, &data)?, PATIENCE)?;
    power_off(&vm)
}

/// Descriptors of this process, and children that it has not waited for.
fn leftovers() -> Result<(usize, String)> {
    let children = fs::read_to_string(format!("/proc/self/task/{}/children", nix::unistd::gettid()))?;
    Ok((fs::read_dir("/proc/self/fd")?.count(), children))
}

#[test]
fn soak_tiny_guests_by_the_thousand() -> Result<()> {
    let _turn = turn();
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
    Ok(())
}

#[test]
fn soak_many_tiny_guests_at_once() -> Result<()> {
    let _turn = turn();
    let Some(guest) = Tiny::new("echo") else { return Ok(()) };
    let guest = guest.args(["--memory", "64M"]).cmdline("interrupt").deadline(Duration::from_secs(300));
    let before = leftovers()?;
    for _ in 0..5 {
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
    Ok(())
}
