//! What the guest of a function sees of it, and what the function of its guest. It is an NVMe disk's like.

use std::sync::Arc;

use proptest::prelude::*;

use super::testing::{Done, MSI, MSIX, PCIE, POWER, Played, Shown, VECTORS, disk};
use super::*;
use crate::pci::PciFunction;
use crate::seam::MsiMessage;
use crate::virtio::testing::FakeInterrupts;

const TABLE: u64 = 0x2000;
const PENDING: u64 = 0x3000;

struct Bench {
    function: VfioFunction,
    physical: Arc<Played>,
    interrupts: FakeInterrupts,
    shown: Shown,
}

fn bench() -> Bench {
    let (physical, interrupts, shown) = (Arc::new(Played::new(disk())), FakeInterrupts::new(), Shown::default());
    let seams = Seams { interrupts: Arc::new(interrupts.clone()), memory: Arc::new(shown.clone()) };
    let function = VfioFunction::new(physical.clone(), seams).unwrap();
    assert_eq!(physical.done(), [Done::Reset]);
    Bench { function, physical, interrupts, shown }
}

impl Bench {
    fn read<const N: usize>(&self, at: u16) -> [u8; N] {
        let mut bytes = [0; N];
        self.function.config_read(at, &mut bytes);
        bytes
    }
}

