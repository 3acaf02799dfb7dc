//! What a trust domain gives in its buffer for a quote, and what the quote service answers, beside plain models of both.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use hal::{GpaRange, GuestCallStatus};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm::quotes::{Answer, Asked, Buffer, Question, REPORT_LEN, SharedMemory, Status, WireError};

use crate::allocated;

const PAGE: u64 = 4096;
/// Pages of the guest's memory, from 0 on but for a hole of one page behind the first [`LOW`].
const PAGES: u64 = 44;
const LOW: u64 = 38;
const HEADER: usize = 24;
/// The longest message of a service: a header, and an id and a quote of 128 KiB each.
const LONGEST: usize = 24 + (2 << 17);
/// Answers may be allocated twice as they grow, and a little.
const SLACK: usize = 4096;

/// Pages that are private, one bit each.
struct Private(AtomicU64);

impl SharedMemory for Private {
    fn is_shared(&self, range: GpaRange) -> bool {
        let private = self.0.load(Ordering::Relaxed);
        (range.start / PAGE..(range.start + range.len) / PAGE).all(|page| page >= 64 || private >> page & 1 == 0)
    }
}

/// A call for a quote.
#[derive(Debug, Clone, Copy, Default)]
pub struct Call {
    /// The buffer's address and its length.
    pub gpa: u64,
    /// See [`Call::gpa`].
    pub len: u64,
    /// The version in its header.
    pub version: u64,
    /// The length of the report in its header.
    pub report: u32,
    /// The length of the quote that there is for it.
    pub quote: u32,
    /// Pages that are private when it asks.
    pub private: u64,
    /// Pages that are private when it is answered.
    pub later: u64,
}

impl Call {
    /// Bytes of an input that are a call.
    pub const LEN: usize = 48;

    /// A call as an input has it.
    pub fn encode(&self) -> Vec<u8> {
        let Self { gpa, len, version, report, quote, private, later } = self;
        let words = [*gpa, *len, *version, u64::from(*report) | u64::from(*quote) << 32, *private, *later];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| bytes.get(8 * at..)?.first_chunk().copied().map(u64::from_le_bytes);
        let lengths = word(3)?;
        Some(Self {
            gpa: word(0)?,
            len: word(1)?,
            version: word(2)?,
            report: u32::try_from(lengths & 0xffff_ffff).ok()?,
            quote: u32::try_from(lengths >> 32).ok()?,
            private: word(4)?,
            later: word(5)?,
        })
    }

    /// What it is to return, by the rules one after the other.
    fn expected(&self) -> Result<(), GuestCallStatus> {
        let invalid = Err(GuestCallStatus::InvalidOperand);
        if self.len == 0 {
            return invalid;
        }
        if self.gpa % PAGE != 0 || self.len % PAGE != 0 {
            return Err(GuestCallStatus::AlignError);
        }
        let Some(end) = self.gpa.checked_add(self.len).filter(|_| self.len <= 128 << 10) else { return invalid };
        let pages = self.gpa / PAGE..end / PAGE;
        let in_one = pages.end <= LOW || pages.start > LOW && pages.end <= PAGES;
        if !in_one || pages.clone().any(|page| self.private >> page & 1 == 1) {
            return invalid;
        }
        let fits = u64::from(self.report) <= self.len - HEADER as u64;
        if self.version == 1 && fits { Ok(()) } else { invalid }
    }
}

/// Has a guest make calls, whose inputs stand one behind the other, and answers them.
pub fn call(input: &[u8]) {
    let pages = |count: u64| usize::try_from(count * PAGE).expect("a small guest");
    let regions = [(GuestAddress(0), pages(LOW)), (GuestAddress((LOW + 1) * PAGE), pages(PAGES - LOW - 1))];
    let memory = GuestMemoryMmap::from_ranges(&regions).expect("memory");
    let private = Arc::new(Private(AtomicU64::new(0)));
    let shared: Arc<dyn SharedMemory> = private.clone();
    for call in input.chunks(Call::LEN).filter_map(Call::decode) {
        // A buffer without memory has no header.
        let header = [&call.version.to_le_bytes()[..], &[0xee; 8], &call.report.to_le_bytes(), &[0xee; 4]].concat();
        let _ = memory.write_slice(&header, GuestAddress(call.gpa));
        let before = contents(&memory);
        private.0.store(call.private, Ordering::Relaxed);
        let asked = Buffer::take(&memory, &shared, call.gpa, call.len);
        assert_eq!(asked.as_ref().map(|_| ()).map_err(|status| *status), call.expected(), "{call:?}");
        assert!(contents(&memory) == before, "{call:?} changes memory");
        if let Ok(asked) = asked {
            answer(&memory, &private, &call, asked, before);
        }
    }
}

