//! Virtio entropy device (virtio 1.2 §5.4): the host kernel's random numbers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vmm_sys_util::epoll::EventSet;

use super::{
    Chain, DeviceInfo, Error, Fault, QueueState, Result, Resumed, RunningQueue, Served, StateSink, StateSource,
    VirtioDevice,
};
use crate::io_thread::{IoThread, Running};

/// The most bytes that one request gets; the rest of its buffer is left alone. A driver asks again.
pub const MAX_REQUEST: usize = 64 << 10;

/// Size of the queue in descriptors.
const QUEUE_SIZE: u16 = 64;

/// Bytes made at a time.
const PIECE: usize = 256;

/// A virtio entropy device.
pub struct Rng {
    id: String,
    thread: Option<Arc<IoThread>>,
    running: Option<Running<RngWorker>>,
    bytes: Arc<AtomicU64>,
}

impl Rng {
    /// A device whose thread is named after `id`.
    pub fn new(id: &str) -> Self {
        Self { id: id.to_owned(), thread: None, running: None, bytes: Arc::default() }
    }

    /// Serves the queue on this thread instead of one that is made when the driver starts it.
    #[must_use]
    pub fn on_thread(mut self, thread: Arc<IoThread>) -> Self {
        self.thread = Some(thread);
        self
    }

    /// Counts the bytes given to the guest.
    pub fn bytes(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.bytes)
    }
}

