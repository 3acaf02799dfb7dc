//! Memory slots, and which pages were written.

use std::sync::Arc;

use hal::{DirtyTracking, Exit, GpaRange, Slot, SlotId, Visibility};
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

use crate::guest::{Did, Guest, MEMORY, Recorder, kvm, real_mode, then_die};

#[test]
fn the_dirty_log_shows_exactly_what_was_written() {
    let Some(kvm) = kvm() else { return };
    // mov [0x5123],al; then a read of another page, which does not count.
    let code = then_die(&[0xa2, 0x23, 0x51, 0xa0, 0x00, 0x70]);
    let guest = Guest::with(&kvm, &code, DirtyTracking::Bitmap);
    let mut vcpu = guest.vcpu(&kvm);
    let log = guest.vm.dirty_log().unwrap();
    assert!(log.collect(guest.slot).unwrap().iter().all(|word| *word == 0), "the monitor's own writes do not count");
    let (recorder, _heard) = Recorder::new();
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    // KVM may count a page that is only read when it maps it for the first time, so exactness begins with the second.
    let bitmap = log.collect(guest.slot).unwrap();
    assert_eq!(bitmap.len(), MEMORY / 4096 / 64);
    assert_eq!(bitmap[0] & 1 << 5, 1 << 5, "{bitmap:x?}");
    vcpu.reset(&real_mode(&kvm)).unwrap();
    assert_eq!(vcpu.run(&recorder).unwrap(), Exit::Shutdown);
    let bitmap = log.collect(guest.slot).unwrap();
    assert_eq!(bitmap[0], 1 << 5, "{bitmap:x?}");
    assert!(bitmap[1..].iter().all(|word| *word == 0), "{bitmap:x?}");
    assert!(log.collect(guest.slot).unwrap().iter().all(|word| *word == 0), "collecting starts anew");
    let error = log.collect(SlotId(9)).unwrap_err().to_string();
    assert!(error.contains("no slot 9"), "{error}");
}

#[test]
fn memory_slots_are_checked_and_come_back() {
    let Some(kvm) = kvm() else { return };
    let guest = Guest::new(&kvm, &then_die(&[0xa0, 0x10, 0x00, 0xe6, 0x11]));
    let memory = guest.vm.memory();
    let region = |start, len| {
        Slot::new(Arc::new(GuestRegionMmap::new(MmapRegion::new(len).unwrap(), GuestAddress(start)).unwrap()))
    };
    let overlaps = memory.map(region(0xf_f000, 0x2000)).unwrap_err().to_string();
    assert!(overlaps.contains("overlaps a slot at 0x0 to 0x100000"), "{overlaps}");
    let crooked = memory.map(region(0x20_0800, 0x1000)).unwrap_err().to_string();
    assert!(crooked.contains("multiples of 4096"), "{crooked}");
    let unlogged = memory.map(Slot { log_dirty: true, ..region(0x20_0000, 0x1000) }).unwrap_err().to_string();
    assert!(unlogged.contains("without dirty bitmaps"), "{unlogged}");
    let id = memory.map(region(0x20_0000, 0x1000)).unwrap();
    assert_eq!(memory.unmap(id).unwrap().range(), GpaRange { start: 0x20_0000, len: 0x1000 });
    let gone = memory.unmap(id).unwrap_err().to_string();
    assert!(gone.contains("there is no slot 1"), "{gone}");
    assert_eq!(memory.map(region(0x20_0000, 0x1000)).unwrap(), id, "the number is used again");
    let visibility = memory.convert(GpaRange { start: 0, len: 4096 }, Visibility::Private).unwrap_err().to_string();
    assert!(visibility.contains("no private memory"), "{visibility}");
}

#[test]
fn writes_to_readonly_memory_reach_the_handler() {
    let Some(kvm) = kvm() else { return };
    // mov ax,0xffff; mov ds,ax; mov al,[0x10]: reads from the slot; mov [0x11],al: a write
    let guest = Guest::new(&kvm, &then_die(&[0xb8, 0xff, 0xff, 0x8e, 0xd8, 0xa0, 0x10, 0x00, 0xa2, 0x11, 0x00]));
    let rom = Arc::new(GuestRegionMmap::new(MmapRegion::new(0x1000).unwrap(), GuestAddress(0x10_0000)).unwrap());
    rom.write_slice(&[0x77], MemoryRegionAddress(0)).unwrap();
    guest.vm.memory().map(Slot { readonly: true, ..Slot::new(rom.clone()) }).unwrap();
    let (recorder, heard) = Recorder::new();
    assert_eq!(guest.vcpu(&kvm).run(&recorder).unwrap(), Exit::Shutdown);
    assert_eq!(heard.try_recv(), Ok(Did::MmioWrite(0x10_0001, vec![0x77])));
}
