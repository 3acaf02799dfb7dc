//! `halyard ctl top`: what the VM does, from its metrics.

mod figures;

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use api::VmInfo;
use devices::endpoint::terminal::RawTerminal;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::figures::{Figures, Sample};
use super::Ctl;
use super::failed::{Done, Failed};
use super::table::{Table, clean};

/// How long a picture stays.
const PERIOD: Duration = Duration::from_secs(1);
/// The other screen of the terminal, without a cursor, and back.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";

impl Ctl {
    /// Shows what the VM does, again and again at a terminal, else once.
    pub(super) fn top(&mut self) -> Done {
        if io::stdout().is_terminal() && self.output == super::Output::Table {
            return self.watch();
        }
        let (vm, sample) = self.look()?;
        let figures = Figures::new(&vm, &sample);
        self.answer(&figures, |figures| page(figures, ""))
    }

    fn look(&mut self) -> Done<(VmInfo, Sample)> {
        let vm = self.client.vm()?;
        Ok((vm, Sample::parse(&self.client.metrics()?)))
    }

    fn watch(&mut self) -> Done {
        let here = |error: io::Error| Failed::here(format!("the terminal: {error}"));
        let ending: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
        ending.thread_block().map_err(|error| here(error.into()))?;
        let ended = SignalFd::with_flags(&ending, SfdFlags::SFD_CLOEXEC).map_err(|error| here(error.into()))?;
        let (mut before, mut since) = (self.look()?.1, Instant::now());
        let screen = Screen::enter().map_err(here)?;
        loop {
            if wait(&ended, since + PERIOD).map_err(here)? {
                return Ok(());
            }
            let (vm, now) = self.look()?;
            let figures = Figures::new(&vm, &now.rates(&before, since.elapsed()));
            (before, since) = (now, Instant::now());
            screen.draw(&page(&figures, &self.name)).map_err(here)?;
        }
    }
}

/// Waits until `time`. Says whether it is to end before that: by a key, or a signal.
fn wait(ended: &SignalFd, time: Instant) -> io::Result<bool> {
    let stdin = io::stdin();
    let mut keys = true;
    loop {
        let mut waits = vec![PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        if keys {
            waits.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        let left = time.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut waits, timeout) {
            Ok(0) => return Ok(false),
            // It was stopped and goes on: its handler has made the terminal its own again.
            Err(Errno::EINTR) => continue,
            polled => polled?,
        };
        let ready = |index: usize| waits.get(index).and_then(PollFd::any).unwrap_or(false);
        if ready(0) {
            return Ok(true);
        }
        let mut bytes = [0; 64];
        let length = nix::unistd::read(stdin.as_fd(), &mut bytes)?;
        keys = length > 0;
        // q, Ctrl-c, Ctrl-d or Escape.
        if bytes.iter().take(length).any(|byte| matches!(byte, b'q' | b'Q' | 3 | 4 | 27)) {
            return Ok(true);
        }
    }
}

/// The terminal's other screen. Dropping it brings the first one back.
struct Screen {
    _keys: Option<RawTerminal>,
}

impl Screen {
    fn enter() -> io::Result<Self> {
        let keys = RawTerminal::enter(&io::stdin())?;
        let screen = Self { _keys: keys };
        print(ENTER)?;
        Ok(screen)
    }

    /// Draws a page, as much of it as there is room for.
    fn draw(&self, page: &str) -> io::Result<()> {
        let (columns, rows) = terminal_size::terminal_size()
            .map_or((80, 24), |(width, height)| (usize::from(width.0), usize::from(height.0)));
        let mut text = String::from("\x1b[H");
        for line in page.lines().take(rows) {
            text.extend(line.chars().take(columns));
            text.push_str("\x1b[K\r\n");
        }
        // Not a line more than there are: the screen must not move.
        text.truncate(text.len() - "\r\n".len());
        print(&(text + "\x1b[J"))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Where it is gone there is nothing to bring back.
        let _ = print(LEAVE);
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// A page of figures.
fn page(figures: &Figures, name: &str) -> String {
    let mut text = String::new();
    let Figures { phase, vcpus, memory_bytes, resident_bytes, .. } = figures;
    let name = if name.is_empty() { String::new() } else { format!("{}  ", clean(name)) };
    let (memory, resident) = (bytes(*memory_bytes), bytes(*resident_bytes));
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{name}{phase}  {vcpus} vCPUs  {memory} memory, {resident} resident");
    let per = if figures.rates { "/s" } else { "" };
    let title = |what: &str| format!("{what}{per}");
    let (run, steal) = if figures.rates { ("RUN %", "STEAL %") } else { ("RUN s", "STEAL s") };
    let time = |seconds: f64| {
        if figures.rates { format!("{:.1}", seconds * 100.0) } else { format!("{seconds:.3}") }
    };
    section(&mut text, &["VCPU", run, steal, &title("EXITS"), &title("I/O"), &title("MMIO"), &title("KICKS")], {
        figures.vcpu.iter().map(|one| {
            let counts = [one.exits, one.pio, one.mmio, one.kicks].map(count);
            [one.vcpu.clone(), time(one.run_seconds), time(one.steal_seconds)].into_iter().chain(counts).collect()
        })
    });
    let titles = ["READS", "WRITES", "READ B", "WRITTEN B", "FLUSHES", "ERRORS"].map(&title);
    let titles: Vec<&str> = ["DISK"].into_iter().chain(titles.iter().map(String::as_str)).collect();
    section(&mut text, &titles, {
        figures.disk.iter().map(|one| {
            let sizes = [one.read_bytes, one.written_bytes].map(bytes);
            let [read, written] = sizes;
            let numbers = [count(one.reads), count(one.writes), read, written, count(one.flushes), count(one.errors)];
            [one.device.clone()].into_iter().chain(numbers).collect()
        })
    });
    let titles = ["RX", "TX", "RX B", "TX B", "RX LOST", "TX LOST"].map(title);
    let titles: Vec<&str> = ["NET"].into_iter().chain(titles.iter().map(String::as_str)).collect();
    section(&mut text, &titles, {
        figures.net.iter().map(|one| {
            let packets = [one.rx_packets, one.tx_packets].map(count);
            let sizes = [one.rx_bytes, one.tx_bytes].map(bytes);
            let lost = [one.rx_dropped, one.tx_dropped].map(count);
            [one.device.clone()].into_iter().chain(packets).chain(sizes).chain(lost).collect()
        })
    });
    text
}

/// A table below the others, where it has rows.
fn section(text: &mut String, titles: &[&str], rows: impl Iterator<Item = Vec<String>>) {
    let mut table = Table::new(titles);
    let mut some = false;
    for row in rows {
        table.row(row);
        some = true;
    }
    if some {
        text.push('\n');
        *text += &table.text();
    }
}

fn count(number: f64) -> String {
    format!("{number:.0}")
}

/// A number of bytes, with three digits or a little more.
fn bytes(number: f64) -> String {
    let mut number = number;
    for unit in ["", "K", "M", "G", "T"] {
        if number < 1000.0 || unit == "T" {
            let digits = usize::from(!unit.is_empty() && number < 100.0);
            return format!("{number:.digits$}{unit}");
        }
        number /= 1024.0;
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (number, expected) in
            [(0.0, "0"), (999.0, "999"), (1024.0, "1.0K"), (102_400.0, "100K"), (67_108_864.0, "64.0M"), (1e15, "909T")]
        {
            assert_eq!(bytes(number), expected);
        }
    }
}
