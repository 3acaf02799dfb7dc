//! From a trust domain's report to a quote that verifiers accept: a guest's buffer, the engine, and a quote service that
//! speaks Intel's protocol and signs with keys of its own.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use api::{QuoteService, QuoteServiceState};
use dcap_qvl::QuoteCollateralV3;
use dcap_qvl::quote::{Quote, TDReport10};
use dcap_qvl::verify::QuoteVerifier;
use devices::seam::{Interrupt, MsiMessage};
use hal::{GpaRange, GuestCall, GuestCallStatus};
use halyard_qgs::{Platform, Registers, Service};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::quotes::{Parts, QuoteCounters, Quotes, SharedMemory};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const GPA: u64 = 0x4000;
const LEN: u64 = 128 << 10;
/// What a guest reads where there is no quote.
const FAILED: u64 = 1 << 63;

struct All;

impl SharedMemory for All {
    fn is_shared(&self, _range: GpaRange) -> bool {
        true
    }
}

struct Bell(EventFd);

impl Interrupt for Bell {
    fn event(&self) -> &EventFd {
        &self.0
    }

    fn set(&self, _message: Option<MsiMessage>) -> io::Result<()> {
        Ok(())
    }
}

struct Guest {
    quotes: Quotes,
    memory: GuestMemoryMmap,
    counters: Arc<QuoteCounters>,
}

impl Guest {
    fn new(socket: &Path) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let counters = Arc::<QuoteCounters>::default();
        let quotes = Quotes::new(Parts {
            memory: memory.clone(),
            shared: Arc::new(All),
            interrupt: Arc::new(Bell(EventFd::new(EFD_NONBLOCK).unwrap())),
            service: Some(QuoteService::Unix(socket.to_owned())),
            counters: counters.clone(),
        });
        Self { quotes: quotes.unwrap(), memory, counters }
    }

    /// Asks for a quote as Linux does, but without a second's sleep between two looks.
    fn quote(&self, report: &[u8]) -> Result<Vec<u8>, u64> {
        let len = u32::try_from(report.len()).unwrap();
        let header = [&1_u64.to_le_bytes()[..], &[0; 8], &len.to_le_bytes(), &[0; 4], report].concat();
        self.memory.write_slice(&header, GuestAddress(GPA)).unwrap();
        assert_eq!(self.quotes.call(GuestCall::GetQuote { gpa: GPA, size: LEN }), GuestCallStatus::Success);
        let status = loop {
            match self.memory.load(GuestAddress(GPA + 8), Ordering::Acquire).unwrap() {
                u64::MAX => thread::yield_now(),
                0 => break Ok(()),
                other => break Err(other),
            }
        };
        let len: u32 = self.memory.read_obj(GuestAddress(GPA + 20)).unwrap();
        let mut quote = vec![0; usize::try_from(len).unwrap()];
        self.memory.read_slice(&mut quote, GuestAddress(GPA + 24)).unwrap();
        status.map(|()| quote)
    }
}

fn started() -> (TempDir, Service, Guest) {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("qgs.socket");
    let service = Service::start(Platform::new().unwrap(), &socket).unwrap();
    let guest = Guest::new(&socket);
    (folder, service, guest)
}

/// What the report says of registers is what the quote says of them.
fn assert_agree(td: &TDReport10, registers: &Registers) {
    let quoted =
        [td.mr_td, td.mr_config_id, td.mr_owner, td.mr_owner_config, td.rt_mr0, td.rt_mr1, td.rt_mr2, td.rt_mr3];
    assert_eq!(quoted, registers.measurements);
    assert_eq!(td.td_attributes, registers.attributes.to_le_bytes());
    assert_eq!(td.xfam, registers.xfam.to_le_bytes());
    assert_eq!(td.report_data, registers.data);
}

#[test]
fn a_quote_of_a_report_is_accepted_and_one_flipped_bit_is_not() {
    let (_folder, service, guest) = started();
    let platform = service.platform();
    let mut registers = Registers::default();
    for (n, data) in (0..).zip(&mut registers.data) {
        *data = n;
    }
    let report = platform.report(&registers);
    let quote = guest.quote(&report).unwrap();
    assert_agree(Quote::parse(&quote).unwrap().report.as_td10().unwrap(), &registers);
    // Byte by byte: the module's versions and measurements, the TD's 400 bytes, the TD's data.
    assert_eq!(quote[48..160], report[264..376]);
    assert_eq!(quote[168..568], report[512..912]);
    assert_eq!(quote[568..632], report[128..192]);

    let collateral: QuoteCollateralV3 = serde_json::from_value(platform.collateral().unwrap()).unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let own = QuoteVerifier::new(platform.root_der());
    let verified = own.verify(&quote, &collateral, now).unwrap();
    assert_eq!((verified.status.as_str(), verified.advisory_ids.len()), ("UpToDate", 0));
    assert_agree(verified.report.as_td10().unwrap(), &registers);
    let intels = QuoteVerifier::new_prod().verify(&quote, &collateral, now);
    assert!(intels.is_err(), "it is accepted as Intel's");
    // In the header, each part of the body, both signatures, the key and the quoting enclave's report.
    for at in [4, 12, 30, 60, 170, 190, 300, 600, 631, 640, 700, 764 + 6 + 320, 764 + 6 + 384 + 9] {
        for bit in [0, 7] {
            let mut flipped = quote.clone();
            flipped[at] ^= 1 << bit;
            assert!(own.verify(&flipped, &collateral, now).is_err(), "bit {bit} of byte {at} is of no account");
        }
    }
    assert_eq!(guest.counters.figures().service, QuoteServiceState::Answers);
}

#[test]
fn what_the_module_did_not_report_is_not_quoted() {
    let (_folder, service, guest) = started();
    let report = service.platform().report(&Registers::default());
    for at in [0, 20, 128, 230, 300, 540, 1023] {
        let mut forged = report;
        forged[at] ^= 1;
        assert_eq!(guest.quote(&forged), Err(FAILED), "byte {at}");
    }
    assert_eq!(guest.quote(&report[..1023]), Err(FAILED));
    assert!(guest.quote(&report).is_ok());
    let figures = guest.counters.figures();
    assert_eq!((figures.given, figures.failed, figures.invalid), (1, 7, 1));
}

/// The time from a guest's call to its answer, but for what the service takes. `make bench` runs it.
#[test]
#[ignore = "a benchmark"]
fn what_is_added_to_the_services_time() {
    const ROUNDS: usize = 201;
    const LIMIT: Duration = Duration::from_millis(1);
    let (_folder, service, guest) = started();
    let report = service.platform().report(&Registers::default());
    let mut rounds: Vec<(Duration, Duration)> = (0..ROUNDS)
        .map(|_| {
            let began = Instant::now();
            guest.quote(&report).unwrap();
            let all = began.elapsed();
            let own = service.last();
            (all.saturating_sub(own), own)
        })
        .collect();
    rounds.sort();
    let (added, own) = rounds[ROUNDS / 2];
    println!("quotes: {added:.1?} added to the service's {own:.1?} (medians of {ROUNDS}; limit {LIMIT:?})");
    assert!(added < LIMIT);
}
