//! Loading a kernel file of any content: the loader says no, or loads it and writes to its own places only.

use std::fs::File;
use std::os::unix::fs::FileExt;

use arch::{BootSource, Platform, Protocol, Topology, layout, load_kernel};
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::input::Step;

/// Little RAM, so that looking through all of it is fast.
const RAM: u64 = 2 << 20;
const PAGE: usize = 4096;

thread_local! {
    /// All zeros between two inputs.
    static MEMORY: GuestMemoryMmap = {
        let ranges: Vec<_> = layout::ram_ranges(RAM)
            .into_iter()
            .map(|range| (GuestAddress(range.start), usize::try_from(range.len).expect("a length")))
            .collect();
        GuestMemoryMmap::from_ranges(&ranges).expect("guest memory")
    };
}

fn file(content: &[u8]) -> File {
    let file = File::from(memfd_create(c"file", MFdFlags::MFD_CLOEXEC).expect("memory for a file"));
    file.write_all_at(content, 0).expect("the file's content");
    file
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
        let result = load_kernel(memory, &platform, &source);
        let mut allowed = Vec::new();
        match &result {
            Ok(loaded) => {
                let end = loaded.kernel.start + loaded.kernel.len;
                assert!(loaded.kernel.start >= layout::HIGH_RAM_START && end <= RAM, "{loaded:?}");
                assert!((loaded.kernel.start..end).contains(&loaded.registers.regs.rip), "{loaded:?}");
                allowed.push(layout::PVH_START_INFO..layout::PAGE_TABLES + 8 * layout::PAGE_SIZE);
                allowed.push(layout::CMDLINE..layout::CMDLINE + layout::CMDLINE_MAX);
                allowed.push(layout::RESET_VECTOR..layout::RESET_VECTOR + 16);
                allowed.push(loaded.kernel.start..end);
                if let Some(initramfs) = &loaded.initramfs {
                    let past = initramfs.start + initramfs.len;
                    assert!(initramfs.start >= end && past <= RAM, "{loaded:?}");
                    allowed.push(initramfs.start..past);
                }
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
        let mut bytes = [0; PAGE];
        for page in (0..RAM).step_by(PAGE) {
            memory.read_slice(&mut bytes, GuestAddress(page)).expect("guest memory");
            if bytes == [0; PAGE] {
                continue;
            }
            let written = (page..).zip(bytes).filter(|(_, byte)| *byte != 0).map(|(at, _)| at);
            for at in written {
                assert!(allowed.iter().any(|range| range.contains(&at)), "{at:#x} was written: {result:?}");
            }
            memory.write_slice(&[0; PAGE], GuestAddress(page)).expect("guest memory");
        }
    });
}
