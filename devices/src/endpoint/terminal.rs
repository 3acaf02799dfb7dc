//! The terminal's raw mode, and its way back on every way out: return, `exit`, panic, and signals.

#![expect(unsafe_code, reason = "signal handlers")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::ptr;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::sys::termios::{InputFlags, LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};
use nix::unistd::isatty;

/// Signals that end the process and whose handlers put the terminal back first.
const ENDING: [Signal; 9] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGABRT,
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGILL,
    Signal::SIGSYS,
];

/// A terminal in raw mode and what it was before.
struct Saved {
    fd: RawFd,
    cooked: libc::termios,
    raw: libc::termios,
}

/// The terminal that is in raw mode now, for the signal handlers. What it points to is never freed, since a handler
/// may be reading it in another thread at any time.
static CURRENT: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

/// A terminal in raw mode: keys go to the guest one by one, `Ctrl-c` too. Dropping this puts the terminal back, and
/// so do a panic, `exit`, and the signals that end or stop the process, unless the process handles them itself.
#[derive(Debug)]
pub struct RawTerminal {
    _private: (),
}

impl RawTerminal {
    /// Puts the terminal `fd` into raw mode; `None` where it is no terminal. Signals that have a handler already, or
    /// are ignored, are left alone: install the monitor's own first.
    ///
    /// The terminal must stay open while this lives. Only one is in raw mode at a time.
    ///
    /// # Errors
    /// The terminal refuses, or another is in raw mode.
    pub fn enter(fd: &impl AsFd) -> io::Result<Option<Self>> {
        let fd = fd.as_fd();
        if !isatty(fd).unwrap_or(false) {
            return Ok(None);
        }
        let cooked = tcgetattr(fd)?;
        let raw = raw_mode(cooked.clone());
        let saved =
            Box::into_raw(Box::new(Saved { fd: fd.as_raw_fd(), cooked: cooked.into(), raw: raw.clone().into() }));
        if CURRENT.compare_exchange(ptr::null_mut(), saved, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: it was made above and given to nobody.
            drop(unsafe { Box::from_raw(saved) });
            return Err(io::Error::other("another terminal is in raw mode"));
        }
        let terminal = Self { _private: () };
        install_once();
        tcsetattr(fd, SetArg::TCSANOW, &raw)?;
        Ok(Some(terminal))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        CURRENT.store(ptr::null_mut(), Ordering::Release);
    }
}

/// Raw mode but for one thing: output is still processed, so that the monitor's own lines look right. What a guest
/// sends has its carriage returns already.
fn raw_mode(mut modes: Termios) -> Termios {
    modes.input_flags -= InputFlags::IGNBRK
        | InputFlags::BRKINT
        | InputFlags::PARMRK
        | InputFlags::ISTRIP
        | InputFlags::INLCR
        | InputFlags::IGNCR
        | InputFlags::ICRNL
        | InputFlags::IXON;
    modes.local_flags -=
        LocalFlags::ECHO | LocalFlags::ECHONL | LocalFlags::ICANON | LocalFlags::ISIG | LocalFlags::IEXTEN;
    for (index, value) in [(SpecialCharacterIndices::VMIN, 1), (SpecialCharacterIndices::VTIME, 0)] {
        if let Some(character) = modes.control_chars.get_mut(index as usize) {
            *character = value;
        }
    }
    modes
}

/// Puts the terminal that is in raw mode, if there is one, back as it was: for whoever ends the process past all
/// destructors. Safe in a signal handler, and any number of times.
pub fn restore() {
    set_current(|saved| &saved.cooked);
}

fn set_current(which: fn(&Saved) -> &libc::termios) {
    // SAFETY: what it points to is never freed, and not written after it was published.
    let Some(saved) = (unsafe { CURRENT.load(Ordering::Acquire).as_ref() }) else {
        return;
    };
    // A process in the background that sets a terminal is stopped, unless it blocks the signal for that.
    // SAFETY: these functions may be called in signal handlers, and all structures are whole.
    unsafe {
        let mut block: libc::sigset_t = std::mem::zeroed();
        let mut before: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut block);
        libc::sigaddset(&raw mut block, libc::SIGTTOU);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const block, &raw mut before);
        libc::tcsetattr(saved.fd, libc::TCSANOW, which(saved));
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, ptr::null_mut());
    }
}

/// Installs what puts the terminal back, once in a process.
fn install_once() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let earlier = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            earlier(info);
        }));
        // SAFETY: `at_exit` is a function of the signature that is asked for, and there for ever.
        if unsafe { libc::atexit(at_exit) } != 0 {
            tracing::warn!("the terminal will not be put back by exit");
        }
        for signal in ENDING {
            let flags = SaFlags::SA_RESETHAND | SaFlags::SA_NODEFER;
            handle(signal, on_ending, flags);
        }
        handle(Signal::SIGTSTP, on_stop, SaFlags::SA_RESTART);
        handle(Signal::SIGCONT, on_continue, SaFlags::SA_RESTART);
    });
}

/// Handles a signal, unless something else does or it is ignored.
fn handle(signal: Signal, handler: extern "C" fn(libc::c_int), flags: SaFlags) {
    let ours = SigAction::new(SigHandler::Handler(handler), flags, SigSet::empty());
    // SAFETY: the handler only calls what signal handlers may call.
    let before = unsafe { sigaction(signal, &ours) };
    match before {
        Ok(before) if before.handler() != SigHandler::SigDfl => {
            // SAFETY: it is the handler that was there.
            if let Err(e) = unsafe { sigaction(signal, &before) } {
                tracing::warn!("{signal}: {e}");
            }
        }
        Ok(_) => {}
        Err(e) => tracing::warn!("{signal}: {e}"),
    }
}

extern "C" fn at_exit() {
    restore();
}

/// Puts the terminal back and lets the signal do what it does without a handler (which `SA_RESETHAND` removed).
extern "C" fn on_ending(signal: libc::c_int) {
    restore();
    // SAFETY: `raise` may be called in signal handlers.
    unsafe { libc::raise(signal) };
}

/// Puts the terminal back for the shell, and stops.
extern "C" fn on_stop(_signal: libc::c_int) {
    restore();
    // SAFETY: `raise` may be called in signal handlers.
    unsafe { libc::raise(libc::SIGSTOP) };
}

/// Takes the terminal again, if the process goes on in the foreground.
extern "C" fn on_continue(_signal: libc::c_int) {
    // SAFETY: what it points to is never freed; both functions may be called in signal handlers.
    let in_foreground = unsafe {
        CURRENT.load(Ordering::Acquire).as_ref().is_some_and(|saved| libc::tcgetpgrp(saved.fd) == libc::getpgrp())
    };
    if in_foreground {
        set_current(|saved| &saved.raw);
    }
}
