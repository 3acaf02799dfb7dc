//! A running Linux kernel's table of its own symbols, read out of guest memory (Linux, `kernel/kallsyms.c` and
//! `scripts/kallsyms.c`). Whatever the guest has there is taken with care: a table that makes no sense is none.
//!
//! Symbols are sorted by address. Their addresses are 32-bit offsets; their names a length and as many tokens, each of
//! which stands for a piece of text. The first letter of the text is the symbol's type.

use std::borrow::Cow;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::vmcoreinfo::Vmcoreinfo;

/// The most symbols of a kernel. Debian's have some 200,000.
const MOST_SYMBOLS: u32 = 2_000_000;
/// The most bytes of names, and of the texts of tokens.
const MOST_NAMES: usize = 64 << 20;
const MOST_TOKENS: usize = 64 << 10;
/// Bytes of a token's place in the list of texts.
const PLACE: usize = 2;
const TOKENS: usize = 256;

/// The symbols of a running kernel.
pub struct Kallsyms {
    offsets: Vec<u32>,
    base: u64,
    names: Vec<u8>,
    /// Texts of the tokens, each closed by a zero byte, and where each begins.
    texts: Vec<u8>,
    places: Vec<u8>,
}

impl Kallsyms {
    /// Reads the table that the kernel tells of.
    pub fn read(memory: &GuestMemoryMmap, info: &Vmcoreinfo) -> Option<Self> {
        let at = |name: &str| info.physical(info.symbol(name)?);
        let count = memory.read_obj::<u32>(at("kallsyms_num_syms")?).ok().filter(|count| *count <= MOST_SYMBOLS)?;
        let count = usize::try_from(count).ok()?;
        let offsets = bytes(memory, at("kallsyms_offsets")?, count * 4)?;
        let offsets = offsets.chunks_exact(4).filter_map(|word| Some(u32::from_le_bytes(word.try_into().ok()?)));
        Some(Self {
            offsets: offsets.collect(),
            base: memory.read_obj(at("kallsyms_relative_base")?).ok()?,
            // No name is longer than 512 bytes, and most have some 12 tokens.
            names: bytes(memory, at("kallsyms_names")?, (count * 32).min(MOST_NAMES))?,
            texts: bytes(memory, at("kallsyms_token_table")?, MOST_TOKENS)?,
            places: bytes(memory, at("kallsyms_token_index")?, TOKENS * PLACE)?,
        })
    }

    /// The last function that does not begin behind an address, and the offset from it.
    pub fn find(&self, address: u64) -> Option<(String, u64)> {
        let starts = self.offsets.iter().map(|offset| self.address(*offset));
        let near = starts.enumerate().filter(|(_, start)| *start <= address);
        // Of several at one address the first is as good as any.
        let (index, start) = near.max_by_key(|(index, start)| (*start, std::cmp::Reverse(*index)))?;
        Some((self.name(index)?, address - start))
    }

    /// Where a symbol lies. Kernels with absolute addresses of per-CPU data (`KALLSYMS_ABSOLUTE_PERCPU`) have those as
    /// they are, and all others counted downwards from one below the base; later ones count upwards from it.
    fn address(&self, offset: u32) -> u64 {
        let downwards = self.offsets.last().is_some_and(|last| last.cast_signed() < 0);
        match offset.cast_signed() {
            signed if !downwards => self.base.wrapping_add(u64::from(signed.cast_unsigned())),
            signed if signed < 0 => self.base.wrapping_sub(1).wrapping_add(u64::from(signed.unsigned_abs())),
            signed => u64::from(signed.unsigned_abs()),
        }
    }

    /// The name of a symbol by its number.
    fn name(&self, index: usize) -> Option<String> {
        let mut rest = self.names.as_slice();
        for _ in 0..index {
            rest = split(rest)?.1;
        }
        let tokens = split(rest)?.0;
        let text: Option<Vec<Cow<'_, str>>> = tokens.iter().map(|token| self.token(*token)).collect();
        let text = text?.concat();
        let name: String = text.chars().skip(1).collect();
        (!name.is_empty() && name.chars().all(|char| char.is_ascii_graphic())).then_some(name)
    }

    fn token(&self, token: u8) -> Option<Cow<'_, str>> {
        let place = self.places.get(usize::from(token) * PLACE..)?.first_chunk()?;
        let text = self.texts.get(usize::from(u16::from_le_bytes(*place))..)?;
        Some(String::from_utf8_lossy(text.split(|byte| *byte == 0).next()?))
    }
}

/// The tokens of the first name, and what stands behind it. A length of 128 and more has two bytes, low bits first.
fn split(names: &[u8]) -> Option<(&[u8], &[u8])> {
    let (first, rest) = names.split_first()?;
    let (length, rest) = match first & 0x80 {
        0 => (usize::from(*first), rest),
        _ => {
            let (second, rest) = rest.split_first()?;
            (usize::from(first & 0x7f) | usize::from(*second) << 7, rest)
        }
    };
    rest.split_at_checked(length)
}

/// Bytes of guest memory; fewer where it ends, but some.
fn bytes(memory: &GuestMemoryMmap, at: GuestAddress, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    let read = memory.read(&mut bytes, at).ok().filter(|read| *read > 0)?;
    bytes.truncate(read);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens 0 to 2 are "Ts", "tart" and "_kernel"; names are "start" and "start_kernel", and one of 130 tokens.
    fn table(offsets: Vec<u32>) -> Kallsyms {
        let texts = b"Ts\0tart\0_kernel\0".to_vec();
        let places: Vec<u8> = [0_u16, 3, 8].into_iter().flat_map(u16::to_le_bytes).collect();
        let mut names = vec![2, 0, 1, 3, 0, 1, 2, 0x80 | 2, 1, 0];
        names.extend([1; 129]);
        Kallsyms { offsets, base: 0xffff_ffff_8100_0000, names, texts, places }
    }

    #[test]
    fn names_are_put_together_from_tokens() {
        let table = table(vec![0, 0x100, 0x200]);
        assert_eq!(table.find(0xffff_ffff_8100_0010), Some(("start".into(), 0x10)));
        assert_eq!(table.find(0xffff_ffff_8100_0100), Some(("start_kernel".into(), 0)));
        assert_eq!(table.find(0xffff_ffff_8100_0200).map(|(name, _)| name.len()), Some(1 + 129 * 4));
        assert_eq!(table.find(0xffff_ffff_80ff_ffff), None);
    }

    #[test]
    fn addresses_may_count_downwards_from_below_the_base() {
        // An absolute address, and -1 and -0x101: at the base and 0x100 behind it.
        let table = table(vec![0x1000, u32::MAX, u32::MAX - 0x100]);
        assert_eq!(table.find(0xffff_ffff_8100_00ff), Some(("start_kernel".into(), 0xff)));
        assert_eq!(table.address(0x1000), 0x1000);
        assert_eq!(table.address(u32::MAX - 0x100), 0xffff_ffff_8100_0100);
    }

    #[test]
    fn a_table_that_makes_no_sense_gives_no_name() {
        let mut table = table(vec![0, 0x100]);
        table.names = vec![200];
        assert_eq!(table.find(0xffff_ffff_8100_0000), None);
        table.names = vec![1, 77];
        assert_eq!(table.find(0xffff_ffff_8100_0000), None);
        table.offsets.clear();
        assert_eq!(table.find(0xffff_ffff_8100_0000), None);
    }
}
