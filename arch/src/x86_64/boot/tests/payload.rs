//! What is in a bzImage: found, unpacked, moved, or refused without a trace in guest memory.

use std::io::Write;

use vm_memory::{Bytes, GuestAddress};

use super::super::payload::{Packed, PayloadError, unpack};
use super::super::{BootError, Protocol};
use super::images::*;
use crate::layout;

const TEXT: u64 = 16 * MIB;
/// Where the text is linked to run.
const VIRTUAL: u64 = 0xffff_ffff_8100_0000;
const TEXT_LEN: usize = 0x9000;
const DATA: u64 = 8 * MIB;
const MEMORY_LEN: u64 = 9 * MIB;
const GIB: u64 = 1 << 30;

/// The places of a relocation table, counted from the start of the text.
#[derive(Clone, Copy)]
struct Table<'a> {
    wide: &'a [u64],
    inverse: Option<&'a [u64]>,
    narrow: &'a [u64],
}

const TABLE: Table = Table {
    // Aligned and not, in two segments, next to each other, and at the very end.
    wide: &[0x1000, 0x1009, 0x11, DATA + 8, MEMORY_LEN - 8],
    inverse: Some(&[0x2000, 0x2fff, DATA + 0x20]),
    narrow: &[0x3000, 0x3004, 0x400b, TEXT_LEN as u64 - 4],
};

impl Table<'_> {
    fn bytes(&self) -> Vec<u8> {
        let list = |places: &[u64]| {
            let words = places.iter().map(|place| u32::try_from((VIRTUAL + place) & 0xffff_ffff).unwrap());
            std::iter::once(0).chain(words).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()
        };
        [list(self.wide), self.inverse.map(list).unwrap_or_default(), list(self.narrow)].concat()
    }
}

/// A kernel of text and data, linked for 16 MiB, without a table.
fn vmlinux() -> Vec<u8> {
    elf(TEXT + 0x200, &[load(TEXT, &code(TEXT_LEN), TEXT_LEN as u64), load(TEXT + DATA, &code(0x100), MIB)])
}

fn with_table(table: &[u8]) -> Vec<u8> {
    [&vmlinux(), table].concat()
}

/// Each way in which kernels are packed.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    Zstd,
    Lz4,
    Gzip,
    Xz,
}

const FORMATS: [Format; 4] = [Format::Zstd, Format::Lz4, Format::Gzip, Format::Xz];

impl Format {
    /// As `lz4 -l`, `gzip` and so on do, with the unpacked size behind it, as kernels have it.
    fn pack(self, bytes: &[u8]) -> Vec<u8> {
        let size = u32::try_from(bytes.len()).unwrap().to_le_bytes();
        let packed = match self {
            Self::Zstd => {
                let mut packed = vec![0; zstd_safe::compress_bound(bytes.len())];
                let len = zstd_safe::compress(packed.as_mut_slice(), bytes, 3).unwrap();
                packed[..len].to_vec()
            }
            Self::Lz4 => {
                let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
                for block in bytes.chunks(8 << 20) {
                    let mut buffer = vec![0; lz4_flex::block::get_maximum_output_size(block.len())];
                    let len = lz4_flex::block::compress_into(block, &mut buffer).unwrap();
                    packed.extend(u32::try_from(len).unwrap().to_le_bytes());
                    packed.extend(&buffer[..len]);
                }
                packed
            }
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).unwrap();
                // The size ends the format.
                return encoder.finish().unwrap();
            }
            Self::Xz => {
                let mut options = lzma_rust2::XzOptions::with_preset(1);
                options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
                options.lzma_options.dict_size = 128 << 20;
                options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
                let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).unwrap();
                encoder.write_all(bytes).unwrap();
                encoder.finish().unwrap()
            }
        };
        [packed, size.to_vec()].concat()
    }
}

