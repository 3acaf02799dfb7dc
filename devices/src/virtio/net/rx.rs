//! From the tap to the guest.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsRawFd;

use event_manager::{EventOps, Events, MutEventSubscriber};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vmm_sys_util::epoll::EventSet;

use super::{Wire, count, offloads_of};
use crate::iovec::IoVectors;
use crate::net::{HEADER_LEN, MAX_FRAME, Offloads, Tap};
use crate::virtio::{Chain, Fault, QueueState, RunningQueue};

const KICK: u32 = 0;
const TAP: u32 = 1;

/// Frames taken per wakeup before other workers of the thread have their turn.
const FRAMES_PER_WAKEUP: usize = 256;

/// The most entries of guest memory that are read into at once.
const MAX_ENTRIES: usize = 1000;

/// Where `num_buffers` is in the header (virtio 1.2 §5.1.6).
const NUM_BUFFERS_OFFSET: usize = 10;

/// The largest packet where nothing else is said.
const USUAL_MTU: usize = 1500;

/// Bytes around a packet: Ethernet's header, a VLAN tag, and virtio's header.
const FRAMING: usize = 18 + HEADER_LEN;

/// Serves the receive queue.
pub(super) struct RxWorker {
    queue: RunningQueue,
    wire: Wire,
    buffers: RxBuffers,
    /// Takes frames that came while the guest's buffers were short, and what is too long of others.
    spare: Box<[u8]>,
    /// Bytes of a frame in `spare` that waits for buffers.
    waiting_frame: usize,
    /// Whether the tap is waited on; not while there are no buffers.
    armed: bool,
    /// That the tap cannot be read was told of.
    complained: bool,
}

/// Chains taken from the ring, in order, for the next frames.
struct RxBuffers {
    chains: VecDeque<Chain>,
    /// Bytes of all of them.
    capacity: usize,
    /// A frame may be spread over several chains.
    mergeable: bool,
    /// Bytes that the longest frame to be expected needs.
    wanted: usize,
    vectors: IoVectors,
}

/// What came of an attempt to receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Received {
    /// A frame was delivered or dropped.
    Frame,
    /// The tap has none.
    TapEmpty,
    /// The tap cannot be read.
    TapFailed,
    /// The guest has no buffers for it.
    NoBuffers,
}

impl RxWorker {
    pub(super) fn new(queue: RunningQueue, wire: Wire, mtu: Option<u16>) -> Self {
        let features = queue.features();
        let segmented = Offloads { checksum: false, ..offloads_of(features) } != Offloads::default();
        Self {
            buffers: RxBuffers {
                chains: VecDeque::new(),
                capacity: 0,
                mergeable: features & (1 << VIRTIO_NET_F_MRG_RXBUF) != 0,
                wanted: if segmented { MAX_FRAME } else { USUAL_MTU.max(mtu.map_or(0, usize::from)) + FRAMING },
                vectors: IoVectors::new(),
            },
            queue,
            wire,
            spare: vec![0; MAX_FRAME].into_boxed_slice(),
            waiting_frame: 0,
            armed: true,
            complained: false,
        }
    }

    /// Gives unused buffers back to the ring. A frame that waited for buffers is lost, as on a wire.
    pub(super) fn stop(mut self) -> QueueState {
        self.give_back();
        if self.waiting_frame > 0 {
            count(&self.wire.counters.rx_dropped, 1);
        }
        self.queue.into_state()
    }

    /// Gives unused buffers back to the ring. They hold the memory map that they were found in, and memory cannot be
    /// unplugged while somebody does: they are not kept while the worker waits.
    fn give_back(&mut self) {
        while let Some(chain) = self.buffers.take_last() {
            self.queue.put_back(chain);
        }
    }

    fn serve(&mut self, ops: &mut EventOps) {
        let armed = match self.receive_all() {
            Ok(armed) => armed,
            Err(fault) => {
                self.queue.fail(&fault);
                false
            }
        };
        self.give_back();
        self.arm(ops, armed);
    }

