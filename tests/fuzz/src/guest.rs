//! A guest with one virtio device, which does to it what a program says, whatever the specification thinks of that; and
//! then, as a sound driver would, resets the device and sees that it works.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use devices::virtio::testing::{FakeDoorbells, FakeInterrupts, INDIRECT, NEXT, PciDriver, WRITE};
use devices::virtio::transport::VirtioPci;
use devices::virtio::{StateSink, StateSource};
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap};

use crate::hosts::Host;
use crate::input::{Step, pattern, width};
use crate::layout::{self, QUEUES, SOUND};

/// Registers of the common configuration (virtio 1.2 §4.1.4.3).
const DEVICE_FEATURE_SELECT: u64 = 0x00;
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURE: u64 = 0x0c;
const CONFIG_VECTOR: u64 = 0x10;
const STATUS: u64 = 0x14;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_ADDRESSES: u64 = 0x20;
/// Where the structures are in the base address register; as the driver finds them too.
const BAR_LEN: u64 = 0x8000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x4000;

/// The status of a driver that has come as far as running queues.
const RUNNING: u8 = 0xf;

/// Where base address registers may be, as [`PciDriver`] has it.
const WINDOWS: [std::ops::Range<u64>; 2] = [0xc000_0000..0xe000_0000, 0x10_0000_0000..0x20_0000_0000];

/// How long the guest waits for the device to hear a kick. One that feeds itself never comes to rest, so this is short.
const PATIENCE: Duration = Duration::from_millis(20);

/// Operations, by their number.
pub mod ops {
    /// Writes a register of the common configuration: register, width, -, value.
    pub const COMMON: u8 = 0;
    /// Writes anywhere into the base address register: offset in two, width, value.
    pub const BAR_WRITE: u8 = 1;
    /// Reads anywhere from it.
    pub const BAR_READ: u8 = 2;
    /// Writes configuration space: register in two, width, value.
    pub const CONFIG_WRITE: u8 = 3;
    /// Reads configuration space.
    pub const CONFIG_READ: u8 = 4;
    /// Writes guest memory: address code in two, times, value.
    pub const MEMORY: u8 = 5;
    /// Writes a descriptor: queue and flags, index, length code, address code and next.
    pub const DESCRIPTOR: u8 = 6;
    /// Makes a chain available: queue, -, -, head.
    pub const PUBLISH: u8 = 7;
    /// Moves the available index: queue, -, -, by how much.
    pub const JUMP: u8 = 8;
    /// Kicks: queue, 1 to write the register, -, what to write.
    pub const KICK: u8 = 9;
    /// Sets a queue up: queue, logarithm of its size, 1 to leave it disabled or 2 for rings elsewhere, address codes.
    pub const QUEUE: u8 = 10;
    /// Resets and negotiates: -, -, 1 for no VERSION_1 or 2 for upper features, lower features.
    pub const NEGOTIATE: u8 = 11;
    /// Lets queues run.
    pub const RUN: u8 = 12;
    /// Writes the status: status.
    pub const STATUS: u8 = 13;
    /// Suspends and resumes: 1 to save and compare with a copy.
    pub const SUSPEND: u8 = 14;
    /// The host does something: see each device.
    pub const HOST: u8 = 15;
    /// A chain of a header, something to read, something to write, and a status: queue, shape, length codes, header.
    pub const REQUEST: u8 = 16;
    /// Moves the base address register: which address.
    pub const PLACE: u8 = 17;
    /// Writes an MSI-X vector's entry: vector, mask, address, data.
    pub const VECTOR: u8 = 18;
    /// Writes MSI-X message control: bits 15 and 14.
    pub const MSIX: u8 = 19;
    /// Accesses a register through configuration space: offset in two, width and 4 to write, value.
    pub const WINDOW: u8 = 20;
    /// Waits until the device has nothing to do.
    pub const SETTLE: u8 = 21;
    /// Resets, and looks.
    pub const RESET: u8 = 22;
    /// Writes the flags and the event index of an available ring: queue, -, -, both.
    pub const EVENT_INDEX: u8 = 23;
    /// How many there are.
    pub const COUNT: u8 = 24;
}

