//! Functions of the host's that a guest drives itself: NVMe disks behind an emulated IOMMU, in an emulated host.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use api::{ByteSize, DeviceConfig, MemoryPatch, Vfio};
use halyard_tests::census::Census;
use halyard_tests::service::{Service, guest};
use halyard_tests::{Client, Host, HostSpec, Kernel, Kind, Status, Vm, VmSpec, images};

const KERNEL: Kernel = Kernel::Debian6_12Cloud;
const MIB: u64 = 1 << 20;

/// A host with an IOMMU and so many NVMe disks, and their addresses. One processor: see the README on the emulator.
fn host(disks: usize) -> Result<(Host, Vec<String>)> {
    let spec = (0..disks).fold(HostSpec::new().cpus(1).iommu().kind(Kind::Emulated), |spec, _| spec.nvme(64 * MIB, 0));
    let host = Host::start(&spec)?;
    let found = host.run("modprobe nvme && modprobe vfio-pci && cd /sys/bus/pci/drivers/nvme && ls -d 0000:*")?.ok()?;
    let found: Vec<String> = found.split_whitespace().map(str::to_owned).collect();
    ensure!(found.len() == disks, "{disks} disks, and these functions: {found:?}");
    Ok((host, found))
}

fn spec() -> Result<VmSpec> {
    Ok(VmSpec::guest(KERNEL)?.initramfs(images::guest_with(KERNEL, &["nvme"])?.display().to_string()))
}

/// What a command in the guest says.
fn ask(vm: &Vm, command: &str) -> Result<String> {
    vm.run(command)?.ok().with_context(|| command.to_owned())
}

/// Gives a function back to the host's own driver, and waits for its disk.
fn give_back(host: &Host, function: &str) -> Result<()> {
    let path = format!("/sys/bus/pci/devices/{function}");
    host.run(format!(
        "echo >{path}/driver_override && echo {function} >{path}/driver/unbind && echo {function} >/sys/bus/pci/drivers_probe && \
         until [ -b /dev/nvme0n1 ]; do sleep 0.1; done"
    ))?
    .ok()?;
    Ok(())
}

/// Writes 8 MiB to a disk, and reads them as they were written.
fn write(disk: &str) -> String {
    format!(
        "head -c 8388608 /dev/urandom >/file && dd if=/file of=/dev/{disk} bs=64k conv=fsync 2>/dev/null && \
         echo 3 >/proc/sys/vm/drop_caches && {} && sha256sum </file",
        compare(disk)
    )
}

fn compare(disk: &str) -> String {
    format!("dd if=/dev/{disk} bs=64k count=128 2>/dev/null | cmp - /file")
}

#[test]
fn a_guest_drives_an_nvme_disk_of_the_hosts() -> Result<()> {
    let (host, functions) = host(1)?;
    let function = &functions[0];
    // Not while the host has it.
    let vm = host.halyard(&spec()?.args(["--vfio", function]))?;
    ensure!(vm.exit_status()? == Status::Exited(2), "{}", vm.process().last_words());
    let told = vm.process().error_output();
    ensure!(told.contains("bound to the driver nvme, not to vfio-pci") && told.contains("driverctl"), "{told}");
    drop(vm);

    host.pass_through(function)?;
    let vm = host.halyard(&spec()?.args(["--vfio", function]))?;
    vm.wait_line("HALYARD-GUEST ready")?;
    let written = ask(&vm, &write("nvme0n1"))?;
    let interrupts = ask(&vm, "grep -c 'PCI-MSIX.*nvme0q' /proc/interrupts")?;
    ensure!(interrupts.trim() == "2", "{interrupts} vectors");
    let unhandled = ask(&vm, "dmesg | grep -ci -e 'nvme.*timeout' -e 'polled' || true")?;
    ensure!(unhandled.trim() == "0", "the guest has missed interrupts: {}", ask(&vm, "dmesg | tail -n 20")?);
    let _last = vm.spawn("poweroff -f");
    ensure!(vm.exit_status()? == Status::Exited(0), "power-off must end Halyard with code 0");

    give_back(&host, function)?;
    let read = host.run("dd if=/dev/nvme0n1 bs=64k count=128 2>/dev/null | sha256sum")?.ok()?;
    ensure!(read == written, "{written} was written by the guest, and {read} is what the host reads");
    Ok(())
}

#[test]
fn a_function_comes_and_goes_and_memory_that_is_plugged_is_reached() -> Result<()> {
    let (host, functions) = host(2)?;
    functions.iter().try_for_each(|function| host.pass_through(function))?;
    let mut config = guest(KERNEL)?;
    let initramfs = images::guest_with(KERNEL, &["nvme"])?;
    let grants = [PathBuf::from("/dev/vfio"), config.kernel.path.clone(), initramfs.clone()];
    let grants = grants.map(|path| path.display().to_string());
    let grants: Vec<&str> = grants.iter().flat_map(|path| ["--grant", path]).collect();
    let mut service = Service::start(&host, &grants)?;
    config.kernel.initramfs = Some(initramfs);
    config.pci.hotplug_ports = 2;
    config.memory.max = Some(ByteSize::mib(768));
    let function = |at: usize| DeviceConfig::Vfio(Vfio { host: Some(functions[at].clone()), ..Vfio::default() });
    config.devices.push(function(0));
    let vm = service.boot(&config)?;
    let ask = |vm: &Client, command: &str| vm.run(command)?.ok().with_context(|| command.to_owned());
    ask(&vm, &write("nvme0n1"))?;
    let before = service.census(&host)?;

    service.add("second", &function(1))?;
    ask(&vm, "until [ -b /dev/nvme1n1 ]; do usleep 20000; done")?;
    ask(&vm, &write("nvme1n1"))?;
    // More than there was memory for, so that some of it is in what is plugged.
    let job = service.client.set_memory(&MemoryPatch { size: ByteSize::mib(768) })?;
    service.success_of(job)?;
    ask(&vm, "mount -t tmpfs -o size=100% none /tmp && head -c 300m /dev/zero >/tmp/much")?;
    let written = ask(&vm, &write("nvme1n1"))?;
    ask(&vm, &write("nvme0n1"))?;
    ask(&vm, "rm /tmp/much")?;
    let job = service.client.set_memory(&MemoryPatch { size: ByteSize::mib(512) })?;
    service.success_of(job)?;
    ask(&vm, &write("nvme0n1"))?;
    service.remove(&["second"])?;
    ask(&vm, "until [ ! -b /dev/nvme1n1 ]; do usleep 20000; done")?;
    give_back(&host, &functions[1])?;
    let read = host.run("dd if=/dev/nvme0n1 bs=64k count=128 2>/dev/null | sha256sum")?.ok()?;
    ensure!(read == written, "{written} was written by the guest, and {read} is what the host reads");
    let after = service.census(&host)?;
    let held = |census: &Census| (census.descriptors, census.threads);
    ensure!(held(&before) == held(&after), "left behind: {before:?}, then {after:?}");

    // The machine is made anew, and the function with it.
    service.client.reset()?;
    let vm = service.guest()?;
    ask(&vm, &write("nvme0n1"))?;
    service.finish()
}
