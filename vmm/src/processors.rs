//! vCPUs that come and go while their machine exists.
//!
//! A hypervisor does not take a vCPU back before its VM is gone (KVM has no call for it). One that the guest has let go of
//! is kept, without a thread, and starts from its power-on state when it is added again.

use std::collections::BTreeMap;
use std::sync::Arc;

use arch::{CpuidTable, Topology};
use devices::legacy::Processors;
use hal::{Boot, BootRegisters, HostCaps, Msr, ResetState, Vcpu, VcpuId, Vm};

use crate::Failure;
use crate::vcpu::{ExitBuses, VcpuThreads};

/// What all vCPUs of a VM are made from.
pub struct VcpuMaker {
    cpuid: CpuidTable,
    msrs: Vec<Msr>,
    ids: Vec<VcpuId>,
}

impl VcpuMaker {
    /// For the vCPUs of this arrangement.
    pub fn new(caps: &HostCaps, vm: &dyn Vm, topology: Topology) -> Self {
        let cpuid = CpuidTable::new(caps, vm.tsc_khz(), topology);
        // A launch that is measured sets what a vCPU begins with.
        let msrs = if vm.kind().boot == Boot::Registers { arch::boot_msrs(caps) } else { Vec::new() };
        Self { cpuid, msrs, ids: topology.vcpu_ids() }
    }

    /// Makes the vCPU with this number. Without an entry it waits for another to start it.
    ///
    /// # Errors
    /// [`Failure::Host`] where the hypervisor refuses.
    pub fn create(&self, vm: &dyn Vm, number: u8, entry: Option<BootRegisters>) -> Result<Box<dyn Vcpu>, Failure> {
        let mut vcpu = vm.create_vcpu(self.id(number)?)?;
        self.reset(&mut *vcpu, number, entry)?;
        Ok(vcpu)
    }

    fn reset(&self, vcpu: &mut dyn Vcpu, number: u8, entry: Option<BootRegisters>) -> Result<(), Failure> {
        let cpuid = self.cpuid.for_vcpu(self.id(number)?);
        Ok(vcpu.reset(&ResetState { cpuid, msrs: self.msrs.clone(), entry })?)
    }

    fn id(&self, number: u8) -> Result<VcpuId, Failure> {
        let id = self.ids.get(usize::from(number)).copied();
        id.ok_or_else(|| Failure::Host(format!("the machine has no vCPU {number}")))
    }
}

/// The vCPUs of a machine that can come and go.
pub struct Pluggable {
    /// What the guest sees of them.
    pub registers: Arc<Processors>,
    maker: VcpuMaker,
    exits: Arc<ExitBuses>,
    /// Those that were there, and are not now.
    parked: BTreeMap<u8, Box<dyn Vcpu>>,
}

impl Pluggable {
    /// None has come or gone yet.
    pub fn new(maker: VcpuMaker, registers: Arc<Processors>, exits: Arc<ExitBuses>) -> Self {
        Self { registers, maker, exits, parked: BTreeMap::new() }
    }

    /// Gives the guest a vCPU that runs or stands as all others do, or asks it anew to take one that it has.
    ///
    /// # Errors
    /// [`Failure::Host`] where it cannot be made; the guest does not see it then.
    pub fn add(&mut self, number: u8, vm: &dyn Vm, threads: &mut VcpuThreads) -> Result<(), Failure> {
        if !threads.has(number) {
            threads.start(number)?;
            match self.make(number, vm) {
                Ok(vcpu) => threads.seat(number, vcpu, &self.exits),
                Err(failure) => {
                    drop(threads.take_out(number));
                    return Err(failure);
                }
            }
        }
        self.registers.insert(number);
        Ok(())
    }

    /// A vCPU that waits for another to start it: the one that was there before, or a new one.
    fn make(&mut self, number: u8, vm: &dyn Vm) -> Result<Box<dyn Vcpu>, Failure> {
        let mut vcpu = match self.parked.remove(&number) {
            Some(vcpu) => vcpu,
            None => vm.create_vcpu(self.maker.id(number)?)?,
        };
        match self.maker.reset(&mut *vcpu, number, None) {
            Ok(()) => Ok(vcpu),
            Err(failure) => {
                // It is in the hypervisor's VM for good: the next attempt finds it.
                self.parked.insert(number, vcpu);
                Err(failure)
            }
        }
    }

    /// Takes a vCPU away from the guest, and keeps it for when it is added again.
    pub fn take(&mut self, number: u8, threads: &mut VcpuThreads) {
        self.registers.remove(number);
        if let Some(vcpu) = threads.take_out(number) {
            self.parked.insert(number, vcpu);
        }
    }
}
