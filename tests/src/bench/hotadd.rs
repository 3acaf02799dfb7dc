//! Hot-add of a disk, from the request to the guest's `/dev/vdX`, beside QEMU's `q35` in one host.
//!
//! Both guests boot the same kernel and run at the same time; the rounds alternate. Each round has a hot-plug port of its
//! own, so nothing is removed in between. Linux itself waits 120 ms in each, as the specification wants of it after a link
//! has come up (PCIe 5.0 §6.6.1).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::{DeviceConfig, Disk};

use super::boot::{PATIENCE, Q35, qemu};
use super::{Finding, Series};
use crate::process::Process;
use crate::{Cmd, Forward, Host, HostSpec, Kernel, images, vm};

/// The most that Halyard may take, as a multiple of QEMU.
const LIMIT: f64 = 0.8;
/// Rounds, and hot-plug ports. There are letters for them from vda on.
pub const ROUNDS: usize = 8;

/// A monitor that is asked for disks.
trait Monitor {
    /// Asks for a disk on this file in the next free port.
    fn add(&mut self, number: usize, path: &str) -> Result<()>;
}

struct Halyard(api::Client);

impl Monitor for Halyard {
    fn add(&mut self, number: usize, path: &str) -> Result<()> {
        let job = self.0.put_device(&format!("disk{number}"), &DeviceConfig::Disk(Disk::new(path)))?;
        job.map(drop).context("a job does it")
    }
}

/// QEMU's control socket.
struct Qmp(BufReader<UnixStream>);

impl Qmp {
    fn open(forward: &Forward) -> Result<Self> {
        let mut this = Self(BufReader::new(UnixStream::connect(forward.path())?));
        ensure!(this.0.read_line(&mut String::new())? > 0, "QEMU does not answer");
        this.ask(r#"{"execute": "qmp_capabilities"}"#)?;
        Ok(this)
    }

    fn ask(&mut self, command: &str) -> Result<()> {
        writeln!(self.0.get_mut(), "{command}")?;
        let mut line = String::new();
        while !line.contains("\"return\"") {
            line.clear();
            ensure!(self.0.read_line(&mut line)? > 0, "QEMU has ended");
            ensure!(!line.contains("\"error\""), "{command}: {line}");
        }
        Ok(())
    }
}

impl Monitor for Qmp {
    fn add(&mut self, number: usize, path: &str) -> Result<()> {
        self.ask(&format!(
            r#"{{"execute": "blockdev-add", "arguments": {{"driver": "raw", "node-name": "node{number}", "file": {{"driver": "file", "filename": "{path}"}}}}}}"#
        ))?;
        self.ask(&format!(
            r#"{{"execute": "device_add", "arguments": {{"driver": "virtio-blk-pci", "id": "disk{number}", "drive": "node{number}", "bus": "port{number}"}}}}"#
        ))
    }
}

/// Measures both, in turn. Says each round as it is done.
///
/// # Errors
/// Where the host does not start, or a guest does not get its disk.
pub fn measure() -> Result<Finding> {
    let host = &Host::start(&HostSpec::new().cpus(2).memory_mib(4096))?;
    let (folder, kernel) = (host.folder()?, Kernel::Debian6_12Cloud);
    let (bzimage, initramfs) = (kernel.bzimage()?.display().to_string(), images::guest(kernel)?.display().to_string());
    let words = "console=ttyS0 quiet panic=-1 halyard.shell";
    let (api_socket, qmp_socket) = (format!("{folder}/api"), format!("{folder}/qmp"));

    let own =
        Cmd::new(vm::halyard()?.display().to_string()).args(["run", "--kernel", &bzimage, "--initramfs", &initramfs]);
    let own = own.args(["--cmdline", words, "--memory", "256M", "--serial", "stdio", "--api-socket", &api_socket]);
    let own = host.spawn(own.args(["--hotplug-ports", &ROUNDS.to_string()]))?;
    own.wait_line_for("HALYARD-GUEST ready", PATIENCE)?;

    let files = ["-kernel", &bzimage, "-initrd", &initramfs, "-append", words];
    let control = format!("unix:{qmp_socket},server=on,wait=off");
    let mut other = qemu(Q35, &files).args(["-m", "256", "-qmp", &control]);
    for number in 0..ROUNDS {
        other = other
            .args(["-device".to_owned(), format!("pcie-root-port,id=port{number},chassis={number},slot={number}")]);
    }
    let other = host.spawn(other)?;
    other.wait_line_for("HALYARD-GUEST ready", PATIENCE)?;

    let (to_own, to_other) = (host.forward(&api_socket)?, host.forward(&qmp_socket)?);
    let monitors: [(&str, Process, Box<dyn Monitor>); 2] = [
        ("halyard", own, Box::new(Halyard(api::Client::connect(to_own.path())?))),
        ("qemu q35", other, Box::new(Qmp::open(&to_other)?)),
    ];
    let mut monitors = monitors.map(|(name, process, monitor)| (name, process, monitor, Vec::new()));
    for number in 0..ROUNDS {
        for (name, process, monitor, times) in &mut monitors {
            let path = format!("{folder}/{}-{number}.img", if *name == "halyard" { "own" } else { "other" });
            host.run(format!("truncate -s 16M {path}"))?.ok()?;
            let took = add(process, monitor.as_mut(), number, &path).with_context(|| (*name).to_owned())?;
            eprintln!("  hot-add {} of {ROUNDS}: {name} {:.0} ms", number + 1, took.as_secs_f64() * 1e3);
            times.push(took.as_secs_f64() * 1e3);
        }
    }
    let series = monitors.map(|(name, process, _, times)| process.kill(9).map(|()| Series::new(name, times)));
    let series = series.into_iter().collect::<Result<Vec<_>>>()?;
    let what = format!("Hot-add of a disk, request to /dev/vdX, Debian's {}", kernel.version()?);
    Ok(Finding::ratio(what, "ms", series, LIMIT))
}

/// One round: how long until the guest's program sees the disk.
fn add(process: &Process, monitor: &mut dyn Monitor, number: usize, path: &str) -> Result<Duration> {
    let letter = u8::try_from(number).ok().and_then(|number| b'a'.checked_add(number)).map_or('?', char::from);
    // The shell shows what it is told, so what it is to say is told in two parts.
    let watch =
        format!("echo watch''ing {number}; until [ -b /dev/vd{letter} ]; do usleep 2000; done; echo se''en {number}\n");
    process.write(watch.as_bytes())?;
    process.wait_line_for(&format!("watching {number}"), PATIENCE)?;
    let began = Instant::now();
    monitor.add(number, path)?;
    process.wait_line_for(&format!("seen {number}"), PATIENCE)?;
    Ok(began.elapsed())
}
