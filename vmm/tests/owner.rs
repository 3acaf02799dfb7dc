//! The owner on a scripted hypervisor: what it answers to every request in every phase, and what becomes of requests
//! that come at bad moments.

use api::{DeviceConfig, EventKind, JobState, Outcome, PhaseName, Reason, Rng, Shutdown, TimeSpan, VcpusPatch};
use hal::MsiMessage;
use hal::fake::{Call, Live, Step};
use vmm::inbox::Event;
use vmm::owner::{RequestKind, admit};
use vmm::request::{Answer, Change, Descriptors, Refusal, Request};

mod guest;
mod service;

use service::{PATIENCE, Service};

fn removal(id: &str, force: bool) -> Request {
    Request::Change { change: Change::RemoveDevice { id: id.into(), force }, expected: None }
}

fn request(service: &Service, kind: RequestKind) -> Request {
    let change = |change| Request::Change { change, expected: None };
    match kind {
        RequestKind::Create => {
            let mut config = service.config.clone();
            config.cpus.count = 2;
            Request::Create { config: Box::new(config), descriptors: Descriptors::sent([]) }
        }
        RequestKind::CreateAgain => service.create(),
        RequestKind::Boot => Request::Boot,
        RequestKind::Pause => Request::Pause,
        RequestKind::Resume => Request::Resume,
        RequestKind::Reset => Request::Reset,
        RequestKind::Shutdown => Request::Shutdown(Shutdown::default()),
        RequestKind::Nmi => Request::Nmi,
        RequestKind::Destroy => Request::Destroy,
        RequestKind::Change => change(Change::Vcpus(VcpusPatch { count: 1 })),
        RequestKind::OpenConsole => Request::OpenConsole { id: "serial".into(), take_over: false },
    }
}

/// The phase after a request that was carried out.
fn after(phase: PhaseName, kind: RequestKind) -> PhaseName {
    match kind {
        RequestKind::Create => PhaseName::Ready,
        RequestKind::Boot | RequestKind::Resume => PhaseName::Running,
        RequestKind::Pause => PhaseName::Paused,
        RequestKind::Destroy => PhaseName::Empty,
        _ => phase,
    }
}

#[test]
fn every_request_in_every_phase_is_answered_as_the_table_says() {
    for phase in PhaseName::ALL {
        for kind in RequestKind::ALL {
            // In a phase without a VM, the same configuration once more is the first.
            let again = kind == RequestKind::CreateAgain && matches!(phase, PhaseName::Empty | PhaseName::Stopped);
            if again {
                continue;
            }
            let service = Service::start_in(phase, |_| {});
            let answer = service.ask(request(&service, kind));
            match (admit(phase, kind), answer) {
                (Ok(()), Ok(_)) => assert_eq!(service.phase(), after(phase, kind), "{phase}, {kind:?}"),
                (Err(expected), Err(refusal)) => {
                    assert_eq!(refusal.to_string(), expected.to_string());
                    assert_eq!(service.phase(), phase);
                }
                (admitted, answer) => panic!("{phase}, {kind:?}: {admitted:?}, but {answer:?}"),
            }
            service.end();
        }
    }
}

#[test]
fn a_pause_stops_every_vcpu_and_a_resume_tells_them() {
    let mut service = Service::start();
    service.config.cpus.count = 3;
    for request in [service.create(), Request::Boot, Request::Pause] {
        service.ask(request).unwrap();
    }
    let runs = |service: &Service| service.fake.calls().iter().filter(|call| matches!(call, Call::Run(_))).count();
    let before = runs(&service);
    service.script([Step::pio_write(0x80, &[1])]);
    std::thread::yield_now();
    assert_eq!(runs(&service), before, "a vCPU runs in a VM that is paused");
    service.ask(Request::Resume).unwrap();
    service.wait_for("each vCPU is told", |service| {
        service.fake.calls().iter().filter(|call| matches!(call, Call::StoodStill(_))).count() == 3
    });
    assert_eq!(service.end(), Some(Outcome::Quit));
}

#[test]
fn a_vcpu_that_dies_ends_the_vm_and_the_service_goes_on() {
    let service = Service::start();
    service.script([Step::Crash("it broke".into())]);
    service.ask(service.create()).unwrap();
    service.ask(Request::Boot).unwrap();
    service.wait_for_phase(PhaseName::Stopped);
    let (info, _) = service.board.info();
    assert_eq!(info.reason, Reason::Crash);
    assert!(matches!(info.outcome, Some(Outcome::Crashed { reason }) if reason.contains("it broke")));
    service.ask(service.create()).unwrap();
    service.ask(Request::Boot).unwrap();
    assert_eq!(service.phase(), PhaseName::Running);
    service.end();
}

#[test]
fn requests_that_come_together_are_answered_one_after_the_other() {
    let service = Service::start_in(PhaseName::Ready, |_| {});
    let answers: Vec<_> =
        (0..20).map(|number| service.send(if number % 2 == 0 { Request::Boot } else { Request::Destroy })).collect();
    let answers: Vec<bool> = answers.into_iter().map(|answer| answer.recv_timeout(PATIENCE).unwrap().is_ok()).collect();
    let expected: Vec<bool> = (0..20).map(|number| number == 0 || number % 2 == 1).collect();
    assert_eq!(answers, expected, "only the first finds a VM to boot, and all can be destroyed");
    service.end();
}

