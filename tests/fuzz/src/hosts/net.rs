//! The host's side of a network card: one end of a pair of sockets, the other of which is in a tap's place.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;
use std::time::Instant;

use devices::net::{HEADER_LEN, Offloads, Tap};
use devices::virtio::VirtioDevice;
use devices::virtio::net::{Net, NetOptions};
use devices::virtio::testing::{Buf, PciDriver, TIMEOUT};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};

use super::{Host, begin};
use crate::input::{Step, pattern};

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const EVERYTHING: Offloads = Offloads { checksum: true, tso4: true, tso6: true, ecn: true, ufo: true, uso: true };
/// A receive buffer with room for each frame that this host sends without segmentation.
const ROOM: u32 = 2048;

/// The other end of the wire.
pub struct Wire {
    wire: OwnedFd,
    tap: Option<OwnedFd>,
    /// Frames sent so far, without the number of buffers in their headers.
    sent: Vec<Vec<u8>>,
}

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).expect("a pair of sockets")
}

fn device(end: OwnedFd) -> Box<dyn VirtioDevice> {
    let tap = Tap::fake(end, EVERYTHING).expect("a tap");
    Box::new(Net::new(tap, &NetOptions::new("net0", MAC)))
}

fn frame(seed: u32, len: usize) -> Vec<u8> {
    [vec![0; HEADER_LEN], pattern(seed, len)].concat()
}

impl Wire {
    /// A wire.
    pub fn new() -> Self {
        let (wire, tap) = pair();
        Self { wire, tap: Some(tap), sent: Vec::new() }
    }

    /// False where the wire is full.
    fn send(&self, frame: &[u8]) -> bool {
        match send(self.wire.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(_) => true,
            Err(error) => {
                assert_eq!(std::io::Error::from(error).kind(), ErrorKind::WouldBlock, "sending");
                false
            }
        }
    }

    /// Takes a frame off the wire; `None` where there is none.
    fn receive(&self, flags: MsgFlags) -> Option<Vec<u8>> {
        let mut frame = vec![0; 1 << 17];
        match recv(self.wire.as_raw_fd(), &mut frame, flags) {
            Ok(len) => {
                frame.truncate(len);
                Some(frame)
            }
            Err(Errno::EAGAIN) => None,
            Err(error) => panic!("receiving: {error}"),
        }
    }
}

impl Host for Wire {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        device(self.tap.take().expect("one device for each wire"))
    }

    fn twin(&mut self) -> Box<dyn VirtioDevice> {
        device(pair().1)
    }

    fn act(&mut self, step: Step) {
        if step.a & 1 != 0 {
            self.receive(MsgFlags::MSG_DONTWAIT);
            return;
        }
        let lengths = [0, 4, HEADER_LEN, 60, 1514, 1600, 9000, 65562];
        let len = lengths[usize::from(step.b & 7)] + usize::from(step.c);
        for _ in 0..=(step.a >> 1 & 3) {
            let mut frame = pattern(step.d, len);
            // A tap's header says at the most what the guest agreed to; this one says anything.
            if step.a & 8 == 0 {
                frame.iter_mut().take(HEADER_LEN).for_each(|byte| *byte = 0);
            }
            self.send(&frame);
            if let Some(buffers) = frame.get_mut(HEADER_LEN - 2..HEADER_LEN) {
                buffers.fill(0);
                self.sent.push(frame);
            }
        }
    }

    fn header(&self, step: Step) -> Vec<u8> {
        // Receive buffers, which have nothing to read, or the header of a frame.
        match step.a & 1 {
            0 => Vec::new(),
            _ => [&step.d.to_le_bytes()[..], &step.d.to_be_bytes(), &[0; 4]].concat(),
        }
    }

    fn check(&mut self, driver: &mut PciDriver) {
        begin(driver, 0);
        let (mut rx, mut tx) = (driver.setup_queue(0, 16), driver.setup_queue(1, 16));
        driver.driver_ok();
        while self.receive(MsgFlags::MSG_DONTWAIT).is_some() {}
        let sent = frame(3, 100);
        let at = driver.alloc_bytes(&sent);
        let head = tx.add(&[Buf::readable(at, 12), Buf::readable(at + 12, 100)]);
        driver.kick(1);
        assert_eq!(driver.wait_used(1, &mut tx).id, u32::from(head));
        assert!(self.receive(MsgFlags::empty()) == Some(sent), "another frame came than the guest sent");

        // Frames of before the reset may be on the wire still, and fill it; too long ones take no buffer.
        let own = frame(0x5eed, 77);
        let at = driver.alloc(ROOM.into());
        let (mut on_wire, mut head) = (false, None);
        let deadline = Instant::now() + TIMEOUT;
        loop {
            on_wire = on_wire || self.send(&own);
            if head.is_none() {
                head = Some(rx.add(&[Buf::writable(at, ROOM)]));
                driver.kick(0);
            }
            let Some(used) = rx.used() else {
                assert!(Instant::now() < deadline, "no frame comes");
                thread::yield_now();
                continue;
            };
            assert_eq!(Some(used.id), head.take().map(u32::from));
            assert!(used.len <= ROOM);
            let mut got = driver.bytes(at, usize::try_from(used.len).expect("a length"));
            assert_eq!(got[HEADER_LEN - 2..HEADER_LEN], [1, 0], "a frame in one buffer");
            got[HEADER_LEN - 2] = 0;
            if got == own {
                return;
            }
            assert!(self.sent.contains(&got), "a frame of {} bytes comes that nobody sent", got.len());
        }
    }
}
