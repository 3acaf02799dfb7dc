//! Guests that ask for quotes, and services that answer them as they should, or not.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread::{self, ThreadId};
use std::time::Instant;

use api::{QuoteServiceState, Quotes as Figures};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

const PAGE: u64 = 4096;
/// Where the guest of these tests has its buffers.
const GPA: u64 = 0x4000;
const LEN: u64 = 128 << 10;
/// Bytes of its memory.
const MEMORY: u32 = 1 << 20;

/// All memory but the pages named is shared.
#[derive(Default)]
struct AllBut(Mutex<HashSet<u64>>);

impl SharedMemory for AllBut {
    fn is_shared(&self, range: GpaRange) -> bool {
        let private = self.0.lock().unwrap();
        (range.start..range.start + range.len).step_by(4096).all(|page| !private.contains(&page))
    }
}

/// The guest's end of its interrupt.
struct Bell {
    event: EventFd,
    message: Mutex<Option<MsiMessage>>,
}

impl Interrupt for Bell {
    fn event(&self) -> &EventFd {
        &self.event
    }

    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        *self.message.lock().unwrap() = message;
        Ok(())
    }
}

/// A guest, and where its quote service is.
struct Guest {
    quotes: Option<Quotes>,
    memory: GuestMemoryMmap,
    shared: Arc<AllBut>,
    bell: Arc<Bell>,
    counters: Arc<QuoteCounters>,
    folder: TempDir,
}

impl Guest {
    fn new(service: bool) -> Self {
        Self::with_pace(service, PACE)
    }

    fn with_pace(service: bool, pace: Pace) -> Self {
        let mut guest = Self::unconnected();
        guest.connect(service, pace);
        guest
    }

    /// One whose calls nobody answers yet.
    fn unconnected() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let bell = Arc::new(Bell { event, message: Mutex::default() });
        let (shared, counters) = (Arc::<AllBut>::default(), Arc::<QuoteCounters>::default());
        Self { quotes: None, memory, shared, bell, counters, folder }
    }

    fn connect(&mut self, service: bool, pace: Pace) {
        let parts = Parts {
            memory: self.memory.clone(),
            shared: self.shared.clone(),
            interrupt: self.bell.clone(),
            service: service.then(|| QuoteService::Unix(self.path())),
            counters: self.counters.clone(),
        };
        self.quotes = Some(Quotes::with_pace(parts, pace).unwrap());
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("qgs.socket")
    }

    /// A service there that answers each question for a quote as `answer` says, from then on.
    fn serve(&self, answer: impl Fn(&mut UnixStream, &[u8]) + Send + 'static) {
        let listener = UnixListener::bind(self.path()).unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().map(Result::unwrap) {
                match read_question(&mut stream) {
                    Some((0, report)) => answer(&mut stream, &report),
                    Some((4, _)) => drop(stream.write_all(&message(1, 5, 0, b""))),
                    other => panic!("a question: {other:?}"),
                }
            }
        });
    }

    fn quotes(&self) -> &Quotes {
        self.quotes.as_ref().unwrap()
    }

    /// Puts a report into a buffer, and asks.
    fn ask_at(&self, gpa: u64, fill: u8) -> GuestCallStatus {
        let header = [&1_u64.to_le_bytes()[..], &[0; 8], &1024_u32.to_le_bytes(), &[9; 4], &[fill; 1024]].concat();
        self.memory.write_slice(&header, GuestAddress(gpa)).unwrap();
        self.quotes().get_quote(gpa, LEN)
    }

    fn ask(&self) -> GuestCallStatus {
        self.ask_at(GPA, 7)
    }

    fn status_at(&self, gpa: u64) -> u64 {
        self.memory.load(GuestAddress(gpa + 8), Ordering::Acquire).unwrap()
    }

    /// Waits for the end of a request, as a guest that polls does, and gives its status and its quote.
    fn wait_at(&self, gpa: u64) -> (u64, Vec<u8>) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.status_at(gpa) == u64::MAX {
            assert!(Instant::now() < until, "the guest is not answered");
            thread::yield_now();
        }
        let len: u32 = self.memory.read_obj(GuestAddress(gpa + 20)).unwrap();
        let mut quote = vec![0; len as usize];
        self.memory.read_slice(&mut quote, GuestAddress(gpa + 24)).unwrap();
        (self.status_at(gpa), quote)
    }

    fn wait(&self) -> (u64, Vec<u8>) {
        self.wait_at(GPA)
    }

    /// Waits until the service is in this state.
    fn wait_for(&self, what: &str, is: impl Fn(&QuoteServiceState) -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !is(&self.counters.figures().service) {
            assert!(Instant::now() < until, "{what} is not seen: {:?}", self.counters.figures().service);
            thread::yield_now();
        }
    }
}

