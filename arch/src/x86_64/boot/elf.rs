//! ELF executables: a `vmlinux` or a guest of another making.
//!
//! The structures are linux-loader's; the reading is not, since every field is checked against the file and the
//! memory before anything is loaded, and since a file may have several note segments.

use hal::GpaRange;
use linux_loader::elf::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, EM_386, EM_AARCH64, EM_ARM, EM_RISCV, EM_X86_64, ET_CORE, ET_DYN,
    ET_EXEC, ET_REL, Elf64_Ehdr, Elf64_Nhdr, Elf64_Phdr, PT_LOAD, PT_NOTE,
};
use vm_memory::ByteValued;

use super::super::layout;
use super::error::KernelError;
use super::map::{MemoryMap, Span};
use super::plan::{Kernel, KernelFile, Piece};

/// More program headers than any kernel has.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// More notes than any kernel has, in bytes.
const MAX_NOTES: u64 = 0x1_0000;
/// The note that tells the PVH entry point: a 32-bit physical address (Xen, `public/elfnote.h`).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Where an initramfs may end: the limit that every x86-64 bzImage states.
const INITRAMFS_MAX: u64 = 0x7fff_ffff;

/// Whether a file that begins like this is an ELF file, perhaps a bad one.
pub(super) fn is_elf(head: &[u8]) -> bool {
    head.starts_with(b"\x7fELF")
}

/// Reads the headers.
pub(super) fn plan(file: &KernelFile, map: &MemoryMap) -> Result<Kernel, KernelError> {
    let header: Elf64_Ehdr = parse(&file.bytes(0, size_of::<Elf64_Ehdr>(), "the ELF header")?);
    check_header(&header)?;
    let programs = read_program_headers(file, &header)?;

    let mut segments = Vec::new();
    let mut pvh_entry = None;
    for (index, program) in programs.iter().enumerate() {
        match program.p_type {
            PT_LOAD if program.p_memsz > 0 || program.p_filesz > 0 => {
                segments.push(Segment::new(index, program, file, map)?)
            }
            PT_NOTE if pvh_entry.is_none() => pvh_entry = find_pvh_entry(index, program, file)?,
            _ => {}
        }
    }
    segments.sort_by_key(|segment| segment.memory.start());
    let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
        return Err(not_executable("has no segment to load", "a linked kernel (vmlinux)"));
    };
    let range = GpaRange { start: first.memory.start(), len: last.memory.end() - first.memory.start() };
    check_overlap(&segments)?;
    Ok(Kernel {
        pieces: segments.iter().map(|segment| segment.piece).filter(|piece| piece.to.len > 0).collect(),
        range,
        linux64_entry: header.e_entry,
        pvh_entry,
        header: None,
        cmdline_max: layout::CMDLINE_MAX - 1,
        initramfs_max: INITRAMFS_MAX,
    })
}

/// Where the file ends by its headers: behind the last segment, or the table of section headers.
pub(super) fn end(file: &KernelFile) -> Result<u64, KernelError> {
    let header: Elf64_Ehdr = parse(&file.bytes(0, size_of::<Elf64_Ehdr>(), "the ELF header")?);
    let sections = u64::from(header.e_shentsize) * u64::from(header.e_shnum);
    let segments = read_program_headers(file, &header)?;
    let ends = segments.iter().map(|segment| segment.p_offset.saturating_add(segment.p_filesz));
    Ok(ends.max().unwrap_or(0).max(header.e_shoff.saturating_add(sections)))
}

/// A segment to load, in memory and in the file.
struct Segment {
    /// Its program header, counted from 0.
    index: usize,
    memory: Span,
    piece: Piece,
}

impl Segment {
    fn new(index: usize, program: &Elf64_Phdr, file: &KernelFile, map: &MemoryMap) -> Result<Self, KernelError> {
        let wrong = |problem| KernelError::Segment { index, problem };
        let Elf64_Phdr { p_offset, p_filesz, p_memsz, p_paddr, .. } = *program;
        if p_filesz > p_memsz {
            return Err(wrong(format!(
                "takes {p_filesz:#x} bytes from the file and {p_memsz:#x} in memory: the latter must not be less"
            )));
        }
        // What takes nothing from the file may state any offset.
        if p_filesz > 0 {
            file.check(p_offset, p_filesz, &format!("ELF segment {index}"))?;
        }
        let ram = map.kernel_ram();
        let end = p_paddr.checked_add(p_memsz).filter(|end| *end <= layout::HOLE_START).ok_or_else(|| {
            wrong(format!(
                "with {p_memsz:#x} bytes at {p_paddr:#x} goes beyond {:#x}, the end of RAM below 4 GiB",
                layout::HOLE_START
            ))
        })?;
        if p_paddr < ram.start() {
            return Err(wrong(format!(
                "starts at {p_paddr:#x}, in the area of boot data and ACPI tables: it must start at {:#x} or above",
                ram.start()
            )));
        }
        if end > ram.end() {
            return Err(KernelError::DoesNotFit { end, ram_end: ram.end(), mib: end.div_ceil(1 << 20) });
        }
        let to = GpaRange { start: p_paddr, len: p_filesz };
        Ok(Self { index, memory: Span::new(p_paddr, end), piece: Piece { file_offset: p_offset, to } })
    }
}

