//! Quotes of a platform that is played, and what they are checked with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use halyard_qgs::{Platform, Registers, Service, ask};
use serde_json::Value;

use crate::kernels::Kernel;
use crate::{cache, firmware};

/// Bytes as hexadecimal digits.
pub fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes of hexadecimal digits, as long as there are enough.
pub fn bytes(digits: &str) -> Vec<u8> {
    let pairs = (0..digits.len() / 2).filter_map(|at| digits.get(2 * at..2 * at + 2));
    pairs.map_while(|pair| u8::from_str_radix(pair, 16).ok()).collect()
}

/// Writes the configuration of a trust domain with this owner, and more of it, and beside it its firmware, firmware.fd, which
/// starts Debian's kernels.
///
/// # Errors
/// Firmware or kernel are missing, or the file cannot be written.
pub fn configure(path: &Path, owner: u8, more: &str) -> Result<()> {
    let made = path.with_file_name("firmware.fd");
    firmware::enroll(&firmware::path()?, &made, &firmware::DEBIANS_KEY)?;
    let text = format!(
        "firmware: {{path: {}}}\nkernel: {{path: {}, cmdline: quiet}}\nmemory: {{size: 2G}}\n\
         confidential: {{kind: tdx, config_id: \"{}\", owner: \"{}\"{more}}}\n",
        made.display(),
        Kernel::Debian6_12Cloud.bzimage()?.display(),
        digits(&[0x22; 48]),
        digits(&[owner; 48]),
    );
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// The registers of the trust domain that `halyard measure --json` foretells.
pub fn foretold_registers(foretold: &Value) -> Registers {
    let mut registers = Registers::default();
    let places = [&foretold["mrtd"], &foretold["rtmr"][0], &foretold["rtmr"][1], &foretold["rtmr"][2]];
    for (place, value) in [0, 4, 5, 6].into_iter().zip(places) {
        let value = bytes(value.as_str().unwrap_or_default());
        registers.measurements[place].copy_from_slice(&value);
    }
    registers
}

/// A quote of a trust domain with these registers, and beside it root.pem, root.der and collateral.json, all of a platform
/// made for it.
///
/// # Errors
/// The folder cannot be written, or the quote service does not answer.
pub fn quoted(folder: &Path, registers: &Registers) -> Result<PathBuf> {
    let socket = folder.join("qgs.socket");
    let service = Service::start(Platform::new()?, &socket)?;
    let platform = service.platform();
    let quote = folder.join("quote");
    let report = platform.report(registers);
    fs::write(&quote, ask(&socket, &report)?.context("the service refuses its own platform's report")?)?;
    write_collateral(folder, platform)?;
    Ok(quote)
}

/// Writes root.pem, root.der and collateral.json of a platform.
///
/// # Errors
/// They cannot be written.
pub fn write_collateral(folder: &Path, platform: &Platform) -> Result<()> {
    fs::write(folder.join("root.pem"), platform.root_pem())?;
    fs::write(folder.join("root.der"), platform.root_der())?;
    Ok(fs::write(folder.join("collateral.json"), platform.collateral()?.to_string())?)
}

/// Where Debian's packages of Google's verifier and of the Go compiler are unpacked.
///
/// # Errors
/// They are not there.
pub fn go_tree() -> Result<PathBuf> {
    let tree = cache::folder()?.join("trees/go-tdx-guest");
    ensure!(tree.exists(), "{} is not there: `scripts/install soak` unpacks it", tree.display());
    Ok(tree)
}

/// Builds Google's verifier (tests/qgs/verify.go) into a folder that holds a root.pem.
///
/// # Errors
/// It is not there, or does not compile.
pub fn build_go_verifier(folder: &Path) -> Result<PathBuf> {
    let tree = go_tree()?;
    let sources = tree.join("usr/share/gocode");
    // The package lacks the root certificate that its library is built with, Intel's. The library is told of another one
    // anyway.
    let built_in = sources.join("src/github.com/google/go-tdx-guest/verify/trusted_root.pem");
    let overlay = folder.join("overlay.json");
    let replaced = serde_json::json!({ (built_in.to_string_lossy()): folder.join("root.pem") });
    fs::write(&overlay, serde_json::json!({ "Replace": replaced }).to_string())?;
    let program = folder.join("verify");
    let built = Command::new(tree.join("usr/lib/go/bin/go"))
        .args(["build", "-overlay"])
        .arg(&overlay)
        .arg("-o")
        .arg(&program)
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/qgs/verify.go"))
        .env("GOROOT", tree.join("usr/lib/go"))
        .env("GOPATH", sources)
        .env("GOCACHE", cache::folder()?.join("go"))
        .envs([("GO111MODULE", "off"), ("CGO_ENABLED", "0"), ("GOTOOLCHAIN", "local")])
        .output()?;
    ensure!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    Ok(program)
}
