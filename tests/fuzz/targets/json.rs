//! Bodies of requests of any text.

#![no_main]

use halyard_fuzz::{bodies, seeds};

libfuzzer_sys::fuzz_target!(init: seeds::write("json"), |input: &[u8]| bodies::read(input));
