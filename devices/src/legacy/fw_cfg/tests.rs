use std::io::Write;

use super::*;

const BASE: u64 = 0x1000;
const REQUEST: u64 = BASE + 0x100;
const TARGET: u64 = BASE + 0x800;

fn memory() -> GuestMemoryAtomic<GuestMemoryMmap> {
    GuestMemoryAtomic::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(BASE), 0x4_0000)]).unwrap())
}

fn device() -> FwCfg {
    let mut items = FwCfgItems::default();
    items.add(5, FwCfgContents::Bytes(vec![4, 0])).unwrap();
    items.add_named("etc/b", FwCfgContents::Bytes(vec![1, 2, 3, 4, 5])).unwrap();
    items.add_named("etc/a", FwCfgContents::Bytes(vec![9; 0x1_2345])).unwrap();
    FwCfg::new(items, memory())
}

fn select(device: &FwCfg, item: u16) {
    device.write(SELECTOR, &item.to_le_bytes());
}

fn bytes(device: &FwCfg, count: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; count];
    for byte in &mut bytes {
        device.read(DATA, std::slice::from_mut(byte));
    }
    bytes
}

/// What is left in the control word of a request.
fn request(device: &FwCfg, control: u32, length: u32, address: u64) -> u32 {
    let memory = device.memory.memory();
    let mut bytes = control.to_be_bytes().to_vec();
    bytes.extend(length.to_be_bytes());
    bytes.extend(address.to_be_bytes());
    memory.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
    device.write(REQUEST_HIGH, &[0; 4]);
    device.write(REQUEST_LOW, &u32::try_from(REQUEST).unwrap().to_be_bytes());
    u32::from_be(memory.read_obj(GuestAddress(REQUEST)).unwrap())
}

fn at(device: &FwCfg, address: u64, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    device.memory.memory().read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

#[test]
fn a_guest_knows_the_device_and_finds_named_items_in_the_directory() {
    let device = device();
    assert_eq!(bytes(&device, 6), *b"QEMU\0\0");
    select(&device, ITEM_FEATURES);
    assert_eq!(bytes(&device, 4), [3, 0, 0, 0]);
    select(&device, ITEM_DIRECTORY);
    let directory = bytes(&device, 4 + 2 * 64);
    assert_eq!(directory[..4], [0, 0, 0, 2]);
    assert_eq!((&directory[4..12], &directory[12..18]), (&[0, 1, 0x23, 0x45, 0, 0x20, 0, 0][..], &b"etc/a\0"[..]));
    assert_eq!((&directory[68..76], &directory[76..82]), (&[0, 0, 0, 5, 0, 0x21, 0, 0][..], &b"etc/b\0"[..]));
    let mut signature = [0; 8];
    device.read(REQUEST_HIGH, &mut signature);
    assert_eq!(&signature, b"QEMU CFG");
}

#[test]
fn an_item_is_read_to_its_end_and_then_reads_as_zeros() {
    let device = device();
    select(&device, 0x21);
    assert_eq!(bytes(&device, 7), [1, 2, 3, 4, 5, 0, 0]);
    select(&device, 0x21);
    assert_eq!(bytes(&device, 1), [1]);
    select(&device, 0x77);
    assert_eq!(bytes(&device, 2), [0, 0]);
    let mut word = [0xff; 2];
    device.read(SELECTOR, &mut word);
    device.write(DATA, &[7]);
    device.write(SELECTOR, &[1]);
    assert_eq!((word, bytes(&device, 1)), ([0; 2], vec![0]));
}

#[test]
fn requests_select_skip_and_read() {
    let device = device();
    assert_eq!(request(&device, 0x21 << 16 | CONTROL_SELECT | CONTROL_SKIP, 2, 0), 0);
    assert_eq!(request(&device, CONTROL_READ, 4, TARGET), 0);
    assert_eq!(at(&device, TARGET, 5), [3, 4, 5, 0, 0]);
    // More than is copied at once.
    assert_eq!(request(&device, 0x20 << 16 | CONTROL_SELECT | CONTROL_READ, 0x1_2346, TARGET), 0);
    assert_eq!(at(&device, TARGET + 0x1_2344, 2), [9, 0]);
    assert_eq!(request(&device, CONTROL_SKIP, u32::MAX, 0), 0);
    assert_eq!(request(&device, CONTROL_READ, 4, TARGET), 0);
    assert_eq!(at(&device, TARGET, 4), [0; 4]);
    assert_eq!(request(&device, 0, 5, TARGET), 0);
}

#[test]
fn requests_outside_of_memory_and_writes_fail_and_touch_nothing() {
    let device = device();
    for (length, address) in
        [(1, 0), (2, BASE + 0x3_ffff), (u32::MAX, TARGET), (0x1_0000, BASE - 1), (16, u64::MAX - 3), (1, u64::MAX)]
    {
        let outcome = request(&device, 0x20 << 16 | CONTROL_SELECT | CONTROL_READ, length, address);
        assert_eq!(outcome, CONTROL_ERROR, "{length:#x} at {address:#x}");
    }
    assert_eq!(at(&device, TARGET, 1), [0]);
    assert_eq!(request(&device, 0x21 << 16 | CONTROL_SELECT | CONTROL_WRITE, 1, TARGET), CONTROL_ERROR);
    // A request that is itself nowhere.
    device.write(REQUEST_HIGH, &[0xff; 4]);
    device.write(REQUEST_LOW, &[0xff; 4]);
    device.write(REQUEST_LOW, &[0; 3]);
}

#[test]
fn a_file_is_read_where_it_is_asked_for_and_fails_where_it_was_cut() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(b"setupkernel").unwrap();
    let mut items = FwCfgItems::default();
    items.add(0x18, FwCfgContents::File(file.try_clone().unwrap(), 0..5)).unwrap();
    items.add(0x11, FwCfgContents::File(file.try_clone().unwrap(), 5..11)).unwrap();
    let device = FwCfg::new(items, memory());
    assert_eq!(request(&device, 0x11 << 16 | CONTROL_SELECT | CONTROL_READ, 8, TARGET), 0);
    assert_eq!(at(&device, TARGET, 8), *b"kernel\0\0");
    select(&device, 0x18);
    assert_eq!(bytes(&device, 6), *b"setup\0");
    file.set_len(7).unwrap();
    assert_eq!(request(&device, 0x11 << 16 | CONTROL_SELECT | CONTROL_READ, 6, TARGET), CONTROL_ERROR);
}

#[test]
fn items_that_cannot_be_are_refused() {
    let mut items = FwCfgItems::default();
    let nothing = || FwCfgContents::Bytes(Vec::new());
    for number in [ITEM_SIGNATURE, ITEM_DIRECTORY, FIRST_NAMED, 0x8000] {
        assert_eq!(items.add(number, nothing()), Err(FwCfgError::Number(number)));
    }
    items.add(5, nothing()).unwrap();
    assert_eq!(items.add(5, nothing()), Err(FwCfgError::Number(5)));
    items.add_named(&"n".repeat(55), nothing()).unwrap();
    for name in ["n".repeat(56), "n".repeat(55), "a\0".to_owned()] {
        assert_eq!(items.add_named(&name, nothing()), Err(FwCfgError::Name(name)));
    }
    let long = FwCfgContents::File(tempfile::tempfile().unwrap(), 0..1 << 32);
    assert_eq!(items.add_named("long", long), Err(FwCfgError::TooLong(1 << 32)));
}
