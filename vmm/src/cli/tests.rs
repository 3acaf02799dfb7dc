//! From command lines to configurations, messages and help pages.

use std::fs;

use api::{HostFacts, HostReport, KindName, KindReport, Problem, VmConfig, parse, validate};
use clap::error::ErrorKind;

use super::args::{Action, Cli, RunArgs, command};
use super::probe;
use super::run::Source;

fn args(line: &[&str]) -> RunArgs {
    let words = ["halyard", "run"].iter().chain(line);
    match Cli::read(words.copied()).unwrap().action {
        Action::Run(args, _) => *args,
        other => panic!("not run: {other:?}"),
    }
}

/// The configuration of a command line without problems.
fn config(line: &[&str]) -> VmConfig {
    let args = args(line);
    Source::read(&args).config(|_| Vec::new()).unwrap()
}

/// The problems of a command line, as they are told.
fn problems(line: &[&str]) -> Vec<String> {
    let args = args(line);
    let source = Source::read(&args);
    let check = |config: &VmConfig| validate(config, &HostFacts::unlimited());
    let problems = source.config(check).map_or_else(|problems| problems, |config| check(&config));
    source.told(&mut problems.clone())
}

fn from_yaml(text: &str) -> VmConfig {
    let mut config = parse(text).unwrap();
    config.fill_defaults();
    config
}

#[test]
fn the_command_line_is_well_formed() {
    command().debug_assert();
}

/// Flags, and a file that says the same.
const SAME: [(&[&str], &str); 14] = [
    (&["--kernel", "k"], "kernel: {path: k}"),
    (
        &["--kernel=k", "--initramfs", "i", "--cmdline", "-q console=hvc0"],
        "kernel: {path: k, initramfs: i, cmdline: -q console=hvc0}",
    ),
    (
        &["--kernel", "k", "--cpus", "4,max=8,sockets=2,cores=2,threads=2"],
        "kernel: {path: k}\ncpus: {count: 4, max: 8, topology: {sockets: 2, cores: 2, threads: 2}}",
    ),
    (
        &["--kernel", "k", "--memory", "2GiB,hugepages=2M,transparent-huge-pages=off,prefault,shared=on"],
        "kernel: {path: k}\nmemory: {size: 2G, hugepages: 2M, transparent_huge_pages: false, prefault: true, \
         shared: true}",
    ),
    (
        &["--kernel", "k", "--memory", "1G,max=4G,resize-timeout=90s"],
        "kernel: {path: k}\nmemory: {size: 1G, max: 4G, resize_timeout: 90s}",
    ),
    (
        &["--kernel", "k", "--disk", "a,,b.img,readonly,id=root", "--disk", "direct=on,serial=S1,queues=2,path=c"],
        "kernel: {path: k}\ndevices: [{type: disk, path: 'a,b.img', readonly: true, id: root}, {type: disk, path: \
         c, direct: true, serial: S1, queues: 2}]",
    ),
    (
        &["--kernel", "k", "--net", "tap0,mac=52:54:00:12:34:56,mtu=9000", "--net", "fd=7,mac=52:54:00:12:34:57"],
        "kernel: {path: k}\ndevices: [{type: net, tap: tap0, mac: 52:54:00:12:34:56, mtu: 9000}, {type: net, fd: 7, \
         mac: 52:54:00:12:34:57}]",
    ),
    (
        &[
            "--kernel",
            "k",
            "--serial",
            "file=a,,b=c.log",
            "--console",
            "stdio",
            "--console",
            "socket=s,name=agent,id=a",
        ],
        "kernel: {path: k}\nserial: {type: file, path: 'a,b=c.log'}\ndevices: [{type: console, endpoint: {type: \
         stdio}}, {type: console, id: a, name: agent, endpoint: {type: socket, path: s}}]",
    ),
    (
        &["--kernel", "k", "--rng", "--serial", "off", "--console", "pty"],
        "kernel: {path: k}\nserial: {type: off}\ndevices: [{type: console, endpoint: {type: pty}}, {type: rng}]",
    ),
    (
        &["--kernel", "k", "--vfio", "fd=5,iommu_fd=6", "--vfio", "0000:01:00.1,id=b"],
        "kernel: {path: k}\ndevices: [{type: vfio, fd: 5, iommu_fd: 6}, {type: vfio, host: '0000:01:00.1', id: b}]",
    ),
    (
        &["--kernel", "k", "--confidential", "tdx,quote_service=vsock:2:4050,sept_ve_disable=off"],
        "kernel: {path: k}\nconfidential: {kind: tdx, quote_service: 'vsock:2:4050', sept_ve_disable: false}",
    ),
    (
        &["--kernel", "k", "--rng=id=r", "--confidential", "software-protected", "--debug-exit"],
        "kernel: {path: k}\nconfidential: {kind: software-protected}\nplatform: {debug_exit: true}\ndevices: [{type: rng, \
         id: r}]",
    ),
    (
        &["--kernel", "k", "--on-reset", "exit", "--on-panic", "ignore", "--pvpanic", "off"],
        "kernel: {path: k}\nlifecycle: {on_reset: exit, on_panic: ignore}\nplatform: {pvpanic: false}",
    ),
    (
        &["--kernel", "k", "--boot-timeout", "90s,until=told", "--system-map", "m"],
        "kernel: {path: k, system_map: m}\nlifecycle: {boot_timeout: 90s, boot_until: told}",
    ),
];

