//! What the `CPUID` instruction answers: the host's leaves, with the guest's own topology and without what a guest
//! shall not see.

use hal::{CpuidEntry, HostCaps, VcpuId};

use super::Topology;

/// Leaves that a guest does not see; a leaf without an entry reads as zeros.
const HIDDEN: [u32; 15] = [
    0x0a,        // performance counters
    0x0f,        // cache monitoring
    0x10,        // cache allocation
    0x12,        // SGX
    0x14,        // processor trace
    0x1a,        // hybrid core types: vCPUs wander over all cores
    0x1b,        // memory encryption keys
    0x1c,        // last branch records
    0x8000_000a, // SVM
    0x8000_001b, // instruction based sampling
    0x8000_001c, // lightweight profiling
    0x8000_001f, // memory encryption
    0x8000_0020, // quality of service
    0x8000_0022, // performance counters
    0x8000_0026, // topology of chiplets: leaf 0xb tells the guest's
];

/// The topology leaves, which are written anew.
const TOPOLOGY: [u32; 2] = [0x0b, 0x1f];

/// The hypervisor's own leaves start here: the highest of them, and its signature (its meaning is the backend's).
const HYPERVISOR_BASE: u32 = 0x4000_0000;
/// The hypervisor's leaf that tells the frequencies of time stamp counter (EAX) and APIC timer (EBX) in kHz.
const HYPERVISOR_TIMING: u32 = 0x4000_0010;
/// Frequency of the local APIC's timer before its divider: the same for every hypervisor known, in kHz.
const APIC_BUS_KHZ: u32 = 1_000_000;

/// The maker of a processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Vendor {
    /// Intel.
    Intel,
    /// AMD, and Hygon, which is built alike.
    Amd,
    /// Someone else.
    Other,
}

impl Vendor {
    /// The vendor by leaf 0.
    pub(super) fn of(cpuid: &[CpuidEntry]) -> Self {
        let name = cpuid.iter().find(|leaf| leaf.function == 0).map(|leaf| [leaf.ebx, leaf.edx, leaf.ecx]);
        let word = |text: &[u8; 4]| u32::from_le_bytes(*text);
        match name {
            Some(name) if name == [word(b"Genu"), word(b"ineI"), word(b"ntel")] => Self::Intel,
            Some(name) if name == [word(b"Auth"), word(b"enti"), word(b"cAMD")] => Self::Amd,
            Some(name) if name == [word(b"Hygo"), word(b"nGen"), word(b"uine")] => Self::Amd,
            _ => Self::Other,
        }
    }
}

/// The CPUID leaves of a VM: made once, from which each vCPU's own are derived.
#[derive(Debug, Clone)]
pub struct CpuidTable {
    leaves: Vec<CpuidEntry>,
    topology: Topology,
}

impl CpuidTable {
    /// The leaves for guests with this topology, from what the host's hypervisor can show. `tsc_khz` is the frequency
    /// of the guest's time stamp counter in kHz, where it is known.
    ///
    /// The guest sees a hypervisor and its paravirtual leaves, the TSC-deadline timer where the host has it, and
    /// neither nested virtualization nor performance counters.
    pub fn new(caps: &HostCaps, tsc_khz: Option<u32>, topology: Topology) -> Self {
        let vendor = Vendor::of(&caps.cpuid);
        let shown = |leaf: &&CpuidEntry| !HIDDEN.contains(&leaf.function) && !TOPOLOGY.contains(&leaf.function);
        let mut table = Self { leaves: caps.cpuid.iter().filter(shown).copied().collect(), topology };
        let host_highest = table.leaf(0).eax;

        table.features(caps);
        table.caches();
        if vendor == Vendor::Amd {
            table.amd_topology();
        }
        table.topology_leaf(0x0b);
        if host_highest >= 0x1f {
            table.topology_leaf(0x1f);
        }
        if let Some(tsc_khz) = tsc_khz.filter(|khz| *khz > 0) {
            table.frequencies(tsc_khz, vendor);
        }
        let highest = table.leaves.iter().map(|leaf| leaf.function).filter(|function| *function < HYPERVISOR_BASE);
        table.leaf(0).eax = highest.max().unwrap_or(0);
        table
    }

