use std::collections::VecDeque;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use tempfile::TempDir;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::disk::{Completion, DiskOptions, Operation, Request, SyncBackend};
use crate::virtio::testing::{Buf, DriverQueue, NEXT, PciDriver, Sections, Used, WRITE};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

const ALL: u64 = u64::MAX;
const SIZE: u64 = 1 << 20;

/// A disk image, and the driver of a device that shows it.
struct Bench {
    _dir: TempDir,
    path: PathBuf,
    driver: PciDriver,
    queue: DriverQueue,
    counters: Arc<BlkCounters>,
    event_idx: bool,
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
}

fn disk_in(dir: &TempDir, readonly: bool) -> (PathBuf, Arc<RawDisk>) {
    let path = dir.path().join("disk");
    let content: Vec<u8> = (0..SIZE).map(|at| (at / 512).to_le_bytes()[0]).collect();
    fs::write(&path, content).unwrap();
    let disk = RawDisk::open(&path, DiskOptions { readonly, ..DiskOptions::default() }).unwrap();
    (path, Arc::new(disk))
}

impl Bench {
    fn new(readonly: bool) -> Self {
        let dir = TempDir::new().unwrap();
        let (path, disk) = disk_in(&dir, readonly);
        Self::of(dir, path, Blk::new(disk, &BlkOptions::new("vda")), ALL)
    }

    fn of(dir: TempDir, path: PathBuf, device: Blk, features: u64) -> Self {
        let counters = device.counters();
        let mut driver = PciDriver::new(Box::new(device));
        let event_idx = driver.negotiate(features) & 1 << 29 != 0;
        driver.setup_config_vector();
        let queue = driver.setup_queue(0, 64);
        driver.driver_ok();
        Self { _dir: dir, path, driver, queue, counters, event_idx }
    }

    /// Makes a request available, and gives where its data and status are.
    fn add(&mut self, header: &[u8], out: &[u8], room: u64) -> (u64, u64) {
        let driver = &mut self.driver;
        let at = driver.alloc_bytes(header);
        let mut chain = vec![Buf::readable(at, u32::try_from(header.len()).unwrap())];
        if !out.is_empty() {
            let at = driver.alloc_bytes(out);
            chain.push(Buf::readable(at, u32::try_from(out.len()).unwrap()));
        }
        let data = driver.alloc(room);
        if room > 0 {
            chain.push(Buf::writable(data, u32::try_from(room).unwrap()));
        }
        let status = driver.alloc_bytes(&[0xee]);
        chain.push(Buf::writable(status, 1));
        self.queue.add(&chain);
        (data, status)
    }

    fn wait(&mut self) -> Used {
        self.driver.wait_used(0, &mut self.queue)
    }