#[test]
fn flags_mean_what_the_file_says() {
    for (line, yaml) in SAME {
        assert_eq!(config(line), from_yaml(yaml), "{line:?}");
    }
}

#[test]
fn a_disk_has_a_size_and_a_card_a_link() {
    let line = ["--kernel", "k", "--disk", "d,size=1M", "--net", "fd=7,mac=52:54:00:12:34:57,link=down"];
    let yaml = "kernel: {path: k}\ndevices: [{type: disk, path: d, size: 1M}, {type: net, fd: 7, mac: 52:54:00:12:34:57, \
                link: down}]";
    assert_eq!(config(&line), from_yaml(yaml));
}

#[test]
fn flags_change_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm.yaml");
    fs::write(&path, "kernel: {path: k, cmdline: quiet}\ncpus: {count: 2}\ndevices: [{type: rng}]\n").unwrap();
    let path = path.to_str().unwrap();
    let yaml = "kernel: {path: k, cmdline: quiet}\ncpus: {count: 4}\ndevices: [{type: rng}, {type: disk, path: d}]";
    assert_eq!(config(&["--config", path, "--cpus", "4", "--disk", "d"]), from_yaml(yaml));

    fs::write(path, "kernel: {path: k}\ncpus: {count: 0}\nmemory: {size: 3}\n").unwrap();
    let told = problems(&["--config", path, "--memory", "1", "--net", "a/b"]);
    let told: Vec<String> = told.iter().map(|line| line.replace(path, "vm.yaml")).collect();
    assert_eq!(
        told,
        [
            "vm.yaml:2:8: cpus.count: a VM without vCPUs cannot run; 1 to 254 are possible",
            "--memory 1: size: 1 bytes are too little; at least 2M are needed; write 512M for 512 MiB",
            "--memory 1: size: 1 is not a multiple of the 4K that pages have; 2M would be one",
            "--net a/b: tap: «a/b» cannot be an interface's name; leave out `/`, `:`, `%`, blanks and control characters",
        ]
    );

    fs::write(path, "kernel: {path: k, x: 1}\n").unwrap();
    let told = problems(&["--config", path, "--memory", "1X"]);
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(
        told[0].contains(":1:19: kernel.x: «x» is no field here") && told[1].starts_with("--memory 1X: "),
        "{told:?}"
    );

    let told = problems(&["--config", "/nonexistent/vm.yaml", "--cpus", "two"]);
    assert_eq!(
        told,
        [
            "/nonexistent/vm.yaml: there is no such file; name a configuration in YAML or JSON",
            "--cpus two: count: «two» is not possible; write a whole number",
        ]
    );
}

