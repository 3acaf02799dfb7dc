mod saved;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Instant;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use proptest::prelude::*;

use crate::io_thread::{IoThread, Running};
use crate::pci::PciFunction;
use crate::virtio::testing::{Buf, DriverQueue, PciDriver, Sections, TIMEOUT};
use crate::virtio::{
    Chain, DeviceInfo, Error, Fault, QueueState, Result, Resumed, RunningQueue, Served, StateSink, StateSource,
    VirtioDevice,
};

const FEATURE: u64 = 1 << 3;
const EVENT_IDX: u64 = 1 << 29;
const CONFIG: [u8; 6] = *b"config";

/// Answers each chain with what it holds, on its own thread. It keeps the last chain until the next one comes or
/// it is stopped, so there is always a request in flight.
struct Worker {
    queue: RunningQueue,
    held: Option<Chain>,
    seen: Arc<Seen>,
}

impl Worker {
    fn answer(queue: &mut RunningQueue, chain: Chain) -> std::result::Result<(), Fault> {
        let mut data = Vec::new();
        chain.reader().take(1 << 16).read_to_end(&mut data).map_err(|_| Fault::Request("unreadable"))?;
        if data == b"bad" {
            return Err(Fault::Request("bad"));
        }
        let written = chain.writer().write(&data).map_err(|_| Fault::Request("unwritable"))?;
        queue.complete(chain, u32::try_from(written).unwrap_or(0))
    }

    fn stop(mut self) -> QueueState {
        if let Some(chain) = self.held.take() {
            Self::answer(&mut self.queue, chain).unwrap();
        }
        self.queue.into_state()
    }
}

impl MutEventSubscriber for Worker {
    fn init(&mut self, ops: &mut EventOps) {
        ops.add(Events::new(self.queue.kick(), EventSet::IN)).unwrap();
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let Self { queue, held, seen } = self;
        queue.serve(|queue, chain| {
            seen.taken.fetch_add(1, Ordering::SeqCst);
            if let Some(before) = held.replace(chain) {
                Self::answer(queue, before)?;
            }
            Ok(Served::More)
        });
    }
}

#[derive(Default)]
struct Seen {
    resets: AtomicU32,
    /// Chains that workers took.
    taken: AtomicU32,
    resumed: Mutex<Vec<Resumed>>,
}

struct Echo {
    thread: Arc<IoThread>,
    running: BTreeMap<u16, Running<Worker>>,
    config: [u8; 6],
    seen: Arc<Seen>,
    refuses: bool,
}

impl Echo {
    fn new() -> (Arc<Seen>, Box<Self>) {
        let seen = Arc::new(Seen::default());
        let thread = IoThread::spawn("echo").unwrap();
        let echo = Self { thread, running: BTreeMap::new(), config: CONFIG, seen: seen.clone(), refuses: false };
        (seen, Box::new(echo))
    }
}

impl VirtioDevice for Echo {
    fn info(&self) -> DeviceInfo {
        DeviceInfo { device_type: 42, features: FEATURE, queue_sizes: vec![64, 16], config_len: 6 }
    }

