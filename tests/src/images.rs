//! The first root file systems of the lab host and of the guests, built when what they are made of has changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::{self, Inputs};
use crate::cpio::Archive;
use crate::kernels::Kernel;

const LAB_INIT: &str = include_str!("../../resources/guest/lab-init");
const LAB_HOST: &str = include_str!("../../resources/guest/lab-host");
const GUEST_INIT: &str = include_str!("../../resources/guest/guest-init");

/// What the lab's first script needs to reach the machine's root file system, and what a monitor needs. All of it is
/// loaded from memory: to unpack one module with the machine's tools takes a second there.
const LAB_MODULES: [&str; 8] = ["virtio_pci", "9p", "9pnet_virtio", "overlay", "kvm-amd", "tun", "bridge", "vhost_net"];
/// What a guest may be given, and needs to use it.
const GUEST_MODULES: [&str; 10] = [
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio_mem",
    "virtio_rng",
    "button",
    "evdev",
    "pvpanic-mmio",
    "pvpanic-pci",
];

/// The lab host's: mounts the machine's root under an overlay and goes on there.
///
/// # Errors
/// Where something that it is made of is missing.
pub fn lab(kernel: Kernel) -> Result<PathBuf> {
    let agent = cache::small_agent()?;
    let busybox = busybox()?;
    let inputs = Inputs::default().text(LAB_INIT).text(LAB_HOST).text(&LAB_MODULES.join(" "));
    let inputs = inputs.file(&agent)?.file(&busybox)?.file(&kernel.bzimage()?)?;
    cache::file("lab-initramfs", &inputs, || {
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "proc", "sys", "lower", "writes", "root"] {
            archive.folder(folder);
        }
        archive.program("init", LAB_INIT.as_bytes());
        archive.program("host", LAB_HOST.as_bytes());
        archive.program("bin/busybox", &fs::read(&busybox)?);
        archive.program("bin/agent", &fs::read(&agent)?);
        add_modules(&mut archive, kernel, &LAB_MODULES)?;
        Ok(archive.finish())
    })
}

/// A guest's: busybox, the modules of its kernel for the devices it may be given, and the agent.
///
/// # Errors
/// Where something that it is made of is missing.
pub fn guest(kernel: Kernel) -> Result<PathBuf> {
    guest_with(kernel, &[])
}

/// As [`guest`], with further modules.
///
/// # Errors
/// As there.
pub fn guest_with(kernel: Kernel, more: &[&str]) -> Result<PathBuf> {
    let modules = [GUEST_MODULES.as_slice(), more].concat();
    let agent = cache::small_agent()?;
    let busybox = busybox()?;
    let inputs = Inputs::default().text(GUEST_INIT).text(&modules.join(" "));
    let inputs = inputs.file(&agent)?.file(&busybox)?.file(&kernel.bzimage()?)?;
    cache::file(&format!("guest-initramfs-{}", kernel.label()), &inputs, || {
        let mut archive = Archive::default();
        for folder in ["bin", "dev", "proc", "root", "run", "sys", "tmp"] {
            archive.folder(folder);
        }
        archive.program("init", GUEST_INIT.as_bytes());
        archive.program("bin/busybox", &fs::read(&busybox)?);
        archive.program("bin/agent", &fs::read(&agent)?);
        for applet in applets(&busybox)? {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
        add_modules(&mut archive, kernel, &modules)?;
        Ok(archive.finish())
    })
}

fn add_modules(archive: &mut Archive, kernel: Kernel, names: &[&str]) -> Result<()> {
    archive.folder("modules");
    let mut order = String::new();
    for (name, content) in kernel.modules()?.with_needs(names)? {
        archive.file(&format!("modules/{name}"), &content);
        order += &format!("{name}\n");
    }
    archive.file("modules/order", order.as_bytes());
    Ok(())
}

/// The machine's busybox, which must need no libraries.
pub(crate) fn busybox() -> Result<PathBuf> {
    let path = ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(PathBuf::from).find(|path| path.exists());
    path.context("there is no busybox: scripts/install installs busybox-static")
}

fn applets(busybox: &Path) -> Result<Vec<String>> {
    let output = Command::new(busybox).arg("--list").output().with_context(|| busybox.display().to_string())?;
    ensure!(output.status.success(), "{} --list: {}", busybox.display(), output.status);
    let names = String::from_utf8(output.stdout)?;
    Ok(names.lines().filter(|name| *name != "busybox").map(str::to_owned).collect())
}
