//! A guest that drives a function of the host's, whose configuration space says what it likes, too.

use std::sync::Arc;

use devices::pci::PciFunction;
use devices::vfio::testing::{Done, Played, Shown};
use devices::vfio::{Region, Seams, VfioFunction};
use devices::virtio::testing::FakeInterrupts;

use crate::input::{Step, steps, width};

/// Bytes of the function's own configuration space, with which an input begins.
pub const CONFIG: usize = 256;

/// Operations, by their number.
pub mod ops {
    /// Writes configuration space: register in both first operands, width, value.
    pub const WRITE: u8 = 0;
    /// Reads it.
    pub const READ: u8 = 1;
    /// Accesses memory of a register: register and 0x80 to write, -, width, offset.
    pub const MEMORY: u8 = 2;
    /// Has memory of a register answer somewhere, or nowhere: register, 0 for nowhere, -, address in pages.
    pub const MAP: u8 = 3;
    /// How many there are.
    pub const COUNT: u8 = 4;
}

/// Carries out a program behind a configuration space, and sees what reached the function.
pub fn run(data: &[u8]) {
    let Some((config, program)) = data.split_at_checked(CONFIG) else { return };
    let (physical, shown) = (Arc::new(Played::new(config.to_vec())), Shown::default());
    let seams = Seams { interrupts: Arc::new(FakeInterrupts::new()), memory: Arc::new(shown.clone()) };
    let function = VfioFunction::new(physical.clone(), seams).expect("its memory can be mapped");
    for step in steps(program).take(128) {
        self::step(&function, step);
    }
    for (address, len) in shown.parts() {
        assert!(address % 4096 == 0 && (4096..=0x4000).contains(&len), "{len:#x} bytes at {address:#x}");
    }
    for done in physical.done() {
        if let Done::Wrote(Region::Config, at, bytes) = done {
            check(at, &bytes);
        }
    }
    function.stop();
    drop(function);
    assert!(shown.parts().is_empty(), "memory of a function that is gone is shown");
}

fn step(function: &VfioFunction, step: Step) {
    let Step { a, b, c, d, .. } = step;
    let mut data = (u64::from(d) | u64::from(!d) << 32).to_le_bytes();
    let data = &mut data[..width(c)];
    let length = u16::try_from(data.len()).expect("a width");
    let bars = function.bars();
    let index = usize::from(a & 0x7f) % bars.len();
    match step.op % ops::COUNT {
        ops::WRITE => function.config_write((step.ab() & 0xfff).min(4096 - length), data),
        ops::READ => function.config_read((step.ab() & 0xfff).min(4096 - length), data),
        ops::MEMORY => {
            let Some(bar) = bars[index] else { return };
            let Some(last) = bar.size.checked_sub(length.into()) else { return };
            match a & 0x80 {
                0 => function.bar_read(index, u64::from(d) % (last + 1), data),
                _ => function.bar_write(index, u64::from(d) % (last + 1), data),
            }
        }
        _ => {
            let at = bars[index].filter(|_| b != 0).map(|bar| (u64::from(d) << 12) / bar.size * bar.size);
            function.bar_mapped(index, at);
        }
    }
}

/// What a guest wrote to a function's own configuration space moves nothing, and leaves ports and INTx off.
fn check(at: u64, bytes: &[u8]) {
    for (at, byte) in (at..).zip(bytes) {
        assert!(!(0x10..0x28).contains(&at) && !(0x30..0x34).contains(&at) && at < 256, "byte {at:#x} was written");
        assert!(at != 4 || byte & 3 == 2, "memory on, ports off");
        assert!(at != 5 || byte & 4 != 0, "INTx off");
    }
}
