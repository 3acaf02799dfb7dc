//! Firmware for trust domains, of any content.
//!
//! The first byte is the guest's memory in MiB; the rest is the end of the file.

#![no_main]

use halyard_fuzz::allocated::Counted;
use halyard_fuzz::{seeds, tdvf};

#[global_allocator]
static ALLOCATOR: Counted = Counted;

libfuzzer_sys::fuzz_target!(init: seeds::write("tdvf"), |data: &[u8]| {
    if let Some((mib, content)) = data.split_first() {
        tdvf::plan_and_measure(*mib, content);
    }
});