/// The type of a question and, for a quote, the report; `None` where there is none.
fn read_question(stream: &mut UnixStream) -> Option<(u32, Vec<u8>)> {
    // As Intel's service does: what the first read brings has to be all of it.
    let mut question = vec![0; 1 << 16];
    let len = stream.read(&mut question).ok().filter(|len| *len > 0)?;
    let length = u32::from_be_bytes(question[..4].try_into().unwrap());
    assert_eq!(length as usize, len - 4, "the question came in pieces");
    let kind = u32::from_le_bytes(question[8..12].try_into().unwrap());
    Some((kind, question[..len].get(28..).unwrap_or_default().to_vec()))
}

/// A message of the service's.
fn message(major: u16, kind: u32, error: u32, body: &[u8]) -> Vec<u8> {
    let len = 16 + u32::try_from(body.len()).unwrap();
    let mut message = len.to_be_bytes().to_vec();
    message.extend([major.to_le_bytes(), 1_u16.to_le_bytes()].concat());
    [kind, len, error].iter().for_each(|word| message.extend(word.to_le_bytes()));
    message.extend(body);
    message
}

fn quote(quote: &[u8]) -> Vec<u8> {
    let len = u32::try_from(quote.len()).unwrap();
    message(1, 1, 0, &[&0_u32.to_le_bytes()[..], &len.to_le_bytes(), quote].concat())
}

/// A guest has its quote though the owner, and the thread that asks, are confined. For a process of its own.
pub fn with_the_sandbox() {
    let mut guest = Guest::unconnected();
    guest.serve(|stream, _| stream.write_all(&quote(b"inside")).unwrap());
    sandbox::begin(sandbox::Mode::On, Vec::new()).unwrap();
    sandbox::confine(&[]).unwrap();
    let owner = thread::spawn(move || {
        sandbox::enter(sandbox::Thread::Owner);
        guest.connect(true, PACE);
        for vector in [0, 0x40] {
            guest.quotes().set_up_event_notify(0, vector);
            assert_eq!(guest.ask(), GuestCallStatus::Success);
            assert_eq!(guest.wait(), (0, b"inside".to_vec()));
        }
        // Its folder cannot be removed from here.
        drop(guest.quotes.take());
        std::mem::forget(guest);
    });
    owner.join().unwrap();
}

/// How many requests ended with a quote, without a service, late, and with an error.
fn ends(quotes: &Figures) -> [u64; 4] {
    [quotes.given, quotes.absent, quotes.late, quotes.failed]
}

const FAILED: u64 = 1 << 63;
const UNAVAILABLE: u64 = (1 << 63) + 1;

