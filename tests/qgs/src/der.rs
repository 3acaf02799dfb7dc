//! The few bytes of DER that nobody else writes: the extension of a platform's certificate (Intel SGX PCK Certificate and
//! CRL Profile Specification, §1.3.5).

const INTEGER: u8 = 0x02;
const OCTETS: u8 = 0x04;
const OID: u8 = 0x06;
const ENUMERATED: u8 = 0x0a;
const SEQUENCE: u8 = 0x30;

/// 1.2.840.113741.1.13.1, Intel's SGX extension, without tag and length.
const SGX: [u8; 9] = [0x2a, 0x86, 0x48, 0x86, 0xf8, 0x4d, 0x01, 0x0d, 0x01];

/// The same as numbers.
pub const SGX_EXTENSION: [u64; 7] = [1, 2, 840, 113_741, 1, 13, 1];

/// What the extension says of a platform.
pub struct Sgx {
    /// The platform's provisioning id.
    pub ppid: [u8; 16],
    /// Security versions of the processor's sixteen components.
    pub cpu_svn: [u8; 16],
    /// That of the provisioning certification enclave.
    pub pce_svn: u8,
    /// Family, model, stepping and configuration.
    pub fmspc: [u8; 6],
}

impl Sgx {
    /// The extension's value.
    pub fn der(&self) -> Vec<u8> {
        let mut components: Vec<Vec<u8>> =
            (1..).zip(self.cpu_svn).map(|(n, svn)| entry(&[2, n], INTEGER, &[svn])).collect();
        components.push(entry(&[2, 17], INTEGER, &[self.pce_svn]));
        components.push(entry(&[2, 18], OCTETS, &self.cpu_svn));
        let entries = [
            entry(&[1], OCTETS, &self.ppid),
            entry(&[2], SEQUENCE, &components.concat()),
            entry(&[3], OCTETS, &[0, 0]),
            entry(&[4], OCTETS, &self.fmspc),
            entry(&[5], ENUMERATED, &[0]),
        ];
        value(SEQUENCE, &entries.concat())
    }
}

/// The number of something below [`SGX`], and its value.
fn entry(below: &[u8], tag: u8, content: &[u8]) -> Vec<u8> {
    let oid = value(OID, &[&SGX, below].concat());
    value(SEQUENCE, &[oid, value(tag, content)].concat())
}

fn value(tag: u8, content: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(content.len()).expect("short values").to_be_bytes();
    let head = match (high, low) {
        (0, ..0x80) => vec![tag, low],
        (0, _) => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [&head, content].concat()
}
