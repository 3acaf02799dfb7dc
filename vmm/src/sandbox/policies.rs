//! The policies of `resources/seccomp` as the programs that the kernel runs, made by the build script.

use seccompiler::sock_filter;

include!(concat!(env!("OUT_DIR"), "/policies.rs"));

/// What a program returns (`BPF_RET | BPF_K`).
const RETURN: u16 = 0x06;

/// The same policy, but what it does not allow is done, and the kernel logs it.
pub fn logging(policy: &[sock_filter]) -> Vec<sock_filter> {
    let mut logging = policy.to_vec();
    for instruction in &mut logging {
        if instruction.code == RETURN && instruction.k == libc::SECCOMP_RET_TRAP {
            instruction.k = libc::SECCOMP_RET_LOG;
        }
    }
    logging
}
