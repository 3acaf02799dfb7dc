//! When this process began.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Units of time in `/proc` (USER_HZ), which is the same on all of Linux's platforms that matter here.
const TICK: Duration = Duration::from_millis(10);

/// How long ago this process began, as far as it can tell.
///
/// Until the guest's machine is made there is one thread, and it hardly waits: the processor time that it has used is
/// the time since exec, less what it waited, as for its own pages. `/proc/self/stat` knows the start within one tick of
/// 10 ms, which limits the error.
pub fn since_exec() -> Duration {
    let used = clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map(Duration::from).unwrap_or_default();
    match since_start_tick() {
        // The start lies within the tick: between `since` and a tick less ago.
        Some(since) => used.clamp(since.saturating_sub(TICK), since),
        None => used,
    }
}

/// How long ago the tick began in which this process did.
fn since_start_tick() -> Option<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is a name in parentheses, which may have anything in it; the start is field 22 (proc(5)).
    let ticks: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
    let now: Duration = clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?.into();
    now.checked_sub(TICK.checked_mul(ticks)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lies_in_the_tick_that_the_kernel_names() {
        let tick = since_start_tick().expect("/proc/self/stat");
        let since = since_exec();
        assert!(since <= tick + TICK && since + TICK * 2 >= tick, "{since:?} for {tick:?}");
    }
}
