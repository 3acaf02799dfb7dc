//! Guest stories: stock Debian kernels boot to user space in Halyard, on a host with hardware virtualization or in the
//! lab's emulated one, and a test asks the guest and the host what they see.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use halyard_tests::confined::Confined;
use halyard_tests::service::{self, Service};
use halyard_tests::vm::halyard;
use halyard_tests::{Cmd, Host, Kernel, Lent, Status, Vm, VmSpec, images};

const KERNELS: [Kernel; 2] = [Kernel::Debian6_1Cloud, Kernel::Debian6_12Cloud];

/// Boots a guest to user space.
fn boot<'a>(host: &'a Host, spec: &VmSpec) -> Result<Vm<'a>> {
    let vm = host.halyard(spec)?;
    vm.wait_line("HALYARD-GUEST ready")?;
    Ok(vm)
}

/// What a command in the guest says.
fn ask(vm: &Vm, command: &str) -> Result<String> {
    vm.run(command)?.ok().with_context(|| command.to_owned())
}

/// Powers a guest off and checks that Halyard says so.
fn power_off(vm: &Vm) -> Result<()> {
    // The guest is gone before its agent can answer.
    let _last = vm.spawn("poweroff -f");
    ensure!(vm.exit_status()? == Status::Exited(0), "power-off must end Halyard with code 0");
    Ok(())
}

fn processors(count: u32) -> Result<()> {
    let host = &Lent::take()?;
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?.cpus(count))?;
    assert_eq!(ask(&vm, "grep -c ^processor /proc/cpuinfo")?, count.to_string());
    assert_eq!(ask(&vm, "sed -n 's/^cpu cores.*: //p' /proc/cpuinfo | sort -u")?, count.to_string());
    assert_eq!(ask(&vm, "sed -n 's/^physical id.*: //p' /proc/cpuinfo | sort -u")?, "0", "one package");
    let ids = ask(&vm, "sed -n 's/^apicid.*: //p' /proc/cpuinfo | sort -n | tr '\\n' ' '")?;
    let expected: Vec<String> = (0..count).map(|id| id.to_string()).collect();
    assert_eq!(ids.trim(), expected.join(" "));
    power_off(&vm)
}

#[test]
fn story_one_processor() -> Result<()> {
    processors(1)
}

#[test]
fn story_two_processors() -> Result<()> {
    processors(2)
}

#[test]
fn story_eight_processors() -> Result<()> {
    processors(8)
}

#[test]
fn story_sockets_cores_and_threads_are_as_configured() -> Result<()> {
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.topology("6,sockets=1,cores=3,threads=2");
    let host = &Lent::take()?;
    let vm = boot(host, &spec)?;
    assert_eq!(ask(&vm, "grep -c ^processor /proc/cpuinfo")?, "6");
    assert_eq!(ask(&vm, "sed -n 's/^siblings.*: //p' /proc/cpuinfo | sort -u")?, "6");
    assert_eq!(ask(&vm, "sed -n 's/^cpu cores.*: //p' /proc/cpuinfo | sort -u")?, "3");
    power_off(&vm)
}

#[test]
fn story_bzimage_and_elf_of_both_kernels() -> Result<()> {
    let host = &Lent::take()?;
    for kernel in KERNELS {
        for spec in [VmSpec::guest(kernel)?, VmSpec::elf_guest(kernel)?] {
            let vm = boot(host, &spec)?;
            let release = ask(&vm, "uname -r")?;
            assert_eq!(release, kernel.version()?);
            power_off(&vm)?;
        }
    }
    Ok(())
}

#[test]
fn story_memory_below_and_across_the_32_bit_hole() -> Result<()> {
    let host = &Lent::take()?;
    for (size, mib) in [("256M", 256_u64), ("6G", 6144)] {
        let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?.memory(size))?;
        let total: u64 = ask(&vm, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?.parse()?;
        // The kernel keeps some for itself; what E820 says is exact.
        ensure!((mib * 1024 * 3 / 4..=mib * 1024).contains(&total), "{size}: the guest has {total} KiB");
        let ranges =
            ask(&vm, "dmesg | sed -n 's/.*BIOS-e820: \\[mem \\(0x[0-9a-f]*\\)-\\(0x[0-9a-f]*\\)\\] usable/\\1 \\2/p'")?;
        let bytes: u64 = ranges.lines().map(range_length).sum::<Result<u64>>()?;
        let hole = 0x10_0000 - 0xa_0000;
        ensure!(((mib << 20) - hole - 4096..=mib << 20).contains(&bytes), "{size}: {bytes} bytes usable in\n{ranges}");
        power_off(&vm)?;
    }
    Ok(())
}

