//! Bad input, through the program: what is wrong is said by name, all at once, with what would be right, and the exit
//! code is 2. Where the host is what is wrong, it is 1.
//!
//! None of these guests ever runs. Files that a user may not use are tried as another user where the tests run as root,
//! since root may use all files.

use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use halyard_tests::tiny::{Run, Tiny, binary, guest, run_command, run_halyard};
use tempfile::TempDir;

/// Exit codes of `halyard`.
const BAD_INPUT: i32 = 2;
const HOST_FAILED: i32 = 1;

/// A directory with files for a test, which other users can look into.
struct Files(TempDir);

impl Files {
    fn new() -> Self {
        let directory = TempDir::new().unwrap();
        fs::set_permissions(directory.path(), Permissions::from_mode(0o755)).unwrap();
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes a file.
    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// Makes a file of zeros.
    fn zeros(&self, name: &str, length: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(length).unwrap();
        path
    }
}

/// Runs Halyard on a good kernel with these arguments, which are bad.
#[track_caller]
fn refused<A: Into<OsString>>(args: impl IntoIterator<Item = A>) -> Run {
    let kernel = guest("first-byte");
    let run: [OsString; 3] = ["run".into(), "--kernel".into(), kernel.into()];
    run_halyard(run.into_iter().chain(args.into_iter().map(Into::into))).expect_code(BAD_INPUT)
}

/// Runs Halyard on a bad kernel. The message must name the flag, the file and each of `texts`.
#[track_caller]
fn bad_kernel(kernel: &Path, texts: &[&str]) {
    let name = kernel.display().to_string();
    let run =
        run_halyard(["run".as_ref(), "--kernel".as_ref(), kernel.as_os_str(), "--memory".as_ref(), "64M".as_ref()]);
    run.expect_code(BAD_INPUT).expect_messages(&["--kernel", &name]).expect_messages(texts);
}

/// Runs Halyard on a configuration file. The message must name the file and each of `texts`.
#[track_caller]
fn bad_config(files: &Files, text: &str, texts: &[&str]) -> Run {
    let config = files.file("vm.yaml", text.as_bytes());
    let run = run_halyard(["run".as_ref(), "--config".as_ref(), config.as_os_str()]).expect_code(BAD_INPUT);
    run.expect_messages(&["vm.yaml"]).expect_messages(texts)
}

/// A loadable part of an ELF file: its address and its length in memory.
struct Segment(u64, u64);

/// An ELF file for a machine, whose code begins with the first segment. The segments share a page of zeros.
fn elf(machine: u16, segments: &[Segment]) -> Vec<u8> {
    const HEADER: u16 = 64;
    const PROGRAM_HEADER: u16 = 56;
    let count = u16::try_from(segments.len()).unwrap();
    let data = u64::from(HEADER + PROGRAM_HEADER * count);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    file.extend(2_u16.to_le_bytes()); // ET_EXEC
    file.extend(machine.to_le_bytes());
    file.extend(1_u32.to_le_bytes());
    let (entry, program_headers, section_headers) = (segments[0].0, u64::from(HEADER), 0);
    file.extend([entry, program_headers, section_headers].into_iter().flat_map(u64::to_le_bytes));
    file.extend(0_u32.to_le_bytes());
    file.extend([HEADER, PROGRAM_HEADER, count, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    for Segment(address, length) in segments {
        file.extend([1_u32, 7].into_iter().flat_map(u32::to_le_bytes)); // PT_LOAD, all rights
        let (in_file, alignment) = ((*length).min(0x1000), 0x1000);
        file.extend([data, *address, *address, in_file, *length, alignment].into_iter().flat_map(u64::to_le_bytes));
    }
    file.extend([0; 0x1000]);
    file
}

const X86_64: u16 = 62;
const AARCH64: u16 = 183;

#[test]
fn kernel_that_is_missing() {
    bad_kernel(Path::new("/nonexistent/vmlinuz"), &["does not exist"]);
}

#[test]
fn kernel_that_is_empty() {
    let files = Files::new();
    bad_kernel(&files.file("vmlinuz", b""), &["the file is empty", "bzImage"]);
}

#[test]
fn kernel_that_is_a_directory() {
    let files = Files::new();
    bad_kernel(files.0.path(), &["is a directory"]);
}

#[test]
fn kernel_that_is_no_file() {
    bad_kernel(Path::new("/dev/null"), &["is not a regular file"]);
}

#[test]
fn kernel_of_random_bytes() {
    let files = Files::new();
    // Always the same, and like no format: a failure can be repeated.
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    let bytes: Vec<u8> = std::iter::repeat_with(&mut next).take(100_000).collect();
    bad_kernel(&files.file("vmlinuz", &bytes), &["neither a bzImage nor an ELF executable"]);
}

#[test]
fn kernel_that_is_truncated() {
    let files = Files::new();
    let whole = fs::read(guest("first-byte")).unwrap();
    // Within the ELF header, within the program headers, within a segment.
    for length in [40, 100, 4100] {
        bad_kernel(&files.file("vmlinux", &whole[..length]), &["the file is truncated"]);
    }
    bad_kernel(&files.file("vmlinuz", &bzimage_head()), &["truncated"]);
}

/// The first KiB of a bzImage (Documentation/arch/x86/boot.rst): its setup header, and nothing of the kernel.
fn bzimage_head() -> Vec<u8> {
    let mut image = vec![0; 0x400];
    let fields: [(usize, &[u8]); 8] = [
        (0x1f1, &[4]),                         // setup_sects
        (0x1f4, &0x10_0000_u32.to_le_bytes()), // syssize
        (0x1fe, &[0x55, 0xaa]),                // boot_flag
        (0x200, &[0xeb, 0x66]),                // jump, which tells the header's length
        (0x202, b"HdrS"),
        (0x206, &0x20f_u16.to_le_bytes()), // version
        (0x211, &[1]),                     // loadflags: LOADED_HIGH
        (0x236, &[1]),                     // xloadflags: XLF_KERNEL_64
    ];
    for (at, bytes) in fields {
        image[at..at + bytes.len()].copy_from_slice(bytes);
    }
    image
}

#[test]
fn kernel_for_another_machine() {
    let files = Files::new();
    let path = files.file("vmlinux", &elf(AARCH64, &[Segment(0x10_0000, 0x1000)]));
    bad_kernel(&path, &["the ELF file", "must be", "x86-64"]);
}

#[test]
fn kernel_whose_segments_overlap() {
    let files = Files::new();
    let path = files.file("vmlinux", &elf(X86_64, &[Segment(0x10_0000, 0x2000), Segment(0x10_1000, 0x2000)]));
    bad_kernel(&path, &["ELF segments 0 and 1 overlap at 0x101000"]);
}

#[test]
fn kernel_with_a_segment_outside_memory() {
    let files = Files::new();
    // Behind RAM, where the message says how much would do; among the boot data; beyond all addresses.
    let behind = files.file("behind", &elf(X86_64, &[Segment(0x10_0000, 0x1000), Segment(0x800_0000, 0x1000)]));
    bad_kernel(&behind, &["give the guest at least 129 MiB"]);
    let boot_data = files.file("boot-data", &elf(X86_64, &[Segment(0x10_0000, 0x1000), Segment(0x7000, 0x1000)]));
    bad_kernel(&boot_data, &["ELF segment 1", "0x7000"]);
    let wraps = files.file("wraps", &elf(X86_64, &[Segment(0x10_0000, 0x1000), Segment(u64::MAX - 0xfff, 0x2000)]));
    bad_kernel(&wraps, &["ELF segment 1"]);
}

#[test]
fn initramfs_that_does_not_fit() {
    let files = Files::new();
    let initramfs = files.zeros("initramfs", 100 << 20);
    let name = initramfs.display().to_string();
    let run = refused(["--memory", "64M", "--initramfs", &name]);
    run.expect_messages(&["--initramfs", &name, "104857600 bytes do not fit", "give the guest more memory"]);
}

#[test]
fn initramfs_that_is_missing_or_empty_or_a_directory() {
    let files = Files::new();
    refused(["--initramfs", "/nonexistent/initrd"]).expect_messages(&[
        "--initramfs",
        "/nonexistent/initrd",
        "does not exist",
    ]);
    let empty = files.file("empty", b"");
    refused(["--initramfs".as_ref(), empty.as_os_str()]).expect_messages(&["--initramfs", "the file is empty"]);
    refused(["--initramfs".as_ref(), files.0.path().as_os_str()]).expect_messages(&["--initramfs", "is a directory"]);
}

#[test]
fn vcpus_of_0_and_300() {
    refused(["--cpus", "0"]).expect_messages(&["--cpus 0", "a VM without vCPUs cannot run", "1 to 254"]);
    refused(["--cpus", "300"]).expect_messages(&["--cpus 300", "300 vCPUs are too many", "1 to 254"]);
}

#[test]
fn memory_of_0_or_of_no_whole_pages_or_of_more_than_there_are_addresses() {
    refused(["--memory", "0"]).expect_messages(&["--memory 0", "a VM without memory cannot run", "at least 2M"]);
    refused(["--memory", "67108865"]).expect_messages(&["--memory 67108865", "not a multiple", "64M would be one"]);
    refused(["--memory", "16000T"]).expect_messages(&["--memory 16000T", "do not fit", "address space", "at most"]);
}

#[test]
fn config_with_unknown_and_repeated_fields() {
    let files = Files::new();
    let text =
        "kernel:\n  path: /boot/vmlinuz\n  pathh: twice\ncpu: 2\nmemory: { size: 64M }\nmemory: { size: 128M }\n";
    bad_config(&files, text, &["vm.yaml:3:3", "pathh", "vm.yaml:4:1", "cpu", "cpus", "vm.yaml:6:1", "memory"]);
}

#[test]
fn config_that_is_none() {
    let files = Files::new();
    bad_config(&files, "", &["the configuration is empty"]);
    bad_config(&files, "kernel: [", &[]);
    bad_config(&files, "cpus: { count: many }\n", &["cpus.count", "kernel"]);
    run_halyard(["run", "--config", "/nonexistent/vm.yaml"])
        .expect_code(BAD_INPUT)
        .expect_messages(&["/nonexistent/vm.yaml", "there is no such file"]);
}

#[test]
fn disk_that_is_missing_or_a_directory() {
    let files = Files::new();
    refused(["--disk", "/nonexistent/disk"]).expect_messages(&["--disk /nonexistent/disk", "No such file"]);
    refused(["--disk".as_ref(), files.0.path().as_os_str()]).expect_messages(&["--disk", "a directory"]);
}

#[test]
fn disk_that_is_empty_or_ends_within_a_sector() {
    let files = Files::new();
    let empty = files.zeros("empty", 0);
    refused(["--disk".as_ref(), empty.as_os_str()]).expect_messages(&["--disk", "empty"]);
    let odd = files.zeros("odd", 1000);
    refused(["--disk".as_ref(), odd.as_os_str()]).expect_messages(&["--disk", "1000 bytes", "multiple of 512", "1024"]);
}

#[test]
fn disk_that_may_not_be_written() {
    let files = Files::new();
    let disk = files.zeros("disk", 1 << 20);
    fs::set_permissions(&disk, Permissions::from_mode(0o444)).unwrap();
    let kernel = files.file("kernel", &fs::read(guest("first-byte")).unwrap());
    let args =
        ["run".into(), "--kernel".into(), kernel.into_os_string(), "--disk".into(), disk.clone().into_os_string()];
    let run = run_command(as_another_user(&files, &args)).expect_code(BAD_INPUT);
    run.expect_messages(&["--disk", &disk.display().to_string(), "Permission denied", "readonly"]);
}

#[test]
fn disk_that_another_vm_has_locked() {
    let files = Files::new();
    let disk = files.zeros("disk", 1 << 20);
    let Some(first) = Tiny::new("commands") else { return };
    let mut first = first.args(["--memory".as_ref(), "64M".as_ref(), "--disk".as_ref(), disk.as_os_str()]).start();
    first.wait_for("ready\n");
    let run = refused(["--disk".as_ref(), disk.as_os_str()]);
    run.expect_messages(&["--disk", &disk.display().to_string(), "locked by another VM", "readonly"]);
    let mut readonly = disk.clone().into_os_string();
    readonly.push(",readonly");
    refused(["--disk".into(), readonly]).expect_messages(&["locked by another VM"]);
    // The lock goes with the VM.
    first.send(b"q");
    first.finish().expect_code(64 + 7);
    let again = Tiny::new("first-byte").unwrap().args(["--disk".as_ref(), disk.as_os_str()]).run();
    again.expect_code(64);
}

#[test]
fn function_of_the_host_that_cannot_be_had() {
    refused(["--vfio", "ffff:ff:1f.7"]).expect_messages(&[
        "--vfio ffff:ff:1f.7",
        "the host has no PCI function",
        "lspci -D",
    ]);
    // Nothing is looked for by what is no address, and it is said once.
    let told = refused(["--vfio", "/etc"]).expect_messages(&["--vfio /etc", "as in 0000:01:00.0"]);
    assert_eq!(told.stderr.lines().count(), 1, "{}", told.stderr);
    // Descriptors that are something else.
    let line = "exec \"$0\" run --kernel \"$1\" --vfio fd=8,iommu_fd=9 8<>/dev/null 9<>/dev/null";
    let mut command = Command::new("bash");
    command.arg("-c").arg(line).arg(binary()).arg(guest("first-byte"));
    run_command(command).expect_code(BAD_INPUT).expect_messages(&["iommu_fd: it is no open /dev/iommu"]);
    let Ok(mut functions) = fs::read_dir("/sys/bus/pci/devices") else { return };
    let Some(function) = functions.next().and_then(Result::ok) else { return };
    // It is the host's own, behind an IOMMU or not.
    let (name, path) = (function.file_name().into_string().unwrap(), function.path());
    let run = refused(["--vfio", &name]);
    match path.join("iommu_group").exists() {
        true => run.expect_messages(&[&format!("--vfio {name}"), "vfio-pci"]),
        false => run.expect_messages(&[&format!("--vfio {name}"), "behind no IOMMU", "intel_iommu=on"]),
    };
}

#[test]
fn tap_that_does_not_exist() {
    let run = refused(["--net", "tap=nosuchtap0"]);
    run.expect_messages(&["--net tap=nosuchtap0", "there is no such network interface", "ip tuntap add"]);
}

#[test]
fn tap_without_permission() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make a tap that belongs to someone else");
        return;
    }
    let files = Files::new();
    let kernel = files.file("kernel", &fs::read(guest("first-byte")).unwrap());
    // In a network of its own, root's tap; and everybody may open the device, so that the tap itself is what is refused.
    let script = format!(
        "mount -t tmpfs -o mode=755 none /dev && mkdir /dev/net && mknod -m 666 /dev/net/tun c 10 200 && \
         ip tuntap add dev tap7 mode tap user 0 && \
         exec setpriv --reuid 65534 --regid 65534 --clear-groups {} run --kernel {} --net tap7",
        program_for_all(&files).display(),
        kernel.display()
    );
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net", "sh", "-c", &script]);
    let run = run_command(command).expect_code(BAD_INPUT);
    run.expect_messages(&["--net tap7", "no permission to use it", "CAP_NET_ADMIN"]);
}

#[test]
fn devices_with_one_name() {
    let files = Files::new();
    let disks = ["one", "two"].map(|name| format!("path={},id=data", files.zeros(name, 1 << 20).display()));
    let run = refused(["--disk", &disks[0], "--disk", &disks[1]]);
    run.expect_messages(&["--disk", "«data» is taken by devices[0].id already", "a device's id must be its own"]);
}

#[test]
fn one_disk_or_tap_given_twice() {
    let files = Files::new();
    let disk = files.zeros("disk", 1 << 20).display().to_string();
    refused(["--disk", &disk, "--disk", &disk]).expect_messages(&["is the disk of devices[0] already", "`readonly`"]);
    refused(["--net", "tap0", "--net", "tap0"]).expect_messages(&["«tap0» is taken by devices[0].tap already"]);
}

#[test]
fn all_problems_are_told_at_once() {
    let files = Files::new();
    let text = "kernel: { path: /nonexistent/vmlinuz, initramfs: /nonexistent/initrd }\n\
                cpus: { count: 300 }\n\
                memory: { size: 0 }\n\
                devices:\n\
                - { type: disk, path: /nonexistent/disk, id: same }\n\
                - { type: rng, id: same }\n\
                - { type: net }\n";
    let run = bad_config(
        &files,
        text,
        &[
            "/nonexistent/vmlinuz does not exist",
            "/nonexistent/initrd does not exist",
            "300 vCPUs",
            "without memory",
            "/nonexistent/disk",
            "«same» is taken",
            "give `tap` or `fd`",
        ],
    );
    assert!(run.stderr.lines().all(|line| line.contains("vm.yaml:")), "each line names its place\n{run}");
}

#[test]
fn flags_have_all_their_problems_told_at_once() {
    let run = refused([
        "--cpus",
        "many",
        "--memory",
        "lots",
        "--disk",
        "path=/nonexistent/disk,colour=red",
        "--on-reset",
        "stay",
    ]);
    run.expect_messages(&["--cpus many", "--memory lots", "colour", "--on-reset stay"]);
    run_halyard(["run", "--kernel", "vmlinuz", "--no-such-flag"])
        .expect_code(BAD_INPUT)
        .expect_messages(&["--no-such-flag"]);
}

#[test]
fn no_kvm_on_this_host() {
    let files = Files::new();
    // In a mount namespace of its own, where /dev is empty.
    let run = run_with_dev(&files, "true", "", "");
    run.expect_code(HOST_FAILED).expect_messages(&["/dev/kvm does not exist", "load the module"]);
}

#[test]
fn no_permission_on_kvm() {
    let files = Files::new();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: only root can make a device that others may not open");
        return;
    }
    let run = run_with_dev(
        &files,
        "mknod -m 600 /dev/kvm c 10 232",
        "setpriv --reuid 65534 --regid 65534 --clear-groups",
        "",
    );
    run.expect_code(HOST_FAILED).expect_messages(&["no permission to open /dev/kvm", "usermod -aG kvm"]);
}

