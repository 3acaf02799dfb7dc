//! A disk that firmware boots: an EFI system partition with Debian's signed shim and GRUB, and a kernel for them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::{firmware, images, kernels::Kernel};

/// Bytes of the disk, and where its one partition begins: at a MiB, as `@@1M` tells mtools.
const SIZE: u64 = 64 << 20;
const START: u64 = 1 << 20;
const SECTOR: u64 = 512;
/// What is left at the end for the second copy of the partition table.
const END: u64 = 1 << 20;

/// A file that is in the partition.
struct Content {
    name: &'static str,
    file: PathBuf,
}

/// Debian's shim, which Microsoft has signed, and with which firmware begins.
///
/// # Errors
/// It is not there.
pub fn shim() -> Result<PathBuf> {
    firmware::file("shimx64.efi.signed")
}

/// Makes a disk in a folder: shim starts GRUB, and GRUB the kernel with the test guest's initramfs and this command line.
///
/// # Errors
/// A file or a program that makes it is missing.
pub fn disk(folder: &Path, kernel: Kernel, cmdline: &str) -> Result<PathBuf> {
    let config = folder.join("grub.cfg");
    fs::write(&config, format!("linux /vmlinuz {cmdline}\ninitrd /initrd.img\nboot\n"))?;
    let contents = [
        Content { name: "EFI/BOOT/BOOTX64.EFI", file: shim()? },
        Content { name: "EFI/BOOT/grubx64.efi", file: firmware::file("grubx64.efi.signed")? },
        Content { name: "EFI/debian/grub.cfg", file: config },
        Content { name: "vmlinuz", file: kernel.bzimage()? },
        Content { name: "initrd.img", file: images::guest(kernel)? },
    ];
    let disk = folder.join("disk.img");
    File::create(&disk)?.set_len(SIZE)?;
    let sectors = (SIZE - START - END) / SECTOR;
    let table = format!("label: gpt\nstart={}, size={sectors}, type=U\n", START / SECTOR);
    let script = folder.join("table");
    fs::write(&script, table)?;
    run(Command::new("sfdisk").arg("--quiet").arg(&disk).stdin(File::open(&script)?))?;
    let offset = (START / SECTOR).to_string();
    run(Command::new("mkfs.vfat").args(["--offset", &offset]).arg(&disk).arg((sectors / 2).to_string()))?;
    let partition = format!("{}@@1M", disk.display());
    run(Command::new("mmd").args(["-i", &partition, "::EFI", "::EFI/BOOT", "::EFI/debian"]))?;
    for Content { name, file } in contents {
        run(Command::new("mcopy").args(["-i", &partition]).arg(file).arg(format!("::{name}")))?;
    }
    Ok(disk)
}

fn run(command: &mut Command) -> Result<()> {
    // Debian has some of them where only root looks for programs.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = command.env("PATH", path).stdout(Stdio::null()).output();
    let output = output.with_context(|| format!("{} (`make deps` installs it)", command.get_program().display()))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
