//! The steps of a launch: each a call of KVM's, repeated as long as KVM wants it repeated.
#![expect(unsafe_code, reason = "KVM reads and writes through addresses that it is given")]

use kvm_bindings::kvm_cpuid_entry2;
use vm_memory::{Bytes, MmapRegion, VolatileMemory};
use vmm_sys_util::errno;
use vmm_sys_util::fam;

use super::abi::{self, CapabilitiesList, Command, InitVmList, LeavesList, MemRegion};
use super::cpuid;
use super::error::failed;
use crate::{CpuidEntry, Error, GpaRange, Result, TdxSpec, VcpuId};

const PAGE: u64 = 4096;
const PAGE_BYTES: usize = 4096;
/// Leaves that there is room for at first, and how often a step that KVM could not do at once is tried without any progress:
/// as often as other monitors do.
const ROOM: usize = 128;
const TRIES: u32 = 10_000;

const STEP_CAPABILITIES: &str = "KVM_TDX_CAPABILITIES";
const STEP_INIT_VM: &str = "KVM_TDX_INIT_VM";
const STEP_INIT_VCPU: &str = "KVM_TDX_INIT_VCPU";
const STEP_INIT_MEM_REGION: &str = "KVM_TDX_INIT_MEM_REGION";
const STEP_FINALIZE: &str = "KVM_TDX_FINALIZE_VM";
const STEP_GET_CPUID: &str = "KVM_TDX_GET_CPUID";

/// Who carries commands out: KVM, or a test's script of what Linux does.
pub(super) trait Calls {
    /// `KVM_MEMORY_ENCRYPT_OP` on the VM.
    ///
    /// # Errors
    /// KVM's.
    ///
    /// # Safety
    /// What the command points to is what it wants.
    unsafe fn of_vm(&self, command: &mut Command) -> std::result::Result<(), errno::Error>;

    /// `KVM_MEMORY_ENCRYPT_OP` on a vCPU.
    ///
    /// # Errors
    /// KVM's; ENXIO where there is no such vCPU.
    ///
    /// # Safety
    /// What the command points to is what it wants.
    unsafe fn of_vcpu(&self, id: VcpuId, command: &mut Command) -> std::result::Result<(), errno::Error>;
}

/// What trust domains can be on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Capabilities {
    pub attributes: u64,
    pub xfam: u64,
    /// What GetTdVmCallInfo tells the guest of the calls that there are: R11 and R12.
    pub calls: [u64; 2],
    /// The bits of CPUID that can be configured.
    pub cpuid: Vec<CpuidEntry>,
}

/// The monitor answers SetupEventNotifyInterrupt (GHCI 1.5, table of GetTdVmCallInfo).
const ANSWERED_R11: u64 = 1 << 1;

fn command(id: u32, data: u64) -> Command {
    Command { id, flags: 0, data, hw_error: 0 }
}

fn address<T>(of: *mut T) -> u64 {
    of.expose_provenance() as u64
}

fn too_long(_: fam::Error) -> Error {
    Error::Invalid { what: "CPUID", problem: format!("more than {} leaves", abi::MAX_LEAVES) }
}

fn leaves(entries: &[kvm_cpuid_entry2]) -> Vec<CpuidEntry> {
    entries.iter().map(CpuidEntry::from).collect()
}

/// Asks what trust domains can be here. KVM does not say how much room it needs, so the room is doubled until it is enough.
pub(super) fn capabilities(calls: &dyn Calls) -> Result<Capabilities> {
    let mut room = ROOM;
    loop {
        let mut list = CapabilitiesList::new(room).map_err(too_long)?;
        let mut command = command(abi::CAPABILITIES, address(list.as_mut_fam_struct_ptr()));
        // SAFETY: the list has as much room as it says.
        match unsafe { calls.of_vm(&mut command) } {
            Ok(()) => {
                let data = list.as_fam_struct_ref();
                return Ok(Capabilities {
                    attributes: data.attributes,
                    xfam: data.xfam,
                    calls: [data.kernel_r11 | data.user_r11 & ANSWERED_R11, data.kernel_r12],
                    // KVM does not say of these which have subleaves, so each counts as one.
                    cpuid: list
                        .as_slice()
                        .iter()
                        .map(|entry| CpuidEntry { index: Some(entry.index), ..entry.into() })
                        .collect(),
                });
            }
            Err(error) if error.errno() == libc::E2BIG && room < abi::MAX_LEAVES => room *= 2,
            Err(error) => return Err(failed(STEP_CAPABILITIES, error, 0)),
        }
    }
}

