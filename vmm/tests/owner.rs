//! The owner on a scripted hypervisor: what it answers to every request in every phase, and what becomes of requests
//! that come at bad moments.

use std::fs;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{
    DeviceConfig, Endpoint, EventKind, JobState, Outcome, PhaseName, Reason, Rng, Shutdown, TimeSpan, VcpusPatch,
    VmConfig,
};
use arch::layout;
use hal::fake::{Call, Fake, Live, Step};
use hal::{Hypervisor, MsiMessage, VcpuId};
use vmm::board::Board;
use vmm::inbox::{Event, Inbox};
use vmm::owner::{Owner, RequestKind, Until, admit};
use vmm::request::{Answer, Asked, Change, Descriptors, Refusal, Request};

mod guest;

const PATIENCE: Duration = Duration::from_secs(20);

/// An owner in a thread of its own.
struct Service {
    fake: Fake,
    inbox: Inbox,
    board: Arc<Board>,
    config: VmConfig,
    _folder: tempfile::TempDir,
    thread: Option<JoinHandle<Option<Outcome>>>,
}

impl Service {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, guest::elf()).unwrap();
        let mut config = VmConfig::new(kernel);
        config.serial = Some(Endpoint::Api {});
        let (fake, board) = (Fake::new(), Arc::new(Board::new(1000)));
        let (send, receive) = channel();
        let (hypervisor, shown): (Box<dyn Hypervisor>, _) = (Box::new(fake.clone()), board.clone());
        let thread = std::thread::spawn(move || {
            let mut owner = Owner::new(Ok(hypervisor), shown).unwrap();
            send.send(owner.inbox().clone()).unwrap();
            owner.serve(Until::Signal).unwrap()
        });
        let inbox = receive.recv().unwrap();
        Self { fake, inbox, board, config, _folder: folder, thread: Some(thread) }
    }

    /// The same, in a phase.
    fn start_in(phase: PhaseName) -> Self {
        let service = Self::start();
        if phase == PhaseName::Stopped {
            let off = vec![layout::ACPI_SLEEP_CONTROL_S5];
            service.script([Step::pio_write(layout::ACPI_SLEEP_CONTROL_PORT, &off)]);
        }
        let steps = match phase {
            PhaseName::Empty => 0,
            PhaseName::Ready => 1,
            PhaseName::Running | PhaseName::Stopped => 2,
            PhaseName::Paused => 3,
        };
        for request in [service.create(), Request::Boot, Request::Pause].into_iter().take(steps) {
            service.ask(request).unwrap();
        }
        service.wait_for_phase(phase);
        service
    }

    fn script(&self, steps: impl IntoIterator<Item = Step>) {
        self.fake.script(VcpuId(0), steps);
    }

    fn create(&self) -> Request {
        Request::Create { config: Box::new(self.config.clone()), descriptors: Descriptors::sent([]) }
    }

    fn send(&self, request: Request) -> Receiver<Result<Answer, Refusal>> {
        let (send, receive) = channel();
        let reply = Box::new(move |answer| drop(send.send(answer)));
        self.inbox.ask(Asked { request, reply });
        receive
    }

    fn ask(&self, request: Request) -> Result<Answer, Refusal> {
        self.send(request).recv_timeout(PATIENCE).expect("an answer")
    }

    fn phase(&self) -> PhaseName {
        self.board.info().0.phase
    }

    #[track_caller]
    fn wait_for(&self, what: &str, happened: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !happened(self) {
            assert!(Instant::now() < deadline, "{what} did not happen; {:?}", self.board.info().0);
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn wait_for_phase(&self, phase: PhaseName) {
        self.wait_for(phase.as_str(), |service| service.phase() == phase);
    }

    fn events(&self) -> Vec<EventKind> {
        let mut at = 0;
        std::iter::from_fn(|| match self.board.poll_event(at, Waker::noop()) {
            Poll::Ready(Some(event)) => {
                at = event.sequence;
                Some(event.event.clone())
            }
            _ => None,
        })
        .collect()
    }

    /// Ends the owner and checks that nothing is left behind.
    fn end(mut self) -> Option<Outcome> {
        self.inbox.post(Event::Quit);
        let outcome = self.thread.take().unwrap().join().unwrap();
        assert_eq!(self.fake.live(), Live::default(), "something is left behind");
        outcome
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.inbox.post(Event::Quit);
            let _ = thread.join();
        }
    }
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
            let service = Service::start_in(phase);
            let answer = service.ask(request(&service, kind));
            match (admit(phase, kind), answer) {
                (Ok(()), Ok(_)) => assert_eq!(service.phase(), after(phase, kind), "{phase}, {kind:?}"),
                (Ok(()), Err(Refusal::Unsupported(_))) if kind == RequestKind::Change => {
                    assert_eq!(service.phase(), phase);
                }
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
    let service = Service::start_in(PhaseName::Ready);
    let answers: Vec<_> =
        (0..20).map(|number| service.send(if number % 2 == 0 { Request::Boot } else { Request::Destroy })).collect();
    let answers: Vec<bool> = answers.into_iter().map(|answer| answer.recv_timeout(PATIENCE).unwrap().is_ok()).collect();
    let expected: Vec<bool> = (0..20).map(|number| number == 0 || number % 2 == 1).collect();
    assert_eq!(answers, expected, "only the first finds a VM to boot, and all can be destroyed");
    service.end();
}

#[test]
fn a_client_that_does_not_wait_for_its_answer_changes_nothing() {
    let service = Service::start_in(PhaseName::Ready);
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
    let service = Service::start_in(PhaseName::Running);
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
    let service = Service::start_in(PhaseName::Running);
    service.ask(Request::Nmi).unwrap();
    let all = MsiMessage { address: 0xfeef_f000, data: 0x400 };
    assert!(service.fake.wait_for(all, PATIENCE).unwrap());
    service.ask(Request::Nmi).unwrap();
    assert!(service.fake.wait_for(all, PATIENCE).unwrap());
    service.end();
}

#[test]
fn a_boot_that_fails_leaves_the_vm_ready() {
    let service = Service::start_in(PhaseName::Ready);
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
    let service = Service::start_in(PhaseName::Running);
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
    let service = Service::start_in(PhaseName::Ready);
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
    let remove = |id: &str| Request::Change { change: Change::RemoveDevice(id.into()), expected: None };
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
