//! Reports of a TDX module (Intel TDX Module ABI Specification, TDREPORT_STRUCT).
//!
//! ```text
//!   0 type 0x81, version   16 CPU's security versions   32 SHA-384 of what the platform is   80 SHA-384 of what the TD is
//! 128 the TD's own data   224 authentication code   256 what the platform is: 239 bytes   512 what the TD is: 512 bytes
//! ```

use ring::digest::{SHA384, digest};
use ring::hmac;

/// Bytes of a report.
pub const LEN: usize = 1024;
/// The report's own security versions: SGX's components and TDX's.
pub const CPU_SVN: [u8; 16] = [3; 16];
/// Security versions of the TDX module: the first is its own, the second that of no later module.
pub const TEE_TCB_SVN: [u8; 16] = [5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// Where parts begin.
const MAC: usize = 224;
pub const DATA: usize = 128;
pub const PLATFORM: usize = 256;
pub const TRUST_DOMAIN: usize = 512;
/// Bytes of what the platform is.
const PLATFORM_LEN: usize = 239;

/// What a report says of a trust domain. Each register has bytes of its own, so that none can pass for another.
#[derive(Debug, Clone)]
pub struct Registers {
    /// ATTRIBUTES, little-endian.
    pub attributes: u64,
    /// XFAM, little-endian.
    pub xfam: u64,
    /// MRTD, MRCONFIGID, MROWNER, MROWNERCONFIG, RTMR0, 1, 2 and 3.
    pub measurements: [[u8; 48]; 8],
    /// The TD's own data.
    pub data: [u8; 64],
}

impl Default for Registers {
    fn default() -> Self {
        Self {
            // SEPT_VE_DISABLE alone, without which verifiers refuse a TD.
            attributes: 1 << 28,
            xfam: 0xe7,
            measurements: [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88].map(|byte| [byte; 48]),
            data: [0x99; 64],
        }
    }
}

/// The report that a module, whose authentication codes are made with `key`, makes of a trust domain.
pub fn report(key: &hmac::Key, registers: &Registers) -> [u8; LEN] {
    let mut report = [0; LEN];
    let mut put = |at: usize, bytes: &[u8]| report[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &[0x81]);
    put(16, &CPU_SVN);
    put(DATA, &registers.data);
    // Which of the fields behind it are there.
    put(PLATFORM, &[0xff, 1]);
    put(PLATFORM + 8, &TEE_TCB_SVN);
    put(PLATFORM + 24, &[0xaa; 48]);
    put(TRUST_DOMAIN, &registers.attributes.to_le_bytes());
    put(TRUST_DOMAIN + 8, &registers.xfam.to_le_bytes());
    for (at, measurement) in (TRUST_DOMAIN + 16..).step_by(48).zip(&registers.measurements) {
        put(at, measurement);
    }
    let hashes = hashes(&report);
    report[32..128].copy_from_slice(&hashes);
    let code = hmac::sign(key, &report[..MAC]);
    report[MAC..PLATFORM].copy_from_slice(code.as_ref());
    report
}

/// Whether a report is one of the module's, as a quoting enclave asks the processor.
pub fn is_genuine(key: &hmac::Key, report: &[u8; LEN]) -> bool {
    let hashed = report[32..128] == hashes(report);
    hashed && hmac::verify(key, &report[..MAC], &report[MAC..PLATFORM]).is_ok()
}

/// The hashes of both of its parts.
fn hashes(report: &[u8; LEN]) -> Vec<u8> {
    let platform = digest(&SHA384, &report[PLATFORM..PLATFORM + PLATFORM_LEN]);
    let trust_domain = digest(&SHA384, &report[TRUST_DOMAIN..]);
    [platform.as_ref(), trust_domain.as_ref()].concat()
}
