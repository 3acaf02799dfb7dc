//! Bridges and taps of a host, which go with the value that stands for them.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::Result;
use nix::libc;

use crate::command::Cmd;
use crate::host::Host;

/// A bridge, up.
pub struct Bridge<'a> {
    link: Link<'a>,
}

/// A tap, up, which belongs to root.
pub struct Tap<'a> {
    link: Link<'a>,
}

struct Link<'a> {
    host: &'a Host,
    name: String,
}

impl Drop for Link<'_> {
    fn drop(&mut self) {
        // A host that is gone has no devices left.
        let _ = self.host.run(Cmd::new("ip").args(["link", "delete", &self.name]));
    }
}

impl Bridge<'_> {
    /// Its name in the host.
    pub fn name(&self) -> &str {
        &self.link.name
    }
}

impl Tap<'_> {
    /// Its name in the host.
    pub fn name(&self) -> &str {
        &self.link.name
    }
}

impl Host {
    /// Makes a bridge of a name of its own.
    ///
    /// # Errors
    /// Where the host does not allow it.
    pub fn bridge(&self) -> Result<Bridge<'_>> {
        let link = Link { host: self, name: self.unique("hb") };
        let name = &link.name;
        // No waiting for a spanning tree that nobody speaks, and no router of IPv6.
        self.run(format!("ip link add {name} type bridge forward_delay 0 mcast_snooping 0 && ip link set {name} up"))?
            .ok()?;
        Ok(Bridge { link })
    }

    /// Makes a tap of a name of its own, at a bridge if one is given.
    ///
    /// # Errors
    /// Where the host does not allow it.
    pub fn tap(&self, bridge: Option<&Bridge<'_>>) -> Result<Tap<'_>> {
        self.tap_of("", bridge)
    }

    /// As [`Host::tap`], with so many queues as one process opens.
    ///
    /// # Errors
    /// As [`Host::tap`].
    pub fn tap_with_queues(&self, bridge: Option<&Bridge<'_>>) -> Result<Tap<'_>> {
        self.tap_of("multi_queue", bridge)
    }

    fn tap_of(&self, kind: &str, bridge: Option<&Bridge<'_>>) -> Result<Tap<'_>> {
        let link = Link { host: self, name: self.unique("ht") };
        let name = &link.name;
        let master =
            bridge.map_or_else(String::new, |bridge| format!("ip link set {name} master {} &&", bridge.name()));
        self.run(format!("ip tuntap add {name} mode tap user root vnet_hdr {kind} && {master} ip link set {name} up"))?
            .ok()?;
        Ok(Tap { link })
    }
}

mod requests {
    nix::ioctl_write_ptr_bad!(set_interface, nix::libc::TUNSETIFF, nix::libc::ifreq);
}

/// Attaches to a tap of this machine that is there already.
///
/// # Errors
/// The tap is not there, or not this user's.
#[expect(unsafe_code, reason = "an ioctl that no wrapper has")]
pub fn open_tap(name: &str) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    // SAFETY: all zeroes are a valid ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = i16::try_from(flags).unwrap_or_default();
    // SAFETY: TUNSETIFF reads and writes one ifreq.
    unsafe { requests::set_interface(file.as_raw_fd(), &raw mut request) }?;
    Ok(file)
}
