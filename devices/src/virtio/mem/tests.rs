use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::virtio::testing::{Buf, DriverQueue, PciDriver, Sections};

const START: u64 = 4 << 30;
const BLOCK: u64 = 2 << 20;
const LEN: u64 = 64 * BLOCK;

/// What became of the host's memory.
#[derive(Debug, PartialEq, Eq)]
enum Done {
    Plug(Range<u64>),
    Unplug(Range<u64>),
    Resized(u64),
}

/// A host that does as it is told, or has nothing to give.
struct Host {
    done: Sender<Done>,
    full: Arc<Mutex<bool>>,
}

impl Host {
    fn tell(&self, done: Done) -> io::Result<()> {
        if *self.full.lock().unwrap() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        self.done.send(done).map_err(io::Error::other)
    }
}

impl Backing for Host {
    fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.tell(Done::Plug(range))
    }

    fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.tell(Done::Unplug(range))
    }

    fn resized(&self, plugged: u64) {
        self.tell(Done::Resized(plugged)).unwrap();
    }
}

struct Bench {
    driver: PciDriver,
    queue: DriverQueue,
    control: MemControl,
    done: Receiver<Done>,
    full: Arc<Mutex<bool>>,
    request: u64,
    response: u64,
}

fn options() -> MemOptions {
    MemOptions { id: "memory".into(), start: START, len: LEN, block_size: BLOCK }
}

fn device() -> (Mem, Receiver<Done>, Arc<Mutex<bool>>) {
    let (done, seen) = channel();
    let full = Arc::<Mutex<bool>>::default();
    let host = Host { done, full: full.clone() };
    (Mem::new(options(), Box::new(host)).unwrap(), seen, full)
}

impl Bench {
    fn new() -> Self {
        let (device, done, full) = device();
        let control = device.control();
        let mut driver = PciDriver::new(Box::new(device));
        driver.negotiate(u64::MAX);
        driver.setup_config_vector();
        let queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        let (request, response) = (driver.alloc(REQUEST), driver.alloc(16));
        Self { driver, queue, control, done, full, request, response }
    }

    /// Sends a request and gives type and state of the answer.
    fn ask(&mut self, kind: u16, address: u64, blocks: u16) -> (u16, u16) {
        let mut bytes = [0; 24];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        bytes[16..18].copy_from_slice(&blocks.to_le_bytes());
        self.write(&bytes);
        self.queue.add(&[Buf::readable(self.request, 24), Buf::writable(self.response, 10)]);
        self.driver.kick(0);
        assert_eq!(self.driver.wait_used(0, &mut self.queue).len, 10);
        let answer = self.driver.bytes(self.response, 10);
        (u16::from_le_bytes([answer[0], answer[1]]), u16::from_le_bytes([answer[8], answer[9]]))
    }

    fn write(&self, bytes: &[u8]) {
        use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
        self.driver.memory.memory().write_slice(bytes, GuestAddress(self.request)).unwrap();
    }

    fn plug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(0, START + block * BLOCK, count).0
    }

    fn unplug(&mut self, block: u64, count: u16) -> u16 {
        self.ask(1, START + block * BLOCK, count).0
    }

    fn config(&self, offset: u64) -> u64 {
        u64::from_le_bytes(self.driver.read(self.driver.config + offset))
    }

    fn done(&self) -> Vec<Done> {
        self.done.try_iter().collect()
    }
}

const REQUEST: u64 = 32;
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

