//! A directory of unpacked kernels that several monitors share. Nobody holds a lock: an entry is written under a
//! temporary name and renamed when it is whole.
//!
//! | Name                        | What it is                                                                        |
//! |-----------------------------|-----------------------------------------------------------------------------------|
//! | `kernel-<hash>`             | an [`Entry`], by the SHA-256 of the payload as it is packed                       |
//! | `file-<identity>`           | a link to the entry of a kernel file of this device, inode, size and times        |
//! | `kernel-<hash>.<number>`    | an entry that is being written, with a random number                              |
//!
//! What has another name is nobody's business here: it is neither read nor removed.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use api::KernelCache;
use devices::virtio::rng::kernel_random;
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Uid, UnlinkatFlags, geteuid, symlinkat, unlinkat};
use sha2::{Digest, Sha256};

use super::entry::Entry;
use crate::sandbox::{Access, Grant};

/// The most that all entries may take on the disk, in bytes. The ones not used for longest make room.
const CAPACITY: u64 = 512 << 20;
/// The most links. The oldest make room.
const MAX_LINKS: usize = 64;
/// A temporary file older than this was left behind by a monitor that died.
const STALE: Duration = Duration::from_secs(600);
/// A file that changed no longer ago than this may change again without another time of change.
const SETTLED: Duration = Duration::from_secs(10);
/// Begins the name of an entry.
const KERNEL: &str = "kernel-";
/// Begins the name of a link.
const LINK: &str = "file-";

/// What an unpacked kernel is kept by.
#[derive(Debug, Clone)]
pub(super) struct Key {
    /// The name of the entry.
    entry: String,
    /// The name of the link from the kernel file, where its state tells whether it has changed.
    link: Option<String>,
}

impl Key {
    /// The key of a kernel file and its payload, which was read before `now`.
    pub(super) fn new(kernel: &File, payload: &[u8], now: SystemTime) -> Self {
        let hash = Sha256::digest(payload).iter().fold(String::new(), |mut hash, byte| {
            // Writing to a string does not fail.
            let _ = write!(hash, "{byte:02x}");
            hash
        });
        let link = fstat(kernel).ok().filter(|stat| {
            let changed = Duration::from_secs(u64::try_from(stat.st_ctime).unwrap_or(u64::MAX));
            now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().saturating_sub(SETTLED) > changed
        });
        Self { entry: format!("{KERNEL}{hash}"), link: link.as_ref().and_then(identity) }
    }
}

/// The name of the link from a file. A file of the same name has not changed, since the time of its last change cannot
/// be set. `None` where that time has no fraction of a second: it comes from a file system that does not measure it, or
/// from an image whose files all have the same.
fn identity(file: &FileStat) -> Option<String> {
    let FileStat { st_dev, st_ino, st_size, st_mtime, st_mtime_nsec, st_ctime, st_ctime_nsec, .. } = file;
    (*st_ctime_nsec != 0).then(|| {
        format!("{LINK}{st_dev:x}-{st_ino:x}-{st_size:x}-{st_mtime:x}.{st_mtime_nsec:x}-{st_ctime:x}.{st_ctime_nsec:x}")
    })
}

/// An opened cache.
#[derive(Debug)]
pub(super) struct Cache {
    directory: OwnedFd,
    path: PathBuf,
    /// The most that all entries may take, in bytes.
    capacity: u64,
}

