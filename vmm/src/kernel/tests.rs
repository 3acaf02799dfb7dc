//! The cache of unpacked kernels: what it takes, what it refuses, and that a boot does without it.

use std::collections::BTreeSet;
use std::fs::{self, File, FileTimes, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use api::{ByteSize, KernelCache, VmConfig};
use arch::KernelImage;
use hal::Hypervisor;
use hal::fake::Fake;
use nix::sys::stat::fstat;
use vm_memory::{Bytes, GuestAddress};

use super::cache::{Cache, Key, check_owner, user_directory};
use super::entry::Entry;
use crate::Failure;
use crate::boot::{self, Loaded};
use crate::inputs::Inputs;
use crate::request::Descriptors;
use crate::trace::Trace;

const MIB: usize = 1 << 20;

struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { folder: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self) -> Cache {
        Cache::open_directory(self.path("cache"), 64 << 20).unwrap()
    }

    /// A kernel file that changed long ago, as far as `now` knows.
    fn kernel(&self, content: &[u8]) -> File {
        let path = self.path("vmlinuz");
        fs::write(&path, content).unwrap();
        File::options().read(true).write(true).open(path).unwrap()
    }

    /// What is in the cache, by name.
    fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path("cache")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// The one entry, without links.
    fn entry(&self) -> PathBuf {
        let mut names = self.names();
        names.retain(|name| name.starts_with("kernel-"));
        assert_eq!(names.len(), 1, "{names:?}");
        self.path("cache").join(names.first().unwrap())
    }
}

fn later() -> SystemTime {
    SystemTime::now() + Duration::from_secs(60)
}

/// A key whose file is trusted not to have changed.
fn key(kernel: &File, payload: &[u8]) -> Key {
    Key::new(kernel, payload, later())
}

fn bytes(number: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| number.wrapping_add((at % 251).to_le_bytes()[0])).collect()
}

fn content(entry: &Entry) -> Vec<u8> {
    let mut bytes = Vec::new();
    entry
        .read(0, entry.size(), &mut |part| {
            bytes.extend_from_slice(part);
            Ok(())
        })
        .unwrap();
    bytes
}

#[test]
fn what_was_kept_is_found_by_payload_and_by_file() {
    let bench = Bench::new();
    let kernel = bench.kernel(b"packed");
    let key = key(&kernel, b"packed");
    let cache = bench.open();
    assert!(cache.find_file(&kernel).is_none());
    assert!(cache.find(&key).is_none());
    cache.write(&key, &bytes(1, MIB)).unwrap();
    assert_eq!(content(&cache.find(&key).unwrap()), bytes(1, MIB));
    assert_eq!(content(&bench.open().find_file(&kernel).unwrap()), bytes(1, MIB));
    // The same payload in another file.
    fs::write(bench.path("other"), b"packed").unwrap();
    let other = File::open(bench.path("other")).unwrap();
    assert!(cache.find_file(&other).is_none());
    assert!(cache.find(&self::key(&other, b"packed")).is_some());
    assert!(cache.find_file(&other).is_some(), "it is known from now on");
    assert!(cache.find(&self::key(&other, b"another")).is_none());
}

#[test]
fn a_file_that_changed_is_not_taken_for_the_one_before() {
    let bench = Bench::new();
    let kernel = bench.kernel(b"packed");
    let cache = bench.open();
    cache.write(&key(&kernel, b"packed"), &bytes(1, MIB)).unwrap();
    assert!(cache.find_file(&kernel).is_some());
    // Of the same length and age. The clock of file systems ticks only some hundred times a second.
    let before = kernel.metadata().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while fstat(&kernel).unwrap().st_ctime_nsec == before.ctime_nsec() {
        assert!(Instant::now() < deadline, "the time of change stands still");
        kernel.write_all_at(b"PACKED", 0).unwrap();
        kernel.set_times(FileTimes::new().set_modified(before.modified().unwrap())).unwrap();
    }
    let after = kernel.metadata().unwrap();
    assert_eq!((after.len(), after.mtime_nsec(), after.ino()), (before.len(), before.mtime_nsec(), before.ino()));
    assert!(cache.find_file(&kernel).is_none());
}

