//! A PCI segment with functions of several shapes, whose guest writes to configuration space what it likes.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::bus::{Bus, BusDevice};
use devices::pci::{
    Address, BarKind, Bars, ConfigSpace, Identity, Indicator, MsixCapability, PciFunction, PciSegment, PlatformFunction,
    SlotObserver, Windows,
};
use devices::seam::Interrupts;
use devices::virtio::rng::Rng;
use devices::virtio::testing::{FakeDoorbells, FakeInterrupts};
use devices::virtio::transport::VirtioPci;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

use crate::input::{Step, width};
use crate::layout;

const ECAM: u64 = 0xe000_0000;
const LOW: u64 = 0xc000_0000;
const HIGH: u64 = 0x10_0000_0000;
/// The windows for base address registers; they are small, so that what does not fit is met often.
const WINDOWS: [std::ops::Range<u64>; 2] = [LOW..LOW + 0x100_0000, HIGH..HIGH + 0x2000_0000];
/// Root ports.
const PORTS: u8 = 2;

/// Operations, by their number.
pub mod ops {
    /// Writes configuration space: device and function, register, width in bits 5 and 4 beside the register, value.
    pub const WRITE: u8 = 0;
    /// Reads it.
    pub const READ: u8 = 1;
    /// Moves a base address register: function, register, -, which address.
    pub const PLACE: u8 = 2;
    /// Writes the command register: function, value.
    pub const COMMAND: u8 = 3;
    /// Writes anywhere: -, -, width, address code.
    pub const MMIO: u8 = 4;
    /// Accesses any offset of ECAM, in any length of 1 to 8: 1 to write, length, -, offset.
    pub const ECAM: u8 = 5;
    /// Takes a function out and puts it back: function.
    pub const REPLUG: u8 = 6;
    /// Plugs a card into a root port, or takes it out: port, 1 for one that was there from the start.
    pub const PLUG: u8 = 7;
    /// Presses the attention button of a root port: port.
    pub const PRESS: u8 = 8;
    /// How many there are.
    pub const COUNT: u8 = 9;
}

/// A function with registers of several widths, which knows where it was told to answer.
struct Card {
    number: u8,
    bars: Vec<(usize, BarKind, u64)>,
    config: Mutex<ConfigSpace>,
    mapped: Mutex<[Option<u64>; 6]>,
}

impl Card {
    fn new(number: u8, bars: &[(usize, BarKind, u64)]) -> Self {
        let mut config = ConfigSpace::new(&Identity {
            vendor: 0x1af4,
            device: 0x1000 + u16::from(number),
            revision: number,
            class: 0xff_00_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        });
        for (index, kind, size) in bars {
            config.add_bar(*index, *kind, *size);
        }
        config.add_pcie_endpoint().expect("room for a capability");
        MsixCapability::add(&mut config, 4, 0, 0, 0x800).expect("room for a capability");
        Self { number, bars: bars.to_vec(), config: Mutex::new(config), mapped: Mutex::default() }
    }

