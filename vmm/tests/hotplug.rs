//! Hot-plug on a scripted hypervisor: what the owner makes of the guest's answers, and of none.

use std::time::Duration;

use api::{DeviceConfig, Disk, Endpoint, EventKind, JobState, PhaseName, Rng, TimeSpan};
use arch::layout;
use hal::VcpuId;
use hal::fake::{Live, Step};
use vmm::request::{Answer, Change, Descriptors, Refusal, Request};

mod guest;
mod jobs;
mod service;

use jobs::{end_of, job};
use service::Service;

/// Slot control of port 0: device 31, function 0 of the root bus; its capability stands at 0x40.
const SLOT_CONTROL: u64 = layout::ECAM.start + (31 << 15) + 0x40 + 0x18;
const SLOT_STATUS: u64 = SLOT_CONTROL + 2;
const ON: u16 = 1 << 8;
const BLINKING: u16 = 2 << 8;
const OFF: u16 = 3 << 8;

/// A service whose VM has two hot-plug ports, in a phase.
fn start_in(phase: PhaseName, timeout: u64) -> Service {
    start_with_ports(2, phase, timeout)
}

fn start_with_ports(ports: u8, phase: PhaseName, timeout: u64) -> Service {
    Service::start_in(phase, |config| {
        config.pci.hotplug_ports = ports;
        config.pci.hotplug_timeout = TimeSpan::from_millis(timeout);
    })
}

const LONG: u64 = 3_600_000;

fn rng(id: &str) -> DeviceConfig {
    DeviceConfig::Rng(Rng { id: id.into() })
}

fn put(service: &Service, device: DeviceConfig) -> Result<Answer, Refusal> {
    let change = Change::PutDevice { device: Box::new(device), descriptors: Descriptors::sent([]) };
    service.ask(Request::Change { change, expected: None })
}

fn remove(service: &Service, id: &str, force: bool) -> Result<Answer, Refusal> {
    service.ask(Request::Change { change: Change::RemoveDevice { id: id.into(), force }, expected: None })
}

/// The guest has the power indicator show these, one after the other.
fn shows(service: &Service, indicators: &[u16]) {
    service.script(indicators.iter().map(|bits| Step::mmio_write(SLOT_CONTROL, &bits.to_le_bytes())));
}

/// Whether the attention button was pressed since the guest last looked; it looks now, and clears the event if it is to.
fn pressed(service: &Service, clear: bool) -> bool {
    let seen = service.fake.reads(VcpuId(0)).len();
    service.script([Step::mmio_read(SLOT_STATUS, 2)]);
    service.wait_for("a look", |service| service.fake.reads(VcpuId(0)).len() > seen);
    let found = service.fake.reads(VcpuId(0)).last().unwrap().data[0] & 1 != 0;
    if clear {
        assert!(found, "the button was not pressed");
        service.script([Step::mmio_write(SLOT_STATUS, &[1, 0])]);
        service.wait_for("no press", |service| !pressed(service, false));
    }
    found
}

fn devices(service: &Service) -> Vec<String> {
    let running = service.board.info().0.running.unwrap();
    running.devices.iter().map(|device| device.id().to_owned()).collect()
}

/// A device that the guest has taken.
#[track_caller]
fn add(service: &Service, id: &str) {
    let job = job(put(service, rng(id)));
    shows(service, &[BLINKING, ON]);
    assert_eq!(end_of(service, job).state, JobState::Succeeded);
}

fn told(service: &Service) -> Vec<EventKind> {
    let events = service.events().into_iter();
    events.filter(|event| !matches!(event, EventKind::Phase { .. } | EventKind::Job { .. })).collect()
}