/// A guest and its host.
pub struct Guest {
    driver: PciDriver,
    host: Box<dyn Host>,
    /// Where the base address register was first.
    home: u64,
    msix: u16,
    window: u16,
    /// Sizes of queues as the program set them up.
    sizes: [u16; 8],
    /// Descriptors of each queue that requests took so far.
    taken: [u16; 8],
    requests: u16,
    /// What a save may be restored to, so that it is not done without end.
    copies: u8,
}

impl Guest {
    /// A guest whose device was just reset.
    pub fn new(mut host: Box<dyn Host>) -> Self {
        let driver = PciDriver::with_memory(host.device(), layout::memory());
        let home = driver.bar(0);
        let (msix, window) = capabilities(&driver);
        Self { driver, host, home, msix, window, sizes: [16; 8], taken: [0; 8], requests: 0, copies: 2 }
    }

    /// Does a step.
    pub fn step(&mut self, step: Step) {
        let Step { a, b, c, d, .. } = step;
        let wide = u64::from(d) | u64::from(d.rotate_left(16)) << 32;
        let wide = wide.to_le_bytes();
        match step.op % ops::COUNT {
            ops::COMMON => self.write(u64::from(a & 0x3f), &wide[..width(b)]),
            ops::BAR_WRITE => self.write(u64::from(step.ab()) % BAR_LEN, &wide[..width(c)]),
            ops::BAR_READ => self.read(u64::from(step.ab()) % BAR_LEN, &mut [0; 8][..width(c)]),
            ops::CONFIG_WRITE => self.driver.config_write(step.ab() & 0xfff, &wide[..width(c)]),
            ops::CONFIG_READ => self.driver.config_read(step.ab() & 0xfff, &mut [0; 8][..width(c)]),
            ops::MEMORY => self.fill(layout::address(step.ab()), &d.to_le_bytes().repeat(1 + usize::from(c & 0x3f))),
            ops::DESCRIPTOR => self.descriptor(step),
            ops::PUBLISH => self.publish(a, step.d_low()),
            ops::JUMP => self.jump(a, step.d_low()),
            ops::KICK => self.kick(a, (b & 1 != 0).then(|| step.d_low())),
            ops::QUEUE => self.queue(step),
            ops::NEGOTIATE => self.negotiate(step),
            ops::RUN => self.write(STATUS, &[RUNNING]),
            ops::STATUS => self.write(STATUS, &[a]),
            ops::SUSPEND => self.suspend(a & 1 != 0),
            ops::HOST => self.host.act(step),
            ops::REQUEST => self.request(step),
            ops::PLACE => self.place(a),
            ops::VECTOR => self.vector(step),
            ops::MSIX => self.driver.config_write(self.msix + 2, &(u16::from(a) << 8).to_le_bytes()),
            ops::WINDOW => self.window(step),
            ops::SETTLE => self.settle(),
            ops::RESET => self.reset(),
            _ => {
                let [_, available, _] = layout::rings(a);
                self.fill(available, &step.d_low().to_le_bytes());
                self.fill(available + 4 + 2 * self.size(a), &step.d_high().to_le_bytes());
            }
        }
    }

    /// Puts everything back in order as a driver can, and sees that the device works: that a reset is one, that
    /// nothing of before it is written to memory after it, and that requests are done.
    pub fn finish(mut self) {
        self.driver.config_write(0x04, &[6, 0]);
        self.place_at(self.home);
        self.driver.config_write(self.msix + 2, &[0, 0]);
        self.driver.find_structures();
        self.driver.reset();
        let [select]: [u8; 1] = self.driver.read(self.driver.common + QUEUE_SELECT);
        assert_eq!(select, 0, "a reset forgets the queue that was selected");
        for queue in 0..u16::from(QUEUES) {
            self.driver.write(self.driver.common + QUEUE_SELECT, &queue.to_le_bytes());
            let enabled: [u8; 2] = self.driver.read(self.driver.common + QUEUE_ENABLE);
            assert_eq!(enabled, [0, 0], "a reset disables queue {queue}");
        }
        let before = self.outside();
        self.host.check(&mut self.driver);
        self.driver.reset();
        assert!(self.outside() == before, "guest memory was written after a reset, or outside of all buffers");
    }

