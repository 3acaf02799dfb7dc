//! A boot as data: what the JSON file holds, and the picture is drawn from.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use super::recorder::{Mark, Phase, Reason};
use super::{Milestone, Outputs, View, names, picture};

/// The version of the report's format.
const VERSION: u32 = 1;

/// A boot from exec to user space, or as far as it came. Times are in microseconds since exec.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Version of this format.
    pub version: u32,
    /// Version of the monitor.
    pub halyard: &'static str,
    /// How many vCPUs there are.
    pub vcpus: usize,
    /// Whether user space was reached.
    pub user_space: bool,
    /// When that was, or else when the observation ended.
    pub end_us: u64,
    /// Why user space was not reached, where that was to be found out.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub diagnosis: Vec<String>,
    /// In the order in which they were reached.
    pub milestones: Vec<Step>,
    /// All devices, in the order of the configuration.
    pub devices: Vec<Device>,
    /// From each milestone to the next.
    pub phases: Vec<Stretch>,
    /// From the first entry on.
    pub guest: Exits,
}

/// A milestone that was reached.
#[derive(Debug, Clone, Serialize)]
pub struct Step {
    /// Which.
    pub name: &'static str,
    /// The device it is about, or what told of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub subject: Option<String>,
    /// When.
    pub at_us: u64,
}

/// A device of the configuration.
#[derive(Debug, Clone, Serialize)]
pub struct Device {
    /// Its id.
    pub id: String,
    /// When its driver began to run it, if it did.
    pub driver_ok_us: Option<u64>,
}

/// The time from a milestone to the next.
#[derive(Debug, Clone, Serialize)]
pub struct Stretch {
    /// The milestone at its beginning.
    pub after: String,
    /// When it began.
    pub from_us: u64,
    /// How long it was.
    pub us: u64,
    /// What the guest exited for.
    #[serde(flatten)]
    pub exits: Exits,
}

/// What a guest exited for.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Exits {
    /// Exits that the monitor answered. An instruction that accesses several elements counts as that many.
    pub exits: u64,
    /// The same by reason.
    pub by_reason: BTreeMap<&'static str, u64>,
    /// The same by what was accessed, most first.
    pub by_place: Vec<Place>,
    /// What the hypervisor itself counted, where it does: its `exits` are all, those that it answers by itself too.
    pub hypervisor: BTreeMap<String, u64>,
}

/// Something that a guest accessed.
#[derive(Debug, Clone, Serialize)]
pub struct Place {
    /// How.
    pub reason: &'static str,
    /// What it is.
    pub name: String,
    /// The port, or the first address of the page, or the vector.
    pub address: String,
    /// How often.
    pub count: u64,
}

impl Report {
    /// Of what was noted until `end`.
    pub fn new(view: &View, marks: &[Mark], phases: &[Phase], vcpus: usize, end: Duration) -> Self {
        let user_space = marks.iter().rfind(|mark| matches!(mark.milestone, Milestone::UserSpace(_)));
        let end = user_space.map_or(end, |mark| mark.at);
        let steps = marks.iter().map(|mark| Step {
            name: mark.milestone.name(),
            subject: mark.milestone.subject().map(str::to_owned),
            at_us: micros(mark.at),
        });
        let devices = view.functions.iter().map(|(id, _)| {
            let ok = marks.iter().find(|mark| mark.milestone == Milestone::DriverOk(id.clone()));
            Device { id: id.clone(), driver_ok_us: ok.map(|mark| micros(mark.at)) }
        });
        let mut stretches = Vec::new();
        let mut before = &BTreeMap::new();
        for (index, (mark, phase)) in marks.iter().zip(phases).enumerate() {
            let until = marks.get(index + 1).map_or(end, |next| next.at);
            if matches!(mark.milestone, Milestone::UserSpace(_)) {
                break;
            }
            stretches.push(Stretch {
                after: mark.milestone.to_string(),
                from_us: micros(mark.at),
                us: micros(until.saturating_sub(mark.at)),
                exits: exits(view, phase, before),
            });
            before = &phase.counters;
        }
        Self {
            version: VERSION,
            halyard: env!("CARGO_PKG_VERSION"),
            vcpus,
            user_space: user_space.is_some(),
            end_us: micros(end),
            diagnosis: Vec::new(),
            milestones: steps.collect(),
            devices: devices.collect(),
            guest: sum(stretches.iter().map(|stretch| &stretch.exits)),
            phases: stretches,
        }
    }
}

impl Outputs {
    /// Writes the report and its picture.
    ///
    /// # Errors
    /// Those of the files.
    pub fn write(self, report: &Report) -> io::Result<()> {
        let Self { mut json, mut svg } = self;
        let text = serde_json::to_string_pretty(report)? + "\n";
        json.write_all(text.as_bytes())?;
        svg.write_all(picture::draw(report).as_bytes())
    }
}

/// Microseconds, of times that are far below their range.
fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The exits of a phase, with what the hypervisor counted since `before`.
fn exits(view: &View, phase: &Phase, before: &BTreeMap<String, u64>) -> Exits {
    let mut exits = Exits::default();
    let mut places: BTreeMap<(Reason, u64), u64> = BTreeMap::new();
    places.extend(phase.exits.iter());
    for ((reason, address), count) in places {
        exits.exits += count;
        *exits.by_reason.entry(reason.name()).or_default() += count;
        let name = names::place(view, reason, address);
        exits.by_place.push(Place { reason: reason.name(), name, address: format!("{address:#x}"), count });
    }
    exits.by_place.sort_by_key(|place| std::cmp::Reverse(place.count));
    for (name, value) in &phase.counters {
        let grown = value.saturating_sub(before.get(name).copied().unwrap_or(0));
        if grown > 0 {
            exits.hypervisor.insert(name.clone(), grown);
        }
    }
    exits
}

fn sum<'a>(all: impl Iterator<Item = &'a Exits>) -> Exits {
    let mut total = Exits::default();
    let mut places: BTreeMap<(&'static str, &str, &str), u64> = BTreeMap::new();
    for exits in all {
        total.exits += exits.exits;
        for (reason, count) in &exits.by_reason {
            *total.by_reason.entry(reason).or_default() += count;
        }
        for (name, count) in &exits.hypervisor {
            *total.hypervisor.entry(name.clone()).or_default() += count;
        }
        for place in &exits.by_place {
            *places.entry((place.reason, &place.name, &place.address)).or_default() += place.count;
        }
    }
    let place = |((reason, name, address), count): ((_, &str, &str), _)| Place {
        reason,
        name: name.into(),
        address: address.into(),
        count,
    };
    total.by_place = places.into_iter().map(place).collect();
    total.by_place.sort_by_key(|place| std::cmp::Reverse(place.count));
    total
}
