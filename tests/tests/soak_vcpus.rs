//! A long story, for `make soak`: vCPUs that come and go in a row, under stress-ng.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use halyard_tests::loads::{self, Load};
use halyard_tests::service::{Service, guest};
use halyard_tests::{Cmd, Kernel, Lent};

/// How often all vCPUs come and go, unless SOAK_VCPU_ROUNDS says.
const ROUNDS: usize = 100;
/// After how many of them the monitor's heap has settled, and by how many KiB it may have grown at the end.
const SETTLED: usize = 3;
const GROWTH: f64 = 128.0;
/// The most vCPUs.
const MOST: u32 = 8;
/// One worker for each processor that may come, and two that start and wake processes.
const LOAD: &str = "--cpu 8 --fork 1 --switch 1";
/// How long anything of the story may take.
const PATIENCE: Duration = Duration::from_secs(600);

#[test]
fn soak_vcpus_come_and_go_under_load() -> Result<()> {
    let rounds =
        std::env::var("SOAK_VCPU_ROUNDS").map_or(Ok(ROUNDS), |text| text.parse().context("SOAK_VCPU_ROUNDS"))?;
    let began = Instant::now();
    let host = &Lent::take()?;
    let mut service = Service::start(host, &[])?;
    let mut config = guest(Kernel::Debian6_12Cloud)?;
    config.cpus.max = Some(MOST);
    config.pci.hotplug_timeout = api::TimeSpan::from_millis(600_000);
    Load::StressNg.give(host, &mut config)?;
    let guest = service.boot(&config)?;
    let ask = |command: &str| guest.run(Cmd::shell(command).patience(PATIENCE))?.ok().context(command.to_owned());
    let load = guest.spawn(loads::stress_ng(LOAD))?;
    load.wait_line_for("dispatching hogs", PATIENCE)?;
    let mut settled = None;
    for round in 0..rounds {
        for count in [MOST, 1] {
            let job = service.client.set_vcpus(count)?;
            service.success_of(job).with_context(|| format!("{count} vCPUs in round {round}"))?;
            let online = "for one in /sys/devices/system/cpu/cpu*/online; do echo 1 >$one; done";
            ask(&format!("[ {count} = 1 ] || {online}"))?;
            let online = ask("cat /sys/devices/system/cpu/online")?;
            ensure!(online == if count == 1 { "0" } else { "0-7" }, "{online} of {count} in round {round}");
        }
        println!("round {round}: {:.0} s", began.elapsed().as_secs_f64());
        if round + 1 == SETTLED {
            settled = Some(service.census(host)?);
        }
    }
    let (settled, last) = (settled.context("too few rounds to tell")?, service.census(host)?);
    last.check_since(&settled, GROWTH)?;
    ensure!(load.status().is_none(), "the load goes on: {}", load.last_words());
    service.finish()?;
    println!(
        "soak: vcpus      {rounds} times from 1 to {MOST} vCPUs and back; descriptors and threads as before, private \
         memory {} KiB after {SETTLED} rounds, then {} KiB; {:.0} s",
        settled.memory,
        last.memory,
        began.elapsed().as_secs_f64()
    );
    Ok(())
}