    /// All guest memory that the sound driver does not use.
    fn outside(&self) -> Vec<u8> {
        let memory = self.driver.memory.memory();
        let mut bytes = Vec::new();
        for range in layout::REGIONS {
            for part in [range.start..range.end.min(SOUND.start), range.start.max(SOUND.end)..range.end] {
                if part.start < part.end {
                    let start = bytes.len();
                    bytes.resize(start + layout::length(&part), 0);
                    memory.read_slice(&mut bytes[start..], GuestAddress(part.start)).expect("guest memory");
                }
            }
        }
        bytes
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.driver.mmio.write(self.driver.bar(0).wrapping_add(offset), data);
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.driver.mmio.read(self.driver.bar(0).wrapping_add(offset), data);
    }

    /// Writes what lies in guest memory of `data`.
    fn fill(&self, at: u64, data: &[u8]) {
        let memory: &GuestMemoryMmap = &self.driver.memory.memory();
        if memory.check_range(GuestAddress(at), data.len()) {
            memory.write_slice(data, GuestAddress(at)).expect("guest memory");
        }
    }

    fn load(&self, at: u64) -> u16 {
        self.driver.memory.memory().read_obj(GuestAddress(at)).map_or(0, u16::from_le)
    }

    fn size(&self, queue: u8) -> u64 {
        u64::from(self.sizes[usize::from(queue % QUEUES)])
    }

