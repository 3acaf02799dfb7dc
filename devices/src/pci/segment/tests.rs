use proptest::prelude::*;
use vm_memory::{GuestAddress, MmapRegion};

use super::super::{ConfigSpace, Identity, PlatformFunction};
use super::*;

const WINDOWS: Windows = Windows { low: 0xc000_0000..0xc010_0000, high: 0x10_0000_0000..0x10_0010_0000 };

/// A function whose BAR memory reads as its number.
struct Plain {
    number: u8,
    config: Mutex<ConfigSpace>,
    mapped: Mutex<Vec<(usize, Option<u64>)>>,
}

impl Plain {
    fn new(number: u8, bars: &[(usize, BarKind, u64)]) -> Arc<Self> {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1234,
            device: u16::from(number),
            revision: 0,
            class: 0xff_00_00,
            subsystem_vendor: 0,
            subsystem: 0,
        });
        for (index, kind, size) in bars {
            config.add_bar(*index, *kind, *size);
        }
        Arc::new(Self { number, config: Mutex::new(config), mapped: Mutex::default() })
    }

    fn address(&self, index: usize) -> u64 {
        self.bars()[index].unwrap().address
    }
}

impl PciFunction for Plain {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.lock().unwrap().read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config.lock().unwrap().write(offset, data);
    }

    fn bars(&self) -> Bars {
        self.config.lock().unwrap().bars()
    }

    fn place_bar(&self, index: usize, address: u64) {
        self.config.lock().unwrap().place_bar(index, address);
    }

    fn memory_enabled(&self) -> bool {
        self.config.lock().unwrap().memory_enabled()
    }

    fn bar_read(&self, _index: usize, _offset: u64, data: &mut [u8]) {
        data.fill(self.number);
    }

    fn bar_write(&self, _index: usize, _offset: u64, _data: &[u8]) {}

    fn bar_mapped(&self, index: usize, at: Option<u64>) {
        self.mapped.lock().unwrap().push((index, at));
    }
}

fn segment() -> (Arc<Bus>, PciSegment) {
    let mmio = Arc::new(Bus::new());
    (Arc::clone(&mmio), PciSegment::new(mmio, WINDOWS))
}

