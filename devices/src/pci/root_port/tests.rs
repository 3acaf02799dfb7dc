use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress, MmapRegion};

use super::*;
use crate::virtio::testing::FakeInterrupts;

/// What a port's indicator was seen to show.
#[derive(Default)]
struct Seen(Mutex<Vec<(u8, Indicator)>>);

impl SlotObserver for Seen {
    fn indicator(&self, port: u8, shows: Indicator) {
        self.0.lock().unwrap().push((port, shows));
    }
}

struct Bench {
    interrupts: FakeInterrupts,
    seen: Arc<Seen>,
    port: RootPort,
}

/// Offsets of the capabilities.
const PCIE: u16 = 0x40;
const MSI: u16 = 0x7c;
const STATUS: u16 = PCIE + SLOT_STATUS;
const CONTROL: u16 = PCIE + SLOT_CONTROL;

impl Bench {
    fn new() -> Self {
        let (interrupts, seen) = (FakeInterrupts::new(), Arc::new(Seen::default()));
        let port = RootPort::new(4, Arc::new(interrupts.clone()), seen.clone()).unwrap();
        port.assign(5, &(0xc080_0000..0xc0a0_0000), &(0x40_0000_0000..0x48_0000_0000));
        Self { interrupts, seen, port }
    }

    fn word(&self, offset: u16) -> u16 {
        let mut data = [0; 2];
        self.port.config_read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    fn dword(&self, offset: u16) -> u32 {
        u32::from(self.word(offset + 2)) << 16 | u32::from(self.word(offset))
    }

    fn write(&self, offset: u16, value: u16) {
        self.port.config_write(offset, &value.to_le_bytes());
    }

    /// What Linux's driver sets: a message, and interrupts for the button and the link.
    fn enable(&self) {
        self.port.config_write(MSI + 4, &0xfee0_1000_u32.to_le_bytes());
        self.write(MSI + 12, 0x41);
        self.write(MSI + 2, MSI_ENABLE);
        let indicator = self.word(CONTROL) & INDICATOR;
        self.write(CONTROL, indicator | BUTTON_ENABLE | HOT_PLUG_INTERRUPT | LINK_ENABLE);
    }

    fn show(&self, indicator: Indicator) {
        let control = self.word(CONTROL) & !INDICATOR;
        self.write(CONTROL, control | indicator.bits());
    }
}

#[test]
fn the_header_is_a_bridges_with_a_hot_plug_slot() {
    let bench = Bench::new();
    assert_eq!((bench.dword(0x00), bench.dword(0x08)), (0x000c_1b36, 0x0604_0000));
    assert_eq!((bench.word(0x0e), bench.dword(0x18)), (1, 0x0005_0500));
    assert_eq!((bench.dword(0x1c), bench.dword(0x20), bench.dword(0x24)), (0, 0xc090_c080, 0xfff1_0001));
    assert_eq!((bench.dword(0x28), bench.dword(0x2c)), (0x40, 0x47));
    assert_eq!(bench.dword(PCIE), 0x0142_7c10, "a root port with a slot");
    assert_eq!(bench.dword(PCIE + 0x0c), 0x0410_0011);
    assert_eq!(bench.dword(PCIE + 0x14), 5 << 19 | 1 << 18 | 0x71, "slot 5, no command completed");
    assert_eq!((bench.dword(MSI), bench.word(CONTROL), bench.word(STATUS)), (0x0080_0005, 0x0300, 0));
}

#[test]
fn a_device_that_comes_is_told_once_until_its_events_are_cleared() {
    let bench = Bench::new();
    bench.enable();
    assert_eq!((bench.interrupts.message(0).unwrap().data, bench.port.bus()), (0x41, None));
    bench.port.insert(false);
    assert_eq!(bench.word(STATUS), OCCUPIED | PRESENCE | LINK_CHANGED);
    assert_eq!((bench.word(PCIE + LINK_STATUS), bench.port.bus()), (LINK_UP, Some(5)));
    assert_eq!(bench.interrupts.take(0), 1);
    bench.port.press();
    assert_eq!(bench.interrupts.take(0), 0, "an event waits already");
    bench.write(STATUS, PRESENCE | LINK_CHANGED);
    assert_eq!((bench.word(STATUS), bench.interrupts.take(0)), (OCCUPIED | BUTTON, 0));
    bench.write(STATUS, BUTTON);
    bench.port.press();
    assert_eq!(bench.interrupts.take(0), 1);
    bench.write(STATUS, 0xffff);
    bench.port.take_out();
    assert_eq!((bench.word(STATUS), bench.word(PCIE + LINK_STATUS)), (PRESENCE | LINK_CHANGED, 0));
    assert_eq!(bench.interrupts.take(0), 1);
}

#[test]
fn an_event_waits_for_the_driver() {
    let bench = Bench::new();
    bench.port.insert(false);
    bench.port.press();
    assert_eq!(bench.interrupts.count(), 0, "no interrupt is made before it is wanted");
    bench.enable();
    assert_eq!(bench.interrupts.take(0), 1);
    bench.write(MSI + 2, 0);
    assert_eq!(bench.interrupts.message(0), None);
    bench.write(MSI + 2, MSI_ENABLE);
    assert_eq!(bench.interrupts.take(0), 1, "what is unmasked while an event waits interrupts (§6.7.3.4)");
}

#[test]
fn presence_alone_interrupts_only_who_wants_it() {
    let bench = Bench::new();
    bench.enable();
    bench.write(CONTROL, HOT_PLUG_INTERRUPT | BUTTON_ENABLE);
    bench.port.insert(false);
    assert_eq!(bench.interrupts.take(0), 0);
    bench.write(CONTROL, HOT_PLUG_INTERRUPT | PRESENCE_ENABLE);
    assert_eq!(bench.interrupts.take(0), 1);
}

#[test]
fn a_device_that_was_there_before_the_guest_is_in_use() {
    let bench = Bench::new();
    bench.port.insert(true);
    assert_eq!((bench.word(STATUS), bench.port.indicator()), (OCCUPIED, Indicator::On));
    bench.enable();
    assert_eq!(bench.interrupts.take(0), 0, "there is no news");
}

#[test]
fn the_indicator_is_told_when_it_changes() {
    let bench = Bench::new();
    bench.show(Indicator::Blinking);
    bench.show(Indicator::Blinking);
    bench.write(CONTROL, 0);
    assert_eq!(bench.port.indicator(), Indicator::Blinking, "the reserved value changes nothing");
    bench.show(Indicator::On);
    bench.port.config_write(CONTROL, &[0]);
    let seen = bench.seen.0.lock().unwrap();
    assert_eq!(*seen, [(4, Indicator::Blinking), (4, Indicator::On)]);
}

#[test]
fn the_link_can_be_switched_off() {
    let bench = Bench::new();
    bench.enable();
    bench.port.insert(true);
    bench.write(PCIE + LINK_CONTROL, LINK_DISABLE);
    assert_eq!((bench.port.bus(), bench.word(STATUS)), (None, OCCUPIED | LINK_CHANGED));
    assert_eq!(bench.interrupts.take(0), 1);
    bench.write(PCIE + LINK_CONTROL, 0);
    assert_eq!(bench.port.bus(), Some(5));
}

#[test]
fn addresses_pass_only_through_a_window_while_memory_is_enabled() {
    let bench = Bench::new();
    bench.port.insert(true);
    let inside = 0xc08f_8000..0xc090_0000;
    assert!(!bench.port.forwards(&inside));
    bench.write(0x04, 2);
    assert!(bench.port.forwards(&inside) && bench.port.forwards(&(0xc080_0000..0xc0a0_0000)));
    assert!(bench.port.forwards(&(0x47_ffff_0000..0x48_0000_0000)));
    for outside in [0xc07f_f000..0xc080_1000, 0xc09f_f000..0xc0a0_1000, 0x3f_0000_0000..0x3f_0000_1000] {
        assert!(!bench.port.forwards(&outside), "{outside:x?}");
    }
    // A window that ends before it begins has no addresses.
    bench.write(0x20, 0xfff0);
    assert!(!bench.port.forwards(&inside));
}

proptest! {
    #[test]
    fn no_access_panics_and_only_events_and_the_writable_change(
        accesses in proptest::collection::vec(
            (any::<bool>(), prop_oneof![0..0x90_u16, 0..4088_u16], proptest::collection::vec(any::<u8>(), 1..9), 0..5_u8),
            0..100)
    ) {
        let bench = Bench::new();
        let (identity, capabilities) = (bench.dword(0), bench.dword(PCIE + 0x14));
        for (write, offset, mut data, act) in accesses {
            match write {
                true => bench.port.config_write(offset, &data),
                false => bench.port.config_read(offset, &mut data),
            }
            match act {
                0 => bench.port.insert(false),
                1 => bench.port.take_out(),
                2 => bench.port.press(),
                _ => {}
            }
            let status = bench.word(STATUS);
            prop_assert_eq!(status & !(EVENTS | OCCUPIED), 0);
            let disabled = bench.word(PCIE + LINK_CONTROL) & LINK_DISABLE != 0;
            prop_assert_eq!(bench.port.bus().is_some(), status & OCCUPIED != 0 && !disabled);
            prop_assert!(Indicator::new(bench.word(CONTROL)).is_some());
        }
        prop_assert_eq!((bench.dword(0), bench.dword(PCIE + 0x14)), (identity, capabilities));
    }
}

proptest! {
    #[test]
    fn what_is_shown_in_memory_is_what_an_access_says(
        steps in proptest::collection::vec((0..4_u8, 0..4096_u16, proptest::collection::vec(any::<u8>(), 1..9)), 0..100)
    ) {
        let bench = Bench::new();
        let pages = MmapRegion::new(0x2000).unwrap();
        let pages = Arc::new(GuestRegionMmap::new(pages, GuestAddress(0)).unwrap());
        bench.port.show(pages.clone(), 0x1000);
        for (what, offset, data) in steps {
            match what {
                0 => bench.port.insert(data[0] & 1 == 0),
                1 => bench.port.take_out(),
                2 => bench.port.press(),
                // Most registers are among the first.
                _ => bench.port.config_write(offset >> (data[0] & 4), &data),
            }
            let (mut said, mut shown) = ([0; 0x1000], [0; 0x1000]);
            bench.port.config_read(0, &mut said);
            pages.read_slice(&mut shown, MemoryRegionAddress(0x1000)).unwrap();
            prop_assert_eq!(said, shown);
        }
        let mut before = [0xff; 0x1000];
        pages.read_slice(&mut before, MemoryRegionAddress(0)).unwrap();
        prop_assert_eq!(before, [0; 0x1000]);
    }
}
