//! What a guest does to the firmware configuration device.

#![no_main]

use halyard_fuzz::{fw_cfg, seeds};

libfuzzer_sys::fuzz_target!(init: seeds::write("fw_cfg"), |data: &[u8]| fw_cfg::run(data));
