//! Raw disk images and block devices.
//!
//! The format is never probed: what the guest writes at the start of its disk cannot change what the monitor takes
//! the file for.

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::{DiskBackend, SECTOR, SyncBackend, UringBackend, ioctls};
use crate::iovec::IoVectors;

/// Why an image cannot be a disk.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("disk {disk}: cannot open it for {access}: {source}{hint}")]
    Open {
        /// The image's path.
        disk: String,
        /// What for.
        access: &'static str,
        /// The operating system's answer.
        source: io::Error,
        /// What may help.
        hint: &'static str,
    },
    /// It is no file that can be a disk.
    #[error("disk {disk}: is {what}; give an image file or a block device")]
    Kind {
        /// The image's path.
        disk: String,
        /// What it is.
        what: &'static str,
    },
    /// It has no content.
    #[error("disk {disk}: is empty; give it its size first, for example with truncate -s 10G")]
    Empty {
        /// The image's path.
        disk: String,
    },
    /// Its size is no number of sectors.
    #[error("disk {disk}: its size, {size} bytes, is not a multiple of 512; the next that is, is {next}")]
    Size {
        /// The image's path.
        disk: String,
        /// The size in bytes.
        size: u64,
        /// The next larger size that would do.
        next: u64,
    },
    /// Another VM has it.
    #[error("disk {disk}: locked by another VM (or given twice to this one); only readonly disks can be shared")]
    Locked {
        /// The image's path.
        disk: String,
    },
    /// An inherited descriptor does not allow what was asked.
    #[error(
        "disk {disk}: the descriptor is not open for writing; open it for both reading and writing, or add readonly"
    )]
    NotWritable {
        /// The image's name.
        disk: String,
    },
    /// It has fewer bytes than are to be shown.
    #[error("disk {disk}: {size} bytes are asked for, and it has {length}; make it longer first (truncate -s {size})")]
    TooShort {
        /// The image's path.
        disk: String,
        /// Bytes that are asked for.
        size: u64,
        /// Bytes that there are.
        length: u64,
    },
    /// A disk that is in use would become smaller.
    #[error("disk {disk}: the guest has {now} bytes of it, and a disk in use cannot shrink to {size}")]
    Shrinks {
        /// The image's path.
        disk: String,
        /// Bytes that it would have.
        size: u64,
        /// Bytes that it has.
        now: u64,
    },
    /// The host cannot bypass its page cache for it.
    #[error("disk {disk}: direct I/O is not possible here: {source}; leave out direct, or use another file system")]
    Direct {
        /// The image's path.
        disk: String,
        /// The operating system's answer.
        source: io::Error,
    },
    /// The operating system refused something else.
    #[error("disk {disk}: {what}: {source}")]
    Host {
        /// The image's path.
        disk: String,
        /// What was tried.
        what: &'static str,
        /// The operating system's answer.
        source: io::Error,
    },
}

impl DiskError {
    /// Whether it is the size that was asked for that cannot be, rather than the image.
    pub fn is_of_size(&self) -> bool {
        matches!(self, Self::TooShort { .. } | Self::Shrinks { .. })
    }
}

/// How to open an image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DiskOptions {
    /// The guest may not write to it.
    pub readonly: bool,
    /// Bypass the host's page cache.
    pub direct: bool,
    /// How many of its bytes are shown, a multiple of 512; `None` shows all of them.
    pub size: Option<u64>,
}

/// What sizes of requests suit the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topology {
    /// Bytes that the device writes at once.
    pub physical_block: u32,
    /// The smallest size in bytes that is efficient.
    pub minimum_io: u32,
    /// The size in bytes that is best, 0 where unknown.
    pub optimal_io: u32,
}

/// Alignment in bytes that direct I/O demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DirectAlign {
    /// Of buffers and of their lengths.
    pub(super) memory: usize,
    /// Of offsets on the disk and of lengths.
    pub(super) offset: u64,
}

/// An open image, locked against other VMs for as long as it is open, across resets of the guest.
#[derive(Debug)]
pub struct RawDisk {
    name: String,
    file: File,
    /// The same file past the page cache.
    direct: Option<(File, DirectAlign)>,
    size: AtomicU64,
    readonly: bool,
    topology: Topology,
    /// Whether the host offers io_uring, once it was tried.
    uring: OnceLock<bool>,
}

