//! Guest stories of kernels: where they lie in memory, what is done with one that the monitor cannot unpack, and what a
//! reset does to them.

use anyhow::{Context, Result, ensure};
use halyard_tests::kaslr::{LINKED, Place, Room};
use halyard_tests::kernels::Lie;
use halyard_tests::story::{PATIENCE, ask, boot, power_off};
use halyard_tests::{Host, Kernel, Lent, VmSpec};

const KERNEL: Kernel = Kernel::Debian6_12Cloud;
/// What the log says where the guest has to unpack its kernel.
const SLOW: &str = "the kernel unpacks itself, which takes longer: ";

#[test]
fn story_a_kernel_lies_at_random_where_its_own_decompressor_might_have_put_it() -> Result<()> {
    let host = &Lent::take()?;
    let spec = VmSpec::guest(KERNEL)?.memory("1G");
    let room = Room::new(KERNEL, 1 << 30)?;
    let mut places = Vec::new();
    for _ in 0..3 {
        let vm = boot(host, &spec)?;
        let place = Place::of(&vm)?;
        room.check(place)?;
        places.push(place);
        power_off(&vm)?;
        ensure!(!vm.process().error_output().contains(SLOW), "the monitor is to place it");
    }
    // One address of each kind in some 460 for all three guests: a chance of one in 200,000.
    let all_at = |address: fn(&Place) -> u64| places.iter().all(|place| address(place) == address(&places[0]));
    ensure!(!all_at(|place| place.virt) && !all_at(|place| place.physical), "kernels do not move: {places:x?}");

    let vm = boot(host, &spec.words("nokaslr"))?;
    assert_eq!(Place::of(&vm)?, LINKED);
    power_off(&vm)
}

#[test]
fn story_a_kernel_that_cannot_be_unpacked_here_unpacks_itself_and_the_log_says_why() -> Result<()> {
    let host = &Lent::take()?;
    let lies = [
        (Lie::LaterPayload, "its payload says that it unpacks to"),
        (Lie::ShorterPayload, "its payload says that it unpacks to"),
        (
            Lie::HigherAddress,
            "its setup header gives 0x2000000 as its address, and the kernel inside is linked for 0x1000000",
        ),
    ];
    for (lie, reason) in lies {
        let vm = boot(host, &VmSpec::guest(KERNEL)?.kernel_file(&KERNEL.bzimage_with(lie)?))?;
        assert_eq!(ask(&vm, "uname -r")?, KERNEL.version()?);
        power_off(&vm)?;
        let log = vm.process().error_output();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains(SLOW)).collect();
        ensure!(lines.len() == 1 && lines[0].contains(reason), "{lie:?}: {log}");
        ensure!(!log.contains("WARN") && !log.contains("ERROR"), "{lie:?}: {log}");
    }
    Ok(())
}

/// Has a guest reset itself, and tells where its kernel lay before and after, and what the log says.
fn reset(host: &Host, spec: &VmSpec) -> Result<([Place; 2], String)> {
    let mut vm = boot(host, spec)?;
    let status = host.run(format!("cat /proc/{}/status", vm.pid()))?.ok()?;
    ensure!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "no sandbox: {status}");
    let before = Place::of(&vm)?;
    let last = vm.spawn("reboot -f");
    vm.process().wait_line_for("HALYARD-GUEST ready", PATIENCE).context("the guest must come up again")?;
    drop(last);
    vm.forget_agent();
    let after = Place::of(&vm)?;
    power_off(&vm)?;
    Ok(([before, after], vm.process().error_output()))
}

#[test]
fn story_a_bzimage_resets_itself_under_the_sandbox_with_a_cold_cache_and_a_warm_one() -> Result<()> {
    let host = &Lent::take()?;
    let cache = format!("{}/kernels", host.folder()?);
    let spec = VmSpec::guest(KERNEL)?.args(["--kernel-cache", &cache, "--log-level", "debug"]);
    let room = Room::new(KERNEL, 256 << 20)?;
    let (mut all, mut entries) = (Vec::new(), Vec::new());
    for (round, kept) in [("cold", 1), ("warm", 0)] {
        let (places, log) = reset(host, &spec).context(round)?;
        places.iter().try_for_each(|place| room.check(*place))?;
        all.extend(places);
        assert_eq!(log.matches("kept the unpacked kernel as").count(), kept, "{round}: {log}");
        for word in [SLOW, "WARN", "ERROR"] {
            ensure!(!log.contains(word), "{round}: {log}");
        }
        entries.push(host.run(format!("cd {cache} && stat -c '%i %s' kernel-* && ls -A | wc -l"))?.ok()?);
    }
    assert_eq!(entries[0], entries[1], "the entry of the first run is that of the second");
    // Of some 460 times 90 places, both have the same with a chance of one in 40,000; twice that happens to nobody.
    ensure!(all[0] != all[1] || all[2] != all[3], "a reset does not move the kernel: {all:x?}");
    Ok(())
}
