//! A vCPU of a trust domain: its CPUID, and the runs of a plain vCPU without a look at its registers.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::super::state;
use super::super::vcpu::KvmVcpu;
use super::{Known, Td, cpuid, launch, refused};
use crate::{Counters, CrashInfo, Error, Exit, ExitHandler, Kick, ResetState, Result, Vcpu, VcpuId, VcpuState};

/// Why KVM gives a trust domain up.
const LOST: &str = "the TDX module has ended the trust domain, as when the guest touches a page that it has not accepted \
                    (KVM_RUN: EIO)";

/// A vCPU of a trust domain.
pub(super) struct TdVcpu {
    td: Arc<Td>,
    id: VcpuId,
    inner: KvmVcpu,
}

impl TdVcpu {
    pub(super) fn create(td: &Arc<Td>, id: VcpuId) -> Result<Self> {
        let inner = KvmVcpu::create(&td.vm, id)?.answering(td.capabilities.calls);
        td.state().vcpus.insert(id, Known { fd: inner.fd.as_raw_fd(), ready: false });
        Ok(Self { td: td.clone(), id, inner })
    }
}

impl Drop for TdVcpu {
    fn drop(&mut self) {
        // Before its descriptor is closed.
        self.td.state().vcpus.remove(&self.id);
    }
}

impl Vcpu for TdVcpu {
    fn run(&mut self, host: &dyn ExitHandler) -> Result<Exit> {
        if !self.td.has_finished() {
            return refused("launch", "the guest is not sealed, so it cannot run");
        }
        match self.inner.run(host) {
            Err(Error::System { source, .. }) if source.raw_os_error() == Some(libc::EIO) => {
                Ok(Exit::Crash(CrashInfo { reason: LOST.into(), rip: None }))
            }
            other => other,
        }
    }

    fn kick(&self) -> Kick {
        self.inner.kick()
    }

    fn reset(&mut self, at: &ResetState) -> Result<()> {
        if at.entry.is_some() {
            return refused("registers", "the TDX module sets those of a trust domain");
        }
        self.td.may_reset(self.id)?;
        let given = launch::given_cpuid(&*self.td, self.id)?;
        let leaves = cpuid::for_vcpu(&at.cpuid, &given);
        self.inner.set_cpuid(&leaves)?;
        state::set_msrs(&self.inner.fd, &at.msrs)?;
        self.td.is_ready(self.id, cpuid::changes(&at.cpuid, &leaves));
        Ok(())
    }

    fn stood_still(&mut self) {
        // A trust domain does not have KVM's clock, which would tell it.
    }

    fn state(&mut self) -> Option<&mut dyn VcpuState> {
        None
    }

    fn counters(&self) -> Option<Box<dyn Counters>> {
        self.inner.counters()
    }
}
