//! Unpacking a payload of any content from a bzImage whose header may lie: it is refused with a reason, or fills all of
//! the memory that it was to fill, and takes no more than a decoder needs.

use std::io::Write;

use arch::payload::{Packed, PayloadError, unpack};

use crate::allocated;
use crate::input::Step;
use crate::kernel::file;
use crate::seeds::put;

/// What a decoder may take beside the kernel, in bytes: a dictionary of 128 MiB with what goes with it (xz).
const DECODER: usize = 134 << 20;
/// Bytes behind the kernel's memory, which must not change.
const BEHIND: usize = 4096;
/// Where the payload begins in the file: behind boot sector, real-mode code and the decompressor.
const START: usize = 0x800;

/// Unpacks `payload`. `how` is: in `a` the power of two that is the memory that the header says is needed, in `op` which
/// of the header's fields lie, and in `d` how.
pub fn unpack_from_bzimage(how: Step, payload: &[u8]) {
    let room = 1_u32 << (how.a % 26);
    let kernel = file(&bzimage(how, room, payload));
    let Some(packed) = told(Packed::find(&kernel)) else { return };
    let payload = packed.read(&kernel).expect("what lies within the file can be read");
    let Some(size) = told(packed.unpacked_size(&payload)) else { return };
    assert!((1..=room as usize).contains(&size), "{size} bytes where there is room for {room}");
    if let Some(first) = fill(&payload, size, 0)
        && let Some(second) = fill(&payload, size, 0xa5)
    {
        assert!(first == second, "a part of the kernel's memory was not filled");
    }
}

/// A bzImage with this payload, whose header says what is to be believed.
fn bzimage(how: Step, room: u32, payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0x90; START];
    image[..0x400].fill(0);
    put(&mut image, 0x1f1, &[1]); // setup_sects
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]); // boot_flag, jump
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    put(&mut image, 0x260, &room.to_le_bytes());
    let (offset, len) = (0x400, u32::try_from(payload.len()).expect("an input's length"));
    put(&mut image, 0x248, &if how.op & 1 == 0 { offset } else { offset ^ how.d }.to_le_bytes());
    put(&mut image, 0x24c, &if how.op & 2 == 0 { len } else { len ^ how.d }.to_le_bytes());
    if how.op & 4 != 0 {
        put(&mut image, 0x201, &[how.b]); // where the header ends
    }
    image.extend_from_slice(payload);
    image
}

/// What was found out, where it was not refused with a reason.
fn told<T>(result: Result<T, PayloadError>) -> Option<T> {
    result.map_err(|error| assert!(!error.to_string().is_empty(), "{error:?} says nothing")).ok()
}

/// Unpacks into memory that is filled with `byte` before.
fn fill(payload: &[u8], size: usize, byte: u8) -> Option<Vec<u8>> {
    let mut memory = vec![byte; size + BEHIND];
    let (into, behind) = memory.split_at_mut(size);
    let (result, taken) = allocated::during(|| unpack(payload, into));
    assert!(taken <= DECODER, "{taken} bytes were allocated to unpack {size}");
    assert!(behind.iter().all(|found| *found == byte), "something behind the kernel's memory was written");
    told(result)?;
    memory.truncate(size);
    Some(memory)
}

/// The ways in which kernels are packed.
#[derive(Debug, Clone, Copy)]
pub enum Format {
    /// Zstandard.
    Zstd,
    /// The old format of lz4.
    Lz4,
    /// gzip.
    Gzip,
    /// xz with the filter for x86.
    Xz,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Zstd, Self::Lz4, Self::Gzip, Self::Xz];

    /// Packs bytes as the kernel's build does, with a size behind them that need not be the right one.
    pub fn pack(self, bytes: &[u8], size: u32) -> Vec<u8> {
        let mut packed = match self {
            Self::Zstd => {
                let mut packed = vec![0; zstd_safe::compress_bound(bytes.len())];
                let len = zstd_safe::compress(packed.as_mut_slice(), bytes, 3).expect("zstd");
                packed.truncate(len);
                packed
            }
            Self::Lz4 => pack_lz4(bytes),
            Self::Gzip => {
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                encoder.write_all(bytes).expect("gzip");
                let mut packed = encoder.finish().expect("gzip");
                // The format ends with the size.
                packed.truncate(packed.len() - 4);
                packed
            }
            Self::Xz => {
                let mut options = lzma_rust2::XzOptions::with_preset(1);
                options.set_check_sum_type(lzma_rust2::CheckType::Crc32);
                options.prepend_pre_filter(lzma_rust2::FilterType::BcjX86, 0);
                let mut encoder = lzma_rust2::XzWriter::new(Vec::new(), options).expect("xz");
                encoder.write_all(bytes).expect("xz");
                encoder.finish().expect("xz")
            }
        };
        packed.extend(size.to_le_bytes());
        packed
    }
}

/// A magic number, then blocks of 8 MiB unpacked, each with its packed length in front.
fn pack_lz4(bytes: &[u8]) -> Vec<u8> {
    let mut packed = vec![0x02, 0x21, 0x4c, 0x18];
    for block in bytes.chunks(8 << 20) {
        let mut buffer = vec![0; lz4_flex::block::get_maximum_output_size(block.len())];
        let len = lz4_flex::block::compress_into(block, &mut buffer).expect("lz4");
        packed.extend(u32::try_from(len).expect("a block's length").to_le_bytes());
        packed.extend_from_slice(&buffer[..len]);
    }
    packed
}

/// The memory of a kernel, as the programs of this target name it, that `size` bytes fit into.
pub fn room_for(size: usize) -> u8 {
    u8::try_from(size.next_power_of_two().trailing_zeros()).unwrap_or(u8::MAX)
}
