use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::net::{HEADER_LEN, MAX_FRAME};
use crate::virtio::testing::{Buf, DriverQueue, NEXT, PciDriver, TIMEOUT, Used, WRITE};

const MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
const EVENT_IDX: u64 = 1 << 29;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const SEGMENTED: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4;
const EVERYTHING: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };

/// A device whose tap is one end of a socket pair, and the other end.
struct Bench {
    driver: PciDriver,
    rx: DriverQueue,
    tx: DriverQueue,
    wire: File,
    counters: Arc<NetCounters>,
    link: Arc<Link>,
    event_idx: bool,
}

fn frame(len: usize, seed: u8) -> Vec<u8> {
    let body = (0_usize..len).map(|at| at.to_le_bytes()[0].wrapping_mul(seed | 1));
    [0; HEADER_LEN].into_iter().chain(body).collect()
}

impl Bench {
    fn new(features: u64) -> Self {
        let (tap, wire): (OwnedFd, OwnedFd) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::empty()).unwrap();
        let device = Net::new(Tap::fake(tap, EVERYTHING).unwrap(), &NetOptions::new("net0", MAC));
        let (counters, link) = (device.counters(), device.link());
        let mut driver = PciDriver::new(Box::new(device));
        let event_idx = driver.negotiate(features) & EVENT_IDX != 0;
        driver.setup_config_vector();
        let (rx, tx) = (driver.setup_queue(0, 64), driver.setup_queue(1, 64));
        driver.driver_ok();
        Self { driver, rx, tx, wire: wire.into(), counters, link, event_idx }
    }

    fn start_again(&mut self, features: u64) {
        self.driver.negotiate(features);
        self.driver.setup_config_vector();
        (self.rx, self.tx) = (self.driver.setup_queue(0, 64), self.driver.setup_queue(1, 64));
        self.driver.driver_ok();
    }

    /// Kicks only where the device asks for it, as an honest driver.
    fn kick(&self, queue: u16) {
        let ring = if queue == 0 { &self.rx } else { &self.tx };
        if ring.wants_kick(self.event_idx) {
            self.driver.kick(queue);
        }
    }

    /// Makes a receive buffer available.
    fn room(&mut self, len: u32) -> u64 {
        let at = self.driver.alloc(len.into());
        self.rx.add(&[Buf::writable(at, len)]);
        at
    }

    fn wait_rx(&mut self) -> Used {
        self.driver.wait_used(0, &mut self.rx)
    }

    /// Makes a frame of the guest's available.
    fn send(&mut self, frame: &[u8]) {
        let at = self.driver.alloc_bytes(frame);
        self.tx.add(&[Buf::readable(at, u32::try_from(frame.len()).unwrap())]);
    }

    fn wait_tx(&mut self) {
        self.driver.wait_used(1, &mut self.tx);
    }

    /// Takes a frame off the wire.
    fn taken(&mut self) -> Vec<u8> {
        let timeout = PollTimeout::try_from(TIMEOUT).unwrap();
        let mut ready = [PollFd::new(self.wire.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut ready, timeout), Ok(1), "nothing on the wire");
        let mut data = vec![0; MAX_FRAME + 1];
        let len = self.wire.read(&mut data).unwrap();
        data.truncate(len);
        data
    }

    fn count(&self, which: impl Fn(&NetCounters) -> &AtomicU64) -> u64 {
        which(&self.counters).load(Ordering::Relaxed)
    }
}

#[test]
fn the_configuration_has_address_and_link_and_is_read_only() {
    let bench = Bench::new(u64::MAX);
    let (driver, config) = (&bench.driver, bench.driver.config);
    assert_eq!(driver.read(config), MAC);
    driver.write(config, &[0xff]);
    driver.write(config + 6, &[0, 0]);
    assert_eq!(driver.read(config), MAC);
    assert_eq!(driver.read(config + 6), [1, 0], "link up");
    let offered = bench.driver.offered();
    assert_eq!(offered & 1 << VIRTIO_NET_F_MTU, 0);
    assert_ne!(offered & 1 << VIRTIO_NET_F_HOST_TSO4, 0);
}

