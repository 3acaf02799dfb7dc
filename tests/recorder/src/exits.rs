//! Exits of a trust domain's first vCPU, as a script says, and what the monitor answers.
//!
//! A script has a line for each exit; numbers are hexadecimal, without a prefix:
//!
//! ```text
//! map GPA PAGES private|shared      the guest wants memory of that visibility (TDG.VP.VMCALL<MapGPA>)
//! fault GPA BYTES private|shared    the guest touches memory so
//! poison GPA BYTES private|shared   the same, of memory that is broken on the host
//! call NUMBER ARGUMENT...           another call, as KVM_EXIT_TDX has it
//! fatal REGISTER=VALUE...           the guest ends itself; registers by their numbers
//! shutdown                          a triple fault
//! end                               the process ends
//! ```
//!
//! and of what the guest does by itself:
//!
//! ```text
//! write GPA DIGITS                  it writes these bytes to memory that it shares
//! wait GPA                          it waits until the buffer there (of GetQuote) is no longer in flight
//! show GPA                          what that buffer holds then
//! msi                               the next interrupt by message, which comes within ten seconds
//! ```

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::log::{calls, hex, line, time};
use super::msi;
use super::td::{self, Answer};

/// What is left of the script, and the exit that the monitor has to answer.
struct Script {
    lines: VecDeque<String>,
    last: Option<String>,
    /// There is one.
    given: bool,
}

static SCRIPT: Mutex<Script> = Mutex::new(Script { lines: VecDeque::new(), last: None, given: false });

/// The part of a vCPU's pages that exits are in.
const PAGE: usize = 4096;
/// Where things are in `struct kvm_run`: in bytes; and in words of 64 bits, the lower half of one.
const IMMEDIATE_EXIT: usize = 1;
const EXIT_REASON: usize = 1;
/// What an exit holds, in words of 64 bits: a hypercall's number, arguments and result; a fault's flags, address and size; a
/// system event's type and number of registers, and the registers; a call's flags, number, status and arguments.
const EXIT: usize = 4;

const REASON_HYPERCALL: u32 = 3;
const REASON_SHUTDOWN: u32 = 8;
const REASON_SYSTEM_EVENT: u32 = 24;
const REASON_MEMORY_FAULT: u32 = 39;
const REASON_TDX: u32 = 40;
const MAP_GPA_RANGE: u64 = 12;
const SYSTEM_EVENT_TDX_FATAL: u64 = 7;
/// What KVM puts where the status of a call goes: there is no such call.
const UNSUPPORTED: u64 = 1 << 63 | 3;

/// Bytes in front of what a buffer for GetQuote holds, and the status of one whose answer is not there yet.
const BUFFER_HEADER: u64 = 24;
const IN_FLIGHT: u64 = u64::MAX;
/// How long a guest waits for its quote, longer than monitors do, and for an interrupt.
const ANSWER: Duration = Duration::from_secs(60);
const INTERRUPT: Duration = Duration::from_secs(10);

/// Has the first vCPU's runs end so.
pub fn script(text: &str) {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect();
    *SCRIPT.lock().unwrap_or_else(PoisonError::into_inner) = Script { lines, last: None, given: true };
}

/// KVM_RUN of the vCPU `id`.
///
/// # Safety
/// `fd` is a vCPU's.
pub unsafe fn run(fd: c_int, id: usize) -> Answer {
    if !SCRIPT.lock().unwrap_or_else(PoisonError::into_inner).given {
        line(&format!("KVM_RUN after {} calls", calls()));
        time("KVM_RUN");
        end();
    }
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping of the page that the monitor has mapped, too.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, protection, flags, fd, 0) };
    if page == libc::MAP_FAILED {
        return Answer::Quiet(libc::EFAULT);
    }
    // SAFETY: the mapping is as long as an exit, which lies at its start.
    let answer = unsafe { next(page.cast(), fd, id) };
    // SAFETY: it is this function's.
    unsafe { libc::munmap(page, PAGE) };
    answer
}

/// Notes what the monitor has answered to the exit of a script's line, whose words are `word`.
fn note_answer(exit: &str, word: impl Fn(usize) -> u64) {
    match exit.split(' ').next() {
        Some("map") => line(&format!("  answered {}", word(7))),
        Some("call") => line(&format!("  answered {:#x} {:x?}", word(2), [3, 4, 5, 6, 7].map(&word))),
        _ => line("  answered"),
    }
}

/// The next exit of a vCPU, after what its guest does by itself until then.
fn next_exit(script: &mut Script, vcpu: c_int, id: usize) -> Option<String> {
    if id != 0 {
        return None;
    }
    loop {
        let exit = script.lines.pop_front()?;
        // What is written may be long.
        line(&exit.chars().take(80).collect::<String>());
        if !act(vcpu, &exit) {
            return Some(exit);
        }
    }
}