#[test]
fn a_guest_has_its_quote_when_the_call_returns() {
    let guest = Guest::new(true);
    guest.serve(|stream, report| {
        assert_eq!(report, [7; 1024]);
        // A service that minds the size of what it writes at once, and one that tells of an id.
        let body = [&2_u32.to_le_bytes()[..], &5000_u32.to_le_bytes(), b"id", &[3; 5000]].concat();
        message(1, 1, 0, &body).chunks(700).for_each(|piece| stream.write_all(piece).unwrap());
    });
    guest.wait_for("the service", |state| {
        *state == QuoteServiceState::Answers || matches!(state, QuoteServiceState::Fails { .. })
    });
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (0, vec![3; 5000]));
    assert!(guest.bell.event.read().is_err(), "an interrupt that was not set up");
    let figures = guest.counters.figures();
    assert_eq!((ends(&figures), figures.in_flight), ([1, 0, 0, 0], 0));
    assert_eq!(figures.service, QuoteServiceState::Answers);
    assert!(figures.time_us > 0 && figures.longest_us == figures.time_us);
    // The header beside its status and the quote's length is the guest's.
    let header: [u8; 24] = guest.memory.read_obj(GuestAddress(GPA)).unwrap();
    assert_eq!(header[..8], 1_u64.to_le_bytes());
    assert_eq!(header[16..20], 1024_u32.to_le_bytes());
}

#[test]
fn calls_that_give_what_they_cannot_are_refused_as_qemu_does() {
    let guest = Guest::new(false);
    guest.shared.0.lock().unwrap().insert(0x8_0000);
    let quotes = guest.quotes();
    let before: Vec<u8> = (0..MEMORY).map(|at| at.to_le_bytes()[0]).collect();
    guest.memory.write_slice(&before, GuestAddress(0)).unwrap();
    for (gpa, len, status) in [
        (GPA, 0, GuestCallStatus::InvalidOperand),
        (GPA + 1, 0, GuestCallStatus::InvalidOperand),
        (GPA + 1, PAGE, GuestCallStatus::AlignError),
        (GPA, PAGE + 1, GuestCallStatus::AlignError),
        // Not of version 1.
        (GPA, PAGE, GuestCallStatus::InvalidOperand),
        (GPA, LEN + PAGE, GuestCallStatus::InvalidOperand),
        (GPA, u64::MAX - 4095, GuestCallStatus::InvalidOperand),
        (0x8_0000, PAGE, GuestCallStatus::InvalidOperand),
        (0x7_f000, 2 * PAGE, GuestCallStatus::InvalidOperand),
        (MEMORY.into(), PAGE, GuestCallStatus::InvalidOperand),
        (u64::from(MEMORY) - PAGE, 2 * PAGE, GuestCallStatus::InvalidOperand),
        (u64::MAX - 4095, PAGE, GuestCallStatus::InvalidOperand),
    ] {
        assert_eq!(quotes.get_quote(gpa, len), status, "{len:#x} bytes at {gpa:#x}");
    }
    let mut after = vec![0; before.len()];
    guest.memory.read_slice(&mut after, GuestAddress(0)).unwrap();
    assert!(before == after, "a refused call changes memory");

    let with = |version: u64, report_len: u32| {
        guest.memory.write_obj(version, GuestAddress(GPA)).unwrap();
        guest.memory.write_obj(report_len, GuestAddress(GPA + 16)).unwrap();
        quotes.get_quote(GPA, PAGE)
    };
    assert_eq!(with(0, 1024), GuestCallStatus::InvalidOperand);
    assert_eq!(with(2, 1024), GuestCallStatus::InvalidOperand);
    assert_eq!(with(1 << 32 | 1, 1024), GuestCallStatus::InvalidOperand);
    assert_eq!(with(1, 4096 - 23), GuestCallStatus::InvalidOperand);
    assert_eq!(with(1, u32::MAX), GuestCallStatus::InvalidOperand);
    assert_eq!(guest.counters.figures().invalid, 17);
    // Nobody is there to be asked.
    assert_eq!(with(1, 1024), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (UNAVAILABLE, vec![]));
    assert_eq!(guest.counters.figures().service, QuoteServiceState::Off);
}

#[test]
fn what_is_no_report_does_not_reach_the_service() {
    let guest = Guest::new(true);
    guest.serve(|_, _| panic!("a question"));
    for len in [0, 1023, 1025, (128 << 10) - 24] {
        guest.memory.write_obj(1_u64, GuestAddress(GPA)).unwrap();
        guest.memory.write_obj(len, GuestAddress(GPA + 16)).unwrap();
        assert_eq!(guest.quotes().get_quote(GPA, LEN), GuestCallStatus::Success);
        assert_eq!(guest.status_at(GPA), FAILED);
    }
    assert_eq!(guest.counters.figures().invalid, 4);
}