#[test]
fn the_guests_frames_arrive_however_they_are_split() {
    let mut bench = Bench::new(u64::MAX);
    let whole = frame(1514, 3);
    for cuts in [vec![12], vec![1, 11, 13], vec![5, 600, 1000], vec![14]] {
        let at = bench.driver.alloc_bytes(&whole);
        let mut ends = cuts.clone();
        ends.push(whole.len());
        let mut start = 0;
        let mut chain = Vec::new();
        for end in ends {
            chain.push(Buf::readable(at + start as u64, u32::try_from(end - start).unwrap()));
            start = end;
        }
        bench.tx.add(&chain);
        bench.kick(1);
        bench.wait_tx();
        assert!(bench.taken() == whole, "{cuts:?}");
    }
    assert_eq!(bench.count(|c| &c.tx_packets), 4);
    assert_eq!(bench.count(|c| &c.tx_bytes), 4 * 1514);
}

#[test]
fn a_frame_fills_one_buffer_or_several() {
    let mut bench = Bench::new(MERGEABLE | SEGMENTED);
    // Enough for the longest, so that no copy is made.
    let buffers: Vec<u64> = (0..40).map(|_| bench.room(2048)).collect();
    bench.kick(0);
    let sent = frame(5000, 7);
    bench.wire.write_all(&sent).unwrap();
    let lens: Vec<u32> = (0..3).map(|_| bench.wait_rx().len).collect();
    assert_eq!(lens, [2048, 2048, 5012 - 4096]);
    let mut got: Vec<u8> =
        buffers.iter().zip(&lens).flat_map(|(at, len)| bench.driver.bytes(*at, *len as usize)).collect();
    assert_eq!(got[10..12], [3, 0], "number of buffers");
    got[10] = 0;
    assert!(got == sent);
    bench.wire.write_all(&frame(60, 9)).unwrap();
    assert_eq!(bench.wait_rx().len, 72);
    assert_eq!(bench.driver.bytes(buffers[3] + 10, 2), [1, 0]);
    assert_eq!(bench.count(|c| &c.rx_packets), 2);
    assert_eq!(bench.count(|c| &c.rx_bytes), 5060);
}

#[test]
fn a_buffer_in_pieces_holds_a_frame() {
    let mut bench = Bench::new(0);
    let at = bench.driver.alloc(2048);
    let pieces = [(0, 3), (3, 8), (11, 2), (13, 100), (113, 1900)];
    bench.rx.add(&pieces.map(|(offset, len)| Buf::writable(at + offset, len)));
    bench.kick(0);
    let mut sent = frame(1000, 5);
    bench.wire.write_all(&sent).unwrap();
    assert_eq!(bench.wait_rx().len, 1012);
    sent[10] = 1;
    assert!(bench.driver.bytes(at, 1012) == sent);
}

#[test]
fn frames_that_came_before_buffers_are_not_forgotten() {
    for features in [0, MERGEABLE, MERGEABLE | SEGMENTED] {
        let mut bench = Bench::new(features);
        for seed in 0..8 {
            bench.wire.write_all(&frame(100, seed)).unwrap();
        }
        // Buffers come one by one, each time after the device ran out.
        for seed in 0..8 {
            let at = bench.room(2048);
            bench.kick(0);
            assert_eq!(bench.wait_rx().len, 112);
            assert!(bench.driver.bytes(at + 12, 100) == frame(100, seed)[12..], "{seed}");
        }
        // And the other way round: buffers first.
        let at = bench.room(2048);
        bench.kick(0);
        bench.wire.write_all(&frame(100, 99)).unwrap();
        bench.wait_rx();
        assert!(bench.driver.bytes(at + 12, 100) == frame(100, 99)[12..]);
        assert_eq!(bench.count(|c| &c.rx_dropped), 0);
    }
}

#[test]
fn a_flood_into_a_small_ring_is_served_to_its_end() {
    let mut bench = Bench::new(MERGEABLE | SEGMENTED);
    let mut wire = bench.wire.try_clone().unwrap();
    const FRAMES: u8 = 200;
    let flood = std::thread::spawn(move || {
        for seed in 0..FRAMES {
            wire.write_all(&frame(1500, seed)).unwrap();
        }
    });
    let mut buffers: std::collections::VecDeque<u64> = (0..4).map(|_| bench.room(2048)).collect();
    bench.kick(0);
    for seed in 0..FRAMES {
        assert_eq!(bench.wait_rx().len, 1512);
        let at = buffers.pop_front().unwrap();
        assert!(bench.driver.bytes(at + 12, 1500) == frame(1500, seed)[12..], "{seed}");
        bench.rx.add(&[Buf::writable(at, 2048)]);
        buffers.push_back(at);
        bench.kick(0);
    }
    flood.join().unwrap();
    assert_eq!(bench.count(|c| &c.rx_dropped), 0);
}

