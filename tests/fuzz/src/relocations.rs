//! A kernel with a relocation table of any content: it is refused before anything is written, or guest memory then holds
//! just what a plain model of the table says, and nothing elsewhere.

use std::fs::File;

use arch::payload::PayloadError;
use arch::{BootError, BootSource, LoadedKernel, Platform, Topology, load_kernel};

use crate::input::{Step, pattern};
use crate::kernel::{boot_data, file, read};
use crate::memory::{Memory, PAGE};
use crate::seeds::{bzimage, put};

/// Room for a dozen places of a kernel.
const RAM: u64 = 32 << 20;
/// Where the kernel is linked: not at the lowest of its virtual addresses, so that some lie below it.
const LINKED: u64 = 4 << 20;
/// What its addresses are a multiple of.
const ALIGN: u64 = 2 << 20;
/// The kernel's lowest virtual address without its upper half, with which places are told.
const MAP: u64 = 0x8000_0000;
/// Lengths of its text and data in the file, and where the data begin in memory.
const TEXT: usize = 0xa00;
const DATA: usize = 0x180;
const DATA_AT: u64 = 0x1000;

thread_local! {
    static MEMORY: Memory = Memory::new(RAM);
    static BZIMAGE: File = {
        let mut image = bzimage(LINKED);
        put(&mut image, 0x260, &(8_u32 << 20).to_le_bytes());
        file(&image)
    };
    static INITRAMFS: File = file(&[b'i'; 3 * PAGE / 2]);
}

/// What is done with a table.
struct Way {
    /// Bytes of the data in memory.
    data_len: u64,
    /// Section headers between the kernel and the table.
    sections: u16,
    cmdline: &'static str,
    random: Option<[u64; 2]>,
    initramfs: bool,
}

impl Way {
    fn new(how: Step) -> Self {
        Self {
            data_len: DATA as u64 + 64 * u64::from(how.b),
            sections: u16::from(how.c % 4),
            cmdline: ["", "nokaslr", "mem=20M", "quiet"][usize::from(how.op >> 2 & 3)],
            random: (how.op & 1 == 0).then_some([how.d_low().into(), how.d_high().into()]),
            initramfs: how.op & 2 != 0,
        }
    }

    /// The bytes of the kernel in memory.
    fn len(&self) -> u64 {
        DATA_AT + self.data_len
    }

    /// An ELF file of text and data, and the table.
    fn image(&self, table: &[u8]) -> Vec<u8> {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
        let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<_>>();
        let (text_at, data_at) = (64 + 2 * 56, 64 + 2 * 56 + TEXT as u64);
        let sections_at = if self.sections == 0 { 0 } else { data_at + DATA as u64 };
        let mut image = b"\x7fELF\x02\x01\x01".to_vec();
        image.resize(16, 0);
        image.extend(halves(&[2, 62, 1, 0])); // executable, x86-64, version 1
        image.extend(words(&[LINKED + 0x200, 64, sections_at]));
        image.extend(halves(&[0, 0, 64, 56, 2, 64, self.sections, 0]));
        let segments = [
            [text_at, LINKED, LINKED, TEXT as u64, TEXT as u64, 4096],
            [data_at, LINKED + DATA_AT, LINKED + DATA_AT, DATA as u64, self.data_len, 4096],
        ];
        for segment in segments {
            image.extend([u32::to_le_bytes(1), 7_u32.to_le_bytes()].concat());
            image.extend(words(&segment));
        }
        image.extend(text());
        image.extend(data());
        image.extend(vec![0x55; 64 * usize::from(self.sections)]);
        image.extend_from_slice(table);
        image
    }
}

fn text() -> Vec<u8> {
    pattern(1, TEXT)
}

fn data() -> Vec<u8> {
    pattern(2, DATA)
}

/// Loads a kernel with this table; `how` is the rest.
pub fn load(how: Step, table: &[u8]) {
    let way = Way::new(how);
    let image = way.image(table);
    let platform =
        Platform::direct_boot(RAM, 46, Topology::flat(1).expect("one processor")).expect("a platform of such memory");
    MEMORY.with(|memory| {
        let result = BZIMAGE.with(|kernel| {
            INITRAMFS.with(|initramfs| {
                let source = BootSource {
                    kernel,
                    initramfs: way.initramfs.then_some(initramfs),
                    cmdline: way.cmdline,
                    protocol: None,
                    gigabyte_pages: true,
                    unpacked: Some(&image),
                    share: false,
                    random: way.random,
                };
                load_kernel(memory.map(), &platform, &source)
            })
        });
        match (&result, model(table, way.len())) {
            (Ok(loaded), Some(lists)) => {
                let movable = way.random.is_some() && way.cmdline != "nokaslr" && !table.is_empty();
                assert_eq!(loaded.slide.is_some(), movable, "{loaded:?}");
                check(memory, &way, loaded, &lists, image.len() as u64);
            }
            (Err(BootError::Payload(PayloadError::Relocations { problem })), None) => {
                assert!(!problem.is_empty());
                memory.check(&[], &result);
            }
            (result, model) => panic!("the model says {model:?}, and {result:?} came of it"),
        }
        memory.clear();
    });
}