    /// The leaves of one vCPU, whose id is its APIC id.
    pub fn for_vcpu(&self, id: VcpuId) -> Vec<CpuidEntry> {
        let apic_id = u32::from(id.0);
        let core_in_package = (apic_id & bits_below(self.topology.package_shift())) >> self.topology.core_shift();
        let package = apic_id >> self.topology.package_shift();
        let mut leaves = self.leaves.clone();
        for leaf in &mut leaves {
            match leaf.function {
                0x01 => leaf.ebx = leaf.ebx & 0x00ff_ffff | apic_id << 24,
                0x0b | 0x1f => leaf.edx = apic_id,
                // AMD APM vol. 3, E.4.15: extended APIC id, core id, node id.
                0x8000_001e => {
                    leaf.eax = apic_id;
                    leaf.ebx = leaf.ebx & !0xff | core_in_package & 0xff;
                    leaf.ecx = leaf.ecx & !0xff | package & 0xff;
                }
                _ => {}
            }
        }
        leaves
    }

    /// The entry of a leaf without subleaves, or of subleaf 0; made where there is none.
    fn leaf(&mut self, function: u32) -> &mut CpuidEntry {
        let wanted = |leaf: &CpuidEntry| leaf.function == function && leaf.index.unwrap_or(0) == 0;
        let at = self.leaves.iter().position(wanted).unwrap_or_else(|| {
            self.leaves.push(CpuidEntry { function, index: None, eax: 0, ebx: 0, ecx: 0, edx: 0 });
            self.leaves.len() - 1
        });
        &mut self.leaves[at]
    }

    /// Whether the highest leaf of the range of `function` reaches it.
    fn has(&self, function: u32) -> bool {
        let base = function & 0xf000_0000;
        self.leaves.iter().any(|leaf| leaf.function == base && leaf.eax >= function)
    }

    /// Feature flags, and what of the topology stands beside them.
    fn features(&mut self, caps: &HostCaps) {
        let per_package = self.topology.vcpus_per_package();
        let id_space = (1u32 << self.topology.package_shift()).min(0xff);
        let leaf = self.leaf(0x01);
        leaf.ebx = leaf.ebx & 0x0000_ffff | id_space << 16;
        // DTES64, MONITOR, DS_CPL, VMX, SMX, EIST and TM2, PDCM: what a guest cannot use.
        leaf.ecx &= !(1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15);
        set(&mut leaf.ecx, 24, caps.tsc_deadline);
        set(&mut leaf.ecx, 31, true);
        set(&mut leaf.edx, 28, per_package > 1);

        // The APIC timer runs in every idle state (ARAT): without this Linux looks for another timer.
        *self.leaf(0x06) = CpuidEntry { function: 0x06, index: None, eax: 1 << 2, ebx: 0, ecx: 0, edx: 0 };

        if self.has(0x07) {
            let leaf = self.leaf(0x07);
            // SGX, cache monitoring, cache allocation, processor trace; SGX launch control.
            leaf.ebx &= !(1 << 2 | 1 << 12 | 1 << 15 | 1 << 25);
            leaf.ecx &= !(1 << 30);
            // PCONFIG, architectural last branch records.
            leaf.edx &= !(1 << 18 | 1 << 19);
        }
        if self.has(0x8000_0001) {
            // SVM, IBS, LWP, and the performance counters of core, north bridge and last-level cache.
            self.leaf(0x8000_0001).ecx &= !(1 << 2 | 1 << 10 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 28);
        }
        if self.has(0x8000_0008) && caps.physical_address_bits > 0 {
            let leaf = self.leaf(0x8000_0008);
            leaf.eax = leaf.eax & !0xff | u32::from(caps.physical_address_bits);
        }
    }

