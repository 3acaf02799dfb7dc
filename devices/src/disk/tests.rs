use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};

use super::*;
use crate::virtio::testing::{Buf, DriverQueue, guest_memory};
use crate::virtio::{QueueEvents, RunningQueue};

const READ_WRITE: DiskOptions = DiskOptions { readonly: false, direct: false, size: None };
const READ_ONLY: DiskOptions = DiskOptions { readonly: true, direct: false, size: None };

struct NoEvents;

impl QueueEvents for NoEvents {
    fn used(&self) {}
    fn config_changed(&self) {}
    fn broken(&self, reason: &str) {
        panic!("{reason}");
    }
}

/// Makes chains of buffers, as a queue would.
struct Chains {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    ring: DriverQueue,
    queue: RunningQueue,
}

impl Chains {
    fn new() -> Self {
        let memory = guest_memory(1 << 20);
        let ring = DriverQueue::new(&memory, 0, 64);
        let kick = crate::virtio::queue::kick_event().unwrap();
        let queue = RunningQueue::new(ring.state(), memory.clone(), kick, Arc::new(NoEvents), 0).unwrap();
        Self { memory, ring, queue }
    }

    fn chain(&mut self, buffers: &[Buf]) -> Chain {
        self.ring.add(buffers);
        self.queue.next_chain().unwrap().unwrap()
    }

    fn fill(&self, at: u64, data: &[u8]) {
        self.memory.memory().write_slice(data, GuestAddress(at)).unwrap();
    }

    fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.memory().read_slice(&mut data, GuestAddress(at)).unwrap();
        data
    }
}

fn image(dir: &TempDir, name: &str, len: u64) -> PathBuf {
    let path = dir.path().join(name);
    File::create(&path).unwrap().set_len(len).unwrap();
    path
}

fn pattern(len: usize, seed: u32) -> Vec<u8> {
    let mut state = seed;
    let mut data = Vec::with_capacity(len);
    for _ in 0..len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        data.push(state.to_le_bytes()[3]);
    }
    data
}

fn message(path: &Path, options: DiskOptions) -> String {
    RawDisk::open(path, options).unwrap_err().to_string()
}

/// Both ways to a disk; io_uring is left out where this host refuses it.
fn backends(disk: &Arc<RawDisk>) -> Vec<Box<dyn DiskBackend>> {
    let mut all: Vec<Box<dyn DiskBackend>> = vec![Box::new(SyncBackend::new(Arc::clone(disk)).unwrap())];
    match UringBackend::new(Arc::clone(disk), 16) {
        Ok(backend) => all.push(Box::new(backend)),
        Err(e) => println!("io_uring is not tested: {e}"),
    }
    all
}

fn finish(backend: &mut dyn DiskBackend) -> Completion {
    backend.commit().unwrap();
    backend.wait().unwrap();
    backend.complete().expect("a completion")
}

#[test]
fn what_is_no_disk_is_refused_with_its_reason() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("missing");
    assert!(message(&path, READ_WRITE).contains("cannot open it for reading and writing: No such file"));
    assert!(message(dir.path(), READ_ONLY).contains("is a directory; give an image file or a block device"));
    assert!(message(Path::new("/dev/null"), READ_WRITE).contains("is a character device"));
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(message(&socket, READ_WRITE).contains("is a socket"));
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(message(&fifo, READ_WRITE).contains("is a FIFO"));
    let empty = image(&dir, "empty", 0);
    assert!(message(&empty, READ_WRITE).contains("is empty; give it its size first"));
    let odd = image(&dir, "odd", 1000);
    let text = message(&odd, READ_WRITE);
    assert!(text.contains("its size, 1000 bytes, is not a multiple of 512; the next that is, is 1024"), "{text}");
}

#[test]
fn a_disk_is_locked_while_it_is_open() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 4096);
    let first = RawDisk::open(&path, READ_WRITE).unwrap();
    assert!(message(&path, READ_WRITE).contains("locked by another VM"));
    assert!(message(&path, READ_ONLY).contains("locked by another VM"));
    drop(first);
    let first = RawDisk::open(&path, READ_ONLY).unwrap();
    let _second = RawDisk::open(&path, READ_ONLY).unwrap();
    assert!(message(&path, READ_WRITE).contains("only readonly disks can be shared"));
    drop(first);
    assert!(message(&path, READ_WRITE).contains("locked by another VM"));
}

#[test]
fn an_inherited_descriptor_must_allow_what_is_asked() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 4096);
    let file = File::open(&path).unwrap();
    let error = RawDisk::from_file("fd 7", file.try_clone().unwrap(), READ_WRITE).unwrap_err();
    assert!(error.to_string().contains("disk fd 7: the descriptor is not open for writing"), "{error}");
    let disk = RawDisk::from_file("fd 7", file, READ_ONLY).unwrap();
    assert_eq!((disk.size(), disk.readonly()), (4096, true));
}

