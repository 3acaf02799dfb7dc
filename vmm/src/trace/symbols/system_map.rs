//! A kernel's `System.map`: a line for each symbol with its address, type and name.

use std::fs::File;
use std::io::Read;

/// The largest file that is read, in bytes. Real ones have 5 to 12 MiB.
const LARGEST: u64 = 64 << 20;
/// Fewer symbols are no map: distributions ship one of a single line that names the package with the real one.
const FEWEST: usize = 100;

/// The functions of a kernel, at the addresses that it was linked for.
pub struct SystemMap {
    /// Sorted by address.
    symbols: Vec<(u64, String)>,
}

impl SystemMap {
    /// Reads a file; `None` where it is none.
    pub fn read(file: &File) -> Option<Self> {
        let mut text = Vec::new();
        file.take(LARGEST).read_to_end(&mut text).ok()?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Option<Self> {
        let symbol = |line: &str| {
            let mut words = line.split_whitespace();
            let address = u64::from_str_radix(words.next()?, 16).ok()?;
            // Code, local or not, weak or not.
            let code = matches!(words.next()?, "t" | "T" | "w" | "W");
            let name = words.next().filter(|_| code)?;
            Some((address, name.to_owned()))
        };
        let mut symbols: Vec<(u64, String)> = text.lines().filter_map(symbol).collect();
        symbols.sort_by_key(|(address, _)| *address);
        (symbols.len() >= FEWEST).then_some(Self { symbols })
    }

    /// The last symbol that does not begin behind an address, and the offset from it.
    pub fn find(&self, address: u64) -> Option<(String, u64)> {
        let after = self.symbols.partition_point(|(start, _)| *start <= address);
        let (start, name) = self.symbols.get(after.checked_sub(1)?)?;
        Some((name.clone(), address - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_has_the_name_of_the_function_around_it() {
        let mut text = String::from("0000000000000000 D __per_cpu_start\nffffffff81000100 D data\n");
        for index in 0..FEWEST as u64 {
            text += &format!("{:016x} T function_{index}\n", 0xffff_ffff_8100_0000 + index * 0x100);
        }
        let map = SystemMap::parse(&text).unwrap();
        assert_eq!(map.find(0xffff_ffff_8100_01ff), Some(("function_1".into(), 0xff)));
        assert_eq!(map.find(0xffff_ffff_8100_0000), Some(("function_0".into(), 0)));
        assert_eq!(map.find(0xffff_ffff_80ff_ffff), None);
    }

    #[test]
    fn a_stub_is_no_map() {
        assert!(SystemMap::parse("ffffffffffffffff B The real System.map is in another package\n").is_none());
        assert!(SystemMap::parse("").is_none());
    }
}
