//! A bzImage as small as can be, which shows how it was started: its own entry point says so with one byte on the serial
//! port, and the kernel inside it with another.

/// Where the kernel is linked for, and wants to be.
const LINKED: u32 = 16 << 20;
/// Bytes of the kernel inside: more than a cache on a small disk can hold, in three blocks of a kept kernel.
pub const KERNEL: usize = 600 << 10;
/// Where the payload begins in the file: behind boot sector, a sector of real-mode code, and the entry point's code.
pub const PAYLOAD: usize = 0x800;

/// What a guest of [`bzimage`] says where it had to unpack itself, which it cannot: then it exits with 1.
pub const SLOW: &str = "S";

/// A bzImage whose kernel says `word` and exits with 0. Its payload is in the old format of lz4, which holds the kernel as
/// it is.
pub fn bzimage(word: u8) -> Vec<u8> {
    let kernel = vmlinux(word);
    let payload = pack(&kernel);
    let mut image = vec![0; 2 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x1f4, &length(0x400 + payload.len().next_multiple_of(16), 16)); // syssize
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]); // boot_flag, jump
    put(0x202, b"HdrS\x0f\x02"); // and version
    put(0x211, &[1]); // loadflags: LOADED_HIGH
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(0x234, &[1, 21, 3, 0]); // relocatable_kernel, min_alignment, xloadflags: KERNEL_64
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x248, &[0x400_u32.to_le_bytes(), length(payload.len(), 1)].concat());
    put(0x258, &u64::from(LINKED).to_le_bytes()); // pref_address
    put(0x260, &0x40_0000_u32.to_le_bytes()); // init_size
    let mut code = vec![0x90; 0x400];
    let entry = says(SLOW.as_bytes()[0], 1);
    code[0x200..0x200 + entry.len()].copy_from_slice(&entry);
    [image, code, payload].concat()
}

/// Code of 64-bit mode that writes a byte to the serial port and ends the run with a number.
fn says(word: u8, number: u8) -> Vec<u8> {
    let print = [0x66, 0xba, 0xf8, 0x03, 0xb0, word, 0xee]; // mov $0x3f8, %dx; mov $word, %al; out %al, %dx
    let end = [0xb0, number, 0xe6, 0xf4, 0xfa, 0xf4, 0xeb, 0xfd]; // mov $number, %al; out %al, $0xf4; cli; hlt; jmp back
    [&print[..], &end].concat()
}

/// An ELF executable of one segment.
fn vmlinux(word: u8) -> Vec<u8> {
    let mut code = says(word, 0);
    code.extend((code.len()..KERNEL).map(|at| (at % 251).to_le_bytes()[0]));
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat()); // an executable for x86-64
    file.extend(1_u32.to_le_bytes());
    let linked = u64::from(LINKED);
    file.extend([linked, 64, 0].map(u64::to_le_bytes).concat()); // entry point, program headers
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1_u32, 7].map(u32::to_le_bytes).concat()); // PT_LOAD, all rights
    let size = code.len() as u64;
    file.extend([4096, linked, linked, size, size, 4096].map(u64::to_le_bytes).concat());
    file.resize(4096, 0);
    file.extend(code);
    file
}

fn pack(kernel: &[u8]) -> Vec<u8> {
    // One sequence of literals: a token, then the length less 15 in bytes of 255 and a last one that is less.
    let more = kernel.len() - 15;
    let mut block = vec![0xf0];
    block.extend(vec![255; more / 255]);
    block.push((more % 255).to_le_bytes()[0]);
    block.extend(kernel);
    [&[0x02, 0x21, 0x4c, 0x18], &length(block.len(), 1)[..], &block, &length(kernel.len(), 1)].concat()
}

/// A length in units, as headers have it.
fn length(bytes: usize, unit: usize) -> [u8; 4] {
    u32::try_from(bytes / unit).expect("a short file").to_le_bytes()
}
