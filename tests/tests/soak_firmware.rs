//! Long stories of firmware: Debian's for trust domains, which runs in a plain VM, too, boots a stock kernel.

use anyhow::{Result, ensure};
use halyard_tests::story::{ask, boot, power_off};
use halyard_tests::{Host, HostSpec, Kernel, VmSpec, firmware};

/// What the firmware ticks with, 100 times a second, becomes slower than that: a host in QEMU's software emulation ends when
/// an interrupt comes while a guest is in the handler of another and writes the register CR8 there, as this firmware's
/// handlers do and Linux's do not (`tcg_handle_interrupt: assertion failed: (bql_locked())`, QEMU 10.0). Only periodic
/// timers of local APICs are slower by this, which Linux does not use.
const SLOW_TICKS: &str = "echo 1000000 > /sys/module/kvm/parameters/min_timer_period_us";

#[test]
fn soak_debians_firmware_boots_a_stock_kernel_and_switches_the_machine_off() -> Result<()> {
    let host = Host::start(&HostSpec::new())?;
    host.run(SLOW_TICKS)?.ok()?;
    let file = firmware::path()?.display().to_string();
    for kernel in [Kernel::Debian6_12Cloud, Kernel::Debian6_1Cloud] {
        let spec = VmSpec::guest(kernel)?.memory("1G").cpus(2).args(["--firmware", &file]);
        let vm = boot(&host, &spec)?;
        assert_eq!(ask(&vm, "uname -r")?, kernel.version()?);
        assert_eq!(ask(&vm, "nproc")?, "2");
        // It was the firmware that started the kernel, and it found our tables.
        assert_eq!(ask(&vm, "test -d /sys/firmware/efi && echo yes")?, "yes");
        ensure!(ask(&vm, "dmesg")?.contains("HALYRD"), "the tables are the firmware's own");
        power_off(&vm)?;
    }
    Ok(())
}