#[test]
fn sixteen_are_in_flight_and_the_next_is_told_to_come_again() {
    let guest = Guest::new(true);
    let (give, answers) = channel::<()>();
    let answers = Arc::new(Mutex::new(answers));
    guest.serve(move |stream, _| {
        let (mut stream, answers) = (stream.try_clone().unwrap(), answers.clone());
        thread::spawn(move || {
            answers.lock().unwrap().recv().unwrap();
            stream.write_all(&quote(b"at last")).unwrap();
        });
    });
    // With an interrupt, no vCPU waits for an answer.
    assert_eq!(guest.quotes().set_up_event_notify(0, 0x40), GuestCallStatus::Success);
    let places: Vec<u64> = (0..17).map(|number| GPA + number * 2 * PAGE).collect();
    for gpa in &places[..16] {
        guest.memory.write_obj(1_u64, GuestAddress(*gpa)).unwrap();
        guest.memory.write_obj(1024_u32, GuestAddress(gpa + 16)).unwrap();
        assert_eq!(guest.quotes().get_quote(*gpa, PAGE), GuestCallStatus::Success);
        assert_eq!(guest.status_at(*gpa), u64::MAX);
    }
    assert_eq!(guest.ask_at(places[16], 1), GuestCallStatus::Retry);
    assert_eq!(guest.status_at(places[16]), 0, "a call that is to be made again changes its buffer");
    let figures = guest.counters.figures();
    assert_eq!((figures.in_flight, figures.retried), (16, 1));
    for _ in 0..16 {
        give.send(()).unwrap();
    }
    for gpa in &places[..16] {
        assert_eq!(guest.wait_at(*gpa), (0, b"at last".to_vec()));
    }
    give.send(()).unwrap();
    assert_eq!(guest.ask_at(places[16], 1), GuestCallStatus::Success);
    assert_eq!(guest.wait_at(places[16]), (0, b"at last".to_vec()));
    assert_eq!(guest.counters.figures().in_flight, 0);
}

#[test]
fn services_that_do_not_behave_fail_the_request_and_no_more() {
    let guest = Guest::new(true);
    let answers: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "it ended the connection without an answer"),
        (quote(b"a quote")[..30].to_vec(), "it ended the connection without an answer"),
        (u32::MAX.to_be_bytes().to_vec(), "its answer is 4294967295 bytes long"),
        (vec![0; 4], "its answer is 0 bytes long"),
        (message(2, 1, 0, &[0; 8]), "it answers in version 2"),
        (message(1, 3, 0, &[0; 8]), "its answer is of type 3"),
        (message(1, 1, 0x1_2001, &[0; 8]), "it reports error 0x12001 (unexpected)"),
        (message(1, 1, 0, &[0xff; 8]), "its answer's id size is 4294967295"),
        (quote(b""), "its answer's quote size is 0"),
    ];
    let sent = Mutex::new(answers.clone().into_iter());
    guest.serve(move |stream, _| {
        let answer = sent.lock().unwrap().next().map_or_else(|| quote(b"good"), |(bytes, _)| bytes);
        let _ = stream.write_all(&answer);
    });
    for (_, why) in &answers {
        assert_eq!(guest.ask(), GuestCallStatus::Success);
        assert_eq!(guest.wait(), (FAILED, vec![]), "{why}");
        let QuoteServiceState::Fails { reason: told } = guest.counters.figures().service else {
            panic!("{why} is not told")
        };
        assert!(told.starts_with(why), "{told}");
    }
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (0, b"good".to_vec()));
    let figures = guest.counters.figures();
    assert_eq!((ends(&figures), figures.in_flight), ([1, 0, 0, u64::try_from(answers.len()).unwrap()], 0));
    assert_eq!(figures.service, QuoteServiceState::Answers);
}

