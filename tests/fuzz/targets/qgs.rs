//! What the quote service answers.
//!
//! The first byte says what it was asked and in how large pieces it answers; the rest is what it sends.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::{quotes, seeds};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

libfuzzer_sys::fuzz_target!(init: seeds::write("qgs"), |data: &[u8]| quotes::answered(data));
