//! From the guest to the tap.

use std::io;
use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use vmm_sys_util::epoll::EventSet;

use super::{Wire, count};
use crate::iovec::IoVectors;
use crate::net::{HEADER_LEN, MAX_FRAME};
use crate::virtio::{Chain, Fault, QueueState, RunningQueue, Served};

const KICK: u32 = 0;
const TAP: u32 = 1;

/// Serves the transmit queue.
pub(super) struct TxWorker {
    queue: RunningQueue,
    wire: Wire,
    vectors: IoVectors,
    /// The tap had no room for a frame, and is waited on.
    tap_full: bool,
}

impl TxWorker {
    pub(super) fn new(queue: RunningQueue, wire: Wire) -> Self {
        Self { queue, wire, vectors: IoVectors::new(), tap_full: false }
    }

    /// Frames are sent when they are taken, so none are in flight.
    pub(super) fn stop(self) -> QueueState {
        self.queue.into_state()
    }

    fn serve(&mut self, ops: &mut EventOps) {
        let Self { queue, wire, vectors, tap_full } = self;
        let was_full = std::mem::take(tap_full);
        queue.serve(|queue, chain| {
            if send(wire, vectors, &chain)? {
                queue.complete(chain, 0)?;
                return Ok(Served::More);
            }
            *tap_full = true;
            queue.put_back(chain);
            Ok(Served::Enough)
        });
        let room = Events::with_data_raw(wire.tap.as_raw_fd(), TAP, EventSet::OUT);
        let changed = match (was_full, *tap_full) {
            (false, true) => ops.add(room),
            (true, false) => ops.remove(room),
            _ => Ok(()),
        };
        if let Err(e) = changed {
            queue.events().broken(&format!("tap: events: {e}"));
        }
    }
}

/// Sends a frame, or drops one that cannot be sent. False where the tap has no room now.
fn send(wire: &Wire, vectors: &mut IoVectors, chain: &Chain) -> Result<bool, Fault> {
    let Wire { tap, counters, link } = wire;
    if chain.writable_len() > 0 {
        return Err(Fault::Request("a frame in a device-writable buffer"));
    }
    let len = usize::try_from(chain.readable_len()).unwrap_or(usize::MAX);
    if len < HEADER_LEN {
        return Err(Fault::Request("a frame shorter than its header"));
    }
    if len > MAX_FRAME || !link.is_up() {
        count(&counters.tx_dropped, 1);
        return Ok(true);
    }
    vectors.clear();
    vectors.extend(chain.reader().slices());
    match tap.write_frame(vectors) {
        Ok(_) => {
            count(&counters.tx_packets, 1);
            count(&counters.tx_bytes, (len - HEADER_LEN) as u64);
        }
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
        Err(e) => {
            // A header that makes no sense, or an interface that is down: frames are lost, as on a wire.
            tracing::debug!("tap {}: {e}", tap.name());
            count(&counters.tx_dropped, 1);
        }
    }
    Ok(true)
}

impl MutEventSubscriber for TxWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let kick = Events::with_data(self.queue.kick(), KICK, EventSet::IN);
        if let Err(e) = ops.add(kick) {
            self.queue.events().broken(&format!("tap: events: {e}"));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == KICK {
            count(&self.wire.counters.tx_kicks, 1);
        }
        self.serve(ops);
    }
}