    /// False where the tap need not be waited on before the guest makes buffers available.
    fn receive_all(&mut self) -> Result<bool, Fault> {
        self.queue.disable_notification()?;
        let mut armed = true;
        for _ in 0..FRAMES_PER_WAKEUP {
            match self.receive()? {
                Received::Frame => {}
                Received::TapEmpty => break,
                // Looked at once more after enabling, since a kick before that was not sent.
                Received::NoBuffers if self.queue.enable_notification()? => {
                    self.queue.disable_notification()?;
                }
                Received::NoBuffers | Received::TapFailed => {
                    armed = false;
                    break;
                }
            }
        }
        self.queue.notify()?;
        Ok(armed)
    }

    fn receive(&mut self) -> Result<Received, Fault> {
        self.buffers.fill(&mut self.queue)?;
        if !self.wire.link.is_up() {
            return Ok(self.drop_frame());
        }
        if self.waiting_frame > 0 {
            return self.deliver_waiting();
        }
        if self.buffers.chains.is_empty() {
            return Ok(Received::NoBuffers);
        }
        let room = self.buffers.room();
        let direct = room >= self.buffers.wanted;
        if !direct {
            self.buffers.vectors.clear();
        }
        let len = match self.read_frame() {
            Ok(len) => len,
            Err(otherwise) => return Ok(otherwise),
        };
        if len < HEADER_LEN || (direct && len > room) {
            count(&self.wire.counters.rx_dropped, 1);
            return Ok(Received::Frame);
        }
        if !direct {
            if len > self.buffers.wanted {
                count(&self.wire.counters.rx_dropped, 1);
                return Ok(Received::Frame);
            }
            self.waiting_frame = len;
            return self.deliver_waiting();
        }
        self.complete(len)?;
        Ok(Received::Frame)
    }

    /// Reads a frame into the buffers that are listed, and what is longer than they are into the spare one.
    fn read_frame(&mut self) -> Result<usize, Received> {
        let Self { buffers, wire: Wire { tap, .. }, spare, complained, .. } = self;
        tap.read_frame(&buffers.vectors, spare).map_err(|e| match e.kind() {
            io::ErrorKind::WouldBlock => Received::TapEmpty,
            io::ErrorKind::Interrupted => Received::Frame,
            _ => {
                // As when the interface was removed: its descriptor is ready for ever. The guest's next buffers are
                // the occasion to try again.
                if !std::mem::replace(complained, true) {
                    tracing::warn!("tap {}: {e}", tap.name());
                }
                Received::TapFailed
            }
        })
    }

    /// Takes a frame that nobody is to see.
    fn drop_frame(&mut self) -> Received {
        self.buffers.vectors.clear();
        if std::mem::take(&mut self.waiting_frame) == 0 {
            match self.read_frame() {
                Ok(_) => {}
                Err(otherwise) => return otherwise,
            }
        }
        count(&self.wire.counters.rx_dropped, 1);
        Received::Frame
    }

    /// Copies a frame that came when buffers were short.
    fn deliver_waiting(&mut self) -> Result<Received, Fault> {
        let len = self.waiting_frame;
        let buffers = &self.buffers;
        let room = if buffers.mergeable { buffers.capacity } else { buffers.chains.front().map_or(0, room_of) };
        if room < len {
            // All that the ring can hold are in hand already, or the one buffer for it is too short.
            let pieces = |chain: &Chain| chain.writer().slices().count();
            let all_here = buffers.chains.iter().map(pieces).sum::<usize>() >= usize::from(self.queue.size());
            let never = all_here || (!buffers.mergeable && !buffers.chains.is_empty());
            if !never {
                return Ok(Received::NoBuffers);
            }
            self.waiting_frame = 0;
            count(&self.wire.counters.rx_dropped, 1);
            return Ok(Received::Frame);
        }
        let mut rest = self.spare.get(..len).unwrap_or_default();
        for chain in &self.buffers.chains {
            let (now, later) = rest.split_at(room_of(chain).min(rest.len()));
            chain.writer().write_all(now)?;
            rest = later;
            if rest.is_empty() {
                break;
            }
        }
        self.waiting_frame = 0;
        self.complete(len)?;
        Ok(Received::Frame)
    }

