//! What the steps of a launch say when they fail: the step, the operand, and the cure.

use vmm_sys_util::errno;

use crate::Error;

/// The status of a call into the TDX module without what it is about (TDX Module ABI, "Function Completion Status").
const OPERAND_INVALID: u64 = 0xc000_0100;
const OPERAND_BUSY: u64 = 0x8000_0200;

const SEE_LOG: &str = "the kernel's log may say more (dmesg)";

/// An error of KVM's that the TDX module's status goes with, where it is not 0.
pub(super) fn failed(step: &'static str, error: errno::Error, hw_error: u64) -> Error {
    let (problem, remedy) = match hw_error {
        0 => of_kernel(step, error.errno()),
        _ => of_module(hw_error),
    };
    let errno = std::io::Error::from_raw_os_error(error.errno());
    Error::Launch { step, problem: format!("{problem} ({errno})"), remedy }
}

/// What an error number means for a step.
fn of_kernel(step: &'static str, errno: i32) -> (String, &'static str) {
    let (problem, remedy) = match (step, errno) {
        ("KVM_TDX_INIT_VM", libc::EINVAL) => (
            "KVM does not take these attributes, state components or leaves of CPUID",
            "leave attributes at their default; `halyard probe` shows what there is",
        ),
        ("KVM_TDX_INIT_VM", libc::ENOSPC) => (
            "each trust domain needs a private key of the memory controller's, and none is free",
            "end another trust domain, or set more KeyIDs aside for TDX in the firmware's settings",
        ),
        ("KVM_TDX_INIT_VM", libc::EIO) => (
            "the TDX module did not make the trust domain",
            "bring a processor of each package online; the kernel's log may say more (dmesg)",
        ),
        ("KVM_TDX_INIT_VM", libc::EAGAIN) => {
            ("the processor's random numbers ran out, again and again", "try again when the host has less to do")
        }
        ("KVM_TDX_INIT_VM", libc::EBUSY) => ("the VM has a vCPU already", SEE_LOG),
        ("KVM_TDX_INIT_VCPU", libc::EINVAL) => {
            ("the vCPU was begun before, or its CPUID has no x2APIC", "leave x2APIC among the leaves of CPUID")
        }
        ("KVM_TDX_INIT_MEM_REGION", libc::EINVAL) => {
            ("the pages are not private memory of a slot, or the guest is sealed", SEE_LOG)
        }
        ("KVM_TDX_INIT_MEM_REGION", libc::EEXIST) => ("a page was added already", SEE_LOG),
        (_, libc::ENOMEM) => ("the host has no memory left for it", "give the host, or this process's cgroup, more"),
        _ => ("KVM refuses it", SEE_LOG),
    };
    (problem.into(), remedy)
}

/// What a status of the TDX module means: the code, and for some of them the operand that it is about.
fn of_module(status: u64) -> (String, &'static str) {
    let (code, operand) = (status >> 32, status & 0xffff_ffff);
    let (what, remedy) = match code {
        OPERAND_INVALID => (format!("{} is wrong", name(operand)), cure(operand)),
        OPERAND_BUSY => (format!("{} is in use", name(operand)), "try again"),
        0x8000_0800 => ("no key could be made".into(), "try again when the host has less to do"),
        0xc000_0902 => ("fields of CPUID contradict each other".into(), cure(CPUID_CONFIG)),
        0xc000_0904 => ("leaf 0x1f of CPUID (topology) is not as it should be".into(), cure(CPUID_CONFIG)),
        _ => ("it gives no reason that is known here".into(), SEE_LOG),
    };
    (format!("the TDX module refuses it: {what}, status {status:#018x}"), remedy)
}

const ATTRIBUTES: u64 = 64;
const XFAM: u64 = 65;
const MAX_VCPUS: u64 = 68;
const CPUID_CONFIG: u64 = 69;
const TSC_FREQUENCY: u64 = 70;

/// An operand by its number (TDX Module ABI, "Operand Identifiers"): general registers are numbered as in instructions.
fn name(operand: u64) -> String {
    let name = match operand {
        0 => "RAX",
        1 => "RCX",
        2 => "RDX",
        3 => "RBX",
        ATTRIBUTES => "ATTRIBUTES",
        XFAM => "XFAM, the state components,",
        66 => "EXEC_CONTROLS",
        67 => "EPTP_CONTROLS, the depth of page tables,",
        MAX_VCPUS => "MAX_VCPUS",
        CPUID_CONFIG => "CPUID_CONFIG",
        TSC_FREQUENCY => "TSC_FREQUENCY",
        71 => "NUM_L2_VMS",
        72 => "IA32_ARCH_CAPABILITIES",
        _ => return format!("operand {operand}"),
    };
    name.into()
}

fn cure(operand: u64) -> &'static str {
    match operand {
        ATTRIBUTES => "leave the attributes at their default",
        XFAM => "show the guest all of AVX-512 and AMX or none of it",
        MAX_VCPUS => "give the guest fewer vCPUs than the host has processors",
        CPUID_CONFIG => "show the guest the host's CPUID; the leaf that is wrong is in the kernel's log (dmesg)",
        TSC_FREQUENCY => "the guest's time stamp counter must be of 100 MHz to 10 GHz in steps of 25 MHz",
        _ => SEE_LOG,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_operand_and_the_cure() {
        let text = |errno, status| failed("KVM_TDX_INIT_VM", errno::Error::new(errno), status).to_string();
        for (errno, status, parts) in [
            (libc::EINVAL, 0xc000_0100_0000_0045, ["CPUID_CONFIG is wrong, status 0xc000010000000045", "dmesg"]),
            (libc::EINVAL, 0xc000_0100_0000_0040, ["ATTRIBUTES is wrong", "default"]),
            (libc::EINVAL, 0xc000_0100_0000_0041, ["XFAM", "AVX-512"]),
            (libc::EINVAL, 0xc000_0100_0000_00fe, ["operand 254", "dmesg"]),
            (libc::EINVAL, 0xc000_0904_0000_0000, ["leaf 0x1f", "host's CPUID"]),
            (libc::EINVAL, 0x1234_0000_0000_0000, ["no reason that is known", "dmesg"]),
            (libc::EBUSY, 0x8000_0200_0000_0080, ["operand 128 is in use", "try again"]),
            (libc::ENOSPC, 0, ["none is free", "KeyIDs"]),
            (libc::EIO, 0, ["did not make", "each package"]),
            (libc::ENODEV, 0, ["KVM refuses it (No such device", "dmesg"]),
        ] {
            let text = text(errno, status);
            assert!(text.starts_with("KVM_TDX_INIT_VM: ") && parts.iter().all(|part| text.contains(part)), "{text}");
        }
    }
}