    fn put_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let raw = RawDescriptor::from(Descriptor::new(address, len, flags, next));
        let memory = self.driver.memory.memory();
        // A table at the end of memory has fewer.
        let _ = memory.write_obj(raw, GuestAddress(at));
    }

    fn descriptor(&self, step: Step) {
        let Step { a, b, c, .. } = step;
        let queue = a & 7;
        let flags = u16::from(a >> 3 & 7);
        let [table, ..] = layout::rings(queue);
        let (table, next) = match a & 0x40 {
            0 => (table, step.d_high() & 0x7f),
            _ => (layout::indirect_table(queue), step.d_high() & 0x3f),
        };
        let (mut address, mut len) = (layout::address(step.d_low()), layout::len(c));
        if flags & INDIRECT != 0 && a & 0x80 == 0 {
            (address, len) = (layout::indirect_table(queue), 16 * u32::from(c % (INDIRECT_SLACK + 1)));
        }
        self.put_descriptor(table + 16 * u64::from(b & 0x7f), address, len, flags, next);
    }

    fn publish(&self, queue: u8, head: u16) {
        let [_, available, _] = layout::rings(queue);
        let index = self.load(available + 2);
        self.fill(available + 4 + 2 * (u64::from(index) % self.size(queue)), &head.to_le_bytes());
        self.fill(available + 2, &index.wrapping_add(1).to_le_bytes());
    }

    fn jump(&self, queue: u8, by: u16) {
        let [_, available, _] = layout::rings(queue);
        let index = self.load(available + 2);
        self.fill(available + 2, &index.wrapping_add(by).to_le_bytes());
    }

    fn kick(&self, queue: u8, value: Option<u16>) {
        let at = NOTIFY + 4 * u64::from(queue % QUEUES);
        match value {
            Some(value) => self.write(at, &value.to_le_bytes()),
            None if self.driver.doorbells.write(self.driver.bar(0).wrapping_add(at)) => {}
            None => self.write(at, &u16::from(queue).to_le_bytes()),
        }
        self.settle();
    }

    /// Waits until all kicks were heard and served.
    fn settle(&self) {
        // The second kick is heard only when the first has been served.
        for round in 0..2 {
            let deadline = Instant::now() + PATIENCE;
            while !self.driver.doorbells.heard() {
                if Instant::now() > deadline {
                    return;
                }
                thread::yield_now();
            }
            if round == 0 {
                for address in self.driver.doorbells.addresses() {
                    self.driver.doorbells.write(address);
                }
            }
        }
    }

    fn queue(&mut self, step: Step) {
        let Step { a, b, c, .. } = step;
        let queue = a % QUEUES;
        let size = 1 << (b & 7);
        self.sizes[usize::from(queue)] = size;
        self.write(QUEUE_SELECT, &u16::from(queue).to_le_bytes());
        self.write(QUEUE_SIZE, &size.to_le_bytes());
        self.write(QUEUE_VECTOR, &(u16::from(queue) + 1).to_le_bytes());
        let mut rings = layout::rings(queue);
        if c & 2 != 0 {
            rings[usize::from(c >> 2) % 3] = layout::address(step.d_low()) & !1;
        }
        for (register, address) in (QUEUE_ADDRESSES..).step_by(8).zip(rings) {
            self.write(register, &address.to_le_bytes());
        }
        if c & 1 == 0 {
            self.write(QUEUE_ENABLE, &[1, 0]);
        }
    }

    fn offered(&self) -> u64 {
        let half = |select: u32| {
            let mut data = [0; 4];
            self.write(DEVICE_FEATURE_SELECT, &select.to_le_bytes());
            self.read(DEVICE_FEATURE, &mut data);
            u64::from(u32::from_le_bytes(data))
        };
        half(0) | half(1) << 32
    }

    fn negotiate(&mut self, step: Step) {
        for status in [0, 1, 3] {
            self.write(STATUS, &[status]);
        }
        let wanted = match step.c & 3 {
            0 => u64::from(step.d) | 1 << 32,
            1 => u64::from(step.d),
            _ => u64::MAX << 32 | u64::from(step.d),
        };
        let features = (self.offered() & wanted).to_le_bytes();
        for (select, half) in [(0_u32, &features[..4]), (1, &features[4..])] {
            self.write(DRIVER_FEATURE_SELECT, &select.to_le_bytes());
            self.write(DRIVER_FEATURE, half);
        }
        self.write(STATUS, &[0xb]);
        self.write(CONFIG_VECTOR, &[0, 0]);
    }

    /// Stops the device and starts it again. Where `copy` is set, another like it takes its state over, and must then
    /// save the same.
    fn suspend(&mut self, copy: bool) {
        self.driver.device.suspend();
        if copy && self.copies > 0 {
            self.copies -= 1;
            let mut saved = Sections::default();
            self.driver.device.save(&mut saved).expect("a suspended device can be saved");
            saved.check_drained();
            let (interrupts, doorbells) = (Arc::new(FakeInterrupts::new()), Arc::new(FakeDoorbells::new()));
            let memory = self.driver.memory.clone();
            let twin = VirtioPci::new("twin", self.host.twin(), memory, interrupts, doorbells).expect("a function");
            twin.restore(&mut saved).expect("what was saved can be restored");
            let mut again = Sections::default();
            twin.save(&mut again).expect("a restored device can be saved");
            assert_eq!(saved, again, "a copy saves the same");
        }
        self.driver.device.resume();
    }

    fn request(&mut self, step: Step) {
        let Step { a: queue, b: shape, c, .. } = step;
        let header = self.host.header(step);
        let at = layout::header(queue, self.requests);
        self.requests = self.requests.wrapping_add(1);
        self.fill(at, &header);
        let buffers = 0x8000 + 0x400 * u64::from(self.requests % 32);
        // A length by its code, in the lower half for what is read and in the upper for what is written.
        let some = |code: u8| [0, 1, 60, 512, 1024, 1514, 4096, 8192][usize::from(code & 7)];
        let header_len = u32::try_from(header.len()).unwrap_or(0);
        let parts = [
            (at, header_len, false),
            (buffers, some(c), false),
            (buffers, some(c >> 3), true),
            (at + 15, u32::from(shape & 1), true),
        ];
        let parts: Vec<_> = parts.into_iter().filter(|part| part.1 > 0).collect();
        self.fill(buffers, &pattern(step.d, usize::from(c & 7) * 64));
        self.chain(queue, &parts, shape & 2 != 0);
        if shape & 4 == 0 {
            self.kick(queue, None);
        }
    }

    /// Makes a chain available, with an indirect table or without.
    fn chain(&mut self, queue: u8, parts: &[(u64, u32, bool)], indirect: bool) {
        let [table, ..] = layout::rings(queue);
        let size = self.sizes[usize::from(queue % QUEUES)];
        let first = self.taken[usize::from(queue % QUEUES)];
        let place = |index: u16| match indirect {
            true => (layout::indirect_table(queue) + 16 * u64::from(index), index),
            false => (table + 16 * u64::from(first.wrapping_add(index) % size), first.wrapping_add(index) % size),
        };
        for (index, (address, len, writable)) in (0..).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            let (_, next) = place(index + 1);
            self.put_descriptor(place(index).0, *address, *len, flags, next);
        }
        let count = u16::try_from(parts.len()).unwrap_or(0);
        let head = first % size;
        if indirect {
            let at = table + 16 * u64::from(head);
            self.put_descriptor(at, layout::indirect_table(queue), 16 * u32::from(count), INDIRECT, 0);
        }
        let taken = if indirect { 1 } else { count };
        self.taken[usize::from(queue % QUEUES)] = first.wrapping_add(taken);
        self.publish(queue, head);
    }

    fn place(&self, which: u8) {
        let low = 0xc000_0000;
        let places = [self.home, self.home + BAR_LEN, low, low + BAR_LEN, 0xe000_0000, 0x1f_ffff_8000, u64::MAX, 0];
        self.place_at(places[usize::from(which & 7)]);
    }

    fn place_at(&self, address: u64) {
        let bytes = address.to_le_bytes();
        self.driver.config_write(0x10, &bytes[..4]);
        self.driver.config_write(0x14, &bytes[4..]);
    }

    fn vector(&self, step: Step) {
        let entry = MSIX_TABLE + 16 * u64::from(step.a & 0xf);
        self.write(entry, &(0xfee0_0000_u64 | u64::from(step.c) << 12).to_le_bytes());
        self.write(entry + 8, &step.d.to_le_bytes());
        self.write(entry + 12, &u32::from(step.b).to_le_bytes());
    }

    fn window(&self, step: Step) {
        let (at, len) = (self.window, u32::from(step.c & 3) + 1);
        self.driver.config_write(at + 4, &[if step.c & 0x80 != 0 { step.c } else { 0 }]);
        self.driver.config_write(at + 8, &u32::from(step.ab()).to_le_bytes());
        self.driver.config_write(at + 12, &len.to_le_bytes());
        match step.c & 4 {
            0 => self.driver.config_read(at + 16, &mut [0; 4]),
            _ => self.driver.config_write(at + 16, &step.d.to_le_bytes()),
        }
    }

    fn reset(&self) {
        let bar = self.driver.bar(0);
        let answers = WINDOWS.iter().any(|window| window.contains(&bar))
            && self.driver.config_dword(0x04) & 2 != 0
            && self.driver.mmio.write(bar + STATUS, &[0]);
        if answers {
            let mut status = [0xff];
            self.read(STATUS, &mut status);
            assert_eq!(status, [0], "a reset is done when its write returns");
        }
    }
}

