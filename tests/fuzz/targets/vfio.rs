//! What a guest does to a function of the host's that it drives.

#![no_main]

use halyard_fuzz::{seeds, vfio};

libfuzzer_sys::fuzz_target!(init: seeds::write("vfio"), |data: &[u8]| vfio::run(data));
