//! Interrupting a vCPU from outside its thread.
//!
//! KVM looks at the byte `immediate_exit` in the page that it shares with the monitor, once, as `KVM_RUN` begins;
//! later only a signal makes `KVM_RUN` return. A kick does this, in this order:
//!
//! 1. It notes itself as pending. The note stays until a run has reported it, so that no kick is lost, whether it
//!    comes before the first run, between two, or while the monitor handles an exit.
//! 2. If a thread is inside [`crate::Vcpu::run`], it sets `immediate_exit` and sends [`kick_signal`] to the thread. A
//!    signal that comes just before `KVM_RUN` does nothing by itself, but the byte is set by then; this is why the
//!    signal's handler can be empty.
//!
//! A run notes its thread, then looks for a pending kick, and sets `immediate_exit` itself if there is one. All these
//! accesses are sequentially consistent, so either the kick sees the thread or the run sees the kick.
//!
//! A kick only uses atomics and `tgkill`, so a signal handler may kick, and it never waits. The other side waits
//! instead: a run returns when the kicks that saw its thread are through, and later ones see none. So the byte is never
//! written after its page is unmapped, and no signal is sent to a thread that has left, let alone to another that
//! inherited its number: a kick of a vCPU that is gone is a note that nobody reads.
#![expect(unsafe_code, reason = "signals, and a byte that is shared with the kernel")]

mod pending;

/// What the lock-free part is made of.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
    pub(super) use std::thread::yield_now;
}

use std::io;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering::SeqCst};

use vmm_sys_util::signal;

use self::pending::Pending;

use crate::{Error, KickTarget, Result};

/// The signal that interrupts vCPU threads: the first real-time signal. It is unblocked in threads that run vCPUs;
/// nothing else may handle it.
pub fn kick_signal() -> i32 {
    signal::SIGRTMIN()
}

/// One vCPU as kicks see it.
pub(super) struct KickState {
    pending: Pending,
    /// `immediate_exit` in the vCPU's shared page, written only under a runner.
    immediate_exit: *const AtomicU8,
}

// SAFETY: the pointer is used only while a thread is inside `run`, and that thread keeps the page mapped.
unsafe impl Send for KickState {}
// SAFETY: as above; what it points to is an atomic.
unsafe impl Sync for KickState {}

impl KickState {
    /// # Safety
    /// `immediate_exit` must point to the byte of that name in a vCPU's shared page, which stays mapped while a
    /// [`Running`] of this state exists.
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Self {
        Self { pending: Pending::new(), immediate_exit: immediate_exit.cast_const().cast() }
    }

    /// Marks the calling thread as the one that runs the vCPU until the guard is dropped.
    pub(super) fn enter(&self) -> Running<'_> {
        // SAFETY: the call has no arguments and cannot fail.
        let thread = unsafe { libc::gettid() };
        let waits = self.pending.enter(thread.unsigned_abs());
        let running = Running(self);
        if waits {
            running.set_immediate_exit(1);
        }
        running
    }
}

impl KickTarget for KickState {
    fn kick(&self) {
        self.pending.kick(|thread| {
            // SAFETY: the page is mapped, since the runner does not leave before this is done.
            unsafe { &*self.immediate_exit }.store(1, SeqCst);
            // SAFETY: plain numbers. The thread is one of this process and, as above, still inside `run`.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, kick_signal()) };
        });
    }
}

/// See [`KickState::enter`].
pub(super) struct Running<'a>(&'a KickState);

impl Running<'_> {
    /// To be asked when `KVM_RUN` was interrupted: whether it was by a kick, which is then reported.
    pub(super) fn take_kick(&self) -> bool {
        self.0.pending.take(|| self.set_immediate_exit(0))
    }

    fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the vCPU, and with it the page, outlives this guard by the contract of `KickState::new`.
        unsafe { &*self.0.immediate_exit }.store(value, SeqCst);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.pending.leave();
    }
}

/// Lets [`kick_signal`] interrupt system calls of this process instead of ending it. Only the first call does
/// anything.
pub(super) fn install_handler() -> Result<()> {
    static INSTALLED: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    let installed = INSTALLED.get_or_init(|| {
        let mut action = libc::sigaction {
            sa_sigaction: on_kick as extern "C" fn(libc::c_int) as usize,
            // A signal that comes late, outside KVM_RUN, does not disturb other system calls.
            sa_flags: libc::SA_RESTART,
            sa_mask: signal::create_sigset(&[]).map_err(|error| error.errno())?,
            sa_restorer: None,
        };
        // SAFETY: the action is complete and its handler does nothing.
        match unsafe { libc::sigaction(kick_signal(), &raw mut action, ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error().raw_os_error().unwrap_or(libc::EINVAL)),
        }
    });
    installed.map_err(|errno| Error::system("sigaction", io::Error::from_raw_os_error(errno)))
}

/// Unblocks [`kick_signal`] in the calling thread, which may have inherited a mask.
pub(super) fn unblock() -> Result<()> {
    signal::unblock_signal(kick_signal())
        .map_err(|error| Error::system("pthread_sigmask", io::Error::other(error.to_string())))
}

extern "C" fn on_kick(_signal: libc::c_int) {}
