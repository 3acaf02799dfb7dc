//! Tap devices: Ethernet frames, each with a virtio header, read from and written to a descriptor.

#![expect(unsafe_code, reason = "ioctls of tap devices, vectored I/O on guest memory")]

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::HEADER_LEN;
use crate::iovec::IoVectors;

/// The longest name of a network interface, in bytes.
const MAX_NAME_LEN: usize = 15;

mod requests {
    nix::ioctl_write_ptr_bad!(set_iff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_read_bad!(get_iff, libc::TUNGETIFF, libc::ifreq);
    nix::ioctl_write_ptr_bad!(set_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
    nix::ioctl_write_int_bad!(set_offload, libc::TUNSETOFFLOAD);
}

/// Why a tap cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The name can be no interface's.
    #[error("tap {name:?}: {reason}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// There is no such interface.
    #[error(
        "tap {name}: there is no such network interface; make it with: ip tuntap add dev {name} mode tap user USER"
    )]
    Missing {
        /// The name.
        name: String,
    },
    /// It is another process's.
    #[error("tap {name}: another process uses it; end that, or give each VM a tap of its own")]
    Busy {
        /// The name.
        name: String,
    },
    /// Not allowed.
    #[error(
        "tap {name}: no permission to use it ({source}); make it for this user (ip tuntap add dev {name} mode tap \
         user USER), and see that /dev/net/tun can be opened, or run with CAP_NET_ADMIN"
    )]
    Permission {
        /// The name.
        name: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The kernel has no tap devices.
    #[error(
        "tap {name}: /dev/net/tun cannot be opened: {source}; load the kernel's tun module, or in a container, pass the device in"
    )]
    NoTun {
        /// The name.
        name: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// It is an interface of another kind.
    #[error("tap {name}: is no tap device of one queue (mode tap, without multi_queue), so it cannot be used")]
    Kind {
        /// The name.
        name: String,
    },
    /// An inherited descriptor is not set up.
    #[error("tap {name}: the descriptor {reason}")]
    Descriptor {
        /// What the descriptor was called.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The operating system refused something else.
    #[error("tap {name}: {what}: {source}")]
    Host {
        /// The name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

/// What the reader of a tap does itself, so that the kernel need not: checksums, and cutting long packets up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Checksums.
    pub checksum: bool,
    /// TCP over IPv4.
    pub tso4: bool,
    /// TCP over IPv6.
    pub tso6: bool,
    /// TCP with explicit congestion notification.
    pub ecn: bool,
    /// UDP by IP fragments.
    pub ufo: bool,
    /// UDP by datagrams, over IPv4 and IPv6.
    pub uso: bool,
}

impl Offloads {
    fn bits(self) -> libc::c_uint {
        // Without checksums the kernel takes none of the others.
        if !self.checksum {
            return 0;
        }
        [
            (self.tso4, libc::TUN_F_TSO4),
            (self.tso6, libc::TUN_F_TSO6),
            (self.ecn && (self.tso4 || self.tso6), libc::TUN_F_TSO_ECN),
            (self.ufo, libc::TUN_F_UFO),
            (self.uso, libc::TUN_F_USO4 | libc::TUN_F_USO6),
        ]
        .into_iter()
        .filter(|(wanted, _)| *wanted)
        .fold(libc::TUN_F_CSUM, |bits, (_, bit)| bits | bit)
    }
}

/// An open tap device.
#[derive(Debug)]
pub struct Tap {
    name: String,
    fd: OwnedFd,
    /// What its kernel can do.
    supported: Offloads,
    /// False for a socket of frames in its place.
    is_tap: bool,
}

impl Tap {
    /// Opens an existing tap by its name. None is ever made.
    ///
    /// # Errors
    /// [`TapError`] names the tap, what is wrong and what would help.
    pub fn open(name: &str) -> Result<Self, TapError> {
        check_name(name)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let mut request = interface_request(name, i16::try_from(flags).unwrap_or_default());
        let name = name.to_owned();
        if !interface_exists(&name) {
            return Err(TapError::Missing { name });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun");
        let file = match file {
            Ok(file) => file,
            Err(source) if source.kind() == io::ErrorKind::PermissionDenied => {
                return Err(TapError::Permission { name, source });
            }
            Err(source) => return Err(TapError::NoTun { name, source }),
        };
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        match unsafe { requests::set_iff(file.as_raw_fd(), &raw mut request) } {
            Ok(_) => Self::set_up(name, file.into()),
            Err(nix::Error::EBUSY) => Err(TapError::Busy { name }),
            Err(nix::Error::EINVAL) => Err(TapError::Kind { name }),
            Err(e @ (nix::Error::EPERM | nix::Error::EACCES)) => Err(TapError::Permission { name, source: e.into() }),
            Err(e) => Err(TapError::Host { name, what: "attaching", source: e.into() }),
        }
    }

    /// Takes a descriptor that is attached to a tap already, as inherited from the process that started the monitor.
    /// `name` names it in messages.
    ///
    /// # Errors
    /// [`TapError`] says what is wrong with it.
    pub fn from_fd(name: &str, fd: OwnedFd) -> Result<Self, TapError> {
        let name = name.to_owned();
        let mut request = interface_request("", 0);
        // SAFETY: TUNGETIFF writes one ifreq.
        if unsafe { requests::get_iff(fd.as_raw_fd(), &raw mut request) }.is_err() {
            let reason = "is not attached to a tap";
            return Err(TapError::Descriptor { name, reason });
        }
        // SAFETY: TUNGETIFF has written the flags.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            let reason = "was not made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR";
            return Err(TapError::Descriptor { name, reason });
        }
        set_nonblocking(fd.as_fd()).map_err(|source| TapError::Host {
            name: name.clone(),
            what: "setting it non-blocking",
            source,
        })?;
        Self::set_up(name, fd)
    }

    fn set_up(name: String, fd: OwnedFd) -> Result<Self, TapError> {
        let size = libc::c_int::try_from(HEADER_LEN).unwrap_or_default();
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        unsafe { requests::set_header_size(fd.as_raw_fd(), &raw const size) }.map_err(|e| TapError::Host {
            name: name.clone(),
            what: "setting the header's size",
            source: e.into(),
        })?;
        let mut tap = Self { name, fd, supported: Offloads::default(), is_tap: true };
        let mut supported = Offloads::default();
        for enable in [
            |o: &mut Offloads| o.checksum = true,
            |o: &mut Offloads| (o.tso4, o.tso6) = (true, true),
            |o: &mut Offloads| o.ecn = true,
            |o: &mut Offloads| o.ufo = true,
            |o: &mut Offloads| o.uso = true,
        ] {
            let mut more = supported;
            enable(&mut more);
            if tap.offload(more).is_ok() {
                supported = more;
            }
        }
        tap.offload(Offloads::default()).map_err(|source| TapError::Host {
            name: tap.name.clone(),
            what: "setting offloads",
            source,
        })?;
        tap.supported = supported;
        Ok(tap)
    }

    /// One end of a pair of sockets that keep frames apart, in a tap's place: for tests and fuzz targets.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn fake(fd: OwnedFd, supported: Offloads) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        Ok(Self { name: "fake".into(), fd, supported, is_tap: false })
    }

    /// The tap's name, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the host's kernel can leave to the reader, and take from the writer.
    pub fn supported(&self) -> Offloads {
        self.supported
    }

    /// Says what the reader does itself from now on.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if !self.is_tap {
            return Ok(());
        }
        self.offload(offloads)
    }

    fn offload(&self, offloads: Offloads) -> io::Result<()> {
        let bits = libc::c_int::try_from(offloads.bits()).unwrap_or_default();
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe { requests::set_offload(self.fd.as_raw_fd(), bits) }?;
        Ok(())
    }

    /// Another descriptor of the same tap.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { name: self.name.clone(), fd: self.fd.try_clone()?, supported: self.supported, is_tap: self.is_tap })
    }

    /// Reads a frame into guest memory and, where that is too short, on into `more`. Gives the number of bytes read.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where there is none.
    pub(crate) fn read_frame(&self, buffers: &IoVectors, more: &mut [u8]) -> io::Result<usize> {
        let guest = buffers.left();
        // One entry is left for `more`.
        let guest = guest.get(..MAX_GUEST_ENTRIES).unwrap_or(guest);
        let mut all = Vec::with_capacity(guest.len() + 1);
        all.extend_from_slice(guest);
        all.push(libc::iovec { iov_base: more.as_mut_ptr().cast(), iov_len: more.len() });
        let count = libc::c_int::try_from(all.len()).unwrap_or_default();
        // SAFETY: the entries are those of guest memory that the caller's chains keep mapped, and of `more`.
        let got = unsafe { libc::readv(self.fd.as_raw_fd(), all.as_ptr(), count) };
        usize::try_from(got).map_err(|_| io::Error::last_os_error())
    }

    /// Writes a frame from guest memory.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where there is no room; [`io::ErrorKind::InvalidInput`] where the frame is in
    /// more pieces than one call takes.
    pub(crate) fn write_frame(&self, buffers: &IoVectors) -> io::Result<usize> {
        let entries = buffers.left();
        let total: usize = entries.iter().map(|entry| entry.iov_len).sum();
        if total != buffers.len() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let count = libc::c_int::try_from(entries.len()).unwrap_or_default();
        // SAFETY: the entries are those of guest memory that the caller's chain keeps mapped.
        let sent = unsafe { libc::writev(self.fd.as_raw_fd(), entries.as_ptr(), count) };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

/// The most entries of guest memory that [`Tap::read_frame`] reads into.
pub(crate) const MAX_GUEST_ENTRIES: usize = 1023;

impl AsRawFd for Tap {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let reason = if name.is_empty() {
        "a name is missing"
    } else if name.len() > MAX_NAME_LEN {
        "longer than the 15 bytes that a network interface's name may have"
    } else if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
        || name == "."
        || name == ".."
    {
        "no network interface's name: it holds a slash, a colon or a space"
    } else {
        return Ok(());
    };
    Err(TapError::Name { name: name.to_owned(), reason })
}

fn interface_request(name: &str, flags: i16) -> libc::ifreq {
    let mut request =
        libc::ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru: libc::__c_anonymous_ifr_ifru { ifru_flags: flags } };
    // The last byte stays 0.
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(MAX_NAME_LEN)) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request
}

fn interface_exists(name: &str) -> bool {
    // SAFETY: the name is terminated.
    CString::new(name).is_ok_and(|name| unsafe { libc::if_nametoindex(name.as_ptr()) } != 0)
}

fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