#[test]
fn a_client_that_does_not_wait_for_its_answer_changes_nothing() {
    let service = Service::start_in(PhaseName::Ready, |_| {});
    drop(service.send(Request::Boot));
    service.wait_for_phase(PhaseName::Running);
    drop(service.send(Request::OpenConsole { id: "serial".into(), take_over: false }));
    let open = Request::OpenConsole { id: "serial".into(), take_over: false };
    assert!(matches!(service.ask(open), Ok(Answer::Console(_))), "the place is free again");
    service.end();
}

#[test]
fn who_asks_an_owner_that_ends_is_told_so() {
    let mut service = Service::start();
    service.inbox.post(Event::Quit);
    service.thread.take().unwrap().join().unwrap();
    let answer = service.send(Request::Boot);
    assert!(answer.recv_timeout(PATIENCE).is_err(), "nobody answers, and the client knows");
}

#[test]
fn a_request_during_a_shutdown_is_carried_out() {
    let service = Service::start_in(PhaseName::Running, |_| {});
    let shutdown =
        |deadline, force| Request::Shutdown(Shutdown { deadline: Some(TimeSpan::from_millis(deadline)), force });
    let Ok(Answer::Job(first)) = service.ask(shutdown(1_000_000, false)) else { panic!("a job") };
    let Ok(Answer::Job(second)) = service.ask(shutdown(1_000_000, true)) else { panic!("a job") };
    assert_eq!(first, second, "who asks again waits for the same");
    service.ask(Request::Pause).unwrap();
    service.ask(Request::Resume).unwrap();
    service.ask(Request::Reset).unwrap();
    assert_eq!(service.board.job(first).unwrap().state, JobState::Running);
    service.ask(Request::Destroy).unwrap();
    assert_eq!(service.board.job(first).unwrap().state, JobState::Failed);
    service.end();
}

#[test]
fn an_nmi_is_a_message_to_all_vcpus() {
    let service = Service::start_in(PhaseName::Running, |_| {});
    service.ask(Request::Nmi).unwrap();
    let all = MsiMessage { address: 0xfeef_f000, data: 0x400 };
    assert!(service.fake.wait_for(all, PATIENCE).unwrap());
    service.ask(Request::Nmi).unwrap();
    assert!(service.fake.wait_for(all, PATIENCE).unwrap());
    service.end();
}

#[test]
fn a_boot_that_fails_leaves_the_vm_ready() {
    let service = Service::start_in(PhaseName::Ready, |_| {});
    let error = hal::Error::Invalid { what: "test", problem: "it was to fail".into() };
    service.fake.fail_at(|call| matches!(call, Call::CreateVcpu(_)), error);
    let refused = service.ask(Request::Boot).unwrap_err().to_string();
    assert!(refused.contains("it was to fail"), "{refused}");
    assert_eq!((service.phase(), service.fake.live()), (PhaseName::Ready, Live::default()));
    service.ask(Request::Boot).unwrap();
    service.end();
}

#[test]
fn a_reset_that_fails_ends_the_vm_with_the_reason() {
    let service = Service::start_in(PhaseName::Running, |_| {});
    let error = hal::Error::Invalid { what: "test", problem: "it was to fail".into() };
    service.fake.fail_at(|call| matches!(call, Call::Create { .. }), error);
    service.ask(Request::Reset).unwrap();
    let (info, _) = service.board.info();
    assert_eq!((info.phase, info.reason), (PhaseName::Stopped, Reason::Host));
    assert_eq!(info.outcome.unwrap().exit_code(), 1);
    service.end();
}

#[test]
fn a_device_that_cannot_be_leaves_the_configuration_as_it_was() {
    let service = Service::start_in(PhaseName::Ready, |_| {});
    let put = |device: DeviceConfig, expected| {
        let change = Change::PutDevice { device: Box::new(device), descriptors: Descriptors::sent([]) };
        service.ask(Request::Change { change, expected })
    };
    let rng = |id: &str| DeviceConfig::Rng(Rng { id: id.into() });
    assert!(matches!(put(rng("a"), None), Ok(Answer::Created)));
    let known = service.board.generation();
    assert!(matches!(put(rng("a"), Some(known)), Ok(Answer::Done)));
    assert_eq!(service.board.generation(), known, "the same once more is no change");
    assert!(matches!(put(rng("b"), Some(known - 1)), Err(Refusal::Changed { .. })));
    let mut disk = api::Disk::new("/nonexistent");
    disk.id = "a".into();
    assert!(matches!(put(DeviceConfig::Disk(disk), None), Err(Refusal::Problems(_))));
    let (info, _) = service.board.info();
    assert_eq!(info.running.unwrap().devices, [rng("a")]);
    let remove = |id: &str| removal(id, false);
    assert!(matches!(service.ask(remove("b")), Err(Refusal::Missing(_))));
    service.ask(remove("a")).unwrap();
    service.ask(Request::Boot).unwrap();
    let told: Vec<EventKind> = service.events();
    assert!(matches!(
        told.as_slice(),
        [
            EventKind::Phase { .. },
            EventKind::DeviceAdded { .. },
            EventKind::DeviceRemoved { .. },
            EventKind::Phase { .. }
        ]
    ));
    service.end();
}