#[test]
fn a_file_that_changed_just_now_is_known_by_its_content_only() {
    let bench = Bench::new();
    let kernel = bench.kernel(b"packed");
    let cache = bench.open();
    let key = Key::new(&kernel, b"packed", SystemTime::now());
    cache.write(&key, &bytes(1, MIB)).unwrap();
    assert!(cache.find_file(&kernel).is_none());
    assert!(cache.find(&key).is_some());
    assert_eq!(bench.names().len(), 1, "no link");
}

#[test]
fn a_cache_that_others_can_write_to_is_not_used() {
    let bench = Bench::new();
    let error = |path: PathBuf| Cache::open_directory(path, u64::MAX).unwrap_err().to_string();
    for mode in [0o770, 0o707, 0o1777, 0o720] {
        fs::DirBuilder::new().recursive(true).create(bench.path("cache")).unwrap();
        fs::set_permissions(bench.path("cache"), Permissions::from_mode(mode)).unwrap();
        assert_eq!(error(bench.path("cache")), "others may write to it: only its owner may (chmod go-w)", "{mode:o}");
    }
    fs::set_permissions(bench.path("cache"), Permissions::from_mode(0o755)).unwrap();
    bench.open();
    symlink(bench.path("cache"), bench.path("link")).unwrap();
    symlink(bench.path("nowhere"), bench.path("dangling")).unwrap();
    fs::write(bench.path("file"), b"").unwrap();
    for name in ["link", "dangling", "file"] {
        assert_eq!(error(bench.path(name)), "it is no directory, or a link to one", "{name}");
    }
    // A missing one is made for its owner alone, with all above it.
    Cache::open_directory(bench.path("new/cache"), 0).unwrap();
    assert_eq!(fs::metadata(bench.path("new/cache")).unwrap().mode() & 0o777, 0o700);
}

#[test]
fn what_belongs_to_another_user_is_not_trusted() {
    let bench = Bench::new();
    let mut stat = fstat(bench.kernel(b"")).unwrap();
    check_owner(&stat).unwrap();
    stat.st_uid = 0;
    check_owner(&stat).unwrap();
    stat.st_uid = nix::unistd::geteuid().as_raw() + 4711;
    let error = check_owner(&stat).unwrap_err().to_string();
    assert_eq!(error, format!("it belongs to user {}: it must be this user's or root's", stat.st_uid));
}

#[test]
fn entries_that_cannot_be_trusted_are_removed() {
    let bench = Bench::new();
    let kernel = bench.kernel(b"packed");
    let (cache, key) = (bench.open(), key(&kernel, b"packed"));
    let spoil: [&dyn Fn(&Path); 5] = [
        &|entry| fs::set_permissions(entry, Permissions::from_mode(0o620)).unwrap(),
        &|entry| File::options().write(true).open(entry).unwrap().set_len(1000).unwrap(),
        &|entry| fs::write(entry, b"").unwrap(),
        &|entry| {
            fs::rename(entry, bench.path("elsewhere")).unwrap();
            symlink(bench.path("elsewhere"), entry).unwrap();
        },
        &|entry| {
            fs::remove_file(entry).unwrap();
            nix::unistd::mkfifo(entry, nix::sys::stat::Mode::S_IRWXU).unwrap();
        },
    ];
    for (number, spoil) in spoil.iter().enumerate() {
        cache.write(&key, &bytes(7, MIB)).unwrap();
        let entry = bench.entry();
        spoil(&entry);
        assert!(cache.find_file(&kernel).is_none(), "{number}");
        assert!(fs::symlink_metadata(&entry).is_err(), "{number}: it is still there");
    }
    // Keeping it again replaces whatever is there.
    cache.write(&key, &bytes(7, MIB)).unwrap();
    fs::write(bench.entry(), b"spoiled").unwrap();
    cache.write(&key, &bytes(8, MIB)).unwrap();
    assert_eq!(content(&cache.find(&key).unwrap()), bytes(8, MIB));
}

