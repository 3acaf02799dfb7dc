//! KVM's own counters of a vCPU: its binary statistics (Linux, `Documentation/virt/kvm/api.rst`, `KVM_GET_STATS_FD`).
//!
//! A descriptor gives a header, a list of what is counted, and the numbers, all at offsets that the header tells.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{
    KVM_STATS_TYPE_CUMULATIVE, KVM_STATS_TYPE_MASK, KVM_STATS_UNIT_MASK, KVM_STATS_UNIT_NONE, KVMIO, kvm_stats_desc,
    kvm_stats_header,
};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::{Counter, Counters, Error, Result};

ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Bytes of the header and of a description without its name.
const HEADER: usize = size_of::<kvm_stats_header>();
const DESCRIPTION: usize = size_of::<kvm_stats_desc>();
/// More than any kernel has.
const MOST_COUNTERS: u32 = 1024;
const LONGEST_NAME: u32 = 256;

/// The counters of one vCPU. Any thread may read them, while the vCPU runs, too.
pub(super) struct KvmCounters {
    file: File,
    /// Names, each with the place of its number in the file.
    places: Vec<(String, u64)>,
}

impl KvmCounters {
    /// Asks KVM for the counters behind `vcpu`; `None` where this kernel has none (before Linux 5.14).
    pub(super) fn open(vcpu: &impl AsRawFd) -> Option<Self> {
        let file = stats_file(vcpu)?;
        let places = places(&file)?;
        Some(Self { file, places })
    }
}

impl Counters for KvmCounters {
    fn read(&self) -> Result<Vec<Counter>> {
        let read = |(name, at): &(String, u64)| {
            let mut bytes = [0; 8];
            self.file
                .read_exact_at(&mut bytes, *at)
                .map_err(|error| Error::system("read of KVM's statistics", error))?;
            Ok(Counter { name: name.clone(), value: u64::from_ne_bytes(bytes) })
        };
        self.places.iter().map(read).collect()
    }
}

#[expect(unsafe_code, reason = "kvm-ioctls does not know this call")]
fn stats_file(vcpu: &impl AsRawFd) -> Option<File> {
    // SAFETY: the descriptor is a vCPU's, and this call has no argument.
    let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
    // SAFETY: the call gave a new descriptor that nothing else owns.
    (fd >= 0).then(|| unsafe { File::from_raw_fd(fd) })
}

/// Everything that is counted up from 0, one number each.
fn places(file: &File) -> Option<Vec<(String, u64)>> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0).ok()?;
    // Flags, size of a name, number of descriptions, and the offsets of an id, the descriptions and the numbers.
    let word = |at: usize| header.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes);
    let (name_len, count) = (word(4)?.min(LONGEST_NAME), word(8)?.min(MOST_COUNTERS));
    let (descriptions, numbers) = (u64::from(word(16)?), u64::from(word(20)?));
    let length = DESCRIPTION.checked_add(usize::try_from(name_len).ok()?)?;
    let mut places = Vec::new();
    for index in 0..u64::from(count) {
        let mut description = vec![0; length];
        file.read_exact_at(&mut description, descriptions + index * u64::try_from(length).ok()?).ok()?;
        // Flags (4 bytes), exponent (2), numbers (2), offset (4), size of a bucket (4), and the name.
        let flags = u32::from_ne_bytes(description.get(0..4)?.try_into().ok()?);
        let size = u16::from_ne_bytes(description.get(6..8)?.try_into().ok()?);
        let offset = u32::from_ne_bytes(description.get(8..12)?.try_into().ok()?);
        let counts = flags & KVM_STATS_TYPE_MASK == KVM_STATS_TYPE_CUMULATIVE
            && flags & KVM_STATS_UNIT_MASK == KVM_STATS_UNIT_NONE;
        if counts && size == 1 {
            let name = description.get(DESCRIPTION..)?.split(|byte| *byte == 0).next()?;
            places.push((String::from_utf8_lossy(name).into_owned(), numbers + u64::from(offset)));
        }
    }
    Some(places)
}