fn range_length(line: &str) -> Result<u64> {
    let (first, last) = line.split_once(' ').context("a range")?;
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16);
    Ok(number(last)? - number(first)? + 1)
}

/// A disk image of `mib` MiB in a folder of the host.
fn image(host: &Host, mib: u32) -> Result<String> {
    let path = format!("{}/disk.img", host.folder()?);
    host.run(format!("truncate -s {mib}M {path}"))?.ok()?;
    Ok(path)
}

#[test]
fn story_a_disk_reads_back_on_the_host_as_the_guest_wrote_it() -> Result<()> {
    let host = &Lent::take()?;
    let path = image(host, 64)?;
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?.disk(&format!("path={path}")))?;
    assert_eq!(ask(&vm, "cat /sys/block/vda/size")?, (64 * 2048).to_string());
    let written = ask(
        &vm,
        "head -c 33554432 /dev/urandom >/file && dd if=/file of=/dev/vda bs=1M seek=16 conv=fsync 2>/dev/null && \
         sha256sum </file",
    )?;
    power_off(&vm)?;
    let read = host.run(format!("dd if={path} bs=1M skip=16 count=32 2>/dev/null | sha256sum"))?.ok()?;
    assert_eq!(written, read);
    Ok(())
}

#[test]
fn story_what_was_flushed_survives_a_killed_monitor() -> Result<()> {
    let host = &Lent::take()?;
    let path = image(host, 64)?;
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.disk(&format!("path={path}"));
    let vm = boot(host, &spec)?;
    // Each block is flushed before its number is told; then the monitor dies in the middle of the next ones.
    let writer = vm.spawn(
        "i=1; while :; do yes \"block $i\" | head -c 4096 | dd of=/dev/vda bs=4096 seek=$i conv=fsync 2>/dev/null && \
         echo flushed $i; i=$((i + 1)); done",
    )?;
    writer.wait_line("flushed 20")?;
    vm.kill(9)?;
    ensure!(vm.exit_status()? == Status::Killed(9), "the monitor was to die");
    let told = writer.output().lines().filter_map(|line| line.strip_prefix("flushed ")?.parse().ok()).max();
    let told: u64 = told.context("nothing was flushed")?;
    ensure!(told >= 20, "only {told} blocks were told of");
    let disk = host.run(format!("dd if={path} bs=4096 count={} 2>/dev/null", told + 1))?.stdout;
    for number in 1..=told {
        let block = disk.chunks(4096).nth(usize::try_from(number)?).context("the image is too short")?;
        let expected: Vec<u8> = format!("block {number}\n").into_bytes().into_iter().cycle().take(4096).collect();
        ensure!(block == expected, "block {number} of {told} was flushed and is not there");
    }
    // The lock went with the monitor: another one can have the disk.
    let next = boot(host, &spec)?;
    power_off(&next)
}

#[test]
fn story_a_read_only_disk_refuses_writes_and_is_shared() -> Result<()> {
    let host = &Lent::take()?;
    let path = image(host, 8)?;
    host.run(format!("printf shared >{path}.tmp && dd if={path}.tmp of={path} conv=notrunc 2>/dev/null"))?.ok()?;
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.disk(&format!("path={path},readonly"));
    let (first, second) = (host.halyard(&spec)?, host.halyard(&spec)?);
    for vm in [&first, &second] {
        vm.wait_line("HALYARD-GUEST ready")?;
        assert_eq!(ask(vm, "head -c 6 /dev/vda")?, "shared");
        assert_eq!(ask(vm, "cat /sys/block/vda/ro")?, "1");
        ensure!(!vm.run("echo no | dd of=/dev/vda bs=512 conv=fsync")?.status.success(), "a write went through");
    }
    power_off(&first)?;
    power_off(&second)
}

