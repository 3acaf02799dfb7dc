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

use std::collections::VecDeque;
use std::ffi::c_int;
use std::sync::{Mutex, PoisonError};

use super::abi;
use super::log::{calls, line, time};
use super::td::{Answer, real};

/// What is left of the script, and the exit that the monitor has to answer.
struct Script {
    lines: VecDeque<String>,
    last: Option<String>,
    /// There is one.
    given: bool,
}

static SCRIPT: Mutex<Script> = Mutex::new(Script { lines: VecDeque::new(), last: None, given: false });

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
    // SAFETY: the call has no argument of its own.
    let size = usize::try_from(unsafe { real(fd, abi::GET_VCPU_MMAP_SIZE, std::ptr::null_mut()) }).unwrap_or(4096);
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
    // SAFETY: a new mapping of the page that the monitor has mapped, too.
    let page = unsafe { libc::mmap(std::ptr::null_mut(), size, protection, flags, fd, 0) };
    if page == libc::MAP_FAILED {
        return Answer::Quiet(libc::EFAULT);
    }
    // SAFETY: the mapping is as long as an exit, which lies at its start.
    let answer = unsafe { next(page.cast(), id) };
    // SAFETY: it is this function's.
    unsafe { libc::munmap(page, size) };
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

/// Notes what was answered, and makes the next exit.
///
/// # Safety
/// `page` is a `struct kvm_run`.
unsafe fn next(page: *mut u64, id: usize) -> Answer {
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
    let exit = if id == 0 { script.lines.pop_front() } else { None };
    let Some(exit) = exit else {
        drop(script);
        // Nothing happens until somebody wants something of it.
        // SAFETY: it returns when a signal was handled.
        unsafe { libc::pause() };
        return Answer::Quiet(libc::EINTR);
    };
    line(&exit);
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

/// Ends the process.
fn end() -> ! {
    // SAFETY: it ends the process, and whatever it holds with it.
    unsafe { libc::_exit(0) }
}
