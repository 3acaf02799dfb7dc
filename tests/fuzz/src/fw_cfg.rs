//! A guest's accesses to the firmware configuration device, beside a plain model of it.

use devices::bus::BusDevice;
use devices::legacy::{FwCfg, FwCfgContents, FwCfgItems};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap};

/// Guest memory: where it begins, and its bytes.
const BASE: u64 = 0x1000;
const LEN: usize = 0x8000;
/// Where requests are put, at the end of memory; some of them are where there is none.
const REQUESTS: u64 = BASE + LEN as u64 - 0x100;
/// Bits of a request.
const READ: u32 = 1 << 1;
const SKIP: u32 = 1 << 2;
const SELECT: u32 = 1 << 3;
const WRITE: u32 = 1 << 4;

/// Bytes of a step.
const STEP: usize = 16;

fn items() -> Vec<(u16, Vec<u8>)> {
    vec![(0x05, vec![2, 0]), (0x0e, Vec::new()), (0x15, b"console=ttyS0\0".to_vec()), (0x20, vec![7; 300])]
}

struct Model {
    item: Vec<u8>,
    offset: usize,
}

impl Model {
    fn select(&mut self, number: u16, items: &[(u16, Vec<u8>)]) {
        let found = items.iter().find(|(item, _)| *item == number);
        *self = Self { item: found.map(|(_, bytes)| bytes.clone()).unwrap_or_default(), offset: 0 };
    }

    fn next(&mut self) -> u8 {
        let byte = self.item.get(self.offset).copied();
        self.offset = self.offset.saturating_add(usize::from(byte.is_some()));
        byte.unwrap_or(0)
    }
}

/// Carries out a program of steps: operation, a number of one byte, one of two and one of four bytes, an address.
pub fn run(program: &[u8]) {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), LEN)]).expect("guest memory");
    let mut given = FwCfgItems::default();
    // Those that the model does not know (signature, features, directory) are not selected.
    let known = items();
    for (number, bytes) in &known {
        let contents = FwCfgContents::Bytes(bytes.clone());
        let added = if *number < 0x20 { given.add(*number, contents) } else { given.add_named("item", contents) };
        added.expect("an item");
    }
    let device = FwCfg::new(given, GuestMemoryAtomic::new(memory.clone()));
    let mut model = Model { item: b"QEMU".to_vec(), offset: 0 };
    for step in program.chunks_exact(STEP) {
        let half = |at: usize| u16::from_le_bytes([step[at], step[at + 1]]);
        let word = |at: usize| u32::from(half(at)) | u32::from(half(at + 2)) << 16;
        let item = known.get(usize::from(step[1])).map_or(0x77, |(number, _)| *number);
        let address = u64::from(word(8)) | u64::from(word(12)) << 32;
        match step[0] % 4 {
            0 => {
                device.write(0, &item.to_le_bytes());
                model.select(item, &known);
            }
            1 => {
                let mut byte = [0xee];
                device.read(1, &mut byte);
                assert_eq!(byte[0], model.next());
            }
            2 => {
                let control = (word(4) & 0xffff) | u32::from(item) << 16;
                request(&device, &memory, &mut model, &known, [control, u32::from(half(2))], address);
            }
            // Accesses of other widths and places are nothing.
            _ => {
                let mut data = [0; 8];
                let len = usize::from(step[1] % 8) + 1;
                let offset = u64::from(step[2] % 12);
                device.read(offset, &mut data[..len]);
                if (offset, len) == (1, 1) {
                    assert_eq!(data[0], model.next());
                }
                if !matches!((offset, len), (0, 2) | (4, 4) | (8, 4)) {
                    device.write(offset, &step[8..8 + len]);
                }
            }
        }
    }
}

/// One request, and what must have become of it.
fn request(
    device: &FwCfg,
    memory: &GuestMemoryMmap,
    model: &mut Model,
    items: &[(u16, Vec<u8>)],
    [control, length]: [u32; 2],
    address: u64,
) {
    let place = GuestAddress(REQUESTS);
    let bytes = [&control.to_be_bytes()[..], &length.to_be_bytes(), &address.to_be_bytes()].concat();
    memory.write_slice(&bytes, place).expect("a request");
    let mut before = vec![0; LEN];
    memory.read_slice(&mut before, GuestAddress(BASE)).expect("all memory");
    device.write(4, &[0; 4]);
    device.write(8, &u32::try_from(REQUESTS).expect("a low address").to_be_bytes());
    if control & SELECT != 0 {
        model.select(u16::try_from(control >> 16).expect("16 bits"), items);
    }
    let end = address.checked_add(length.into());
    let fits = address >= BASE && end.is_some_and(|end| end <= BASE + LEN as u64);
    let mut expected = before;
    let mut failed = false;
    if control & READ != 0 {
        failed = length > 0 && !fits;
        if !failed && length > 0 {
            let start = usize::try_from(address - BASE).expect("a place in memory");
            for at in start..start + length as usize {
                expected[at] = model.next();
            }
        }
    } else if control & WRITE != 0 {
        failed = true;
    } else if control & SKIP != 0 {
        model.offset = model.offset.saturating_add(length as usize);
    }
    let at = usize::try_from(REQUESTS - BASE).expect("a place in memory");
    let mut after = vec![0; LEN];
    memory.read_slice(&mut after, GuestAddress(BASE)).expect("all memory");
    if control & READ == 0 || length > 0 {
        expected[at..at + 4].copy_from_slice(&u32::from(failed).to_be_bytes());
        assert_eq!(after, expected, "control {control:#x}, {length:#x} bytes at {address:#x}");
    }
}
