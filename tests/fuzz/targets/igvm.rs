//! IGVM files of any content.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::{igvm, seeds};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

libfuzzer_sys::fuzz_target!(init: seeds::write("igvm"), |data: &[u8]| igvm::plan_and_measure(data));
