//! Long stories of firmware: Debian's for trust domains, which runs in a plain VM, too, boots a stock kernel.

use anyhow::{Context, Result, ensure};
use halyard_tests::story::{PATIENCE, ask, boot, power_off};
use halyard_tests::tiny::run_halyard;
use halyard_tests::{Cmd, Host, HostSpec, Kernel, Vm, VmSpec, esp, firmware};
use sha2::{Digest, Sha384};

/// What the firmware ticks with, 100 times a second, does so once in 1000 s, which no boot takes and it does not miss: a host in
/// QEMU's software emulation ends when an interrupt comes while a guest is in the handler of another and writes the register
/// CR8 there, as this firmware's handlers do and Linux's do not (`tcg_handle_interrupt: assertion failed: (bql_locked())`,
/// QEMU 10.0). Only periodic timers of local APICs are slower by this, which Linux does not use.
const SLOW_TICKS: &str = "echo 1000000000 > /sys/module/kvm/parameters/min_timer_period_us";

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
        variables_are_foretold(&vm, kernel, &file)?;
        power_off(&vm)?;
    }
    Ok(())
}

/// No kernel is named: the firmware, which starts only what is signed, finds shim on a disk, shim GRUB, and GRUB the kernel.
#[test]
fn soak_debians_firmware_boots_a_kernel_that_it_finds_on_a_disk() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let kernel = Kernel::Debian6_12Cloud;
    let disk = esp::disk(folder.path(), kernel, "console=ttyS0 quiet panic=-1 from-disk")?;
    let host = Host::start(&HostSpec::new())?;
    host.run(SLOW_TICKS)?.ok()?;
    let file = firmware::path()?.display().to_string();
    let spec = VmSpec::guest(kernel)?.kernel_on_disk().memory("1G").args(["--firmware", &file]);
    let vm = boot(&host, &spec.disk(&format!("path={},readonly=on", disk.display())))?;
    assert_eq!(ask(&vm, "uname -r")?, kernel.version()?);
    ensure!(ask(&vm, "cat /proc/cmdline")?.contains("from-disk"), "the command line is not that of the disk");
    ensure!(ask(&vm, "dmesg")?.contains("secureboot: Secure boot enabled"), "it booted without secure boot");
    power_off(&vm)
}

/// EFI variables that firmware measures into RTMR0: name, vendor, and whether name and vendor are measured, too.
const MEASURED: [(&str, &str, bool); 7] = [
    ("SecureBoot", GLOBAL, true),
    ("PK", GLOBAL, true),
    ("KEK", GLOBAL, true),
    ("db", SECURITY, true),
    ("dbx", SECURITY, true),
    ("BootOrder", GLOBAL, false),
    ("Boot0000", GLOBAL, false),
];
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const SECURITY: &str = "d719b2cb-3d3a-4596-a3bc-dad00e67656f";
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
        let measured = if whole { [head(name, vendor, data.len())?, data].concat() } else { data };
        let digest = hex(&Sha384::digest(measured));
        let event = events.iter().find(|event| event["what"] == name && event["register"] == "rtmr0");
        assert_eq!(event.context(name)?["digest"], digest, "{name}");
    }
    Ok(())
}

/// By which key the firmware starts shim is measured: an entry of its db, with Microsoft's certificate.
#[test]
fn soak_the_key_that_has_signed_shim_is_foretold() -> Result<()> {
    let firmware = firmware::path()?;
    let (file, shim) = (firmware.display().to_string(), esp::shim()?.display().to_string());
    let args = ["measure", "--json", "--events", "--firmware", &file, "--kernel", &shim];
    let report: serde_json::Value = serde_json::from_slice(&run_halyard(args).expect_code(0).stdout)?;
    let keys = report["events"].as_array().context("events")?.iter().filter(|event| event["type"] == "0x800000e0");
    let [key] = keys.collect::<Vec<_>>()[..] else { panic!("{report}") };
    // A list of one certificate: its kind, its length, an empty header, its entry's length.
    let bytes = std::fs::read(&firmware)?;
    let digests = (0..bytes.len() - 28).filter(|at| bytes[*at..].starts_with(&X509)).filter_map(|at| {
        let word = |at: usize| bytes[at..].first_chunk().map(|word| u32::from_le_bytes(*word) as usize);
        let entry = bytes.get(at + 28..at + word(at + 16)?)?;
        let microsofts = entry.windows(SIGNER.len()).any(|window| window == SIGNER);
        let head = head("db", SECURITY, entry.len()).ok()?;
        microsofts.then(|| hex(&Sha384::digest([&head, entry].concat())))
    });
    assert!(digests.collect::<Vec<_>>().contains(&key["digest"].as_str().unwrap_or_default().to_owned()), "{key}");
    Ok(())
}

const X509: [u8; 16] = *b"\xa1\x59\xc0\xa5\xe4\x94\xa7\x4a\x87\xb5\xab\x15\x5c\x2b\xf0\x72";
/// Who has signed shim, as osslsigncode tells.
const SIGNER: &[u8] = b"Microsoft Corporation UEFI CA 2011";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is measured in front of a variable's data: its vendor, the lengths of name and data, the name.
fn head(name: &str, vendor: &str, data: usize) -> Result<Vec<u8>> {
    // The first three numbers of a GUID are little-endian.
    let digits = vendor.replace('-', "");
    let byte = |number: usize| u8::from_str_radix(&digits[2 * number..2 * number + 2], 16);
    let order = [3, 2, 1, 0, 5, 4, 7, 6, 8, 9, 10, 11, 12, 13, 14, 15];
    let mut head = order.into_iter().map(byte).collect::<Result<Vec<u8>, _>>()?;
    head.extend_from_slice(&(name.len() as u64).to_le_bytes());
    head.extend_from_slice(&(data as u64).to_le_bytes());
    head.extend(name.encode_utf16().flat_map(u16::to_le_bytes));
    Ok(head)
}