#[test]
fn writers_at_once_leave_one_sound_entry() {
    let bench = Bench::new();
    let kernel = bench.kernel(b"packed");
    let key = key(&kernel, b"packed");
    let barrier = Barrier::new(8);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let cache = bench.open();
                barrier.wait();
                for _ in 0..5 {
                    cache.write(&key, &bytes(3, 2 * MIB)).unwrap();
                    assert_eq!(content(&cache.find_file(&kernel).unwrap()), bytes(3, 2 * MIB));
                }
            });
        }
    });
    assert_eq!(bench.names().len(), 2, "one entry and one link: {:?}", bench.names());
}

#[test]
fn the_entry_not_used_for_longest_makes_room() {
    let bench = Bench::new();
    let cache = Cache::open_directory(bench.path("cache"), 7 << 19).unwrap();
    let kernel = bench.kernel(b"packed");
    let keys: Vec<Key> = (0..5_u8).map(|number| Key::new(&kernel, &[number], SystemTime::now())).collect();
    let mut expected = BTreeSet::new();
    let past = |seconds| SystemTime::now() - Duration::from_secs(seconds);
    for (number, key) in keys.iter().enumerate().take(3) {
        cache.write(key, &bytes(1, MIB)).unwrap();
        let name = bench.names().difference(&expected).next().unwrap().clone();
        let file = File::options().write(true).open(bench.path("cache").join(&name)).unwrap();
        file.set_times(FileTimes::new().set_modified(past(100 - number as u64))).unwrap();
        expected.insert(name);
    }
    // The first is used, so that the second is the oldest.
    assert!(cache.find(&keys[0]).is_some());
    cache.write(&keys[3], &bytes(1, MIB)).unwrap();
    let found: Vec<bool> = keys.iter().map(|key| cache.find(key).is_some()).collect();
    assert_eq!(found, [true, false, true, true, false]);
    // What takes its own place needs no room.
    cache.write(&keys[3], &bytes(2, MIB)).unwrap();
    assert!(cache.find(&keys[0]).is_some() && cache.find(&keys[2]).is_some());
    let error = cache.write(&keys[4], &bytes(1, 4 * MIB)).unwrap_err().to_string();
    assert_eq!(error, "it takes 4 MiB, and 3 MiB are for all kernels");
    assert!(cache.find(&keys[0]).is_some(), "nothing made room for what does not fit");
}

#[test]
fn only_what_the_cache_made_is_removed() {
    let bench = Bench::new();
    let cache = bench.open();
    let kernel = bench.kernel(b"packed");
    let hash = "0123456789abcdef".repeat(4);
    let old = SystemTime::now() - Duration::from_secs(3600);
    let put = |name: &str, age: SystemTime| {
        let file = File::create(bench.path("cache").join(name)).unwrap();
        file.set_times(FileTimes::new().set_modified(age)).unwrap();
    };
    let stale = format!("kernel-{hash}.fedcba9876543210");
    let fresh = format!("kernel-{hash}.0000000000000000");
    put(&stale, old);
    put(&fresh, SystemTime::now());
    symlink(format!("kernel-{hash}"), bench.path("cache/file-of-a-kernel-that-is-gone")).unwrap();
    let others = [
        "tmp-1-0",
        "file-list",
        "kernel-notes",
        &hash,
        &format!("kernel-{hash}.tar"),
        &format!("{hash}.0000000000000000"),
    ]
    .map(String::from);
    for name in &others {
        put(name, old);
    }
    symlink("nowhere", bench.path("cache/file-link")).unwrap();
    fs::create_dir(bench.path("cache").join(format!("kernel-{}", hash.replace('0', "1")))).unwrap();
    let before = bench.names();
    cache.write(&key(&kernel, b"packed"), &bytes(1, MIB)).unwrap();
    let after = bench.names();
    let gone: Vec<_> = before.difference(&after).collect();
    assert_eq!(gone, ["file-of-a-kernel-that-is-gone", &stale]);
}

