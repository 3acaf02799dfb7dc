//! Saving and restoring a vCPU. [`save`] and [`restore`] each list their steps in the order in which KVM wants them.
#![expect(unsafe_code, reason = "the XSAVE area and nested state have sizes that only the kernel knows")]

use std::ptr;

use kvm_bindings::nested::KvmNestedStateBuffer;
use kvm_bindings::{
    KVM_CAP_XSAVE2, Msrs, Xsave, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_nested_state,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, VcpuFd};

use super::failed;
use super::vcpu::KvmVcpu;
use crate::{Error, Msr, Result, STATE_VERSION, VcpuSnapshot};

/// The time stamp counter.
pub(super) const MSR_TSC: u32 = 0x10;
/// Locks in which features of the processor a guest may use (IA32_FEATURE_CONTROL).
const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// When the local APIC's timer fires, in TSC-deadline mode (IA32_TSC_DEADLINE).
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// The part of the XSAVE area that every processor has: 512 bytes of legacy state and 64 of header.
const XSAVE_MIN: usize = 576;

/// Reads the whole state. The vCPU does not run meanwhile, and its last exit has been completed.
pub(super) fn save(vcpu: &KvmVcpu) -> Result<VcpuSnapshot> {
    let fd = &vcpu.fd;
    // First, since reading it lets the vCPU take an INIT or start-up IPI that waits, which changes registers and APIC.
    let mp_state = fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let regs = fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let sregs = fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let xsave = save_xsave(vcpu)?;
    let xcrs = fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
    let msrs = save_msrs(vcpu)?;
    let lapic = fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    let debug = fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
    let nested = save_nested(vcpu)?;
    let tsc_khz = fd.get_tsc_khz().ok().filter(|khz| *khz > 0);
    // Last: the calls above may turn what waits into what is being delivered.
    let events = fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let [db0, db1, db2, db3] = debug.db;
    Ok(VcpuSnapshot {
        version: STATE_VERSION,
        cpuid: vcpu.cpuid.clone(),
        mp_state: (&mp_state).try_into()?,
        regs: (&regs).into(),
        sregs: (&sregs).into(),
        xsave,
        xcrs: xcrs.xcrs.iter().map(|x| (x.xcr, x.value)).take(usize::try_from(xcrs.nr_xcrs).unwrap_or(0)).collect(),
        msrs,
        lapic: Some(lapic.regs.map(c_char_to_byte).to_vec()),
        events: (&events).into(),
        debug_registers: [db0, db1, db2, db3, debug.dr6, debug.dr7],
        tsc_khz,
        nested,
    })
}

