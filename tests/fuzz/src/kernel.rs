//! Loading a kernel file of any content: the loader says no, or loads it and writes to its own places only.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use arch::{BootSource, Platform, Protocol, Topology, layout, load_kernel};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::input::Step;
use crate::memory::{Memory, PAGE};

/// Little RAM, most of which a kernel may fill.
const RAM: u64 = 2 << 20;

thread_local! {
    /// All zeros between two inputs.
    static MEMORY: Memory = Memory::new(RAM);
}

/// A file of this content.
pub(crate) fn file(content: &[u8]) -> File {
    let file = File::from(memfd_create(c"file", MFdFlags::MFD_CLOEXEC).expect("memory for a file"));
    file.write_all_at(content, 0).expect("the file's content");
    file
}

/// Bytes of guest memory.
pub(crate) fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).expect("guest memory");
    bytes
}

/// Where the loader puts what it tells a kernel.
pub(crate) fn boot_data() -> Vec<Range<u64>> {
    vec![
        layout::PVH_START_INFO..layout::PAGE_TABLES + 8 * layout::PAGE_SIZE,
        layout::CMDLINE..layout::CMDLINE + layout::CMDLINE_MAX,
        layout::RESET_VECTOR..layout::RESET_VECTOR + 16,
    ]
}

/// Loads `content`. `how` is the protocol, the length of the initramfs in pages, whether vCPUs have pages of 1 GiB, and
/// the length of the command line.
pub fn load(how: Step, content: &[u8]) {
    let cmdline = "k".repeat(usize::from(how.d_low()) % 0x1_1000);
    let initramfs = file(&vec![b'i'; usize::from(how.b) * PAGE]);
    let kernel = file(content);
    let source = BootSource {
        kernel: &kernel,
        initramfs: (how.b > 0).then_some(&initramfs),
        cmdline: &cmdline,
        protocol: [None, Some(Protocol::Linux64), Some(Protocol::Pvh)][usize::from(how.a % 3)],
        gigabyte_pages: how.c & 1 != 0,
        unpacked: None,
        share: false,
        random: None,
    };
    let topology = Topology::flat(1).expect("one processor");
    let platform = Platform::direct_boot(RAM, 46, topology).expect("a platform");
    MEMORY.with(|memory| {
        let result = load_kernel(memory.map(), &platform, &source);
        let mut allowed = Vec::new();
        match &result {
            Ok(loaded) => {
                let end = loaded.kernel.start + loaded.kernel.len;
                assert!(loaded.kernel.start >= layout::HIGH_RAM_START && end <= RAM, "{loaded:?}");
                assert!((loaded.kernel.start..end).contains(&loaded.registers.regs.rip), "{loaded:?}");
                allowed = boot_data();
                allowed.push(loaded.kernel.start..end);
                if let Some(initramfs) = &loaded.initramfs {
                    let past = initramfs.start + initramfs.len;
                    assert!(initramfs.start >= end && past <= RAM, "{loaded:?}");
                    allowed.push(initramfs.start..past);
                }
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        memory.check(&allowed, &result);
        memory.clear();
    });
}
