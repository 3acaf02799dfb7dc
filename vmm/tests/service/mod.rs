//! An owner on a scripted hypervisor, in a thread of its own.

use std::fs;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::task::{Poll, Waker};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use api::{Endpoint, EventKind, Outcome, PhaseName, VmConfig};
use arch::layout;
use hal::fake::{Fake, Live, Step};
use hal::{HostCaps, Hypervisor, KindName, VcpuId};
use vmm::board::Board;
use vmm::inbox::{Event, Inbox};
use vmm::owner::{Owner, Until};
use vmm::request::{Answer, Asked, Descriptors, Refusal, Request};

use super::guest;

/// How long anything may take.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// An owner in a thread of its own.
pub struct Service {
    pub fake: Fake,
    pub inbox: Inbox,
    pub board: Arc<Board>,
    pub config: VmConfig,
    _folder: tempfile::TempDir,
    pub thread: Option<JoinHandle<Option<Outcome>>>,
}

impl Service {
    pub fn start() -> Self {
        let caps = Fake::new().caps().clone();
        let fake = Fake::with_caps(HostCaps { kinds: vec![KindName::Standard, KindName::Tdx], ..caps });
        let folder = tempfile::tempdir().unwrap();
        let kernel = folder.path().join("kernel");
        fs::write(&kernel, guest::elf()).unwrap();
        let mut config = VmConfig::new(kernel);
        config.serial = Some(Endpoint::Api {});
        let board = Arc::new(Board::new(1000));
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

    /// The same in a phase, of a VM whose configuration is changed first.
    pub fn start_in(phase: PhaseName, change: impl FnOnce(&mut VmConfig)) -> Self {
        let mut service = Self::start();
        change(&mut service.config);
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

    pub fn script(&self, steps: impl IntoIterator<Item = Step>) {
        self.fake.script(VcpuId(0), steps);
    }

    pub fn create(&self) -> Request {
        Request::Create { config: Box::new(self.config.clone()), descriptors: Descriptors::sent([]) }
    }

    pub fn send(&self, request: Request) -> Receiver<Result<Answer, Refusal>> {
        let (send, receive) = channel();
        let reply = Box::new(move |answer| drop(send.send(answer)));
        self.inbox.ask(Asked { request, reply });
        receive
    }

    pub fn ask(&self, request: Request) -> Result<Answer, Refusal> {
        self.send(request).recv_timeout(PATIENCE).expect("an answer")
    }

    pub fn phase(&self) -> PhaseName {
        self.board.info().0.phase
    }

    #[track_caller]
    pub fn wait_for(&self, what: &str, happened: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !happened(self) {
            assert!(Instant::now() < deadline, "{what} did not happen; {:?}", self.board.info().0);
            std::thread::yield_now();
        }
    }

    #[track_caller]
    pub fn wait_for_phase(&self, phase: PhaseName) {
        self.wait_for(phase.as_str(), |service| service.phase() == phase);
    }

    pub fn events(&self) -> Vec<EventKind> {
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
    pub fn end(mut self) -> Option<Outcome> {
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