    /// What reading a register's memory gives.
    fn mark(&self, index: usize) -> u8 {
        self.number << 4 | u8::try_from(index).expect("a register's number")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PciFunction for Card {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        assert!(usize::from(offset) + data.len() <= 4096);
        lock(&self.config).read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        assert!(usize::from(offset) + data.len() <= 4096);
        lock(&self.config).write(offset, data);
    }

    fn bars(&self) -> Bars {
        lock(&self.config).bars()
    }

    fn place_bar(&self, index: usize, address: u64) {
        lock(&self.config).place_bar(index, address);
    }

    fn memory_enabled(&self) -> bool {
        lock(&self.config).memory_enabled()
    }

    fn bar_read(&self, index: usize, offset: u64, data: &mut [u8]) {
        self.check(index, offset, data.len());
        data.fill(self.mark(index));
    }

    fn bar_write(&self, index: usize, offset: u64, data: &[u8]) {
        self.check(index, offset, data.len());
    }

    fn bar_mapped(&self, index: usize, at: Option<u64>) {
        lock(&self.mapped)[index] = at;
    }
}

impl Card {
    fn check(&self, index: usize, offset: u64, len: usize) {
        let (_, _, size) = self.bars.iter().find(|bar| bar.0 == index).expect("a register that exists");
        assert!(offset + u64::try_from(len).expect("a length") <= *size, "an access beyond a register's memory");
        assert!(lock(&self.mapped)[index].is_some(), "an access to a register that answers nowhere");
    }
}

/// What the root ports have told.
#[derive(Default)]
struct Seen(Mutex<Vec<(u8, Indicator)>>);

impl SlotObserver for Seen {
    fn indicator(&self, port: u8, shows: Indicator) {
        lock(&self.0).push((port, shows));
    }
}

/// A segment and its functions.
pub struct Segment {
    mmio: Arc<Bus>,
    segment: Arc<PciSegment>,
    functions: Vec<(Address, Arc<dyn PciFunction>)>,
    cards: Vec<Arc<Card>>,
    /// The card for each root port, and whether it is plugged.
    plugged: Vec<(Arc<Card>, bool)>,
    seen: Arc<Seen>,
    /// Where the guest reads configuration space of the root ports.
    pages: Arc<GuestRegionMmap>,
    /// Configuration space of each function as it was at first.
    before: Vec<Vec<u8>>,
}

impl Default for Segment {
    fn default() -> Self {
        Self::new()
    }
}

impl Segment {
    /// A host bridge, two virtio devices, cards, two of which are functions of one device, and root ports with a card each
    /// that comes and goes.
    pub fn new() -> Self {
        use BarKind::{Memory32, Memory64};

        let mmio = Arc::new(Bus::new());
        let [low, high] = WINDOWS;
        let segment = Arc::new(PciSegment::new(Arc::clone(&mmio), Windows { low, high }));
        let (seen, interrupts) = (Arc::new(Seen::default()), FakeInterrupts::new());
        let interrupts: Arc<dyn Interrupts> = Arc::new(interrupts);
        segment.add_ports(PORTS, &interrupts, &(seen.clone() as Arc<dyn SlotObserver>)).expect("room for ports");
        mmio.insert(ECAM, segment.ecam_len(), Arc::clone(&segment) as _).expect("ECAM on the bus");
        let cards: Vec<Arc<Card>> = [
            Card::new(1, &[(0, Memory64, 0x1000), (2, Memory32, 0x10), (4, Memory64, 0x10_0000)]),
            Card::new(2, &[(0, Memory32, 0x2000), (1, Memory32, 0x1000), (2, Memory32, 0x40_0000)]),
            Card::new(3, &[(0, Memory64, 0x800_0000), (5, Memory32, 0x100)]),
        ]
        .map(Arc::new)
        .into();
        let virtio = || {
            let (interrupts, doorbells) = (Arc::new(FakeInterrupts::new()), Arc::new(FakeDoorbells::new()));
            let device = Box::new(Rng::new("rng0"));
            Arc::new(VirtioPci::new("rng0", device, layout::memory(), interrupts, doorbells).expect("a function"))
        };
        let places: [(u8, u8, Arc<dyn PciFunction>); 6] = [
            (0, 0, Arc::new(PlatformFunction::host_bridge())),
            (1, 0, virtio()),
            (2, 0, cards[0].clone()),
            (2, 3, cards[1].clone()),
            (30, 7, cards[2].clone()),
            (4, 0, virtio()),
        ];
        let functions = places.map(|(device, function, it)| (Address { device, function }, it)).to_vec();
        for (address, function) in &functions {
            segment.add_at(*address, Arc::clone(function)).expect("a free address");
        }
        let plugged = (0..PORTS)
            .map(|port| (Arc::new(Card::new(8 + port, &[(0, Memory64, 0x8000), (2, Memory32, 0x1000)])), false))
            .collect();
        let pages = MmapRegion::new(8 << 12).expect("memory for a device of eight functions");
        let pages = Arc::new(GuestRegionMmap::new(pages, GuestAddress(0)).expect("an address"));
        segment.show_ports(&pages).expect("room for the ports");
        let mut this = Self { mmio, segment, functions, cards, plugged, seen, pages, before: Vec::new() };
        this.before = (0..this.functions.len()).map(|index| this.header(index)).collect();
        this
    }

