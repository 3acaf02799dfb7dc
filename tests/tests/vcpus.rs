//! vCPUs that come and go, in the sandbox: of a tiny guest by `halyard ctl`, and of a stock Debian kernel under load.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::{JobState, VmConfig};
use halyard_tests::service::{Service, guest};
use halyard_tests::story::PATIENCE;
use halyard_tests::tiny::{self, Run, Served, binary, run_command};
use halyard_tests::{Client, Cmd, Host, Kernel, Lent, Process, serve};

const MOST: u32 = 8;

fn config(kernel: Kernel, max: u32) -> Result<VmConfig> {
    let mut config = guest(kernel)?;
    config.cpus.max = Some(max);
    // Busy processors of an emulated host's guest are slow out of all proportion.
    config.pci.hotplug_timeout = api::TimeSpan::from_millis(600_000);
    Ok(config)
}

/// What a command in the guest says.
fn ask(guest: &Client, command: &str) -> Result<String> {
    guest.run(Cmd::shell(command).patience(PATIENCE))?.ok().with_context(|| command.to_owned())
}

/// vCPUs as the guest counts them.
fn in_guest(guest: &Client, what: &str) -> Result<String> {
    ask(guest, &format!("cat /sys/devices/system/cpu/{what}"))
}

/// Waits until the guest counts so. It ejects a vCPU, which ends the change, before it strikes it off its own list.
fn wait_in_guest(guest: &Client, what: &str, count: &str) -> Result<()> {
    let now = format!("\"$(cat /sys/devices/system/cpu/{what})\"");
    ask(guest, &format!("until [ {now} = {count} ]; do usleep 10000; done")).map(drop)
}

/// The guest uses all vCPUs that it has: what a rule of udev's does elsewhere.
fn use_all(guest: &Client) -> Result<()> {
    ask(guest, "for one in /sys/devices/system/cpu/cpu*/online; do echo 1 >$one; done").map(drop)
}

/// Work for so many processors that does not end.
fn load(guest: &Client, count: u32) -> Result<Vec<Process>> {
    (0..count).map(|_| guest.spawn("while :; do :; done")).collect()
}

/// Waits until each processor, of which there are so many, is seen at work on a program. One program looks: others would
/// have to wait for their turn beside the load.
fn wait_until_busy(guest: &Client, count: u32) -> Result<()> {
    let look = "while ((getline <\"/proc/stat\") > 0) if ($1 ~ /^cpu[0-9]/) { \
                if (!($1 in at)) at[$1] = $2; if ($2 > at[$1]) busy++ }; close(\"/proc/stat\")";
    let wait =
        format!("do {{ busy = 0; {look}; if (busy < {count}) system(\"usleep 100000\") }} while (busy < {count})");
    ask(guest, &format!("awk 'BEGIN {{ {wait} }}'")).map(drop)
}

/// The numbers of the vCPUs that have a thread.
fn threads(host: &Host, service: &Service) -> Result<String> {
    let pid = service.process().pid();
    let names = format!("cat /proc/{pid}/task/*/comm | sed -n 's,^CPU \\([0-9]*\\)/KVM$,\\1,p' | sort -n");
    Ok(host.run(names)?.ok()?.split_whitespace().collect::<Vec<_>>().join(" "))
}

/// Changes the number of vCPUs and says how long the guest took.
fn resize(service: &mut Service, count: u32) -> Result<()> {
    let began = Instant::now();
    let job = service.client.set_vcpus(count)?;
    service.success_of(job)?;
    println!("{count} vCPUs after {:.2} s", began.elapsed().as_secs_f64());
    let vcpus = service.client.vcpus()?;
    ensure!((vcpus.config.count, vcpus.present) == (count, count), "{vcpus:?}");
    Ok(())
}