#[test]
fn links_do_not_pile_up() {
    let bench = Bench::new();
    let (cache, kernel) = (bench.open(), bench.kernel(b"packed"));
    cache.write(&key(&kernel, b"packed"), &bytes(1, 1000)).unwrap();
    for number in 0..100 {
        let path = bench.path(&format!("vmlinuz-{number}"));
        fs::write(&path, b"packed").unwrap();
        let file = File::open(path).unwrap();
        assert!(cache.find(&key(&file, b"packed")).is_some());
        assert!(cache.find_file(&file).is_some());
    }
    let links = bench.names().iter().filter(|name| name.starts_with("file-")).count();
    assert_eq!(links, 64);
}

#[test]
fn a_cache_that_can_only_be_read_is_read() {
    let bench = Bench::new();
    let (kernel, cache) = (bench.kernel(b"packed"), bench.open());
    let key = key(&kernel, b"packed");
    cache.write(&key, &bytes(1, MIB)).unwrap();
    fs::set_permissions(bench.path("cache"), Permissions::from_mode(0o500)).unwrap();
    let names = bench.names();
    assert!(bench.open().find_file(&kernel).is_some());
    // Root writes there all the same.
    if !nix::unistd::geteuid().is_root() {
        let error = cache.write(&key, &bytes(2, MIB)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        assert_eq!(bench.names(), names);
    }
    fs::set_permissions(bench.path("cache"), Permissions::from_mode(0o700)).unwrap();
}

/// A child of this test has the limit: no file of it may become longer than 512 KiB.
#[test]
fn a_full_disk_leaves_nothing_behind() {
    const FOLDER: &str = "HALYARD_TEST_FULL_DISK";
    let write = |path: PathBuf| {
        let kernel = File::open(path.join("vmlinuz")).unwrap();
        let cache = Cache::open_directory(path.join("cache"), 64 << 20).unwrap();
        let error = cache.write(&key(&kernel, b"packed"), &bytes(1, MIB)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::FileTooLarge, "{error}");
        // What fits is kept.
        cache.write(&key(&kernel, b"small"), &bytes(1, 1000)).unwrap();
    };
    if let Some(path) = std::env::var_os(FOLDER) {
        return write(path.into());
    }
    let bench = Bench::new();
    bench.kernel(b"packed");
    let output = Command::new("sh")
        .args(["-c", "ulimit -f 1024; exec \"$0\" --exact kernel::tests::a_full_disk_leaves_nothing_behind"])
        .arg(std::env::current_exe().unwrap())
        .env(FOLDER, bench.folder.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    assert_eq!(bench.names().iter().filter(|name| name.starts_with("kernel-")).count(), 1, "{:?}", bench.names());
}

#[test]
fn the_users_cache_is_where_the_environment_says() {
    let with = |pairs: &'static [(&str, &str)]| {
        user_directory(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into()))
    };
    let path = |text: &str| Some(PathBuf::from(text));
    assert_eq!(with(&[("XDG_CACHE_HOME", "/c"), ("HOME", "/h")]), path("/c/halyard/unpacked"));
    assert_eq!(with(&[("HOME", "/h")]), path("/h/.cache/halyard/unpacked"));
    assert_eq!(with(&[("XDG_CACHE_HOME", "relative"), ("HOME", "/h")]), path("/h/.cache/halyard/unpacked"));
    for pairs in [&[][..], &[("HOME", "")], &[("HOME", "h"), ("XDG_CACHE_HOME", "")]] {
        assert_eq!(with(pairs), None);
    }
}

/// What is logged on this thread.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const TEXT: usize = 16 * MIB;

/// A kernel of 600 KiB of text without a relocation table.
fn vmlinux() -> Vec<u8> {
    let text = bytes(1, 600 << 10);
    let size = text.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([TEXT as u64, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 0, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1_u32, 5].map(u32::to_le_bytes).concat());
    file.extend([4096, TEXT as u64, TEXT as u64, size, size, 4096].map(u64::to_le_bytes).concat());
    file.resize(4096, 0);
    file.extend(text);
    file
}