impl VirtioDevice for Rng {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            device_type: u16::try_from(VIRTIO_ID_RNG).unwrap_or_default(),
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config_len: 0,
        }
    }

    fn read_config(&self, _offset: u32, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u32, _data: &[u8]) {
        // There is no configuration.
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<()> {
        if index != 0 {
            return Err(Error::Driver(format!("{}: there is no queue {index}", self.id)));
        }
        let host = |source| Error::Host { what: "entropy thread", source };
        let thread = match &self.thread {
            Some(thread) => thread,
            None => self.thread.insert(IoThread::spawn(&self.id).map_err(host)?),
        };
        let worker = RngWorker { queue, bytes: Arc::clone(&self.bytes) };
        self.running = Some(thread.add(worker).map_err(host)?);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Result<Option<QueueState>> {
        if index != 0 {
            return Ok(None);
        }
        let Some(running) = self.running.take() else {
            return Ok(None);
        };
        let worker = running.remove().map_err(|source| Error::Host { what: "entropy thread", source })?;
        Ok(Some(worker.queue.into_state()))
    }

    fn reset(&mut self) {
        // The driver sets nothing.
    }

    fn save(&self, _into: &mut dyn StateSink) -> Result<()> {
        // Random numbers are not to be repeated, so nothing is kept.
        Ok(())
    }

    fn restore(&mut self, _from: &mut dyn StateSource) -> Result<()> {
        Ok(())
    }

    fn resumed(&mut self, _why: Resumed) {
        // What a guest drew before it was copied is its own to renew (by its VM generation counter).
    }
}

struct RngWorker {
    queue: RunningQueue,
    bytes: Arc<AtomicU64>,
}

fn fill(chain: &Chain, bytes: &AtomicU64) -> std::result::Result<u32, Fault> {
    let mut writer = chain.writer();
    let mut left = writer.remaining().min(MAX_REQUEST);
    if left == 0 {
        return Err(Fault::Request("no room for random numbers"));
    }
    let mut piece = [0; PIECE];
    while left > 0 {
        let len = left.min(PIECE);
        let part = piece.get_mut(..len).unwrap_or_default();
        let filled = kernel_random(part);
        writer.write_all(part.get(..filled).unwrap_or_default())?;
        if filled < len {
            // The host gives no more now. Fewer bytes are allowed.
            break;
        }
        left -= len;
    }
    bytes.fetch_add(u64::from(writer.written()), Ordering::Relaxed);
    Ok(writer.written())
}

/// Fills `data` with the host kernel's random numbers, and tells how many bytes it got.
#[expect(unsafe_code, reason = "getrandom has no safe wrapper among the crates in use")]
pub fn kernel_random(data: &mut [u8]) -> usize {
    loop {
        // SAFETY: the pointer and the length are those of `data`.
        let got = unsafe { libc::getrandom(data.as_mut_ptr().cast(), data.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => return got,
            Err(_) if std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return 0,
        }
    }
}

impl MutEventSubscriber for RngWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            self.queue.events().broken(&format!("entropy: events: {e}"));
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let Self { queue, bytes } = self;
        queue.serve(|queue, chain| {
            let written = fill(&chain, bytes)?;
            queue.complete(chain, written)?;
            Ok(Served::More)
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Buf, DriverQueue, PciDriver};

    fn bench() -> (PciDriver, DriverQueue, Arc<AtomicU64>) {
        let device = Rng::new("rng0");
        let bytes = device.bytes();
        let mut driver = PciDriver::new(Box::new(device));
        driver.negotiate(u64::MAX);
        driver.setup_config_vector();
        let queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        (driver, queue, bytes)
    }

    #[test]
    fn buffers_are_filled_with_what_differs_each_time() {
        let (mut driver, mut queue, bytes) = bench();
        let mut seen = Vec::new();
        for _ in 0..4 {
            let at = driver.alloc(300);
            queue.add(&[Buf::writable(at, 100), Buf::writable(at + 100, 200)]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0, &mut queue).len, 300);
            let data = driver.bytes(at, 300);
            // 300 random bytes with a zero run of 32 in them are not to be expected in the life of this test.
            assert!(!data.windows(32).any(|run| run.iter().all(|byte| *byte == 0)));
            assert!(!seen.contains(&data));
            seen.push(data);
        }
        assert_eq!(bytes.load(Ordering::Relaxed), 1200);
    }

    #[test]
    fn one_request_gets_no_more_than_its_bound() {
        let (mut driver, mut queue, _) = bench();
        let at = driver.alloc(1 << 20);
        queue.add(&[Buf::writable(at, 1 << 20)]);
        driver.kick(0);
        let used = driver.wait_used(0, &mut queue);
        assert_eq!(used.len, 64 << 10);
        assert_eq!(driver.bytes(at + (64 << 10), 4096), [0; 4096]);
    }

    #[test]
    fn stopping_and_starting_answers_every_request_once() {
        let (mut driver, mut queue, _) = bench();
        let at = driver.alloc(4096);
        for _ in 0..20 {
            for _ in 0..8 {
                queue.add(&[Buf::writable(at, 4096)]);
            }
            driver.kick(0);
            driver.device.suspend();
            driver.device.resume();
            for _ in 0..8 {
                assert_eq!(driver.wait_used(0, &mut queue).len, 4096);
            }
            assert_eq!(queue.used(), None);
        }
    }

    #[test]
    fn rules_broken_need_a_reset_and_nothing_more() {
        let (mut driver, mut queue, _) = bench();
        type Break = fn(&mut DriverQueue, u64);
        let rules: [(&str, Break); 4] = [
            ("a buffer to read", |queue, at| {
                queue.add(&[Buf::readable(at, 64)]);
            }),
            ("outside memory", |queue, _| {
                queue.add(&[Buf::writable(0x1000_0000, 64)]);
            }),
            ("a huge length", |queue, at| {
                queue.add(&[Buf::writable(at, u32::MAX)]);
            }),
            ("an index that jumps", |queue, _| queue.jump(17)),
        ];
        for (faults, (what, break_rule)) in (1..).zip(rules) {
            let at = driver.alloc(64);
            break_rule(&mut queue, at);
            driver.kick(0);
            driver.wait_needs_reset();
            assert_eq!(driver.device.faults(), faults, "{what}");
            driver.negotiate(u64::MAX);
            driver.setup_config_vector();
            queue = driver.setup_queue(0, 16);
            driver.driver_ok();
            queue.add(&[Buf::writable(at, 64)]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0, &mut queue).len, 64, "after {what}");
        }
    }
}