/// Puts a saved state into a vCPU, in an order in which each step finds what it depends on.
pub(super) fn restore(vcpu: &mut KvmVcpu, from: &VcpuSnapshot) -> Result<()> {
    let sections = Sections::of(vcpu, from)?;
    // Which registers and features exist; KVM refuses it after the first run.
    vcpu.set_cpuid(&from.cpuid)?;
    let fd = &vcpu.fd;
    // Before any write of the time stamp counter or its deadline, which are scaled by it.
    if let Some(khz) = from.tsc_khz.filter(|khz| fd.get_tsc_khz().ok() != Some(*khz)) {
        fd.set_tsc_khz(khz).map_err(failed("KVM_SET_TSC_KHZ"))?;
    }
    // Before the control registers: it decides whether virtualization may be on in them.
    let (first, later): (Vec<Msr>, Vec<Msr>) = from.msrs.iter().partition(|msr| msr.index == MSR_FEATURE_CONTROL);
    let mut refused = refused_msrs(fd, &first)?;
    // Before the local APIC, whose mode is in the APIC base, and before nested state, which needs EFER.
    fd.set_sregs(&(&from.sregs).into()).map_err(failed("KVM_SET_SREGS"))?;
    // After control registers and before events: it drops exceptions that wait.
    fd.set_regs(&(&from.regs).into()).map_err(failed("KVM_SET_REGS"))?;
    // SAFETY: the area has the size that KVM asks for on this host.
    unsafe { fd.set_xsave2(&sections.xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
    fd.set_xcrs(&sections.xcrs).map_err(failed("KVM_SET_XCRS"))?;
    // Before the MSRs: it stops the timer, and the deadline is ignored until the APIC is in deadline mode.
    if let Some(lapic) = &sections.lapic {
        fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))?;
    }
    // Guest memory must be there by now: KVM writes clocks into it inside this call.
    refused.extend(refused_msrs(fd, &later)?);
    // After the control registers and MSRs that it refers to.
    if let Some(nested) = &sections.nested {
        fd.set_nested_state(nested).map_err(failed("KVM_SET_NESTED_STATE"))?;
    }
    fd.set_debug_regs(&sections.debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
    // Before events: a vCPU in system management mode refuses to wait for a start-up IPI.
    fd.set_mp_state(kvm_mp_state::from(from.mp_state)).map_err(failed("KVM_SET_MP_STATE"))?;
    fd.set_vcpu_events(&(&from.events).into()).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
    // Tells the guest's watchdog that the time of the pause was not its own. A guest without KVM's clock refuses.
    let _ = fd.kvmclock_ctrl();
    if refused.is_empty() {
        return Ok(());
    }
    Err(Error::State(format!("this host's KVM refuses the registers {}", list_msrs(&refused))))
}

/// Sets MSRs in order.
///
/// # Errors
/// [`Error::State`] with all that KVM refuses.
pub(super) fn set_msrs(fd: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    match refused_msrs(fd, msrs)? {
        refused if refused.is_empty() => Ok(()),
        refused => Err(Error::State(format!("KVM refuses the registers {}", list_msrs(&refused)))),
    }
}

/// Sets MSRs in order and gives those back that could not be set, unless they have the value already.
fn refused_msrs(fd: &VcpuFd, msrs: &[Msr]) -> Result<Vec<Msr>> {
    let mut refused = Vec::new();
    let mut rest = msrs;
    // KVM stops at the first that it refuses and says how many it has set.
    while !rest.is_empty() {
        let batch = rest.get(..kvm_bindings::KVM_MAX_MSR_ENTRIES).unwrap_or(rest);
        let done = fd.set_msrs(&msr_list(batch)?).map_err(failed("KVM_SET_MSRS"))?;
        if let Some(msr) = batch.get(done) {
            if read_msrs(fd, &[msr.index])?.first() != Some(msr) {
                refused.push(*msr);
            }
            rest = rest.get(done + 1..).unwrap_or_default();
        } else {
            rest = rest.get(batch.len()..).unwrap_or_default();
        }
    }
    Ok(refused)
}

/// Reads the MSRs that KVM lists, in the order in which they are to be written.
fn save_msrs(vcpu: &KvmVcpu) -> Result<Vec<Msr>> {
    let mut msrs = read_msrs(&vcpu.fd, vcpu.vm.system.msr_indices()?)?;
    // The deadline is compared with the counter as soon as it is written, so it comes last. The sort is stable.
    msrs.sort_by_key(|msr| msr.index == MSR_TSC_DEADLINE);
    Ok(msrs)
}

/// Reads MSRs, leaving out those that this vCPU does not have.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut read = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = rest.get(..kvm_bindings::KVM_MAX_MSR_ENTRIES).unwrap_or(rest);
        let asked: Vec<_> = batch.iter().map(|index| Msr { index: *index, value: 0 }).collect();
        let mut list = msr_list(&asked)?;
        let done = fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
        read.extend(list.as_slice().iter().take(done).map(|entry| Msr { index: entry.index, value: entry.data }));
        // KVM stops at the first that the vCPU does not have: that one is passed over.
        let passed = if done < batch.len() { done + 1 } else { done };
        rest = rest.get(passed..).unwrap_or_default();
    }
    Ok(read)
}

fn msr_list(msrs: &[Msr]) -> Result<Msrs> {
    let entries: Vec<_> =
        msrs.iter().map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() }).collect();
    Msrs::from_entries(&entries).map_err(|_| Error::State("a list of registers is longer than KVM takes".into()))
}

fn list_msrs(msrs: &[Msr]) -> String {
    let texts: Vec<_> = msrs.iter().map(|msr| format!("{:#x} = {:#x}", msr.index, msr.value)).collect();
    texts.join(", ")
}

/// Bytes of the XSAVE area in this VM: the 4 KiB that every KVM has, or more where features need it.
fn xsave_size(vcpu: &KvmVcpu) -> usize {
    let told = vcpu.vm.fd.check_extension_raw(KVM_CAP_XSAVE2.into());
    usize::try_from(told).unwrap_or(0).max(size_of::<kvm_xsave>())
}

/// An area of the size that KVM reads and writes.
fn empty_xsave(vcpu: &KvmVcpu) -> Result<Xsave> {
    let extra = (xsave_size(vcpu) - size_of::<kvm_xsave>()).div_ceil(size_of::<u32>());
    Xsave::new(extra).map_err(|_| Error::State("the XSAVE area is larger than this monitor can hold".into()))
}

fn save_xsave(vcpu: &KvmVcpu) -> Result<Vec<u8>> {
    let mut area = empty_xsave(vcpu)?;
    if vcpu.vm.fd.check_extension_raw(KVM_CAP_XSAVE2.into()) > 0 {
        // SAFETY: the area has the size that KVM writes in this VM.
        unsafe { vcpu.fd.get_xsave2(&mut area) }.map_err(failed("KVM_GET_XSAVE2"))?;
    } else {
        let legacy = vcpu.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        // SAFETY: the length of the area is not touched.
        unsafe { area.as_mut_fam_struct() }.xsave.region = legacy.region;
    }
    let region = area.as_fam_struct_ref().xsave.region;
    Ok(region.iter().chain(area.as_slice()).flat_map(|word| word.to_le_bytes()).collect())
}

