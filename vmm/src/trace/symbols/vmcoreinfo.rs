//! What a Linux kernel tells crash dump tools of itself (`Documentation/admin-guide/kdump/vmcoreinfo.rst`): lines of
//! text in a page of its own, made in the second half of its boot.

use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::KERNEL_MAP;

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// How the page begins.
const BEGINNING: &[u8] = b"OSRELEASE=";
/// The most guest memory that is searched, in bytes.
const MOST_SEARCHED: u64 = 64 << 30;

/// The text of a kernel that has made it.
pub struct Vmcoreinfo(String);

impl Vmcoreinfo {
    /// Searches guest memory for it.
    pub fn find(memory: &GuestMemoryMmap) -> Option<Self> {
        let starts = memory.iter().flat_map(|region| {
            let start = region.start_addr();
            (0..region.len() / PAGE).filter_map(move |page| start.checked_add(page * PAGE))
        });
        let most = usize::try_from(MOST_SEARCHED / PAGE).unwrap_or(usize::MAX);
        starts.take(most).find_map(|page| Self::read(memory, page))
    }

    fn read(memory: &GuestMemoryMmap, at: GuestAddress) -> Option<Self> {
        let mut beginning = [0; BEGINNING.len()];
        memory.read_slice(&mut beginning, at).ok().filter(|()| beginning == BEGINNING)?;
        let mut page = [0; PAGE_BYTES];
        memory.read_slice(&mut page, at).ok()?;
        let text = page.split(|byte| *byte == 0).next()?;
        let info = Self(String::from_utf8_lossy(text).into_owned());
        // Not a copy of some of its text.
        info.symbol("kallsyms_names").and(info.physical_base()).map(|_| info)
    }

    fn value(&self, key: &str) -> Option<&str> {
        self.0.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// The virtual address of a symbol.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.value(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// What is added to an address within the kernel's image for its physical address.
    fn physical_base(&self) -> Option<u64> {
        self.value("NUMBER(phys_base)")?.parse::<i64>().ok().map(i64::cast_unsigned)
    }

    /// How far the kernel lies from where it was linked.
    pub fn slide(&self) -> Option<u64> {
        u64::from_str_radix(self.value("KERNELOFFSET")?, 16).ok()
    }

    /// The guest physical address of something in the kernel's image.
    pub fn physical(&self, address: u64) -> Option<GuestAddress> {
        let offset = address.checked_sub(KERNEL_MAP)?;
        Some(GuestAddress(offset.wrapping_add(self.physical_base()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_found_at_the_start_of_a_page() {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert!(Vmcoreinfo::find(&memory).is_none());
        let text =
            "OSRELEASE=6.12\nSYMBOL(kallsyms_names)=ffffffff82000000\nNUMBER(phys_base)=-4096\nKERNELOFFSET=1c00000\n";
        // Not at the start of a page, and not whole.
        memory.write_slice(text.as_bytes(), GuestAddress(0x5010)).unwrap();
        memory.write_slice(b"OSRELEASE=6.12\n", GuestAddress(0x6000)).unwrap();
        assert!(Vmcoreinfo::find(&memory).is_none());
        memory.write_slice(text.as_bytes(), GuestAddress(0x8000)).unwrap();
        let info = Vmcoreinfo::find(&memory).unwrap();
        assert_eq!(info.symbol("kallsyms_names"), Some(0xffff_ffff_8200_0000));
        assert_eq!(info.symbol("kallsyms"), None);
        assert_eq!(info.slide(), Some(0x1c0_0000));
        assert_eq!(info.physical(0xffff_ffff_8200_0000), Some(GuestAddress(0x1ff_f000)));
        assert_eq!(info.physical(0x1000), None);
    }
}
