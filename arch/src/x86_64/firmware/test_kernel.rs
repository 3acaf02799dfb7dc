//! A kernel for tests, here and of the monitor.

/// The least that is a bzImage with an EFI stub: boot sector, one sector of setup, some code.
pub fn kernel() -> Vec<u8> {
    let mut file = vec![0; 1024 + 100];
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x40;
    file[0x40..0x44].copy_from_slice(b"PE\0\0");
    file[0x1f1] = 1;
    file[0x201] = 0x66;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    file[0x211] = 1;
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&100_u32.to_le_bytes());
    file
}
