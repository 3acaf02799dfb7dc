//! A firmware's keys and an executable's signature.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::{authority, seeds};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

libfuzzer_sys::fuzz_target!(init: seeds::write("authority"), |data: &[u8]| authority::look_for_a_key(data));
