//! Programs of Debian's that load a guest and check what they did: `scripts/install soak` unpacks them, with the libraries
//! that they need.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::{self, Inputs};
use crate::command::Cmd;
use crate::cpio::Archive;
use crate::host::Host;

/// Where programs of Debian's look for libraries.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// What starts them, by the name that they have for it.
const LOADER: &str = "ld-linux-x86-64.so.2";

/// A program that loads a guest.
#[derive(Clone, Copy, Debug)]
pub enum Load {
    /// Reads and writes disks.
    Fio,
    /// Uses processors and memory.
    StressNg,
}

impl Load {
    /// Its name, which is also its package's and its tree's in the cache.
    fn name(self) -> &'static str {
        match self {
            Self::Fio => "fio",
            Self::StressNg => "stress-ng",
        }
    }

    /// Gives a guest the program: an initramfs in the host that is the guest's own and an archive with the program, which
    /// the kernel unpacks one after the other. fio brings 80 MiB of libraries, and all of it is in the guest's memory.
    ///
    /// # Errors
    /// The program is not there, or the host has no room.
    pub fn give(self, host: &Host, config: &mut api::VmConfig) -> Result<()> {
        let own = config.kernel.initramfs.as_ref().context("a guest with an initramfs")?.display().to_string();
        let both = format!("{}/initramfs", host.folder()?);
        let join = "cat \"$1\" \"$2\" >\"$0\"";
        let more = self.archive()?.display().to_string();
        host.run(Cmd::shell(join).args([both.as_str(), &own, &more]))?.ok()?;
        config.kernel.initramfs = Some(both.into());
        Ok(())
    }

    fn archive(self) -> Result<PathBuf> {
        let tree = cache::folder()?.join("trees").join(self.name());
        ensure!(tree.exists(), "{} is not there: scripts/install soak unpacks it", tree.display());
        let program = tree.join("usr/bin").join(self.name());
        let libraries = libraries(&tree, &program)?;
        let mut inputs = Inputs::default().file(&program)?;
        for library in &libraries {
            inputs = inputs.file(library)?;
        }
        cache::file(&format!("load-{}", self.name()), &inputs, || {
            let mut archive = Archive::default();
            for folder in ["lib", "lib64", "lib/x86_64-linux-gnu"] {
                archive.folder(folder);
            }
            archive.program(&format!("bin/{}", self.name()), &fs::read(&program)?);
            archive.program(&format!("lib64/{LOADER}"), &fs::read(tree.join(LIBRARIES).join(LOADER))?);
            for library in &libraries {
                let name = library.file_name().context("a library's name")?.to_string_lossy();
                archive.file(&format!("lib/x86_64-linux-gnu/{name}"), &fs::read(library)?);
            }
            Ok(archive.finish())
        })
    }
}

/// A line for a guest's shell that writes all of a disk at random and reads it back, over and over, and says "sound" after
/// each round. It ends where something else is read than was written. `more` are options of fio's beside or instead.
pub fn fio(disk: &str, more: &str) -> String {
    format!(
        "while fio --name=load --filename={disk} --rw=randwrite --bs=64k --direct=1 --ioengine=libaio --iodepth=8 \
         --verify=crc32c --verify_fatal=1 --thread --output=/fio {more}; do echo sound; done; cat /fio"
    )
}

/// A line for a guest's shell that runs stress-ng, which checks what its workers do and fails where that is wrong. It says
/// "dispatching hogs" when they begin, and goes on for ever where they have no end of their own.
pub fn stress_ng(workers: &str) -> String {
    format!("exec stress-ng {workers} --verify --timeout 0 --temp-path /tmp 2>&1")
}

/// The libraries of a tree that a program of it needs, and those that they need, as the tree's own loader finds them.
fn libraries(tree: &Path, program: &Path) -> Result<BTreeSet<PathBuf>> {
    let folder = tree.join(LIBRARIES);
    let mut loader = Command::new(folder.join(LOADER));
    // Ceph's have a folder of their own.
    loader.arg("--library-path").arg(format!("{0}:{0}/ceph", folder.display())).arg("--list").arg(program);
    let output = loader.output().with_context(|| format!("{loader:?}"))?;
    ensure!(output.status.success(), "{loader:?}: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    let list = String::from_utf8(output.stdout)?;
    let paths: BTreeSet<PathBuf> = list
        .lines()
        .filter_map(|line| Some(line.split_once(" => ")?.1.split(' ').next()?.into()))
        .filter(|path: &PathBuf| !path.ends_with(LOADER))
        .collect();
    ensure!(paths.iter().all(|path| path.starts_with(tree)), "{} needs what is not there:\n{list}", program.display());
    Ok(paths)
}
