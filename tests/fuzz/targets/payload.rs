//! Payloads of any content, in bzImages whose headers lie.
//!
//! The first step of eight bytes says what the header says; the rest is the payload.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::input::Step;
use halyard_fuzz::{payload, seeds};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

libfuzzer_sys::fuzz_target!(init: seeds::write("payload"), |data: &[u8]| {
    if let Some((how, content)) = data.split_first_chunk() {
        payload::unpack_from_bzimage(Step::decode(*how), content);
    }
});
