//! What a process may beyond any other: capabilities, new privileges, core dumps, locked memory, inherited descriptors.

#![expect(unsafe_code, reason = "system calls that no wrapper has")]

use std::io;
use std::os::fd::RawFd;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};

/// The layout of capability sets as of Linux 2.6.26 (`_LINUX_CAPABILITY_VERSION_3`).
const VERSION_3: u32 = 0x2008_0522;

/// Whose capabilities are set (`struct __user_cap_header_struct`).
#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

/// 32 capabilities of each set (`struct __user_cap_data_struct`).
#[repr(C)]
#[derive(Clone, Copy)]
struct Capabilities {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// Nothing that this process starts gets privileges that it has not, whoever owns the file (`no_new_privs`).
pub fn give_up_new() -> io::Result<()> {
    nix::sys::prctl::set_no_new_privs()?;
    Ok(())
}

/// Clears the calling thread's capabilities: effective, permitted and inheritable, and with them the ambient ones. The
/// bounding set may stay, since without new privileges nothing is gained from it.
pub fn give_up_capabilities() -> io::Result<()> {
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [Capabilities { effective: 0, permitted: 0, inheritable: 0 }; 2];
    // SAFETY: both structures are those that this version of the call reads.
    match unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Keeps guest memory out of core dumps and from debuggers of the same user. The limit on a dump's size alone would not:
/// it does not hold where dumps go to a program.
///
/// # Errors
/// The kernel's answer.
pub fn forbid_core_dumps() -> io::Result<()> {
    nix::sys::prctl::set_dumpable(false)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)?;
    Ok(())
}

/// Raises the limit on locked memory, where the process may: a machine that is made anew locks its memory without
/// capabilities.
pub fn allow_locked_memory() {
    let limit = getrlimit(Resource::RLIMIT_MEMLOCK);
    let raised = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    if let (Ok((soft, hard)), Err(_)) = (limit, raised)
        && soft < hard
        && let Err(error) = setrlimit(Resource::RLIMIT_MEMLOCK, hard, hard)
    {
        tracing::debug!("the limit on locked memory: {error}");
    }
}

/// Closes descriptors that the process was started with, but for the standard streams and those in `claimed`. To be
/// called before the process opens any of its own.
pub fn close_unclaimed(claimed: impl IntoIterator<Item = RawFd>) {
    let mut claimed: Vec<u32> = claimed.into_iter().filter_map(|fd| u32::try_from(fd).ok()).collect();
    claimed.sort_unstable();
    let mut first = 3;
    for fd in claimed.into_iter().filter(|&fd| fd >= 3) {
        if fd > first {
            close_range(first, fd - 1, 0);
        }
        first = fd.saturating_add(1);
    }
    close_range(first, u32::MAX, 0);
}

/// Marks every descriptor as one that programs started later do not get: for libraries that forget it.
pub fn close_on_exec() {
    close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
}

fn close_range(first: u32, last: u32, flags: u32) {
    // SAFETY: plain numbers. Descriptors of this process are not closed: see the callers.
    if unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) } != 0 {
        // Before Linux 5.11.
        tracing::debug!("close_range: {}", io::Error::last_os_error());
    }
}
