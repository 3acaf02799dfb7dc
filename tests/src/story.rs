//! Long stories: one at a time, with much patience.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::{Cmd, Host, Status, Vm, VmSpec};

/// How long anything of a story may take. An emulated host that has to share its processor gets slower out of all
/// proportion, since most of what is left to it goes into timer interrupts.
pub const PATIENCE: Duration = Duration::from_secs(600);

/// A story that runs. There is one at a time, so that each has the machine for itself.
pub struct Story {
    name: &'static str,
    began: Instant,
    _turn: MutexGuard<'static, ()>,
}

impl Story {
    /// Waits for those before it.
    pub fn begin(name: &'static str) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        Self { name, began: Instant::now(), _turn: turn }
    }

    /// When it began.
    pub fn began(&self) -> Instant {
        self.began
    }

    /// Prints what was done, in figures.
    pub fn tell(&self, figures: &str) {
        println!("soak: {:<10} {figures}; {:.0} s", self.name, self.began.elapsed().as_secs_f64());
    }
}

/// Boots a guest to user space.
///
/// # Errors
/// It does not get there.
pub fn boot<'a>(host: &'a Host, spec: &VmSpec) -> Result<Vm<'a>> {
    let vm = host.halyard(spec)?;
    vm.process().wait_line_for("HALYARD-GUEST ready", PATIENCE)?;
    Ok(vm)
}

/// What a command in the guest says.
///
/// # Errors
/// It fails, or does not end in time.
pub fn ask(vm: &Vm, command: &str) -> Result<String> {
    vm.run(Cmd::shell(command).patience(PATIENCE))?.ok().with_context(|| command.to_owned())
}

/// Powers a guest off and checks that Halyard says so.
///
/// # Errors
/// It does not.
pub fn power_off(vm: &Vm) -> Result<()> {
    // The guest is gone before its agent can answer.
    let _last = vm.spawn("poweroff -f");
    ensure!(vm.exit_status()? == Status::Exited(0), "power-off must end Halyard with code 0");
    Ok(())
}