/// Command lines with the problems that they have.
const WITH_PROBLEMS: [(&[&str], &[&str]); 19] = [
    (
        &[],
        &[
            "--kernel: no kernel is named; give --kernel FILE, --config FILE with a kernel in it, or --firmware FILE, which finds one on a disk",
        ],
    ),
    (
        &["--kernel", ""],
        &[
            "--kernel : no kernel is named; name a bzImage (vmlinuz) or an ELF kernel (vmlinux), or firmware that finds one on a disk",
        ],
    ),
    (&["--kernel", "k", "--cpus", "0"], &["--cpus 0: count: a VM without vCPUs cannot run; 1 to 254 are possible"]),
    (
        &["--kernel", "k", "--cpus", "300"],
        &["--cpus 300: count: 300 vCPUs are too many; 1 to 254 are possible in a VM"],
    ),
    (
        &["--kernel", "k", "--cpus", "4,cores=3,socket=1"],
        &[
            "--cpus 4,cores=3,socket=1: unknown key «socket» of --cpus; did you mean «sockets»? known: count, max, sockets, \
               cores, threads",
        ],
    ),
    (
        &["--kernel", "k", "--memory", "1.5G,hugepages=4M,shared=maybe"],
        &[
            "--memory 1.5G,hugepages=4M,shared=maybe: size: «1.5G» is not a size: write a whole number with a smaller \
                 suffix, as in 1536M for one and a half G",
            "--memory 1.5G,hugepages=4M,shared=maybe: hugepages: «4M» is not possible; known: off, 2M, 1G",
            "--memory 1.5G,hugepages=4M,shared=maybe: shared: «maybe» is not possible; known: on, off",
        ],
    ),
    (
        &["--kernel", "k", "--disk", "a.img,read_onyl,path=b"],
        &[
            "--disk a.img,read_onyl,path=b: unknown key «read_onyl» of --disk; did you mean «readonly»? known: path, fd, \
                 readonly, size, direct, serial, queues, id",
            "--disk a.img,read_onyl,path=b: the key «path» is repeated; give it once",
        ],
    ),
    (
        &["--kernel", "k", "--disk", "readonly"],
        &["--disk readonly: nothing is named that the disk is on; give `path` or `fd`"],
    ),
    (
        &["--kernel", "k", "--disk", "a,queues=many", "--disk", "b,id"],
        &[
            "--disk a,queues=many: queues: «many» is not possible; write a number",
            "--disk b,id: the key «id» has no value; write id=VALUE",
        ],
    ),
    (
        &["--kernel", "k", "--disk", "a", "--disk", "a"],
        &["--disk a: path: a is the disk of devices[0] already; two disks may share a file only where both are \
               `readonly`"],
    ),
    (
        &["--kernel", "k", "--net", "tap0,mac=52:54"],
        &[
            "--net tap0,mac=52:54: mac: «52:54» is not a hardware address: write six pairs of hexadecimal digits, as in \
               52:54:00:12:34:56",
        ],
    ),
    (
        &["--kernel", "k", "--vfio", "1:0.0"],
        &[
            "--vfio 1:0.0: host: «1:0.0» is no address of a PCI function; write it as in 0000:01:00.0, in lower case; `lspci -D` \
           lists them",
        ],
    ),
    (&["--kernel", "k", "--net", "mtu=x"], &["--net mtu=x: mtu: «x» is not possible; write a number of bytes"]),
    (
        &["--kernel", "k", "--net", "mtu=1500"],
        &["--net mtu=1500: nothing is named that the network card leads to; give `tap` or `fd`"],
    ),
    (
        &[
            "--kernel",
            "k",
            "--serial",
            "file",
            "--console",
            "socket=a,pty",
            "--console",
            "stdio=1",
            "--console",
            "name=x",
        ],
        &[
            "--serial file: «file» needs a path; write file=PATH",
            "--console socket=a,pty: it leads to more than one; choose stdio, pty, api, off, file=PATH or socket=PATH",
            "--console stdio=1: «stdio» takes no value; choose stdio, pty, api, off, file=PATH or socket=PATH",
            "--console name=x: it does not say where it leads; choose stdio, pty, api, off, file=PATH or socket=PATH",
        ],
    ),
    (
        &["--kernel", "k", "--serial", "tcp=1"],
        &[
            "--serial tcp=1: unknown key «tcp» of --serial; known: stdio, pty, api, off, file, socket",
            "--serial tcp=1: it does not say where it leads; choose stdio, pty, api, off, file=PATH or socket=PATH",
        ],
    ),
    (
        &["--kernel", "k", "--serial", "stdio", "--console", "stdio"],
        &["--console stdio: endpoint: standard input and output are used by serial already; choose file, socket, pty \
               or off for one of them"],
    ),
    (
        &[
            "--kernel",
            "k",
            "--confidential",
            "tdy",
            "--on-reset",
            "reboot",
            "--on-panic",
            "restrat",
            "--pvpanic",
            "yes",
        ],
        &[
            "--confidential tdy: «tdy» is not possible; did you mean «tdx»? known: tdx, snp, software-protected",
            "--on-reset reboot: «reboot» is not possible; known: restart, exit",
            "--on-panic restrat: «restrat» is not possible; did you mean «restart»? known: exit, restart, ignore",
            "--pvpanic yes: «yes» is not possible; known: on, off",
        ],
    ),
    (
        &["--kernel", "k", "--cmdline", "a\nb"],
        &["--cmdline a\\nb: it has a control character (a line break or NUL, for example) at byte 1; write it as one \
               line; in YAML, a text folded with `>-` ends without a line break"],
    ),
];