#[test]
fn story_two_guests_talk_over_a_bridge() -> Result<()> {
    let host = &Lent::take()?;
    let bridge = host.bridge()?;
    let (left, right) = (host.tap(Some(&bridge))?, host.tap(Some(&bridge))?);
    let guest = |tap: &str, mac: &str, memory: &str| {
        anyhow::Ok(VmSpec::guest(Kernel::Debian6_12Cloud)?.network(tap, mac).memory(memory))
    };
    let server = host.halyard(&guest(left.name(), "52:54:00:00:00:01", "1G")?)?;
    let client = host.halyard(&guest(right.name(), "52:54:00:00:00:02", "256M")?)?;
    for (vm, number) in [(&server, 1), (&client, 2)] {
        vm.wait_line("HALYARD-GUEST ready")?;
        assert_eq!(ask(vm, "cat /sys/class/net/eth0/address")?, format!("52:54:00:00:00:0{number}"));
        ask(vm, &format!("ip addr add 10.0.0.{number}/24 dev eth0 && ip link set eth0 up"))?;
    }
    let ping = ask(&client, "ping -c 3 -w 30 10.0.0.1")?;
    ensure!(ping.contains("3 packets received"), "{ping}");

    // 16 times the same 16 MiB, which are made once: random numbers are dear in an emulated host.
    let made = ask(
        &server,
        "mkdir /srv && mount -t tmpfs -o size=300M srv /srv && head -c 16777216 /dev/urandom >/part && \
         for i in 0 1 2 3 4 5 6 7 8 9 a b c d e f; do cat /part; done >/srv/big && httpd -p 80 -h /srv && \
         [ $(wc -c </srv/big) = 268435456 ] && md5sum </srv/big",
    )?;
    let fetch = Cmd::shell("wget -q -O - http://10.0.0.1/big | md5sum").patience(Duration::from_secs(300));
    assert_eq!(client.run(fetch)?.ok()?, made, "the sums must be equal on both sides");
    power_off(&server)?;
    power_off(&client)
}

#[test]
fn story_reboot_boots_again_in_the_same_process() -> Result<()> {
    let host = &Lent::take()?;
    let path = image(host, 8)?;
    let mut vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?.disk(&format!("path={path}")))?;
    ask(&vm, "echo before >/dev/vda && sync")?;
    let last = vm.spawn("reboot -f");
    vm.wait_line("HALYARD-GUEST ready").context("the guest must come up a second time")?;
    // The session with the agent before ends with the last that holds it.
    drop(last);
    vm.forget_agent();
    assert_eq!(ask(&vm, "head -n 1 /dev/vda")?, "before");
    power_off(&vm)
}

#[test]
fn story_reboot_ends_the_run_where_that_is_asked_for() -> Result<()> {
    let host = &Lent::take()?;
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_1Cloud)?.args(["--on-reset", "exit"]))?;
    let _last = vm.spawn("reboot -f");
    assert_eq!(vm.exit_status()?, Status::Exited(3));
    Ok(())
}

#[test]
fn story_the_power_button_shuts_the_guest_down() -> Result<()> {
    let host = &Lent::take()?;
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?)?;
    // The agent answers, so its power-button handler runs.
    ask(&vm, "true")?;
    vm.kill(15)?;
    assert_eq!(vm.exit_status()?, Status::Exited(0));
    Ok(())
}

#[test]
fn story_a_panic_of_the_guest_has_its_own_exit_code() -> Result<()> {
    for kernel in KERNELS {
        let host = &Lent::take()?;
        let vm = boot(host, &VmSpec::guest(kernel)?)?;
        let _last = vm.spawn("echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger");
        assert_eq!(vm.exit_status()?, Status::Exited(4), "{}", kernel.label());
    }
    Ok(())
}

/// 1 MiB that no text conversion leaves alone.
fn mebibyte() -> Vec<u8> {
    (0..1_u32 << 20).map(|index| u8::try_from(index.wrapping_mul(2_654_435_761) >> 24).unwrap_or(0)).collect()
}

#[test]
fn story_a_mebibyte_of_console_input_arrives_whole() -> Result<()> {
    let host = &Lent::take()?;
    let socket = format!("{}/bulk", host.folder()?);
    let console = format!("socket={socket},name=org.halyard.bulk");
    let vm = boot(host, &VmSpec::guest(Kernel::Debian6_12Cloud)?.args(["--console", &console]))?;
    let mut sender = host.connect(&socket)?;
    // The driver learns one message after the other of its ports, of their names and of who is connected; until then
    // there is no such port, or it has ended.
    let reader = vm.spawn(
        "until [ -s /tmp/bulk ]; do for port in /sys/class/virtio-ports/*; do read -r name <$port/name; \
         [ \"$name\" = org.halyard.bulk ] && head -c 1048576 /dev/${port##*/} >/tmp/bulk; done; done; sha256sum </tmp/bulk",
    )?;
    sender.write_all(&mebibyte())?;
    // The guest must have all of it, though nothing more will come.
    sender.close_input()?;
    let expected = host.run(Cmd::new("sha256sum").input(mebibyte()))?.ok()?;
    reader.wait_line(&expected)?;
    power_off(&vm)
}