#[test]
fn a_device_is_there_when_the_guest_has_taken_it_and_gone_when_it_lets_go() {
    let service = start_in(PhaseName::Running, LONG);
    let adding = job(put(&service, rng("a")));
    assert_eq!(job(put(&service, rng("a"))), adding, "who asks again waits for the same");
    assert!(matches!(remove(&service, "a", false), Err(Refusal::Conflict(_))));
    assert!(devices(&service).is_empty(), "the guest has not taken it yet");
    shows(&service, &[BLINKING, ON]);
    assert_eq!(end_of(&service, adding).state, JobState::Succeeded);
    assert_eq!(devices(&service), ["a"]);
    assert!(matches!(put(&service, rng("a")), Ok(Answer::Done)));
    let removing = job(remove(&service, "a", false));
    assert_eq!(job(remove(&service, "a", false)), removing);
    assert!(matches!(put(&service, rng("a")), Err(Refusal::Conflict(_))));
    assert_eq!(devices(&service), ["a"]);
    shows(&service, &[BLINKING, OFF]);
    assert_eq!(end_of(&service, removing).state, JobState::Succeeded);
    assert!(devices(&service).is_empty());
    let id = || "a".to_owned();
    assert_eq!(
        told(&service),
        [EventKind::DeviceAdded { id: id() }, EventKind::DeviceRemoved { id: id(), forced: false }]
    );
    assert!(matches!(remove(&service, "a", false), Err(Refusal::Missing(_))));
    service.end();
}

#[test]
fn what_the_guest_refuses_is_undone() {
    let service = start_in(PhaseName::Running, LONG);
    let refused = job(put(&service, rng("a")));
    shows(&service, &[BLINKING, OFF]);
    let ended = end_of(&service, refused);
    assert_eq!((ended.state, ended.error.unwrap().status), (JobState::Failed, 409));
    assert!(devices(&service).is_empty());
    add(&service, "a");
    let kept = job(remove(&service, "a", false));
    shows(&service, &[BLINKING, ON]);
    assert_eq!(end_of(&service, kept).state, JobState::Failed);
    assert_eq!(devices(&service), ["a"]);
    let told = told(&service);
    assert!(matches!(
        told.as_slice(),
        [EventKind::DeviceFailed { .. }, EventKind::DeviceAdded { .. }, EventKind::DeviceFailed { .. }]
    ));
    service.end();
}

#[test]
fn a_guest_that_does_not_answer_leaves_all_as_it_was() {
    let service = start_in(PhaseName::Running, 50);
    let before = service.fake.live();
    let ended = end_of(&service, job(put(&service, rng("a"))));
    assert_eq!((ended.state, ended.error.unwrap().status), (JobState::Failed, 504));
    assert_eq!((service.fake.live(), devices(&service)), (before, vec![]));
    service.end();
}

#[test]
fn a_device_is_forced_out_at_any_time() {
    let service = start_with_ports(1, PhaseName::Running, LONG);
    add(&service, "a");
    let removing = job(remove(&service, "a", false));
    assert!(matches!(remove(&service, "a", true), Ok(Answer::Done)));
    assert_eq!(end_of(&service, removing).state, JobState::Succeeded);
    assert_eq!(told(&service).last(), Some(&EventKind::DeviceRemoved { id: "a".into(), forced: true }));
    // What the guest still says of the old device says nothing of the next one.
    let adding = job(put(&service, rng("b")));
    shows(&service, &[OFF]);
    shows(&service, &[BLINKING, ON]);
    assert_eq!(end_of(&service, adding).state, JobState::Succeeded);
    assert!(matches!(remove(&service, "b", true), Ok(Answer::Done)));
    let adding = job(put(&service, rng("c")));
    assert!(matches!(remove(&service, "c", true), Ok(Answer::Done)));
    assert_eq!(end_of(&service, adding).state, JobState::Cancelled);
    assert!(devices(&service).is_empty());
    service.end();
}

#[test]
fn a_job_is_cancelled_and_the_guest_told() {
    let service = start_in(PhaseName::Running, LONG);
    let adding = job(put(&service, rng("a")));
    service.ask(Request::CancelJob(adding)).unwrap();
    assert_eq!(end_of(&service, adding).state, JobState::Cancelled);
    assert!(devices(&service).is_empty());
    add(&service, "b");
    let removing = job(remove(&service, "b", false));
    service.ask(Request::CancelJob(removing)).unwrap();
    assert_eq!(end_of(&service, removing).state, JobState::Cancelled);
    assert_eq!(devices(&service), ["b"]);
    // The guest has seen no press yet, so the second one comes when it has answered the first.
    pressed(&service, true);
    shows(&service, &[BLINKING]);
    service.wait_for("the second press", |service| pressed(service, false));
    shows(&service, &[ON]);
    let removing = job(remove(&service, "b", false));
    shows(&service, &[BLINKING, OFF]);
    assert_eq!(end_of(&service, removing).state, JobState::Succeeded);
    service.end();
}

