//! What a configuration may ask for of a VM of its kind.
//!
//! A kind says by name what it lacks ([`hal::Ability`]); here stands which fields need it.

use api::{BootUntil, ByteSize, HostFacts, Hugepages, KindName, Problem, VmConfig};
use hal::{Ability, Boot, KindTraits};

/// Guests whose memory must be accepted before it is used do not come up with more than this that is no multiple of
/// [`LARGE_STEP`], in bytes.
const LARGE: u64 = 64 << 30;
const LARGE_STEP: u64 = 1 << 30;

/// Everything that is wrong with a configuration: what [`api::validate`] finds, and what its kind cannot have.
pub fn validate(config: &VmConfig, host: &HostFacts) -> Vec<Problem> {
    let mut problems = api::validate(config, host);
    problems.extend(refused(config));
    problems
}

/// The kind's name in the words of `hal`.
pub fn name(kind: KindName) -> hal::KindName {
    match kind {
        KindName::Standard => hal::KindName::Standard,
        KindName::Tdx => hal::KindName::Tdx,
        KindName::Snp => hal::KindName::Snp,
        KindName::SoftwareProtected => hal::KindName::SoftwareProtected,
    }
}

/// What the configuration asks for and a VM of its kind cannot have.
fn refused(config: &VmConfig) -> Vec<Problem> {
    let kind = config.kind();
    let traits = name(kind).traits();
    let mut problems = Vec::new();
    let mut refuse = |is: bool, field: &str, why: &str, remedy: &str| {
        if is {
            problems.push(Problem::new(field, format!("a VM of the kind {kind} cannot have it: {why}"), remedy));
        }
    };
    let late = "all its vCPUs are there when it is launched";
    refuse(config.cpus.max.is_some() && !traits.has(Ability::LateVcpus), "cpus.max", late, "leave it out");
    let private = traits.private_memory;
    let memory = &config.memory;
    let all = "all its memory is there when it is launched";
    refuse(private && memory.max.is_some(), "memory.max", all, "leave it out");
    let small = "it makes pages of 4 KiB private and shared";
    refuse(private && memory.hugepages != Hugepages::Off, "memory.hugepages", small, "leave it out");
    let twice = "what it keeps private would be held a second time";
    refuse(private && memory.prefault, "memory.prefault", twice, "leave it out");
    refuse(private && memory.lock, "memory.lock", twice, "leave it out");
    let own = "its pages are its own";
    refuse(private && memory.share_kernel, "memory.share_kernel", own, "leave it out");
    let sees = config.lifecycle.boot_timeout.is_some() && config.lifecycle.boot_until == BootUntil::UserMode;
    let hidden = "nobody sees in which mode its vCPUs are";
    refuse(sees && !traits.has(Ability::Registers), "lifecycle.boot_until", hidden, "write told");
    problems.extend(large_memory(config, traits));
    problems.extend(without_firmware(config, traits));
    problems
}

fn large_memory(config: &VmConfig, traits: &KindTraits) -> Option<Problem> {
    let size = config.memory.size.bytes();
    if traits.boot != Boot::Measured || size <= LARGE || size.is_multiple_of(LARGE_STEP) {
        return None;
    }
    let next = ByteSize::new(size.next_multiple_of(LARGE_STEP));
    let what = format!("guests that accept their memory do not come up with {}", config.memory.size);
    Some(Problem::new("memory.size", what, format!("give it {next}: above 64G, whole steps of 1G")))
}

fn without_firmware(config: &VmConfig, traits: &KindTraits) -> Option<Problem> {
    if traits.boot != Boot::Measured || config.firmware.is_some() {
        return None;
    }
    let what = format!("a VM of the kind {} begins in firmware that is measured, and none is named", config.kind());
    Some(Problem::new("firmware", what, "name OVMF.inteltdx.ms.fd of Debian's package ovmf-inteltdx, or the like"))
}

#[cfg(test)]
mod tests {
    use api::{Confidential, Tdx, TimeSpan};

    use super::*;

    fn fields(config: &VmConfig) -> Vec<String> {
        refused(config).into_iter().map(|problem| problem.field).collect()
    }

    fn rich() -> VmConfig {
        let mut config = VmConfig::new("k");
        config.cpus.max = Some(8);
        config.memory.max = Some(ByteSize::new(1 << 40));
        config.memory.hugepages = Hugepages::Size2M;
        config.memory.prefault = true;
        config.memory.lock = true;
        config.memory.share_kernel = true;
        config.memory.size = ByteSize::new((64 << 30) + (1 << 29));
        config.lifecycle.boot_timeout = Some(TimeSpan::from_millis(1000));
        config
    }

    #[test]
    fn a_trust_domain_is_refused_what_it_lacks_field_by_field() {
        let mut config = rich();
        assert_eq!(fields(&config), [""; 0], "a plain VM has all of it");
        config.confidential = Some(Confidential::Tdx(Tdx::default()));
        let expected = [
            "cpus.max",
            "memory.max",
            "memory.hugepages",
            "memory.prefault",
            "memory.lock",
            "memory.share_kernel",
            "lifecycle.boot_until",
            "memory.size",
            "firmware",
        ];
        assert_eq!(fields(&config), expected);
        let told: Vec<String> = refused(&config).iter().map(ToString::to_string).collect();
        assert_eq!(
            [&told[0], &told[7]],
            [
                "cpus.max: a VM of the kind tdx cannot have it: all its vCPUs are there when it is launched; leave it out",
                "memory.size: guests that accept their memory do not come up with 66048M; give it 65G: above 64G, whole \
                 steps of 1G"
            ]
        );
    }

    #[test]
    fn a_software_protected_vm_lacks_less() {
        let mut config = rich();
        config.confidential = Some(Confidential::SoftwareProtected {});
        let expected = ["memory.max", "memory.hugepages", "memory.prefault", "memory.lock", "memory.share_kernel"];
        assert_eq!(fields(&config), expected);
    }
}