    /// Returns the chains that hold a frame of `len` bytes.
    fn complete(&mut self, len: usize) -> Result<(), Fault> {
        let mut used = Vec::new();
        let mut left = len;
        while left > 0 {
            let Some(chain) = self.buffers.take() else {
                break;
            };
            let part = room_of(&chain).min(left);
            left -= part;
            used.push((chain, part));
        }
        if let Some((first, _)) = used.first() {
            let mut writer = first.writer();
            writer.skip(NUM_BUFFERS_OFFSET);
            let buffers = u16::try_from(used.len()).unwrap_or(u16::MAX);
            writer.write_all(&buffers.to_le_bytes())?;
        }
        for (chain, part) in used {
            let part = u32::try_from(part).unwrap_or(u32::MAX);
            self.queue.complete(chain, part)?;
        }
        count(&self.wire.counters.rx_packets, 1);
        count(&self.wire.counters.rx_bytes, (len - HEADER_LEN) as u64);
        Ok(())
    }

    /// Waits on the tap only while there are buffers. A tap that is ready when it is waited on again tells so at
    /// once, so no frame stays unnoticed.
    fn arm(&mut self, ops: &mut EventOps, armed: bool) {
        if self.armed == armed {
            return;
        }
        // Not only without interest: errors would still be told of.
        let changed = if armed { ops.add(tap_events(&self.wire.tap)) } else { ops.remove(tap_events(&self.wire.tap)) };
        match changed {
            Ok(()) => self.armed = armed,
            Err(e) => self.queue.events().broken(&format!("tap: events: {e}")),
        }
    }
}

impl RxBuffers {
    /// Takes chains from the ring until they can hold the longest frame, or there are no more.
    fn fill(&mut self, queue: &mut RunningQueue) -> Result<(), Fault> {
        while self.chains.is_empty() || (self.mergeable && self.capacity < self.wanted) {
            if self.chains.len() >= usize::from(queue.size()) {
                return Ok(());
            }
            let Some(chain) = queue.next_chain()? else {
                return Ok(());
            };
            if chain.readable_len() > 0 {
                return Err(Fault::Request("a receive buffer that the device may not write"));
            }
            if room_of(&chain) < HEADER_LEN {
                return Err(Fault::Request("a receive buffer shorter than a header"));
            }
            self.capacity += room_of(&chain);
            self.chains.push_back(chain);
        }
        Ok(())
    }

    /// Lists the memory of the next chains, as much as one frame may need and one call takes, and gives its length.
    fn room(&mut self) -> usize {
        self.vectors.clear();
        let limit = if self.mergeable { usize::MAX } else { 1 };
        let mut room = 0;
        for chain in self.chains.iter().take(limit) {
            self.vectors.extend(chain.writer().slices());
            if self.vectors.left().len() > MAX_ENTRIES {
                // In so many pieces that a frame is better copied.
                return 0;
            }
            room += room_of(chain);
            if room >= self.wanted {
                break;
            }
        }
        room
    }

    fn take(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_front()?;
        self.capacity -= room_of(&chain);
        Some(chain)
    }

    fn take_last(&mut self) -> Option<Chain> {
        let chain = self.chains.pop_back()?;
        self.capacity -= room_of(&chain);
        Some(chain)
    }
}

fn room_of(chain: &Chain) -> usize {
    usize::try_from(chain.writable_len()).unwrap_or(usize::MAX)
}

fn tap_events(tap: &Tap) -> Events {
    Events::with_data_raw(tap.as_raw_fd(), TAP, EventSet::IN)
}

impl MutEventSubscriber for RxWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let kick = Events::with_data(self.queue.kick(), KICK, EventSet::IN);
        let added = ops.add(kick).and_then(|()| ops.add(tap_events(&self.wire.tap)));
        if let Err(e) = added {
            self.queue.events().broken(&format!("tap: events: {e}"));
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == KICK {
            let _ = self.queue.kick().read();
            count(&self.wire.counters.rx_kicks, 1);
        }
        self.serve(ops);
    }
}