/// Types into a terminal of the guest, of which the monitor's standard input is the other end.
fn typed_input_arrives(spec: &VmSpec, terminal: &str, bytes: usize) -> Result<()> {
    let host = &Lent::take()?;
    let vm = boot(host, spec)?;
    // Printable bytes: Linux takes a ^O on a console's input for a key of its own.
    let input: Vec<u8> = mebibyte().iter().take(bytes).map(|byte| b' ' + byte % 95).collect();
    let reader =
        vm.spawn(format!("stty -F {terminal} raw -echo && echo go && head -c {bytes} {terminal} | sha256sum"))?;
    reader.wait_line("go")?;
    vm.write_serial(&input)?;
    let expected = host.run(Cmd::new("sha256sum").input(input))?.ok()?;
    reader.wait_line(&expected)?;
    power_off(&vm)
}

#[test]
fn story_serial_input_arrives_whole() -> Result<()> {
    typed_input_arrives(&VmSpec::guest(Kernel::Debian6_12Cloud)?, "/dev/ttyS0", 32 << 10)
}

#[test]
fn story_input_of_a_virtio_console_arrives_whole() -> Result<()> {
    // Linux takes some kilobytes a second from such a console, whatever the monitor.
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.serial(Some("off")).cmdline("console=hvc0 quiet panic=-1");
    typed_input_arrives(&spec.args(["--console", "stdio"]), "/dev/hvc0", 32 << 10)
}

#[test]
fn story_a_stock_kernel_is_driven_through_the_api_socket() -> Result<()> {
    let host = &Lent::take()?;
    let mut service = Service::start(host, &[])?;
    let kernel = Kernel::Debian6_12Cloud;
    // The guest's agent is reached through the API as well. With it runs the handler of the power button.
    let guest = service.boot(&service::guest(kernel)?)?;
    assert_eq!(guest.run("uname -r")?.ok()?, kernel.version()?);

    let client = &mut service.client;
    client.pause()?;
    let times = |client: &mut api::Client| -> Result<String> {
        let metrics = client.metrics()?;
        let line = metrics.lines().find(|line| line.starts_with("halyard_vcpu_exits_total{vcpu=\"0\""));
        line.map(str::to_owned).context("exits are counted")
    };
    let before = times(client)?;
    host.run("sleep 1")?.ok()?;
    assert_eq!(times(client)?, before, "a guest that is paused has exits");
    client.resume()?;

    let job = client.shutdown(&api::Shutdown { deadline: Some(api::TimeSpan::from_millis(60000)), force: false })?;
    let ended = service.wait_for("the end of the VM", |event| match event {
        api::EventKind::Phase { phase: api::PhaseName::Stopped, outcome, .. } => Some(outcome.clone()),
        _ => None,
    })?;
    assert_eq!(ended, Some(api::Outcome::PoweredOff));
    assert_eq!(service.client.job(job.id)?.state, api::JobState::Succeeded);
    service.process().kill(15)?;
    assert_eq!(service.process().wait()?, Status::Exited(0));
    Ok(())
}