#[test]
fn blocks_come_and_go_as_they_are_asked_for() {
    let mut bench = Bench::new();
    let fixed = [0, 16, 24, 32].map(|offset| bench.config(offset));
    assert_eq!(fixed, [BLOCK, START, LEN, LEN]);
    assert_eq!(bench.plug(0, 1), NACK, "nothing is asked for yet");
    bench.control.request(4 * BLOCK);
    assert!(bench.driver.wait_vector(0), "the driver is told");
    assert_eq!((bench.config(40), bench.config(48)), (0, 4 * BLOCK));
    assert_eq!(bench.plug(10, 3), ACK);
    assert_eq!(bench.plug(0, 2), NACK, "one more than is asked for");
    assert_eq!(bench.plug(0, 1), ACK);
    assert_eq!((bench.config(40), bench.control.plugged()), (4 * BLOCK, 4 * BLOCK));
    // Fewer are asked for: the driver chooses which go.
    bench.control.request(BLOCK);
    assert_eq!(bench.unplug(11, 1), ACK);
    assert_eq!(bench.ask(2, 0, 0).0, ACK, "all go at once");
    assert_eq!(bench.control.plugged(), 0);
    let blocks = |range: Range<u64>| range.start * BLOCK..range.end * BLOCK;
    assert_eq!(
        bench.done(),
        [
            Done::Plug(blocks(10..13)),
            Done::Resized(3 * BLOCK),
            Done::Plug(blocks(0..1)),
            Done::Resized(4 * BLOCK),
            Done::Unplug(blocks(11..12)),
            Done::Resized(3 * BLOCK),
            Done::Unplug(blocks(0..1)),
            Done::Unplug(blocks(10..11)),
            Done::Unplug(blocks(12..13)),
            Done::Resized(0),
        ]
    );
}

#[test]
fn states_are_told() {
    let mut bench = Bench::new();
    bench.control.request(LEN);
    assert_eq!(bench.plug(1, 2), ACK);
    let mut state = |block: u64, count| bench.ask(3, START + block * BLOCK, count);
    assert_eq!([state(1, 2), state(3, 1), state(0, 2)], [(ACK, 0), (ACK, 1), (ACK, 2)]);
    assert_eq!(state(64, 1).0, ERROR);
}

#[test]
fn wrong_requests_are_errors_and_change_nothing() {
    let mut bench = Bench::new();
    bench.control.request(LEN);
    assert_eq!(bench.plug(8, 2), ACK);
    bench.done();
    let wrong = [
        ("unaligned", 0, START + 4096, 1),
        ("no blocks", 0, START, 0),
        ("before the region", 0, START - BLOCK, 1),
        ("beyond the region", 0, START + LEN, 1),
        ("over its end", 0, START + LEN - BLOCK, 2),
        ("at the end of all addresses", 0, u64::MAX - BLOCK + 1, u16::MAX),
        ("plugged in part", 0, START + 7 * BLOCK, 2),
        ("unplugged in part", 1, START + 9 * BLOCK, 2),
        ("not plugged", 1, START, 1),
        ("an unknown type", 4, START, 1),
        ("another", u16::MAX, START + 8 * BLOCK, 2),
    ];
    for (what, kind, address, blocks) in wrong {
        assert_eq!(bench.ask(kind, address, blocks).0, ERROR, "{what}");
    }
    assert_eq!(bench.done(), []);
    assert_eq!(bench.control.plugged(), 2 * BLOCK);
}

#[test]
fn a_host_that_cannot_is_busy_and_nothing_changes() {
    let mut bench = Bench::new();
    bench.control.request(LEN);
    assert_eq!(bench.plug(0, 2), ACK);
    *bench.full.lock().unwrap() = true;
    assert_eq!([bench.plug(2, 1), bench.unplug(0, 1), bench.ask(2, 0, 0).0], [BUSY; 3]);
    assert_eq!(bench.control.plugged(), 2 * BLOCK);
    *bench.full.lock().unwrap() = false;
    assert_eq!([bench.plug(2, 1), bench.unplug(0, 3)], [ACK; 2]);
}

#[test]
fn a_driver_that_comes_again_finds_blocks_plugged_and_is_told_of_the_size() {
    let mut bench = Bench::new();
    bench.control.request(4 * BLOCK);
    assert_eq!(bench.plug(3, 4), ACK);
    bench.driver.negotiate(u64::MAX);
    bench.control.request(2 * BLOCK);
    bench.driver.setup_config_vector();
    bench.queue = bench.driver.setup_queue(0, 16);
    bench.driver.driver_ok();
    assert!(bench.driver.wait_vector(0), "what was asked for while no driver was there is told");
    assert_eq!((bench.config(40), bench.config(48)), (4 * BLOCK, 2 * BLOCK));
    assert_eq!(bench.ask(3, START + 3 * BLOCK, 4), (ACK, 0));
}

