//! What a Linux kernel tells crash dump tools of itself (`Documentation/admin-guide/kdump/vmcoreinfo.rst`): lines of
//! text in a page of its own, made in the second half of its boot.

use vm_memory::{
    Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use super::KERNEL_MAP;

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// How the page begins.
const BEGINNING: &[u8] = b"OSRELEASE=";
/// The most guest memory that is searched in each region, in bytes, and how much of it at a time.
const MOST_SEARCHED: u64 = 256 << 30;
const PIECE: u64 = 1 << 30;

/// The text of a kernel that has made it.
pub struct Vmcoreinfo(String);

impl Vmcoreinfo {
    /// Searches guest memory for it.
    pub fn find(memory: &GuestMemoryMmap) -> Option<Self> {
        memory.iter().find_map(|region| {
            let pieces = (0..region.len().min(MOST_SEARCHED)).step_by(usize::try_from(PIECE).ok()?);
            let mut pages = pieces.flat_map(|piece| resident(region, piece));
            pages.find_map(|page| Self::read(memory, page))
        })
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

/// The pages of a piece of a region that are there. The others were never touched, and to read them would only make
/// them.
fn resident(region: &GuestRegionMmap, from: u64) -> Vec<GuestAddress> {
    let length = PIECE.min(region.len().saturating_sub(from));
    let (Ok(offset), Ok(size)) = (usize::try_from(from), usize::try_from(length)) else { return Vec::new() };
    let mut there = vec![0_u8; size.div_ceil(PAGE_BYTES)];
    let start = region.as_ptr().wrapping_add(offset);
    #[expect(unsafe_code, reason = "mincore takes raw addresses")]
    // SAFETY: the piece lies within a mapping that `region` keeps alive, and there is a byte for each of its pages.
    let refused = unsafe { libc::mincore(start.cast(), size, there.as_mut_ptr()) };
    if refused != 0 {
        tracing::debug!("mincore: {}", std::io::Error::last_os_error());
        return Vec::new();
    }
    let page = |(number, there): (u64, u8)| {
        (there & 1 != 0).then(|| region.start_addr().checked_add(from + number * PAGE)).flatten()
    };
    (0..).zip(there).filter_map(page).collect()
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
