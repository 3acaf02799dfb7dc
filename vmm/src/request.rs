//! What clients ask of the owner, and what it answers.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use api::{DeviceConfig, MemoryPatch, PhaseName, Problems, Shutdown, VcpusPatch, VmConfig};
use devices::endpoint::Reservation;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};

use crate::owner::RequestKind;

/// A request, and where its answer goes.
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// Takes the answer. It is dropped instead where the owner ends first.
    pub reply: Reply,
}

/// Takes the answer to a request, on the owner's thread: it must not wait.
pub type Reply = Box<dyn FnOnce(Result<Answer, Refusal>) + Send>;

/// What a client can ask of the owner.
#[derive(Debug)]
pub enum Request {
    /// A VM of this configuration.
    Create {
        /// The configuration as it was given.
        config: Box<VmConfig>,
        /// The descriptors that it names.
        descriptors: Descriptors,
    },
    /// That the VM runs.
    Boot,
    /// That it stands still.
    Pause,
    /// That it runs on.
    Resume,
    /// That it boots again.
    Reset,
    /// That it switches itself off.
    Shutdown(Shutdown),
    /// A non-maskable interrupt on all its vCPUs.
    Nmi,
    /// That there is no VM.
    Destroy,
    /// A change of the configuration.
    Change {
        /// What is to be changed.
        change: Change,
        /// The generation that the configuration must have.
        expected: Option<u64>,
    },
    /// The place of a console's client.
    OpenConsole {
        /// The console.
        id: String,
        /// Who is there is sent away.
        take_over: bool,
    },
    /// That a job ends.
    CancelJob(u64),
}

/// A change of the configuration.
#[derive(Debug)]
pub enum Change {
    /// A device is added, or another takes its place.
    PutDevice {
        /// The device, with its id.
        device: Box<DeviceConfig>,
        /// The descriptors that it names.
        descriptors: Descriptors,
    },
    /// A device is removed.
    RemoveDevice {
        /// The device.
        id: String,
        /// A guest that runs is not asked to let go of it.
        force: bool,
    },
    /// Another number of vCPUs.
    Vcpus(VcpusPatch),
    /// Another size of memory.
    Memory(MemoryPatch),
}

/// What became of a request.
#[derive(Debug)]
pub enum Answer {
    /// It is done.
    Done,
    /// It is done, and there is something that was not there before.
    Created,
    /// A job does it.
    Job(u64),
    /// The place of a console's client is set aside.
    Console(Reservation),
}

/// Why a request is not carried out. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// It cannot be carried out in this phase.
    #[error("a VM that is {phase} cannot be {kind}")]
    Phase {
        /// The phase.
        phase: PhaseName,
        /// What was asked.
        kind: RequestKind,
    },
    /// Something else is in the way.
    #[error("{0}")]
    Conflict(String),
    /// What the request names is not there.
    #[error("{0}")]
    Missing(String),
    /// The configuration, or what it names on the host, cannot be used.
    #[error("{0}")]
    Problems(Problems),
    /// The configuration is not the one that the client knows.
    #[error("the configuration is of generation {is}, and the request expects {expected}")]
    Changed {
        /// The configuration's generation.
        is: u64,
        /// What the client expects.
        expected: u64,
    },
    /// The host failed.
    #[error("{0}")]
    Host(String),
}

impl From<crate::Failure> for Refusal {
    fn from(failure: crate::Failure) -> Self {
        match failure {
            crate::Failure::BadInput(problems) => Self::Problems(problems),
            crate::Failure::Host(reason) => Self::Host(reason),
        }
    }
}

/// Descriptors that a configuration names by number.
pub enum Descriptors {
    /// Those that the process was started with, by their own numbers.
    Inherited,
    /// Those that came with a request, the first as number 3. What nobody takes is closed.
    Sent(BTreeMap<i32, OwnedFd>),
}

/// The number of the first descriptor that comes with a request: 0 to 2 are the standard streams.
pub const FIRST_DESCRIPTOR: i32 = 3;

impl Descriptors {
    /// Descriptors that came with a request.
    pub fn sent(descriptors: impl IntoIterator<Item = OwnedFd>) -> Self {
        Self::Sent((FIRST_DESCRIPTOR..).zip(descriptors).collect())
    }

    /// Takes the descriptor of this number.
    ///
    /// # Errors
    /// There is none, or it is not one that was handed over.
    pub fn take(&mut self, number: i32) -> io::Result<OwnedFd> {
        match self {
            Self::Inherited => inherited(number),
            Self::Sent(descriptors) => descriptors
                .remove(&number)
                .ok_or_else(|| io::Error::other("no such descriptor came with the request; the first is number 3")),
        }
    }
}

impl fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inherited => f.write_str("Inherited"),
            Self::Sent(descriptors) => f.debug_set().entries(descriptors.keys()).finish(),
        }
    }
}

/// Takes over a descriptor that the process was started with, and keeps it from programs started later.
#[expect(unsafe_code, reason = "an inherited descriptor is known by its number only")]
fn inherited(number: i32) -> io::Result<OwnedFd> {
    if number < FIRST_DESCRIPTOR {
        return Err(io::Error::other("0 to 2 are the standard streams"));
    }
    // SAFETY: the borrow ends with the call, which refuses a number that is not open.
    let flags = fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_GETFD)?;
    if FdFlag::from_bits_truncate(flags).contains(FdFlag::FD_CLOEXEC) {
        // All that this process opens is closed on exec, and what it was started with cannot be.
        return Err(io::Error::other("it was not inherited"));
    }
    // SAFETY: as above.
    fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, nothing of this process opened it, and the flag that was just set keeps it from being taken
    // again.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn what_came_with_a_request_is_numbered_from_3_and_taken_once() {
        let (one, other) = nix::unistd::pipe().unwrap();
        let raw = other.as_raw_fd();
        let mut sent = Descriptors::sent([one, other]);
        assert_eq!(sent.take(4).unwrap().as_raw_fd(), raw);
        assert!(sent.take(4).is_err() && sent.take(5).is_err() && sent.take(-1).is_err());
        assert!(sent.take(3).is_ok());
    }

    #[test]
    fn only_what_was_inherited_can_be_taken_and_only_once() {
        let (own, _other) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap();
        let mut inherited = Descriptors::Inherited;
        assert!(inherited.take(own.as_raw_fd()).unwrap_err().to_string().contains("not inherited"));
        assert!(inherited.take(2).is_err() && inherited.take(1 << 20).is_err());
        fcntl(&own, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let number = own.into_raw_fd();
        let taken = inherited.take(number).unwrap();
        assert!(inherited.take(number).is_err());
        drop(taken);
    }
}