    /// Where ECAM has a function; behind the last of them the root ports, and then what is behind those.
    fn ecam(&self, function: u8) -> u64 {
        let ports = usize::from(PORTS);
        let number = usize::from(function) % (self.functions.len() + 2 * ports);
        if let Some(port) = number.checked_sub(self.functions.len()) {
            let number = u64::try_from(port % ports).expect("a small number");
            return ECAM + if port < ports { 31 << 15 | number << 12 } else { (number + 1) << 20 };
        }
        let (address, _) = self.functions[number];
        ECAM + (u64::from(address.device) << 15) + (u64::from(address.function) << 12)
    }

    /// What no write may change: identity, class, header type, subsystem, the capability list, and extended space.
    fn header(&self, function: usize) -> Vec<u8> {
        let base = self.ecam(u8::try_from(function).expect("a small number"));
        let fixed =
            (0..4).chain(8..0xc).chain([0xd, 0xe, 0xf]).chain(0x28..0x3c).chain([0x40, 0x41]).chain(0xff8..0x1000);
        fixed
            .map(|register| {
                let mut data = [0];
                assert!(self.mmio.read(base + register, &mut data));
                data[0]
            })
            .collect()
    }

    /// Does a step, and looks whether all is as the registers say.
    pub fn step(&mut self, step: Step) {
        let Step { a, b, c, d, .. } = step;
        let bytes = (u64::from(d) | u64::from(!d) << 32).to_le_bytes();
        match step.op % ops::COUNT {
            op @ (ops::WRITE | ops::READ) => {
                // Some of the functions that exist, more often than those that do not.
                let base = if a & 0x80 == 0 { self.ecam(a) } else { ECAM + (u64::from(a & 0x7f) << 12) };
                let at = base + (u64::from(b) | u64::from(c & 0xf) << 8);
                match op {
                    ops::WRITE => self.mmio.write(at, &bytes[..width(c >> 4)]),
                    _ => self.mmio.read(at, &mut [0; 8][..width(c >> 4)]),
                };
            }
            ops::PLACE => {
                let places =
                    [LOW, LOW + 0x1000, LOW + 0x10_0000, HIGH, HIGH + 0x8000, HIGH + 0x800_0000, ECAM, u64::MAX];
                let address = places[usize::from(c & 7)].wrapping_add(u64::from(d)).to_le_bytes();
                let at = self.ecam(a) + 0x10 + 4 * u64::from(b % 6);
                self.mmio.write(at, &address[..4]);
                if c & 0x80 == 0 {
                    self.mmio.write(at + 4, &address[4..]);
                }
            }
            ops::COMMAND => drop(self.mmio.write(self.ecam(a) + 4, &[b, c])),
            ops::MMIO => {
                let at = [LOW, HIGH, ECAM, 0][usize::from(c >> 2 & 3)] + u64::from(d & 0xff_ffff);
                self.mmio.write(at, &bytes[..width(c)]);
            }
            ops::ECAM => {
                let (at, len) = (ECAM.wrapping_add(u64::from(d)), usize::from(b % 8) + 1);
                match a & 1 {
                    0 => self.mmio.read(at, &mut [0; 8][..len]),
                    _ => self.mmio.write(at, &bytes[..len]),
                };
            }
            ops::PLUG => self.plug(a % PORTS, b & 1 != 0),
            ops::PRESS => self.segment.port(a % PORTS).expect("a port").press(),
            _ => {
                let (address, _) = self.functions[usize::from(a) % self.functions.len()];
                let function = self.segment.remove(address).expect("it is there");
                // The guest may have put others into all the room there is.
                if self.segment.add_at(address, Arc::clone(&function)).is_err() {
                    function.place_bar(0, 0);
                    self.make_room();
                    self.segment.add_at(address, function).expect("there is room now");
                }
            }
        }
        self.check();
    }

    fn plug(&mut self, port: u8, cold: bool) {
        let (card, plugged) = &mut self.plugged[usize::from(port)];
        *plugged = !*plugged;
        if *plugged {
            self.segment.plug(port, card.clone(), cold).expect("the port is free");
        } else {
            self.segment.unplug(port).expect("it is there");
            assert!(lock(&card.mapped).iter().all(Option::is_none), "a card that is out answers somewhere");
        }
    }

