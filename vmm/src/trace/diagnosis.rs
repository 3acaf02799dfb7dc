//! Why a guest does not come up: how far it came, what its vCPUs do, what it last asked for, and what usually helps.

use std::time::Duration;

use super::recorder::{ExitSeen, Mark, Reason};
use super::sight::Sight;
use super::symbols::Symbols;
use super::{Milestone, View, names, seconds};

/// The most vCPUs, and exits of each, that are told of.
const MOST_VCPUS: usize = 8;
const MOST_EXITS: usize = 6;

/// All that is known of a guest that does not come up.
pub struct Findings<'a> {
    /// The machine.
    pub view: &'a View,
    /// What was reached.
    pub marks: &'a [Mark],
    /// Time since exec.
    pub now: Duration,
    /// Each vCPU twice, a moment apart; `None` where it did not answer.
    pub sights: &'a [[Option<Result<Sight, String>>; 2]],
    /// Each vCPU's last exits, oldest first.
    pub exits: &'a [Vec<ExitSeen>],
}

/// How far a guest came, by what shows from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// It was never entered.
    NotEntered,
    /// It was entered, and nothing else.
    Silent,
    /// It says something, and does not look for devices.
    Talking,
    /// It looks for devices, and not all have their drivers.
    Devices,
    /// All devices run.
    AfterDevices,
}

