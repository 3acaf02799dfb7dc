//! Descriptors and threads of this process: what one input opens must be gone before the next.

use std::cell::Cell;
use std::fs;
use std::thread;
use std::time::{Duration, Instant};

thread_local! {
    static INPUTS: Cell<u32> = const { Cell::new(0) };
    static FIRST: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
}

/// Inputs before the first count: statics are made by then.
const WARM_UP: u32 = 16;
/// Inputs between two counts.
const INTERVAL: u32 = 256;

/// Counts now and then, and panics where there are more than at first.
pub fn take() {
    let inputs = INPUTS.get() + 1;
    INPUTS.set(inputs);
    if inputs < WARM_UP || !inputs.is_multiple_of(if FIRST.get().is_none() { 1 } else { INTERVAL }) {
        return;
    }
    let Some(first) = FIRST.get() else {
        FIRST.set(Some(count()));
        return;
    };
    // A thread that was joined may be seen for a moment more.
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let now = count();
        if now.0 <= first.0 && now.1 <= first.1 {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "descriptors and threads: {first:?} at first, {now:?} after {inputs} inputs"
        );
        thread::yield_now();
    }
}

/// Descriptors and threads.
fn count() -> (usize, usize) {
    let entries = |path| fs::read_dir(path).map_or(0, Iterator::count);
    (entries("/proc/self/fd"), entries("/proc/self/task"))
}
