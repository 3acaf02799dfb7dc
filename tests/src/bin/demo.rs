//! What `make demo` shows: a stock Debian kernel boots in a Halyard VM with a disk and a network card, says what it
//! has, and is switched off by its power button. Each step is a line with its time; the guest's own lines stand behind
//! a bar.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use halyard_tests::{Host, HostSpec, Kernel, Status, Vm, VmSpec};

/// SIGTERM, which is the power button.
const POWER_BUTTON: i32 = 15;

/// How long the guest may take to user space.
const BOOT: Duration = Duration::from_secs(120);

fn main() -> ExitCode {
    match demo(Steps(Instant::now())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Prints each step with the seconds since the first.
#[derive(Clone, Copy)]
struct Steps(Instant);

impl Steps {
    fn say(self, what: &str) {
        println!("[{:6.2} s] {what}", self.0.elapsed().as_secs_f64());
    }
}

fn demo(steps: Steps) -> Result<()> {
    steps.say("starting a host: this machine with hardware virtualization, else one in software emulation");
    let host = Host::start(&HostSpec::new())?;
    steps.say("host is up");
    let tap = host.tap(None)?;
    host.run(format!("ip addr add 192.0.2.1/24 dev {}", tap.name()))?.ok()?;
    let disk = format!("{}/disk.img", host.folder()?);
    host.run(format!("truncate -s 1G {disk}"))?.ok()?;
    steps.say(&format!("made a disk of 1 GiB and the tap {}", tap.name()));

    let spec = VmSpec::guest(Kernel::Debian6_12Cloud)?
        .cpus(2)
        .memory("1G")
        .serial(Some("off"))
        .cmdline("console=hvc0 panic=-1")
        .disk(&format!("path={disk}"))
        .network(tap.name(), "52:54:00:12:34:56")
        .args(["--console", "stdio", "--rng"]);
    let vm = host.halyard(&spec)?;
    steps.say("started halyard: 2 vCPUs, 1 GiB, Debian's 6.12 cloud kernel, console hvc0, a disk, a network card");
    let (ready, is_ready) = mpsc::channel();
    thread::scope(|scope| {
        let copying = scope.spawn(|| {
            let mut guest = Guest { line: Vec::new(), ready };
            vm.process().copy_to(&mut guest, &mut io::stderr())
        });
        let visited = visit(steps, &vm, &is_ready);
        if visited.is_err() {
            // Else the copying would wait for a guest that runs on.
            vm.kill(9)?;
        }
        let status = copying.join().map_err(|_| anyhow::anyhow!("copying the guest's output failed"))??;
        visited?;
        ensure!(status == Status::Exited(0), "halyard ended with {status}");
        steps.say("the guest has powered itself off, and halyard ended with code 0");
        Ok(())
    })
}

/// Uses the guest a little, as somebody who has logged in would.
fn visit(steps: Steps, vm: &Vm, ready: &Receiver<()>) -> Result<()> {
    ready.recv_timeout(BOOT).context("the guest did not reach user space")?;
    steps.say("user space is reached");
    let ask = |command: &str| vm.run(command)?.ok().with_context(|| command.to_owned());
    steps.say(&format!("guest$ uname -a: {}", ask("uname -a")?));
    ask("head -c 16777216 /dev/urandom >/f && dd if=/f of=/dev/vda bs=1M conv=fsync 2>/dev/null")?;
    ask("echo 3 >/proc/sys/vm/drop_caches; head -c 16777216 /dev/vda | cmp - /f")?;
    steps.say("16 MiB written to the disk read back the same");
    ask("ip addr add 192.0.2.2/24 dev eth0 && ip link set eth0 up && ping -c 1 -w 20 192.0.2.1")?;
    steps.say("the host answers the guest's ping");
    steps.say("pressing the power button");
    vm.kill(POWER_BUTTON)
}

/// Shows the guest's console line by line, and tells when it says that it is ready.
struct Guest {
    line: Vec<u8>,
    ready: Sender<()>,
}

impl Write for Guest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\r' => {}
                b'\n' => {
                    let line = String::from_utf8_lossy(&self.line).into_owned();
                    println!("           | {line}");
                    if line.contains("HALYARD-GUEST ready") {
                        // Nobody waits any more where the demo has failed already.
                        let _ = self.ready.send(());
                    }
                    self.line.clear();
                }
                byte => self.line.push(*byte),
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}
