//! A monitor behind the recorder (`tests/recorder`), which plays a host with Intel TDX to it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::{cache, firmware};

/// The recorder, and a `halyard` that it can be loaded into.
pub struct Recorder {
    folder: PathBuf,
}

impl Recorder {
    /// Builds both, where they are not there.
    ///
    /// # Errors
    /// They do not compile.
    pub fn build() -> Result<Self> {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/recorder/build");
        let built = Command::new(script).arg("halyard").output().context(script)?;
        ensure!(built.status.success(), "{script}: {}", String::from_utf8_lossy(&built.stderr));
        Ok(Self { folder: String::from_utf8(built.stdout)?.trim_end().into() })
    }

    /// The recorder.
    pub fn library(&self) -> PathBuf {
        self.folder.join("libhalyard_recorder.so")
    }

    /// The program.
    pub fn program(&self) -> PathBuf {
        self.folder.join("halyard")
    }

    /// Halyard behind it; arguments are still to be given.
    pub fn halyard(&self) -> Command {
        let mut command = Command::new(self.program());
        command.env("LD_PRELOAD", self.library()).env_remove("RUST_LOG");
        command
    }

    /// A real QEMU behind it, which launches a trust domain of 2 GiB with Debian's firmware, and asks the quote service at a socket,
    /// if any.
    ///
    /// # Errors
    /// It is not there.
    pub fn qemu(&self, cpus: u8, quotes: Option<&Path>) -> Result<Command> {
        let tree = cache::folder()?.join("trees/qemu-tdx");
        ensure!(tree.exists(), "{} is not there: `scripts/install trees` unpacks it", tree.display());
        let libraries = tree.join("usr/lib/x86_64-linux-gnu");
        let mut command = Command::new(tree.join("lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(format!("{0}:{0}/pulseaudio", libraries.display()));
        command.arg("--preload").arg(self.library());
        command.arg(tree.join("usr/bin/qemu-system-x86_64")).arg("-L").arg(tree.join("usr/share/qemu"));
        let mut guest = json!({ "qom-type": "tdx-guest", "id": "td" });
        if let Some(socket) = quotes {
            guest["quote-generation-socket"] = json!({ "type": "unix", "path": socket });
        }
        command.args(["-accel", "kvm", "-cpu", "host", "-object", &guest.to_string()]);
        command.args(["-machine", "q35,confidential-guest-support=td,kernel-irqchip=split", "-bios"]);
        command.arg(firmware::path()?).args(["-m", "2G", "-nodefaults", "-display", "none", "-smp", &cpus.to_string()]);
        Ok(command)
    }
}
