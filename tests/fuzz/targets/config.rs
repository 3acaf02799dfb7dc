//! Configurations of any text.

#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| halyard_fuzz::configuration::read(text));