#[test]
fn every_problem_names_its_flag() {
    for (line, expected) in WITH_PROBLEMS {
        assert_eq!(problems(line), expected, "{line:?}");
    }
}

#[test]
fn a_broken_flag_hides_no_other_problem_and_makes_none() {
    let told = problems(&[
        "--cpus",
        "x,cores=4",
        "--disk",
        "a,queues=x",
        "--disk",
        "a",
        "--net",
        "tap0,mac=01:00:00:00:00:00",
    ]);
    assert_eq!(
        told,
        [
            "--kernel: no kernel is named; give --kernel FILE, --config FILE with a kernel in it, or --firmware FILE, which finds one on a disk",
            "--cpus x,cores=4: count: «x» is not possible; write a whole number",
            "--disk a,queues=x: queues: «x» is not possible; write a number",
            "--net tap0,mac=01:00:00:00:00:00: mac: 01:00:00:00:00:00 is a group's address (multicast); the first byte must \
             be even",
            "--disk a: path: a is the disk of devices[0] already; two disks may share a file only where both are `readonly`",
        ]
    );
}

#[test]
fn problems_of_opened_files_are_told_with_their_flag() {
    let args = args(&["--kernel", "k", "--disk", "a", "--cpus", "x"]);
    let source = Source::read(&args);
    let missing =
        vec![Problem::new("kernel.path", "it is missing", ""), Problem::new("devices[0].path", "it is locked", "")];
    let mut problems = source.config(|_| missing).unwrap_err();
    assert_eq!(source.told(&mut problems)[1..], ["--kernel k: it is missing", "--disk a: path: it is locked"]);
}

fn refused(line: &[&str]) -> (ErrorKind, i32, String) {
    let error = Cli::read(["halyard"].iter().chain(line).copied()).unwrap_err();
    (error.kind(), error.exit_code(), error.to_string())
}

