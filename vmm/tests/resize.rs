//! Memory that comes and goes on a scripted hypervisor: what the owner makes of what the guest's driver does, or does not.

use api::{ByteSize, EventKind, JobState, MemoryPatch, PhaseName, TimeSpan};
use arch::layout;
use hal::fake::Step;
use vm_memory::Bytes;
use vmm::request::{Answer, Change, Refusal, Request};

mod guest;
mod jobs;
mod service;

use jobs::{end_of, job};
use service::Service;

const MIB: u64 = 1 << 20;
/// The device is the only one of the root bus beside the host bridge.
const CONFIG: u64 = layout::ECAM.start + (1 << 15);
const BAR: u64 = 0xc000_0000;
const STATUS: u64 = BAR + 0x14;
const NOTIFY: u64 = BAR + 0x3000;
/// Guest memory that the driver uses.
const DESCRIPTORS: u64 = 0x20_0000;
const AVAILABLE: u64 = 0x20_1000;
const USED: u64 = 0x20_2000;
const REQUEST: u64 = 0x20_3000;
const RESPONSE: u64 = 0x20_4000;
const REGION: u64 = 4 << 30;
const LONG: u64 = 3_600_000;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const ACK: u16 = 0;
const NACK: u16 = 1;

fn start_in(phase: PhaseName, timeout: u64) -> Service {
    Service::start_in(phase, |config| {
        (config.memory.size, config.memory.max) = (ByteSize::mib(64), Some(ByteSize::mib(320)));
        config.memory.resize_timeout = TimeSpan::from_millis(timeout);
    })
}

/// The guest's driver, of a machine that has one since it booted.
struct Driver<'a> {
    service: &'a Service,
    asked: u16,
}

impl<'a> Driver<'a> {
    fn start(service: &'a Service) -> Self {
        let driver = Self { service, asked: 0 };
        for at in [DESCRIPTORS, AVAILABLE, USED] {
            driver.write(at, &[0; 256]);
        }
        let write = |at: u64, bytes: &[u8]| Step::mmio_write(at, bytes);
        let mut steps = vec![write(CONFIG + 0x10, &0xc000_0000_u32.to_le_bytes()), write(CONFIG + 0x14, &[0; 4])];
        steps.extend([write(CONFIG + 4, &[6, 0]), write(STATUS, &[1]), write(STATUS, &[3])]);
        steps.extend([write(BAR + 8, &[1, 0, 0, 0]), write(BAR + 0xc, &[1, 0, 0, 0]), write(STATUS, &[11])]);
        steps.push(write(BAR + 0x18, &[8, 0]));
        for (register, address) in [(0x20, DESCRIPTORS), (0x28, AVAILABLE), (0x30, USED)] {
            let (low, high) = (u32::try_from(address).unwrap(), 0_u32);
            steps.extend([write(BAR + register, &low.to_le_bytes()), write(BAR + register + 4, &high.to_le_bytes())]);
        }
        steps.extend([write(BAR + 0x1c, &[1, 0]), write(STATUS, &[15])]);
        service.script(steps);
        driver
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.service.fake.memory(at, |region, at| region.write_slice(bytes, at)).unwrap();
    }

    fn read<const N: usize>(&self, at: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.service.fake.memory(at, |region, at| region.read_slice(&mut bytes, at)).unwrap();
        bytes
    }

    /// Asks for MiB of the region, from one on, and gives the answer's type.
    fn ask(&mut self, kind: u16, mib: u64, count: u64) -> u16 {
        let mut request = [0; 24];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&(REGION + mib * MIB).to_le_bytes());
        request[16..18].copy_from_slice(&u16::try_from(count / 2).unwrap().to_le_bytes());
        self.write(REQUEST, &request);
        for (at, address, len, flags, next) in
            [(DESCRIPTORS, REQUEST, 24_u32, 1_u16, 1_u16), (DESCRIPTORS + 16, RESPONSE, 10, 2, 0)]
        {
            let mut bytes = address.to_le_bytes().to_vec();
            bytes.extend(len.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(next.to_le_bytes());
            self.write(at, &bytes);
        }
        self.asked += 1;
        self.write(AVAILABLE + 2, &self.asked.to_le_bytes());
        self.service.script([Step::mmio_write(NOTIFY, &[0, 0])]);
        self.service.wait_for("an answer", |_| u16::from_le_bytes(self.read(USED + 2)) == self.asked);
        u16::from_le_bytes(self.read(RESPONSE))
    }
}

fn patch(service: &Service, mib: u64) -> Result<Answer, Refusal> {
    let change = Change::Memory(MemoryPatch { size: ByteSize::new(mib * MIB) });
    service.ask(Request::Change { change, expected: None })
}

/// MiB that the guest has, and is asked to have.
fn memory(service: &Service) -> (u64, u64) {
    (service.board.present().1 / MIB, service.board.wanted_memory() / MIB)
}

fn resized(service: &Service) -> Vec<u64> {
    let present = |event| match event {
        EventKind::MemoryResized { present } => Some(present / MIB),
        _ => None,
    };
    service.events().into_iter().filter_map(present).collect()
}

