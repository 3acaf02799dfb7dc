//! A guest that a script plays.

/// An ELF executable for x86-64 with one segment at 1 MiB: enough for a guest that a script plays.
pub fn elf() -> Vec<u8> {
    const CODE: u64 = 0x10_0000;
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([CODE, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    file.extend([0, CODE, CODE, 121, 121, 4096].map(u64::to_le_bytes).concat());
    file.push(0xf4);
    file
}