/// Takes a structure from as many bytes as it has.
fn parse<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    for (to, from) in value.as_mut_slice().iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}

fn not_executable(is: impl Into<String>, must_be: &'static str) -> KernelError {
    KernelError::Elf { is: is.into(), must_be }
}

fn check_header(header: &Elf64_Ehdr) -> Result<(), KernelError> {
    if header.e_ident[EI_DATA] != ELFDATA2LSB {
        return Err(not_executable("is not little-endian", "an executable for x86-64"));
    }
    // The machine stands at the same place in 32-bit files, and says more than the class.
    if header.e_machine != EM_X86_64 {
        let machine = match header.e_machine {
            EM_386 => "32-bit x86",
            EM_ARM => "32-bit ARM",
            EM_AARCH64 => "aarch64",
            EM_RISCV => "RISC-V",
            other => return Err(not_executable(format!("is for machine {other}"), "for machine 62 (x86-64)")),
        };
        return Err(not_executable(format!("is for {machine}"), "for x86-64"));
    }
    if header.e_ident[EI_CLASS] != ELFCLASS64 {
        return Err(not_executable("is a 32-bit one", "a 64-bit one"));
    }
    let kind = match header.e_type {
        ET_EXEC => return Ok(()),
        ET_REL => "is a relocatable object or a kernel module",
        ET_DYN => "is a shared object or a position-independent program",
        ET_CORE => "is a core dump",
        _ => "is of an unknown type",
    };
    Err(not_executable(kind, "an executable (ET_EXEC), as vmlinux is"))
}

fn read_program_headers(file: &KernelFile, header: &Elf64_Ehdr) -> Result<Vec<Elf64_Phdr>, KernelError> {
    let size = size_of::<Elf64_Phdr>();
    if usize::from(header.e_phentsize) != size {
        let is = format!("has program headers of {} bytes", header.e_phentsize);
        return Err(not_executable(is, "with program headers of 56 bytes"));
    }
    if header.e_phnum == 0 || header.e_phnum > MAX_PROGRAM_HEADERS {
        let is = format!("has {} program headers", header.e_phnum);
        return Err(not_executable(is, "with 1 to 128 of them"));
    }
    let table = file.bytes(header.e_phoff, size * usize::from(header.e_phnum), "the table of ELF program headers")?;
    Ok(table.chunks_exact(size).map(parse).collect())
}

/// Checks segments that are sorted by address.
fn check_overlap(segments: &[Segment]) -> Result<(), KernelError> {
    for pair in segments.windows(2) {
        if let [first, second] = pair
            && first.memory.end() > second.memory.start()
        {
            return Err(KernelError::Overlap { first: first.index, second: second.index, at: second.memory.start() });
        }
    }
    Ok(())
}

/// Looks through a note segment for the PVH entry point.
fn find_pvh_entry(index: usize, program: &Elf64_Phdr, file: &KernelFile) -> Result<Option<u32>, KernelError> {
    let wrong = |problem| KernelError::Segment { index, problem };
    let size = match usize::try_from(program.p_filesz) {
        Ok(size) if program.p_filesz <= MAX_NOTES => size,
        _ => {
            return Err(wrong(format!(
                "holds {:#x} bytes of notes: at most {MAX_NOTES:#x} are read",
                program.p_filesz
            )));
        }
    };
    // Notes of segments that are aligned to 8 bytes are padded to 8, all others to 4.
    let align = if program.p_align == 8 { 8 } else { 4 };
    let notes = file.bytes(program.p_offset, size, &format!("ELF segment {index}"))?;
    let mut rest: &[u8] = &notes;
    let header_size = size_of::<Elf64_Nhdr>();
    while let Some((header, body)) = rest.split_at_checked(header_size) {
        let header: Elf64_Nhdr = parse(header);
        let Some((name, description, next)) = split_note(&header, body, align) else {
            return Err(wrong("holds a note that is longer than the segment".to_owned()));
        };
        if header.n_type == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
            return pvh_entry(description)
                .map(Some)
                .ok_or_else(|| wrong("holds a PVH entry point that is no 32-bit address".to_owned()));
        }
        rest = next;
    }
    Ok(None)
}

/// A note's name and description, and what comes behind it.
fn split_note<'a>(header: &Elf64_Nhdr, body: &'a [u8], align: usize) -> Option<(&'a [u8], &'a [u8], &'a [u8])> {
    let name_size = usize::try_from(header.n_namesz).ok()?;
    let description_size = usize::try_from(header.n_descsz).ok()?;
    let header_size = size_of::<Elf64_Nhdr>();
    // The padding counts from the start of the note.
    let description_at = header_size.checked_add(name_size)?.checked_next_multiple_of(align)? - header_size;
    let description_end = description_at.checked_add(description_size)?;
    let next =
        (header_size.checked_add(description_end)?.checked_next_multiple_of(align)? - header_size).min(body.len());
    Some((body.get(..name_size)?, body.get(description_at..description_end)?, body.get(next..)?))
}

/// The entry point in a note: 4 bytes, or 8 of which the upper are zero.
fn pvh_entry(description: &[u8]) -> Option<u32> {
    let value = match *description {
        [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
        [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
        _ => return None,
    };
    u32::try_from(value).ok()
}