#[test]
fn memory_grows_and_shrinks_as_the_guest_does_it() {
    let service = start_in(PhaseName::Running, LONG);
    let mut driver = Driver::start(&service);
    assert_eq!(driver.ask(PLUG, 0, 2), NACK, "nothing is asked for");
    let growing = job(patch(&service, 192));
    assert_eq!(job(patch(&service, 192)), growing, "who asks again waits for the same");
    assert_eq!(memory(&service), (64, 192));
    assert_eq!(driver.ask(PLUG, 0, 64), ACK);
    service.wait_for("half of it", |service| service.board.job(growing).unwrap().progress == Some(50));
    assert_eq!(memory(&service), (128, 192));
    driver.write(REGION, b"plugged");
    assert_eq!([driver.ask(PLUG, 128, 66), driver.ask(PLUG, 128, 64)], [NACK, ACK]);
    assert_eq!(end_of(&service, growing).state, JobState::Succeeded);
    assert!(matches!(patch(&service, 192), Ok(Answer::Done)));
    let shrinking = job(patch(&service, 64));
    assert_eq!([driver.ask(UNPLUG, 0, 64), driver.ask(UNPLUG, 128, 64)], [ACK; 2]);
    assert_eq!(end_of(&service, shrinking).state, JobState::Succeeded);
    assert_eq!(driver.read(REGION), [0; 7], "it is with the host again");
    assert_eq!((memory(&service), resized(&service)), ((64, 64), vec![192, 64]));
    service.end();
}

#[test]
fn a_guest_that_makes_no_progress_is_told_of_and_still_asked() {
    let service = start_in(PhaseName::Running, 50);
    let mut driver = Driver::start(&service);
    let slow = end_of(&service, job(patch(&service, 128)));
    let error = slow.error.unwrap();
    assert_eq!((slow.state, error.status), (JobState::Failed, 504));
    assert!(error.detail.contains("has 64M of memory and not 128M"), "{}", error.detail);
    assert_eq!(memory(&service), (64, 128));
    assert_eq!(driver.ask(PLUG, 0, 64), ACK);
    service.wait_for("what it was asked for", |service| resized(service) == [128]);
    service.end();
}

#[test]
fn a_cancelled_job_leaves_the_guest_what_it_has() {
    let service = start_in(PhaseName::Running, LONG);
    let mut driver = Driver::start(&service);
    let growing = job(patch(&service, 320));
    assert_eq!(driver.ask(PLUG, 0, 32), ACK);
    service.wait_for("a part", |service| memory(service).0 == 96);
    service.ask(Request::CancelJob(growing)).unwrap();
    assert_eq!(end_of(&service, growing).state, JobState::Cancelled);
    assert_eq!(memory(&service), (96, 96));
    assert_eq!(driver.ask(PLUG, 32, 2), NACK, "nobody asks any more");
    // Who asks for something else ends what was asked before.
    let (first, second) = (job(patch(&service, 128)), job(patch(&service, 160)));
    assert_eq!(end_of(&service, first).state, JobState::Cancelled);
    assert_eq!(driver.ask(PLUG, 32, 64), ACK);
    assert_eq!(end_of(&service, second).state, JobState::Succeeded);
    service.end();
}

#[test]
fn a_reset_in_the_middle_takes_all_and_asks_the_next_driver() {
    let service = start_in(PhaseName::Running, LONG);
    let mut driver = Driver::start(&service);
    let growing = job(patch(&service, 192));
    assert_eq!(driver.ask(PLUG, 0, 64), ACK);
    service.wait_for("a part", |service| memory(service) == (128, 192));
    service.ask(Request::Reset).unwrap();
    assert_eq!(memory(&service), (64, 192));
    let mut driver = Driver::start(&service);
    assert_eq!(driver.read(REGION), [0; 8]);
    assert_eq!(driver.ask(PLUG, 0, 128), ACK);
    assert_eq!(end_of(&service, growing).state, JobState::Succeeded);
    service.ask(Request::Destroy).unwrap();
    assert_eq!(memory(&service), (0, 0));
    service.end();
}

#[test]
fn a_guest_that_stands_still_is_asked_when_it_goes_on() {
    let service = start_in(PhaseName::Paused, 50);
    let growing = job(patch(&service, 128));
    assert_eq!(service.board.job(growing).unwrap().state, JobState::Running, "it has all its time");
    service.ask(Request::Resume).unwrap();
    assert_eq!(end_of(&service, growing).state, JobState::Failed);
    let ends = job(patch(&service, 320));
    service.ask(Request::Destroy).unwrap();
    assert_eq!(end_of(&service, ends).state, JobState::Failed);
    service.end();
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    let service = start_in(PhaseName::Running, LONG);
    for mib in [0, 62, 65, 322] {
        assert!(matches!(patch(&service, mib), Err(Refusal::Problems(_))), "{mib}");
    }
    service.end();
    let service = Service::start_in(PhaseName::Running, |_| {});
    assert!(matches!(patch(&service, 1024), Err(Refusal::Conflict(_))));
    service.end();
}
