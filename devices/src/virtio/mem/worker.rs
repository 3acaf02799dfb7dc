//! The worker: the driver's requests, each checked whole before anything is done (virtio 1.2 §5.15.6).

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::{MemOptions, Region, Sizes};
use crate::virtio::{Chain, Fault, QueueState, RunningQueue, Served};

/// Bytes of a request and of a response.
const REQUEST_LEN: usize = 24;
const RESPONSE_LEN: usize = 10;

/// Types of requests.
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// Types of responses.
const ACK: u16 = 0;
const NACK: u16 = 1;
const BUSY: u16 = 2;
const ERROR: u16 = 3;

/// States of a range.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// What the driver asks.
#[derive(Debug, Clone, Copy)]
struct Request {
    kind: u16,
    address: u64,
    blocks: u16,
}

impl Request {
    fn read(chain: &Chain) -> Result<Self, Fault> {
        let mut bytes = [0; REQUEST_LEN];
        let mut reader = chain.reader();
        if reader.remaining() < REQUEST_LEN {
            return Err(Fault::Request("a memory request that is too short"));
        }
        if usize::try_from(chain.writable_len()).unwrap_or(0) < RESPONSE_LEN {
            return Err(Fault::Request("no room for the answer to a memory request"));
        }
        reader.read_all(&mut bytes)?;
        let [k0, k1, _, _, _, _, _, _, address @ .., b0, b1, _, _, _, _, _, _] = bytes;
        Ok(Self {
            kind: u16::from_le_bytes([k0, k1]),
            address: u64::from_le_bytes(address),
            blocks: u16::from_le_bytes([b0, b1]),
        })
    }
}

/// An answer: its type, and for [`STATE`] the state.
type Response = (u16, u16);

pub(super) struct MemWorker {
    queue: RunningQueue,
    requests: Requests,
}

/// Carries requests out.
struct Requests {
    start: u64,
    len: u64,
    block_size: u64,
    sizes: Arc<Sizes>,
    region: Arc<Mutex<Region>>,
}

impl MemWorker {
    pub(super) fn new(
        queue: RunningQueue,
        options: &MemOptions,
        sizes: Arc<Sizes>,
        region: Arc<Mutex<Region>>,
    ) -> Self {
        let MemOptions { start, len, block_size, .. } = *options;
        Self { queue, requests: Requests { start, len, block_size, sizes, region } }
    }

    pub(super) fn into_state(self) -> QueueState {
        self.queue.into_state()
    }
}

impl Requests {
    /// The range that a request is about, in bytes from the region's start; `None` where it is no range of blocks.
    fn range(&self, request: Request) -> Option<Range<u64>> {
        let start = request.address.checked_sub(self.start)?;
        let len = u64::from(request.blocks) * self.block_size;
        let end = start.checked_add(len)?;
        (len > 0 && start.is_multiple_of(self.block_size) && end <= self.len).then_some(start..end)
    }

    fn carry_out(&self, request: Request) -> Response {
        let mut region = self.region.lock().unwrap_or_else(PoisonError::into_inner);
        let done = match (request.kind, self.range(request)) {
            (PLUG, Some(range)) => self.plug(&mut region, &range),
            (UNPLUG, Some(range)) if region.blocks.are_all(&range, true) => done(unplug(&mut region, &range)),
            (UNPLUG_ALL, _) => done(region.blocks.plugged_runs().iter().try_for_each(|run| unplug(&mut region, run))),
            (STATE, Some(range)) => return (ACK, state(&region, &range)),
            _ => ERROR,
        };
        let plugged = region.blocks.plugged_bytes();
        if self.sizes.plugged.swap(plugged, Ordering::AcqRel) != plugged {
            region.backing.resized(plugged);
        }
        (done, 0)
    }

    fn plug(&self, region: &mut Region, range: &Range<u64>) -> u16 {
        if !region.blocks.are_all(range, false) {
            return ERROR;
        }
        let after = region.blocks.plugged_bytes() + (range.end - range.start);
        if after > self.sizes.requested.load(Ordering::Acquire) {
            return NACK;
        }
        let plugged = region.backing.plug(range.clone());
        if plugged.is_ok() {
            region.blocks.set(range, true);
        }
        done(plugged)
    }
}

fn unplug(region: &mut Region, range: &Range<u64>) -> io::Result<()> {
    region.backing.unplug(range.clone())?;
    region.blocks.set(range, false);
    Ok(())
}

fn state(region: &Region, range: &Range<u64>) -> u16 {
    match (region.blocks.are_all(range, true), region.blocks.are_all(range, false)) {
        (true, _) => PLUGGED,
        (_, true) => UNPLUGGED,
        _ => MIXED,
    }
}

fn done(result: io::Result<()>) -> u16 {
    match result {
        Ok(()) => ACK,
        Err(error) => {
            tracing::debug!("blocks of memory stay as they are: {error}");
            BUSY
        }
    }
}

fn answer(chain: &Chain, (kind, state): Response) -> Result<u32, Fault> {
    let ([k0, k1], [s0, s1]) = (kind.to_le_bytes(), state.to_le_bytes());
    let bytes: [u8; RESPONSE_LEN] = [k0, k1, 0, 0, 0, 0, 0, 0, s0, s1];
    let mut writer = chain.writer();
    writer.write_all(&bytes)?;
    Ok(writer.written())
}

impl MutEventSubscriber for MemWorker {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(self.queue.kick(), EventSet::IN)) {
            self.queue.events().broken(&format!("memory: events: {e}"));
        }
    }

    fn process(&mut self, _events: Events, _ops: &mut EventOps) {
        let Self { queue, requests } = self;
        queue.serve(|queue, chain| {
            let request = Request::read(&chain)?;
            // A chain holds the memory map that it was found in, and the monitor waits until nobody holds one that has
            // the blocks in it which are to go.
            queue.put_back(chain);
            let response = requests.carry_out(request);
            let chain = queue.next_chain()?.ok_or(Fault::Request("a memory request that is taken back"))?;
            let written = answer(&chain, response)?;
            queue.complete(chain, written)?;
            Ok(Served::More)
        });
    }
}
