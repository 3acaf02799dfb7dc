//! The host's side of a memory device.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use devices::virtio::VirtioDevice;
use devices::virtio::mem::{Backing, Mem, MemControl, MemOptions};
use devices::virtio::testing::{Buf, PciDriver};

use super::{Host, begin};
use crate::input::Step;

const START: u64 = 4 << 30;
const BLOCK: u64 = 2 << 20;
const BLOCKS: usize = 64;

/// Types of requests and of responses (virtio 1.2 §5.15.6).
const PLUG: u16 = 0;
const UNPLUG_ALL: u16 = 2;
const ACK: u16 = 0;

/// What the host knows of its blocks: that a block is never plugged or unplugged twice, nor one that is not there.
struct Blocks {
    plugged: Mutex<[bool; BLOCKS]>,
    /// Nothing can be plugged or unplugged.
    refuses: Mutex<bool>,
}

impl Blocks {
    fn set(&self, range: &Range<u64>, plugged: bool) -> io::Result<()> {
        if *self.refuses.lock().unwrap_or_else(PoisonError::into_inner) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(range.start.is_multiple_of(BLOCK) && range.end.is_multiple_of(BLOCK) && !range.is_empty(), "{range:?}");
        let mut blocks = self.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        let number = |at: u64| usize::try_from(at / BLOCK).expect("a block");
        for block in &mut blocks[number(range.start)..number(range.end)] {
            assert_ne!(*block, plugged, "{range:?}");
            *block = plugged;
        }
        Ok(())
    }
}

struct Checked(Arc<Blocks>);

impl Backing for Checked {
    fn plug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.0.set(&range, true)
    }

    fn unplug(&mut self, range: Range<u64>) -> io::Result<()> {
        self.0.set(&range, false)
    }

    fn resized(&self, plugged: u64) {
        let blocks = self.0.plugged.lock().unwrap_or_else(PoisonError::into_inner);
        let known = blocks.iter().filter(|block| **block).count();
        assert_eq!(plugged, BLOCK * u64::try_from(known).expect("a number"));
    }
}

/// The host's memory.
#[derive(Default)]
pub struct Memory {
    control: Option<MemControl>,
    blocks: Option<Arc<Blocks>>,
}

fn new() -> (Mem, Arc<Blocks>) {
    let blocks = Arc::new(Blocks { plugged: Mutex::new([false; BLOCKS]), refuses: Mutex::default() });
    let len = BLOCK * u64::try_from(BLOCKS).expect("a number");
    let options = MemOptions { id: "memory".into(), start: START, len, block_size: BLOCK };
    (Mem::new(options, Box::new(Checked(blocks.clone()))).expect("a region"), blocks)
}

impl Host for Memory {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (device, blocks) = new();
        (self.control, self.blocks) = (Some(device.control()), Some(blocks));
        Box::new(device)
    }

    fn twin(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(new().0)
    }

    /// Asks for some blocks, or has none to give.
    fn act(&mut self, step: Step) {
        if let (Some(control), Some(blocks)) = (&self.control, &self.blocks) {
            control.request(BLOCK * (u64::from(step.a) % 65));
            *blocks.refuses.lock().unwrap_or_else(PoisonError::into_inner) = step.b & 7 == 7;
        }
    }

    /// Type and address; how many blocks it is about follows.
    fn header(&self, step: Step) -> Vec<u8> {
        let [kind, block, ..] = step.d.to_le_bytes();
        let mut header = u64::from(kind & 7).to_le_bytes().to_vec();
        header.extend((START + u64::from(block) * (BLOCK / 2)).to_le_bytes());
        header
    }

    fn check(&mut self, driver: &mut PciDriver) {
        self.act(Step { a: 64, b: 0, ..Step::default() });
        begin(driver, u64::MAX);
        let mut queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        for (kind, blocks) in [(UNPLUG_ALL, 0_u16), (PLUG, 64)] {
            let mut request = u64::from(kind).to_le_bytes().to_vec();
            request.extend(START.to_le_bytes());
            request.extend(u64::from(blocks).to_le_bytes());
            let (request, response) = (driver.alloc_bytes(&request), driver.alloc(16));
            queue.add(&[Buf::readable(request, 24), Buf::writable(response, 10)]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0, &mut queue).len, 10);
            assert_eq!(driver.bytes(response, 2), ACK.to_le_bytes());
        }
    }
}
