//! The end of a thread that makes a system call which is not on its list: the call's name in the log, and an exit code
//! of its own. What runs in the handler uses nothing but the stack and calls that are on every list.

#![expect(unsafe_code, reason = "a signal handler")]

use std::cell::Cell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use syscalls::Sysno;

use super::Thread;

/// The exit code of a process that the sandbox ended.
pub const EXIT_CODE: i32 = 8;

/// `SYS_SECCOMP`: a SIGSYS that a seccomp filter raised.
const RAISED_BY_FILTER: i32 = 1;

/// The longest name of a thread, in bytes.
const NAME_LEN: usize = 16;

thread_local! {
    /// The policy that the thread is under, and the thread's name. Neither is dropped, so a handler may look at them at
    /// any time.
    static SELF: Cell<Option<(Thread, [u8; NAME_LEN])>> = const { Cell::new(None) };
}

static JSON: AtomicBool = AtomicBool::new(false);

/// Has violations logged as objects of JSON, as the rest of the log.
pub fn report_as_json() {
    JSON.store(true, Ordering::Relaxed);
}

/// Notes what the calling thread is. False where that was done before.
pub fn introduce(thread: Thread) -> bool {
    let mut name = [0_u8; NAME_LEN];
    // SAFETY: PR_GET_NAME writes 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    SELF.with(|own| {
        let first = own.get().is_none();
        if first {
            own.set(Some((thread, name)));
        }
        first
    })
}

/// Has calls that are not allowed reported.
pub fn install_handler() -> io::Result<()> {
    let action = SigAction::new(SigHandler::SigAction(on_violation), SaFlags::SA_NODEFER, SigSet::empty());
    // SAFETY: the handler only does what a signal handler may.
    unsafe { sigaction(Signal::SIGSYS, &action) }?;
    Ok(())
}

extern "C" fn on_violation(_signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    devices::endpoint::terminal::restore();
    // SAFETY: the kernel gives both, and they are of these types.
    let (code, registers) = unsafe { ((*info).si_code, &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs) };
    if code != RAISED_BY_FILTER {
        // Sent by somebody. SAFETY: both calls may be made in a handler.
        unsafe {
            libc::signal(libc::SIGSYS, libc::SIG_DFL);
            libc::raise(libc::SIGSYS);
        }
        return;
    }
    let register = |index: i32| usize::try_from(index).ok().and_then(|index| registers.get(index)).copied();
    let call = register(libc::REG_RAX).unwrap_or_default();
    let request = register(libc::REG_RSI).unwrap_or_default();
    let mut line = Line::default();
    describe(&mut line, JSON.load(Ordering::Relaxed), SELF.get(), call, request);
    // SAFETY: the bytes are those of the line; where standard error is closed, there is nobody to tell.
    unsafe {
        libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len);
        libc::_exit(EXIT_CODE)
    }
}

/// Puts what happened into words. `request` is the call's second argument.
fn describe(line: &mut Line, json: bool, own: Option<(Thread, [u8; NAME_LEN])>, call: i64, request: i64) {
    let sysno = usize::try_from(call).ok().and_then(Sysno::new);
    line.add(if json { r#"{"level":"ERROR","message":""# } else { "halyard: " });
    line.add("sandbox: thread «");
    let (kind, name) = own.map_or(("unknown", [0; NAME_LEN]), |(thread, name)| (thread.name(), name));
    // A name of a device may hold what would end a string of JSON.
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    name.iter().for_each(|&byte| line.push(if matches!(byte, b'"' | b'\\' | ..b' ') { b'?' } else { byte }));
    line.add("» made the system call ");
    line.add(sysno.map_or("unknown", |sysno| sysno.name()));
    line.add(" (");
    line.number(call.unsigned_abs(), 10);
    if sysno == Some(Sysno::ioctl) {
        line.add(", request 0x");
        line.number(request.unsigned_abs() & 0xffff_ffff, 16);
    }
    line.add("), which the policy «");
    line.add(kind);
    line.add("» does not allow; the process ends");
    line.add(if json { "\"}\n" } else { "\n" });
}

/// A line of text without an allocation. What does not fit is left out.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self { bytes: [0; 256], len: 0 }
    }
}

impl Line {
    fn push(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len += 1;
        }
    }

    fn add(&mut self, text: &str) {
        text.bytes().for_each(|byte| self.push(byte));
    }

    fn number(&mut self, number: u64, base: u64) {
        if number >= base {
            self.number(number / base, base);
        }
        let digit = u32::try_from(number % base).ok().and_then(|digit| char::from_digit(digit, 16));
        digit.into_iter().for_each(|digit| self.push(u8::try_from(digit).unwrap_or(b'?')));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(json: bool, call: i64, request: i64) -> String {
        let mut name = [0; NAME_LEN];
        name[..11].copy_from_slice(b"io-\"disk\\\n0");
        let mut line = Line::default();
        describe(&mut line, json, Some((Thread::Io, name)), call, request);
        String::from_utf8(line.bytes[..line.len].to_vec()).unwrap()
    }

    #[test]
    fn a_violation_is_put_into_words() {
        assert_eq!(
            said(false, libc::SYS_openat, 0),
            "halyard: sandbox: thread «io-?disk??0» made the system call openat (257), which the policy «io» does not \
             allow; the process ends\n"
        );
        assert!(said(false, libc::SYS_ioctl, 0xc008_ae05).contains("ioctl (16, request 0xc008ae05), which"));
        assert!(said(false, 9999, 0).contains("call unknown (9999), which"));
        let json: serde_json::Value = serde_json::from_str(&said(true, libc::SYS_execve, 0)).unwrap();
        assert!(json["message"].as_str().unwrap().contains("execve (59)"), "{json}");
    }
}
