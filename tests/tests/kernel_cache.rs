//! Kept kernels, through the program: whatever is wrong with the cache or with a bzImage's payload, the guest that runs
//! is the one in the file, and a message says what was wrong.
//!
//! The guests are tiny bzImages: a byte tells whether the kernel inside ran ("U", for unpacked), or the file's own entry
//! point. They run on the machine's own `/dev/kvm`.

use std::collections::BTreeSet;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use halyard_tests::tiny::bzimage::{PAYLOAD, SLOW, bzimage};
use halyard_tests::tiny::{Run, binary, debug_exit, kvm, run_command, run_halyard};
use tempfile::TempDir;

/// What the log says where the guest has to unpack its kernel.
const UNPACKS_ITSELF: &str = "the kernel unpacks itself, which takes longer: ";

struct Bench(TempDir);

impl Bench {
    /// `None`, with the reason printed, where this machine has no KVM to run guests on.
    fn new() -> Option<Self> {
        let bench = kvm().then(|| Self(TempDir::new().unwrap()))?;
        fs::write(bench.path("vmlinuz"), bzimage(b'U')).unwrap();
        fs::create_dir(bench.cache()).unwrap();
        fs::set_permissions(bench.cache(), Permissions::from_mode(0o700)).unwrap();
        Some(bench)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn cache(&self) -> PathBuf {
        self.path("cache")
    }

    fn arguments(&self, cache: &Path) -> Vec<String> {
        let words = ["run", "--memory", "64M", "--serial", "stdio", "--debug-exit", "--kernel"].map(String::from);
        let paths = [self.path("vmlinuz").display().to_string(), "--kernel-cache".into(), cache.display().to_string()];
        words.into_iter().chain(paths).collect()
    }

    /// Runs the guest with this cache; its kernel must have been unpacked.
    #[track_caller]
    fn run_with(&self, cache: &Path) -> Run {
        unpacked(run_halyard(self.arguments(cache)))
    }

    #[track_caller]
    fn run(&self) -> Run {
        self.run_with(&self.cache())
    }

    /// What is in the cache, without links from kernel files.
    fn names(&self) -> BTreeSet<String> {
        let entries =
            fs::read_dir(self.cache()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        entries.filter(|name| !name.starts_with("file-")).collect()
    }

    /// The one kernel that is kept.
    #[track_caller]
    fn entry(&self) -> PathBuf {
        let names = self.names();
        assert_eq!(names.len(), 1, "{names:?}");
        self.cache().join(names.first().unwrap())
    }

    /// Runs a command as root in a mount namespace of its own, where `$cache` is the cache and `$run` runs the guest.
    /// `None`, with the reason printed, where that is not allowed.
    fn run_as_root(&self, script: &str) -> Option<Run> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: only root can mount file systems and give files to others");
            return None;
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-ec", script]).env("cache", self.cache());
        command.env("run", format!("{} {}", binary().display(), self.arguments(&self.cache()).join(" ")));
        Some(run_command(command))
    }
}

#[track_caller]
fn unpacked(run: Run) -> Run {
    assert_eq!(run.output(), "U", "{run}");
    assert!(!run.stderr.contains(UNPACKS_ITSELF), "{run}");
    run.expect_code(debug_exit(0))
}

#[track_caller]
fn without_warning(run: Run) -> Run {
    assert!(!run.stderr.contains("WARN") && !run.stderr.contains("ERROR"), "{run}");
    run
}

macro_rules! bench {
    () => {
        match Bench::new() {
            Some(bench) => bench,
            None => return,
        }
    };
}

#[test]
fn a_kernel_is_kept_and_taken_again() {
    let bench = bench!();
    without_warning(bench.run());
    let kept = fs::read(bench.entry()).unwrap();
    without_warning(bench.run());
    assert!(fs::read(bench.entry()).unwrap() == kept);
    // Another kernel in a file of the same name is another one.
    fs::write(bench.path("vmlinuz"), bzimage(b'V')).unwrap();
    let run = without_warning(run_halyard(bench.arguments(&bench.cache()))).expect_code(debug_exit(0));
    assert_eq!(run.output(), "V", "{run}");
    assert_eq!(bench.names().len(), 2);
}

#[test]
fn a_directory_that_cannot_be_trusted_is_not_used() {
    let bench = bench!();
    let (cache, link, file) = (bench.cache(), bench.path("link"), bench.path("file"));
    let name = cache.display().to_string();
    for mode in [0o777, 0o1777, 0o770] {
        fs::set_permissions(&cache, Permissions::from_mode(mode)).unwrap();
        bench.run().expect_messages(&[
            "WARN",
            "kernels are not kept in",
            &name,
            "others may write to it",
            "chmod go-w",
        ]);
        assert!(bench.names().is_empty(), "{:?}", bench.names());
    }
    fs::set_permissions(&cache, Permissions::from_mode(0o700)).unwrap();
    symlink(&cache, &link).unwrap();
    fs::write(&file, b"").unwrap();
    for path in [&link, &file] {
        let name = path.display().to_string();
        bench.run_with(path).expect_messages(&[
            "kernels are not kept in",
            &name,
            "it is no directory, or a link to one",
        ]);
        assert!(bench.names().is_empty(), "{:?}", bench.names());
    }
    let missing = file.join("cache");
    bench.run_with(&missing).expect_messages(&["kernels are not kept in", &missing.display().to_string()]);
}

#[test]
fn a_directory_of_somebody_else_is_not_used() {
    let bench = bench!();
    without_warning(bench.run());
    let Some(run) = bench.run_as_root("chown 4711 $cache; exec $run") else { return };
    unpacked(run).expect_messages(&[
        "WARN",
        "kernels are not kept in",
        "it belongs to user 4711",
        "this user's or root's",
    ]);
    // A kernel that somebody else has put there is neither run nor left.
    let entry = bench.entry();
    bench.run_as_root("chown 0 $cache; chown 4711 $cache/kernel-*").unwrap().expect_code(0);
    bench.run().expect_messages(&["WARN", "the kept kernel", "is not used: it belongs to user 4711"]);
    assert_eq!(bench.entry(), entry);
    without_warning(bench.run());
}

#[test]
fn a_full_disk_keeps_nothing_and_has_nothing_left_behind() {
    let bench = bench!();
    let script = "mount -t tmpfs -o size=64k,mode=700 none $cache; $run; code=$?; ls -A $cache; exit $code";
    let script = script.replace("$run; code=$?", "code=0; $run || code=$?");
    let Some(run) = bench.run_as_root(&script) else { return };
    unpacked(run).expect_messages(&["WARN", "the unpacked kernel is not kept in", "No space left on device"]);
}

#[test]
fn a_read_only_cache_is_read() {
    let bench = bench!();
    let script = "mount -t tmpfs -o size=4M,mode=700 none $cache; if [ -e $cache.kernels ]; then \
                  cp -a $cache.kernels/. $cache; fi; mount -o remount,ro $cache; exec $run";
    let Some(run) = bench.run_as_root(script) else { return };
    unpacked(run).expect_messages(&["WARN", "the unpacked kernel is not kept in", "Read-only file system"]);
    bench.run();
    fs::rename(bench.cache(), bench.path("cache.kernels")).unwrap();
    fs::create_dir(bench.cache()).unwrap();
    without_warning(unpacked(bench.run_as_root(script).unwrap()));
}

#[test]
fn a_kept_kernel_that_is_damaged_or_none_is_replaced() {
    let bench = bench!();
    bench.run();
    let (entry, sound) = (bench.entry(), fs::read(bench.entry()).unwrap());
    let change = |at: usize| {
        let file = File::options().write(true).open(&entry).unwrap();
        file.write_all_at(&[sound[at] ^ 1], at as u64).unwrap();
    };
    let spoil: [(&str, &dyn Fn()); 9] = [
        ("its first instruction", &|| change(4096)),
        ("its end", &|| change((600 << 10) + 4000)),
        ("the table of checksums", &|| change(sound.len() - 40)),
        ("truncated", &|| File::options().write(true).open(&entry).unwrap().set_len(sound.len() as u64 / 2).unwrap()),
        ("empty", &|| fs::write(&entry, b"").unwrap()),
        ("another's to write to", &|| fs::set_permissions(&entry, Permissions::from_mode(0o666)).unwrap()),
        ("a link", &|| {
            fs::rename(&entry, bench.path("elsewhere")).unwrap();
            symlink(bench.path("elsewhere"), &entry).unwrap();
        }),
        ("a pipe", &|| {
            fs::remove_file(&entry).unwrap();
            nix::unistd::mkfifo(&entry, nix::sys::stat::Mode::S_IRWXU).unwrap();
        }),
        ("a bzImage", &|| fs::write(&entry, bzimage(b'X')).unwrap()),
    ];
    for (what, spoil) in spoil {
        spoil();
        let run = bench.run();
        assert!(run.stderr.contains("WARN") && run.stderr.contains("kept kernel"), "{what}: {run}");
        assert!(fs::symlink_metadata(&entry).unwrap().is_file(), "{what}");
        assert!(fs::read(&entry).unwrap() == sound, "{what}: it was not replaced");
        without_warning(bench.run());
    }
}

#[test]
fn a_directory_in_the_place_of_a_kept_kernel_costs_no_boot() {
    let bench = bench!();
    bench.run();
    let entry = bench.entry();
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    let run =
        bench.run().expect_messages(&["is not used: it is no regular file", "the unpacked kernel is not kept in"]);
    assert_eq!(bench.names().len(), 1, "something was left behind\n{run}");
}

#[test]
fn monitors_that_share_a_cache_at_once_keep_one_kernel() {
    let bench = bench!();
    for round in 0..3 {
        let runs: Vec<Run> = std::thread::scope(|scope| {
            let started: Vec<_> = (0..8).map(|_| scope.spawn(|| bench.run())).collect();
            started.into_iter().map(|run| run.join().unwrap()).collect()
        });
        runs.into_iter().for_each(|run| drop(without_warning(run)));
        bench.entry();
        // The next round finds a damaged one.
        let last = fs::metadata(bench.entry()).unwrap().len();
        File::options().write(true).open(bench.entry()).unwrap().set_len(last - 8 * round - 8).unwrap();
        let sound = bench.run().expect_messages(&["WARN", "is not used: it is damaged"]);
        fs::remove_file(bench.entry()).unwrap_or_else(|error| panic!("{error}\n{sound}"));
    }
}

#[test]
fn a_payload_that_is_refused_leaves_the_kernel_to_unpack_itself() {
    let bench = bench!();
    let sound = bzimage(b'U');
    let word = |at: usize| u32::from_le_bytes(sound[at..at + 4].try_into().unwrap());
    let (size, len) = (sound.len(), word(0x24c));
    let changed = |at: usize, value: u32| {
        let mut image = sound.clone();
        image[at..at + 4].copy_from_slice(&value.to_le_bytes());
        image
    };
    let cases: [(Vec<u8>, &str); 10] = [
        (changed(PAYLOAD, 0x4453_5a2e), "which is neither zstd, lz4, gzip nor xz"),
        (changed(PAYLOAD + 4, u32::MAX), "(lz4): a block is longer than the payload"),
        (changed(PAYLOAD + 2000, 0), "cannot be unpacked (lz4)"),
        (changed(size - 4, 601 << 10), "cannot be unpacked (lz4)"),
        (changed(size - 4, u32::MAX), "room for 4194304 bytes, and its payload says that it unpacks to 4294967295"),
        (changed(0x248, u32::MAX - 1023), "a payload from 0x"),
        (changed(0x24c, len + 1), "of 0x"),
        (changed(0x24c, 0), "its setup header gives no payload"),
        (changed(0x230, 0x1000), "an alignment of 0x1000: a power of two from 2 MiB up"),
        (changed(0x258, 0x120_0000), "0x1200000 as its address, and the kernel inside is linked for 0x1000000"),
    ];
    for (image, reason) in cases {
        fs::write(bench.path("vmlinuz"), image).unwrap();
        // The second time from what may have been kept.
        for _ in 0..2 {
            let run = run_halyard(bench.arguments(&bench.cache()));
            assert_eq!(run.output(), SLOW, "{reason}: {run}");
            let lines: Vec<&str> = run.stderr.lines().filter(|line| line.contains(UNPACKS_ITSELF)).collect();
            assert!(lines.len() == 1 && lines[0].contains(reason), "{reason}: {run}");
            without_warning(run).expect_code(debug_exit(1));
        }
    }
}