impl Findings<'_> {
    fn reached(&self, wanted: impl Fn(&Milestone) -> bool) -> bool {
        self.marks.iter().any(|mark| wanted(&mark.milestone))
    }

    /// Ids of the devices without a driver.
    fn idle_devices(&self) -> Vec<&str> {
        let ids = self.view.functions.iter().map(|(id, _)| id.as_str());
        ids.filter(|id| !self.reached(|milestone| *milestone == Milestone::DriverOk((*id).to_owned()))).collect()
    }

    fn stage(&self) -> Stage {
        if !self.reached(|milestone| *milestone == Milestone::FirstEntry) {
            Stage::NotEntered
        } else if self.reached(|milestone| *milestone == Milestone::Pci) {
            if self.idle_devices().is_empty() { Stage::AfterDevices } else { Stage::Devices }
        } else if self.reached(|milestone| matches!(milestone, Milestone::Output(_))) {
            Stage::Talking
        } else {
            Stage::Silent
        }
    }

    /// In one sentence.
    pub fn summary(&self) -> String {
        let state = match self.stage() {
            Stage::NotEntered => "it was not even entered",
            Stage::Silent => "its kernel has said nothing and touched no device",
            Stage::Talking => "its kernel runs, but has not looked for devices",
            Stage::Devices => "its kernel looks for devices, and not all have a driver",
            Stage::AfterDevices if self.view.functions.is_empty() => {
                "its kernel has looked for devices, and no program runs"
            }
            Stage::AfterDevices => "its devices run, and no program does",
        };
        let last = self.marks.last();
        let last = last.map_or_else(String::new, |Mark { at, milestone }| {
            let since = seconds(self.now.saturating_sub(*at));
            format!("; last milestone: {milestone} at {}, {since} ago", seconds(*at))
        });
        format!("no user space after {}: {state}{last}", seconds(self.now))
    }

    /// All of it, a line for each fact.
    pub fn lines(&self, symbols: &Symbols) -> Vec<String> {
        let mut lines = vec![self.summary()];
        let way: Vec<String> =
            self.marks.iter().map(|Mark { at, milestone }| format!("{milestone} {}", seconds(*at))).collect();
        lines.push(format!("reached: {}", way.join(", ")));
        let idle = self.idle_devices();
        if !idle.is_empty() {
            lines.push(format!("without a driver: {}", idle.join(", ")));
        }
        for (number, sights) in self.sights.iter().enumerate().take(MOST_VCPUS) {
            lines.push(vcpu(number, sights, symbols));
            let exits = self.exits.get(number).filter(|exits| !exits.is_empty());
            let from = |exits: &&Vec<ExitSeen>| exits.len().saturating_sub(MOST_EXITS);
            if let Some(last) = exits.and_then(|exits| exits.get(from(&exits)..)) {
                let last: Vec<String> = last.iter().map(|exit| self.exit(exit)).collect();
                lines.push(format!("vCPU {number}'s last exits: {}", last.join("; ")));
            }
        }
        if self.sights.len() > MOST_VCPUS {
            lines.push(format!("and {} more vCPUs", self.sights.len() - MOST_VCPUS));
        }
        lines.push(format!("names of addresses come from {}", symbols.source()));
        lines.extend(self.help().into_iter().map(|help| format!("what may help: {help}")));
        lines
    }

    fn exit(&self, exit: &ExitSeen) -> String {
        let ExitSeen { at, reason, address, size, value } = exit;
        let place = names::place(self.view, *reason, *address);
        let what = match reason {
            Reason::PioRead | Reason::MmioRead => format!("read {value:#x} ({size} bytes) from {place} {address:#x}"),
            Reason::PioWrite | Reason::MmioWrite => format!("wrote {value:#x} ({size} bytes) to {place} {address:#x}"),
            Reason::EndOfInterrupt => format!("end of interrupt, {place}"),
            Reason::Kick => "looked at by the monitor".to_owned(),
        };
        format!("{what} at {}", seconds(*at))
    }

    fn help(&self) -> Vec<String> {
        let mut help = Vec::new();
        let seen: Vec<&Sight> = self.sights.iter().flatten().flatten().flatten().collect();
        let started =
            |sight: &&&Sight| !matches!(sight.activity, hal::MpState::Uninitialized | hal::MpState::InitReceived);
        if seen.iter().filter(started).all(|sight| sight.is_dead()) && !seen.is_empty() {
            help.push(
                "every vCPU has stopped itself for good: the kernel has panicked or given up; its console tells why",
            );
        }
        match self.stage() {
            Stage::NotEntered => help.push("the host is slow or overloaded: look at the first lines of --boot-trace"),
            Stage::Silent => help.extend([
                "«console=ttyS0» (--serial) or «console=hvc0» (--console) on the kernel's command line, and no «quiet», \
                 for its log to appear; «earlyprintk=ttyS0» for what comes before",
                "a kernel that is built for 64-bit x86 with KVM guest support, as bzImage or as ELF",
                "more memory: a kernel and its initramfs must both fit, unpacked",
            ]),
            Stage::Talking => help.extend([
                "the last lines of its log, with «ignore_loglevel initcall_debug» on the command line",
                "a kernel with ACPI and PCI support: it has no other way to its devices here",
            ]),
            Stage::Devices => help.extend([
                "drivers for the devices above, built in or as modules in the initramfs: virtio_pci with virtio_blk, \
                 virtio_net, virtio_console and virtio-rng",
                "«root=» and, where the initramfs waits for a disk, that disk in the configuration",
            ]),
            Stage::AfterDevices => help.extend([
                "«root=» that names a disk of the guest (/dev/vda is the first), and no «rootwait» for one that never \
                 comes",
                "an initramfs with an executable /init, or «init=» that names one on the root disk",
                "the root disk's file system built into the kernel, or its module in the initramfs",
            ]),
        }
        help.into_iter().map(str::to_owned).collect()
    }
}

fn vcpu(number: usize, sights: &[Option<Result<Sight, String>>; 2], symbols: &Symbols) -> String {
    let named = |sight: &Sight| match symbols.name(sight.rip) {
        Some(name) => format!("{sight} ({name})"),
        None => sight.to_string(),
    };
    match sights {
        [_, None] => format!("vCPU {number}: did not stop to be looked at"),
        [_, Some(Err(problem))] => format!("vCPU {number}: cannot be looked at: {problem}"),
        [Some(Ok(before)), Some(Ok(now))] if before.rip != now.rip => {
            let before = symbols.name(before.rip).unwrap_or_else(|| format!("{:#x}", before.rip));
            format!("vCPU {number}: {}; a moment before at {before}", named(now))
        }
        [_, Some(Ok(now))] => format!("vCPU {number}: {}", named(now)),
    }
}