/// Nothing in the guest's log or choice says that processors' clocks differ.
fn clocks_agree(guest: &Client, clock: &str) -> Result<()> {
    let log = ask(guest, "dmesg | grep -i -e skew -e unstable -e warp || true")?;
    ensure!(log.is_empty(), "the guest says: {log}");
    let now = ask(guest, "cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    ensure!(now == clock, "the clock was {clock}, and is {now}");
    Ok(())
}

fn ctl(served: &Served, args: &[&str]) -> Run {
    let mut command = Command::new(binary());
    command.env("HALYARD_SOCKET", served.path("api")).arg("ctl").args(args);
    run_command(command)
}

#[test]
fn a_tiny_guest_is_given_vcpus_and_gives_them_back() {
    let served = serve!();
    let mut config = tiny::config("plug");
    config.cpus.max = Some(4);
    let path = served.path("vm.yaml");
    fs::write(&path, api::to_yaml(&config).unwrap()).unwrap();
    ctl(&served, &["create", &path.display().to_string()]).expect_code(0);
    ctl(&served, &["boot"]).expect_code(0);
    let console = served.client().console("serial", false).unwrap();
    console.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut lines = BufReader::new(console).lines().map(Result::unwrap);
    let mut hear = |wanted: &str| assert!(lines.any(|line| line == wanted), "{wanted:?} did not come");
    hear("ready");
    // One that comes alone: nothing but its own making tells KVM of its local APIC.
    ctl(&served, &["vcpus", "2"]).expect_code(0);
    hear("processor 00000001");
    for _ in 0..3 {
        let text = ctl(&served, &["vcpus", "4"]).expect_code(0).output();
        assert!(text.contains("change-vcpus  succeeded  100 %"), "{text}");
        [2, 3].iter().for_each(|number| hear(&format!("processor {number:08x}")));
        let text = ctl(&served, &["vcpus"]).expect_code(0).output();
        assert_eq!(text, "configured  4\npresent     4\nat most     4\n");
        ctl(&served, &["pause"]).expect_code(0);
        ctl(&served, &["resume"]).expect_code(0);
        ctl(&served, &["vcpus", "2"]).expect_code(0);
        [2, 3].iter().for_each(|number| hear(&format!("gave back {number:08x}")));
        assert!(served.client().metrics().unwrap().contains("halyard_vm_vcpus 2\n"));
    }
    let run = ctl(&served, &["vcpus", "5"]).expect_code(2);
    run.expect_messages(&[
        "count: 5 vCPUs are more than there may be in this VM; 1 to 4 are possible; cpus.max says how many",
    ]);
    ctl(&served, &["reset"]).expect_code(0);
    hear("ready");
    let text = ctl(&served, &["vcpus", "1", "--no-wait"]).expect_code(0).output();
    assert!(text.contains("change-vcpus"), "{text}");
    hear("gave back 00000001");
    let events = ctl(&served, &["events", "--after", "0"]).expect_code(0).output();
    assert!(events.contains("vcpus-changed    4 present"), "{events}");
    ctl(&served, &["destroy"]).expect_code(0);
}

#[test]
fn story_vcpus_come_and_go_under_load() -> Result<()> {
    let host = &Lent::take()?;
    let mut service = Service::start(host, &[])?;
    let guest = service.boot(&config(Kernel::Debian6_12Cloud, MOST)?)?;
    let clock = ask(&guest, "cat /sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    let counts = ["possible", "present", "online"].map(|what| in_guest(&guest, what));
    ensure!(
        matches!(&counts, [Ok(possible), Ok(present), Ok(online)] if [possible, present, online] == ["0-7", "0", "0"])
    );
    ensure!(threads(host, &service)? == "0");
    println!("the guest's clock: {clock}");
    let busy = load(&guest, 1)?;

    resize(&mut service, MOST)?;
    use_all(&guest)?;
    ensure!(in_guest(&guest, "online")? == "0-7", "{}", in_guest(&guest, "online")?);
    let more = load(&guest, MOST - 1)?;
    wait_until_busy(&guest, MOST)?;
    ensure!(threads(host, &service)? == "0 1 2 3 4 5 6 7", "{}", threads(host, &service)?);
    let metrics = service.client.metrics()?;
    for line in ["halyard_vm_vcpus 8", "halyard_vcpu_run_seconds_total{vcpu=\"7\"}"] {
        ensure!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    clocks_agree(&guest, &clock)?;

    resize(&mut service, 1)?;
    ensure!(in_guest(&guest, "online")? == "0", "{}", in_guest(&guest, "online")?);
    wait_in_guest(&guest, "present", "0")?;
    ensure!(threads(host, &service)? == "0", "a thread is left: {}", threads(host, &service)?);
    let metrics = service.client.metrics()?;
    ensure!(metrics.contains("halyard_vm_vcpus 1\n") && !metrics.contains("vcpu=\"1\""), "{metrics}");

    // Those that were there before come again, beside the same load.
    resize(&mut service, 3)?;
    use_all(&guest)?;
    wait_until_busy(&guest, 3)?;
    ensure!(in_guest(&guest, "online")? == "0-2");
    clocks_agree(&guest, &clock)?;
    ensure!(busy.iter().chain(&more).all(|process| process.status().is_none()), "the load goes on");
    drop((busy, more, guest));

    service.client.reset()?;
    let guest = service.guest()?;
    ensure!(in_guest(&guest, "online")? == "0-2", "a guest that boots has as many as were agreed");
    ensure!(threads(host, &service)? == "0 1 2");
    resize(&mut service, 1)?;
    ensure!(in_guest(&guest, "online")? == "0");
    // What the guest did unasked is seen, too.
    resize(&mut service, 2)?;
    ask(&guest, "echo 1 >/sys/devices/system/cpu/cpu1/firmware_node/eject")?;
    service
        .wait_for("a vCPU to go", |event| matches!(event, api::EventKind::VcpusChanged { present: 1 }).then_some(()))?;
    ensure!(service.client.jobs()?.iter().all(|job| job.state == JobState::Succeeded));
    service.finish()
}

#[test]
fn story_an_older_kernel_with_room_for_all_that_there_can_be() -> Result<()> {
    let host = &Lent::take()?;
    let mut service = Service::start(host, &[])?;
    let guest = service.boot(&config(Kernel::Debian6_1Cloud, api::MAX_VCPUS)?)?;
    ensure!(in_guest(&guest, "possible")? == "0-253" && in_guest(&guest, "online")? == "0");
    resize(&mut service, 4)?;
    use_all(&guest)?;
    ensure!(in_guest(&guest, "online")? == "0-3", "{}", in_guest(&guest, "online")?);
    resize(&mut service, 1)?;
    wait_in_guest(&guest, "present", "0")?;
    ensure!(threads(host, &service)? == "0");
    service.finish()
}