/// Answers a call, and looks at what that changes.
fn answer(memory: &GuestMemoryMmap, private: &Private, call: &Call, asked: Asked, mut expected: Vec<u8>) {
    let Asked { buffer, report } = asked;
    let at = usize::try_from(if call.gpa / PAGE > LOW { call.gpa - PAGE } else { call.gpa }).expect("a small guest");
    let wanted = (call.report as usize == REPORT_LEN).then(|| &expected[at + HEADER..at + HEADER + REPORT_LEN]);
    assert_eq!(report.as_ref().map(|report| &report[..]), wanted);
    let room = usize::try_from(call.len).expect("a small buffer") - HEADER;
    assert_eq!(buffer.room(), room);
    let quote = vec![0xab; call.quote as usize % (room + 1)];
    private.0.store(call.later, Ordering::Relaxed);
    let (status, len): (u64, u32) = if call.quote % 2 == 0 {
        buffer.answer(&quote);
        expected_quote(&mut expected, at, &quote, call);
        (0, u32::try_from(quote.len()).expect("a short quote"))
    } else {
        buffer.tell(Status::Unavailable);
        ((1 << 63) + 1, 0)
    };
    if is_shared_later(call) {
        expected[at + 8..at + 16].copy_from_slice(&status.to_le_bytes());
        expected[at + 20..at + 24].copy_from_slice(&len.to_le_bytes());
    }
    assert!(contents(memory) == expected, "{call:?}: more is written than the answer, or less");
}

fn expected_quote(expected: &mut [u8], at: usize, quote: &[u8], call: &Call) {
    if is_shared_later(call) {
        expected[at + HEADER..at + HEADER + quote.len()].copy_from_slice(quote);
    }
}

fn is_shared_later(call: &Call) -> bool {
    (call.gpa / PAGE..(call.gpa + call.len) / PAGE).all(|page| call.later >> page & 1 == 0)
}

/// All of the guest's memory.
fn contents(memory: &GuestMemoryMmap) -> Vec<u8> {
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
    let mut all = Vec::new();
    for region in memory.iter() {
        let start = all.len();
        all.resize(start + usize::try_from(region.len()).expect("a small guest"), 0);
        memory.read_slice(&mut all[start..], region.start_addr()).expect("memory");
    }
    all
}

/// Takes the answer of a service, whose first byte says what it was asked and in how large pieces it sends.
pub fn answered(input: &[u8]) {
    let Some((first, sent)) = input.split_first() else { return };
    let question = if first & 1 == 0 { Question::Quote } else { Question::Platform };
    let piece = usize::from(first >> 1).max(1);
    let ((answer, left), taken) = allocated::during(|| receive(sent, piece));
    assert!(taken <= 2 * sent.len() + SLACK, "{taken} bytes are allocated for {}", sent.len());
    let (outcome, used) = match answer {
        Ok(Some(answer)) => (answer.take(question).map(<[u8]>::to_vec), sent.len() - left),
        Ok(None) => return assert!(model(sent).is_none(), "a whole answer is not seen"),
        Err(error) => (Err(error), 4),
    };
    if let Err(error) = &outcome {
        assert!(!error.to_string().is_empty());
    }
    let message = match model(sent) {
        Some(Ok(message)) => message,
        Some(Err(())) => return assert!(matches!(outcome, Err(WireError::Length(_))), "{outcome:?}"),
        None => panic!("an answer that is not whole: {outcome:?}"),
    };
    assert_eq!(used, 4 + message.len(), "more is taken than the answer, or less");
    assert_eq!(outcome.ok().as_deref(), brought(message, question));
}

/// An answer where it is whole, and how many bytes of what was sent are left.
fn receive(sent: &[u8], piece: usize) -> (Result<Option<Answer>, WireError>, usize) {
    let mut answer = Answer::default();
    let mut left = sent;
    loop {
        let missing = match answer.missing() {
            Ok(0) => return (Ok(Some(answer)), left.len()),
            Ok(missing) => missing,
            Err(error) => return (Err(error), left.len()),
        };
        let (now, rest) = left.split_at(missing.min(piece).min(left.len()));
        if now.is_empty() {
            return (Ok(None), 0);
        }
        answer.add(now);
        left = rest;
    }
}

/// The message behind a length; `None` where it is not whole, an error where no message is as long.
fn model(sent: &[u8]) -> Option<Result<&[u8], ()>> {
    let len = u32::from_be_bytes(*sent.first_chunk()?) as usize;
    if !(16..=LONGEST).contains(&len) {
        return Some(Err(()));
    }
    sent.get(4..4 + len).map(Ok)
}

/// What a message brings.
fn brought(message: &[u8], question: Question) -> Option<&[u8]> {
    let word = |at: usize| message.get(at..)?.first_chunk().copied().map(|word| u32::from_le_bytes(word) as usize);
    let kind = if question == Question::Quote { 1 } else { 5 };
    let sound = word(0)? & 0xffff == 1 && word(4)? == kind && word(8)? == message.len() && word(12)? == 0;
    if !sound {
        return None;
    }
    if question == Question::Platform {
        return Some(&[]);
    }
    let (id, quote) = (word(16)?, word(20)?);
    (quote > 0 && 24 + id + quote == message.len()).then(|| &message[24 + id..])
}

/// A service's message with these fields in front of its body.
pub fn message(major: u16, kind: u32, error: u32, body: &[u8]) -> Vec<u8> {
    let len = u32::try_from(16 + body.len()).expect("a short message");
    let mut message = len.to_be_bytes().to_vec();
    message.extend_from_slice(&[major.to_le_bytes(), 1_u16.to_le_bytes()].concat());
    [kind, len, error].iter().for_each(|word| message.extend_from_slice(&word.to_le_bytes()));
    message.extend_from_slice(body);
    message
}
