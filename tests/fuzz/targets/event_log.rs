//! A guest's event log of any content.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::{event_log, seeds};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

libfuzzer_sys::fuzz_target!(init: seeds::write("event_log"), |data: &[u8]| event_log::read_and_compare(data));
