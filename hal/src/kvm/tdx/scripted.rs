//! A script of what Linux does with the commands of a launch: it keeps to the kernel's rules for callers, refuses what the
//! kernel refuses, and puts off what the kernel may put off.
#![expect(unsafe_code, reason = "commands point to their data")]

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::slice;

use kvm_bindings::kvm_cpuid_entry2;
use vmm_sys_util::errno;

use super::abi::{self, CapabilitiesData, Command, InitVmData, LeavesData, MemRegion};
use super::launch::Calls;
use crate::{CpuidEntry, GpaRange, TdxSpec, VcpuId};

/// A page that was added: where, its contents' first and last byte, and whether they are measured.
pub(super) type Added = (u64, u8, u8, bool);

/// What INIT_VM was given.
pub(super) struct Initialized {
    pub attributes: u64,
    pub xfam: u64,
    /// MRCONFIGID, MROWNER, MROWNERCONFIG.
    pub identities: [[u8; 48]; 3],
    pub cpuid: Vec<CpuidEntry>,
}

/// A trust domain as Linux keeps it, and what the host makes difficult.
#[derive(Default)]
pub(super) struct Linux(pub(super) RefCell<State>);

#[derive(Default)]
pub(super) struct State {
    /// The leaves that can be configured.
    pub configurable: Vec<CpuidEntry>,
    /// The vCPUs, and the leaves that each was given (`KVM_SET_CPUID2`).
    pub vcpus: BTreeMap<VcpuId, Vec<CpuidEntry>>,
    /// Private memory of guest_memfd slots.
    pub private: Vec<GpaRange>,
    /// How often INIT_VM finds no entropy, and FINALIZE_VM and INIT_MEM_REGION are interrupted without any progress.
    pub no_entropy: u32,
    pub busy: u32,
    /// The pages after which INIT_MEM_REGION is interrupted, each time.
    pub pages_at_once: Option<u64>,
    /// What the TDX module refuses INIT_VM with.
    pub status: u64,
    /// What was done.
    pub initialized: Option<Initialized>,
    pub begun: BTreeMap<VcpuId, u64>,
    pub added: Vec<Added>,
    /// Where the caller had each region's pages.
    pub sources: Vec<u64>,
    pub finalized: bool,
    /// How many commands of each number came.
    pub counts: BTreeMap<u32, u32>,
    /// What is left of a region that was only half added, and must come next.
    pub interrupted: Option<MemRegion>,
}

type Answer = std::result::Result<(), i32>;

impl Linux {
    pub(super) fn with(state: State) -> Self {
        Self(RefCell::new(state))
    }
}

impl Calls for Linux {
    unsafe fn of_vm(&self, command: &mut Command) -> std::result::Result<(), errno::Error> {
        let mut state = self.0.borrow_mut();
        *state.counts.entry(command.id).or_default() += 1;
        let answer = if command.hw_error != 0 || command.flags != 0 {
            Err(libc::EINVAL)
        } else {
            match command.id {
                abi::CAPABILITIES => state.capabilities(command),
                abi::INIT_VM => state.init_vm(command),
                abi::FINALIZE_VM => state.finalize(),
                _ => Err(libc::EINVAL),
            }
        };
        answer.map_err(errno::Error::new)
    }

    unsafe fn of_vcpu(&self, id: VcpuId, command: &mut Command) -> std::result::Result<(), errno::Error> {
        let mut state = self.0.borrow_mut();
        *state.counts.entry(command.id).or_default() += 1;
        let answer = if !state.vcpus.contains_key(&id) {
            Err(libc::ENXIO)
        } else if state.finalized || state.initialized.is_none() || command.hw_error != 0 {
            Err(libc::EINVAL)
        } else {
            match command.id {
                abi::INIT_VCPU => state.init_vcpu(id, command),
                abi::INIT_MEM_REGION => state.init_mem_region(id, command),
                abi::GET_CPUID => state.get_cpuid(command),
                _ => Err(libc::EINVAL),
            }
        };
        answer.map_err(errno::Error::new)
    }
}

fn pointer<T>(address: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(usize::try_from(address).unwrap())
}

impl State {
    fn capabilities(&mut self, command: &mut Command) -> Answer {
        // SAFETY: the caller's promise, here and below.
        let data = unsafe { &mut *pointer::<CapabilitiesData>(command.data) };
        // The number of leaves stays as it is: the caller is not told how many there are.
        if usize::try_from(data.count).unwrap() < self.configurable.len() {
            return Err(libc::E2BIG);
        }
        (data.attributes, data.xfam) = (TdxSpec::SEPT_VE_DISABLE, 0x602e7);
        (data.kernel_r11, data.user_r11, data.kernel_r12) = (1, 0xff, 4);
        data.count = u32::try_from(self.configurable.len()).unwrap();
        // SAFETY: there is room, as was seen.
        unsafe { give(data.entries.as_mut_ptr(), &self.configurable) };
        // SAFETY: as many were written.
        let entries = unsafe { slice::from_raw_parts_mut(data.entries.as_mut_ptr(), self.configurable.len()) };
        entries.iter_mut().for_each(|entry| entry.flags = 0);
        Ok(())
    }