#[test]
fn a_qcow2_header_in_a_raw_disk_means_nothing() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 1 << 20);
    let mut file = File::options().write(true).open(&path).unwrap();
    file.write_all(b"QFI\xfb\0\0\0\x03").unwrap();
    let disk = RawDisk::open(&path, READ_WRITE).unwrap();
    assert_eq!(disk.size(), 1 << 20);
}

#[test]
fn data_goes_through_in_pieces_of_any_kind() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 1 << 20);
    let disk = Arc::new(RawDisk::open(&path, READ_WRITE).unwrap());
    for (round, mut backend) in (1..).zip(backends(&disk)) {
        let mut chains = Chains::new();
        let data = pattern(4096, round);
        chains.fill(0x1_0001, &data[..1000]);
        chains.fill(0x2_0003, &data[1000..]);
        let chain = chains.chain(&[Buf::readable(0x1_0001, 1000), Buf::readable(0x2_0003, 3096)]);
        backend.submit(Request::write(chain, 8192, 0, true).unwrap());
        finish(&mut *backend).result.unwrap();
        let mut on_host = vec![0; 4096];
        File::open(&path).unwrap().read_exact_at(&mut on_host, 8192).unwrap();
        assert!(on_host == data, "written");
        let chain = chains.chain(&[Buf::writable(0x3_0001, 7), Buf::writable(0x4_0000, 4090)]);
        backend.submit(Request::read(chain, 8192, 4096).unwrap());
        let completion = finish(&mut *backend);
        completion.result.unwrap();
        assert_eq!(completion.request.len(), 4096);
        let mut read = chains.bytes(0x3_0001, 7);
        read.extend(chains.bytes(0x4_0000, 4089));
        assert!(read == data, "read");
    }
}

#[test]
fn an_image_that_became_shorter_gives_an_error() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 8192);
    let disk = Arc::new(RawDisk::open(&path, READ_WRITE).unwrap());
    File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
    for mut backend in backends(&disk) {
        let mut chains = Chains::new();
        let chain = chains.chain(&[Buf::writable(0x1_0000, 4096)]);
        backend.submit(Request::read(chain, 2048, 4096).unwrap());
        assert!(finish(&mut *backend).result.is_err());
        assert_eq!(backend.in_flight(), 0);
    }
}

#[test]
fn ranges_are_zeroed_and_given_back() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 4 << 20);
    let disk = Arc::new(RawDisk::open(&path, READ_WRITE).unwrap());
    for mut backend in backends(&disk) {
        for operation in
            [Operation::Discard, Operation::WriteZeroes { unmap: true }, Operation::WriteZeroes { unmap: false }]
        {
            fs::write(&path, vec![0xaa; 4 << 20]).unwrap();
            let before = fs::metadata(&path).unwrap().blocks();
            let mut chains = Chains::new();
            let chain = chains.chain(&[Buf::writable(0x1_0000, 1)]);
            backend.submit(Request::range(chain, operation, 1 << 20, 2 << 20));
            finish(&mut *backend).result.unwrap();
            let data = fs::read(&path).unwrap();
            assert_eq!(data.len(), 4 << 20);
            let (zeroed, kept) = (&data[1 << 20..3 << 20], [&data[..1 << 20], &data[3 << 20..]].concat());
            assert!(kept.iter().all(|byte| *byte == 0xaa), "{operation:?}: the rest is kept");
            if operation != Operation::Discard {
                assert!(zeroed.iter().all(|byte| *byte == 0), "{operation:?}");
            }
            if operation == (Operation::WriteZeroes { unmap: true }) {
                assert!(fs::metadata(&path).unwrap().blocks() < before, "storage is given back");
            }
        }
    }
}

#[test]
fn zeroes_are_written_where_the_file_system_cannot_zero() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 4 << 20);
    fs::write(&path, vec![0xaa; 4 << 20]).unwrap();
    let disk = Arc::new(RawDisk::open(&path, READ_WRITE).unwrap());
    let mut chains = Chains::new();
    let chain = chains.chain(&[Buf::writable(0x1_0000, 1)]);
    let request = Request::range(chain, Operation::WriteZeroes { unmap: false }, 4096, (1 << 20) + 512);
    let engine::Next::Again(job) = engine::Job::new(request).advance(-libc::EOPNOTSUPP) else {
        panic!("no other way was tried");
    };
    assert_eq!(job.step(), engine::Step::Write { durable: false });
    let mut backend = SyncBackend::new(disk).unwrap();
    backend.run(job);
    backend.complete().unwrap().result.unwrap();
    let data = fs::read(&path).unwrap();
    let zeroes = data.iter().filter(|byte| **byte == 0).count();
    assert_eq!(zeroes, (1 << 20) + 512);
    assert!(data[4096..4096 + (1 << 20) + 512].iter().all(|byte| *byte == 0));
}