#[test]
fn rules_broken_need_a_reset_and_nothing_more() {
    let mut bench = Bench::new();
    bench.control.request(LEN);
    type Break = fn(&mut DriverQueue, u64);
    let rules: [(&str, Break); 4] = [
        ("a request that is too short", |queue, at| {
            queue.add(&[Buf::readable(at, 23), Buf::writable(at, 10)]);
        }),
        ("no room for the answer", |queue, at| {
            queue.add(&[Buf::readable(at, 24), Buf::writable(at, 9)]);
        }),
        ("outside memory", |queue, at| {
            queue.add(&[Buf::readable(at, 24), Buf::writable(START, 10)]);
        }),
        ("an index that jumps", |queue, _| queue.jump(17)),
    ];
    for (faults, (what, break_rule)) in (1..).zip(rules) {
        break_rule(&mut bench.queue, bench.request);
        bench.driver.kick(0);
        bench.driver.wait_needs_reset();
        assert_eq!(bench.driver.device.faults(), faults, "{what}");
        bench.driver.negotiate(u64::MAX);
        bench.driver.setup_config_vector();
        bench.queue = bench.driver.setup_queue(0, 16);
        bench.driver.driver_ok();
        assert_eq!(bench.plug(faults, 1), ACK, "after {what}");
    }
}

#[test]
fn what_was_saved_is_plugged_again_and_damage_is_refused() {
    let mut bench = Bench::new();
    bench.control.request(6 * BLOCK);
    assert_eq!([bench.plug(1, 2), bench.plug(5, 1)], [ACK; 2]);
    bench.driver.device.suspend();
    let mut saved = Sections::default();
    bench.driver.device.save(&mut saved).unwrap();
    let (mut again, done, _) = device();
    again.restore(&mut saved).unwrap();
    assert_eq!(done.try_iter().collect::<Vec<_>>(), [Done::Plug(BLOCK..3 * BLOCK), Done::Plug(5 * BLOCK..6 * BLOCK)]);
    assert_eq!(again.control().plugged(), 3 * BLOCK);
    let run = |start: u64, end: u64| format!(r#"{{"start":{start},"end":{end}}}"#);
    let with =
        |runs: &[String]| format!(r#"{{"block_size":{BLOCK},"requested":{BLOCK},"plugged":[{}]}}"#, runs.join(","));
    let damaged = [
        with(&[run(0, LEN + BLOCK)]),
        with(&[run(BLOCK, BLOCK)]),
        with(&[run(4096, BLOCK)]),
        with(&[run(0, BLOCK), run(0, 2 * BLOCK)]),
        with(&[]).replacen("2097152", "4194304", 1),
        "{}".into(),
    ];
    for text in damaged {
        saved.0.get_mut(SECTION).unwrap().1 = text.clone().into_bytes();
        let (mut device, _done, _) = device();
        assert!(device.restore(&mut saved).is_err(), "{text}");
    }
}

#[test]
fn a_region_is_one_of_whole_blocks() {
    let wrong = [
        MemOptions { start: START + 4096, ..options() },
        MemOptions { len: LEN + 4096, ..options() },
        MemOptions { len: 0, ..options() },
        MemOptions { block_size: 0, ..options() },
        MemOptions { block_size: 3 * BLOCK, ..options() },
        MemOptions { start: 0u64.wrapping_sub(BLOCK), ..options() },
    ];
    for options in wrong {
        let (done, _seen) = channel();
        let host = Host { done, full: Arc::default() };
        assert!(Mem::new(options.clone(), Box::new(host)).is_err(), "{options:?}");
    }
}
