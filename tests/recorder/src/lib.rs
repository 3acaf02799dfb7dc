//! A library that is loaded between a monitor and KVM (`LD_PRELOAD`), plays a host with Intel TDX to it, and writes down
//! what it is asked, until a vCPU is to run.
//!
//! Tests of Halyard's own have it as a module instead: what is here takes the C library's place in them.
//!
//! A VM of the kind TDX is a plain one to the real KVM, and what only a trust domain has is answered here as Linux 6.16
//! and later do: from a table, as long as the caller keeps to the rules. All else goes on to the real KVM. The file that
//! `RECORDER_LOG` names gets a line for each call that the launch of a trust domain consists of. The first vCPU's runs end as
//! the file says that `RECORDER_EXITS` names (see [`exits`]), and where there is none, its first run ends the process. The file that
//! `RECORDER_TIMES` names gets the time at which the launch is done and that of the first run: without a log beside it, nothing
//! is digested, so that what is left is the monitor's own work.

mod abi;
pub mod exits;
pub mod log;
mod msi;
mod td;

use std::ffi::{c_int, c_ulong, c_void};
use std::sync::Once;

use self::log::line;

/// What the environment asks for.
static ASKED: Once = Once::new();

fn read_environment() {
    let file = |name| std::fs::File::options().create(true).append(true).open(std::env::var_os(name)?).ok();
    if let Some(file) = file("RECORDER_LOG") {
        log::to(Some(file));
    }
    log::times_to(file("RECORDER_TIMES"));
    if let Some(script) = std::env::var_os("RECORDER_EXITS").and_then(|path| std::fs::read_to_string(path).ok()) {
        exits::script(&script);
    }
}

/// `ioctl(2)`, as the C library has it.
///
/// # Safety
/// As for the C library's: `arg` is what `request` wants.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ioctl(fd: c_int, request: c_ulong, arg: *mut c_void) -> c_int {
    ASKED.call_once(read_environment);
    let request = request & 0xffff_ffff;
    log::count(request);
    // SAFETY: the caller's promise is handed on.
    match unsafe { td::answer(fd, request, arg) } {
        Ok(td::Answer::Real) => unsafe { td::real(fd, request, arg) },
        Ok(td::Answer::Value(value)) => value,
        Ok(td::Answer::Quiet(errno)) => {
            // SAFETY: it is this thread's own.
            unsafe { *libc::__errno_location() = errno };
            -1
        }
        Err(errno) => {
            line(&format!("  refused: errno {errno}"));
            // SAFETY: it is this thread's own.
            unsafe { *libc::__errno_location() = errno };
            -1
        }
    }
}
