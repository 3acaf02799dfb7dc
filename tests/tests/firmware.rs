//! Debian's firmware for trust domains, which runs in a plain VM, too, boots stock kernels.

use anyhow::{Context, Result, ensure};
use halyard_tests::quotes::digits;
use halyard_tests::story::{PATIENCE, ask, boot, power_off};
use halyard_tests::tiny::run_halyard;
use halyard_tests::{Cmd, Host, HostSpec, Kernel, Vm, VmSpec, firmware};
use sha2::{Digest, Sha384};
use tempfile::TempDir;

#[test]
fn debians_firmware_boots_a_stock_kernel_and_switches_the_machine_off() -> Result<()> {
    let host = Host::start(&HostSpec::new())?;
    firmware::slow_ticks(&host)?;
    let folder = TempDir::new()?;
    let (as_it_is, with_key) = (firmware::path()?, folder.path().join("firmware.fd"));
    firmware::enroll(&as_it_is, &with_key, &firmware::DEBIANS_KEY)?;
    for (kernel, file) in [(Kernel::Debian6_12Cloud, &with_key), (Kernel::Debian6_1Cloud, &as_it_is)] {
        let trusted = *file == with_key;
        let file = file.display().to_string();
        let spec = VmSpec::guest(kernel)?.memory("1G").cpus(2).args(["--firmware", &file]);
        let vm = boot(&host, &spec)?;
        assert_eq!(ask(&vm, "uname -r")?, kernel.version()?);
        assert_eq!(ask(&vm, "nproc")?, "2");
        // It was the firmware that started the kernel, and it found our tables.
        assert_eq!(ask(&vm, "test -d /sys/firmware/efi && echo yes")?, "yes");
        ensure!(ask(&vm, "dmesg")?.contains("HALYRD"), "the tables are the firmware's own");
        // A kernel that it trusts it starts as an EFI executable, whose words name the initramfs, others by an older way. The
        // kernel knows that secure boot is on.
        assert_eq!(ask(&vm, "cat /proc/cmdline")?.starts_with("initrd=initrd "), trusted);
        ensure!(ask(&vm, "dmesg")?.contains("Secure boot enabled"), "secure boot is off");
        if trusted {
            variables_are_foretold(&vm, kernel, &file)?;
        }
        power_off(&vm)?;
    }
    Ok(())
}

/// EFI variables that firmware measures into RTMR0: name, vendor, and whether name and vendor are measured, too.
const MEASURED: [(&str, &str, bool); 7] = [
    ("SecureBoot", GLOBAL, true),
    ("PK", GLOBAL, true),
    ("KEK", GLOBAL, true),
    ("db", firmware::SECURITY, true),
    ("dbx", firmware::SECURITY, true),
    ("BootOrder", GLOBAL, false),
    ("Boot0000", GLOBAL, false),
];
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
/// Where Linux shows them: four bytes of attributes in front of each.
const VARIABLES: &str = "/sys/firmware/efi/efivars";
const ATTRIBUTES: usize = 4;

/// The variables of the firmware that runs are those that `halyard measure` reads out of its file, or says that it makes, and
/// there is nothing else to boot, and there are no SMBIOS tables, which it would measure, too.
fn variables_are_foretold(vm: &Vm, kernel: Kernel, file: &str) -> Result<()> {
    for (name, module) in kernel.modules()?.with_needs(&["efivarfs"])? {
        let load = format!("cat >/tmp/{name} && insmod /tmp/{name}");
        vm.run(Cmd::shell(load).input(module).patience(PATIENCE))?.ok()?;
    }
    ask(vm, &format!("mount -t efivarfs none {VARIABLES}"))?;
    assert_eq!(ask(vm, &format!("cd {VARIABLES} && echo Boot0*"))?, format!("Boot0000-{GLOBAL}"));
    assert_eq!(ask(vm, "test -e /sys/firmware/dmi/tables || echo none")?, "none");
    let kernel = kernel.bzimage()?.display().to_string();
    let args = ["measure", "--json", "--events", "--memory", "1G", "--firmware", file, "--kernel", &kernel];
    let report: serde_json::Value = serde_json::from_slice(&run_halyard(args).expect_code(0).stdout)?;
    let events = report["events"].as_array().context("events")?;
    for (name, vendor, whole) in MEASURED {
        let words = ask(vm, &format!("od -An -v -t x1 {VARIABLES}/{name}-{vendor}"))?;
        let bytes = words.split_whitespace().map(|byte| u8::from_str_radix(byte, 16));
        let data = bytes.skip(ATTRIBUTES).collect::<Result<Vec<u8>, _>>()?;
        let measured = if whole { [firmware::variable_head(name, vendor, data.len())?, data].concat() } else { data };
        let digest = digits(&Sha384::digest(measured));
        let event = events.iter().find(|event| event["what"] == name && event["register"] == "rtmr0");
        assert_eq!(event.context(name)?["digest"], digest, "{name}");
    }
    Ok(())
}
