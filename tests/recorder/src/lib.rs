//! A library that is loaded between a monitor and KVM (`LD_PRELOAD`), plays a host with Intel TDX to it, and writes down
//! what it is asked, until a vCPU is to run.
//!
//! A VM of the kind TDX is a plain one to the real KVM, and what only a trust domain has is answered here as Linux 6.16
//! and later do: from a table, as long as the caller keeps to the rules. All else goes on to the real KVM. The file that
//! `RECORDER_LOG` names gets a line for each call that the launch of a trust domain consists of.

mod abi;
mod log;
mod td;

use std::ffi::{c_int, c_ulong, c_void};

use crate::log::line;

/// `ioctl(2)`, as the C library has it.
///
/// # Safety
/// As for the C library's: `arg` is what `request` wants.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    let request = request & 0xffff_ffff;
    // SAFETY: the caller's promise is handed on.
    match unsafe { td::answer(fd, request, arg) } {
        Ok(td::Answer::Real) => unsafe { td::real(fd, request, arg) },
        Ok(td::Answer::Value(value)) => value,
        Ok(td::Answer::Run) => {
            line("KVM_RUN");
            // SAFETY: it ends the process, and whatever it holds with it.
            unsafe { libc::_exit(0) }
        }
        Err(errno) => {
            line(&format!("  refused: errno {errno}"));
            // SAFETY: it is this thread's own.
            unsafe { *libc::__errno_location() = errno };
            -1
        }
    }
}