/// The guest hypervisor's state, where the guest has one.
fn save_nested(vcpu: &KvmVcpu) -> Result<Option<Vec<u8>>> {
    if !vcpu.vm.fd.check_extension(Cap::NestedState) {
        return Ok(None);
    }
    let mut buffer = KvmNestedStateBuffer::empty();
    let used = vcpu.fd.nested_state(&mut buffer).map_err(failed("KVM_GET_NESTED_STATE"))?;
    Ok(used.map(|size| {
        let size = size.get().min(size_of::<KvmNestedStateBuffer>());
        let mut bytes = vec![0; size];
        // SAFETY: both are at least `size` bytes long, and the buffer is plain data, zeroed where KVM wrote nothing.
        unsafe { ptr::copy_nonoverlapping((&raw const buffer).cast::<u8>(), bytes.as_mut_ptr(), size) };
        bytes
    }))
}

/// The sections of a snapshot in KVM's own layout, all checked before the first is placed.
struct Sections {
    xsave: Xsave,
    xcrs: kvm_xcrs,
    lapic: Option<kvm_lapic_state>,
    debug: kvm_debugregs,
    nested: Option<Box<KvmNestedStateBuffer>>,
}

impl Sections {
    fn of(vcpu: &KvmVcpu, from: &VcpuSnapshot) -> Result<Self> {
        if from.version != STATE_VERSION {
            return Err(Error::State(format!(
                "it has version {}, and this monitor knows version {STATE_VERSION}",
                from.version
            )));
        }
        let mut problems = Vec::new();
        let [db0, db1, db2, db3, dr6, dr7] = from.debug_registers;
        let sections = Self {
            xsave: place_xsave(vcpu, &from.xsave, &mut problems)?,
            xcrs: place_xcrs(&from.xcrs, &mut problems),
            lapic: from.lapic.as_deref().and_then(|page| place_lapic(page, &mut problems)),
            debug: kvm_debugregs { db: [db0, db1, db2, db3], dr6, dr7, ..Default::default() },
            nested: from.nested.as_deref().and_then(|bytes| place_nested(bytes, &mut problems)),
        };
        if problems.is_empty() { Ok(sections) } else { Err(Error::State(problems.join("; "))) }
    }
}

fn place_xsave(vcpu: &KvmVcpu, bytes: &[u8], problems: &mut Vec<String>) -> Result<Xsave> {
    let mut area = empty_xsave(vcpu)?;
    let size = xsave_size(vcpu);
    // Features that this host's KVM has no room for lie behind its end; they may still be unused.
    let beyond = bytes.get(size..).unwrap_or_default();
    if bytes.len() < XSAVE_MIN || beyond.iter().any(|byte| *byte != 0) {
        problems.push(format!(
            "the XSAVE area has {} bytes in use, and this host has room for {XSAVE_MIN} to {size}",
            bytes.len()
        ));
    }
    let mut words = bytes.chunks(4).map(|chunk| chunk.iter().rev().fold(0, |word, byte| word << 8 | u32::from(*byte)));
    // SAFETY: the length of the area is not touched.
    for word in unsafe { area.as_mut_fam_struct() }.xsave.region.iter_mut() {
        *word = words.next().unwrap_or(0);
    }
    for word in area.as_mut_slice() {
        *word = words.next().unwrap_or(0);
    }
    Ok(area)
}

fn place_xcrs(registers: &[(u32, u64)], problems: &mut Vec<String>) -> kvm_xcrs {
    let mut xcrs = kvm_xcrs::default();
    if registers.len() > xcrs.xcrs.len() {
        problems.push(format!("{} extended control registers are more than KVM has", registers.len()));
    }
    for (place, (number, value)) in xcrs.xcrs.iter_mut().zip(registers) {
        place.xcr = *number;
        place.value = *value;
        xcrs.nr_xcrs += 1;
    }
    xcrs
}

fn place_lapic(page: &[u8], problems: &mut Vec<String>) -> Option<kvm_lapic_state> {
    let Ok(bytes) = <[u8; 1024]>::try_from(page) else {
        problems.push(format!("the local APIC's page has {} bytes instead of 1024", page.len()));
        return None;
    };
    Some(kvm_lapic_state { regs: bytes.map(byte_to_c_char) })
}

fn place_nested(bytes: &[u8], problems: &mut Vec<String>) -> Option<Box<KvmNestedStateBuffer>> {
    let (smallest, largest) = (size_of::<kvm_nested_state>(), size_of::<KvmNestedStateBuffer>());
    if bytes.len() < smallest || bytes.len() > largest {
        problems.push(format!("nested state has {} bytes instead of {smallest} to {largest}", bytes.len()));
        return None;
    }
    let mut buffer = Box::new(KvmNestedStateBuffer::empty());
    // SAFETY: the buffer is plain data, valid with any contents, and the length has been checked against its size.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), (&raw mut *buffer).cast::<u8>(), bytes.len()) };
    // KVM reads as many bytes as the header claims.
    buffer.size = u32::try_from(bytes.len()).unwrap_or(0);
    Some(buffer)
}

fn c_char_to_byte(value: libc::c_char) -> u8 {
    value.to_ne_bytes()[0]
}

fn byte_to_c_char(value: u8) -> libc::c_char {
    libc::c_char::from_ne_bytes([value])
}
