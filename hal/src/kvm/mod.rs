//! The Linux backend: KVM through `/dev/kvm`.
//!
//! Opening and creating are part of the time from exec to the guest's first instruction, so each asks the kernel
//! only for what it needs then. What only a saved state needs (the list of MSRs) is read when a state is saved.
//!
//! The interrupt chip is split (`KVM_CAP_SPLIT_IRQCHIP`): local APICs in the kernel, which makes MSIs and timers
//! fast, and no PIC, PIT or I/O APIC there, whose creation alone costs several milliseconds.

mod convert;
mod counters;
mod irq;
mod kick;
mod kinds;
mod memory;
mod private;
#[cfg(test)]
mod protected;
mod state;
mod tdx;
mod vcpu;
mod vm;

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_TSC_DEADLINE_TIMER, KVM_CAP_VM_TYPES,
    KVM_MAX_CPUID_ENTRIES, kvm_dirty_gfn,
};
use kvm_ioctls::Cap;
use vmm_sys_util::errno;

pub use kick::kick_signal;

use crate::{CpuidEntry, DirtyTrackingCaps, Error, HostCaps, Hypervisor, KindName, Result, Vm, VmKind, VmSpec};

const DEVICE: &str = "/dev/kvm";
const LOAD: &str = "load the module kvm_intel or kvm_amd, enable virtualization (VT-x or SVM) in the firmware or, \
                    in a VM, nested virtualization; in a pod, ask for the device plugin's resource \
                    (devices.kubevirt.io/kvm)";
const PERMIT: &str = "add this user to the group that owns it (usually kvm: `usermod -aG kvm USER`, then log in \
                      anew); in a pod, ask for the device plugin's resource (devices.kubevirt.io/kvm)";
const OTHER: &str = "end the other hypervisor on this host (VirtualBox or VMware, for example)";

/// The most vCPUs of a VM: local APIC ids 0 to 253, since 255 means all of them and 254 stays free for an I/O APIC.
const MAX_VCPUS: usize = 254;

/// KVM on this host.
#[derive(Debug)]
pub struct Kvm {
    system: Arc<System>,
    caps: HostCaps,
}

/// What VMs and vCPUs share of the host: its KVM device and facts that are read when first needed.
#[derive(Debug)]
struct System {
    kvm: kvm_ioctls::Kvm,
    /// Set on hosts with Intel processors, where KVM wants addresses of pages for its own use.
    intel: bool,
    /// The MSRs that a saved state must hold.
    msrs: OnceLock<Vec<u32>>,
}

impl Kvm {
    /// Opens `/dev/kvm`.
    ///
    /// # Errors
    /// As [`Kvm::open_at`].
    pub fn open() -> Result<Self> {
        Self::open_at(Path::new(DEVICE))
    }

    /// Opens KVM's device at another path.
    ///
    /// # Errors
    /// [`Error::NoHypervisor`] where there is no such file, [`Error::NotPermitted`] where this process may not open
    /// it, [`Error::Unusable`] where it is not KVM's device, no driver stands behind it or its version is unknown;
    /// each names the device and the remedy.
    pub fn open_at(path: &Path) -> Result<Self> {
        let kvm = open_device(path)?;
        let cpuid = supported_cpuid(&kvm)?;
        let intel = vendor_is_intel(&cpuid);
        let caps = host_caps(&kvm, cpuid);
        Ok(Self { system: Arc::new(System { kvm, intel, msrs: OnceLock::new() }), caps })
    }
}

impl Hypervisor for Kvm {
    fn caps(&self) -> &HostCaps {
        &self.caps
    }

    fn create(&self, spec: &VmSpec) -> Result<Box<dyn Vm>> {
        vm::check(&self.caps, spec)?;
        let possible = self.caps.kinds.contains(&spec.kind.name());
        match &spec.kind {
            VmKind::Standard | VmKind::SoftwareProtected if possible => {
                Ok(Box::new(vm::KvmVm::create(&self.system, &self.caps, spec)?))
            }
            VmKind::Tdx(tdx) if possible => Ok(Box::new(tdx::TdVm::create(&self.system, &self.caps, spec, tdx)?)),
            kind => {
                let kind = kind.name();
                let why = self.missing(kind).unwrap_or_default();
                Err(Error::Unsupported(format!("{kind}: {why}; leave the kind at \"standard\"")))
            }
        }
    }

    fn missing(&self, kind: KindName) -> Option<String> {
        match kind {
            _ if self.caps.kinds.contains(&kind) => None,
            KindName::Tdx => Some(kinds::why_no_tdx(Path::new("/"))),
            KindName::SoftwareProtected => Some(kinds::WHY_NOT_SOFTWARE_PROTECTED.into()),
            _ => Some(format!("VMs of the kind {kind} cannot be created with KVM by this version of Halyard")),
        }
    }
}

impl System {
    /// The MSRs that KVM lists as guest state, read once.
    fn msr_indices(&self) -> Result<&[u32]> {
        if self.msrs.get().is_none() {
            let list = self.kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
            // Another thread may have been faster; its list is the same.
            let _ = self.msrs.set(list.as_slice().to_vec());
        }
        Ok(self.msrs.get().map_or(&[], Vec::as_slice))
    }
}

