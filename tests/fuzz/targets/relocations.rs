//! Relocation tables of any content.
//!
//! The first step of eight bytes says what the kernel is like and how it is loaded; the rest is the table.

#![no_main]

use halyard_fuzz::input::Step;
use halyard_fuzz::{relocations, seeds};

libfuzzer_sys::fuzz_target!(init: seeds::write("relocations"), |data: &[u8]| {
    if let Some((how, table)) = data.split_first_chunk() {
        relocations::load(Step::decode(*how), table);
    }
});
