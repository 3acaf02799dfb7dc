//! What clients of the API can send, in pieces, and with descriptors.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::{http, seeds};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

fn begin() {
    seeds::write("http");
    http::warm_up();
}

libfuzzer_sys::fuzz_target!(init: begin(), |input: &[u8]| http::talk(input));
