//! A trust domain's calls for quotes: one behind the other, each of address, length, header, and which pages are private
//! then and later.

#![no_main]

use halyard_fuzz::{quotes, seeds};

libfuzzer_sys::fuzz_target!(init: seeds::write("quote"), |data: &[u8]| quotes::call(data));
