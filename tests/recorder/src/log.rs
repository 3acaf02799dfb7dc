//! The file that the lines go to.

use std::ffi::c_ulong;
use std::fs::File;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

static LOG: Mutex<Option<File>> = Mutex::new(None);
/// Where times go.
static TIMES: Mutex<Option<File>> = Mutex::new(None);
/// Calls of KVM, of whatever kind.
static CALLS: AtomicU64 = AtomicU64::new(0);

/// Has the lines go to a file, or nowhere, and counts from 0.
pub fn to(file: Option<File>) {
    *LOG.lock().unwrap_or_else(PoisonError::into_inner) = file;
    CALLS.store(0, Ordering::Relaxed);
}

/// Has times go to a file, too, or nowhere.
pub fn times_to(file: Option<File>) {
    *TIMES.lock().unwrap_or_else(PoisonError::into_inner) = file;
}

/// Whether somebody wants to know what is called.
pub fn is_kept() -> bool {
    LOG.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Writes down that something comes now: by the clock that only goes on (`CLOCK_MONOTONIC`, in nanoseconds), and after how many
/// calls.
pub fn time(what: &str) {
    if let Some(file) = &mut *TIMES.lock().unwrap_or_else(PoisonError::into_inner) {
        let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: there is room for the time, and the clock is on every Linux.
        unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
        // At once, since another thread may end the process.
        let line = format!("{what} at {}{:09} after {} calls\n", now.tv_sec, now.tv_nsec, calls());
        let _ = file.write_all(line.as_bytes());
    }
}

/// Counts a call, if it is KVM's.
pub fn count(request: c_ulong) {
    if request >> 8 & 0xff == 0xae {
        CALLS.fetch_add(1, Ordering::Relaxed);
    }
}

/// How many calls of KVM there were.
pub fn calls() -> u64 {
    CALLS.load(Ordering::Relaxed)
}

/// Writes a line. Where there is no file, nobody wants to know.
pub fn line(text: &str) {
    if let Some(file) = &mut *LOG.lock().unwrap_or_else(PoisonError::into_inner) {
        // A full disk shows in what is missing.
        let _ = writeln!(file, "{text}");
    }
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
