use std::io::{Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

use proptest::prelude::*;
use virtio_queue::desc::split::Descriptor;
use vm_memory::GuestMemoryBackend;

use super::*;
use crate::virtio::chain::MAX_CHAIN_LENGTH;
use crate::virtio::testing::{Buf, DriverQueue, INDIRECT, NEXT, TIMEOUT, WRITE, guest_memory, wait};

const MEMORY_LEN: usize = 1 << 20;
const RING: u64 = 0x1000;
const TABLE: u64 = 0x8000;
const DATA: u64 = 0x1_0000;
const INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;

#[derive(Default)]
struct Recorder {
    used: AtomicU32,
    broken: AtomicU32,
    told: AtomicBool,
}

impl QueueEvents for Recorder {
    fn used(&self) {
        self.used.fetch_add(1, Ordering::SeqCst);
    }

    fn config_changed(&self) {
        self.told.store(true, Ordering::SeqCst);
    }

    fn broken(&self, _reason: &str) {
        self.broken.fetch_add(1, Ordering::SeqCst);
    }
}

struct Fixture {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    events: Arc<Recorder>,
    driver: DriverQueue,
    queue: RunningQueue,
}

fn fixture(size: u16, event_idx: bool) -> Fixture {
    let memory = guest_memory(MEMORY_LEN);
    let driver = DriverQueue::new(&memory, RING, size);
    let events = Arc::new(Recorder::default());
    let state = QueueState { event_idx_enabled: event_idx, ..driver.state() };
    let queue = RunningQueue::new(state, memory.clone(), kick_event().unwrap(), events.clone(), INDIRECT_DESC);
    Fixture { memory, events, driver, queue: queue.unwrap() }
}

impl Fixture {
    fn put(&self, at: u64, data: &[u8]) {
        self.memory.memory().write_slice(data, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.memory().read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

#[test]
fn a_chain_reads_and_writes_through_its_buffers() {
    let mut f = fixture(8, false);
    f.put(DATA, b"hello, ");
    f.put(DATA + 0x100, b"world");
    let buffers = [
        Buf::readable(DATA, 7),
        Buf::readable(DATA + 0x100, 5),
        Buf::writable(DATA + 0x200, 4),
        Buf::writable(DATA + 0x300, 4),
    ];
    for indirect in [false, true] {
        let head = match indirect {
            true => f.driver.add_indirect(TABLE, &buffers),
            false => f.driver.add(&buffers),
        };
        let chain = f.queue.next_chain().unwrap().unwrap();
        assert_eq!((chain.head(), chain.readable_len(), chain.writable_len()), (head, 12, 8));
        let mut text = String::new();
        chain.reader().read_to_string(&mut text).unwrap();
        assert_eq!(text, "hello, world");

        let mut reader = chain.reader();
        let mut rest = reader.split_at(9).unwrap();
        assert_eq!((reader.remaining(), rest.remaining()), (9, 3));
        assert_eq!(rest.read_obj::<u8>().unwrap(), b'r');
        assert!(rest.read_obj::<u32>().is_err(), "two bytes are left");
        assert_eq!(reader.slices().map(|slice| slice.len()).collect::<Vec<_>>(), [7, 2]);
        assert!(reader.split_at(10).is_err());

        let mut writer = chain.writer();
        let mut status = writer.split_at(7).unwrap();
        writer.skip(1);
        assert_eq!(writer.write(b"abcdefghi").unwrap(), 6);
        assert_eq!(writer.written(), 7);
        status.write_obj(0x7f_u8).unwrap();
        assert!(status.write_all(&[0]).is_err());
        f.queue.complete(chain, 8).unwrap();
        assert_eq!(f.get(DATA + 0x201, 3), b"abc");
        assert_eq!(f.get(DATA + 0x300, 4), b"def\x7f");
        assert_eq!(f.driver.used().map(|used| (used.id, used.len)), Some((u32::from(head), 8)));
        assert!(f.queue.next_chain().unwrap().is_none());
    }
}

/// What a driver may do wrong: the fault it gives: descriptors from index 0, and the head.
fn bad_chains() -> Vec<(&'static str, Vec<Descriptor>, u16)> {
    let d = Descriptor::new;
    let end = MEMORY_LEN as u64;
    vec![
        ("outside the table", vec![], 8),
        ("outside the table", vec![d(DATA, 1, NEXT, 8)], 0),
        ("longer than 8", vec![d(DATA, 1, NEXT, 1), d(DATA, 1, NEXT, 0)], 0),
        ("longer than 8", vec![d(DATA, 1, NEXT, 0)], 0),
        ("follows a device-writable", vec![d(DATA, 1, WRITE | NEXT, 1), d(DATA, 1, 0, 0)], 0),
        ("length 0", vec![d(DATA, 0, WRITE, 0)], 0),
        ("outside guest memory", vec![d(end, 1, 0, 0)], 0),
        ("outside guest memory", vec![d(end - 1, 2, 0, 0)], 0),
        ("outside guest memory", vec![d(u64::MAX, 2, 0, 0)], 0),
        ("outside guest memory", vec![d(DATA, u32::MAX, 0, 0)], 0),
        ("indirect", vec![d(TABLE, 0, INDIRECT, 0)], 0),
        ("indirect", vec![d(TABLE, 17, INDIRECT, 0)], 0),
        ("indirect", vec![d(TABLE, 16, INDIRECT | NEXT, 1), d(DATA, 1, 0, 0)], 0),
        ("indirect", vec![d(TABLE, 16 * 0x1_0000, INDIRECT, 0)], 0),
        ("outside guest memory", vec![d(end - 16, 32, INDIRECT, 0)], 0),
        ("outside guest memory", vec![d(u64::MAX - 15, 32, INDIRECT, 0)], 0),
    ]
}

#[test]
fn every_broken_rule_is_a_fault_of_its_own() {
    for (what, descriptors, head) in bad_chains() {
        let mut f = fixture(8, false);
        f.driver.add_raw(&descriptors, head);
        let fault = f.queue.next_chain().unwrap_err().to_string();
        assert!(fault.contains(what), "{fault}, not {what}");
    }
}

#[test]
fn broken_rules_within_an_indirect_table() {
    let d = Descriptor::new;
    let tables = [
        ("a table within a table", vec![d(TABLE, 16, INDIRECT, 0)]),
        ("longer than 2", vec![d(DATA, 1, NEXT, 1), d(DATA, 1, NEXT, 0)]),
        ("index 2 is outside", vec![d(DATA, 1, NEXT, 2), d(DATA, 1, 0, 0)]),
        ("follows a device-writable", vec![d(DATA, 1, WRITE | NEXT, 1), d(DATA, 1, 0, 0)]),
    ];
    for (what, table) in tables {
        let mut f = fixture(8, false);
        for (at, descriptor) in (0..).zip(&table) {
            f.driver.set_descriptor_at(TABLE + 16 * at, *descriptor);
        }
        let len = 16 * u32::try_from(table.len()).unwrap();
        f.driver.add_raw(&[d(TABLE, len, INDIRECT, 0)], 0);
        let fault = f.queue.next_chain().unwrap_err().to_string();
        assert!(fault.contains(what), "{fault}, not {what}");
    }
}

#[test]
fn indirect_tables_need_their_feature() {
    let mut f = fixture(8, false);
    f.queue.features = 0;
    f.driver.add_indirect(TABLE, &[Buf::readable(DATA, 1)]);
    assert!(matches!(f.queue.next_chain(), Err(Fault::Indirect(_))));
}

#[test]
fn a_table_cannot_make_the_monitor_allocate_without_bound() {
    let mut f = fixture(8, false);
    let buffers = vec![Buf::readable(DATA, 1); MAX_CHAIN_LENGTH];
    f.driver.add_indirect(0x2_0000, &buffers);
    let chain = f.queue.next_chain().unwrap().unwrap();
    assert_eq!(chain.reader().remaining(), MAX_CHAIN_LENGTH);
    f.queue.complete(chain, 0).unwrap();
    let buffers = vec![Buf::readable(DATA, 1); MAX_CHAIN_LENGTH + 1];
    f.driver.add_indirect(0x2_0000, &buffers);
    assert_eq!(f.queue.next_chain().unwrap_err(), Fault::ChainTooLong { limit: MAX_CHAIN_LENGTH });
}

#[test]
fn lengths_do_not_add_up_beyond_32_bits() {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 3 << 30)]);
    let memory = GuestMemoryAtomic::new(memory.unwrap());
    let mut driver = DriverQueue::new(&memory, RING, 8);
    let events = Arc::new(Recorder::default());
    let mut queue = RunningQueue::new(driver.state(), memory, kick_event().unwrap(), events, 0).unwrap();
    driver.add(&[Buf::readable(1 << 32, 2 << 30), Buf::writable(1 << 32, 2 << 30)]);
    assert_eq!(queue.next_chain().unwrap_err(), Fault::TotalLength);
}

#[test]
fn a_fault_is_told_once_and_ends_the_queue() {
    let mut f = fixture(8, false);
    f.driver.add(&[Buf::writable(DATA, 4)]);
    let held = f.queue.next_chain().unwrap().unwrap();
    f.driver.jump(9);
    assert_eq!(f.queue.next_chain().unwrap_err(), Fault::AvailableIndex { next: 1, size: 8 });
    f.queue.serve(|_, _| panic!("there is no chain"));
    f.driver.add(&[Buf::writable(DATA, 4)]);
    f.queue.serve(|_, _| panic!("the queue is broken"));
    f.queue.complete(held, 4).unwrap();
    f.queue.notify().unwrap();
    assert_eq!(f.driver.used(), None, "a broken queue returns nothing");
    assert_eq!((f.events.broken.load(Ordering::SeqCst), f.events.used.load(Ordering::SeqCst)), (1, 0));
}

#[test]
fn interrupts_follow_the_drivers_flags() {
    let mut f = fixture(8, false);
    for (flags, interrupts) in [(0, 1), (1, 1), (0, 2)] {
        f.driver.set_flags(flags);
        f.driver.add(&[Buf::writable(DATA, 4)]);
        f.queue.serve(|queue, chain| queue.complete(chain, 1).map(|()| Served::More));
        assert_eq!(f.events.used.load(Ordering::SeqCst), interrupts);
    }
    f.queue.notify().unwrap();
    assert_eq!(f.events.used.load(Ordering::SeqCst), 2, "nothing new, no interrupt");
}

#[test]
fn interrupts_follow_the_drivers_event_index() {
    let mut f = fixture(8, true);
    f.driver.ask_for_interrupt();
    for interrupts in [1, 1, 1] {
        f.driver.add(&[Buf::writable(DATA, 4)]);
        f.queue.serve(|queue, chain| queue.complete(chain, 1).map(|()| Served::More));
        assert_eq!(f.events.used.load(Ordering::SeqCst), interrupts);
    }
    while f.driver.used().is_some() {}
    f.driver.ask_for_interrupt();
    f.driver.add(&[Buf::writable(DATA, 4)]);
    f.queue.serve(|queue, chain| queue.complete(chain, 1).map(|()| Served::More));
    assert_eq!(f.events.used.load(Ordering::SeqCst), 2);
}

#[test]
fn a_chain_that_came_before_notification_was_on_is_not_lost() {
    for event_idx in [false, true] {
        let mut f = fixture(8, event_idx);
        f.queue.disable_notification().unwrap();
        assert!(f.queue.next_chain().unwrap().is_none());
        f.driver.add(&[Buf::writable(DATA, 4)]);
        assert!(f.queue.enable_notification().unwrap());
        f.queue.next_chain().unwrap().unwrap();
        assert!(!f.queue.enable_notification().unwrap());
    }
}

#[test]
fn no_kick_is_lost_to_a_driver_that_kicks_only_when_asked() {
    const ROUNDS: u32 = 20_000;
    for event_idx in [false, true] {
        let Fixture { mut driver, mut queue, .. } = fixture(8, event_idx);
        let kick = queue.kick().try_clone().unwrap();
        let (done, stop) = (Arc::new(AtomicBool::new(false)), kick.try_clone().unwrap());
        let worker_done = Arc::clone(&done);
        let worker = std::thread::spawn(move || {
            // As an I/O thread does: it looks at the queue only when kicked.
            while wait(queue.kick(), TIMEOUT) && !worker_done.load(Ordering::SeqCst) {
                queue.serve(|queue, chain| queue.complete(chain, 0).map(|()| Served::More));
            }
        });
        // Every entry of the available ring names this one chain, so that moving the index is all there is to do.
        driver.set_descriptor(0, Descriptor::new(DATA, 4, WRITE, 0));
        for round in 0..ROUNDS {
            // A little later each time, to meet the device at every step of its falling asleep.
            for step in 0..round % 256 {
                std::hint::black_box(step);
            }
            driver.jump(1);
            if driver.wants_kick(event_idx) {
                kick.write(1).unwrap();
            }
            let deadline = Instant::now() + TIMEOUT;
            while driver.used().is_none() {
                assert!(Instant::now() < deadline, "round {round}: the queue sleeps on a chain");
                std::hint::spin_loop();
            }
        }
        done.store(true, Ordering::SeqCst);
        stop.write(1).unwrap();
        worker.join().unwrap();
    }
}

#[test]
fn one_wakeup_serves_a_bounded_number_of_chains() {
    let mut f = fixture(512, false);
    for _ in 0..CHAINS_PER_WAKEUP + 10 {
        f.driver.add(&[Buf::writable(DATA, 4)]);
    }
    let mut served = 0;
    f.queue.serve(|queue, chain| {
        served += 1;
        queue.complete(chain, 0).map(|()| Served::More)
    });
    assert_eq!(served, CHAINS_PER_WAKEUP);
    assert_eq!(f.queue.kick().read().unwrap(), 1, "the worker comes back by itself");
    f.queue.serve(|queue, chain| {
        served += 1;
        queue.complete(chain, 0).map(|()| Served::More)
    });
    assert_eq!(served, CHAINS_PER_WAKEUP + 10);
    assert!(f.queue.kick().read().is_err());
}

#[test]
fn a_chain_put_back_comes_again() {
    let mut f = fixture(8, false);
    let heads = [f.driver.add(&[Buf::writable(DATA, 4)]), f.driver.add(&[Buf::writable(DATA, 4)])];
    let mut seen = Vec::new();
    for next in [Served::Enough, Served::More] {
        f.queue.serve(|queue, chain| {
            seen.push(chain.head());
            match next {
                Served::Enough => queue.put_back(chain),
                Served::More => queue.complete(chain, 0)?,
            }
            Ok(next)
        });
    }
    assert_eq!(seen, [heads[0], heads[0], heads[1]]);
    let state = f.queue.into_state();
    assert_eq!((state.next_avail, state.next_used), (2, 2));
}

#[test]
fn buffers_outlive_a_change_of_the_memory_map() {
    let mut f = fixture(8, false);
    f.put(DATA, b"kept");
    f.driver.add(&[Buf::readable(DATA, 4)]);
    let chain = f.queue.next_chain().unwrap().unwrap();
    let other = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    f.memory.lock().unwrap().replace(other);
    assert_eq!(f.memory.memory().num_regions(), 1);
    let mut data = [0; 4];
    chain.reader().read_all(&mut data).unwrap();
    assert_eq!(&data, b"kept");
    assert!(f.queue.complete(chain, 0).is_err(), "the ring is gone");
}

#[test]
fn a_ring_that_cannot_work_is_refused() {
    let f = fixture(8, false);
    let good = f.driver.state();
    let end = MEMORY_LEN as u64;
    let bad = [
        QueueState { ready: false, ..good },
        QueueState { size: 0, ..good },
        QueueState { size: 16, ..good },
        QueueState { desc_table: 8, ..good },
        QueueState { desc_table: end - 16, ..good },
        QueueState { avail_ring: end, ..good },
        QueueState { used_ring: u64::MAX - 3, ..good },
    ];
    for state in bad {
        let queue = RunningQueue::new(state, f.memory.clone(), kick_event().unwrap(), f.events.clone(), 0);
        assert!(queue.is_err(), "{state:?}");
    }
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let address = prop_oneof![0..MEMORY_LEN as u64, any::<u64>()];
    let len = prop_oneof![0..64_u32, (0..40_u32).prop_map(|n| 16 * n), any::<u32>()];
    (address, len, 0..8_u16, 0..18_u16)
        .prop_map(|(address, len, flags, next)| Descriptor::new(address, len, flags, next))
}

proptest! {
    #[test]
    fn no_ring_makes_the_monitor_panic(
        table in proptest::collection::vec(any_descriptor(), 16),
        heads in proptest::collection::vec(0..18_u16, 1..20),
        jump in prop_oneof![Just(0_u16), any::<u16>()],
        event_idx in any::<bool>(),
    ) {
        let mut f = fixture(16, event_idx);
        f.driver.add_raw(&table, heads[0]);
        for head in &heads[1..] {
            f.driver.publish(*head);
        }
        f.driver.jump(jump);
        f.queue.serve(|queue, chain| {
            assert!(chain.reader().remaining() as u64 <= 16 << 20);
            let mut data = Vec::new();
            chain.reader().take(4096).read_to_end(&mut data).unwrap();
            let written = chain.writer().write(&data).unwrap();
            queue.complete(chain, u32::try_from(written).unwrap()).map(|()| Served::More)
        });
        f.queue.into_state();
    }
}