fn dword(segment: &PciSegment, offset: u64) -> u32 {
    let mut data = [0; 4];
    segment.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn at(mmio: &Bus, address: u64) -> u8 {
    let mut data = [0];
    mmio.read(address, &mut data);
    data[0]
}

const BOTH: [(usize, BarKind, u64); 2] = [(0, BarKind::Memory64, 0x8000), (2, BarKind::Memory32, 0x1000)];

#[test]
fn functions_are_where_ecam_says() {
    let (_, segment) = segment();
    assert_eq!(segment.add(Arc::new(PlatformFunction::host_bridge())).unwrap().to_string(), "00:00.0");
    let second = segment.add(Plain::new(7, &[])).unwrap();
    assert_eq!(second, Address { device: 1, function: 0 });
    segment.add_at(Address { device: 1, function: 3 }, Plain::new(8, &[])).unwrap();
    assert_eq!(segment.add_at(second, Plain::new(9, &[])), Err(Error::Taken(second)));
    assert!(segment.add_at(Address { device: 32, function: 0 }, Plain::new(9, &[])).is_err());
    assert_eq!(dword(&segment, 0x08), 0x0600_0000);
    assert_eq!(dword(&segment, 0x8000), 0x0007_1234);
    assert_eq!(dword(&segment, 0x8000 + 0x3000), 0x0008_1234);
    assert_eq!(dword(&segment, 0x8000 + 0x0c), 0x0080_0000, "a device of several functions");
    assert_eq!(dword(&segment, 0x0c), 0);
    assert_eq!(dword(&segment, 0x1_0000), u32::MAX, "no such device");
    assert_eq!(dword(&segment, 0x8000 + 0xffe), u32::MAX, "across the end of a function");
    assert_eq!(dword(&segment, 0x10_0000), u32::MAX, "no such bus");
}

#[test]
fn the_bus_has_32_devices() {
    let (_, segment) = segment();
    for number in 0..32 {
        segment.add(Plain::new(number, &[])).unwrap();
    }
    assert_eq!(segment.add(Plain::new(32, &[])), Err(Error::Full));
}

#[test]
fn bars_get_places_of_their_own_until_there_are_none() {
    let (_, segment) = segment();
    let functions: Vec<_> = (0..4).map(|number| Plain::new(number, &BOTH)).collect();
    for function in &functions {
        segment.add(function.clone()).unwrap();
    }
    let places: Vec<_> = functions.iter().map(|f| (f.address(0), f.address(2))).collect();
    assert_eq!(places[0], (0x10_0000_0000, 0xc000_0000));
    assert_eq!(places[3], (0x10_0001_8000, 0xc000_3000));
    let large = Plain::new(9, &[(0, BarKind::Memory32, 0x10_0000)]);
    assert_eq!(segment.add(large), Err(Error::NoRoom { size: 0x10_0000 }));
    let high_is_too_small = Plain::new(9, &[(0, BarKind::Memory64, 0x10_0000)]);
    assert!(segment.add(high_is_too_small).is_err());
}

#[test]
fn memory_answers_only_while_it_is_enabled() {
    let (mmio, segment) = segment();
    let function = Plain::new(7, &BOTH);
    segment.add(function.clone()).unwrap();
    assert_eq!(at(&mmio, 0xc000_0000), 0xff);
    segment.write(0x04, &[2, 0]);
    assert_eq!((at(&mmio, 0xc000_0fff), at(&mmio, 0xc000_1000)), (7, 0xff));
    assert_eq!(at(&mmio, 0x10_0000_7fff), 7);
    segment.write(0x04, &[0, 0]);
    assert_eq!(at(&mmio, 0xc000_0000), 0xff);
    let told = function.mapped.lock().unwrap().clone();
    assert_eq!(told, [(0, Some(0x10_0000_0000)), (2, Some(0xc000_0000)), (0, None), (2, None)]);
}

#[test]
fn a_claimed_place_is_refused_until_it_is_free() {
    let (mmio, segment) = segment();
    let (one, two) = (Plain::new(1, &BOTH), Plain::new(2, &BOTH));
    segment.add(one.clone()).unwrap();
    segment.add(two).unwrap();
    segment.write(0x04, &[2]);
    segment.write(0x8004, &[2]);
    assert_eq!((at(&mmio, 0xc000_0000), at(&mmio, 0xc000_1000)), (1, 2));
    segment.write(0x8018, &0xc000_0000_u32.to_le_bytes());
    assert_eq!((at(&mmio, 0xc000_0000), at(&mmio, 0xc000_1000)), (1, 0xff));
    segment.write(0x18, &0xc000_8000_u32.to_le_bytes());
    assert_eq!((at(&mmio, 0xc000_0000), at(&mmio, 0xc000_8000)), (2, 1));
    let gone = segment.remove(Address { device: 1, function: 0 }).unwrap();
    assert!(!gone.memory_enabled() || at(&mmio, 0xc000_0000) == 0xff);
    assert_eq!(at(&mmio, 0x10_0000_0000), 1);
    assert_eq!(at(&mmio, 0x10_0000_8000), 0xff);
}

proptest! {
    #[test]
    fn no_access_panics_and_nothing_leaves_the_windows(
        accesses in proptest::collection::vec(
            (any::<bool>(), prop_oneof![0..0x40_u64, 0x8000..0x8040_u64, 0..0x20_0000_u64],
             prop_oneof![
                proptest::collection::vec(any::<u8>(), 1..9),
                (0xc000_0000..0xc020_0000_u32).prop_map(|address| address.to_le_bytes().to_vec()),
             ]),
            0..200)
    ) {
        let (mmio, segment) = segment();
        let functions = [Plain::new(1, &BOTH), Plain::new(2, &BOTH)];
        for function in &functions {
            segment.add(function.clone()).unwrap();
        }
        segment.write(0x04, &[2]);
        segment.write(0x8004, &[2]);
        for (write, offset, mut data) in accesses {
            match write {
                true => segment.write(offset, &data),
                false => segment.read(offset, &mut data),
            }
        }
        for slot in &segment.lock().root {
            for (index, place) in slot.mapped.iter().enumerate() {
                let Some(place) = *place else { continue };
                let bar = slot.function.bars()[index].unwrap();
                prop_assert_eq!(bar.address, place);
                prop_assert!(slot.function.memory_enabled());
                prop_assert!(WINDOWS.low.contains(&place) || WINDOWS.high.contains(&place));
                let number = at(&mmio, place);
                prop_assert_eq!(number, slot.address.device + 1, "its own memory answers");
            }
        }
    }
}

struct Nobody;

impl SlotObserver for Nobody {
    fn indicator(&self, _port: u8, _shows: crate::pci::Indicator) {}
}

/// A segment with a host bridge and ports, with room in its windows.
fn with_ports(count: u8) -> (Arc<Bus>, PciSegment) {
    let mmio = Arc::new(Bus::new());
    let windows = Windows { low: 0xc000_0000..0xe000_0000, high: 0x10_0000_0000..0x20_0000_0000 };
    let segment = PciSegment::new(Arc::clone(&mmio), windows);
    let interrupts: Arc<dyn Interrupts> = Arc::new(crate::virtio::testing::FakeInterrupts::new());
    let observer: Arc<dyn SlotObserver> = Arc::new(Nobody);
    segment.add_ports(count, &interrupts, &observer).unwrap();
    segment.add(Arc::new(PlatformFunction::host_bridge())).unwrap();
    (mmio, segment)
}

/// The offset of a register in ECAM.
fn ecam(bus: u64, device: u64, function: u64, register: u64) -> u64 {
    bus << 20 | device << 15 | function << 12 | register
}

#[test]
fn ports_are_the_last_devices_and_lead_to_a_bus_each() {
    let (_, segment) = with_ports(10);
    assert_eq!(segment.ecam_len(), 11 << 20);
    for (number, place) in [(0, (31, 0)), (7, (31, 7)), (8, (30, 0)), (9, (30, 1))] {
        assert_eq!(dword(&segment, ecam(0, place.0, place.1, 0)), 0x000c_1b36, "port {number}");
        let bus = u32::try_from(number + 1).unwrap();
        assert_eq!(dword(&segment, ecam(0, place.0, place.1, 0x18)), bus << 8 | bus << 16);
        assert_eq!(dword(&segment, ecam(number + 1, 0, 0, 0)), u32::MAX, "nothing is behind it");
    }
    assert_eq!(dword(&segment, ecam(0, 30, 2, 0)), u32::MAX);
    assert_eq!(dword(&segment, ecam(0, 31, 0, 0x0c)) >> 16, 0x81, "several functions");
    for _ in 1..30 {
        segment.add(Plain::new(1, &[])).unwrap();
    }
    assert_eq!(segment.add(Plain::new(1, &[])), Err(Error::Full));
    let one = with_ports(1).1;
    assert_eq!(dword(&one, ecam(0, 31, 0, 0x0c)) >> 16, 0x01, "a single function");
    assert_eq!(with_ports(MAX_PORTS).1.ecam_len(), 225 << 20);
}

#[test]
fn ports_are_shown_in_memory_as_accesses_find_them() {
    for count in [1, 8, 10] {
        let (_, segment) = with_ports(count);
        let range = segment.ports_ecam();
        let region = |len| {
            let pages = MmapRegion::new(usize::try_from(len).unwrap()).unwrap();
            Arc::new(GuestRegionMmap::new(pages, GuestAddress(0)).unwrap())
        };
        let pages = region(range.end - range.start);
        segment.show_ports(&pages).unwrap();
        for at in (0..pages.len()).step_by(4) {
            let (mut said, mut shown) = ([0; 4], [0; 4]);
            segment.read(range.start + at, &mut said);
            pages.read_slice(&mut shown, MemoryRegionAddress(at)).unwrap();
            assert_eq!(said, shown, "{count} ports, {at:#x}");
        }
        assert!(segment.show_ports(&region(0x1000)).is_err());
    }
    assert!(with_ports(0).1.ports_ecam().is_empty());
}

#[test]
fn more_ports_than_fit_are_refused() {
    let (_, small) = segment();
    let interrupts: Arc<dyn Interrupts> = Arc::new(crate::virtio::testing::FakeInterrupts::new());
    let observer: Arc<dyn SlotObserver> = Arc::new(Nobody);
    assert_eq!(small.add_ports(1, &interrupts, &observer), Err(Error::NoRoom { size: PORT_WINDOW }));
    let (_, ports) = with_ports(1);
    assert!(matches!(ports.add_ports(1, &interrupts, &observer), Err(Error::Taken(_))));
    assert_eq!(with_ports(0).1.add_ports(0, &interrupts, &observer), Ok(()));
}

#[test]
fn a_device_behind_a_port_answers_on_its_bus_and_in_its_windows() {
    let (mmio, segment) = with_ports(2);
    let function = Plain::new(7, &BOTH);
    segment.plug(1, function.clone(), false).unwrap();
    assert_eq!(segment.plug(1, Plain::new(8, &[]), false), Err(Error::Occupied(1)));
    assert_eq!(segment.plug(2, Plain::new(8, &[]), false), Err(Error::Occupied(2)));
    assert_eq!((function.address(0), function.address(2)), (0xdfe0_0000, 0xdfe0_8000));
    assert_eq!(dword(&segment, ecam(2, 0, 0, 0)), 0x0007_1234);
    assert_eq!(dword(&segment, ecam(2, 1, 0, 0)), u32::MAX);
    assert_eq!(dword(&segment, ecam(2, 0, 1, 0)), u32::MAX);
    segment.write(ecam(2, 0, 0, 0x04), &[2]);
    assert_eq!(at(&mmio, 0xdfe0_0000), 0xff, "the port lets nothing through yet");
    segment.write(ecam(0, 31, 1, 0x04), &[2]);
    assert_eq!((at(&mmio, 0xdfe0_0000), at(&mmio, 0xdfe0_8000)), (7, 7));
    // The guest moves the port's window away, and the register after it.
    segment.write(ecam(0, 31, 1, 0x20), &[0x00, 0xd0, 0x00, 0xd0]);
    assert_eq!(at(&mmio, 0xdfe0_0000), 0xff);
    segment.write(ecam(2, 0, 0, 0x10), &0xd000_0000_u64.to_le_bytes());
    assert_eq!(at(&mmio, 0xd000_0000), 7);
    // And its bus.
    segment.write(ecam(0, 31, 1, 0x19), &[9]);
    assert_eq!(dword(&segment, ecam(2, 0, 0, 0)), u32::MAX);
    assert_eq!(dword(&segment, ecam(9, 0, 0, 0)), 0x0007_1234);
    segment.write(ecam(0, 31, 1, 0x58), &[0, 1]);
    let gone = segment.unplug(1).unwrap();
    assert_eq!((dword(&segment, ecam(9, 0, 0, 0)), at(&mmio, 0xd000_0000)), (u32::MAX, 0));
    segment.write(ecam(0, 31, 1, 0x58), &[0, 3]);
    assert_eq!(at(&mmio, 0xd000_0000), 0xff, "the guest is through with it");
    assert!(segment.unplug(1).is_none() && segment.unplug(2).is_none());
    segment.plug(1, gone, false).unwrap();
}

#[test]
fn a_device_behind_a_port_cannot_take_the_place_of_another() {
    let (mmio, segment) = with_ports(2);
    let (root, behind) = (Plain::new(1, &BOTH), Plain::new(2, &BOTH));
    segment.add(root.clone()).unwrap();
    segment.plug(0, behind, true).unwrap();
    assert_eq!(root.address(2), 0xc000_0000, "registers of the root bus stay out of the ports' windows");
    segment.write(ecam(0, 1, 0, 0x04), &[2]);
    segment.write(ecam(0, 31, 0, 0x20), &[0x00, 0xc0, 0xf0, 0xdf]);
    segment.write(ecam(0, 31, 0, 0x04), &[2]);
    segment.write(ecam(1, 0, 0, 0x18), &0xc000_0000_u32.to_le_bytes());
    segment.write(ecam(1, 0, 0, 0x04), &[2]);
    assert_eq!((at(&mmio, 0xc000_0000), at(&mmio, 0xdfc0_0000)), (1, 2));
}
