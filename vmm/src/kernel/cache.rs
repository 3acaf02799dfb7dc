//! A directory of unpacked kernels that several monitors share. Nobody holds a lock: an entry is written under a
//! temporary name and renamed when it is whole.
//!
//! | Name                    | What it is                                                                            |
//! |-------------------------|---------------------------------------------------------------------------------------|
//! | `<hash>`                | an [`Entry`], by the SHA-256 of the payload as it is packed                           |
//! | `file-<identity>`       | a link that holds the hash of a kernel file of this device, inode, size and times     |
//! | `tmp-<process>-<number>` | an entry that is being written                                                       |

use std::ffi::OsString;
use std::fmt::Write;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, SystemTime};

use api::KernelCache;
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat, fstatat, futimens};
use nix::sys::time::TimeSpec;
use nix::unistd::{Uid, UnlinkatFlags, geteuid, symlinkat, unlinkat};
use sha2::{Digest, Sha256};

use super::entry::Entry;

/// The most that all entries may take on the disk, in bytes. The ones not used for longest make room.
const CAPACITY: u64 = 512 << 20;
/// A temporary file older than this was left behind by a monitor that died.
const STALE: Duration = Duration::from_secs(600);
/// A file that changed no longer ago than this may change again without another time of change.
const SETTLED: Duration = Duration::from_secs(10);

/// What an unpacked kernel is kept by.
pub(super) struct Key {
    /// SHA-256 of the packed payload, in hexadecimal.
    hash: String,
    /// The name of the link from the kernel file, unless the file changed just now.
    file: Option<String>,
}

impl Key {
    pub(super) fn new(kernel: &File, payload: &[u8]) -> Self {
        let hash = Sha256::digest(payload).iter().fold(String::new(), |mut hash, byte| {
            // Writing to a string does not fail.
            let _ = write!(hash, "{byte:02x}");
            hash
        });
        let settled = kernel.metadata().ok().filter(|metadata| {
            let seconds = u64::try_from(metadata.ctime()).unwrap_or(u64::MAX);
            let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
            age.saturating_sub(SETTLED) > Duration::from_secs(seconds)
        });
        Self { hash, file: settled.map(|metadata| identity(&metadata)) }
    }
}

/// The name of the link from a file. The time of change cannot be set, so a file of the same name has not changed.
fn identity(file: &fs::Metadata) -> String {
    let (modified, changed) = ((file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()));
    format!(
        "file-{:x}-{:x}-{:x}-{:x}.{:x}-{:x}.{:x}",
        file.dev(),
        file.ino(),
        file.size(),
        modified.0,
        modified.1,
        changed.0,
        changed.1
    )
}

/// An opened cache.
pub(super) struct Cache {
    directory: OwnedFd,
    path: PathBuf,
}