#[test]
fn ports_are_used_up_and_free_again() {
    let service = start_in(PhaseName::Running, LONG);
    add(&service, "a");
    let b = job(put(&service, rng("b")));
    let Err(Refusal::Conflict(why)) = put(&service, rng("c")) else { panic!("no port is free") };
    assert!(why.contains("2 hot-plug ports"), "{why}");
    service.ask(Request::CancelJob(b)).unwrap();
    job(put(&service, rng("c")));
    service.end();
}

#[test]
fn a_device_from_before_the_boot_stays() {
    let service = start_in(PhaseName::Ready, LONG);
    assert!(matches!(put(&service, rng("a")), Ok(Answer::Created)));
    service.ask(Request::Boot).unwrap();
    for force in [false, true] {
        let Err(Refusal::Conflict(why)) = remove(&service, "a", force) else { panic!("it cannot go") };
        assert!(why.contains("was there when the VM booted"), "{why}");
    }
    service.end();
}

#[test]
fn what_is_asked_while_the_machine_stands_waits_for_it() {
    let service = start_in(PhaseName::Paused, 100);
    let adding = job(put(&service, rng("a")));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(service.board.job(adding).unwrap().state, JobState::Running, "its time has not begun");
    service.ask(Request::Resume).unwrap();
    shows(&service, &[BLINKING, ON]);
    end_of(&service, adding);
    service.ask(Request::Pause).unwrap();
    service.ask(Request::Resume).unwrap();
    service.end();
}

#[test]
fn a_reset_keeps_what_was_added_and_lets_go_of_what_was_to_go() {
    let service = start_in(PhaseName::Running, LONG);
    add(&service, "goes");
    let removing = job(remove(&service, "goes", false));
    let adding = job(put(&service, rng("comes")));
    service.ask(Request::Reset).unwrap();
    assert_eq!(service.board.job(removing).unwrap().state, JobState::Succeeded);
    assert_eq!(service.board.job(adding).unwrap().state, JobState::Running);
    assert!(devices(&service).is_empty());
    service.ask(Request::Destroy).unwrap();
    assert_eq!(end_of(&service, adding).state, JobState::Failed);
    assert_eq!(service.fake.live(), Live::default());
    service.end();
}

#[test]
fn a_device_that_cannot_be_made_leaves_nothing() {
    let service = start_in(PhaseName::Running, LONG);
    let mut disk = Disk::new("/nonexistent");
    disk.id = "a".into();
    assert!(matches!(put(&service, DeviceConfig::Disk(disk)), Err(Refusal::Problems(_))));
    let console = |endpoint| DeviceConfig::Console(api::Console { id: "c".into(), name: None, endpoint });
    assert!(matches!(put(&service, console(Endpoint::Stdio {})), Err(Refusal::Problems(_))));
    let nowhere = Endpoint::Socket { path: "/nonexistent/socket".into() };
    assert!(matches!(put(&service, console(nowhere)), Err(Refusal::Problems(_))));
    assert!(devices(&service).is_empty() && told(&service).is_empty());
    add(&service, "a");
    service.end();
}

#[test]
fn a_console_that_is_added_can_be_reached_and_goes() {
    let service = start_in(PhaseName::Running, LONG);
    let console = DeviceConfig::Console(api::Console { id: "c".into(), name: None, endpoint: Endpoint::Api {} });
    let adding = job(put(&service, console));
    shows(&service, &[BLINKING, ON]);
    end_of(&service, adding);
    let open = || service.ask(Request::OpenConsole { id: "c".into(), take_over: false });
    assert!(matches!(open(), Ok(Answer::Console(_))));
    assert!(matches!(remove(&service, "c", true), Ok(Answer::Done)));
    assert!(matches!(open(), Err(Refusal::Missing(_))));
    service.end();
}

