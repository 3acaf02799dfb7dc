//! A PC of QEMU's whose firmware, Debian's for plain VMs, and kernel measure into a TPM what they start and are given, and the
//! event log that they write: an independent witness of what the same code extends a trust domain's registers with.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cpio::Archive;
use crate::process::Killed;
use crate::{firmware, images};

/// Longer than any boot in software emulation takes.
const PATIENCE: Duration = Duration::from_secs(300);
const FIRST_LINE: &str = "the log begins";
const LAST_LINE: &str = "the log ends";
/// Where a kernel shows what it and the firmware have measured (Linux, `drivers/char/tpm/eventlog`).
const LOG: &str = "/sys/kernel/security/tpm0/binary_bios_measurements";
/// SHA-384 (TCG Algorithm Registry).
const SHA384: u16 = 0xc;

/// What was measured into a register of a TPM.
#[derive(Debug, PartialEq, Eq)]
pub struct Measured {
    /// The number of the register.
    pub pcr: u32,
    /// The event's type.
    pub kind: u32,
    /// SHA-384.
    pub digest: Vec<u8>,
}

/// A root file system that shows the event log on the serial port and switches off.
///
/// # Errors
/// busybox is not there.
pub fn initramfs() -> Result<Vec<u8>> {
    let busybox = fs::read(images::busybox()?)?;
    let mut archive = Archive::default();
    ["bin", "dev", "sys"].into_iter().for_each(|folder| archive.folder(folder));
    archive.program("bin/busybox", &busybox);
    let script = format!(
        "#!/bin/busybox sh\nuse=/bin/busybox\n$use mount -t sysfs none /sys\n\
         $use mount -t securityfs none /sys/kernel/security\necho {FIRST_LINE}\n$use od -An -v -t x1 {LOG}\n\
         echo {LAST_LINE}\n$use poweroff -f\n"
    );
    archive.program("init", script.as_bytes());
    Ok(archive.finish())
}

/// Boots a kernel that shows its event log, with [`initramfs`] at `initramfs`, by Debian's firmware with the variables in this
/// file, and takes the log. `folder` is for what that needs.
///
/// # Errors
/// It does not boot, or there is no log.
pub fn event_log(folder: &Path, variables: &Path, given: &[(&str, &str)]) -> Result<Vec<Measured>> {
    let (socket, serial) = (folder.join("tpm.sock"), folder.join("serial"));
    let state = folder.join("tpm");
    fs::create_dir(&state)?;
    let mut tpm = Command::new("swtpm");
    tpm.args(["socket", "--tpm2", "--tpmstate", &format!("dir={}", state.display())]);
    tpm.args(["--ctrl", &format!("type=unixio,path={}", socket.display())]);
    let _tpm = Killed(tpm.spawn().context("swtpm")?);
    wait_for("swtpm's socket", || Ok(socket.exists()))?;

    let mut qemu = Command::new("qemu-system-x86_64");
    // Its firmware keeps variables where only system management mode can write. The host's own peculiarities: as the lab's.
    qemu.args(["-machine", "q35,smm=on", "-accel", "tcg", "-cpu", "max,-erms,-fsrm", "-m", "512M"]);
    qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
    qemu.args(["-global", "driver=cfi.pflash01,property=secure,value=on"]);
    let flash = |unit, path: &Path| format!("if=pflash,format=raw,unit={unit},file={}", path.display());
    let code = firmware::file("OVMF_CODE_4M.secboot.fd")?;
    qemu.args(["-drive", &(flash(0, &code) + ",readonly=on"), "-drive", &flash(1, variables)]);
    qemu.args(["-chardev", &format!("socket,id=tpm,path={}", socket.display())]);
    qemu.args(["-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm"]);
    qemu.args(["-serial", &format!("file:{}", serial.display())]);
    qemu.args(given.iter().flat_map(|(name, value)| [*name, *value]));
    let mut qemu = Killed(qemu.stdin(Stdio::null()).spawn().context("qemu-system-x86_64")?);
    let ended = wait_for("QEMU's end", || Ok(qemu.0.try_wait()?.is_some()));
    let said = fs::read(&serial).unwrap_or_default();
    let said = String::from_utf8_lossy(&said);
    ended.with_context(|| format!("the serial port said: {}", tail(&said)))?;
    let begin = said.find(FIRST_LINE).with_context(|| format!("no log: {}", tail(&said)))? + FIRST_LINE.len();
    let end = said[begin..].find(LAST_LINE).context("the log has no end")?;
    let words = said[begin..begin + end].split_whitespace();
    let log = words.map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<u8>, _>>().context("the log")?;
    read(&log).context("the log")
}

/// Waits for what no event tells of.
fn wait_for(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so()? {
        ensure!(Instant::now() < deadline, "{what} did not come in {PATIENCE:?}");
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn tail(text: &str) -> String {
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

/// The events of a log (TCG PC Client Platform Firmware Profile, §10.2).
fn read(log: &[u8]) -> Result<Vec<Measured>> {
    let mut rest = log;
    // The first is of an older form: register, type, a SHA-1, data with the digests that the others have.
    take(&mut rest, 28)?;
    let length = number(&mut rest)?;
    let mut first = take(&mut rest, length)?;
    take(&mut first, 24)?;
    let mut lengths = Vec::new();
    for _ in 0..number(&mut first)? {
        lengths.push((half(&mut first)?, usize::from(half(&mut first)?)));
    }
    let mut events = Vec::new();
    while !rest.is_empty() {
        let (pcr, kind) = (u32::try_from(number(&mut rest)?)?, u32::try_from(number(&mut rest)?)?);
        let mut sha384 = None;
        for _ in 0..number(&mut rest)? {
            let algorithm = half(&mut rest)?;
            let Some((_, length)) = lengths.iter().find(|(other, _)| *other == algorithm) else {
                bail!("a digest of algorithm {algorithm}");
            };
            let digest = take(&mut rest, *length)?;
            if algorithm == SHA384 {
                sha384 = Some(digest.to_vec());
            }
        }
        let length = number(&mut rest)?;
        take(&mut rest, length)?;
        events.push(Measured { pcr, kind, digest: sha384.context("an event without SHA-384")? });
    }
    Ok(events)
}

fn take<'a>(rest: &mut &'a [u8], length: usize) -> Result<&'a [u8]> {
    let (taken, behind) = rest.split_at_checked(length).context("it is cut off")?;
    *rest = behind;
    Ok(taken)
}

fn number(rest: &mut &[u8]) -> Result<usize> {
    let bytes = take(rest, 4)?;
    Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
}

fn half(rest: &mut &[u8]) -> Result<u16> {
    Ok(u16::from_le_bytes(take(rest, 2)?.try_into()?))
}