impl RawDisk {
    /// Opens and locks an image file or a block device.
    ///
    /// # Errors
    /// [`DiskError`] names the disk and what would be right.
    pub fn open(path: &Path, options: DiskOptions) -> Result<Self, DiskError> {
        let disk = path.display().to_string();
        // Looked at before opening, since opening a device or a FIFO may itself do something.
        let metadata = std::fs::metadata(path).map_err(|e| open_error(&disk, options, e))?;
        check_kind(&disk, &metadata)?;
        let file = OpenOptions::new()
            .read(true)
            .write(!options.readonly)
            .custom_flags(libc::O_CLOEXEC)
            .open(path)
            .map_err(|e| open_error(&disk, options, e))?;
        Self::new(disk, file, options)
    }

    /// Takes an open file, as inherited from the process that started the monitor. `name` names it in messages.
    ///
    /// # Errors
    /// [`DiskError`] names the disk and what would be right.
    pub fn from_file(name: &str, file: File, options: DiskOptions) -> Result<Self, DiskError> {
        let disk = name.to_owned();
        let host = |what| host_error(&disk, what);
        let flags = fcntl(&file, FcntlArg::F_GETFL).map_err(|e| host("flags")(e.into()))?;
        let flags = OFlag::from_bits_retain(flags);
        if !options.readonly && flags & OFlag::O_ACCMODE != OFlag::O_RDWR {
            return Err(DiskError::NotWritable { disk });
        }
        if flags.intersects(OFlag::O_NONBLOCK | OFlag::O_DIRECT | OFlag::O_APPEND) {
            // io_uring gives EAGAIN instead of waiting where O_NONBLOCK is set, O_APPEND ignores offsets, and this
            // descriptor is the one that goes through the page cache.
            let plain = flags - (OFlag::O_NONBLOCK | OFlag::O_DIRECT | OFlag::O_APPEND);
            fcntl(&file, FcntlArg::F_SETFL(plain)).map_err(|e| host("flags")(e.into()))?;
        }
        Self::new(disk, file, options)
    }

    fn new(disk: String, file: File, options: DiskOptions) -> Result<Self, DiskError> {
        let metadata = file.metadata().map_err(host_error(&disk, "metadata"))?;
        check_kind(&disk, &metadata)?;
        let block_device = metadata.file_type().is_block_device();
        let size = shown_size(&disk, length(&disk, &file, &metadata)?, options.size)?;
        lock(&disk, &file, options.readonly)?;
        let topology = if block_device {
            ioctls::block_device_topology(file.as_fd()).map_err(host_error(&disk, "topology"))?
        } else {
            file_topology(&metadata)
        };
        let direct = if options.direct { Some(reopen_direct(&disk, &file, options.readonly)?) } else { None };
        let (size, readonly) = (AtomicU64::new(size), options.readonly);
        Ok(Self { name: disk, file, direct, size, readonly, topology, uring: OnceLock::new() })
    }

    /// What messages call the disk.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The size in bytes, a multiple of 512. It may grow.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// The size in bytes that the disk can grow to, now that its file may be longer: `wanted`, or all of the file. For
    /// [`RawDisk::grow`].
    ///
    /// # Errors
    /// [`DiskError`]: the file is not that long, or the disk would be smaller than it is.
    pub fn next_size(&self, wanted: Option<u64>) -> Result<u64, DiskError> {
        let metadata = self.file.metadata().map_err(host_error(&self.name, "metadata"))?;
        let size = shown_size(&self.name, length(&self.name, &self.file, &metadata)?, wanted)?;
        let now = self.size();
        if size < now {
            return Err(DiskError::Shrinks { disk: self.name.clone(), size, now });
        }
        Ok(size)
    }

    /// Makes the disk `size` bytes long, as [`RawDisk::next_size`] gave it. Requests from now on may go that far; the
    /// device's driver is still to be told. It never shrinks.
    pub fn grow(&self, size: u64) {
        self.size.fetch_max(size, Ordering::Relaxed);
    }

    /// Whether writing is refused.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// What sizes of requests suit the disk.
    pub fn topology(&self) -> Topology {
        self.topology
    }

    /// Makes a backend for one queue with up to `depth` requests in flight: io_uring where the host offers it, else
    /// plain system calls. Which of them is logged once for each disk.
    ///
    /// # Errors
    /// The host has no memory or descriptors left.
    pub fn backend(self: &Arc<Self>, depth: u16) -> io::Result<Box<dyn DiskBackend>> {
        if self.uring.get() != Some(&false) {
            match UringBackend::new(Arc::clone(self), depth) {
                Ok(backend) => {
                    if self.uring.set(true).is_ok() {
                        tracing::debug!("disk {}: io_uring", self.name);
                    }
                    return Ok(Box::new(backend));
                }
                Err(e) => {
                    // Queues made later follow, unless an earlier one proved that the host does offer it.
                    if self.uring.set(false).is_ok() {
                        tracing::info!("disk {}: plain system calls, since io_uring is not to be had: {e}", self.name);
                    }
                }
            }
        }
        Ok(Box::new(SyncBackend::new(Arc::clone(self))?))
    }

