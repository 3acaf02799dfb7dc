//! Private memory on a real kernel: guest_memfd, attributes, conversions that a guest asks for, and memory faults, in a lab host
//! whose kernel `scripts/install soak` builds, since Debian's have no VMs that are protected by software alone.
//!
//! What such a VM cannot show: its guest has no bit by which it says of an access that it is to shared memory. Each is of the
//! kind that the page's attribute says, so its guest asks by hypercalls, and only unit tests of `hal` come to a memory fault.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use halyard_tests::service::Service;
use halyard_tests::story::{PATIENCE, ask, boot, power_off};
use halyard_tests::tiny::{debug_exit, guest};
use halyard_tests::vm::halyard;
use halyard_tests::{Cmd, Host, HostSpec, Kernel, Status, VmSpec};

const KIND: [&str; 2] = ["--confidential", "software-protected"];
/// Exit code of a run whose guest crashed.
const CRASHED: i32 = 5;
const STEPS: u64 = 512;
const PAGES: u64 = 1 << 18;

fn host(words: &str) -> Result<Host> {
    Host::start(&HostSpec::new().cpus(2).kernel(Kernel::Protected).kernel_words(words))
}

/// The guest of `tests/guests/private.S` in one of its modes.
fn private(mode: &str, memory: &str) -> VmSpec {
    let spec = VmSpec::kernel(guest("private").display().to_string()).cmdline(mode).memory(memory).args(KIND);
    spec.args(["--debug-exit", "--rng"])
}

/// What it prints, once it has ended as it should; and what Halyard said.
fn run(host: &Host, mode: &str, memory: &str, code: i32) -> Result<(String, String)> {
    let vm = host.halyard(&private(mode, memory))?;
    let status = vm.process().wait_for(PATIENCE)?;
    let (said, told) = (vm.process().output(), vm.process().error_output());
    ensure!(status == Status::Exited(code), "{status:?}\n{said}\n{told}");
    Ok((said, told))
}

#[test]
fn soak_a_guest_makes_memory_private_and_shared_and_devices_reach_what_is_shared() -> Result<()> {
    let host = host("")?;
    let (said, _) = run(&host, "p", "64M", debug_exit(0))?;
    // What either side held is gone once the other is seen, on the pages that were asked for and no others.
    let expected = "private 00000000\n11111111000000000000000044444444\nkept 55555555\nshared 00000000\n\
                    its neighbour 66666666\nprivate again 00000000\n";
    assert_eq!(said, expected);

    let (said, told) = run(&host, "d", "64M", debug_exit(0))?;
    // 1 stands for a device that needs a reset: its buffer was private, and then its ring.
    let expected = "answer 00000000\nanswer 00000001\nprivate 00000000\nshared 00000000\nanswer 00000000\n\
                    answer 00000001\nanswer 00000000\n";
    assert_eq!(said, expected);
    assert!(told.contains("needs a reset: 8 bytes at 0x400000 are outside guest memory"), "{told}");

    // A device at work on pages that become private, 300 times: it ends in time, or finds an error.
    let (said, _) = run(&host, "w", "64M", debug_exit(0))?;
    println!("of 300 requests to a device whose buffer became private, hexadecimal: {said}");

    let (said, told) = run(&host, "r", "64M", debug_exit(0))?;
    // 0x16 is EINVAL of ours, 0xffffffea KVM's.
    let expected = "a device 00000016\nshared 00000000\ntoo much 00000016\n16 TiB 00000016\nnothing ffffffea\n\
                    half a page ffffffea\nas it was 11111111\n";
    assert_eq!(said, expected);
    assert!(told.contains("there is no memory in a part of the range"), "{told}");

    // A guest that hides its own code from itself runs zeros, up to where there is no memory to run.
    let (said, told) = run(&host, "x", "8M", CRASHED)?;
    assert_eq!(said, "hides\n");
    assert!(told.contains("the guest crashed"), "{told}");
    Ok(())
}

/// Two processors convert the same pages at once, 300 times each; and a reset, by which all memory is new and shared again.
#[test]
fn soak_processors_convert_the_same_pages_and_a_reset_makes_them_shared() -> Result<()> {
    let host = host("")?;
    let kernel = VmSpec::kernel(guest("convert").display().to_string()).memory("64M").cpus(2);
    let vm = host.halyard(&kernel.args(KIND).args(["--rng"]))?;
    for run in 1..=3 {
        for line in ["begins 00000000", "refused 00000000", "shared 00000000", "answer 00000000", "private 11111111"] {
            vm.process().wait_line_for(line, PATIENCE).with_context(|| format!("in run {run}"))?;
        }
    }
    vm.process().kill(15)?;
    Ok(())
}