#[test]
fn story_another_user_in_a_read_only_root_has_disk_and_network_by_descriptors() -> Result<()> {
    let host = &Lent::take()?;
    let (disk, tap) = (image(host, 8)?, host.tap(None)?);
    host.run(format!("ip addr add 10.7.0.1/24 dev {}", tap.name()))?.ok()?;
    let kernel = Kernel::Debian6_12Cloud;
    let words = "console=ttyS0 quiet panic=-1 halyard.shell";
    let arguments = ["run", "--kernel", "/kernel", "--initramfs", "/initramfs", "--cmdline", words, "--memory", "256M"];
    let devices = ["--disk", "fd=3", "--net", "fd=4", "--rng", "--serial", "stdio"];
    let confined = Confined {
        root: host.folder()?,
        helper: env!("CARGO_BIN_EXE_with-descriptors").into(),
        halyard: halyard()?.display().to_string(),
        files: [(kernel.bzimage()?, "kernel"), (images::guest(kernel)?, "initramfs")]
            .map(|(path, name)| (path.display().to_string(), name.into()))
            .into(),
        descriptors: ["--file", &disk, "--tap", tap.name()].map(Into::into).into(),
        arguments: arguments.into_iter().chain(devices).map(Into::into).collect(),
    };
    let mut command = confined.command().into_iter();
    let vm = host.spawn(Cmd::new(command.next().context("a command")?).args(command))?;
    vm.wait_line("HALYARD-GUEST ready")?;
    let status = host.run(format!("cat /proc/{}/status", vm.pid()))?.ok()?;
    for line in ["Uid:\t107\t107\t107\t107", "CapPrm:\t0000000000000000", "Seccomp:\t2", "NoNewPrivs:\t1"] {
        ensure!(status.contains(line), "no {line:?} in\n{status}");
    }

    // The shell shows what it is told, so what it is to say is told in two parts.
    vm.write(
        b"head -c 1048576 /dev/urandom >/file && dd if=/file of=/dev/vda bs=64k seek=16 conv=fsync && \
          sha256sum </file | sed 's/$/ was ''written/'\n",
    )?;
    let line = vm.wait_line(" was written")?;
    let read = host.run(format!("dd if={disk} bs=1M skip=1 count=1 2>/dev/null | sha256sum"))?.ok()?;
    ensure!(line.contains(&read), "{line:?} is to name {read}");
    vm.write(
        b"ip addr add 10.7.0.2/24 dev eth0 && ip link set eth0 up && ping -c 3 -w 30 10.7.0.1 && echo it ''pings\n",
    )?;
    vm.wait_line("it pings")?;
    vm.write(b"poweroff -f\n")?;
    ensure!(vm.wait()? == Status::Exited(0), "{}", vm.last_words());
    Ok(())
}

#[test]
fn story_a_boot_trace_shows_the_way_to_user_space() -> Result<()> {
    let host = &Lent::take()?;
    let path = format!("{}/boot.json", host.folder()?);
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.cpus(2).disk(&format!("path={}", image(host, 8)?));
    // The agent's first words on its port tell of user space.
    let vm = boot(host, &spec.args(["--rng", "--boot-trace", &path]))?;
    ask(&vm, "true")?;
    power_off(&vm)?;
    let report: serde_json::Value = serde_json::from_slice(&host.read_file(&path)?)?;
    let steps = report["milestones"].as_array().context("milestones")?;
    let names: Vec<&str> = steps.iter().filter_map(|step| step["name"].as_str()).collect();
    let once = ["exec", "configuration", "memory", "kernel", "vm", "vcpus", "first-entry", "first-pci-access"];
    let at =
        |name: &str| names.iter().position(|known| *known == name).with_context(|| format!("no {name}: {report:#}"));
    for pair in once.windows(2) {
        ensure!(at(pair[0])? < at(pair[1])?, "{pair:?} in {names:?}");
    }
    ensure!(at("first-pci-access")? < at("driver-ok")? && names.last() == Some(&"user-space"), "{names:?}");
    let times: Vec<u64> = steps.iter().filter_map(|step| step["at_us"].as_u64()).collect();
    ensure!(times.len() == names.len() && times.is_sorted(), "{times:?}");
    let devices = report["devices"].as_array().context("devices")?;
    ensure!(devices.len() == 3 && devices.iter().all(|device| device["driver_ok_us"].is_u64()), "{devices:?}");
    let (all, answered) = (&report["guest"]["hypervisor"]["exits"], &report["guest"]["exits"]);
    ensure!(all.as_u64() > answered.as_u64() && answered.as_u64() > Some(100), "{all} exits, {answered} answered");
    let picture = host.read_file(&path.replace(".json", ".svg"))?;
    ensure!(picture.starts_with(b"<svg"), "no picture");
    Ok(())
}

#[test]
fn story_a_guest_without_its_root_disk_is_told_by_phase_and_symbol() -> Result<()> {
    let host = &Lent::take()?;
    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?.without_agent();
    // Neither the initramfs nor a disk has what comes next: the kernel waits for the disk for ever.
    let spec = spec.words("rdinit=/nowhere root=/dev/vda rootwait").args(["--boot-timeout", "45s"]);
    let vm = host.halyard(&spec)?;
    let status = vm.process().wait_for(Duration::from_secs(100));
    let told = vm.process().error_output();
    let status = status.with_context(|| told.clone())?;
    ensure!(status == Status::Exited(6), "{status}\n{told}");
    for text in ["no user space after 45", "and no program runs", "kallsyms", "«root=»"] {
        ensure!(told.contains(text), "no {text:?} in\n{told}");
    }
    let processor = told.lines().find(|line| line.contains("vCPU 0: ")).context("vCPU 0")?;
    ensure!(processor.contains("+0x"), "no symbol in {processor:?}\n{told}");
    Ok(())
}