#[test]
fn a_quote_that_has_no_room_is_none() {
    let guest = Guest::new(true);
    guest.serve(|stream, _| stream.write_all(&quote(&[1; (128 << 10) - 23])).unwrap());
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (FAILED, vec![]));
    assert_eq!(guest.counters.figures().service, QuoteServiceState::Answers);
    // Nothing behind the buffer was written.
    assert_eq!(guest.memory.read_obj::<u8>(GuestAddress(GPA + LEN)).unwrap(), 0);
}

#[test]
fn a_silent_service_is_given_up_in_time() {
    let pace = Pace { patience: Duration::from_millis(100), ..PACE };
    let guest = Guest::with_pace(true, pace);
    // Until the monitor ends the connection.
    guest.serve(|stream, _| drop(stream.read(&mut [0])));
    let asked = Instant::now();
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.status_at(GPA), u64::MAX, "it waits for a service that takes its time");
    assert_eq!(guest.wait(), (UNAVAILABLE, vec![]));
    assert!(asked.elapsed() >= pace.patience);
    assert_eq!(ends(&guest.counters.figures()), [0, 0, 1, 0]);
}

#[test]
fn a_service_may_come_later_and_is_looked_for() {
    let guest = Guest::with_pace(true, Pace { probe: Duration::from_millis(5), ..PACE });
    guest.wait_for("that nobody listens", |state| matches!(state, QuoteServiceState::Fails { .. }));
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (UNAVAILABLE, vec![]));
    assert_eq!(ends(&guest.counters.figures()), [0, 1, 0, 0]);
    guest.serve(|stream, _| stream.write_all(&quote(b"here")).unwrap());
    guest.wait_for("the service", |state| *state == QuoteServiceState::Answers);
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (0, b"here".to_vec()));
}

#[test]
fn a_service_without_room_for_connections_is_asked_again() {
    let guest = Guest::new(true);
    guest.wait_for("that nobody listens", |state| matches!(state, QuoteServiceState::Fails { .. }));
    let listener = UnixListener::bind(guest.path()).unwrap();
    // More connections than its queue has room for, which std makes 128 at the least.
    nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    let waiting: Vec<UnixStream> = (0..2).map(|_| UnixStream::connect(guest.path()).unwrap()).collect();
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.status_at(GPA), u64::MAX);
    drop(waiting);
    let server = thread::spawn(move || {
        for mut stream in listener.incoming().map(Result::unwrap) {
            if let Some((0, _)) = read_question(&mut stream) {
                return stream.write_all(&quote(b"after all")).unwrap();
            }
        }
    });
    assert_eq!(guest.wait(), (0, b"after all".to_vec()));
    server.join().unwrap();
}

#[test]
fn a_guest_that_set_an_interrupt_up_gets_it_after_its_answer() {
    let guest = Guest::new(true);
    for vector in [0, 31, 256, u64::MAX] {
        assert_eq!(guest.quotes().set_up_event_notify(0, vector), GuestCallStatus::InvalidOperand);
    }
    assert_eq!(*guest.bell.message.lock().unwrap(), None);
    assert_eq!(guest.quotes().set_up_event_notify(0x0102_0305, 0xf1), GuestCallStatus::Success);
    let message = MsiMessage { address: 0x0102_0300_fee0_5000, data: 0xf1 };
    assert_eq!(*guest.bell.message.lock().unwrap(), Some(message));
    guest.serve(|stream, _| stream.write_all(&quote(b"rung for")).unwrap());
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    let until = Instant::now() + Duration::from_secs(20);
    while guest.bell.event.read().is_err() {
        assert!(Instant::now() < until, "no interrupt");
    }
    assert_eq!(guest.status_at(GPA), 0, "the interrupt came before the answer");
    assert_eq!(guest.wait(), (0, b"rung for".to_vec()));
}