impl Cache {
    /// Opens, and where it is missing makes, the directory. `None` where there is none to be used, which is said in the
    /// log.
    pub(super) fn open(config: &KernelCache) -> Option<Self> {
        let path = match config {
            KernelCache::Off => return None,
            KernelCache::Directory(path) => path.clone(),
            KernelCache::User => user_directory()?,
        };
        Self::open_directory(path.clone())
            .map_err(|error| tracing::warn!("kernels are not kept in {}: {error}", path.display()))
            .ok()
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    fn open_directory(path: PathBuf) -> io::Result<Self> {
        let made = fs::DirBuilder::new().mode(0o700).recursive(true).create(&path);
        let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_RDONLY;
        let directory = nix::fcntl::open(&path, flags, Mode::empty()).map_err(|errno| match (errno, made) {
            (_, Err(error)) => error,
            (nix::Error::ENOTDIR | nix::Error::ELOOP, _) => io::Error::other("it is no directory, or a link to one"),
            (errno, _) => errno.into(),
        })?;
        check_owner(&fstat(&directory)?)?;
        Ok(Self { directory, path })
    }

    /// The entry of a kernel file that was seen before.
    pub(super) fn find_file(&self, kernel: &File) -> Option<Entry> {
        let name = identity(&kernel.metadata().ok()?);
        let hash = readlinkat(&self.directory, name.as_str()).ok()?;
        let hash = hash.into_string().ok().filter(|hash| is_hash(hash.as_bytes()))?;
        self.find(&Key { hash, file: None })
    }

    /// An entry. One that is damaged is removed.
    pub(super) fn find(&self, key: &Key) -> Option<Entry> {
        match self.read(&key.hash) {
            Ok(entry) => {
                self.link(key);
                Some(entry)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!("the kept kernel {} is not used: {error}", self.path.join(&key.hash).display());
                self.remove(&key.hash);
                None
            }
        }
    }

    fn read(&self, hash: &str) -> io::Result<Entry> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK;
        let file = File::from(openat(&self.directory, hash, flags, Mode::empty())?);
        let stat = fstat(&file)?;
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Err(io::Error::other("it is no regular file"));
        }
        check_owner(&stat)?;
        // Marks it as used. In a directory that can only be read nobody needs to know.
        let _ = futimens(&file, &TimeSpec::UTIME_NOW, &TimeSpec::UTIME_NOW);
        Entry::open(file)
    }

    /// Keeps an unpacked kernel. Failing costs the next run time, so it is only logged.
    pub(super) fn keep(&self, key: &Key, kernel: &[u8]) {
        match self.write(key, kernel) {
            Ok(()) => tracing::debug!("kept the unpacked kernel as {}", self.path.join(&key.hash).display()),
            Err(error) => tracing::warn!("the unpacked kernel is not kept in {}: {error}", self.path.display()),
        }
    }

    fn write(&self, key: &Key, kernel: &[u8]) -> io::Result<()> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        self.make_room(kernel.len() as u64)?;
        let name = format!("tmp-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file = File::from(openat(&self.directory, name.as_str(), flags, Mode::S_IRUSR | Mode::S_IWUSR)?);
        let written = Entry::write(&file, kernel)
            .and_then(|()| Ok(renameat(&self.directory, name.as_str(), &self.directory, key.hash.as_str())?));
        if written.is_err() {
            self.remove(&name);
        }
        written?;
        self.link(key);
        Ok(())
    }

    /// Lets the kernel file be known without reading it.
    fn link(&self, key: &Key) {
        if let Some(name) = &key.file {
            // Another monitor did it, or the directory can only be read: the file is read again then.
            let _ = symlinkat(key.hash.as_str(), &self.directory, name.as_str());
        }
    }

    fn remove(&self, name: &str) {
        // Another monitor was faster, or the directory can only be read.
        let _ = unlinkat(&self.directory, name, UnlinkatFlags::NoRemoveDir);
    }

    /// Removes what was left behind, what leads nowhere, and the entries not used for longest until `more` bytes fit.
    fn make_room(&self, more: u64) -> io::Result<()> {
        let mut entries = Vec::new();
        let mut links = Vec::new();
        for (name, stat) in self.list()? {
            let used = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            let age = used.elapsed().unwrap_or_default();
            if name.as_bytes().starts_with(b"tmp-") && age > STALE {
                self.remove(&name.to_string_lossy());
            } else if name.as_bytes().starts_with(b"file-") {
                links.push(name);
            } else if is_hash(name.as_bytes()) {
                let bytes = u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
                entries.push((used, name, bytes));
            }
        }
        entries.sort();
        let mut all: u64 = entries.iter().map(|(_, _, bytes)| bytes).sum();
        for (_, name, bytes) in &entries {
            if all + more <= CAPACITY {
                break;
            }
            self.remove(&name.to_string_lossy());
            all -= bytes;
        }
        for link in links {
            let target = readlinkat(&self.directory, link.as_os_str())?;
            if fstatat(&self.directory, target.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW).is_err() {
                self.remove(&link.to_string_lossy());
            }
        }
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<(OsString, FileStat)>> {
        let mut directory =
            Dir::openat(self.directory.as_fd(), ".", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?;
        let mut all = Vec::new();
        for entry in directory.iter() {
            let name = std::ffi::OsStr::from_bytes(entry?.file_name().to_bytes()).to_owned();
            // It may be gone by now.
            if let Ok(stat) = fstatat(&self.directory, name.as_os_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
                all.push((name, stat));
            }
        }
        Ok(all)
    }
}

fn is_hash(name: &[u8]) -> bool {
    name.len() == 64 && name.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// What others may write to is not trusted: a guest would run what they put there.
fn check_owner(stat: &FileStat) -> io::Result<()> {
    let owner = Uid::from_raw(stat.st_uid);
    if owner != geteuid() && !owner.is_root() {
        return Err(io::Error::other(format!("it belongs to user {owner}: it must be this user's or root's")));
    }
    if stat.st_mode & 0o022 != 0 {
        return Err(io::Error::other("others may write to it: only its owner may (chmod go-w)"));
    }
    Ok(())
}

/// Where this user's caches are (XDG Base Directory Specification).
fn user_directory() -> Option<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let caches = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(caches.join("halyard").join("unpacked"))
}
