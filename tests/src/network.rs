//! Bridges and taps of a host, which go with the value that stands for them.

use anyhow::Result;

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
        self.run(format!("ip tuntap add {name} mode tap vnet_hdr {kind} && {master} ip link set {name} up"))?.ok()?;
        Ok(Tap { link })
    }
}
