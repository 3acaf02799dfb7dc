//! Firmware for trust domains, as `scripts/install` unpacked it, and what the igvm crate makes of it. The reader of the
//! file is another than Halyard's.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use igvm::measurement::generate_tdx_measurement;
use igvm::{IgvmDirectiveHeader, IgvmFile, IgvmPlatformHeader, IgvmRevision};
use igvm_defs::{
    IGVM_TDX_PLATFORM_VERSION, IGVM_VHS_SUPPORTED_PLATFORM, IgvmPageDataFlags, IgvmPageDataType, IgvmPlatformType,
};

use crate::{Host, cache, python};

const PAGE: usize = 4096;
/// The vendor of the variables that hold the keys of secure boot and what it forbids.
pub const SECURITY: &str = "d719b2cb-3d3a-4596-a3bc-dad00e67656f";

/// Debian's firmware for trust domains.
///
/// # Errors
/// It is not there.
pub fn path() -> Result<PathBuf> {
    file("OVMF.inteltdx.ms.fd")
}

/// A file of firmware, or of what firmware starts.
///
/// # Errors
/// It is not there.
pub fn file(name: &str) -> Result<PathBuf> {
    let path = cache::folder()?.join("firmware").join(name);
    ensure!(path.exists(), "{} is not there: scripts/install unpacks it", path.display());
    Ok(path)
}

/// Makes a file of firmware, or of its variables, whose secure boot has another key, or the digest of an executable: with the
/// tool that its users have, as in `&["--distro-keys", "debian"]`.
///
/// # Errors
/// It cannot be made.
pub fn enroll(file: &Path, made: &Path, what: &[&str]) -> Result<()> {
    let output = python::program("virt-fw-vars")?.arg("-i").arg(file).arg("-o").arg(made).args(what).output()?;
    ensure!(output.status.success(), "virt-fw-vars: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Has osslsigncode, another reader of signed EFI executables, make something of one.
///
/// # Errors
/// It cannot.
pub fn osslsigncode(what: &[&str], file: &Path, made: &Path) -> Result<()> {
    let output = Command::new("osslsigncode").args(what).arg("-in").arg(file).arg("-out").arg(made).output()?;
    ensure!(output.status.success(), "osslsigncode: {}", String::from_utf8_lossy(&output.stdout));
    Ok(())
}

/// What gives firmware the key by which Debian signs its kernels.
pub const DEBIANS_KEY: [&str; 2] = ["--distro-keys", "debian"];

/// Where the TDVF descriptor begins in a firmware file.
///
/// # Errors
/// There is none.
pub fn descriptor(file: &[u8]) -> Result<usize> {
    // The signature, and 8 bytes behind it version 1.
    let begins = |at: &usize| {
        let rest = file.get(*at..).unwrap_or_default();
        rest.starts_with(b"TDVF") && rest.get(8..12) == Some(&[1, 0, 0, 0])
    };
    (0..file.len()).rev().find(begins).context("the firmware has no TDVF descriptor")
}

/// A page that is added to a trust domain.
pub struct Page {
    /// Where it lies.
    pub address: u64,
    /// What it holds.
    pub contents: Vec<u8>,
    /// That is measured, too.
    pub measured: bool,
}

/// All pages that a firmware says are to be added, in its order.
///
/// # Errors
/// The file is not as it should be.
pub fn pages(file: &[u8]) -> Result<Vec<Page>> {
    let descriptor = descriptor(file)?;
    let count = word(file, descriptor + 12)?;
    let mut pages = Vec::new();
    for at in (descriptor + 16..).step_by(32).take(usize::try_from(count)?) {
        let (start, len) = (usize::try_from(word(file, at)?)?, usize::try_from(word(file, at + 4)?)?);
        let address = u64::from(word(file, at + 8)?) | u64::from(word(file, at + 12)?) << 32;
        let mut contents = file.get(start..start + len).context("a section's contents")?.to_vec();
        contents.resize(usize::try_from(word(file, at + 16)?)?, 0);
        let measured = word(file, at + 28)? & 1 != 0;
        pages.extend((0..).zip(contents.chunks(PAGE)).map(|(number, page)| Page {
            address: address + number * PAGE as u64,
            contents: page.to_vec(),
            measured,
        }));
    }
    Ok(pages)
}

fn word(file: &[u8], at: usize) -> Result<u32> {
    let bytes = file.get(at..).and_then(|rest| rest.first_chunk()).context("a field of the TDVF descriptor")?;
    Ok(u32::from_le_bytes(*bytes))
}

/// A firmware's pages as an IGVM file has them.
///
/// # Errors
/// The file is not as it should be.
pub fn directives(file: &[u8]) -> Result<Vec<IgvmDirectiveHeader>> {
    Ok(pages(file)?
        .into_iter()
        .map(|page| IgvmDirectiveHeader::PageData {
            gpa: page.address,
            compatibility_mask: 1,
            flags: IgvmPageDataFlags::new().with_unmeasured(!page.measured),
            data_type: IgvmPageDataType::NORMAL,
            data: page.contents,
        })
        .collect())
}

/// An IGVM file for a platform.
///
/// # Errors
/// The igvm crate does not take it.
pub fn igvm(platform: IgvmPlatformType, directives: Vec<IgvmDirectiveHeader>) -> Result<Vec<u8>> {
    let platform = IgvmPlatformHeader::SupportedPlatform(IGVM_VHS_SUPPORTED_PLATFORM {
        compatibility_mask: 1,
        highest_vtl: 0,
        platform_type: platform,
        platform_version: IGVM_TDX_PLATFORM_VERSION,
        shared_gpa_boundary: 0,
    });
    let mut bytes = Vec::new();
    IgvmFile::new(IgvmRevision::V1, vec![platform], Vec::new(), directives)?.serialize(&mut bytes)?;
    Ok(bytes)
}

/// MRTD as the igvm crate computes it, in hexadecimal digits.
///
/// # Errors
/// The file is not as it should be.
pub fn mrtd_by_igvm(file: &[u8]) -> Result<String> {
    let pages = directives(file)?;
    let digest = generate_tdx_measurement(&pages, 1)?;
    Ok(digest.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// What the firmware ticks with, 100 times a second, does so once in 1000 s, which no boot takes and it does not miss: a host in
/// QEMU's software emulation ends when an interrupt comes while a guest is in the handler of another and writes the register
/// CR8 there, as this firmware's handlers do and Linux's do not (`tcg_handle_interrupt: assertion failed: (bql_locked())`,
/// QEMU 10.0). Only periodic timers of local APICs are slower by this, which Linux does not use.
const SLOW_TICKS: &str = "echo 1000000000 > /sys/module/kvm/parameters/min_timer_period_us";

/// Has a host's guests live with few ticks of local APICs' periodic timers, so that firmware can run there.
///
/// # Errors
/// The host does not do it.
pub fn slow_ticks(host: &Host) -> Result<()> {
    host.run(SLOW_TICKS)?.ok().map(drop)
}

/// What is measured in front of a variable's data: its vendor, the lengths of name and data, the name.
///
/// # Errors
/// The vendor is no GUID.
pub fn variable_head(name: &str, vendor: &str, data: usize) -> Result<Vec<u8>> {
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