/// Entries by which an indirect table may claim to be longer than it is.
const INDIRECT_SLACK: u8 = 64;

/// Offsets of the MSI-X capability and of the one for access through configuration space.
fn capabilities(driver: &PciDriver) -> (u16, u16) {
    let (mut msix, mut window) = (0, 0);
    let mut at = driver.config_dword(0x34) & 0xff;
    while at != 0 {
        let register = u16::try_from(at).expect("a byte");
        let head = driver.config_dword(register);
        match head.to_le_bytes() {
            [0x11, ..] => msix = register,
            [0x09, _, _, 5] => window = register,
            _ => {}
        }
        at = head >> 8 & 0xff;
    }
    (msix, window)
}

/// A saved state in memory.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sections(BTreeMap<String, (u32, String)>);

impl Sections {
    /// Each chain that a stopped device took from a queue it has returned, unless it needs a reset.
    fn check_drained(&self) {
        let (_, text) = &self.0["virtio"];
        let state: serde_json::Value = serde_json::from_str(text).expect("a section is JSON");
        let needs_reset = state["status"].as_u64().expect("a status") & 0x40 != 0;
        for queue in state["queues"].as_array().expect("queues") {
            assert!(
                needs_reset || queue["next_avail"] == queue["next_used"],
                "a stopped queue is not drained: {queue}"
            );
        }
    }
}

impl StateSink for Sections {
    fn section(&mut self, name: &str, version: u32, data: &[u8]) -> devices::virtio::Result<()> {
        let text = String::from_utf8(data.to_vec()).expect("a section is JSON");
        let before = self.0.insert(name.to_owned(), (version, text));
        assert!(before.is_none(), "two sections are called {name}");
        Ok(())
    }
}

impl StateSource for Sections {
    fn section(&mut self, name: &str) -> devices::virtio::Result<Option<(u32, Vec<u8>)>> {
        Ok(self.0.get(name).map(|(version, text)| (*version, text.clone().into_bytes())))
    }
}