#[test]
fn a_hole_that_cannot_be_made_is_no_error_of_a_discard() {
    let mut chains = Chains::new();
    let chain = chains.chain(&[Buf::writable(0x1_0000, 1)]);
    let request = Request::range(chain, Operation::Discard, 0, 512);
    let engine::Next::Done(completion) = engine::Job::new(request).advance(-libc::EOPNOTSUPP) else {
        panic!("a hint was insisted on");
    };
    completion.result.unwrap();
}

#[test]
fn direct_io_takes_what_is_aligned_and_what_is_not() {
    let dir = TempDir::new_in("/var/tmp").unwrap();
    let path = image(&dir, "disk", 1 << 20);
    let disk = match RawDisk::open(&path, DiskOptions { direct: true, ..READ_WRITE }) {
        Ok(disk) => Arc::new(disk),
        Err(e) => {
            assert!(e.to_string().contains("direct I/O is not possible here"), "{e}");
            return;
        }
    };
    for mut backend in backends(&disk) {
        for (address, offset, len) in
            [(0x2_0000, 4096, 8192), (0x2_0001, 8192, 4096), (0x2_0000, 512, 512), (0x2_0200, 4096, 512)]
        {
            let mut chains = Chains::new();
            let data = pattern(len, u32::try_from(offset + len).unwrap());
            chains.fill(address, &data);
            let size = u32::try_from(len).unwrap();
            let chain = chains.chain(&[Buf::readable(address, size)]);
            backend.submit(Request::write(chain, u64::try_from(offset).unwrap(), 0, false).unwrap());
            finish(&mut *backend).result.unwrap();
            chains.fill(address, &vec![0; len]);
            let chain = chains.chain(&[Buf::writable(address, size)]);
            backend.submit(Request::read(chain, u64::try_from(offset).unwrap(), size).unwrap());
            finish(&mut *backend).result.unwrap();
            assert!(chains.bytes(address, len) == data, "{address:#x} {offset} {len}");
        }
    }
}

#[test]
fn dropping_a_backend_waits_for_what_is_in_flight() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 1 << 20);
    let disk = Arc::new(RawDisk::open(&path, READ_WRITE).unwrap());
    for mut backend in backends(&disk) {
        let mut chains = Chains::new();
        for at in 0..8_u64 {
            let address = 0x2_0000 + at * 4096;
            chains.fill(address, &[0x55; 4096]);
            let chain = chains.chain(&[Buf::readable(address, 4096)]);
            backend.submit(Request::write(chain, at * 4096, 0, false).unwrap());
        }
        drop(backend);
        let data = fs::read(&path).unwrap();
        assert!(data[..8 * 4096].iter().all(|byte| *byte == 0x55));
        fs::write(&path, vec![0; 1 << 20]).unwrap();
    }
}

#[test]
fn a_disk_shows_part_of_its_file_grows_with_it_and_never_shrinks() {
    let dir = TempDir::new().unwrap();
    let path = image(&dir, "disk", 4096);
    let disk = RawDisk::open(&path, DiskOptions { size: Some(1024), ..READ_WRITE }).unwrap();
    assert_eq!(disk.size(), 1024);
    assert_eq!((disk.next_size(Some(2048)).unwrap(), disk.next_size(None).unwrap()), (2048, 4096));
    assert_eq!(disk.size(), 1024, "only asked");
    disk.grow(2048);
    disk.grow(1024);
    assert_eq!(disk.size(), 2048);
    for (wanted, why) in [
        (Some(1024), "cannot shrink to 1024"),
        (Some(8192), "8192 bytes are asked for, and it has 4096; make it longer first (truncate -s 8192)"),
        (Some(2049), "not a multiple of 512"),
        (Some(0), "is empty"),
    ] {
        let refused = disk.next_size(wanted).unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    File::options().write(true).open(&path).unwrap().set_len(1536).unwrap();
    assert!(matches!(disk.next_size(None), Err(DiskError::Shrinks { now: 2048, size: 1536, .. })));
    let longer = RawDisk::open(&path, DiskOptions { size: Some(2048), ..READ_ONLY });
    assert!(longer.is_err_and(|error| error.is_of_size() || matches!(error, DiskError::Locked { .. })));
}