/// A bzImage of code that is all 0x90, and a payload in lz4's old format, which holds the kernel as it is.
fn bzimage(kernel: &[u8]) -> Vec<u8> {
    // One sequence of literals: a token, then the length less 15 in bytes of 255 and a last one that is less.
    let mut block = vec![0xf0];
    let more = kernel.len() - 15;
    block.extend(vec![255; more / 255]);
    block.push((more % 255).to_le_bytes()[0]);
    block.extend(kernel);
    let size = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap().to_le_bytes();
    let payload = [&[0x02, 0x21, 0x4c, 0x18], &size(&block)[..], &block, &size(kernel)].concat();

    let mut image = vec![0; 2 * 512];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    let code = vec![0x90; 0x400];
    let paragraphs = u32::try_from((code.len() + payload.len()).div_ceil(16)).unwrap();
    put(0x1f1, &[1]);
    put(0x1f4, &paragraphs.to_le_bytes());
    put(0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(0x202, b"HdrS\x0f\x02");
    put(0x211, &[1]);
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(0x230, &0x20_0000_u32.to_le_bytes());
    put(0x234, &[1, 21, 3, 0]);
    put(0x238, &2047_u32.to_le_bytes());
    put(0x248, &[0x400_u32.to_le_bytes(), size(&payload)].concat());
    put(0x258, &(TEXT as u64).to_le_bytes());
    put(0x260, &0x40_0000_u32.to_le_bytes());
    [image, code, payload].concat()
}

impl Bench {
    /// Loads the kernel file as for a run. With it, what the owner's thread logged.
    fn boot(&self) -> (Result<Loaded, Failure>, String) {
        self.boot_with(|_| ())
    }

    fn boot_with(&self, change: impl FnOnce(&mut VmConfig)) -> (Result<Loaded, Failure>, String) {
        let mut config = VmConfig::new(self.path("vmlinuz"));
        config.memory.size = ByteSize::mib(32);
        config.kernel.cache = KernelCache::Directory(self.path("cache"));
        change(&mut config);
        config.fill_defaults();
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        // Ending with the inputs is waiting for what is being kept.
        let loaded = tracing::subscriber::with_default(subscriber, || {
            let inputs = Inputs::open(&config, &mut Descriptors::Inherited).unwrap();
            boot::load(&config, Fake::new().caps(), &inputs, &Trace::off())
        });
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        (loaded, log)
    }

    /// Boots, and looks for the unpacked kernel in guest memory.
    fn boot_unpacked(&self) -> String {
        let (loaded, log) = self.boot();
        let loaded = loaded.unwrap();
        assert_eq!(loaded.entry.regs.rip, TEXT as u64);
        let mut text = vec![0; 600 << 10];
        loaded.memory.map.read_slice(&mut text, GuestAddress(TEXT as u64)).unwrap();
        assert!(text == bytes(1, 600 << 10), "the text is not what was packed");
        log
    }
}

#[test]
fn a_boot_keeps_its_kernel_and_the_next_takes_it() {
    let bench = Bench::new();
    bench.kernel(&bzimage(&vmlinux()));
    for _ in 0..2 {
        let log = bench.boot_unpacked();
        assert!(!log.contains("WARN"), "{log}");
    }
    assert_eq!(content(&Entry::open(File::open(bench.entry()).unwrap()).unwrap()), vmlinux());
}

#[test]
fn guests_share_a_kept_kernel_until_they_write_to_it() {
    let bench = Bench::new();
    bench.kernel(&bzimage(&vmlinux()));
    let shared = |config: &mut VmConfig| config.memory.share_kernel = true;
    let (_, log) = bench.boot_with(shared);
    assert!(log.contains("the kernel's pages are this guest's own"), "{log}");

    let guests = [bench.boot_with(shared), bench.boot_with(shared)];
    let [one, two] = guests.map(|(loaded, log)| {
        assert!(!log.contains("this guest's own"), "{log}");
        loaded.unwrap()
    });
    let name = bench.entry().display().to_string();
    let maps = fs::read_to_string("/proc/self/maps").unwrap();
    let of_guests = maps.lines().filter(|line| line.contains(" rw-p ") && line.ends_with(&name)).count();
    assert_eq!(of_guests, 2, "{maps}");
    let place = GuestAddress(TEXT as u64 + 5000);
    one.memory.map.write_slice(b"changed", place).unwrap();
    let mut text = vec![0; 600 << 10];
    two.memory.map.read_slice(&mut text, GuestAddress(TEXT as u64)).unwrap();
    assert!(text == bytes(1, 600 << 10), "another guest's kernel has changed");
    assert_eq!(content(&Entry::open(File::open(bench.entry()).unwrap()).unwrap()), vmlinux());
    let mut changed = [0; 7];
    one.memory.map.read_slice(&mut changed, place).unwrap();
    assert_eq!(&changed, b"changed");
}

#[test]
fn a_boot_replaces_a_damaged_entry() {
    let bench = Bench::new();
    bench.kernel(&bzimage(&vmlinux()));
    bench.boot_unpacked();
    let sound = fs::read(bench.entry()).unwrap();
    // In the headers, in the text, at its end, and in what tells of damage.
    for at in [20, 300 << 10, (600 << 10) + 50, sound.len() - 40, sound.len() - 10] {
        let damaged = File::options().write(true).open(bench.entry()).unwrap();
        damaged.write_all_at(&[sound[at] ^ 1], at as u64).unwrap();
        let log = bench.boot_unpacked();
        let found_in_the_thread = at >= sound.len() - 40;
        assert!(
            found_in_the_thread
                || log.contains("WARN") && log.contains("a kept kernel is damaged, and is unpacked anew"),
            "byte {at}: {log}"
        );
        assert!(fs::read(bench.entry()).unwrap() == sound, "byte {at}: it is still damaged");
        let links = damaged.metadata().unwrap().nlink();
        assert_eq!(links, 0, "byte {at}: it was written to, and not replaced");
        let log = bench.boot_unpacked();
        assert!(!log.contains("WARN"), "byte {at}: {log}");
    }
}

#[test]
fn a_cache_that_cannot_be_used_costs_no_boot() {
    let bench = Bench::new();
    bench.kernel(&bzimage(&vmlinux()));
    fs::write(bench.path("cache"), b"a file").unwrap();
    bench.boot_unpacked();
    fs::remove_file(bench.path("cache")).unwrap();
    fs::DirBuilder::new().mode(0o777).create(bench.path("cache")).unwrap();
    fs::set_permissions(bench.path("cache"), Permissions::from_mode(0o777)).unwrap();
    bench.boot_unpacked();
    assert!(bench.names().is_empty(), "{:?}", bench.names());
}

#[test]
fn a_kernel_that_cannot_be_entered_unpacks_itself_and_is_not_called_damaged() {
    let bench = Bench::new();
    let mut image = bzimage(&vmlinux());
    // The alignment, which the kernel inside does not have.
    image[0x230..0x234].copy_from_slice(&0x1000_u32.to_le_bytes());
    bench.kernel(&image);
    for _ in 0..2 {
        let (loaded, log) = bench.boot();
        assert_eq!(loaded.unwrap().entry.regs.rip, TEXT as u64 + 0x200, "the decompressor's entry point");
        assert_eq!(log.matches("the kernel unpacks itself").count(), 1, "{log}");
        assert!(log.contains("its setup header gives an alignment of 0x1000"), "{log}");
        assert!(!log.contains("WARN"), "{log}");
    }
}

#[test]
fn a_payload_that_cannot_be_unpacked_unpacks_itself() {
    let bench = Bench::new();
    let mut image = bzimage(&vmlinux());
    // It says that it is packed with nothing that is known.
    image[0x800] ^= 0x40;
    bench.kernel(&image);
    let (loaded, _) = bench.boot();
    assert_eq!(loaded.unwrap().entry.regs.rip, TEXT as u64 + 0x200);
    assert!(bench.names().is_empty(), "{:?}", bench.names());
}
