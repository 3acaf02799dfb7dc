//! Hosts that the tests of a process lend: as many at once as tests run at once, each started when it is first needed.

use std::ops::Deref;
use std::sync::{Mutex, PoisonError};

use anyhow::Result;

use crate::host::{Host, HostSpec};

static FREE: Mutex<Vec<Host>> = Mutex::new(Vec::new());

/// A host that nobody else uses meanwhile. It is given back when this is dropped, and ends with the process.
pub struct Lent(Option<Host>);

impl Lent {
    /// Takes a free host, or starts one. It has one processor: emulation with several does not survive every change
    /// that a kernel makes to its own code, and the machine's other processors serve other tests' hosts.
    ///
    /// # Errors
    /// As [`Host::start`].
    pub fn take() -> Result<Self> {
        let free = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let host = match free {
            // One that has died since is told by the test that it died under.
            Some(host) if host.run("true").is_ok() => host,
            Some(_) => return Self::take(),
            None => Host::start(&HostSpec::new().cpus(1))?,
        };
        Ok(Self(Some(host)))
    }
}

impl Deref for Lent {
    type Target = Host;

    fn deref(&self) -> &Host {
        self.0.as_ref().expect("a host is there until it is given back")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let host = self.0.take();
        // A test that failed may have left its host in any state.
        if !std::thread::panicking() {
            FREE.lock().unwrap_or_else(PoisonError::into_inner).extend(host);
        }
    }
}