impl Cache {
    /// Opens, and where it is missing makes, the directory. `None` where there is none to be used, which is said in the
    /// log.
    pub(super) fn open(config: &KernelCache) -> Option<Self> {
        let path = directory(config)?;
        let opened = Self::open_directory(path.clone(), CAPACITY);
        opened
            .map_err(|error| match config {
                // Nobody asked for it.
                KernelCache::User => tracing::info!("kernels are not kept in {}: {error}", path.display()),
                _ => tracing::warn!("kernels are not kept in {}: {error}", path.display()),
            })
            .ok()
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn open_directory(path: PathBuf, capacity: u64) -> io::Result<Self> {
        let made = make(&path);
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let directory = nix::fcntl::open(&path, flags, Mode::empty()).map_err(|errno| match (errno, made) {
            (nix::Error::ENOTDIR | nix::Error::ELOOP, _) => io::Error::other("it is no directory, or a link to one"),
            (_, Err(error)) => error,
            (errno, _) => errno.into(),
        })?;
        check_owner(&fstat(&directory)?)?;
        Ok(Self { directory, path, capacity })
    }

    /// The entry of a kernel file that was seen before.
    pub(super) fn find_file(&self, kernel: &File) -> Option<Entry> {
        let link = identity(&fstat(kernel).ok()?)?;
        let entry = readlinkat(&self.directory, link.as_str()).ok()?;
        let entry = entry.into_string().ok().filter(|entry| is_entry(entry.as_bytes()))?;
        self.find(&Key { entry, link: None })
    }

    /// An entry. One that is damaged is removed.
    pub(super) fn find(&self, key: &Key) -> Option<Entry> {
        match self.read(&key.entry) {
            Ok(entry) => {
                self.link(key);
                Some(entry)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("the kept kernel {} is not used: {error}", self.path.join(&key.entry).display());
                self.remove(key.entry.as_ref());
                None
            }
        }
    }

    fn read(&self, name: &str) -> io::Result<Entry> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = File::from(openat(&self.directory, name, flags, Mode::empty()).map_err(|errno| match errno {
            nix::Error::ELOOP => io::Error::other("it is a link"),
            errno => errno.into(),
        })?);
        let stat = fstat(&file)?;
        if kind(&stat) != SFlag::S_IFREG {
            return Err(io::Error::other("it is no regular file"));
        }
        check_owner(&stat)?;
        // Marks it as used. In a directory that can only be read nobody needs to know.
        let _ = futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW);
        Entry::open(file)
    }

    /// Keeps an unpacked kernel, in the place of what was kept for it before. Failing costs the next run time, so it is
    /// only logged.
    pub(super) fn keep(&self, key: &Key, kernel: &[u8]) {
        match self.write(key, kernel) {
            Ok(()) => tracing::debug!("kept the unpacked kernel as {}", self.path.join(&key.entry).display()),
            Err(error) => tracing::warn!("the unpacked kernel is not kept in {}: {error}", self.path.display()),
        }
    }

    pub(super) fn write(&self, key: &Key, kernel: &[u8]) -> io::Result<()> {
        // A file that becomes larger than this process may make them is an error of write(2) and no end of the process.
        SigSet::from(Signal::SIGXFSZ).thread_block()?;
        self.make_room(&key.entry, kernel.len() as u64)?;
        let mut number = [0; 8];
        if kernel_random(&mut number) != number.len() {
            return Err(io::Error::other("the host kernel gives no random numbers"));
        }
        let name = format!("{}.{:016x}", key.entry, u64::from_ne_bytes(number));
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        // Whom the directory lets in may read it.
        let mode = Mode::S_IRUSR | Mode::S_IWUSR | Mode::S_IRGRP | Mode::S_IROTH;
        let file = File::from(openat(&self.directory, name.as_str(), flags, mode)?);
        let written = Entry::write(&file, kernel)
            .and_then(|()| Ok(renameat(&self.directory, name.as_str(), &self.directory, key.entry.as_str())?));
        if written.is_err() {
            self.remove(name.as_ref());
        }
        written?;
        self.link(key);
        Ok(())
    }

    /// Lets the kernel file be known without reading it.
    fn link(&self, key: &Key) {
        let Some(name) = &key.link else { return };
        // Another monitor did it, or the directory can only be read: the file is read again then.
        if symlinkat(key.entry.as_str(), &self.directory, name.as_str()).is_ok() {
            let _ = self.remove_links();
        }
    }

    fn remove(&self, name: &OsStr) {
        // Another monitor was faster, or the directory can only be read.
        let _ = unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir);
    }

    /// Removes what was left behind, and the entries not used for longest until `more` bytes fit, those of the entry
    /// `instead` aside.
    fn make_room(&self, instead: &str, more: u64) -> io::Result<()> {
        if more > self.capacity {
            let (more, all) = (more >> 20, self.capacity >> 20);
            return Err(io::Error::other(format!("it takes {more} MiB, and {all} MiB are for all kernels")));
        }
        let mut entries = Vec::new();
        for (name, stat) in self.list()?.into_iter().filter(|(_, stat)| kind(stat) == SFlag::S_IFREG) {
            let seconds = Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            let used = SystemTime::UNIX_EPOCH + seconds;
            if is_temporary(name.as_bytes()) && used.elapsed().is_ok_and(|age| age > STALE) {
                self.remove(&name);
            } else if is_entry(name.as_bytes()) && name != instead {
                entries.push(((stat.st_mtime, stat.st_mtime_nsec), name, u64::try_from(stat.st_blocks).unwrap_or(0)));
            }
        }
        entries.sort();
        let mut all: u64 = entries.iter().map(|(_, _, sectors)| sectors * 512).sum();
        for (_, name, sectors) in &entries {
            if all + more <= self.capacity {
                break;
            }
            self.remove(name);
            all -= sectors * 512;
        }
        self.remove_links()
    }

    /// Removes the links that lead nowhere, and the oldest of too many.
    fn remove_links(&self) -> io::Result<()> {
        let mut links = Vec::new();
        for (name, stat) in self.list()?.into_iter().filter(|(_, stat)| kind(stat) == SFlag::S_IFLNK) {
            let target = readlinkat(&self.directory, name.as_os_str()).unwrap_or_default();
            if !name.as_bytes().starts_with(LINK.as_bytes()) || !is_entry(target.as_bytes()) {
                continue;
            }
            if fstatat(&self.directory, target.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_err() {
                self.remove(&name);
            } else {
                links.push(((stat.st_mtime, stat.st_mtime_nsec), name));
            }
        }
        links.sort();
        let too_many = links.len().saturating_sub(MAX_LINKS);
        links.iter().take(too_many).for_each(|(_, name)| self.remove(name));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<(OsString, FileStat)>> {
        let mut directory =
            Dir::openat(self.directory.as_fd(), ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut all = Vec::new();
        for entry in directory.iter() {
            let name = OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
            // It may be gone by now.
            if let Ok(stat) = fstatat(&self.directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                all.push((name, stat));
            }
        }
        Ok(all)
    }
}

/// The kind of file.
fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

fn is_entry(name: &[u8]) -> bool {
    name.strip_prefix(KERNEL.as_bytes()).is_some_and(|hash| is_hexadecimal(hash, 64))
}

fn is_temporary(name: &[u8]) -> bool {
    let Some((entry, number)) = name.split_last_chunk::<16>() else { return false };
    entry.strip_suffix(b".").is_some_and(is_entry) && is_hexadecimal(number, 16)
}

fn is_hexadecimal(text: &[u8], len: usize) -> bool {
    text.len() == len && text.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// What others may write to is not trusted: a guest would run what they put there.
pub(super) fn check_owner(stat: &FileStat) -> io::Result<()> {
    let owner = Uid::from_raw(stat.st_uid);
    if owner != geteuid() && !owner.is_root() {
        return Err(io::Error::other(format!("it belongs to user {owner}: it must be this user's or root's")));
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(io::Error::other("others may write to it: only its owner may (chmod go-w)"));
    }
    Ok(())
}

/// Where the cache is that `config` speaks of.
fn directory(config: &KernelCache) -> Option<PathBuf> {
    match config {
        KernelCache::Off => None,
        KernelCache::Directory(path) => Some(path.clone()),
        KernelCache::User => user_directory(|name| std::env::var_os(name)),
    }
}

fn make(directory: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(directory)
}

/// What a process that serves clients must be granted for the cache, which is made where it is missing: the boot comes
/// when the process is confined. `None` where there is no cache, or it cannot be made.
pub fn grant(config: &KernelCache) -> Option<Grant> {
    let path = directory(config)?;
    if let Err(error) = make(&path) {
        tracing::debug!("kernels cannot be kept in {}: {error}", path.display());
        return None;
    }
    Some(Grant { path, access: Access::Keep })
}

/// Where this user's caches are (XDG Base Directory Specification), by the environment.
pub(super) fn user_directory(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(caches.join("halyard").join("unpacked"))
}