    /// Puts all registers out of the way.
    fn make_room(&self) {
        for (_, function) in &self.functions {
            (0..6).for_each(|index| function.place_bar(index, 0));
        }
        for (card, _) in &self.plugged {
            (0..6).for_each(|index| card.place_bar(index, 0));
        }
        self.segment.refresh();
    }

    /// Each card answers where it was told that it does, and only within the windows and while it may.
    fn check(&self) {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let seen = std::mem::take(&mut *lock(&self.seen.0));
        assert!(seen.iter().all(|(port, _)| *port < PORTS), "{seen:?}");
        for (port, (card, plugged)) in (0..).zip(&self.plugged) {
            let (mapped, bars) = (*lock(&card.mapped), card.bars());
            let bridge = self.segment.port(port).expect("a port");
            for (index, _, size) in &card.bars {
                let Some(at) = mapped[*index] else { continue };
                assert!(*plugged && bridge.forwards(&(at..at + size)), "{at:#x} is reached past port {port}");
                assert!(bars[*index].is_some_and(|bar| bar.address == at), "{at:#x} is no word of the card's");
            }
        }
        for port in 0..PORTS {
            let (mut said, mut shown) = ([0; 0x1000], [0; 0x1000]);
            self.segment.port(port).expect("a port").config_read(0, &mut said);
            let at = MemoryRegionAddress(u64::from(port) << 12);
            self.pages.read_slice(&mut shown, at).expect("a page of its own");
            assert!(said == shown, "the guest reads something else of port {port} in memory");
        }
        let behind = self.plugged.iter().map(|(card, _)| card);
        for card in self.cards.iter().chain(behind) {
            let (bars, enabled) = (card.bars(), card.memory_enabled());
            for (index, _, size) in &card.bars {
                let Some(at) = lock(&card.mapped)[*index] else { continue };
                let bar = bars[*index].expect("the register exists");
                assert!(enabled && bar.address == at, "register {index} answers at {at:#x} against its own word");
                assert!(WINDOWS.iter().any(|window| window.start <= at && at + size <= window.end), "outside windows");
                assert!(ranges.iter().all(|(start, end)| at >= *end || at + size <= *start), "two answer at {at:#x}");
                ranges.push((at, at + size));
                for address in [at, at + size - 1] {
                    let mut data = [0];
                    assert!(
                        self.mmio.read(address, &mut data) && data == [card.mark(*index)],
                        "nobody at {address:#x}"
                    );
                }
            }
        }
    }

    /// Sees that what is read-only was not written, and that cards answer once their registers are put apart.
    pub fn finish(mut self) {
        for port in 0..PORTS {
            if self.plugged[usize::from(port)].1 {
                self.plug(port, false);
            }
        }
        for (index, before) in self.before.iter().enumerate() {
            assert!(self.header(index) == *before, "function {index}: a read-only register has changed");
        }
        self.make_room();
        let mut at = LOW;
        for (index, (_, function)) in self.functions.iter().enumerate() {
            self.mmio.write(self.ecam(u8::try_from(index).expect("a small number")) + 4, &[2, 0]);
            for (number, bar) in
                function.bars().iter().enumerate().filter(|(_, bar)| bar.is_some_and(|bar| bar.size <= 0x10_0000))
            {
                at = at.next_multiple_of(bar.map_or(1, |bar| bar.size));
                function.place_bar(number, at);
                at += bar.map_or(0, |bar| bar.size);
            }
        }
        self.segment.refresh();
        self.check();
        for card in &self.cards {
            for (index, _, size) in card.bars.iter().filter(|bar| bar.2 <= 0x10_0000) {
                assert!(lock(&card.mapped)[*index].is_some(), "card {}: {size:#x} bytes answer nowhere", card.number);
            }
        }
        // The bus holds the segment, and the segment the bus.
        let ecam: Arc<dyn BusDevice> = self.mmio.remove(ECAM).expect("ECAM is on the bus");
        drop(ecam);
    }
}