#[test]
fn tiny_buffers_hold_what_they_can_and_never_make_a_loop() {
    let mut bench = Bench::new(MERGEABLE);
    let buffers: Vec<u64> = (0..64).map(|_| bench.room(12)).collect();
    bench.kick(0);
    // 64 buffers of 12 bytes: this one never fits.
    bench.wire.write_all(&frame(1000, 1)).unwrap();
    let fits = frame(108, 2);
    bench.wire.write_all(&fits).unwrap();
    for at in buffers.iter().take(10) {
        assert_eq!(bench.wait_rx().len, 12);
        assert_eq!(bench.driver.bytes(*at, 12).len(), 12);
    }
    assert_eq!(bench.driver.bytes(buffers[0] + 10, 2), [10, 0]);
    let got: Vec<u8> = buffers[1..10].iter().flat_map(|at| bench.driver.bytes(*at, 12)).collect();
    assert!(got == fits[12..]);
    assert_eq!(bench.count(|c| &c.rx_dropped), 1);
    assert!(!bench.driver.needs_reset());
}

#[test]
fn what_is_too_long_is_dropped() {
    let mut bench = Bench::new(0);
    let at = bench.room(1530);
    bench.kick(0);
    bench.wire.write_all(&frame(1519, 1)).unwrap();
    bench.wire.write_all(&[0; 5]).unwrap();
    bench.wire.write_all(&frame(1518, 2)).unwrap();
    assert_eq!(bench.wait_rx().len, 1530);
    assert!(bench.driver.bytes(at + 12, 1518) == frame(1518, 2)[12..]);
    assert_eq!(bench.count(|c| &c.rx_dropped), 2);
    // From the guest.
    bench.send(&vec![0; MAX_FRAME + 1]);
    bench.send(&frame(60, 3));
    bench.kick(1);
    bench.wait_tx();
    bench.wait_tx();
    assert!(bench.taken() == frame(60, 3));
    assert_eq!(bench.count(|c| &c.tx_dropped), 1);
    assert_eq!(bench.count(|c| &c.tx_packets), 1);
}

#[test]
fn a_full_wire_holds_the_guest_back_and_loses_nothing() {
    let mut bench = Bench::new(0);
    for seed in 0..60 {
        bench.send(&frame(16_000, seed));
    }
    bench.kick(1);
    for seed in 0..60 {
        assert!(bench.taken() == frame(16_000, seed), "{seed}");
    }
    for _ in 0..60 {
        bench.wait_tx();
    }
    assert_eq!(bench.count(|c| &c.tx_dropped), 0);
}

#[test]
fn stopping_and_starting_keeps_buffers_and_frames_in_order() {
    let mut bench = Bench::new(MERGEABLE | SEGMENTED);
    // More than one frame needs, so that the device holds buffers when it is stopped.
    let buffers: Vec<u64> = (0..60).map(|_| bench.room(2048)).collect();
    bench.kick(0);
    for (seed, at) in (0_u8..).zip(&buffers) {
        bench.wire.write_all(&frame(200, seed)).unwrap();
        if seed % 3 == 0 {
            bench.driver.device.suspend();
            bench.driver.device.resume();
        }
        assert_eq!(bench.wait_rx().len, 212);
        assert!(bench.driver.bytes(*at + 12, 200) == frame(200, seed)[12..], "{seed}");
        bench.send(&frame(60, seed));
        bench.kick(1);
        bench.driver.device.suspend();
        bench.driver.device.resume();
        bench.wait_tx();
        assert!(bench.taken() == frame(60, seed));
    }
    assert_eq!(bench.count(|c| &c.rx_dropped), 0);
}

