//! Configurations of any text.

#![no_main]

use halyard_fuzz::{configuration, seeds};

libfuzzer_sys::fuzz_target!(init: seeds::write("config"), |text: &str| configuration::read(text));
