//! Kernel files of any content.
//!
//! The first step of eight bytes says how the file is loaded; the rest is the file.

#![no_main]

use halyard_fuzz::input::Step;
use halyard_fuzz::{kernel, seeds};

libfuzzer_sys::fuzz_target!(init: seeds::write("kernel"), |data: &[u8]| {
    if let Some((how, file)) = data.split_first_chunk() {
        kernel::load(Step::decode(*how), file);
    }
});
