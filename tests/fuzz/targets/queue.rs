//! What a guest can do to a virtio device through its queues and registers: each kind of device, with its worker.
//!
//! The first step chooses the device, and whether the program starts with queues that run.

#![no_main]

use halyard_fuzz::guest::{Guest, ops};
use halyard_fuzz::hosts::{self, host};
use halyard_fuzz::input::{Step, steps};
use halyard_fuzz::{census, layout, seeds};

/// Steps after which a program is cut off.
const MAX_STEPS: usize = 96;

fn begin() {
    seeds::write("queue");
    hosts::warm_up();
}

libfuzzer_sys::fuzz_target!(init: begin(), |data: &[u8]| {
    let mut program = steps(data).take(MAX_STEPS);
    let Some(first) = program.next() else { return };
    let mut guest = Guest::new(host(first.op));
    if first.a & 1 == 0 {
        guest.step(Step::new(ops::NEGOTIATE, 0, 0, first.b, !first.d));
        for queue in 0..layout::QUEUES {
            guest.step(Step::new(ops::QUEUE, queue, 4, 0, 0));
        }
        guest.step(Step { op: ops::RUN, ..Step::default() });
    }
    program.for_each(|step| guest.step(step));
    guest.finish();
    census::take();
});
