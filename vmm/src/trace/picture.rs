//! The report as a picture (SVG 1.1): a bar for each phase along the time, and one for each thing that was accessed
//! often.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::report::{Exits, Report};

/// All lengths are in pixels.
const WIDTH: u64 = 1100;
const LINE: u64 = 20;
/// Where bars begin and how long the longest is; text stands before and behind them.
const BARS_FROM: u64 = 290;
const BARS: u64 = 560;
/// The most bars of things accessed, and of the hypervisor's counters.
const MOST_ROWS: usize = 20;

const TIME: &str = "#4878a8";
const MONITOR: &str = "#c06848";
const HYPERVISOR: &str = "#789850";

struct Canvas {
    text: String,
    y: u64,
}

/// Draws the report.
pub fn draw(report: &Report) -> String {
    let mut canvas = Canvas { text: String::new(), y: LINE };
    let end = match report.user_space {
        true => format!("user space after {}", time(report.end_us)),
        false => format!("no user space within {}", time(report.end_us)),
    };
    let vcpus = if report.vcpus == 1 { "1 vCPU".to_owned() } else { format!("{} vCPUs", report.vcpus) };
    canvas.heading(&format!("Boot: {end}, {vcpus}"));
    for phase in &report.phases {
        let note = time(phase.us) + &exits(&phase.exits);
        let (from, length) = (scale(phase.from_us, report.end_us), scale(phase.us, report.end_us));
        canvas.bar(&format!("{}  {}", time(phase.from_us), phase.after), (from, length), TIME, &note);
    }
    canvas.heading(&format!("Exits to the monitor: {}", report.guest.exits));
    canvas.chart(&places(&report.guest), MONITOR);
    if !report.guest.hypervisor.is_empty() {
        canvas.heading("Counted by the hypervisor");
        let mut counters: Vec<_> = report.guest.hypervisor.iter().map(|(name, count)| (name.clone(), *count)).collect();
        counters.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        canvas.chart(&counters, HYPERVISOR);
    }
    let height = canvas.y + LINE / 2;
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n{}</svg>\n",
        canvas.text
    )
}

/// What was accessed, all its addresses together, most first.
fn places(exits: &Exits) -> Vec<(String, u64)> {
    let mut sums = BTreeMap::new();
    for place in &exits.by_place {
        // Linux looks at all functions that there could be: they are one row.
        let name = if place.name.starts_with("ecam ") { "ecam" } else { &place.name };
        *sums.entry(format!("{} {name}", place.reason)).or_default() += place.count;
    }
    let mut sums: Vec<_> = sums.into_iter().collect();
    sums.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    sums
}

fn exits(exits: &Exits) -> String {
    match exits.hypervisor.get("exits") {
        Some(all) => format!(", {all} exits, {} to the monitor", exits.exits),
        None if exits.exits > 0 => format!(", {} exits to the monitor", exits.exits),
        None => String::new(),
    }
}

impl Canvas {
    fn heading(&mut self, text: &str) {
        self.y += LINE / 2;
        self.put(10, "font-size=\"15\" font-weight=\"bold\"", text);
        self.y += LINE;
    }

    fn chart(&mut self, rows: &[(String, u64)], colour: &str) {
        let most = rows.first().map_or(1, |(_, count)| *count);
        for (name, count) in rows.iter().take(MOST_ROWS) {
            self.bar(name, (0, scale(*count, most)), colour, &count.to_string());
        }
        if let Some(rest) = rows.get(MOST_ROWS..).filter(|rest| !rest.is_empty()) {
            let count: u64 = rest.iter().map(|(_, count)| count).sum();
            self.bar(&format!("{} more", rest.len()), (0, scale(count.min(most), most)), colour, &count.to_string());
        }
    }

    /// A line of the picture: text, a bar from and of a length, and text behind it.
    fn bar(&mut self, label: &str, (from, length): (u64, u64), colour: &str, note: &str) {
        let (x, y) = (BARS_FROM + from, self.y.saturating_sub(LINE / 2));
        let (width, height) = (length.max(1), LINE - 6);
        self.put(10, "", label);
        // Writing to a string does not fail.
        let _ =
            writeln!(self.text, "<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{colour}\"/>");
        match x + width > BARS_FROM + BARS * 2 / 3 {
            // It would run out of the picture.
            true => self.put(x.saturating_sub(6), "text-anchor=\"end\"", note),
            false => self.put(x + width + 6, "", note),
        }
        self.y += LINE;
    }

    fn put(&mut self, x: u64, attributes: &str, text: &str) {
        let text = text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        let _ = writeln!(self.text, "<text x=\"{x}\" y=\"{}\" {attributes}>{text}</text>", self.y);
    }
}

fn scale(value: u64, most: u64) -> u64 {
    let scaled = u128::from(value.min(most)) * u128::from(BARS) / u128::from(most.max(1));
    u64::try_from(scaled).unwrap_or(BARS)
}

fn time(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{}.{:02} ms", micros / 1000, micros % 1000 / 10),
        10_000..1_000_000 => format!("{} ms", micros / 1000),
        _ => format!("{}.{:02} s", micros / 1_000_000, micros % 1_000_000 / 10_000),
    }
}