    fn read_config(&self, offset: u32, data: &mut [u8]) {
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.config[at..at + data.len()]);
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) {
        let at = usize::try_from(offset).unwrap();
        self.config[at..at + data.len()].copy_from_slice(data);
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()> {
        if self.refuses {
            return Err(Error::Driver("it does not want to".into()));
        }
        let host = |source| Error::Host { what: "worker", source };
        let worker = self.thread.add(Worker { queue, held: None, seen: self.seen.clone() }).map_err(host)?;
        self.running.insert(index, worker);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>> {
        let host = |source| Error::Host { what: "worker", source };
        let worker = self.running.remove(&index).map(Running::remove).transpose().map_err(host)?;
        Ok(worker.map(|worker| worker.stop()))
    }

    fn reset(&mut self) {
        self.seen.resets.fetch_add(1, Ordering::SeqCst);
        self.config = CONFIG;
    }

    fn save(&self, into: &mut dyn StateSink) -> Result<()> {
        into.section("echo", 1, &self.config)
    }

    fn restore(&mut self, from: &mut dyn StateSource) -> Result<()> {
        let (_, data) = from.section("echo")?.ok_or(Error::State("echo is missing".into()))?;
        self.config = data.try_into().map_err(|_| Error::State("echo".into()))?;
        Ok(())
    }

    fn resumed(&mut self, why: Resumed) {
        self.seen.resumed.lock().unwrap().push(why);
    }
}

fn driver() -> (Arc<Seen>, PciDriver) {
    let (seen, echo) = Echo::new();
    (seen, PciDriver::new(echo))
}

/// A driver with queue 0 running.
fn running(features: u64) -> (Arc<Seen>, PciDriver, DriverQueue) {
    let (seen, mut driver) = driver();
    driver.negotiate(features);
    let queue = driver.setup_queue(0, 16);
    driver.setup_config_vector();
    driver.driver_ok();
    (seen, driver, queue)
}

/// Sends a chain, and where its answer is to be.
fn send(driver: &mut PciDriver, queue: &mut DriverQueue, text: &[u8]) -> u64 {
    let from = driver.alloc_bytes(text);
    let to = driver.alloc(64);
    queue.add(&[Buf::readable(from, u32::try_from(text.len()).unwrap()), Buf::writable(to, 64)]);
    driver.kick(0);
    to
}

/// Looks again and again, where no event tells of what is waited for.
fn until(mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + TIMEOUT;
    while !done() {
        assert!(Instant::now() < deadline, "it does not happen");
        std::thread::yield_now();
    }
}

#[test]
fn a_driver_finds_its_way_and_is_answered() {
    for features in [FEATURE, FEATURE | EVENT_IDX] {
        let (_, mut driver) = driver();
        assert_eq!(driver.config_dword(0), 0x106a_1af4);
        assert_eq!(driver.read::<6>(driver.config), CONFIG);
        assert_eq!(driver.negotiate(features) & features, features);
        assert_eq!((driver.queue_size(0), driver.queue_size(1), driver.queue_size(2)), (64, 16, 0));
        let mut queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        let mut answer = send(&mut driver, &mut queue, b"number 0");
        for number in 1..100 {
            let text = format!("number {}", number - 1);
            let next = send(&mut driver, &mut queue, format!("number {number}").as_bytes());
            let used = driver.wait_used(0, &mut queue);
            assert_eq!(usize::try_from(used.len).unwrap(), text.len());
            assert_eq!(driver.bytes(answer, text.len()), text.as_bytes());
            answer = next;
        }
        assert_eq!(driver.device.faults(), 0);
    }
}

#[test]
fn a_driver_that_does_not_know_of_private_memory_is_refused() {
    const ACCESS_PLATFORM: u64 = 1 << 33;
    let (_, device) = Echo::new();
    let driver = PciDriver::new(device);
    driver.device.require_access_platform();
    assert_ne!(driver.offered() & ACCESS_PLATFORM, 0);
    for (features, suit) in [(1 << 32, false), (1 << 32 | ACCESS_PLATFORM, true)] {
        driver.reset();
        driver.set_status(3);
        assert_eq!(driver.offer_back(features), suit, "{features:#x}");
    }
}

#[test]
fn features_must_be_ours_and_modern() {
    let (_, driver) = driver();
    for features in [0, FEATURE, 1 << 32 | 1 << 5, 1 << 32 | 1 << 40, u64::MAX] {
        driver.reset();
        driver.set_status(3);
        assert!(!driver.offer_back(features), "{features:#x}");
        driver.driver_ok();
        assert_eq!(driver.status() & 4, 0, "DRIVER_OK without FEATURES_OK");
    }
    let agreed = driver.negotiate(FEATURE);
    driver.offer_back(0);
    driver.write(driver.common + 8, &0_u32.to_le_bytes());
    let low = u32::from_le_bytes(driver.read(driver.common + 0xc));
    assert_eq!(u64::from(low), agreed & 0xffff_ffff, "features are fixed at FEATURES_OK");
}

#[test]
fn status_bits_do_not_go_back_or_out_of_order() {
    let (_, driver) = driver();
    driver.set_status(2);
    assert_eq!(driver.status(), 0, "DRIVER before ACKNOWLEDGE");
    driver.set_status(1);
    driver.set_status(3);
    driver.set_status(1);
    assert_eq!(driver.status(), 3);
    driver.set_status(0x33);
    assert_eq!(driver.status(), 3, "unknown bits");
    driver.set_status(0x83);
    assert_eq!(driver.status(), 0x83);
    driver.negotiate(0);
    driver.set_status(13);
    assert_eq!(driver.status(), 11, "DRIVER_OK in a write that takes DRIVER back");
}

#[test]
fn queues_are_frozen_while_they_run() {
    let (_, mut driver, mut queue) = running(0);
    let registers = [(0x18, 2), (0x1c, 2), (0x20, 4), (0x24, 4), (0x28, 4), (0x2c, 4), (0x30, 4), (0x34, 4)];
    for index in [0_u16, 1] {
        driver.write(driver.common + 0x16, &index.to_le_bytes());
        let before: [u8; 0x38] = std::array::from_fn(|at| driver.read::<1>(driver.common + at as u64)[0]);
        for (register, len) in registers {
            for value in [[0, 1, 0, 0], [1, 0, 0, 0], [0xff; 4]] {
                driver.write(driver.common + register, &value[..len]);
            }
        }
        let after: [u8; 0x38] = std::array::from_fn(|at| driver.read::<1>(driver.common + at as u64)[0]);
        assert_eq!(after, before, "queue {index}");
    }
    send(&mut driver, &mut queue, b"one");
    send(&mut driver, &mut queue, b"two");
    assert_eq!(driver.wait_used(0, &mut queue).len, 3);
    assert_eq!(driver.device.faults(), 0);
}

#[test]
fn a_queue_takes_only_sizes_and_addresses_that_work() {
    let (_, mut driver) = driver();
    driver.negotiate(0);
    driver.write(driver.common + 0x16, &0_u16.to_le_bytes());
    for size in [0_u16, 3, 128, 0x8000, 0xffff] {
        driver.write(driver.common + 0x18, &size.to_le_bytes());
        assert_eq!(driver.queue_size(0), 64);
    }
    let mut queue = driver.setup_queue(1, 16);
    queue.used_ring = 64 << 20;
    driver.enable_queue(0, &queue);
    assert_eq!(u16::from_le_bytes(driver.read(driver.common + 0x1c)), 0);
    assert!(driver.needs_reset());
    assert_eq!(driver.device.faults(), 1);
    driver.driver_ok();
    driver.reset();
    assert!(!driver.needs_reset());
}

#[test]
fn a_reset_completes_what_is_in_flight() {
    let (seen, mut driver, mut queue) = running(0);
    let resets = seen.resets.load(Ordering::SeqCst);
    for round in 0..50 {
        seen.taken.store(0, Ordering::SeqCst);
        let answer = send(&mut driver, &mut queue, b"in flight");
        if round % 2 == 0 {
            until(|| seen.taken.load(Ordering::SeqCst) == 1);
        }
        driver.reset();
        let taken = seen.taken.load(Ordering::SeqCst);
        let used = queue.used();
        assert_eq!(used.map(|used| used.len), (taken == 1).then_some(9), "completed when the write returns");
        if taken == 1 {
            assert_eq!(driver.bytes(answer, 9), b"in flight");
        }
        assert!(driver.doorbells.addresses().is_empty());
        driver.negotiate(0);
        queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        assert_eq!(driver.doorbells.addresses().len(), 1);
        assert_eq!(seen.resets.load(Ordering::SeqCst), resets + 2 * (round + 1));
    }
    assert_eq!(driver.device.faults(), 0);
}

#[test]
fn what_was_available_before_driver_ok_is_served() {
    let (_, mut driver) = driver();
    driver.negotiate(EVENT_IDX);
    let mut queue = driver.setup_queue(0, 16);
    let from = driver.alloc_bytes(b"early");
    queue.add(&[Buf::readable(from, 5)]);
    queue.add(&[Buf::readable(from, 5)]);
    driver.driver_ok();
    driver.wait_used(0, &mut queue);
}

#[test]
fn a_broken_rule_is_told_and_a_reset_mends_it() {
    let (_, mut driver, mut queue) = running(0);
    queue.publish(99);
    driver.kick(0);
    driver.wait_needs_reset();
    assert_eq!(driver.device.faults(), 1);
    queue.jump(1000);
    driver.kick(0);
    driver.negotiate(0);
    let mut queue = driver.setup_queue(0, 16);
    driver.setup_config_vector();
    driver.driver_ok();
    send(&mut driver, &mut queue, b"bad");
    send(&mut driver, &mut queue, b"good");
    driver.wait_needs_reset();
    assert_eq!(driver.device.faults(), 2);
    assert_eq!(queue.used(), None);
}

#[test]
fn a_device_that_does_not_start_needs_a_reset() {
    let (_, mut echo) = Echo::new();
    echo.refuses = true;
    let mut driver = PciDriver::new(echo);
    driver.negotiate(0);
    driver.setup_queue(0, 16);
    driver.driver_ok();
    assert!(driver.needs_reset());
    assert_eq!(driver.device.faults(), 1);
}

#[test]
fn kicks_without_a_doorbell_come_through() {
    let (_, mut driver, mut queue) = running(0);
    for text in [b"one", b"two"] {
        let from = driver.alloc_bytes(text);
        queue.add(&[Buf::readable(from, 3)]);
        driver.write(driver.notify, &0_u16.to_le_bytes());
    }
    driver.wait_used(0, &mut queue);
    for index in [1_u64, 2, 1000] {
        driver.write(driver.notify + 4 * index, &[0; 2]);
    }
}

#[test]
fn interrupts_wait_for_their_vector_to_be_unmasked() {
    let (_, mut driver, mut queue) = running(0);
    driver.set_vector(1, false);
    let settings = driver.interrupts.settings();
    send(&mut driver, &mut queue, b"one");
    send(&mut driver, &mut queue, b"two");
    // The answer is there although nothing may tell of it: wait for the ring itself.
    let event = driver.vector_event(1).unwrap();
    until(|| queue.used().is_some());
    let pending = || u64::from_le_bytes(driver.read(driver.msix_table + 0x3000));
    until(|| pending() != 0);
    assert_eq!(pending(), 1 << 1);
    assert!(event.read().is_err(), "no interrupt while masked");
    assert_eq!(driver.interrupts.settings(), settings, "masking costs the hypervisor nothing");
    driver.set_vector(1, true);
    assert!(driver.wait_vector(1));
    assert_eq!(pending(), 0);
    assert_eq!(driver.interrupts.settings(), settings, "nor does unmasking the same message");
}

#[test]
fn vectors_are_made_when_they_are_needed() {
    let (_, mut driver) = driver();
    driver.negotiate(0);
    assert_eq!(driver.interrupts.count(), 0);
    driver.setup_queue(0, 16);
    assert_eq!(driver.interrupts.count(), 1);
    driver.write(driver.common + 0x10, &7_u16.to_le_bytes());
    assert_eq!(driver.read::<2>(driver.common + 0x10), [0xff; 2], "there is no vector 7");
}

#[test]
fn the_doorbells_follow_the_bar() {
    let (_, mut driver, mut queue) = running(0);
    let old = driver.bar(0);
    assert_eq!(driver.doorbells.addresses(), [old + 0x3000]);
    driver.config_write(0x04, &[0x04, 0]);
    assert!(driver.doorbells.addresses().is_empty());
    assert!(!driver.mmio.read(old, &mut [0; 4]), "memory accesses are off");
    driver.config_write(0x10, &0x1f_0000_0000_u64.to_le_bytes());
    driver.config_write(0x04, &[0x06, 0]);
    driver.find_structures();
    assert_eq!(driver.common, 0x1f_0000_0000);
    assert_eq!(driver.doorbells.addresses(), [0x1f_0000_3000]);
    assert!(!driver.mmio.read(old, &mut [0; 4]), "nothing is left behind");
    send(&mut driver, &mut queue, b"one");
    send(&mut driver, &mut queue, b"two");
    driver.wait_used(0, &mut queue);
}

#[test]
fn absurd_addresses_do_no_damage() {
    let (_, driver, _queue) = running(0);
    let home = driver.bar(0);
    // Over the ECAM window, in RAM, at the end of the address space, and the sizing pattern.
    for address in [0xe000_0000, 0, 0x1000, u64::MAX - 0x7fff, u64::MAX, 0x20_0000_0000] {
        driver.config_write(0x10, &address.to_le_bytes());
        assert!(!driver.mmio.read(home, &mut [0; 4]), "{address:#x}");
        assert_eq!(driver.config_dword(0), 0x106a_1af4, "ECAM answers");
    }
    assert!(driver.doorbells.addresses().is_empty());
    driver.config_write(0x10, &home.to_le_bytes());
    assert_eq!(driver.status(), 15);
    assert_eq!(driver.doorbells.addresses(), [home + 0x3000]);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let (_, driver) = driver();
    let window = (0x40..0xf0_u16).step_by(4).find(|at| driver.config_dword(*at) & 0xff00_00ff == 0x0500_0009).unwrap();
    let access = |offset: u32, len: u32| {
        driver.config_write(window + 4, &[0]);
        driver.config_write(window + 8, &offset.to_le_bytes());
        driver.config_write(window + 12, &len.to_le_bytes());
    };
    access(0x14, 1);
    driver.config_write(window + 16, &[1]);
    assert_eq!(driver.status(), 1);
    driver.config_write(window + 16, &[3]);
    assert_eq!(driver.config_dword(window + 16), 3);
    access(0x2000, 4);
    assert_eq!(driver.config_dword(window + 16).to_le_bytes(), *b"conf");
    for (offset, len) in [(0x7ffe, 4), (0x8000, 4), (u32::MAX, 1), (0, 3), (0, 8), (2, 4)] {
        access(offset, len);
        driver.config_dword(window + 16);
        driver.config_write(window + 16, &[0; 4]);
    }
    assert_eq!(driver.status(), 3);
}

#[test]
fn configuration_is_bounded() {
    let (_, driver) = driver();
    assert_eq!(driver.read::<4>(driver.config + 4), [b'i', b'g', 0, 0]);
    assert_eq!(driver.read::<8>(driver.config + 0xff8), [0; 8]);
    driver.write(driver.config + 4, &[1, 2, 3, 4]);
    driver.write(driver.config + 6, &[9; 8]);
    assert_eq!(driver.read::<8>(driver.config), *b"conf\x01\x02\0\0");
}

#[test]
fn registers_stay_usable_while_another_thread_resets() {
    let (_, mut driver, mut queue) = running(0);
    let mmio = Arc::clone(&driver.mmio);
    let (common, notify) = (driver.common, driver.notify);
    let (stop, stopped) = mpsc::channel::<()>();
    let other = std::thread::spawn(move || {
        while stopped.try_recv() == Err(mpsc::TryRecvError::Empty) {
            mmio.read(common + 0x14, &mut [0]);
            mmio.write(notify, &[0, 0]);
        }
    });
    for _ in 0..20 {
        send(&mut driver, &mut queue, b"x");
        driver.negotiate(0);
        queue = driver.setup_queue(0, 16);
        driver.driver_ok();
    }
    drop(stop);
    other.join().unwrap();
    assert_eq!(driver.device.faults(), 0);
}

/// An access: to configuration space or the BAR, a read or a write.
fn any_access() -> impl Strategy<Value = (bool, bool, u64, Vec<u8>)> {
    let offset = prop_oneof![0..0x40_u64, 0x2000..0x2010_u64, 0x3000..0x3020_u64, 0x4000..0x4040_u64, 0..0x8000_u64];
    let data = prop_oneof![
        proptest::collection::vec(any::<u8>(), 1..9),
        prop_oneof![Just(1), Just(2), Just(4), Just(8)]
            .prop_flat_map(|len| proptest::collection::vec(any::<u8>(), len)),
        (0..16_u8).prop_map(|status| vec![status]),
    ];
    (any::<bool>(), any::<bool>(), offset, data)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn no_register_access_panics_or_hangs(
        start_running in any::<bool>(),
        accesses in proptest::collection::vec(any_access(), 0..200),
    ) {
        let (_, driver) = match start_running {
            true => {
                let (seen, driver, _queue) = running(EVENT_IDX);
                (seen, driver)
            }
            false => driver(),
        };
        for (config, write, offset, mut data) in accesses {
            let register = u16::try_from(offset % 0x1000).unwrap();
            match (config, write) {
                (true, true) => driver.config_write(register, &data),
                (true, false) => driver.config_read(register, &mut data),
                (false, true) => driver.device.bar_write(0, offset, &data),
                (false, false) => driver.device.bar_read(0, offset, &mut data),
            }
        }
        driver.device.bar_write(0, 0x14, &[0]);
        let mut status = [0xff];
        driver.device.bar_read(0, 0x14, &mut status);
        prop_assert_eq!(status, [0]);
        prop_assert_eq!(driver.config_dword(0), 0x106a_1af4);
    }
}