/// Makes the trust domain with what was asked for and is possible.
pub(super) fn init_vm(calls: &dyn Calls, capabilities: &Capabilities, spec: &TdxSpec) -> Result<()> {
    let refused = spec.attributes & !capabilities.attributes;
    if refused != 0 {
        return Err(Error::Unsupported(format!(
            "the attributes {:#x} of a trust domain were asked for, and KVM here knows {:#x} of them: leave {refused:#x} out",
            spec.attributes, capabilities.attributes
        )));
    }
    let asked = cpuid::configured(&spec.cpuid, &capabilities.cpuid);
    let asked: Vec<_> = asked.iter().map(kvm_cpuid_entry2::from).collect();
    let mut list = InitVmList::from_entries(&asked).map_err(too_long)?;
    // SAFETY: the number of entries stays as it is.
    let data = unsafe { list.as_mut_fam_struct() };
    data.attributes = spec.attributes;
    data.xfam = cpuid::xfam(&spec.cpuid, capabilities.xfam);
    data.config_id = spec.config_id.unwrap_or([0; 48]);
    data.owner = spec.owner.unwrap_or([0; 48]);
    data.owner_config = spec.owner_config.unwrap_or([0; 48]);
    let mut tries = TRIES;
    loop {
        // Anew each time, since KVM writes the TDX module's status there and wants zeros.
        let mut command = command(abi::INIT_VM, address(list.as_mut_fam_struct_ptr()));
        tries -= 1;
        // SAFETY: the list holds as many entries as it says.
        match unsafe { calls.of_vm(&mut command) } {
            Ok(()) => return Ok(()),
            // The processor had no random numbers for a key.
            Err(error) if error.errno() == libc::EAGAIN && tries > 0 => {}
            Err(error) => return Err(failed(STEP_INIT_VM, error, command.hw_error)),
        }
    }
}

/// The leaves that the TDX module gives a vCPU. KVM says how much room it needs.
pub(super) fn given_cpuid(calls: &dyn Calls, id: VcpuId) -> Result<Vec<CpuidEntry>> {
    let mut room = ROOM;
    loop {
        let mut list = LeavesList::new(room).map_err(too_long)?;
        let mut command = command(abi::GET_CPUID, address(list.as_mut_fam_struct_ptr()));
        // SAFETY: the list has as much room as it says.
        match unsafe { calls.of_vcpu(id, &mut command) } {
            Ok(()) => return Ok(leaves(list.as_slice())),
            Err(error) if error.errno() == libc::E2BIG => {
                let needed = usize::try_from(list.as_fam_struct_ref().count).unwrap_or(usize::MAX);
                if needed <= room {
                    return Err(failed(STEP_GET_CPUID, error, 0));
                }
                room = needed;
            }
            Err(error) => return Err(failed(STEP_GET_CPUID, error, 0)),
        }
    }
}

/// Has a vCPU begin with this value in RCX.
pub(super) fn init_vcpu(calls: &dyn Calls, id: VcpuId, rcx: u64) -> Result<()> {
    let mut command = command(abi::INIT_VCPU, rcx);
    // SAFETY: the command's data is a number.
    unsafe { calls.of_vcpu(id, &mut command) }.map_err(|error| failed(STEP_INIT_VCPU, error, command.hw_error))
}

/// Adds pages that hold `contents`, and zeros behind their end, through the vCPU `by`.
pub(super) fn add(calls: &dyn Calls, by: VcpuId, range: GpaRange, contents: &[u8], measured: bool) -> Result<()> {
    let bytes = usize::try_from(range.len)
        .ok()
        .filter(|bytes| contents.len() <= *bytes)
        .ok_or_else(|| Error::Invalid { what: "launch", problem: "the contents are longer than the range".into() })?;
    // KVM wants whole pages at the start of a page.
    let copy = if contents.len() == bytes && contents.as_ptr().addr().is_multiple_of(PAGE_BYTES) {
        None
    } else {
        Some(copied(contents, bytes)?)
    };
    let source = copy.as_ref().map_or(contents.as_ptr().cast_mut(), MmapRegion::as_ptr);
    let mut region = MemRegion { source: address(source), gpa: range.start, pages: range.len / PAGE };
    let mut tries = TRIES;
    loop {
        let before = region;
        let mut command = command(abi::INIT_MEM_REGION, address(&raw mut region));
        command.flags = if measured { abi::MEASURE } else { 0 };
        // SAFETY: KVM only reads the source, which is as long as the region says, from the start and from wherever KVM advanced
        // it to.
        match unsafe { calls.of_vcpu(by, &mut command) } {
            Ok(()) => return Ok(()),
            // KVM has advanced the region over what is done, and wants the rest asked for as it is.
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN | libc::EBUSY) && tries > 0 => {
                tries = if region == before { tries - 1 } else { TRIES };
            }
            Err(error) => return Err(failed(STEP_INIT_MEM_REGION, error, command.hw_error)),
        }
    }
}

/// Whole pages that hold `contents`, and zeros behind their end.
fn copied(contents: &[u8], bytes: usize) -> Result<MmapRegion> {
    let no_memory = |problem: String| Error::Invalid { what: "launch", problem };
    let copy: MmapRegion =
        MmapRegion::new(bytes).map_err(|error| no_memory(format!("no memory for a copy: {error}")))?;
    copy.as_volatile_slice().write_slice(contents, 0).map_err(|error| no_memory(format!("the copy: {error}")))?;
    Ok(copy)
}

/// Seals the trust domain.
pub(super) fn finalize(calls: &dyn Calls) -> Result<()> {
    let mut tries = TRIES;
    loop {
        let mut command = command(abi::FINALIZE_VM, 0);
        tries -= 1;
        // SAFETY: the command has no data.
        match unsafe { calls.of_vm(&mut command) } {
            Ok(()) => return Ok(()),
            Err(error) if error.errno() == libc::EBUSY && tries > 0 => {}
            Err(error) => return Err(failed(STEP_FINALIZE, error, command.hw_error)),
        }
    }
}