#[test]
fn a_reset_under_traffic_leaves_memory_alone() {
    let features = MERGEABLE | SEGMENTED;
    let mut bench = Bench::new(features);
    for round in 0..10 {
        let buffers: Vec<u64> = (0..40).map(|_| bench.room(2048)).collect();
        bench.wire.write_all(&frame(1000, round)).unwrap();
        bench.kick(0);
        bench.driver.reset();
        let before: Vec<_> = buffers.iter().map(|at| bench.driver.bytes(*at, 2048)).collect();
        bench.wire.write_all(&frame(3000, round)).unwrap();
        bench.start_again(features);
        for _ in 0..4 {
            bench.room(2048);
        }
        bench.kick(0);
        // What is on the wire is received, in new buffers: the second frame, and the first if it came too late
        // for the old ones.
        let first = bench.wait_rx().len;
        let mut left = if first == 1012 { 3012 } else { 3012 - first };
        while left > 0 {
            left -= bench.wait_rx().len;
        }
        for (at, before) in buffers.iter().zip(before) {
            assert!(bench.driver.bytes(*at, 2048) == before, "written after the reset");
        }
        bench.driver.reset();
        bench.start_again(features);
    }
}

#[test]
fn rules_broken_need_a_reset_and_nothing_more() {
    type Break = fn(&mut Bench) -> u16;
    let rules: [(&str, Break); 9] = [
        ("a receive buffer to read", |b| {
            let at = b.driver.alloc(2048);
            b.rx.add(&[Buf::readable(at, 2048)]);
            0
        }),
        ("a receive buffer partly to read", |b| {
            let at = b.driver.alloc(2048);
            b.rx.add(&[Buf::readable(at, 16), Buf::writable(at, 2048)]);
            0
        }),
        ("a receive buffer shorter than a header", |b| {
            b.room(11);
            0
        }),
        ("a receive buffer outside memory", |b| {
            b.rx.add(&[Buf::writable(0x7fff_ffff_0000, 2048)]);
            0
        }),
        ("a receive index that jumps", |b| {
            b.rx.jump(100);
            0
        }),
        ("a frame to write", |b| {
            let at = b.driver.alloc(2048);
            b.tx.add(&[Buf::readable(at, 100), Buf::writable(at, 100)]);
            1
        }),
        ("a frame shorter than its header", |b| {
            b.send(&[0; 11]);
            1
        }),
        ("a loop", |b| {
            let at = b.driver.alloc(2048);
            b.tx.add_raw(&[Descriptor::new(at, 64, NEXT, 1), Descriptor::new(at, 64, NEXT, 0)], 0);
            1
        }),
        ("a huge frame that wraps", |b| {
            let at = b.driver.alloc(2048);
            b.tx.add_raw(&[Descriptor::new(at, u32::MAX, NEXT, 1), Descriptor::new(at, u32::MAX, WRITE, 0)], 0);
            1
        }),
    ];
    let mut bench = Bench::new(MERGEABLE);
    for (faults, (what, break_rule)) in (1..).zip(rules) {
        let queue = break_rule(&mut bench);
        // The receive queue is looked at when there is a frame.
        bench.wire.write_all(&frame(60, 1)).unwrap();
        bench.kick(queue);
        bench.driver.wait_needs_reset();
        assert_eq!(bench.driver.device.faults(), faults, "{what}");
        bench.start_again(MERGEABLE);
        bench.send(&frame(60, 2));
        bench.kick(1);
        bench.wait_tx();
        assert!(bench.taken() == frame(60, 2), "after {what}");
    }
}

/// Runs `ip`. False where that cannot be.
fn ip(arguments: &str) -> bool {
    let run = Command::new("ip").args(arguments.split(' ')).status();
    run.is_ok_and(|status| status.success())
}

fn message(name: &str) -> String {
    Tap::open(name).unwrap_err().to_string()
}

#[test]
fn names_that_are_none_are_refused() {
    assert!(message("").contains("a name is missing"));
    assert!(message("abcdefghijklmnop").contains("longer than the 15 bytes"));
    assert!(message("a/b").contains("no network interface's name"));
    let error = Tap::from_fd("fd 5", File::open("/dev/null").unwrap().into()).unwrap_err();
    assert!(error.to_string().contains("tap fd 5: the descriptor is not attached to a tap"), "{error}");
}