/// Notes what was answered, and makes the next exit.
///
/// # Safety
/// `page` is a `struct kvm_run`.
unsafe fn next(page: *mut u64, fd: c_int, id: usize) -> Answer {
    let mut script = SCRIPT.lock().unwrap_or_else(PoisonError::into_inner);
    // SAFETY (of both): the place lies in the page, and words there are aligned.
    let word = |at: usize| unsafe { &mut *page.add(EXIT + at) };
    let reason = |number: u32| unsafe { *page.add(EXIT_REASON).cast::<u32>() = number };
    if id == 0
        && let Some(last) = script.last.take()
    {
        note_answer(&last, |at| *word(at));
    }
    // SAFETY: as above.
    if unsafe { *page.cast::<u8>().add(IMMEDIATE_EXIT) } != 0 {
        return Answer::Quiet(libc::EINTR);
    }
    let Some(exit) = next_exit(&mut script, fd, id) else {
        drop(script);
        // Nothing happens until somebody wants something of it, which a signal says, or has said before it rests.
        // SAFETY: as above.
        while unsafe { page.cast::<u8>().add(IMMEDIATE_EXIT).read_volatile() } == 0 && msi::rest(10) {}
        return Answer::Quiet(libc::EINTR);
    };
    let words: Vec<&str> = exit.split(' ').collect();
    let number = |at: usize| words.get(at).and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or(0);
    let private = words.last() == Some(&"private");
    let mut answer = Answer::Value(0);
    match words[0] {
        "map" => {
            reason(REASON_HYPERCALL);
            let arguments = [MAP_GPA_RANGE, number(1), number(2), u64::from(private) << 4, 0, 0, 0, 0];
            (0..).zip(arguments).for_each(|(at, value)| *word(at) = value);
        }
        what @ ("fault" | "poison") => {
            reason(REASON_MEMORY_FAULT);
            (0..).zip([u64::from(private) << 3, number(1), number(2)]).for_each(|(at, value)| *word(at) = value);
            answer = Answer::Quiet(if what == "fault" { libc::EFAULT } else { libc::EHWPOISON });
        }
        "call" => {
            reason(REASON_TDX);
            let call = [0, number(1), UNSUPPORTED, number(2), number(3), number(4), number(5), number(6)];
            (0..).zip(call).for_each(|(at, value)| *word(at) = value);
        }
        "fatal" => {
            reason(REASON_SYSTEM_EVENT);
            (0..17).for_each(|at| *word(at) = 0);
            *word(0) = SYSTEM_EVENT_TDX_FATAL | 16 << 32;
            for (register, value) in words.iter().filter_map(|word| word.split_once('=')) {
                let value = u64::from_str_radix(value, 16).unwrap_or(0);
                *word(1 + usize::from_str_radix(register, 16).unwrap_or(0) % 16) = value;
            }
        }
        "shutdown" => reason(REASON_SHUTDOWN),
        _ => end(),
    }
    script.last = Some(exit);
    answer
}

/// Does what a line says that is no exit; false where it is one.
fn act(vcpu: c_int, exit: &str) -> bool {
    let words: Vec<&str> = exit.split(' ').collect();
    let gpa = words.get(1).and_then(|word| u64::from_str_radix(word, 16).ok()).unwrap_or(0);
    let told = match words[0] {
        "write" => write(vcpu, gpa, words.get(2).unwrap_or(&"")).map(|()| None),
        "wait" => wait(vcpu, gpa).map(Some),
        "show" => show(vcpu, gpa).map(Some),
        "msi" => Some(Some(msi::next(INTERRUPT).map_or_else(|| "no msi".into(), |message| message.to_string()))),
        _ => return false,
    };
    match told {
        Some(Some(told)) => line(&format!("  {told}")),
        Some(None) => {}
        None => line("  this memory is not shared"),
    }
    true
}

/// What the guest writes: hexadecimal digits.
fn write(vcpu: c_int, gpa: u64, digits: &str) -> Option<()> {
    let bytes: Vec<u8> = digits
        .as_bytes()
        .chunks(2)
        .filter_map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok())
        .collect();
    let memory = td::shared(vcpu, gpa, bytes.len() as u64)?;
    // SAFETY: the memory is that long, and no Rust object lies there.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), memory, bytes.len()) };
    Some(())
}

/// The header of a buffer for GetQuote: version, status, and the lengths of what the guest gave and is given.
struct Header {
    version: u64,
    status: u64,
    given: u32,
    len: u32,
}

fn header(vcpu: c_int, gpa: u64) -> Option<Header> {
    let memory = td::shared(vcpu, gpa, BUFFER_HEADER)?;
    // SAFETY (of all): the memory is that long, and its start aligned for it; the monitor writes there meanwhile.
    let words = memory.cast::<c_void>().cast::<u64>();
    let word = |at| unsafe { words.add(at).read_volatile() };
    let (version, status, lengths) = (word(0), word(1), word(2).to_le_bytes());
    let [given, len] = [0, 4].map(|at| u32::from_le_bytes(std::array::from_fn(|byte| lengths[at + byte])));
    Some(Header { version, status, given, len })
}

fn wait(vcpu: c_int, gpa: u64) -> Option<String> {
    let deadline = Instant::now() + ANSWER;
    while header(vcpu, gpa)?.status == IN_FLIGHT && Instant::now() < deadline {
        msi::rest(1);
    }
    let Header { version, status, given, len } = header(vcpu, gpa)?;
    Some(format!("version {version} status {status:#x} lengths {given} {len}"))
}

fn show(vcpu: c_int, gpa: u64) -> Option<String> {
    let len = header(vcpu, gpa)?.len;
    let memory = td::shared(vcpu, gpa + BUFFER_HEADER, len.into())?;
    // SAFETY: the memory is that long, and the answer is there, so that nobody writes to it any more.
    let answer = unsafe { std::slice::from_raw_parts(memory, usize::try_from(len).unwrap_or(0)) };
    Some(format!("holds {}", hex(answer)))
}

/// Ends the process.
fn end() -> ! {
    // SAFETY: it ends the process, and whatever it holds with it.
    unsafe { libc::_exit(0) }
}