/// A bzImage with 0x400 bytes of code, a payload, and something behind it.
fn bzimage_with(payload: &[u8]) -> Vec<u8> {
    let mut image = bzimage(&[&code(0x400), payload, &code(0x40)].concat());
    put(&mut image, 0x248, &0x400_u32.to_le_bytes());
    put(&mut image, 0x24c, &u32::try_from(payload.len()).unwrap().to_le_bytes());
    put(&mut image, 0x260, &(32_u32 << 20).to_le_bytes());
    image
}

/// All that a monitor does to unpack a kernel.
fn unpacked(image: &[u8]) -> Result<Vec<u8>, PayloadError> {
    let file = file(image);
    let packed = Packed::find(&file)?;
    let payload = packed.read(&file).map_err(PayloadError::Read)?;
    let mut bytes = vec![0; packed.unpacked_size(&payload)?];
    unpack(&payload, &mut bytes)?;
    Ok(bytes)
}

fn unpack_error(image: &[u8]) -> String {
    unpacked(image).unwrap_err().to_string()
}

#[test]
fn all_formats_unpack_to_what_was_packed() {
    // Longer than a block of lz4, and no multiple of it.
    let long: Vec<u8> = (0..8_500_001_u32).map(|at| ((at / 7) ^ (at >> 12)).to_le_bytes()[0]).collect();
    for bytes in [with_table(&TABLE.bytes()), long, code(1)] {
        for format in FORMATS {
            let result = unpacked(&bzimage_with(&format.pack(&bytes)));
            assert!(result.unwrap() == bytes, "{format:?}, {} bytes", bytes.len());
        }
    }
}

#[test]
fn no_payload_is_told_apart_from_a_bad_one() {
    let none = |image: &[u8]| matches!(Packed::find(&file(image)), Err(PayloadError::None));
    assert!(none(b""));
    assert!(none(&vmlinux()));
    assert!(none(&code(5000)));
    assert!(matches!(Packed::find(&std::fs::File::open("/").unwrap()), Err(PayloadError::None)));
    let no_payload = "its setup header gives no payload";
    assert!(unpack_error(&bzimage(&code(0x1000))).contains(no_payload));
    // The header ends before it tells.
    let mut old = bzimage_with(&Format::Gzip.pack(&vmlinux()));
    put(&mut old, 0x201, &[0x248_u16.to_le_bytes()[0] - 2]);
    assert!(unpack_error(&old).contains(no_payload));
}

#[test]
fn headers_that_lie_about_the_payload_are_named() {
    let sound = bzimage_with(&Format::Zstd.pack(&vmlinux()));
    let changed = |at: usize, value: u32| {
        let mut image = sound.clone();
        put(&mut image, at, &value.to_le_bytes());
        unpack_error(&image)
    };
    let size = sound.len();
    let payload = u32::from_le_bytes(sound[0x24c..0x250].try_into().unwrap());
    let start = u64::from(u32::MAX) + 0x400;
    assert_eq!(
        changed(0x248, u32::MAX),
        format!(
            "its setup header gives a payload from {start:#x} up to {:#x} of {size:#x} bytes",
            start + u64::from(payload),
            start = start,
        )
    );
    let longest = u32::try_from(size).unwrap() - 0x800;
    let error = changed(0x24c, longest + 1);
    assert!(error.contains(&format!("from 0x800 up to {:#x} of {size:#x} bytes", size + 1)), "{error}");
    for len in [1, 7, (256 << 20) + 1, u32::MAX] {
        assert_eq!(
            changed(0x24c, len),
            format!("its setup header gives a payload of {len} bytes, and 8 to 268435456 are read")
        );
    }
    // Room for less than the payload says.
    let len = vmlinux().len();
    let room = u32::try_from(len).unwrap() - 1;
    assert_eq!(
        changed(0x260, room),
        format!("its setup header gives room for {room} bytes, and its payload says that it unpacks to {len}")
    );
    // Beside the payload, or too little of it.
    let mut beside = sound.clone();
    put(&mut beside, 0x248, &0x3f0_u32.to_le_bytes());
    put(&mut beside, 0x24c, &(payload + 0x10).to_le_bytes());
    let error = unpack_error(&beside);
    assert!(error.ends_with("], which is neither zstd, lz4, gzip nor xz"), "{error}");
    let error = changed(0x24c, payload - 1);
    assert!(error.contains("cannot be unpacked (zstd)"), "{error}");
}