/// Turns a failed call's errno into an error that names the call.
fn failed(call: &'static str) -> impl Fn(errno::Error) -> Error {
    move |error| Error::system(call, io::Error::from_raw_os_error(error.errno()))
}

fn open_device(path: &Path) -> Result<kvm_ioctls::Kvm> {
    let device = path.display().to_string();
    let name = CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Invalid { what: "path of the KVM device", problem: "it contains a zero byte".into() })?;
    let kvm = kvm_ioctls::Kvm::new_with_path(&name).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENOTDIR => Error::NoHypervisor { device: device.clone(), remedy: LOAD },
        libc::EACCES | libc::EPERM => Error::NotPermitted { device: device.clone(), remedy: PERMIT },
        libc::ENODEV | libc::ENXIO => {
            Error::Unusable { device: device.clone(), problem: "no driver stands behind it".into(), remedy: LOAD }
        }
        libc::EBUSY => Error::Unusable { device: device.clone(), problem: "the device is busy".into(), remedy: OTHER },
        libc::EISDIR => Error::Unusable { device: device.clone(), problem: "it is a directory".into(), remedy: LOAD },
        _ => failed("open the KVM device")(error),
    })?;
    let expected = i32::try_from(KVM_API_VERSION).unwrap_or(i32::MAX);
    match kvm.get_api_version() {
        version if version == expected => Ok(kvm),
        version if version < 0 => {
            Err(Error::Unusable { device, problem: "it is not the KVM device".into(), remedy: LOAD })
        }
        version => Err(Error::Unusable {
            device,
            problem: format!("its API version is {version}, and only {expected} is known"),
            remedy: "use a Linux kernel of 5.10 or later",
        }),
    }
}

fn supported_cpuid(kvm: &kvm_ioctls::Kvm) -> Result<Vec<CpuidEntry>> {
    let leaves = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    Ok(leaves.as_slice().iter().map(CpuidEntry::from).collect())
}

fn vendor_is_intel(cpuid: &[CpuidEntry]) -> bool {
    let vendor = cpuid.iter().find(|leaf| leaf.function == 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
    vendor.map(|words| words.map(u32::to_le_bytes).concat()).as_deref() == Some(b"GenuineIntel")
}

fn host_caps(kvm: &kvm_ioctls::Kvm, cpuid: Vec<CpuidEntry>) -> HostCaps {
    let extension = |cap: u32| kvm.check_extension_raw(cap.into());
    let ring_bytes = usize::try_from(extension(KVM_CAP_DIRTY_LOG_RING_ACQ_REL)).unwrap_or(0);
    let ring_entries = u32::try_from(ring_bytes / size_of::<kvm_dirty_gfn>()).unwrap_or(0);
    HostCaps {
        backend: "KVM",
        kinds: kinds::possible(extension(KVM_CAP_VM_TYPES)),
        max_vcpus: u32::try_from(kvm.get_max_vcpus().min(MAX_VCPUS)).unwrap_or(1),
        physical_address_bits: physical_address_bits(&cpuid),
        cpuid,
        tsc_deadline: extension(KVM_CAP_TSC_DEADLINE_TIMER) > 0,
        dirty_tracking: DirtyTrackingCaps { bitmap: true, ring_entries },
        max_memory_slots: u32::try_from(kvm.check_extension_int(Cap::NrMemslots)).unwrap_or(0),
    }
}

/// CPUID.80000008H:EAX: the processor's width in bits 7:0 and, on newer kernels, the width that a guest can really
/// use in bits 23:16, which is smaller where the host's page tables have too few levels.
fn physical_address_bits(cpuid: &[CpuidEntry]) -> u8 {
    const WITHOUT_THE_LEAF: u8 = 36;
    let Some(leaf) = cpuid.iter().find(|leaf| leaf.function == 0x8000_0008) else { return WITHOUT_THE_LEAF };
    let [width, _, mappable, _] = leaf.eax.to_le_bytes();
    if mappable == 0 { width } else { width.min(mappable) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_width_is_what_the_guest_can_use() {
        let leaf = |eax| CpuidEntry { function: 0x8000_0008, index: None, eax, ebx: 0, ecx: 0, edx: 0 };
        assert_eq!(physical_address_bits(&[leaf(0x3034)]), 52);
        // Five-level addresses on a host whose page tables map 48 bits.
        assert_eq!(physical_address_bits(&[leaf(0x30_3934)]), 48);
        assert_eq!(physical_address_bits(&[]), 36);
    }

    #[test]
    fn the_vendor_is_read_in_the_order_of_the_registers() {
        let leaf = |vendor: &[u8; 12]| {
            let word = |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
            [CpuidEntry { function: 0, index: None, eax: 0, ebx: word(0), ecx: word(8), edx: word(4) }]
        };
        assert!(vendor_is_intel(&leaf(b"GenuineIntel")));
        assert!(!vendor_is_intel(&leaf(b"AuthenticAMD")));
    }
}
