//! The `halyard` program: its command line around the machine.

mod cli;
mod logging;

use std::process::ExitCode;

fn main() -> ExitCode {
    use_one_heap();
    cli::main()
}

/// Lets all threads share one heap. The C library's habit of one for each costs every thread several system calls at
/// its start and pages that stay; Halyard's threads allocate too little to be in each other's way.
#[expect(unsafe_code, reason = "mallopt is a C function")]
fn use_one_heap() {
    // SAFETY: plain numbers; no other thread runs yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
