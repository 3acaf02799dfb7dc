#![no_main]
libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    if data.len() > 4 && data[0] == b'H' && u32::from_le_bytes([data[1],data[2],data[3],data[4]]) == 0xdeadbeef { panic!("found"); }
});