/// On a tap of the kernel's, in a network namespace of this thread's own.
#[test]
fn a_real_tap_carries_frames_and_says_what_is_wrong() {
    if unshare(CloneFlags::CLONE_NEWNET).is_err() || !ip("tuntap add dev tap7 mode tap") {
        println!("not tested: no right to make a tap here, or no ip command");
        return;
    }
    assert!(message("tap8").contains("there is no such network interface; make it with: ip tuntap add dev tap8"));
    assert!(message("lo").contains("is no tap device"));
    assert!(ip("link set tap7 up"));
    let tap = Tap::open("tap7").unwrap();
    assert!(message("tap7").contains("another process uses it"));
    let supported = tap.supported();
    assert!(supported.checksum && supported.tso4 && supported.tso6, "{supported:?}");
    let mut driver = PciDriver::new(Box::new(Net::new(tap, &NetOptions::new("net0", MAC))));
    driver.negotiate(u64::MAX);
    driver.setup_config_vector();
    let (mut rx, mut tx) = (driver.setup_queue(0, 64), driver.setup_queue(1, 64));
    driver.driver_ok();
    // An ARP request for an address of the host's, and its answer.
    assert!(ip("addr add 192.0.2.1/24 dev tap7"));
    let mut request = [[0xff; 6], MAC].concat();
    request.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    request.extend([&MAC[..], &[192, 0, 2, 2], &[0; 6], &[192, 0, 2, 1]].concat());
    let at = driver.alloc_bytes(&[&[0; HEADER_LEN][..], &request].concat());
    tx.add(&[Buf::readable(at, u32::try_from(HEADER_LEN + request.len()).unwrap())]);
    let mut buffers: std::collections::HashMap<u32, u64> = std::collections::HashMap::new();
    for _ in 0..48 {
        let at = driver.alloc(2048);
        buffers.insert(rx.add(&[Buf::writable(at, 2048)]).into(), at);
    }
    driver.kick(0);
    driver.kick(1);
    driver.wait_used(1, &mut tx);
    loop {
        // The host's own announcements come too.
        let used = driver.wait_used(0, &mut rx);
        let got = driver.bytes(buffers[&used.id] + HEADER_LEN as u64, 42);
        if got[12..14] == [8, 6] && got[20..22] == [0, 2] {
            assert_eq!(got[..6], MAC);
            assert_eq!(got[28..32], [192, 0, 2, 1]);
            break;
        }
    }
    // A tap that was removed takes frames to nowhere, and no more.
    assert!(ip("link del tap7"));
    tx.add(&[Buf::readable(at, u32::try_from(HEADER_LEN + request.len()).unwrap())]);
    driver.kick(1);
    driver.kick(0);
    driver.wait_used(1, &mut tx);
    assert!(!driver.needs_reset());
    driver.reset();
}

#[test]
fn no_frame_passes_a_link_that_is_down() {
    let mut bench = Bench::new(MERGEABLE);
    let status = bench.driver.config + 6;
    let at = bench.room(2048);
    bench.kick(0);
    bench.driver.device.change_config(|| bench.link.set(false));
    assert!(bench.driver.wait_vector(0), "the driver is told");
    assert_eq!(bench.driver.read(status), [0, 0], "link down");
    bench.wire.write_all(&frame(60, 1)).unwrap();
    bench.send(&frame(60, 2));
    bench.kick(1);
    bench.wait_tx();
    while bench.count(|c| &c.rx_dropped) == 0 {
        std::thread::yield_now();
    }
    assert_eq!((bench.count(|c| &c.tx_dropped), bench.count(|c| &c.tx_packets)), (1, 0));
    bench.driver.device.change_config(|| bench.link.set(true));
    assert!(bench.driver.wait_vector(0));
    assert_eq!(bench.driver.read(status), [1, 0], "link up");
    bench.wire.write_all(&frame(60, 3)).unwrap();
    bench.wait_rx();
    assert!(bench.driver.bytes(at + 12, 60) == frame(60, 3)[12..], "the frame from before is not delivered late");
    bench.send(&frame(60, 4));
    bench.kick(1);
    bench.wait_tx();
    assert!(bench.taken() == frame(60, 4));
}
