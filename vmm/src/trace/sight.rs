//! What a vCPU is doing, as it shows when it is stopped for a moment.

use std::fmt;

use hal::{MpState, Vcpu, VcpuSnapshot};

/// RFLAGS: maskable interrupts are taken, and virtual-8086 mode (Intel SDM vol. 1 §3.4.3).
const INTERRUPTS: u64 = 1 << 9;
const VIRTUAL_8086: u64 = 1 << 17;
/// CR0: protected mode.
const PROTECTED: u64 = 1 << 0;

/// A vCPU between two instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    /// The instruction pointer.
    pub rip: u64,
    /// It runs a program: the privilege level is 3.
    pub user_mode: bool,
    /// It takes maskable interrupts.
    pub interrupts: bool,
    /// Whether it runs at all.
    pub activity: MpState,
}

impl Sight {
    /// Of a vCPU that is stopped.
    ///
    /// # Errors
    /// Why it cannot be seen.
    pub fn of(vcpu: &mut dyn Vcpu) -> Result<Self, String> {
        let state = vcpu.state().ok_or("this kind of VM hides it")?;
        Ok(Self::from(&state.save().map_err(|error| error.to_string())?))
    }

    /// It waits for an interrupt that it does not take.
    pub fn is_dead(&self) -> bool {
        self.activity == MpState::Halted && !self.interrupts
    }
}

impl From<&VcpuSnapshot> for Sight {
    fn from(state: &VcpuSnapshot) -> Self {
        let VcpuSnapshot { regs, sregs, .. } = state;
        // Outside of protected mode, and in virtual-8086 mode, a selector says nothing of privilege.
        let has_rings = sregs.cr0 & PROTECTED != 0 && regs.rflags & VIRTUAL_8086 == 0;
        Self {
            rip: regs.rip,
            user_mode: has_rings && sregs.cs.selector & 3 == 3,
            interrupts: regs.rflags & INTERRUPTS != 0,
            activity: state.mp_state,
        }
    }
}

impl fmt::Display for Sight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.activity {
            MpState::Halted if self.is_dead() => "halted with interrupts off, which nothing ends",
            MpState::Halted => "halted, waiting for an interrupt",
            MpState::Uninitialized | MpState::InitReceived => return f.write_str("not started by the guest"),
            MpState::SipiReceived => "about to start",
            MpState::Runnable if self.user_mode => "running a program",
            MpState::Runnable => "running",
        };
        write!(f, "{what}, instruction pointer {:#x}", self.rip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_ring_3_of_protected_mode_is_user_mode() {
        use hal::Hypervisor;
        let fake = hal::fake::Fake::new();
        let vm = fake.create(&hal::VmSpec { max_vcpus: 1, ..Default::default() }).unwrap();
        let mut vcpu = vm.create_vcpu(hal::VcpuId(0)).unwrap();
        let mut state = vcpu.state().unwrap().save().unwrap();
        state.regs.rip = 0x40_1000;
        let cases = [(1, 0x33, 0, true), (1, 0x10, 0, false), (0, 0x33, 0, false), (1, 0x33, VIRTUAL_8086, false)];
        for (cr0, selector, rflags, user_mode) in cases {
            state.sregs.cr0 = cr0;
            state.sregs.cs.selector = selector;
            state.regs.rflags = rflags;
            assert_eq!(Sight::from(&state).user_mode, user_mode, "{cr0} {selector:#x} {rflags:#x}");
        }
        vcpu.state().unwrap().restore(&state).unwrap();
        assert_eq!(Sight::of(&mut *vcpu).unwrap().rip, 0x40_1000);
        state.mp_state = MpState::Halted;
        assert!(Sight::from(&state).to_string().starts_with("halted with interrupts off"));
    }
}