#[test]
fn sizes_that_no_kernel_has_are_refused() {
    for size in [0, (1 << 30) + 1, u32::MAX] {
        let mut image = bzimage_with(&[&[0x28, 0xb5, 0x2f, 0xfd][..], &size.to_le_bytes()].concat());
        put(&mut image, 0x260, &u32::MAX.to_le_bytes());
        let expected = format!("room for 1073741824 bytes, and its payload says that it unpacks to {size}");
        let error = unpack_error(&image);
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn headers_that_lie_about_the_room_or_the_code_are_named() {
    let sound = bzimage_with(&Format::Lz4.pack(&vmlinux()));
    let (size, len) = (sound.len(), vmlinux().len());
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = sound.clone();
        put(&mut image, at, bytes);
        image
    };
    for room in [0, 1, 0x1000] {
        let error = unpack_error(&changed(0x260, &u32::to_le_bytes(room)));
        assert!(
            error.contains(&format!("room for {room} bytes, and its payload says that it unpacks to {len}")),
            "{error}"
        );
    }
    // More than there can be below the hole: the bzImage itself needs it, unpacked or not.
    let error = Case::new(&changed(0x260, &[0xff; 4])).error();
    assert!(error.contains("needs memory from 0x1000000 up to 0x100ffffff"), "{error}");
    // The code begins elsewhere, and with it the payload.
    for (sectors, start) in [(2, 0xa00), (0, 0xe00), (255, 0x2_0400)] {
        let error = unpack_error(&changed(0x1f1, &[sectors]));
        let expected = format!("a payload from {start:#x} up to ");
        assert!(error.contains(&expected) && error.ends_with(&format!(" of {size:#x} bytes")), "{error}");
    }
    // Code is taken for the payload, and the number at its end is none.
    let error = unpack_error(&changed(0x248, &0_u32.to_le_bytes()));
    assert!(error.contains("its payload says that it unpacks to "), "{error}");
}

#[test]
fn other_formats_are_named_by_their_first_bytes() {
    // bzip2, LZMA alone, LZO, the new format of lz4, a kernel that is not packed, and nothing.
    let kernel = vmlinux();
    for begin in [&b"BZh9"[..], b"\x5d\0\0\x80", b"\x89LZO", b"\x04\x22\x4d\x18", &kernel, &[0; 64]] {
        let payload = claim([begin, &[0; 60]].concat(), 5000);
        let image = bzimage_with(&payload);
        let first = [begin[0], begin[1], begin[2], begin[3]];
        let expected = format!("its payload begins with {first:02x?}, which is neither zstd, lz4, gzip nor xz");
        assert_eq!(unpack_error(&image), expected);
        // It is no fault of the bzImage's.
        Case::new(&image).load();
    }
}

/// An xz payload whose dictionary is said to be of 4 GiB.
#[test]
fn a_decoder_is_not_given_all_the_memory_that_it_asks_for() {
    let bytes = code(5000);
    let mut payload = Format::Xz.pack(&bytes);
    // The header of the first block follows that of the stream: its length in words less one, then its filters, then its
    // checksum. LZMA2 is filter 0x21, with one byte that tells the dictionary's size.
    let start = 12;
    let end = start + 4 * usize::from(payload[start]);
    let filter = payload[start..end].windows(2).position(|pair| pair == [0x21, 1]).unwrap();
    payload[start + filter + 2] = 40;
    let mut sum = flate2::Crc::new();
    sum.update(&payload[start..end]);
    put(&mut payload, end, &sum.sum().to_le_bytes());
    let error = unpack_error(&bzimage_with(&payload));
    assert!(error.contains("cannot be unpacked (xz)") && error.contains("memory"), "{error}");
}

/// A payload that says that it unpacks to `size` bytes.
fn claim(mut payload: Vec<u8>, size: usize) -> Vec<u8> {
    let at = payload.len() - 4;
    put(&mut payload, at, &u32::try_from(size).unwrap().to_le_bytes());
    payload
}

#[test]
fn payloads_that_unpack_to_more_or_less_than_they_say_are_damaged() {
    let endless = vec![0; 9 << 20];
    for format in FORMATS {
        let error = |payload: Vec<u8>| unpack_error(&bzimage_with(&payload));
        let name = format!("{format:?}").to_lowercase();
        let more = error(claim(format.pack(&endless), 5000));
        assert!(more.starts_with(&format!("its payload cannot be unpacked ({name}): ")), "{more}");
        let bytes = code(5000);
        for size in [4999, 5001, 16 << 20] {
            let problem = error(claim(format.pack(&bytes), size));
            assert!(problem.contains(&format!("({name})")), "{problem}");
        }
    }
}

#[test]
fn damaged_payloads_are_found() {
    let bytes = with_table(&TABLE.bytes());
    for format in [Format::Gzip, Format::Xz] {
        // These carry a checksum: a change anywhere is found.
        let payload = format.pack(&bytes);
        for at in (12..payload.len() - 4).step_by(97) {
            let mut damaged = payload.clone();
            damaged[at] ^= 0x10;
            let error = unpack_error(&bzimage_with(&damaged));
            assert!(error.contains("cannot be unpacked"), "{format:?}, byte {at}: {error}");
        }
    }
    for format in FORMATS {
        let payload = format.pack(&bytes);
        for len in (4..payload.len() - 4).step_by(61) {
            let short = [&payload[..len], &payload[payload.len() - 4..]].concat();
            let error = unpack_error(&bzimage_with(&short));
            assert!(error.contains("cannot be unpacked"), "{format:?}, {len} bytes: {error}");
        }
    }
    let mut lz4 = Format::Lz4.pack(&bytes);
    put(&mut lz4, 4, &u32::MAX.to_le_bytes());
    assert!(unpack_error(&bzimage_with(&lz4)).contains("(lz4): a block is longer than the payload"));
}

/// A bzImage, what is in it, and random numbers for it.
struct Random {
    image: Vec<u8>,
    kernel: Vec<u8>,
    ram: u64,
}

impl Random {
    fn new(kernel: Vec<u8>) -> Self {
        Self { image: bzimage_with(&Format::Zstd.pack(&kernel)), kernel, ram: 256 * MIB }
    }

    fn case(&self, random: [u64; 2]) -> Case<'_> {
        Case { unpacked: Some(&self.kernel), random: Some(random), ram: self.ram, ..Case::new(&self.image) }
    }
}