/// A host with QEMU's "edu" bound to vfio-pci, its address, and what the guest that drives it says.
fn host_with_function() -> Result<(Host, String, &'static str)> {
    let host = Host::start(&HostSpec::new().kernel(Kernel::Protected).cpus(1).iommu().qemu(["-device", "edu"]))?;
    let found = host.run("grep -lx 0x11e8 /sys/bus/pci/devices/*/device")?.ok()?;
    let path = found.trim().strip_suffix("/device").context("one function")?;
    let function = path.rsplit('/').next().context("an address")?.to_owned();
    host.pass_through(&function)?;
    let said = "who 010000ed\nshared 11111111\nprivate 22222222\nits neighbour 11111111\nemptied 00000000\n\
                shared again 11111111\n";
    Ok((host, function, said))
}

/// Opens what a function by descriptor needs, in a shell.
fn descriptors(function: &str) -> String {
    format!("5<>/dev/vfio/devices/$(ls /sys/bus/pci/devices/{function}/vfio-dev) 6<>/dev/iommu")
}

/// The IOMMU has kept the function from the page while it was private, once, and from nothing else.
fn check_faults(host: &Host) -> Result<()> {
    let faults = host.run("dmesg | grep -i 'DMAR.*fault addr'")?.ok()?;
    ensure!(faults.lines().count() == 1 && faults.contains("fault addr 0x401000"), "the IOMMU's faults: {faults}");
    Ok(())
}

/// A function of the host's writes to memory of the guest's while it is shared, and finds nothing there while it is private.
#[test]
fn soak_a_function_of_the_hosts_reaches_what_is_shared() -> Result<()> {
    let (host, function, expected) = host_with_function()?;
    let spec = VmSpec::kernel(guest("passed").display().to_string()).memory("64M").args(KIND);
    let vm = host.halyard(&spec.args(["--debug-exit", "--vfio", &function]))?;
    let status = vm.process().wait_for(PATIENCE)?;
    let said = vm.process().output();
    ensure!(status == Status::Exited(debug_exit(0)), "{status:?}\n{said}\n{}", vm.process().error_output());
    assert_eq!(said, expected);
    check_faults(&host)
}

/// The same by descriptors (IOMMUFD), as another user without a capability.
#[test]
fn soak_a_function_by_descriptor_is_another_users() -> Result<()> {
    let (host, function, expected) = host_with_function()?;
    let folder = host.folder()?;
    // This machine's own may be where nobody else can read.
    host.run(format!(
        "cp {} {folder}/halyard && cp {} {folder}/guest",
        halyard()?.display(),
        guest("passed").display()
    ))?
    .ok()?;
    let given = descriptors(&function);
    let line = format!(
        "ulimit -l unlimited; exec {given}; \
         chmod 666 /dev/kvm; exec setpriv --reuid 107 --regid 107 --clear-groups --bounding-set -all --inh-caps -all \
         {folder}/halyard run --kernel {folder}/guest --memory 64M --confidential software-protected --debug-exit \
         --vfio fd=5,iommu_fd=6"
    );
    let output = host.run(Cmd::shell(line).patience(PATIENCE))?;
    let (said, told) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status == Status::Exited(debug_exit(0)), "{:?}\n{said}\n{told}", output.status);
    assert_eq!(said, expected);
    check_faults(&host)
}

/// The same by descriptors that come with a client's request.
#[test]
fn soak_a_function_by_descriptor_comes_with_a_request() -> Result<()> {
    let (host, function, expected) = host_with_function()?;
    let folder = host.folder()?;
    let config = format!(
        "kernel: {{path: {}}}\nmemory: {{size: 64M}}\nconfidential: {{kind: software-protected}}\n\
         serial: {{type: file, path: {folder}/said}}\nplatform: {{debug_exit: true}}\n\
         devices: [{{type: vfio, fd: 5, iommu_fd: 6}}]\n",
        guest("passed").display()
    );
    host.write_file(&format!("{folder}/vm.yaml"), config)?;
    let service = Service::start(&host, &[])?;
    let ctl = format!("{} ctl -s {}", halyard()?.display(), service.socket());
    let given = descriptors(&function);
    host.run(format!(
        "{ctl} create {folder}/vm.yaml {given} && {ctl} boot && until grep -q '^shared again ........$' {folder}/said; do sleep 0.1; done"
    ))?
    .ok()?;
    assert_eq!(String::from_utf8(host.read_file(&format!("{folder}/said"))?)?, expected);
    check_faults(&host)?;
    service.finish()
}

#[test]
fn soak_a_stock_kernel_boots_in_memory_that_it_leaves_shared() -> Result<()> {
    let host = host("")?;
    let vm = boot(&host, &VmSpec::guest(Kernel::Debian6_12Cloud)?.cpus(2).memory("512M").args(KIND))?;
    assert_eq!(ask(&vm, "nproc")?, "2");
    power_off(&vm)
}

#[test]
fn soak_an_access_that_private_memory_cannot_answer_is_a_fault_of_its_own() -> Result<()> {
    let program = tests_of_hal()?;
    let host = host("")?;
    let output = host.run(Cmd::new(program).args(["kvm::protected::", "--nocapture", "--test-threads=1"]))?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    ensure!(output.status == Status::Exited(0) && said.contains("3 passed") && !said.contains("skipped"), "{said}");
    Ok(())
}

