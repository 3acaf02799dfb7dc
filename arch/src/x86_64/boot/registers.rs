//! The boot processor's registers at the entry points, and the descriptor table behind its segments.

use hal::{BootRegisters, DescriptorTable, Registers, Segment, SystemRegisters};

use super::super::layout;

/// The selectors that the Linux protocol prescribes for code and data (`__BOOT_CS`, `__BOOT_DS`).
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Access rights in the layout of [`Segment::access`]: present, code, readable, accessed, of 4 KiB units.
const CODE_32: u32 = 0xc09b;
/// The same in long mode.
const CODE_64: u32 = 0xa09b;
/// Present, data, writable, accessed, of 4 KiB units.
const DATA: u32 = 0xc093;
/// Present, code, readable, accessed, and data, writable, accessed, both of 16 bits and counted in bytes.
const CODE_16: u32 = 0x009b;
const DATA_16: u32 = 0x0093;
/// Present, a local descriptor table.
const LOCAL_TABLE: u32 = 0x0082;
/// Present, a busy task state segment: what VT-x demands of the task register.
const BUSY_TASK: u32 = 0x008b;
/// No segment at all.
const UNUSABLE: u32 = 1 << 16;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_NW: u64 = 1 << 29;
const CR0_CD: u64 = 1 << 30;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of RFLAGS that is always one.
const RFLAGS_FIXED: u64 = 1 << 1;
/// The local APIC is on, at its usual address, and belongs to the boot processor (IA32_APIC_BASE).
const APIC_BASE: u64 = layout::LAPIC.start | 1 << 11 | 1 << 8;

/// At the 64-bit Linux entry: long mode with paging, and RSI at the zero page.
pub(super) fn linux64(entry: u64) -> BootRegisters {
    let mut sregs = flat(CODE_64);
    sregs.gdt = DescriptorTable { base: layout::BOOT_GDT, limit: GDT_LIMIT };
    sregs.cr0 |= CR0_PG;
    sregs.cr3 = layout::PAGE_TABLES;
    sregs.cr4 = CR4_PAE;
    sregs.efer = EFER_LME | EFER_LMA;
    let regs = Registers { rip: entry, rsi: layout::ZERO_PAGE, rflags: RFLAGS_FIXED, ..Registers::default() };
    BootRegisters { regs, sregs }
}

/// At the PVH entry: 32-bit protected mode without paging, and EBX at the start info. The protocol promises no
/// descriptor table, so there is none.
pub(super) fn pvh(entry: u32) -> BootRegisters {
    let rip = u64::from(entry);
    let regs = Registers { rip, rbx: layout::PVH_START_INFO, rflags: RFLAGS_FIXED, ..Registers::default() };
    BootRegisters { regs, sregs: flat(CODE_32) }
}

/// After power-on (Intel SDM volume 3, §10.1.1, table 10-1): real mode, with a code segment whose base is not yet 16 times
/// its selector.
pub(in super::super) fn power_on() -> BootRegisters {
    let segment = |access| Segment { base: 0, limit: 0xffff, selector: 0, access };
    let data = segment(DATA_16);
    let table = DescriptorTable { base: 0, limit: 0xffff };
    let sregs = SystemRegisters {
        cs: Segment { base: 0xffff_0000, selector: 0xf000, ..segment(CODE_16) },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(BUSY_TASK),
        ldt: segment(LOCAL_TABLE),
        gdt: table,
        idt: table,
        cr0: CR0_CD | CR0_NW | CR0_ET,
        apic_base: APIC_BASE,
        ..SystemRegisters::default()
    };
    let regs = Registers { rip: 0xfff0, rflags: RFLAGS_FIXED, ..Registers::default() };
    BootRegisters { regs, sregs }
}

/// Flat segments in protected mode.
fn flat(code_access: u32) -> SystemRegisters {
    let code = Segment { base: 0, limit: u32::MAX, selector: CODE_SELECTOR, access: code_access };
    let data = Segment { base: 0, limit: u32::MAX, selector: DATA_SELECTOR, access: DATA };
    SystemRegisters {
        cs: code,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment { base: 0, limit: 0x67, selector: TASK_SELECTOR, access: BUSY_TASK },
        ldt: Segment { base: 0, limit: 0, selector: 0, access: UNUSABLE },
        cr0: CR0_PE | CR0_ET,
        apic_base: APIC_BASE,
        ..SystemRegisters::default()
    }
}

const GDT_ENTRIES: usize = 6;
/// Offset of the table's last byte.
const GDT_LIMIT: u16 = 6 * 8 - 1;

/// The descriptor table at the 64-bit entry: two unused entries, then code, data, and a task that takes two.
pub(super) fn gdt() -> [u64; GDT_ENTRIES] {
    let sregs = flat(CODE_64);
    [0, 0, descriptor(sregs.cs), descriptor(sregs.ds), descriptor(sregs.tr), 0]
}

/// A segment as an entry of a descriptor table (Intel SDM vol. 3 §3.4.5), for base 0.
fn descriptor(segment: Segment) -> u64 {
    let in_pages = segment.access & 1 << 15 != 0;
    let limit = u64::from(if in_pages { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.access);
    limit & 0xffff | (access & 0xff) << 40 | (limit >> 16 & 0xf) << 48 | (access >> 12 & 0xf) << 52
}