#[test]
fn an_unpacked_kernel_is_entered_at_its_own_entry_point() {
    let kernel = Random::new(vmlinux());
    let (loaded, memory) = Case { random: None, initramfs: Some(b"cpio"), ..kernel.case([0, 0]) }.load();
    assert_eq!((loaded.protocol, loaded.slide), (Protocol::Linux64, None));
    assert_eq!(loaded.registers.regs.rip, TEXT + 0x200);
    assert_eq!((loaded.kernel.start, loaded.kernel.len), (TEXT, MEMORY_LEN));
    assert_eq!(read(&memory, TEXT, TEXT_LEN), code(TEXT_LEN));
    assert_eq!(read(&memory, TEXT + DATA, 0x101), [code(0x100), vec![0]].concat());
    // The header is the bzImage's, with its limits.
    assert_eq!(read(&memory, layout::ZERO_PAGE + 0x202, 4), b"HdrS");
    assert_eq!(read(&memory, layout::ZERO_PAGE + 0x211, 1), [1]);
    let long = "x".repeat(2048);
    let error = Case { cmdline: &long, ..kernel.case([0, 0]) }.error();
    assert!(error.contains("this kernel takes 2047 at the most"), "{error}");
}

#[test]
fn without_a_table_or_with_nokaslr_nothing_moves() {
    let random = [123_456_789, 987_654_321];
    let plain = Random::new(vmlinux());
    let movable = Random::new(with_table(&TABLE.bytes()));
    let mut lies = Random::new(with_table(&TABLE.bytes()));
    put(&mut lies.image, 0x211, &[0b11]);
    let cases = [
        plain.case(random),
        Case { cmdline: "quiet nokaslr", ..movable.case(random) },
        Case { random: None, ..movable.case(random) },
        Case { random: None, ..lies.case(random) },
    ];
    for case in cases {
        let (loaded, memory) = case.load();
        assert_eq!((loaded.slide, loaded.kernel.start), (None, TEXT));
        assert_eq!(read(&memory, TEXT, TEXT_LEN), code(TEXT_LEN));
        assert_eq!(read(&memory, layout::ZERO_PAGE + 0x211, 1), [1], "KASLR_FLAG is not set");
    }
}