    /// Which vCPUs share a cache: those of a core the first and second level, those of a package the third. Leaf 4
    /// of Intel (SDM vol. 2, CPUID) and leaf 0x8000001d of AMD (APM vol. 3, E.4.14) agree in all but the cores.
    fn caches(&mut self) {
        let per_core = (1u32 << self.topology.core_shift()) - 1;
        let per_package = (1u32 << self.topology.package_shift()) - 1;
        let cores = (1u32 << (self.topology.package_shift() - self.topology.core_shift())) - 1;
        for leaf in self.leaves.iter_mut().filter(|leaf| matches!(leaf.function, 0x04 | 0x8000_001d)) {
            let kind = leaf.eax & 0x1f;
            if kind == 0 {
                continue;
            }
            let level = leaf.eax >> 5 & 0x7;
            let sharing = if level <= 2 { per_core } else { per_package };
            leaf.eax = leaf.eax & 0x0000_3fff | sharing << 14;
            if leaf.function == 0x04 {
                leaf.eax |= cores.min(0x3f) << 26;
            }
        }
    }

    /// The leaves in which AMD tells its topology (APM vol. 3, E.4.7 and E.4.15), beside leaf 0xb.
    fn amd_topology(&mut self) {
        let per_package = self.topology.vcpus_per_package();
        let package_shift = self.topology.package_shift();
        let threads = self.topology.threads();
        if self.has(0x8000_0001) {
            // CMP_LEGACY: the package has several logical processors.
            set(&mut self.leaf(0x8000_0001).ecx, 1, per_package > 1);
        }
        if self.has(0x8000_0008) {
            self.leaf(0x8000_0008).ecx = (per_package - 1) & 0xff | package_shift << 12;
        }
        if self.has(0x8000_001e) {
            let leaf = self.leaf(0x8000_001e);
            leaf.ebx = (threads - 1) << 8;
            leaf.ecx = 0;
            leaf.edx = 0;
        }
    }

    /// Leaf 0xb or 0x1f: the levels thread, core, and an end mark (Intel SDM vol. 2, CPUID). EDX is the vCPU's own.
    fn topology_leaf(&mut self, function: u32) {
        const THREAD: u32 = 1;
        const CORE: u32 = 2;
        let levels = [
            (self.topology.core_shift(), self.topology.threads(), THREAD),
            (self.topology.package_shift(), self.topology.vcpus_per_package(), CORE),
            (0, 0, 0),
        ];
        for (index, (shift, vcpus, kind)) in (0u32..).zip(levels) {
            let ecx = index | kind << 8;
            self.leaves.push(CpuidEntry { function, index: Some(index), eax: shift, ebx: vcpus, ecx, edx: 0 });
        }
    }

    /// The frequency of the time stamp counter, in the processor's leaves and in the hypervisor's.
    fn frequencies(&mut self, tsc_khz: u32, vendor: Vendor) {
        if vendor == Vendor::Intel {
            // The counter as a ratio of a crystal. Linux takes the crystal for the APIC timer's clock, so it must be
            // that, and multiplies kHz by the numerator in 32 bits: a frequency for which that overflows is not told.
            let divisor = gcd(tsc_khz, APIC_BUS_KHZ);
            let (numerator, denominator) = (tsc_khz / divisor, APIC_BUS_KHZ / divisor);
            let told = APIC_BUS_KHZ.checked_mul(numerator).is_some();
            let leaf = self.leaf(0x15);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) =
                if told { (denominator, numerator, APIC_BUS_KHZ * 1000, 0) } else { (0, 0, 0, 0) };
            let mhz = (tsc_khz / 1000).min(0xffff);
            let leaf = self.leaf(0x16);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (mhz, mhz, 100, 0);
        }
        if self.leaves.iter().any(|leaf| leaf.function == HYPERVISOR_BASE) {
            let base = self.leaf(HYPERVISOR_BASE);
            base.eax = base.eax.max(HYPERVISOR_TIMING);
            let leaf = self.leaf(HYPERVISOR_TIMING);
            (leaf.eax, leaf.ebx, leaf.ecx, leaf.edx) = (tsc_khz, APIC_BUS_KHZ, 0, 0);
        }
    }
}

/// A number with this many low bits set.
fn bits_below(count: u32) -> u32 {
    1u32.checked_shl(count).map_or(u32::MAX, |bit| bit - 1)
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = *word & !(1 << bit) | u32::from(on) << bit;
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
pub(super) mod test_host;
#[cfg(test)]
mod tests;