    /// The descriptor that goes through the page cache.
    pub(super) fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The descriptor for moving `buffers` at `offset`. What is not aligned as direct I/O demands goes through the
    /// page cache, which the kernel keeps coherent with direct I/O, so no copy of our own is needed.
    pub(super) fn fd_for(&self, buffers: &IoVectors, offset: u64) -> RawFd {
        match &self.direct {
            Some((file, align))
                if offset.is_multiple_of(align.offset)
                    && (buffers.len() as u64).is_multiple_of(align.offset)
                    && buffers.is_aligned(align.memory) =>
            {
                file.as_raw_fd()
            }
            _ => self.fd(),
        }
    }
}

fn open_error(disk: &str, options: DiskOptions, source: io::Error) -> DiskError {
    let hint = match source.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !options.readonly => {
            "; add readonly where the guest need not write to it"
        }
        _ => "",
    };
    DiskError::Open {
        disk: disk.to_owned(),
        access: if options.readonly { "reading" } else { "reading and writing" },
        source,
        hint,
    }
}

fn host_error(disk: &str, what: &'static str) -> impl FnOnce(io::Error) -> DiskError + use<> {
    let disk = disk.to_owned();
    move |source| DiskError::Host { disk, what, source }
}

fn check_kind(disk: &str, metadata: &Metadata) -> Result<(), DiskError> {
    let kind = metadata.file_type();
    let what = if kind.is_file() || kind.is_block_device() {
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_char_device() {
        "a character device"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "no regular file"
    };
    Err(DiskError::Kind { disk: disk.to_owned(), what })
}

/// The length in bytes of a file or block device.
fn length(disk: &str, file: &File, metadata: &Metadata) -> Result<u64, DiskError> {
    match metadata.file_type().is_block_device() {
        true => ioctls::block_device_size(file.as_fd()).map_err(host_error(disk, "size")),
        false => Ok(metadata.len()),
    }
}

/// How many bytes of a file of `length` bytes are shown, where `wanted` are asked for, or all.
fn shown_size(disk: &str, length: u64, wanted: Option<u64>) -> Result<u64, DiskError> {
    let (disk, size) = (disk.to_owned(), wanted.unwrap_or(length));
    if size == 0 {
        return Err(DiskError::Empty { disk });
    }
    if !size.is_multiple_of(SECTOR) {
        let next = size.next_multiple_of(SECTOR);
        return Err(DiskError::Size { disk, size, next });
    }
    if size > length {
        return Err(DiskError::TooShort { disk, size, length });
    }
    Ok(size)
}

/// Locks the whole file, for the open file description: the lock ends when the last copy of the descriptor is
/// closed, however the process ends. QEMU's locks are of the same kind, so the two see each other.
fn lock(disk: &str, file: &File, readonly: bool) -> Result<(), DiskError> {
    let kind = if readonly { libc::F_RDLCK } else { libc::F_WRLCK };
    let lock = libc::flock {
        l_type: i16::try_from(kind).unwrap_or_default(),
        l_whence: i16::try_from(libc::SEEK_SET).unwrap_or_default(),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&lock)) {
        Ok(_) => Ok(()),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(DiskError::Locked { disk: disk.to_owned() }),
        Err(nix::Error::ENOLCK | nix::Error::EOPNOTSUPP | nix::Error::ENOSYS) => {
            tracing::warn!("disk {disk}: its file system has no locks; nothing keeps another VM from it");
            Ok(())
        }
        Err(e) => Err(host_error(disk, "locking")(e.into())),
    }
}

fn file_topology(metadata: &Metadata) -> Topology {
    // What a file system calls its preferred size is a sound guess, where it is one that a disk can have.
    let block = u32::try_from(metadata.blksize())
        .ok()
        .filter(|size| size.is_power_of_two() && (512..=65536).contains(size))
        .unwrap_or(4096);
    Topology { physical_block: block, minimum_io: block, optimal_io: 0 }
}

/// Opens the same file once more, past the page cache.
fn reopen_direct(disk: &str, file: &File, readonly: bool) -> Result<(File, DirectAlign), DiskError> {
    let direct = |source| DiskError::Direct { disk: disk.to_owned(), source };
    let again = OpenOptions::new()
        .read(true)
        .write(!readonly)
        .custom_flags(libc::O_CLOEXEC | libc::O_DIRECT)
        .open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(direct)?;
    let align = ioctls::direct_alignment(again.as_fd()).map_err(direct)?;
    Ok((again, align))
}