/// The kernel's memory as the table changes it for a virtual slide, in code of its own.
fn relocated(table: &Table, slide: u64) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(MEMORY_LEN).unwrap()];
    put(&mut bytes, 0, &code(TEXT_LEN));
    put(&mut bytes, usize::try_from(DATA).unwrap(), &code(0x100));
    let mut add = |places: &[u64], width: usize, addend: u64| {
        for place in places {
            let at = usize::try_from(*place).unwrap();
            let mut word = [0; 8];
            word[..width].copy_from_slice(&bytes[at..at + width]);
            let sum = u64::from_le_bytes(word).wrapping_add(addend).to_le_bytes();
            put(&mut bytes, at, &sum[..width]);
        }
    };
    add(table.narrow, 4, slide);
    add(table.inverse.unwrap_or_default(), 4, slide.wrapping_neg());
    add(table.wide, 8, slide);
    bytes
}

#[test]
fn all_lists_are_applied_at_the_new_place() {
    for table in [TABLE, Table { inverse: None, ..TABLE }, Table { narrow: &[], wide: &[], ..TABLE }] {
        let kernel = Random::new(with_table(&table.bytes()));
        for random in [[0, 0], [1, 0], [0, 1], [77, 33], [u64::MAX, u64::MAX]] {
            let (loaded, memory) = kernel.case(random).load();
            let slide = loaded.slide.unwrap();
            assert_eq!(loaded.kernel.start, TEXT + slide.physical);
            assert_eq!(loaded.registers.regs.rip, TEXT + slide.physical + 0x200);
            let found = read(&memory, loaded.kernel.start, usize::try_from(MEMORY_LEN).unwrap());
            assert!(found == relocated(&table, slide.virt.into()), "{random:?}: {slide:?}");
            assert_eq!(read(&memory, layout::ZERO_PAGE + 0x211, 1), [0b11], "KASLR_FLAG is set");
            if slide.physical > MEMORY_LEN {
                assert_eq!(read(&memory, TEXT, TEXT_LEN), vec![0; TEXT_LEN], "nothing where it is linked");
            }
        }
    }
}

#[test]
fn the_table_begins_behind_the_section_headers() {
    let mut sections = vmlinux();
    let at = sections.len() as u64;
    put(&mut sections, 40, &at.to_le_bytes());
    put(&mut sections, 60, &3_u16.to_le_bytes());
    sections.extend(vec![0x55; 3 * 64]);
    let kernel = Random::new([sections, TABLE.bytes()].concat());
    let (loaded, memory) = kernel.case([9, 9]).load();
    let found = read(&memory, loaded.kernel.start, usize::try_from(MEMORY_LEN).unwrap());
    assert!(found == relocated(&TABLE, loaded.slide.unwrap().virt.into()));
}

