//! The host's side of a disk: an image in memory.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use devices::disk::{DiskOptions, RawDisk};
use devices::virtio::VirtioDevice;
use devices::virtio::blk::{Blk, BlkOptions};
use devices::virtio::testing::{Buf, DriverQueue, PciDriver};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Host, begin};
use crate::input::{Step, pattern};

const SECTOR: usize = 512;
const SIZE: usize = 128 * SECTOR;

/// Requests (virtio 1.2 §5.2.6) and statuses.
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const OK: u8 = 0;
const IO_ERROR: u8 = 1;

/// A disk image.
pub struct Disk {
    file: File,
    disk: Arc<RawDisk>,
    options: BlkOptions,
}

impl Disk {
    /// An image, and how its device is made.
    pub fn new(readonly: bool, queues: u16) -> Self {
        let file = File::from(memfd_create(c"disk", MFdFlags::MFD_CLOEXEC).expect("memory for a disk"));
        file.write_all_at(&content(), 0).expect("the disk's content");
        let handle = file.try_clone().expect("a second handle");
        let disk = RawDisk::from_file("disk", handle, DiskOptions { readonly, ..DiskOptions::default() }).expect("a disk");
        let options = BlkOptions { queues, ..BlkOptions::new("vda") };
        Self { file, disk: Arc::new(disk), options }
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE];
        self.file.read_exact_at(&mut bytes, 0).expect("the disk's content");
        bytes
    }
}

fn content() -> Vec<u8> {
    let mut bytes = pattern(1, SIZE / 4);
    bytes.resize(SIZE, 0);
    bytes
}

/// Does a request and gives its status.
fn request(driver: &mut PciDriver, queue: &mut DriverQueue, kind: u32, sector: u64, data: &[Buf]) -> u8 {
    let header = [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat();
    let (header, status) = (driver.alloc_bytes(&header), driver.alloc_bytes(&[0xee]));
    let head = queue.add(&[&[Buf::readable(header, 16)], data, &[Buf::writable(status, 1)]].concat());
    driver.kick(0);
    let used = driver.wait_used(0, queue);
    let writable: u32 = data.iter().filter(|buf| buf.writable).map(|buf| buf.len).sum();
    assert_eq!((used.id, used.len), (u32::from(head), writable + 1));
    driver.bytes(status, 1)[0]
}

impl Host for Disk {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Blk::new(Arc::clone(&self.disk), &self.options))
    }

    fn twin(&mut self) -> Box<dyn VirtioDevice> {
        self.device()
    }

    fn act(&mut self, _step: Step) {
        // Nobody on the host touches a disk that a guest has.
    }

    fn header(&self, step: Step) -> Vec<u8> {
        let kinds = [IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, IN, u32::from(step.d_high())];
        let kind = kinds[usize::from(step.d_high() & 7)];
        let sector = match step.d_low() >> 12 {
            // About the disk's end.
            0xe => 120 + u64::from(step.d_low() & 0xf),
            0xf => u64::MAX / 512 - u64::from(step.d_low() & 0xfff),
            _ => u64::from(step.d_low()) % 160,
        };
        [kind.to_le_bytes().as_slice(), &[0; 4], &sector.to_le_bytes()].concat()
    }

    fn check(&mut self, driver: &mut PciDriver) {
        let length = self.file.metadata().expect("metadata").len();
        assert_eq!(usize::try_from(length), Ok(SIZE), "the image has another size");
        if self.disk.readonly() {
            assert!(self.content() == content(), "a disk that cannot be written was");
        }
        begin(driver, u64::MAX);
        let mut queue = driver.setup_queue(0, 16);
        driver.driver_ok();
        let data = pattern(7, SECTOR);
        let (source, target) = (driver.alloc_bytes(&data), driver.alloc(512));
        let written = request(driver, &mut queue, OUT, 3, &[Buf::readable(source, 512)]);
        assert_eq!(written, if self.disk.readonly() { IO_ERROR } else { OK });
        assert_eq!(request(driver, &mut queue, FLUSH, 0, &[]), OK);
        assert_eq!(request(driver, &mut queue, IN, 3, &[Buf::writable(target, 512)]), OK);
        let read = driver.bytes(target, SECTOR);
        assert!(read == self.content()[3 * SECTOR..4 * SECTOR], "what is read is not what the image holds");
        assert!(self.disk.readonly() || read == data, "what is read is not what was written");
    }
}
