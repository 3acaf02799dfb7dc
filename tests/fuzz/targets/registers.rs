//! What a guest can do to the platform's registers outside PCI: serial port, I/O APIC, power management and the rest.

#![no_main]

use halyard_fuzz::input::steps;
use halyard_fuzz::platform::Platform;
use halyard_fuzz::seeds;

libfuzzer_sys::fuzz_target!(init: seeds::write("registers"), |data: &[u8]| {
    let mut platform = Platform::new();
    steps(data).take(256).for_each(|step| platform.step(step));
    platform.finish();
});