#[test]
fn the_kernel_is_never_put_over_the_initramfs() {
    let initramfs = code(3 << 20);
    let kernel = Random { ram: 48 * MIB, ..Random::new(with_table(&TABLE.bytes())) };
    for number in 0..20 {
        let (loaded, memory) = Case { initramfs: Some(&initramfs), ..kernel.case([number, number]) }.load();
        let initramfs_at = loaded.initramfs.unwrap();
        assert!(loaded.kernel.start + loaded.kernel.len <= initramfs_at.start);
        assert_eq!(loaded.kernel.start % (2 * MIB), 0);
        assert!(read(&memory, initramfs_at.start, initramfs.len()) == initramfs);
    }
}

#[test]
fn page_tables_map_a_kernel_above_4_gib() {
    let kernel = Random { ram: 8 << 30, ..Random::new(with_table(&TABLE.bytes())) };
    // Where it crosses a border of GiB above 4 GiB, and at the top of RAM.
    let crosses = |start: u64| start > 4 * GIB && start >> 30 != (start + MEMORY_LEN - 1) >> 30;
    let slots = |end: u64| (end - 4 * GIB) / (2 * MIB);
    let below = (3 * GIB - TEXT - MEMORY_LEN) / (2 * MIB) + 1;
    for (number, place) in [
        (below, 4 * GIB),
        (below + slots(5 * GIB) - 1, 5 * GIB - 2 * MIB),
        (below + slots(9 * GIB - MEMORY_LEN), 9 * GIB - 10 * MIB),
    ] {
        for gigabyte_pages in [true, false] {
            let (loaded, memory) = Case { gigabyte_pages, ..kernel.case([1, number]) }.load();
            assert_eq!(loaded.kernel.start, place);
            let cr3 = loaded.registers.sregs.cr3;
            for address in [0, layout::ZERO_PAGE, TEXT, 4 * GIB - 1, place, place + MEMORY_LEN - 1] {
                assert_eq!(translate(&memory, cr3, address), Some(address), "{gigabyte_pages}: {address:#x}");
            }
            assert_eq!(translate(&memory, cr3, place + 2 * GIB), None);
            assert_eq!(u64_at(&memory, layout::PAGE_TABLES + 8 * layout::PAGE_SIZE), 0, "eight pages at the most");
        }
    }
    assert!(crosses(5 * GIB - 2 * MIB), "one of them crosses a border");
}

/// Loads what is refused: it says why, nothing was written, and then the bzImage loads as it is.
fn refused(image: &[u8], kernel: &Vec<u8>) -> String {
    let memory = memory(64 * MIB);
    let plain = Case { ram: 64 * MIB, ..Case::new(image) };
    let case = Case { unpacked: Some(kernel), random: Some([5, 5]), ..plain };
    let error = case.load_into(&memory).unwrap_err();
    assert!(matches!(error, BootError::Payload(_)), "{error}");
    let mut page = [0; 4096];
    for at in (0..64 * MIB).step_by(4096).filter(|at| !(0xa_0000..0xe_0000).contains(at)) {
        memory.read_slice(&mut page, GuestAddress(at)).unwrap();
        assert!(page == [0; 4096], "{at:#x} was written");
    }
    let loaded = Case { unpacked: None, ..case }.load_into(&memory).unwrap();
    assert_eq!((loaded.slide, loaded.registers.regs.rip), (None, TEXT + 0x200));
    error.to_string()
}