#[test]
fn a_console_that_runs_leads_elsewhere() {
    let folder = tempfile::TempDir::new().unwrap();
    let service = start_in(PhaseName::Running, LONG);
    let console = |endpoint: &Endpoint| {
        DeviceConfig::Console(api::Console { id: "c".into(), name: None, endpoint: endpoint.clone() })
    };
    let adding = job(put(&service, console(&Endpoint::Api {})));
    shows(&service, &[BLINKING, ON]);
    end_of(&service, adding);
    let open = || service.ask(Request::OpenConsole { id: "c".into(), take_over: false });
    let path = |name: &str| folder.path().join(name);
    let (file, socket) = (Endpoint::File { path: path("file") }, Endpoint::Socket { path: path("socket") });
    for endpoint in [&file, &socket, &socket] {
        assert!(matches!(put(&service, console(endpoint)), Ok(Answer::Done)));
        assert_eq!(service.board.info().0.running.unwrap().devices, [console(endpoint)]);
        assert!(matches!(open(), Err(Refusal::Conflict(_))));
    }
    assert!(path("file").exists());
    std::os::unix::net::UnixStream::connect(path("socket")).unwrap();
    // What cannot be leaves it where it leads.
    for (endpoint, field) in [
        (Endpoint::Stdio {}, "endpoint"),
        (Endpoint::File { path: folder.path().to_owned() }, "endpoint"),
        (Endpoint::Socket { path: "x".repeat(108).into() }, "endpoint.path"),
    ] {
        assert_eq!(fields(put(&service, console(&endpoint))), [field], "{endpoint:?}");
    }
    let named = api::Console { id: "c".into(), name: Some("other".into()), endpoint: Endpoint::Api {} };
    assert_eq!(fields(put(&service, DeviceConfig::Console(named))), ["name"]);
    std::os::unix::net::UnixStream::connect(path("socket")).unwrap();
    assert!(matches!(put(&service, console(&Endpoint::Api {})), Ok(Answer::Done)));
    assert!(!path("socket").exists() && matches!(open(), Ok(Answer::Console(_))));
    let changes = told(&service).into_iter().filter(|event| matches!(event, EventKind::DeviceChanged { .. }));
    assert_eq!(changes.count(), 3, "what is as it was is no event");
    service.end();
}

/// The fields that a refusal names.
#[track_caller]
fn fields(answer: Result<Answer, Refusal>) -> Vec<String> {
    match answer {
        Err(Refusal::Problems(problems)) => problems.0.into_iter().map(|problem| problem.field).collect(),
        other => panic!("fields are named: {other:?}"),
    }
}

#[test]
fn a_disk_that_runs_grows_and_nothing_else_of_it_changes() {
    for phase in [PhaseName::Running, PhaseName::Paused] {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        let disk = Disk { id: "disk0".into(), ..Disk::new(image.path()) };
        let given = DeviceConfig::Disk(disk.clone());
        // Its id is the one that it is given by default.
        let service =
            Service::start_in(phase, |config| config.devices.push(DeviceConfig::Disk(Disk::new(image.path()))));
        let put = |disk: Disk| put(&service, DeviceConfig::Disk(disk));
        let sized = |mib| Disk { size: Some(api::ByteSize::mib(mib)), ..disk.clone() };
        assert!(matches!(put(disk.clone()), Ok(Answer::Done)));
        assert!(told(&service).is_empty(), "all is as it was");
        assert_eq!(fields(put(sized(2))), ["size"], "the file is shorter");
        image.as_file().set_len(4 << 20).unwrap();
        assert!(matches!(put(sized(2)), Ok(Answer::Done)));
        assert_eq!(service.board.info().0.running.unwrap().devices, [DeviceConfig::Disk(sized(2))]);
        assert_eq!(fields(put(sized(1))), ["size"], "it does not shrink");
        let other = Disk { readonly: true, serial: Some("x".into()), ..sized(2) };
        assert_eq!(fields(put(other)), ["readonly", "serial"]);
        let other = DeviceConfig::Rng(Rng { id: "disk0".into() });
        assert!(fields(self::put(&service, other)).contains(&"type".to_owned()));
        // Without a size it is all of the file, whenever that is asked for.
        for length in [4, 5] {
            image.as_file().set_len(length << 20).unwrap();
            assert!(matches!(put(disk.clone()), Ok(Answer::Done)));
        }
        let changed = || EventKind::DeviceChanged { id: "disk0".into() };
        assert_eq!(told(&service), [changed(), changed(), changed()]);
        let change = Change::PutDevice { device: Box::new(given), descriptors: Descriptors::sent([]) };
        let expected = service.board.generation() - 1;
        let answer = service.ask(Request::Change { change, expected: Some(expected) });
        assert!(matches!(answer, Err(Refusal::Changed { .. })));
        service.end();
    }
}