/// The places of a table, counted from the kernel's start: 64-bit addresses, 32-bit offsets, 32-bit addresses. `None`
/// where the table is bad; without one there are no places.
fn model(table: &[u8], kernel: u64) -> Option<[Vec<u64>; 3]> {
    let mut lists: Vec<Vec<u64>> = Vec::new();
    if !table.len().is_multiple_of(4) {
        return None;
    }
    for word in table.as_chunks::<4>().0.iter().map(|word| u64::from(u32::from_le_bytes(*word))) {
        match (word, lists.last_mut()) {
            (0, _) => lists.push(Vec::new()),
            (_, None) => return None,
            (word, Some(list)) => list.push(word),
        }
    }
    let narrow = if lists.is_empty() { Vec::new() } else { lists.pop()? };
    let [wide, inverse] = match (table.len(), lists.len()) {
        (0, _) => [Vec::new(), Vec::new()],
        (_, 1) => [lists.pop()?, Vec::new()],
        (_, 2) => [lists.remove(0), lists.remove(0)],
        _ => return None,
    };
    let place = |word: &u64, width: u64| {
        let place = word.checked_sub(MAP + LINKED)?;
        (place + width <= kernel).then_some(place)
    };
    let places = |list: Vec<u64>, width| list.iter().map(|word| place(word, width)).collect::<Option<Vec<_>>>();
    Some([places(wide, 8)?, places(inverse, 4)?, places(narrow, 4)?])
}

/// Checks a kernel that was loaded against what the table's lists say.
fn check(memory: &Memory, way: &Way, loaded: &LoadedKernel, lists: &[Vec<u64>; 3], image: u64) {
    let mut kernel = vec![0; usize::try_from(way.len()).expect("a length")];
    put(&mut kernel, 0, &text());
    put(&mut kernel, usize::try_from(DATA_AT).expect("a place"), &data());
    let slide = loaded.slide.unwrap_or_default();
    let virt = u64::from(slide.virt);
    assert!(virt.is_multiple_of(ALIGN) && virt + LINKED + way.len() <= 1 << 30, "{loaded:?}");
    assert!(slide.physical.is_multiple_of(ALIGN) && (way.cmdline != "mem=20M" || slide.physical == 0), "{loaded:?}");
    let [wide, inverse, narrow] = lists;
    for (list, width, addend) in [(inverse, 4, virt.wrapping_neg()), (narrow, 4, virt), (wide, 8, virt)] {
        for place in list {
            let at = usize::try_from(*place).expect("a place");
            let mut word = [0; 8];
            word[..width].copy_from_slice(&kernel[at..at + width]);
            let sum = u64::from_le_bytes(word).wrapping_add(addend).to_le_bytes();
            put(&mut kernel, at, &sum[..width]);
        }
    }

    let range = loaded.kernel;
    assert_eq!((range.start, range.len), (LINKED + slide.physical, way.len().max(image)), "{loaded:?}");
    let mut allowed = boot_data();
    allowed.push(range.start..range.start + way.len());
    if let Some(initramfs) = &loaded.initramfs {
        let end = initramfs.start + initramfs.len;
        assert!(initramfs.start >= range.start + range.len && end <= RAM, "{loaded:?}");
        allowed.push(initramfs.start..end);
    }
    assert!(range.start + range.len <= RAM, "{loaded:?}");
    memory.check(&allowed, loaded);
    let found = read(memory.map(), range.start, kernel.len());
    assert!(found == kernel, "the kernel is not what the table makes of it: {lists:?}, {loaded:?}");
}

/// A program of this target.
pub fn program(how: Step, words: &[u32]) -> Vec<u8> {
    [&how.encode()[..], &words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>()].concat()
}

/// The word that names a place of the kernel, as far from its start.
pub fn place(offset: u32) -> u32 {
    u32::try_from(MAP + LINKED).unwrap_or(0).wrapping_add(offset)
}