#[test]
fn bad_input_is_told_where_there_is_no_kvm() {
    let files = Files::new();
    let run = run_with_dev(&files, "true", "", "--cpus 300").expect_code(BAD_INPUT);
    run.expect_messages(&["--cpus 300"]);
}

/// Runs Halyard on a good kernel, with more arguments, where /dev is empty but for what the command `prepare` puts
/// there. `prefix` is a command that runs it.
fn run_with_dev(files: &Files, prepare: &str, prefix: &str, args: &str) -> Run {
    let kernel = files.file("kernel", &fs::read(guest("first-byte")).unwrap());
    let program = program_for_all(files);
    let script = format!(
        "mount -t tmpfs -o mode=755 none /dev && {prepare} && exec {prefix} {} run --kernel {} {args}",
        program.display(),
        kernel.display()
    );
    let mut command = Command::new("unshare");
    if !nix::unistd::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    command.args(["--mount", "sh", "-c", &script]);
    run_command(command)
}

/// Halyard as a user who may not do what root may, also where the test runs as root.
fn as_another_user(files: &Files, args: &[OsString]) -> Command {
    let program = program_for_all(files);
    let mut command = if nix::unistd::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    command.args(args);
    command
}

/// A copy of the program where every user can run it: the workspace may lie in a closed directory.
fn program_for_all(files: &Files) -> PathBuf {
    let copy = files.path("halyard");
    // By another process: a program cannot be run while it is open for writing, which a copy made here would be in
    // every child that another test starts at that moment.
    let status = Command::new("install").args(["-m", "755"]).arg(binary()).arg(&copy).status().unwrap();
    assert!(status.success(), "install: {status}");
    copy
}
