//! `halyard verify`: quotes of real hardware, those of a quote service that signs with its own keys, and what are none.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use halyard_qgs::Registers;
use halyard_tests::quotes::{configure, digits, foretold_registers, quoted};
use halyard_tests::tiny::{Run, run_halyard};
use serde_json::Value;
use tempfile::TempDir;

fn verify(quote: &Path, args: &[&str]) -> Run {
    let words = ["verify".as_ref(), quote.as_os_str()].into_iter();
    run_halyard(words.chain(args.iter().map(AsRef::as_ref)))
}

/// What is said of a quote, as JSON.
fn said(quote: &Path, args: &[&str], code: i32) -> Value {
    let run = verify(quote, &[args, &["--json"]].concat()).expect_code(code);
    serde_json::from_slice(&run.stdout).unwrap()
}

fn field<'a>(said: &'a Value, name: &str) -> &'a Value {
    let fields = said["fields"].as_array().unwrap();
    fields.iter().find(|field| field["name"] == name).unwrap_or_else(|| panic!("no {name} in {said}"))
}

/// The folder of real quotes that the crate dcap-qvl ships, each with collateral of its day.
fn samples() -> PathBuf {
    let run = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--offline", "--filter-platform", "x86_64-unknown-linux-gnu"])
        .arg("--manifest-path")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.toml"))
        .output()
        .unwrap();
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    let metadata: Value = serde_json::from_slice(&run.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    let package = packages.iter().find(|package| package["name"] == "dcap-qvl").unwrap();
    Path::new(package["manifest_path"].as_str().unwrap()).with_file_name("sample")
}

#[test]
fn quotes_of_real_hardware_are_read_and_their_signatures_checked() {
    let folder = TempDir::new().unwrap();
    // Days on which the collateral of each was valid. The second's platform is one that the collateral knows nothing of.
    for (name, version, day) in [("tdx_quote", 4, "1750400000"), ("tdx_quote_td15ex", 5, "1791500000")] {
        let quote = samples().join(name);
        let collateral = samples().join(format!("{name}_collateral.json"));
        let collateral = collateral.to_str().unwrap();
        let report = said(&quote, &["--collateral", collateral, "--at", day], 0);
        assert_eq!(report["signature"]["valid"]["status"], "UpToDate", "{report}");
        assert_eq!((&report["verified"], &report["matches"]), (&Value::Bool(true), &Value::Bool(true)));
        let bytes = fs::read(&quote).unwrap();
        assert_eq!(u16::from_le_bytes([bytes[0], bytes[1]]), version);
        // A quote of version 5 has six bytes more in front of its body.
        let mrtd = if version == 4 { 184 } else { 190 };
        assert_eq!(field(&report, "mrtd")["value"], digits(&bytes[mrtd..mrtd + 48]));
        assert_eq!(field(&report, "reportdata")["value"], digits(&bytes[mrtd + 384..mrtd + 448]));

        // That day is over, and a quote is not what a bit makes of it.
        let over = verify(&quote, &["--collateral", collateral]).expect_code(9);
        assert!(over.output().contains("signature INVALID: ") && over.output().contains("xpired"), "{over}");
        let mut flipped = bytes;
        flipped[mrtd] ^= 1;
        let path = folder.path().join(name);
        fs::write(&path, &flipped).unwrap();
        let report = said(&path, &["--collateral", collateral, "--at", day], 9);
        let reason = &report["signature"]["invalid"]["reason"];
        assert_eq!(reason, "ISV enclave report signature is invalid");
        assert_eq!((&report["verified"], &report["matches"]), (&Value::Bool(false), &Value::Bool(true)));
    }
    let run = verify(&samples().join("sgx_quote"), &["--fields-only"]).expect_code(2);
    assert!(run.stderr.contains("it is a quote of an SGX enclave, and of no trust domain"), "{run}");
}

#[test]
fn a_quote_is_that_of_the_trust_domain_which_is_foretold() {
    let folder = TempDir::new().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (config, collateral, root) = (path("vm.yaml"), path("collateral.json"), path("root.pem"));
    let theirs = format!(", owner_config: \"{}\"", digits(&[0x44; 48]));
    configure(Path::new(&config), 0x33, &theirs).unwrap();
    let foretold = run_halyard(["measure", "--json", "--config", &config]).expect_code(0);
    let foretold: Value = serde_json::from_slice(&foretold.stdout).unwrap();
    let mut registers = Registers { data: [0; 64], ..foretold_registers(&foretold) };
    registers.data[..4].copy_from_slice(&[0xde, 0xad, 0xbe, 0xef]);
    let quote = quoted(folder.path(), &registers).unwrap();
    let signed = ["--collateral", &collateral, "--root-ca", &root];
    let wanted = [&signed[..], &["--config", &config, "--report-data", "DEADBEEF"]].concat();

    let report = said(&quote, &wanted, 0);
    assert_eq!(report["verified"], true);
    for (name, value) in [("mrconfigid", 0x22), ("mrowner", 0x33), ("mrownerconfig", 0x44)] {
        assert_eq!(field(&report, name)["expected"], digits(&[value; 48]), "{name}");
    }
    assert_eq!(field(&report, "mrtd")["expected"], foretold["mrtd"]);
    assert_eq!(field(&report, "rtmr2")["expected"], foretold["rtmr"][2]);
    assert_eq!(field(&report, "attributes")["expected"], "0000001000000000");
    assert_eq!(field(&report, "rtmr3").get("expected"), None);
    let run = verify(&quote, &wanted).expect_code(0);
    assert!(run.output().contains(&format!("matches   mrtd {}\n", foretold["mrtd"].as_str().unwrap())), "{run}");
    assert!(run.output().ends_with("signature valid, platform UpToDate\nverified\n"), "{run}");
    verify(&quote, &[&signed[..2], &["--root-ca", &path("root.der")]].concat()).expect_code(0);

    // A trust domain, or a report, that is another one.
    let differs = |args: &[&str], name: &str| {
        let run = verify(&quote, &[&wanted[..6], args].concat()).expect_code(9);
        assert!(run.output().contains(&format!("DIFFERS   {name} ")), "{run}");
        assert_eq!(run.output().contains("halyard measure --event-log"), name.starts_with("rtmr"), "{run}");
        assert!(run.output().ends_with("signature valid, platform UpToDate\nNOT VERIFIED\n"), "{run}");
    };
    differs(&["--report-data", "deadbeee"], "reportdata");
    differs(&["--memory", "1G"], "rtmr0");
    differs(&["--cmdline", "loud"], "rtmr2");
    let other = path("other.fd");
    let mut changed = fs::read(path("firmware.fd")).unwrap();
    changed[0x9_0000] ^= 1;
    fs::write(&other, changed).unwrap();
    differs(&["--firmware", &other], "mrtd");
    let off = theirs.clone() + ", sept_ve_disable: false";
    for (owner, more, name) in [(0x34, &*theirs, "mrowner"), (0x33, "", "mrownerconfig"), (0x33, &off, "attributes")] {
        configure(Path::new(&config), owner, more).unwrap();
        differs(&[], name);
    }
    configure(Path::new(&config), 0x33, &theirs).unwrap();

    // Another root, no look at the signature, and a bit.
    let run = verify(&quote, &["--config", &config, "--collateral", &collateral]).expect_code(9);
    assert!(run.output().contains("signature INVALID: ") && run.output().ends_with("no field differs\n"), "{run}");
    let run = verify(&quote, &["--config", &config, "--fields-only"]).expect_code(0);
    assert!(run.output().contains("signature NOT CHECKED") && run.output().contains("NOT VERIFIED"), "{run}");
    let mut flipped = fs::read(&quote).unwrap();
    flipped[700] ^= 0x10;
    fs::write(&quote, flipped).unwrap();
    verify(&quote, &wanted).expect_code(9);
}

#[test]
fn what_cannot_be_used_is_refused_by_its_flag() {
    let folder = TempDir::new().unwrap();
    let quote = quoted(folder.path(), &Registers::default()).unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    for (name, bytes) in
        [("empty", &b""[..]), ("text", b"no quote, no certificate and no collateral"), ("zeros", &[0; 5000])]
    {
        fs::write(path(name), bytes).unwrap();
        let run = verify(Path::new(&path(name)), &["--fields-only"]).expect_code(2);
        assert!(run.stderr.contains(&format!("{}: it is no quote", path(name))), "{run}");
        let run = verify(&quote, &["--collateral", &path(name)]).expect_code(2);
        assert!(run.stderr.contains(&format!("{}: it is not what Intel's service gives", path(name))), "{run}");
    }
    let mut short = fs::read(&quote).unwrap();
    short.truncate(700);
    fs::write(path("short"), short).unwrap();
    verify(Path::new(&path("short")), &["--fields-only"]).expect_code(2);
    fs::write(path("plain.yaml"), "kernel: {path: vmlinuz}\n").unwrap();
    let collateral = path("collateral.json");
    for (args, message) in [
        (&["--fields-only", "--report-data", "abc"][..], "--report-data abc: it must be at most 64 bytes"),
        (&["--fields-only", "--report-data", "zz"], "--report-data zz: "),
        (&["--fields-only", "--report-data", &"0".repeat(130)], ": it must be at most 64 bytes"),
        (&["--fields-only", "--firmware", "/nonexistent"], "/nonexistent: No such file"),
        (&["--fields-only", "--config", "/nonexistent"], "/nonexistent: there is no such file"),
        (&["--fields-only", "--config", &path("plain.yaml")], "no firmware is named"),
        (&["--fields-only", "--config", &path("text")], "text:1:1: fields (`name: value`) must stand here"),
        (&["--collateral", "/dev/zero"], "/dev/zero: it is longer than 2 MiB"),
        (&["--collateral", &collateral, "--root-ca", "/nonexistent"], "/nonexistent: No such file"),
        (&[], "--collateral <FILE>"),
        (&["--collateral", &collateral, "--fields-only"], "cannot be used with"),
    ] {
        let run = verify(&quote, args).expect_code(2);
        assert!(run.stderr.contains(message), "{message}: {run}");
    }
    // What is no certificate leads nowhere.
    verify(&quote, &["--collateral", &collateral, "--root-ca", &path("text")]).expect_code(9);
}
