//! Makes kernel images, and guest memory to load them into.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::super::super::{Platform, Topology};
use super::super::{BootError, BootSource, KernelImage, LoadedKernel, Protocol, load_kernel};
use crate::layout;

pub const MIB: u64 = 1 << 20;

pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

/// RAM of this size at its places.
pub fn memory(bytes: u64) -> GuestMemoryMmap {
    let ranges: Vec<_> = layout::ram_ranges(bytes)
        .into_iter()
        .map(|range| (GuestAddress(range.start), usize::try_from(range.len).unwrap()))
        .collect();
    GuestMemoryMmap::from_ranges(&ranges).unwrap()
}

pub fn platform(ram: u64) -> Platform {
    Platform::direct_boot(ram, 46, Topology::flat(1).unwrap()).unwrap()
}

/// What to load, with the defaults of most tests.
pub struct Case<'a> {
    pub kernel: &'a [u8],
    pub initramfs: Option<&'a [u8]>,
    pub cmdline: &'a str,
    pub protocol: Option<Protocol>,
    pub unpacked: Option<&'a dyn KernelImage>,
    pub random: Option<[u64; 2]>,
    pub gigabyte_pages: bool,
    pub ram: u64,
}

impl<'a> Case<'a> {
    pub fn new(kernel: &'a [u8]) -> Self {
        let cmdline = "console=ttyS0";
        Self {
            kernel,
            initramfs: None,
            cmdline,
            protocol: None,
            unpacked: None,
            random: None,
            gigabyte_pages: true,
            ram: 256 * MIB,
        }
    }

    pub fn load_into(&self, memory: &GuestMemoryMmap) -> Result<LoadedKernel, BootError> {
        let (kernel, initramfs) = (file(self.kernel), self.initramfs.map(file));
        let source = BootSource {
            kernel: &kernel,
            initramfs: initramfs.as_ref(),
            cmdline: self.cmdline,
            protocol: self.protocol,
            gigabyte_pages: self.gigabyte_pages,
            unpacked: self.unpacked,
            share: false,
            random: self.random,
        };
        load_kernel(memory, &platform(self.ram), &source)
    }

    pub fn load(&self) -> (LoadedKernel, GuestMemoryMmap) {
        let memory = memory(self.ram);
        (self.load_into(&memory).unwrap(), memory)
    }

    /// The message of the error.
    pub fn error(&self) -> String {
        self.load_into(&memory(self.ram)).unwrap_err().to_string()
    }
}

pub fn read(memory: &GuestMemoryMmap, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    bytes
}

pub fn u64_at(memory: &GuestMemoryMmap, at: u64) -> u64 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

pub fn u32_at(memory: &GuestMemoryMmap, at: u64) -> u32 {
    memory.read_obj(GuestAddress(at)).unwrap()
}

/// Walks 4-level page tables as a processor does.
pub fn translate(memory: &GuestMemoryMmap, cr3: u64, address: u64) -> Option<u64> {
    let mut table = cr3;
    for shift in [39, 30, 21, 12] {
        let entry = u64_at(memory, table + (address >> shift & 0x1ff) * 8);
        if entry & 1 == 0 {
            return None;
        }
        let frame = entry & 0x000f_ffff_ffff_f000;
        if entry & 0x80 != 0 {
            return Some(frame | address & ((1 << shift) - 1));
        }
        table = frame;
    }
    None
}

/// A program header and what the file holds for it.
#[derive(Clone)]
pub struct Segment {
    pub kind: u32,
    pub address: u64,
    pub contents: Vec<u8>,
    pub memory_size: u64,
    pub align: u64,
}

pub fn load(address: u64, contents: &[u8], memory_size: u64) -> Segment {
    Segment { kind: 1, address, contents: contents.to_vec(), memory_size, align: 4096 }
}

pub fn notes(contents: &[u8], align: u64) -> Segment {
    Segment { kind: 4, address: 0, contents: contents.to_vec(), memory_size: 0, align }
}

/// A note, padded to `align` bytes.
pub fn note(name: &[u8], kind: u32, description: &[u8], align: usize) -> Vec<u8> {
    let word = |value: usize| u32::try_from(value).unwrap().to_le_bytes();
    let mut note = [word(name.len()), word(description.len()), kind.to_le_bytes()].concat();
    note.extend_from_slice(name);
    note.resize(note.len().next_multiple_of(align), 0);
    note.extend_from_slice(description);
    note.resize(note.len().next_multiple_of(align), 0);
    note
}

pub fn pvh_note(entry: u32) -> Segment {
    notes(&note(b"Xen\0", 18, &entry.to_le_bytes(), 4), 4)
}

/// An x86-64 executable: ELF header, program headers, then the contents one behind the other.
pub fn elf(entry: u64, segments: &[Segment]) -> Vec<u8> {
    let count = u16::try_from(segments.len()).unwrap();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(2u16.to_le_bytes()); // ET_EXEC
    image.extend(62u16.to_le_bytes()); // EM_X86_64
    image.extend(1u32.to_le_bytes());
    image.extend(entry.to_le_bytes());
    image.extend(64u64.to_le_bytes()); // e_phoff
    image.extend(0u64.to_le_bytes());
    image.extend(0u32.to_le_bytes());
    for half in [64, 56, count, 64, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    let mut offset = 64 + 56 * u64::from(count);
    for segment in segments {
        let size = u64::try_from(segment.contents.len()).unwrap();
        image.extend(segment.kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [offset, segment.address, segment.address, size, segment.memory_size, segment.align] {
            image.extend(word.to_le_bytes());
        }
        offset += size;
    }
    for segment in segments {
        image.extend_from_slice(&segment.contents);
    }
    image
}

pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A relocatable 64-bit bzImage of protocol 2.15 that prefers 16 MiB and needs 4 MiB there. Its code is `code`.
pub fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 2 * 512];
    put(&mut image, 0x1f1, &[1]); // setup_sects
    let paragraphs = u32::try_from(code.len().div_ceil(16)).unwrap();
    put(&mut image, 0x1f4, &paragraphs.to_le_bytes()); // syssize
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]); // boot_flag, jump
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020fu16.to_le_bytes()); // version
    put(&mut image, 0x211, &[1]); // loadflags: LOADED_HIGH
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes()); // initrd_addr_max
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes()); // kernel_alignment
    put(&mut image, 0x234, &[1, 21]); // relocatable_kernel, min_alignment
    put(&mut image, 0x236, &3u16.to_le_bytes()); // xloadflags: KERNEL_64, CAN_BE_LOADED_ABOVE_4G
    put(&mut image, 0x238, &2047u32.to_le_bytes()); // cmdline_size
    put(&mut image, 0x258, &(16 * MIB).to_le_bytes()); // pref_address
    put(&mut image, 0x260, &0x40_0000u32.to_le_bytes()); // init_size
    image.extend_from_slice(code);
    image
}

/// Code of a bzImage that can be told from zeros.
pub fn code(len: usize) -> Vec<u8> {
    (0..len).map(|at| u8::try_from(at % 251).unwrap() | 1).collect()
}
