//! The agent's executable: started in a lab host, in a guest, or beside the harness.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use halyard_tests::agent::serve;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{SetArg, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::Pid;

const USAGE: &str = "usage: agent socket FOLDER              serve the socket on standard input
       agent lab                        serve the lab's port, and keep KVM in use
       agent guest                      serve the guest's port, and act on the power button
       agent first [marker]             as a guest's first program: say so, then wait for a key and print the kernel's log
       agent guard FOLDER PROGRAM ARG…  run a program, and kill it when standard input ends
FOLDER is removed at the end.";

/// Name of the virtio-console port that leads to the harness.
const PORT: &str = "org.halyard.agent";
/// Word of the kernel's command line that names the device of a port without a name.
const WORD: &str = "halyard.agent=";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments.as_slice() {
        ["socket", folder] => remove_after(folder, || socket().map(|()| ExitCode::SUCCESS)),
        ["lab"] => lab().map(|()| ExitCode::SUCCESS),
        ["guest"] => guest().map(|()| ExitCode::SUCCESS),
        ["first"] => first().map(|()| ExitCode::SUCCESS),
        ["first", "marker"] => {
            mark_boot();
            first().map(|()| ExitCode::SUCCESS)
        }
        ["guard", folder, program, arguments @ ..] => remove_after(folder, || guard(program, arguments)),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    result.unwrap_or_else(|error| {
        eprintln!("agent: {error:#}");
        ExitCode::FAILURE
    })
}

/// Does something, then removes the harness's folder: the harness may be dead by then.
fn remove_after(folder: &str, act: impl FnOnce() -> Result<ExitCode>) -> Result<ExitCode> {
    let result = act();
    fs::remove_dir_all(folder).with_context(|| folder.to_owned())?;
    result
}

/// Serves the socket that is standard input.
fn socket() -> Result<()> {
    let stdin = io::stdin().as_fd().try_clone_to_owned().context("standard input")?;
    let reader = File::from(stdin);
    let writer = reader.try_clone().context("standard input")?;
    serve(reader, writer).context("the harness's socket")
}

/// Serves a lab host's port until the harness is gone.
fn lab() -> Result<()> {
    // Said in the console's log only: a host without KVM can still run commands.
    let held = hold_kvm().inspect_err(|error| eprintln!("agent: KVM is not held: {error:#}"));
    let (reader, writer) = open_port(&find_port()?.context("no port of the name org.halyard.agent")?)?;
    serve(reader, writer).context("the harness's port")?;
    drop(held);
    Ok(())
}

/// Creates two virtual machines that never run, one with an interrupt controller and one without.
///
/// KVM turns code of its own on and off (static branches) when the first machine of a kind comes and the last goes.
/// Software emulation with several processors does not survive code that is patched while another processor runs it
/// ("Oops: int3"); with these two held, nothing is ever the first or the last.
fn hold_kvm() -> Result<Vec<(VmFd, VcpuFd)>> {
    let kvm = Kvm::new().context("/dev/kvm")?;
    let mut held = Vec::new();
    for interrupt_controller in [true, false] {
        let vm = kvm.create_vm().context("creating a virtual machine")?;
        if interrupt_controller {
            vm.create_irq_chip().context("creating its interrupt controller")?;
        }
        let vcpu = vm.create_vcpu(0).context("creating its processor")?;
        held.push((vm, vcpu));
    }
    Ok(held)
}

/// Serves a guest's port for ever, one session after the other; the power button powers off.
fn guest() -> Result<()> {
    thread::spawn(|| {
        if let Err(error) = watch_power_button() {
            eprintln!("agent: the power button is not watched: {error:#}");
        }
    });
    // The driver learns of its ports one message after the other; a port may also come later.
    let port = loop {
        match find_port()? {
            Some(port) => break port,
            None => thread::sleep(Duration::from_millis(20)),
        }
    };
    loop {
        let (reader, writer) = open_port(&port)?;
        // The end of a session: no harness is at the other end, and the next may come.
        if let Err(error) = serve(reader, writer) {
            eprintln!("agent: {}: {error}", port.display());
        }
        thread::sleep(Duration::from_millis(20));
    }
}

/// What a guest's first program does whose boot is measured: it says so on the console, then how long its kernel took,
/// and leaves the guest alone until it is sent a byte. Then it prints the kernel's log and ends, and the guest with it.
fn first() -> Result<()> {
    let cycles = time_stamp();
    println!("HALYARD-GUEST first words");
    println!("HALYARD-GUEST {:.6} s of the kernel's own", kernel_seconds(cycles, &kernel_log()?)?);
    io::stdin().read_exact(&mut [0]).context("standard input")?;
    io::stdout().write_all(&kernel_log()?).context("standard output")?;
    println!("\nHALYARD-GUEST last words");
    Ok(())
}

/// Seconds from the start of the kernel's clock to a reading of the time stamp counter, by the kernel's log.
///
/// The kernel's own clocks would say less: until it has found a better one it counts ticks, and in an emulated host it
/// loses many of them while interrupts are off. KVM's clock and the counter, which begin with the machine, lose none.
fn kernel_seconds(cycles: u64, log: &[u8]) -> Result<f64> {
    let log = String::from_utf8_lossy(log);
    let number = |before: &str, after: &str| -> Result<f64> {
        let (_, behind) = log.split_once(before).with_context(|| format!("no {before:?} in the kernel's log"))?;
        let text = behind.split_once(after).map_or(behind, |(text, _)| text);
        text.parse().with_context(|| format!("the number behind {before:?} in the kernel's log"))
    };
    let megahertz = number("tsc: Detected ", " MHz")?;
    // In nanoseconds, whatever the line says.
    let started = number("kvm-clock: using sched offset of ", " cycles")?;
    #[expect(clippy::cast_precision_loss, reason = "microseconds are told, and 2^52 cycles are weeks")]
    let cycles = cycles as f64;
    Ok(cycles / megahertz / 1e6 - started / 1e9)
}

