//! The bzImage format: a setup header, real-mode code that is not used here, and the decompressor with its payload
//! (Linux, `Documentation/arch/x86/boot.rst`).

use hal::GpaRange;
use linux_loader::bootparam::{LOADED_HIGH, XLF_KERNEL_64, setup_header};
use vm_memory::ByteValued;

use super::super::layout;
use super::error::KernelError;
use super::map::MemoryMap;
use super::plan::{Kernel, KernelFile, Piece};

/// Where the setup header begins in the file.
const HEADER_OFFSET: u64 = 0x1f1;
/// Where "HdrS" stands in the file, and in the header.
const MAGIC_OFFSET: usize = 0x202;
const MAGIC_IN_HEADER: usize = 0x11;
const MAGIC: &[u8; 4] = b"HdrS";
/// The byte that tells where the header ends: that many bytes behind [`MAGIC_OFFSET`].
const LENGTH_OFFSET: usize = 0x201;

/// The oldest protocol with the field `xloadflags`, which tells of the 64-bit entry point: 2.12, Linux 3.8.
const OLDEST_VERSION: u16 = 0x020c;
/// The 64-bit entry point, from the start of the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// Real-mode code is counted in these.
const SECTOR: u64 = 512;
/// The protected-mode code is counted in these.
const PARAGRAPH: u64 = 16;

/// Whether a file that begins like this is a bzImage, perhaps a bad one.
pub(super) fn is_bzimage(head: &[u8]) -> bool {
    head.get(MAGIC_OFFSET..).is_some_and(|rest| rest.starts_with(MAGIC))
}

/// Reads the setup header.
pub(super) fn plan(file: &KernelFile, map: &MemoryMap) -> Result<Kernel, KernelError> {
    let header = read_header(file)?;
    check_header(&header)?;

    let setup_size = setup_size(&header);
    let code_size = u64::from(header.syssize) * PARAGRAPH;
    // The last paragraph need not be full.
    let least = code_size.saturating_sub(PARAGRAPH - 1).max(ENTRY_64 + 1);
    file.check(setup_size, least, "its protected-mode code")?;
    let payload = file.size() - setup_size;

    let (load, range) = place(&header, payload, map)?;
    Ok(Kernel {
        pieces: vec![Piece { file_offset: setup_size, to: GpaRange { start: load, len: payload } }],
        range,
        linux64_entry: load + ENTRY_64,
        pvh_entry: None,
        cmdline_max: header.cmdline_size.into(),
        initramfs_max: header.initrd_addr_max.into(),
        header: Some(header),
    })
}

/// The bytes in front of the protected-mode code: the boot sector, and the sectors of real-mode code. 0 of them stand for
/// 4, from times before the field (boot.rst, `setup_sects`).
pub(super) fn setup_size(header: &setup_header) -> u64 {
    let setup_sectors = if header.setup_sects == 0 { 4 } else { u64::from(header.setup_sects) };
    (setup_sectors + 1) * SECTOR
}

/// The header as far as the file says it goes; what a newer kernel has beyond our structure is left out, what an older
/// one lacks is zero.
pub(super) fn read_header(file: &KernelFile) -> Result<setup_header, KernelError> {
    let mut header = setup_header::default();
    let length = file.head().get(LENGTH_OFFSET).copied().unwrap_or(0);
    let len = (MAGIC_IN_HEADER + usize::from(length)).min(size_of::<setup_header>());
    let bytes = file.bytes(HEADER_OFFSET, len, "its setup header")?;
    for (to, from) in header.as_mut_slice().iter_mut().zip(bytes.iter()) {
        *to = *from;
    }
    Ok(header)
}

pub(super) fn check_header(header: &setup_header) -> Result<(), KernelError> {
    let version = header.version;
    if version < OLDEST_VERSION {
        return Err(KernelError::BzImage {
            is: format!("speaks boot protocol {}.{:02}", version >> 8, version & 0xff),
            remedy: "2.12 or later is needed (Linux 3.8)",
        });
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return Err(KernelError::BzImage {
            is: "is a zImage, loaded below 1 MiB".to_owned(),
            remedy: "a bzImage is needed",
        });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::BzImage {
            is: "holds a 32-bit kernel without a 64-bit entry point".to_owned(),
            remedy: "a kernel for x86-64 is needed",
        });
    }
    Ok(())
}

/// Chooses where the protected-mode code goes, and tells all memory that the kernel needs until it is up.
///
/// A relocatable kernel goes to its preferred address, where its decompressor need not move it first. Another must go
/// to 1 MiB, and decompresses itself to the preferred address.
fn place(header: &setup_header, payload: u64, map: &MemoryMap) -> Result<(u64, GpaRange), KernelError> {
    let preferred = header.pref_address;
    let ram = map.kernel_ram();
    let load = if header.relocatable_kernel != 0 { preferred } else { layout::HIGH_RAM_START };
    let start = load.min(preferred);
    if start < ram.start() {
        return Err(KernelError::BzImage {
            is: format!("prefers to be loaded at {preferred:#x}, in the area of boot data"),
            remedy: "an address of 0x100000 or more is needed",
        });
    }
    let runs_to = preferred.saturating_add(header.init_size.into());
    let end = load.saturating_add(payload).max(runs_to);
    if end > layout::HOLE_START {
        return Err(KernelError::BzImage {
            is: format!("needs memory from {start:#x} up to {end:#x}"),
            remedy: "a kernel that stays below 0xc0000000 is needed",
        });
    }
    if end > ram.end() {
        return Err(KernelError::DoesNotFit { end, ram_end: ram.end(), mib: end.div_ceil(1 << 20) });
    }
    Ok((load, GpaRange { start, len: end - start }))
}