/// The program of `hal`'s unit tests, as cargo builds it.
fn tests_of_hal() -> Result<String> {
    let build = ["test", "-p", "hal", "--lib", "--no-run", "--quiet", "--message-format=json"];
    let output = Command::new(env!("CARGO")).args(build).output().context("cargo")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let messages = String::from_utf8(output.stdout)?;
    let built = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let programs = built.filter(|message| message["target"]["name"] == "hal" && message["profile"]["test"] == true);
    let program = programs.filter_map(|message| message["executable"].as_str().map(str::to_owned)).next_back();
    program.context("cargo names no program of hal's unit tests")
}

/// The parts of the time of 1 GiB in steps of 2 MiB, in which each page is written between two conversions.
#[test]
fn soak_the_time_of_conversions() -> Result<()> {
    let host = host("profile=4")?;
    let symbols = Symbols::read(&host)?;
    let facts = host.run("grep -m1 MHz /proc/cpuinfo")?.ok()?;
    // With three digits behind the point.
    let khz: u64 = facts.rsplit(' ').next().context("MHz")?.trim().replace('.', "").parse()?;
    let vm = host.halyard(&private("b", "3G"))?;
    vm.wait_line("begins")?;
    let pid = vm.pid();
    for phase in ["private, empty", "touched", "shared, full", "touched", "private, full", "touched", "shared, full"] {
        let before = spent(&host, pid, "echo >/proc/profile")?;
        vm.process().write(b"\n")?;
        let line = vm.process().wait_line_for(" ticks", PATIENCE)?;
        let after = spent(&host, pid, "cp /proc/profile /run/profile")?;
        let kernel = symbols.profile(&host)?;
        let ticks = line.strip_prefix(phase).and_then(|line| line.strip_suffix(" ticks")).context("another line")?;
        let microseconds = u64::from_str_radix(ticks.trim(), 16)? * 1000 / khz;
        let (each, what) = if phase == "touched" { (PAGES, "page") } else { (STEPS, "step") };
        println!(
            "{phase:14} {:5} ms, {:5} us a {what}; Halyard and guest {} ms, the host's kernel {} ms: {}",
            microseconds / 1000,
            microseconds / each,
            after[0] - before[0],
            after[1] - before[1],
            most(&kernel)
        );
    }
    vm.process().write(b"\n")?;
    ensure!(vm.process().wait_for(PATIENCE)? == Status::Exited(debug_exit(0)), "{}", vm.process().last_words());
    Ok(())
}

/// The functions of a host's kernel, by which its profile is read.
struct Symbols {
    by_address: BTreeMap<u64, String>,
    first: u64,
}

impl Symbols {
    fn read(host: &Host) -> Result<Self> {
        let text = host.run("grep -i ' t ' /proc/kallsyms")?.ok()?;
        let parse = |line: &str| {
            let mut words = line.split(' ');
            Some((u64::from_str_radix(words.next()?, 16).ok()?, words.nth(1)?.to_owned()))
        };
        // Several may have one address.
        let first = text.lines().filter_map(parse).find(|(_, name)| name == "_stext");
        let (first, _) = first.context("no start of the kernel's text")?;
        Ok(Self { by_address: text.lines().filter_map(parse).collect(), first })
    }

    /// Timer interrupts that found the kernel in each function, from a copy of its counters.
    fn profile(&self, host: &Host) -> Result<BTreeMap<String, u64>> {
        let bytes = host.read_file("/run/profile")?;
        let mut counters = bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
        let step = u64::from(counters.next().context("an empty profile: profile=4 is missing")?);
        let mut sum = BTreeMap::new();
        for (index, count) in counters.enumerate().filter(|(_, count)| *count > 0) {
            let address = self.first + index as u64 * step;
            let name = self.by_address.range(..=address).next_back().map_or("?", |(_, name)| name);
            *sum.entry(name.to_owned()).or_default() += u64::from(count);
        }
        Ok(sum)
    }
}

/// Where the kernel was most, in parts of a hundred; idling is left out.
fn most(profile: &BTreeMap<String, u64>) -> String {
    let idle = |name: &str| name.contains("idle") || name.contains("halt");
    let mut sorted: Vec<(u64, &str)> =
        profile.iter().filter(|(name, _)| !idle(name)).map(|(name, count)| (*count, name.as_str())).collect();
    sorted.sort_unstable_by(|one, other| other.cmp(one));
    let all: u64 = sorted.iter().map(|(count, _)| count).sum();
    let parts = sorted.iter().take(6).map(|(count, name)| format!("{name} {} %", 100 * count / all.max(1)));
    parts.collect::<Vec<_>>().join(", ")
}

/// Milliseconds that a process has spent in its own code or its guest's, and in the kernel's; and a command beside it.
fn spent(host: &Host, pid: u32, command: &str) -> Result<[u64; 2]> {
    let told = host.run(format!("cut -d' ' -f14,15 /proc/{pid}/stat; {command}"))?.ok()?;
    let (own, kernel) = told.trim().split_once(' ').context("two numbers")?;
    // Of 10 ms each.
    Ok([own.parse::<u64>()? * 10, kernel.parse::<u64>()? * 10])
}