#[test]
fn clap_refuses_the_rest() {
    let (kind, code, text) = refused(&["run", "--kernl", "x"]);
    assert_eq!((kind, code), (ErrorKind::UnknownArgument, 2));
    assert!(text.contains("unexpected argument '--kernl' found") && text.contains("'--kernel'"), "{text}");
    assert_eq!(refused(&["run", "--kernel"]).1, 2);
    assert_eq!(refused(&["run", "--kernel", "a", "--kernel", "b"]).0, ErrorKind::ArgumentConflict);
    assert_eq!(refused(&["run", "extra"]).1, 2);
    assert_eq!(refused(&["rum"]).0, ErrorKind::InvalidSubcommand);
    assert_eq!(refused(&["--log-level", "loud", "schema"]).0, ErrorKind::InvalidValue);
    assert_eq!(refused(&[]).1, 2);
    assert_eq!(
        refused(&["--version"]),
        (ErrorKind::DisplayVersion, 0, format!("halyard {}\n", env!("CARGO_PKG_VERSION")))
    );
}

#[test]
fn help_says_all_that_is_needed() {
    let (kind, code, run) = refused(&["run", "--help"]);
    assert_eq!((kind, code), (ErrorKind::DisplayHelp, 0));
    for wanted in
        ["--kernel <FILE>", "[default: 512M]", "Ctrl-a x", "Examples:", "Exit codes:", "130  ended from the terminal"]
    {
        assert!(run.contains(wanted), "{wanted} is not in\n{run}");
    }
    let short = refused(&["run", "-h"]).2;
    assert!(short.len() < run.len() / 2 && short.contains("--help"), "{short}");
    for line in ["--help", "validate --help", "probe --help", "schema --help", "ctl --help", "ctl devices --help"] {
        let page: Vec<&str> = line.split(' ').collect();
        let text = refused(&page).2;
        assert!(text.contains("halyard"), "{text}");
        let widest = text.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(100), "{page:?} is {widest:?} wide:\n{text}");
    }
}

/// The exit codes that the help page promises are those that outcomes have.
#[test]
fn help_has_the_exit_code_of_every_outcome() {
    let page = refused(&["run", "--help"]).2;
    let crashed = api::Outcome::Crashed { reason: String::new() };
    let debug = api::Outcome::DebugExit { value: 0 };
    for outcome in
        [api::Outcome::PoweredOff, api::Outcome::Reset, api::Outcome::Panicked, crashed, debug, api::Outcome::Quit]
    {
        let line = format!("\n{:>5}  ", outcome.exit_code());
        assert!(page.contains(&line), "{outcome}: {line:?} is not in\n{page}");
    }
}

#[test]
fn probe_is_read_at_a_glance() {
    let check = |name: &str, ok, required, remedy: &str| api::Check {
        name: name.into(),
        ok,
        required,
        detail: format!("the {name}"),
        remedy: remedy.into(),
    };
    let mut report = HostReport {
        version: "1.2.3".into(),
        hypervisor: Some("KVM".into()),
        max_vcpus: Some(254),
        physical_address_bits: Some(46),
        max_memory: Some((1 << 46) - (4 << 30)),
        dirty_tracking: vec!["bitmap".into(), "ring of 65536".into()],
        kinds: vec![
            KindReport { kind: KindName::Standard, available: true, reason: String::new() },
            KindReport { kind: KindName::SoftwareProtected, available: false, reason: "no guest_memfd".into() },
        ],
        checks: vec![check("hypervisor", true, true, ""), check("tap networks", false, false, "load tun")],
    };
    assert_eq!(
        probe::text(&report),
        "\
Halyard 1.2.3: virtual machines can run here.

Host
  hypervisor                yes  the hypervisor
  tap networks              no   the tap networks; load tun

Kinds of virtual machine
  standard                  yes
  software-protected        no   no guest_memfd

Limits of a virtual machine
  hypervisor                KVM
  vCPUs                     up to 254
  address space             46 bits
  memory                    up to 63.9 TiB
  dirty page tracking       bitmap, ring of 65536
"
    );
    report.checks[0].ok = false;
    report.hypervisor = None;
    report.max_memory = None;
    let text = probe::text(&report);
    assert!(text.starts_with("Halyard 1.2.3: virtual machines cannot run here.\n"), "{text}");
    assert!(text.contains("  memory                    unknown\n"), "{text}");
}