    fn init_vm(&mut self, command: &mut Command) -> Answer {
        // SAFETY: the caller's promise.
        let data = unsafe { &*pointer::<InitVmData>(command.data) };
        // SAFETY: the caller's promise.
        let entries = unsafe { slice::from_raw_parts(data.entries.as_ptr(), usize::try_from(data.count).unwrap()) };
        let leaves: Vec<CpuidEntry> = entries.iter().map(CpuidEntry::from).collect();
        if self.initialized.is_some() || data.reserved != [0; 12] || data.padding != 0 {
            return Err(libc::EINVAL);
        }
        if !self.vcpus.is_empty() {
            return Err(libc::EBUSY);
        }
        // An entry without the flag stands for all subleaves; and there must be as many as are found so.
        let found = |mask: &CpuidEntry| {
            let index = mask.index.unwrap_or(0);
            entries
                .iter()
                .find(|entry| entry.function == mask.function && (entry.flags & 1 == 0 || entry.index == index))
        };
        let allowed = |mask: &CpuidEntry| {
            found(mask).is_none_or(|entry| entry.eax & !mask.eax == 0 && entry.ecx & !mask.ecx == 0)
        };
        let copied = self.configurable.iter().filter(|mask| found(mask).is_some()).count();
        let width = leaves.iter().find(|leaf| leaf.function == 0x8000_0008).map(|leaf| leaf.eax >> 16 & 0xff);
        let bad = data.attributes & !TdxSpec::SEPT_VE_DISABLE != 0
            || data.xfam & !0x602e7 != 0
            || !self.configurable.iter().all(allowed)
            || copied != entries.len()
            || !matches!(width, Some(48 | 52));
        if bad {
            return Err(libc::EINVAL);
        }
        if self.no_entropy > 0 {
            self.no_entropy -= 1;
            // What the module said is there, and must not come back.
            command.hw_error = 0x8000_0203_0000_0000;
            return Err(libc::EAGAIN);
        }
        if self.status != 0 {
            command.hw_error = self.status;
            return Err(libc::EINVAL);
        }
        self.initialized = Some(Initialized {
            attributes: data.attributes,
            xfam: data.xfam,
            identities: [data.config_id, data.owner, data.owner_config],
            cpuid: leaves,
        });
        Ok(())
    }

    fn get_cpuid(&mut self, command: &mut Command) -> Answer {
        // SAFETY: the caller's promise.
        let data = unsafe { &mut *pointer::<LeavesData>(command.data) };
        let leaves = self.initialized.as_ref().map(|initialized| &*initialized.cpuid).unwrap_or_default();
        let room = usize::try_from(data.count).unwrap();
        data.count = u32::try_from(leaves.len()).unwrap();
        if room < leaves.len() {
            return Err(libc::E2BIG);
        }
        // SAFETY: there is room, as was seen.
        unsafe { give(data.entries.as_mut_ptr(), leaves) };
        Ok(())
    }

    fn init_vcpu(&mut self, id: VcpuId, command: &mut Command) -> Answer {
        let x2apic = self.vcpus[&id].iter().any(|leaf| leaf.function == 1 && leaf.ecx & 1 << 21 != 0);
        if command.flags != 0 || !x2apic || self.begun.contains_key(&id) {
            return Err(libc::EINVAL);
        }
        self.begun.insert(id, command.data);
        Ok(())
    }

    fn init_mem_region(&mut self, id: VcpuId, command: &mut Command) -> Answer {
        // SAFETY: the caller's promise.
        let region = unsafe { &mut *pointer::<MemRegion>(command.data) };
        if self.interrupted.take().is_some_and(|left| left != *region) {
            // It would be the wrong pages: the rest is to be asked for as it came back.
            return Err(libc::EFAULT);
        }
        let MemRegion { source, gpa, pages } = *region;
        let aligned = source != 0 && source.is_multiple_of(4096) && gpa.is_multiple_of(4096) && pages > 0;
        let len = pages.checked_mul(4096).ok_or(libc::EINVAL)?;
        let range = GpaRange { start: gpa, len };
        let private = self.private.iter().any(|slot| slot.common(range) == Some(range));
        if command.flags & !abi::MEASURE != 0 || !aligned || !private || !self.begun.contains_key(&id) {
            return Err(libc::EINVAL);
        }
        if self.busy > 0 {
            self.busy -= 1;
            self.interrupted = Some(*region);
            return Err([libc::EINTR, libc::EAGAIN, libc::EBUSY][usize::try_from(self.busy % 3).unwrap()]);
        }
        self.sources.push(source);
        let now = self.pages_at_once.map_or(pages, |most| most.min(pages));
        let seen: BTreeSet<u64> = self.added.iter().map(|page| page.0).collect();
        for page in 0..now {
            if seen.contains(&(gpa + page * 4096)) {
                return Err(libc::EEXIST);
            }
            // SAFETY: the caller's promise.
            let contents = unsafe { slice::from_raw_parts(pointer::<u8>(source + page * 4096), 4096) };
            self.added.push((gpa + page * 4096, contents[0], contents[4095], command.flags & abi::MEASURE != 0));
        }
        *region = MemRegion { source: source + now * 4096, gpa: gpa + now * 4096, pages: pages - now };
        if region.pages == 0 {
            return Ok(());
        }
        self.interrupted = Some(*region);
        Err(libc::EAGAIN)
    }

    fn finalize(&mut self) -> Answer {
        if self.busy > 0 {
            self.busy -= 1;
            return Err(libc::EBUSY);
        }
        if self.finalized || self.begun.is_empty() {
            return Err(libc::EINVAL);
        }
        self.finalized = true;
        Ok(())
    }
}

/// Writes leaves.
///
/// # Safety
/// There is room for them.
unsafe fn give(to: *mut kvm_cpuid_entry2, leaves: &[CpuidEntry]) {
    for (at, leaf) in leaves.iter().enumerate() {
        // SAFETY: the caller's promise.
        unsafe { to.add(at).write(leaf.into()) };
    }
}