    /// Does a request. Gives its status and the data read.
    fn request(&mut self, header: &[u8], out: &[u8], room: u64) -> (u8, Vec<u8>) {
        let (data, status) = self.add(header, out, room);
        // Only where the device asks for it, as an honest driver.
        if self.queue.wants_kick(self.event_idx) {
            self.driver.kick(0);
        }
        self.wait();
        let data = self.driver.bytes(data, usize::try_from(room).unwrap());
        (self.driver.bytes(status, 1)[0], data)
    }

    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let range = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        self.request(&header(kind, 0), &range, 0).0
    }

    fn start_again(&mut self) {
        self.driver.negotiate(ALL);
        self.driver.setup_config_vector();
        self.queue = self.driver.setup_queue(0, 64);
        self.driver.driver_ok();
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

/// A backend that writes down what it is asked for, and holds requests until it is let go or waited for.
struct Recorder {
    inner: SyncBackend,
    held: VecDeque<Request>,
    log: Arc<Log>,
}

#[derive(Default)]
struct Log {
    operations: Mutex<Vec<Operation>>,
    most_in_flight: AtomicUsize,
    hold: AtomicBool,
    /// The backend's event, for letting go.
    event: Mutex<Option<EventFd>>,
}

impl Log {
    fn take(&self) -> Vec<Operation> {
        std::mem::take(&mut self.operations.lock().unwrap())
    }

    fn let_go(&self) {
        self.hold.store(false, Ordering::SeqCst);
        self.event.lock().unwrap().as_ref().unwrap().write(1).unwrap();
    }
}

impl Recorder {
    fn device(disk: Arc<RawDisk>, log: Arc<Log>) -> Blk {
        let options = BlkOptions::new("vda");
        let inner = Arc::clone(&disk);
        Blk::with_backend(
            disk,
            &options,
            Arc::new(move |_| {
                let inner = SyncBackend::new(Arc::clone(&inner))?;
                let log = Arc::clone(&log);
                *log.event.lock().unwrap() = Some(inner.event().try_clone()?);
                Ok(Box::new(Recorder { inner, held: VecDeque::new(), log }))
            }),
        )
    }

    fn pass(&mut self) {
        for request in self.held.drain(..) {
            self.inner.submit(request);
        }
    }
}

impl DiskBackend for Recorder {
    fn event(&self) -> &EventFd {
        self.inner.event()
    }

    fn submit(&mut self, request: Request) {
        self.log.operations.lock().unwrap().push(request.operation());
        self.held.push_back(request);
        self.log.most_in_flight.fetch_max(self.in_flight(), Ordering::SeqCst);
    }

    fn commit(&mut self) -> io::Result<()> {
        if !self.log.hold.load(Ordering::SeqCst) {
            self.pass();
        }
        self.inner.commit()
    }

    fn complete(&mut self) -> Option<Completion> {
        if !self.log.hold.load(Ordering::SeqCst) {
            self.pass();
        }
        self.inner.complete()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.inner.in_flight()
    }

    fn wait(&mut self) -> io::Result<()> {
        self.pass();
        Ok(())
    }
}

fn recorded(features: u64) -> (Bench, Arc<Log>) {
    let dir = TempDir::new().unwrap();
    let (path, disk) = disk_in(&dir, false);
    let log = Arc::new(Log::default());
    let device = Recorder::device(disk, Arc::clone(&log));
    (Bench::of(dir, path, device, features), log)
}

#[test]
fn what_is_written_is_on_the_host_and_is_read_back() {
    let mut bench = Bench::new(false);
    let data: Vec<u8> = (0..4096_u32).map(|at| at.to_le_bytes()[0] ^ 0x5a).collect();
    assert_eq!(bench.request(&header(OUT, 8), &data, 0).0, OK);
    assert_eq!(bench.request(&header(FLUSH, 0), &[], 0).0, OK);
    assert!(bench.content()[8 * 512..16 * 512] == data);
    let (status, read) = bench.request(&header(IN, 8), &[], 4096);
    assert!(status == OK && read == data);
    // The rest is as it was.
    let (status, read) = bench.request(&header(IN, 16), &[], 512);
    assert!(status == OK && read == [16; 512]);
    let counters = &bench.counters;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    assert_eq!((count(&counters.reads), count(&counters.read_bytes)), (2, 4608));
    assert_eq!((count(&counters.writes), count(&counters.written_bytes)), (1, 4096));
    assert_eq!((count(&counters.flushes), count(&counters.errors)), (1, 0));
    // A queue begins with a kick, which the driver's first may overtake.
    assert!((4..=5).contains(&count(&counters.kicks)), "{counters:?}");
    let times = [&counters.read_nanoseconds, &counters.write_nanoseconds, &counters.flush_nanoseconds].map(count);
    assert!(times.iter().all(|time| (1..60_000_000_000).contains(time)), "{times:?}");
}

#[test]
fn a_request_may_be_split_anywhere() {
    let mut bench = Bench::new(false);
    let data = [7_u8; 1024];
    let request = [header(OUT, 2), data.to_vec()].concat();
    let driver = &mut bench.driver;
    let at = driver.alloc_bytes(&request);
    let status = driver.alloc_bytes(&[0xee]);
    let pieces = [(0, 1), (1, 14), (15, 2), (17, 1000), (1017, 23)];
    let mut chain: Vec<Buf> = pieces.map(|(offset, len)| Buf::readable(at + offset, len)).to_vec();
    chain.push(Buf::writable(status, 1));
    bench.queue.add(&chain);
    bench.driver.kick(0);
    bench.wait();
    assert_eq!(bench.driver.bytes(status, 1), [OK]);
    assert!(bench.content()[1024..2048] == data);
    // The status byte in one buffer with the data, which is in three.
    let driver = &mut bench.driver;
    let at = driver.alloc_bytes(&header(IN, 2));
    let data = driver.alloc(1025);
    let mut chain = vec![Buf::readable(at, 16)];
    chain.extend([(0, 511), (511, 1), (512, 513)].map(|(offset, len)| Buf::writable(data + offset, len)));
    bench.queue.add(&chain);
    bench.driver.kick(0);
    assert_eq!(bench.wait().len, 1025);
    let read = bench.driver.bytes(data, 1025);
    assert!(read[..1024] == [7; 1024] && read[1024] == OK);
}

#[test]
fn nothing_outside_the_disk_is_reached() {
    let mut bench = Bench::new(false);
    let before = bench.content();
    let end = SIZE / 512;
    let data = [1_u8; 1024];
    for sector in [end - 1, end, end + 1, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX - 1, u64::MAX] {
        assert_eq!(bench.request(&header(OUT, sector), &data, 0).0, IO_ERROR, "write at {sector}");
        assert_eq!(bench.request(&header(IN, sector), &[], 1024).0, IO_ERROR, "read at {sector}");
        assert_eq!(bench.range(DISCARD, sector, 2, 0), IO_ERROR, "discard at {sector}");
        assert_eq!(bench.range(WRITE_ZEROES, sector, 2, 0), IO_ERROR, "zeroes at {sector}");
    }
    for len in [0, 1, 511, 513, 1023] {
        assert_eq!(bench.request(&header(OUT, 0), &data[..len], 0).0, IO_ERROR, "write of {len}");
        assert_eq!(bench.request(&header(IN, 0), &[], len as u64).0, IO_ERROR, "read of {len}");
    }
    assert!(bench.content() == before);
    assert_eq!(bench.request(&header(OUT, end - 2), &data, 0).0, OK);
    assert_eq!(bench.content().len() as u64, SIZE);
}

#[test]
fn a_readonly_disk_is_not_written() {
    let mut bench = Bench::new(true);
    let before = bench.content();
    let offered = bench.driver.offered();
    assert_ne!(offered & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(offered & (1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_CONFIG_WCE), 0);
    assert_eq!(bench.request(&header(OUT, 0), &[1; 512], 0).0, IO_ERROR);
    assert_eq!(bench.range(DISCARD, 0, 1, 0), UNSUPPORTED);
    assert_eq!(bench.range(WRITE_ZEROES, 0, 1, 0), UNSUPPORTED);
    assert_eq!(bench.request(&header(IN, 3), &[], 512), (OK, vec![3; 512]));
    assert_eq!(bench.request(&header(FLUSH, 0), &[], 0).0, OK);
    let writeback = bench.driver.config + u64::from(WRITEBACK_OFFSET);
    bench.driver.write(writeback, &[0]);
    assert_eq!(bench.driver.read(writeback), [1]);
    assert!(bench.content() == before);
}

#[test]
fn ranges_are_zeroed_within_their_limits() {
    let mut bench = Bench::new(false);
    assert_eq!(bench.range(WRITE_ZEROES, 4, 8, 0), OK);
    assert_eq!(bench.range(WRITE_ZEROES, 100, 8, 1), OK);
    assert_eq!(bench.range(DISCARD, 200, 8, 0), OK);
    let content = bench.content();
    assert!(content[4 * 512..12 * 512].iter().all(|byte| *byte == 0));
    assert!(content[100 * 512..108 * 512].iter().all(|byte| *byte == 0));
    assert!(content[12 * 512..13 * 512] == [12; 512] && content[3 * 512..4 * 512] == [3; 512]);
    let before = bench.content();
    // A discard has no flags, a write of zeroes one.
    assert_eq!(bench.range(DISCARD, 0, 1, 1), UNSUPPORTED);
    assert_eq!(bench.range(WRITE_ZEROES, 0, 1, 2), UNSUPPORTED);
    // Too much, nothing, and two ranges at once.
    assert_eq!(bench.range(WRITE_ZEROES, 0, u32::MAX, 0), IO_ERROR);
    assert_eq!(bench.range(DISCARD, 0, u32::MAX, 0), IO_ERROR);
    assert_eq!(bench.range(DISCARD, 0, 0, 0), IO_ERROR);
    assert_eq!(bench.request(&header(DISCARD, 0), &[0; 32], 0).0, IO_ERROR);
    assert_eq!(bench.request(&header(DISCARD, 0), &[0; 15], 0).0, IO_ERROR);
    assert!(bench.content() == before);
}

#[test]
fn the_serial_number_is_read_whole_or_in_part() {
    let mut bench = Bench::new(false);
    let mut serial = b"vda".to_vec();
    serial.resize(20, 0);
    assert_eq!(bench.request(&header(GET_ID, 0), &[], 20), (OK, serial.clone()));
    assert_eq!(bench.request(&header(GET_ID, 0), &[], 2), (OK, b"vd".to_vec()));
    let (status, read) = bench.request(&header(GET_ID, 0), &[], 40);
    assert!(status == OK && read[..20] == serial);
    assert_eq!(bench.request(&header(99, 0), &[], 0).0, UNSUPPORTED);
}

#[test]
fn the_configuration_tells_size_and_limits_and_takes_only_the_cache_mode() {
    let bench = Bench::new(false);
    let (driver, config) = (&bench.driver, bench.driver.config);
    assert_eq!(u64::from_le_bytes(driver.read(config)), SIZE / 512);
    assert_eq!(u32::from_le_bytes(driver.read(config + 12)), 254, "segments");
    assert_eq!(u32::from_le_bytes(driver.read(config + 20)), 512, "block size");
    assert_eq!(u16::from_le_bytes(driver.read(config + 34)), 1, "queues");
    assert_eq!(u32::from_le_bytes(driver.read(config + 48)), 65536, "zeroes");
    driver.write(config, &[0xff; 4]);
    driver.write(config + 20, &[0xff; 4]);
    assert_eq!(u64::from_le_bytes(driver.read(config)), SIZE / 512);
    assert_eq!(u32::from_le_bytes(driver.read(config + 20)), 512);
    driver.write(config + u64::from(WRITEBACK_OFFSET), &[0]);
    assert_eq!(driver.read(config + u64::from(WRITEBACK_OFFSET)), [0]);
    driver.reset();
    assert_eq!(driver.read(config + u64::from(WRITEBACK_OFFSET)), [1]);
}

#[test]
fn a_flush_reaches_the_disk_and_the_cache_mode_is_kept() {
    let (mut bench, log) = recorded(ALL);
    bench.request(&header(OUT, 0), &[1; 512], 0);
    bench.request(&header(FLUSH, 0), &[], 0);
    assert_eq!(log.take(), [Operation::Write { durable: false }, Operation::Flush]);
    // Write-through, by the configuration.
    bench.driver.write(bench.driver.config + u64::from(WRITEBACK_OFFSET), &[0]);
    bench.request(&header(OUT, 0), &[1; 512], 0);
    assert_eq!(bench.range(DISCARD, 0, 1, 0), OK);
    assert_eq!(log.take(), [Operation::Write { durable: true }, Operation::Discard, Operation::Flush]);
    // By a driver that cannot set it, but flushes.
    let (mut bench, log) = recorded(1 << VIRTIO_BLK_F_FLUSH);
    bench.request(&header(OUT, 0), &[1; 512], 0);
    assert_eq!(log.take(), [Operation::Write { durable: false }]);
    // By one that knows nothing of caches.
    let (mut bench, log) = recorded(0);
    bench.request(&header(OUT, 0), &[1; 512], 0);
    assert_eq!(log.take(), [Operation::Write { durable: true }]);
}

#[test]
fn rules_broken_need_a_reset_and_nothing_more() {
    type Break = fn(&mut Bench);
    let rules: [(&str, Break); 9] = [
        ("a loop", |b| {
            let at = b.driver.alloc_bytes(&header(IN, 0));
            b.queue.add_raw(&[Descriptor::new(at, 16, NEXT, 1), Descriptor::new(at, 16, NEXT, 0)], 0);
        }),
        ("outside memory", |b| {
            let at = b.driver.alloc_bytes(&header(IN, 0));
            b.queue.add(&[Buf::readable(at, 16), Buf::writable(0xffff_ffff_f000, 512), Buf::writable(at, 1)]);
        }),
        ("a huge length", |b| {
            let at = b.driver.alloc_bytes(&header(IN, 0));
            b.queue.add(&[Buf::readable(at, 16), Buf::writable(at, u32::MAX), Buf::writable(at, 1)]);
        }),
        ("an index that jumps", |b| b.queue.jump(1000)),
        ("a head that is not there", |b| b.queue.publish(64)),
        ("no status", |b| {
            let at = b.driver.alloc_bytes(&header(FLUSH, 0));
            b.queue.add(&[Buf::readable(at, 16)]);
        }),
        ("no header", |b| {
            let at = b.driver.alloc_bytes(&header(FLUSH, 0));
            b.queue.add(&[Buf::writable(at, 16), Buf::writable(at, 1)]);
        }),
        ("half a header", |b| {
            let at = b.driver.alloc_bytes(&header(FLUSH, 0));
            b.queue.add(&[Buf::readable(at, 15), Buf::writable(at, 1)]);
        }),
        ("the wrong order", |b| {
            let at = b.driver.alloc_bytes(&header(FLUSH, 0));
            b.queue.add_raw(&[Descriptor::new(at, 16, NEXT | WRITE, 1), Descriptor::new(at, 16, 0, 0)], 0);
        }),
    ];
    let mut bench = Bench::new(false);
    let before = bench.content();
    for (faults, (what, break_rule)) in (1..).zip(rules) {
        break_rule(&mut bench);
        bench.driver.kick(0);
        bench.driver.wait_needs_reset();
        assert_eq!(bench.driver.device.faults(), faults, "{what}");
        bench.start_again();
        assert_eq!(bench.request(&header(IN, 5), &[], 512), (OK, vec![5; 512]), "after {what}");
    }
    assert!(bench.content() == before);
}

#[test]
fn no_more_are_in_flight_than_the_queue_has_descriptors() {
    let (mut bench, log) = recorded(ALL);
    log.hold.store(true, Ordering::SeqCst);
    let (_, status) = bench.add(&header(IN, 1), &[], 512);
    // The same chain again and again, as no honest driver would.
    for _ in 0..63 {
        bench.queue.publish(0);
    }
    bench.driver.kick(0);
    while log.operations.lock().unwrap().len() < 64 {
        std::thread::yield_now();
    }
    for _ in 0..64 {
        bench.queue.publish(0);
    }
    bench.driver.kick(0);
    log.let_go();
    for _ in 0..128 {
        bench.wait();
    }
    assert_eq!(log.most_in_flight.load(Ordering::SeqCst), 64);
    assert_eq!(bench.driver.bytes(status, 1), [OK]);
}

#[test]
fn a_reset_waits_for_what_is_in_flight() {
    let (mut bench, log) = recorded(ALL);
    log.hold.store(true, Ordering::SeqCst);
    let requests: Vec<_> = (0..16).map(|sector| bench.add(&header(IN, sector), &[], 512)).collect();
    bench.driver.kick(0);
    while log.operations.lock().unwrap().len() < 16 {
        std::thread::yield_now();
    }
    bench.driver.reset();
    // All was written before the reset was done, so nothing is written after it.
    for (sector, (data, status)) in (0_u8..).zip(requests) {
        assert_eq!(bench.driver.bytes(status, 1), [OK]);
        assert_eq!(bench.driver.bytes(data, 512), [sector; 512]);
    }
    log.hold.store(false, Ordering::SeqCst);
    bench.start_again();
    assert_eq!(bench.request(&header(IN, 9), &[], 512), (OK, vec![9; 512]));
}

#[test]
fn resets_under_real_io_leave_memory_and_disk_alone() {
    let mut bench = Bench::new(false);
    let before = bench.content();
    for round in 0..20 {
        let requests: Vec<_> = (0..16).map(|at| bench.add(&header(IN, at * 64), &[], 16 << 10)).collect();
        bench.driver.kick(0);
        bench.driver.reset();
        let memory = bench.driver.memory.memory();
        for (data, _) in &requests {
            memory.write_slice(&[0x77; 16 << 10], GuestAddress(*data)).unwrap();
        }
        drop(memory);
        bench.start_again();
        assert_eq!(bench.request(&header(IN, round), &[], 512).0, OK);
        for (data, _) in requests {
            assert!(bench.driver.bytes(data, 16 << 10) == [0x77; 16 << 10], "written after the reset");
        }
    }
    assert!(bench.content() == before);
}

#[test]
fn stopping_and_starting_amid_io_loses_nothing() {
    let mut bench = Bench::new(false);
    for round in 0..20_u8 {
        let data = vec![round; 8192];
        let statuses: Vec<_> = (0..16).map(|at| bench.add(&header(OUT, at * 16), &data, 0).1).collect();
        bench.driver.kick(0);
        bench.driver.device.suspend();
        bench.driver.device.resume();
        for _ in 0..16 {
            bench.wait();
        }
        for status in statuses {
            assert_eq!(bench.driver.bytes(status, 1), [OK]);
        }
        assert!(bench.content()[..16 * 8192].iter().all(|byte| *byte == round));
    }
}

#[test]
fn every_queue_serves() {
    let dir = TempDir::new().unwrap();
    let (_, disk) = disk_in(&dir, false);
    let mut options = BlkOptions::new("vda");
    options.queues = 3;
    let mut driver = PciDriver::new(Box::new(Blk::new(disk, &options)));
    let features = driver.negotiate(ALL);
    assert_ne!(features & 1 << VIRTIO_BLK_F_MQ, 0);
    assert_eq!(u16::from_le_bytes(driver.read(driver.config + 34)), 3);
    let mut queues: Vec<_> = (0..3).map(|index| driver.setup_queue(index, 16)).collect();
    driver.driver_ok();
    for (index, queue) in (0_u16..).zip(&mut queues) {
        let at = driver.alloc_bytes(&header(IN, u64::from(index)));
        let data = driver.alloc(513);
        queue.add(&[Buf::readable(at, 16), Buf::writable(data, 513)]);
        driver.kick(index);
        driver.wait_used(index, queue);
        assert_eq!(driver.bytes(data, 512), [index.to_le_bytes()[0]; 512]);
    }
}

#[test]
fn the_cache_mode_is_saved() {
    let dir = TempDir::new().unwrap();
    let (_, disk) = disk_in(&dir, false);
    let mut device = Blk::new(Arc::clone(&disk), &BlkOptions::new("vda"));
    device.write_config(WRITEBACK_OFFSET, &[0]);
    let mut sections = Sections::default();
    device.save(&mut sections).unwrap();
    let mut copy = Blk::new(disk, &BlkOptions::new("vda"));
    copy.restore(&mut sections).unwrap();
    let mut writeback = [9];
    copy.read_config(WRITEBACK_OFFSET, &mut writeback);
    assert_eq!(writeback, [0]);
    assert!(matches!(copy.restore(&mut Sections::default()), Err(Error::State(_))));
    for damaged in [(2, vec![]), (1, b"{".into())] {
        let mut damaged = Sections([("blk".into(), damaged)].into());
        assert!(matches!(copy.restore(&mut damaged), Err(Error::State(_))));
    }
}

#[test]
fn the_lock_outlives_devices_and_ends_with_the_disk() {
    let dir = TempDir::new().unwrap();
    let (path, disk) = disk_in(&dir, false);
    let again = || RawDisk::open(&path, DiskOptions::default());
    drop(Blk::new(Arc::clone(&disk), &BlkOptions::new("vda")));
    assert!(again().unwrap_err().to_string().contains("locked by another VM"));
    drop(disk);
    again().unwrap();
}

#[test]
fn a_disk_grows_under_its_driver() {
    let dir = TempDir::new().unwrap();
    let (path, disk) = disk_in(&dir, false);
    let mut bench = Bench::of(dir, path, Blk::new(disk.clone(), &BlkOptions::new("vda")), ALL);
    let capacity = |bench: &Bench| u64::from_le_bytes(bench.driver.read(bench.driver.config));
    let last = header(OUT, 2 * SIZE / 512 - 1);
    assert_eq!(bench.request(&last, &[7; 512], 0).0, IO_ERROR);
    fs::File::options().write(true).open(&bench.path).unwrap().set_len(2 * SIZE).unwrap();
    let size = disk.next_size(None).unwrap();
    assert_eq!((size, capacity(&bench)), (2 * SIZE, SIZE / 512), "the driver sees nothing of the file's length yet");
    let generation = bench.driver.read::<1>(bench.driver.common + 0x15);
    bench.driver.device.change_config(|| disk.grow(size));
    assert!(bench.driver.wait_vector(0), "the driver is told");
    assert_ne!(bench.driver.read::<1>(bench.driver.common + 0x15), generation);
    assert_eq!(capacity(&bench), 2 * SIZE / 512);
    assert_eq!(bench.request(&last, &[7; 512], 0).0, OK);
    assert_eq!(bench.content()[usize::try_from(2 * SIZE).unwrap() - 512..], [7; 512]);
}