/// An interrupt that tells who gives it back.
struct GivenBack(EventFd, Sender<ThreadId>);

impl Interrupt for GivenBack {
    fn event(&self) -> &EventFd {
        &self.0
    }

    fn set(&self, _: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for GivenBack {
    fn drop(&mut self) {
        let _ = self.1.send(thread::current().id());
    }
}

#[test]
fn the_interrupt_is_given_back_by_who_drops_the_quotes() {
    let mut guest = Guest::unconnected();
    let (sender, by) = channel();
    let parts = Parts {
        memory: guest.memory.clone(),
        shared: guest.shared.clone(),
        interrupt: Arc::new(GivenBack(EventFd::new(EFD_NONBLOCK).unwrap(), sender)),
        service: Some(QuoteService::Unix(guest.path())),
        counters: guest.counters.clone(),
    };
    guest.quotes = Some(Quotes::new(parts).unwrap());
    guest.quotes = None;
    // The thread that asks may not change interrupts.
    assert_eq!(by.recv(), Ok(thread::current().id()));
}

#[test]
fn what_the_guest_writes_to_its_buffer_meanwhile_changes_nothing() {
    let guest = Guest::new(true);
    let memory = guest.memory.clone();
    guest.serve(move |stream, report| {
        assert_eq!(report, [7; 1024]);
        memory.write_slice(&[0xff; 4096], GuestAddress(GPA)).unwrap();
        stream.write_all(&quote(b"the same")).unwrap();
    });
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    let until = Instant::now() + Duration::from_secs(20);
    while guest.status_at(GPA) != 0 {
        assert!(Instant::now() < until, "the guest is not answered");
    }
    assert_eq!(guest.wait(), (0, b"the same".to_vec()));
}

#[test]
fn nothing_is_written_to_a_buffer_that_is_private_by_now() {
    let mut guest = Guest::new(true);
    let shared = guest.shared.clone();
    guest.serve(move |stream, _| {
        shared.0.lock().unwrap().insert(GPA);
        stream.write_all(&quote(b"a quote")).unwrap();
    });
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    let until = Instant::now() + Duration::from_secs(20);
    while guest.counters.figures().in_flight > 0 {
        assert!(Instant::now() < until, "the request does not end");
    }
    drop(guest.quotes.take());
    assert_eq!(guest.status_at(GPA), u64::MAX);
}

#[test]
fn a_reset_gives_up_what_is_in_flight() {
    let mut guest = Guest::new(true);
    let (ended, end) = channel();
    guest.serve(move |stream, _| {
        let mut stream = stream.try_clone().unwrap();
        let ended = ended.clone();
        thread::spawn(move || {
            // Until the monitor ends the connection.
            let _ = stream.read(&mut [0]);
            let _ = stream.write_all(&quote(b"too late"));
            ended.send(()).unwrap();
        });
    });
    assert_eq!(guest.ask(), GuestCallStatus::Success);
    assert_eq!(guest.counters.figures().in_flight, 1);
    drop(guest.quotes.take());
    assert_eq!(guest.counters.figures().in_flight, 0);
    end.recv_timeout(Duration::from_secs(20)).unwrap();
    assert_eq!(guest.status_at(GPA), u64::MAX);
}

#[test]
fn a_port_of_nobodys_is_unavailable() {
    let guest = Guest::new(false);
    let parts = Parts {
        memory: guest.memory.clone(),
        shared: guest.shared.clone(),
        interrupt: guest.bell.clone(),
        service: Some(QuoteService::Vsock { cid: 1, port: 4050 }),
        counters: guest.counters.clone(),
    };
    let quotes = Quotes::new(parts).unwrap();
    guest.memory.write_obj(1_u64, GuestAddress(GPA)).unwrap();
    guest.memory.write_obj(1024_u32, GuestAddress(GPA + 16)).unwrap();
    assert_eq!(quotes.get_quote(GPA, LEN), GuestCallStatus::Success);
    assert_eq!(guest.wait(), (UNAVAILABLE, vec![]));
}
