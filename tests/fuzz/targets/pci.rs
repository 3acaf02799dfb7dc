//! What a guest can do to PCI configuration space: accesses of all widths, registers that move over one another.

#![no_main]

use halyard_fuzz::functions::Segment;
use halyard_fuzz::input::steps;
use halyard_fuzz::seeds;

libfuzzer_sys::fuzz_target!(init: seeds::write("pci"), |data: &[u8]| {
    let mut segment = Segment::new();
    steps(data).take(128).for_each(|step| segment.step(step));
    segment.finish();
});