#[test]
fn the_guest_reads_who_it_is_and_nothing_that_leads_beyond_it() {
    let bench = bench();
    assert_eq!(bench.read(0), [0x36, 0x1b, 0x10, 0x00]);
    assert_eq!(bench.read(8), [0x02, 0x02, 0x08, 0x01]);
    assert_eq!(bench.read(4), [0, 5], "neither memory nor ports");
    assert_eq!(bench.read(0x0e), [0]);
    assert_eq!(u64::from_le_bytes(bench.read(0x10)), 4, "an address is the guest's");
    assert_eq!(bench.read(0x18), [0; 4]);
    assert_eq!(bench.read(0x30), [0; 4]);
    assert_eq!(bench.read(0x3c), [0, 0]);
    assert_eq!(bench.read(POWER), [0x01, 0x50, 0x03, 0, 0x08]);
    assert_eq!(bench.read(MSI), [0x05, 0x70, 0x86, 0x00], "no masks");
    assert_eq!(bench.read(MSIX), [0x11, 0x80, 4, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    assert_eq!(bench.read(PCIE), [0x10, 0x40, 2, 0]);
    assert_eq!(bench.read(0x100), [0; 8]);
    let bars = bench.function.bars().map(|bar| bar.map(|bar| bar.size));
    assert_eq!(bars, [Some(0x4000), None, None, Some(0x1000), None, None]);
}

#[test]
fn writes_reach_the_function_but_for_what_is_the_monitors() {
    let bench = bench();
    let write = |at: u16, data: &[u8]| {
        bench.function.config_write(at, data);
        bench.physical.done()
    };
    for kept in [0x10, 0x14, 0x24, 0x30, 0x3c, POWER + 4, MSI + 4, MSIX + 4, 0x100, 0xffc] {
        assert_eq!(write(kept, &[0xff, 0xff]), [], "{kept:#x}");
    }
    assert_eq!(bench.read(POWER + 4), [0x0b], "it says that it sleeps");
    // Memory stays on where it is mapped, and there are neither ports nor INTx.
    assert_eq!(write(4, &[0x05, 0]), [Done::Wrote(Region::Config, 4, vec![0x06, 4])]);
    assert!(!bench.function.memory_enabled());
    assert_eq!(write(4, &[0x06]), [Done::Wrote(Region::Config, 4, vec![0x06])]);
    assert!(bench.function.memory_enabled());
    assert_eq!(write(PCIE + 8, &[1, 2]), [Done::Wrote(Region::Config, (PCIE + 8).into(), vec![1, 2])]);
    // On both sides of what is kept.
    assert_eq!(write(0x0e, &[1, 2, 3, 4]), [Done::Wrote(Region::Config, 0x0e, vec![1, 2])]);
    assert_eq!(write(0x2e, &[1, 2, 3, 4]), [Done::Wrote(Region::Config, 0x2e, vec![1, 2])]);
}

#[test]
fn msix_vectors_are_routed_while_nothing_masks_them() {
    let bench = bench();
    let control = |value: u16| bench.function.config_write(MSIX + 2, &value.to_le_bytes());
    let table = |vector: u64, field: u64, value: u32| {
        bench.function.bar_write(0, TABLE + vector * 16 + field, &value.to_le_bytes());
    };
    control(0xc000);
    assert_eq!(bench.physical.done(), [Done::Signals(Signals::Msix, usize::from(VECTORS))]);
    table(1, 0, 0xfee0_1000);
    table(1, 8, 0x41);
    table(1, 12, 0);
    assert_eq!(bench.interrupts.message(1), None, "the function masks all");
    control(0x8000);
    assert_eq!(bench.interrupts.message(1), Some(MsiMessage { address: 0xfee0_1000, data: 0x41 }));
    table(1, 12, 1);
    assert_eq!(bench.interrupts.message(1), None, "a route would let what is masked through");
    table(1, 12, 0);
    assert!(bench.interrupts.message(1).is_some());
    let mut entry = [0; 16];
    bench.function.bar_read(0, TABLE + 16, &mut entry[..8]);
    assert_eq!(entry[..4], 0xfee0_1000_u32.to_le_bytes());
    bench.function.bar_read(0, PENDING, &mut entry[..8]);
    assert_eq!(entry[..8], [0; 8]);
    assert_eq!(bench.physical.done(), [], "the table is the monitor's");
    control(0);
    assert_eq!(bench.interrupts.message(1), None);
    assert_eq!(bench.physical.done(), [Done::Signals(Signals::Msix, 0)]);
    bench.function.bar_write(0, PENDING, &[0xff; 8]);
    assert_eq!(bench.physical.done(), []);
    bench.function.bar_write(0, 0x10, &[1, 2, 3, 4]);
    assert_eq!(bench.physical.done(), [Done::Wrote(Region::Bar(0), 0x10, vec![1, 2, 3, 4])]);
}

#[test]
fn msi_has_as_many_messages_as_the_guest_wants_and_may_have() {
    let bench = bench();
    bench.function.config_write(MSI + 4, &0xfee0_2003_u64.to_le_bytes());
    bench.function.config_write(MSI + 12, &0x4321_u16.to_le_bytes());
    bench.function.config_write(MSI + 2, &[0x21, 0]); // four
    assert_eq!(bench.physical.done(), [Done::Signals(Signals::Msi, 4)]);
    let message = |number| bench.interrupts.message(number).unwrap();
    assert_eq!(message(0), MsiMessage { address: 0xfee0_2000, data: 0x4320 });
    assert_eq!(message(3), MsiMessage { address: 0xfee0_2000, data: 0x4323 });
    bench.function.config_write(MSI + 12, &0x50_u16.to_le_bytes());
    assert_eq!((message(1).data, bench.physical.done()), (0x51, vec![]));
    bench.function.config_write(MSI + 2, &[0x71, 0]);
    let done = [Done::Signals(Signals::Msi, 0), Done::Signals(Signals::Msi, 8)];
    assert_eq!(bench.physical.done(), done, "no more than it is capable of");
    bench.function.config_write(MSI + 2, &[0x70, 0]);
    assert_eq!(bench.physical.done(), [Done::Signals(Signals::Msi, 0)]);
}

#[test]
fn its_memory_is_the_guests_but_for_the_pages_of_msix_and_follows_the_guest() {
    let bench = bench();
    bench.function.bar_mapped(0, Some(0x10_0000_0000));
    assert_eq!(bench.shown.parts(), [(0x10_0000_0000, 0x2000)]);
    bench.function.bar_mapped(0, Some(0x20_0000_0000));
    bench.function.bar_mapped(3, Some(0xd000_0000));
    assert_eq!(bench.shown.parts(), [(0x20_0000_0000, 0x2000)]);
    bench.function.bar_mapped(0, None);
    assert_eq!(bench.shown.parts(), []);
    bench.function.bar_mapped(0, Some(0x1000));
    let Bench { function, shown, .. } = bench;
    drop(function);
    assert_eq!(shown.parts(), []);
}

#[test]
fn a_function_that_is_stopped_is_reset_and_interrupts_nobody() {
    let bench = bench();
    bench.function.config_write(MSIX + 2, &0x8000_u16.to_le_bytes());
    bench.physical.done();
    bench.function.stop();
    let quiet = Done::Wrote(Region::Config, 4, vec![2, 4]);
    assert_eq!(bench.physical.done(), [quiet, Done::Reset, Done::Signals(Signals::Msix, 0)]);
    let physical = bench.physical.clone();
    drop(bench);
    assert_eq!(physical.done(), [], "it is stopped once");
}

proptest! {
    #[test]
    fn no_access_panics_or_changes_what_is_the_monitors(
        accesses in proptest::collection::vec(
            (any::<bool>(), 0..4096_u16, 0..0x4000_u64, proptest::collection::vec(any::<u8>(), 1..9)), 0..60
        )
    ) {
        let bench = bench();
        for (config, register, offset, mut data) in accesses {
            let register = register.min(4096 - 8);
            if config {
                bench.function.config_write(register, &data);
                bench.function.config_read(register, &mut data);
            } else {
                let offset = offset.min(0x4000 - 8);
                bench.function.bar_write(0, offset, &data);
                bench.function.bar_read(0, offset, &mut data);
            }
        }
        for done in bench.physical.done() {
            let Done::Wrote(Region::Config, at, data) = done else { continue };
            for (at, byte) in (at..).zip(data) {
                let kept = [(0x10, 24), (0x30, 4), (0x3c, 2), (POWER + 4, 4), (MSI, 14), (MSIX, 12)];
                let is_kept = kept.iter().any(|(start, len)| (u64::from(*start)..u64::from(start + len)).contains(&at));
                prop_assert!(!is_kept && at < 256, "byte {:#x} was written", at);
                prop_assert!(at != 4 || byte & 3 == 2, "memory on, ports off");
                prop_assert!(at != 5 || byte & 4 == 4, "INTx off");
            }
        }
    }
}