#[test]
fn headers_that_lie_about_the_kernel_are_named() {
    let kernel = with_table(&TABLE.bytes());
    let image = bzimage_with(&Format::Zstd.pack(&kernel));
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        put(&mut image, at, bytes);
        image
    };
    for align in [0, 1, 0x1000, 0x10_0000, 0x30_0000, 3 << 20, 0x200_0000, 0x8000_0000, u32::MAX] {
        assert_eq!(
            refused(&changed(0x230, &align.to_le_bytes()), &kernel),
            format!(
                "kernel: its setup header gives an alignment of {align:#x}: a power of two from 2 MiB up that divides \
                 0x1000000 is right"
            )
        );
    }
    let elsewhere = elf(TEXT + 2 * MIB, &[load(TEXT + 2 * MIB, &code(64), 64)]);
    assert_eq!(
        refused(&image, &elsewhere),
        "kernel: its setup header gives 0x1000000 as its address, and the kernel inside is linked for 0x1200000"
    );
}

#[test]
fn what_cannot_be_entered_is_named() {
    let image = bzimage_with(&Format::Zstd.pack(&vmlinux()));
    let tests: [(Vec<u8>, &str); 6] = [
        (vec![], "the file is empty"),
        (code(5000), "neither a bzImage nor an ELF executable: it does not begin with \"\\x7fELF\""),
        (image.clone(), "it does not begin with \"\\x7fELF\""),
        (vmlinux()[..0x500].to_vec(), "the file is truncated: ELF segment 0"),
        (elf(0, &[load(TEXT, &code(64), 64)]), "the 64-bit Linux entry point 0x0 lies in no segment"),
        (elf(TEXT, &[load(TEXT, &code(64), 1 << 28)]), "low RAM ends at 0x4000000: give the guest at least 272 MiB"),
    ];
    for (kernel, expected) in tests {
        let error = refused(&image, &kernel);
        assert!(error.starts_with("kernel: what is in its payload cannot be entered: "), "{error}");
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn bad_relocation_tables_are_named() {
    let image = bzimage_with(&Format::Zstd.pack(&vmlinux()));
    let error = |table: &[u8]| {
        let error = refused(&image, &with_table(table));
        error.strip_prefix("kernel: its relocation table ").unwrap_or_else(|| panic!("{error}")).to_owned()
    };
    let at = |place: u64| Table { wide: &[place], inverse: None, narrow: &[] }.bytes();
    let outside = |word: u64| format!("points to {:#x}, outside the kernel at 0x1000000", word & 0xffff_ffff);
    for place in [MEMORY_LEN - 7, MEMORY_LEN, 256 * MIB, GIB] {
        assert_eq!(error(&at(place)), outside(VIRTUAL + place));
    }
    // Below the kernel, and below all of the kernel's virtual addresses.
    for word in [0x80ff_ffff_u32, 0x8000_0000, 0x7fff_ffff, 1] {
        let table = [[0; 4], word.to_le_bytes(), [0; 4]].concat();
        assert_eq!(error(&table), outside(word.into()));
    }
    let narrow = Table { wide: &[], inverse: Some(&[0]), narrow: &[MEMORY_LEN - 3] };
    assert_eq!(error(&narrow.bytes()), outside(VIRTUAL + MEMORY_LEN - 3));
    let inverse = Table { wide: &[], inverse: Some(&[MEMORY_LEN - 3]), narrow: &[0] };
    assert_eq!(error(&inverse.bytes()), outside(VIRTUAL + MEMORY_LEN - 3));

    for odd in [1, 2, 3, 13] {
        assert_eq!(error(&vec![0; odd]), format!("has {odd} bytes: a multiple of 4, up to 64 MiB, is right"));
    }
    let word = 0x8100_0000_u32.to_le_bytes();
    let zero = [0; 4];
    let lists = "two or three lists, each behind a zero, are right";
    for (table, zeros, first) in [
        (zero.to_vec(), 1, 0),
        ([zero, word].concat(), 1, 0),
        (word.to_vec(), 0, 0x8100_0000_u32),
        ([word, zero, word, zero, word].concat(), 2, 0x8100_0000),
        ([zero, word, zero, word, zero, word, zero, word].concat(), 4, 0),
        (vec![0; 4000], 1000, 0),
    ] {
        assert_eq!(error(&table), format!("begins with {first:#x} and has {zeros} zeros: {lists}"));
    }
}
