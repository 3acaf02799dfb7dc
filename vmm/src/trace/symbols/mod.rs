//! Names for addresses in a guest's kernel, from its own table of symbols or from a System.map.

mod kallsyms;
mod system_map;
mod vmcoreinfo;

use std::fs::File;

use vm_memory::GuestMemoryMmap;

use kallsyms::Kallsyms;
use system_map::SystemMap;
use vmcoreinfo::Vmcoreinfo;

/// Where Linux maps its own image on x86-64 (`__START_KERNEL_map`); modules follow after at most 1 GiB.
const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;
/// How far behind the last known symbol an address may lie and still be told from it.
const LONGEST_FUNCTION: u64 = 1 << 20;

/// What gives names to addresses.
pub struct Symbols {
    own: Option<Kallsyms>,
    map: Option<(SystemMap, u64)>,
}

impl Symbols {
    /// Looks for the running kernel's own table in guest memory, which is there from the second half of a boot on, and
    /// reads the System.map. `slide` is how far the kernel lies from the addresses in that, where the loader knows it;
    /// a running kernel's own word goes before.
    pub fn find(memory: &GuestMemoryMmap, system_map: Option<&File>, slide: u64) -> Self {
        let info = Vmcoreinfo::find(memory);
        let own = info.as_ref().and_then(|info| Kallsyms::read(memory, info));
        let slide = info.and_then(|info| info.slide()).unwrap_or(slide);
        let map = system_map.and_then(SystemMap::read).map(|map| (map, slide));
        Self { own, map }
    }

    /// The name for an address, with the offset from it: `start_kernel+0x2a`.
    pub fn name(&self, address: u64) -> Option<String> {
        if address < KERNEL_MAP {
            return None;
        }
        let own = self.own.as_ref().and_then(|own| own.find(address));
        let map = || self.map.as_ref().and_then(|(map, slide)| map.find(address.wrapping_sub(*slide)));
        let (name, offset) = own.or_else(map).filter(|(_, offset)| *offset < LONGEST_FUNCTION)?;
        Some(format!("{name}+{offset:#x}"))
    }

    /// Where names come from, for people.
    pub fn source(&self) -> &'static str {
        match (&self.own, &self.map) {
            (Some(_), _) => "the running kernel's own table (kallsyms)",
            (None, Some(_)) => "the System.map",
            (None, None) => "nowhere: the kernel has no table in memory yet, and no System.map was found",
        }
    }
}