/// The time stamp counter, which KVM starts at 0 with the machine.
#[expect(unsafe_code, reason = "the counter is read by an instruction of its own")]
fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Writes to the port at which Halyard learns of user space. Not for QEMU's machines in an emulated host: they get a
/// protection fault there, since that host's processor wants a task state segment that is marked as not busy.
#[expect(unsafe_code, reason = "ports are reached by instructions of their own, once the kernel lets this process")]
fn mark_boot() {
    const MARKER: u16 = 0x508;
    // SAFETY: plain numbers; it lets this process use one port that no real device has.
    let refused = unsafe { nix::libc::ioperm(MARKER.into(), 1, 1) };
    if refused == 0 {
        // SAFETY: the process may use the port, and the instruction touches neither memory nor flags.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") MARKER, in("al") 1_u8, options(nomem, nostack, preserves_flags))
        };
    }
}

/// The kernel's log so far.
#[expect(unsafe_code, reason = "klogctl takes a raw buffer")]
fn kernel_log() -> Result<Vec<u8>> {
    const READ_ALL: i32 = 3; // SYSLOG_ACTION_READ_ALL of syslog(2)
    let mut log = vec![0; 256 << 10];
    // SAFETY: the buffer is as long as is said.
    let length = unsafe { nix::libc::klogctl(READ_ALL, log.as_mut_ptr().cast(), i32::try_from(log.len())?) };
    log.truncate(usize::try_from(length).context("reading the kernel's log")?);
    Ok(log)
}

/// The device that leads to the harness, if there is one.
fn find_port() -> Result<Option<PathBuf>> {
    let words = fs::read_to_string("/proc/cmdline").context("/proc/cmdline")?;
    if let Some(path) = words.split_whitespace().find_map(|word| word.strip_prefix(WORD)) {
        return Ok(Some(PathBuf::from(path)));
    }
    let Ok(entries) = fs::read_dir("/sys/class/virtio-ports") else { return Ok(None) };
    let mut names: Vec<String> = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    // vport0p2 before vport0p10: by length, then by letters.
    names.sort_by_key(|name| (name.len(), name.clone()));
    let mut consoles = 0;
    for name in names {
        let device = Path::new("/dev").join(&name);
        // The driver keeps a console's port to itself; it is reached as a terminal, numbered as they were found.
        let console = matches!(File::open(&device), Err(error) if error.raw_os_error() == Some(nix::libc::ENXIO));
        let called = fs::read_to_string(format!("/sys/class/virtio-ports/{name}/name")).unwrap_or_default();
        if called.trim_end() == PORT {
            return Ok(Some(if console { PathBuf::from(format!("/dev/hvc{consoles}")) } else { device }));
        }
        consoles += usize::from(console);
    }
    Ok(None)
}

/// Opens a port for reading and for writing, a terminal without any of a terminal's habits.
fn open_port(path: &Path) -> Result<(File, File)> {
    let port = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_NOCTTY)
        .open(path)
        .with_context(|| path.display().to_string())?;
    if let Ok(mut settings) = tcgetattr(&port) {
        cfmakeraw(&mut settings);
        tcsetattr(&port, SetArg::TCSAFLUSH, &settings).with_context(|| format!("{}: raw mode", path.display()))?;
    }
    let writer = port.try_clone().with_context(|| path.display().to_string())?;
    Ok((port, writer))
}

/// Waits for the ACPI power button, then powers off.
fn watch_power_button() -> Result<()> {
    /// `struct input_event` of linux/input.h: a time of two words, type, code, value.
    const EVENT: usize = 24;
    const PRESSED: [u8; 8] = [1, 0, 116, 0, 1, 0, 0, 0]; // EV_KEY, KEY_POWER, down
    let mut device = None;
    for entry in fs::read_dir("/sys/class/input").context("/sys/class/input")?.flatten() {
        let name = fs::read_to_string(entry.path().join("device/name")).unwrap_or_default();
        if name.trim_end() == "Power Button" && entry.file_name().to_string_lossy().starts_with("event") {
            device = Some(Path::new("/dev/input").join(entry.file_name()));
        }
    }
    let path = device.context("there is none")?;
    let mut file = File::open(&path).with_context(|| path.display().to_string())?;
    let mut event = [0; EVENT];
    loop {
        file.read_exact(&mut event).with_context(|| path.display().to_string())?;
        if event[EVENT - PRESSED.len()..] == PRESSED {
            println!("HALYARD-GUEST power button");
            Command::new("sync").status().context("sync")?;
            Command::new("poweroff").arg("-f").status().context("poweroff")?;
        }
    }
}

/// Runs a program until it ends or standard input does: so it never outlives the harness, however that dies.
fn guard(program: &str, arguments: &[&str]) -> Result<ExitCode> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let over = Arc::new(AtomicBool::new(false));
    let told = over.clone();
    thread::spawn(move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        told.store(true, Ordering::Release);
        let _ = kill(pid, Signal::SIGKILL);
    });
    let status = child.wait().with_context(|| format!("waiting for {program}"))?;
    match (status.code(), status.signal()) {
        (Some(code), _) => Ok(ExitCode::from(u8::try_from(code)?)),
        (None, Some(_)) if over.load(Ordering::Acquire) => Ok(ExitCode::SUCCESS),
        (None, Some(signal)) => bail!("{program} was killed by signal {signal}"),
        (None, None) => bail!("{program} ended in no known way"),
    }
}
