//! Bad configurations, each with the messages that it gets.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use api::{
    ByteSize, Confidential, ConfigText, Console, DeviceConfig, Disk, Endpoint, Firmware, HostFacts, Hugepages, Kernel,
    KernelCache, KindName, MAX_CONFIG_BYTES, MacAddr, Net, Rng, TimeSpan, Topology, VmConfig, parse, validate,
};

/// The messages that a text gets, with line and column.
fn messages(text: &str) -> Vec<String> {
    let source = ConfigText::new("vm.yaml", text);
    match source.parse() {
        Ok(config) => panic!("it was accepted: {config:?}"),
        Err(problems) => problems.0.iter().map(|problem| source.describe(problem)).collect(),
    }
}

#[test]
fn every_unknown_field_is_reported_with_its_place_and_a_suggestion() {
    assert_eq!(
        messages(
            "kernel: {path: k, cmdlne: quiet}\nmemroy: {size: 1G}\ndevices:\n  - type: disk\n    path: a\n    read-only: true\n"
        ),
        [
            "vm.yaml:1:19: kernel.cmdlne: «cmdlne» is no field here; did you mean «cmdline»? Known are: cache, cmdline, \
             initramfs, path, system_map",
            "vm.yaml:2:1: memroy: «memroy» is no field here; did you mean «memory»? Known are: confidential, cpus, devices, firmware, \
             kernel, lifecycle, memory, pci, platform, serial",
            "vm.yaml:6:5: devices[0].read-only: «read-only» is no field here; did you mean «readonly»? Known are: direct, fd, id, \
             path, queues, readonly, serial, size, type",
        ]
    );
}

#[test]
fn problems_of_every_sort_come_in_one_report() {
    let text = "\
kernel:
  initramfs: [a]
cpus:
  count: 300
  count: 2
memory:
  size: 1.5G
  hugepages: 4M
confidential: tdx
lifecycle: {on_reset: reboot}
serial:
  endpoint: stdio
devices:
  - type: disc
    path: a.img
  - path: b.img
  - type: disk
  - type: net
    tap: interface-name-that-is-too-long
    mac: 52:54:00:12:34
  - type: disk
    path: c.img
    serial: 0123
    queues: 70000
    readonly: yes
  - disk
";
    assert_eq!(
        messages(text),
        [
            "vm.yaml:2:3: kernel.path: it is missing; needed is: A Linux kernel: a bzImage (vmlinuz) or an ELF file (vmlinux, or \
             any kernel with a PVH entry)",
            "vm.yaml:2:14: kernel.initramfs: a single value must stand here, not a list",
            "vm.yaml:4:3: cpus.count: 300 vCPUs are too many; 1 to 254 are possible in a VM",
            "vm.yaml:5:3: cpus.count: the field «count» is repeated: it stands in line 4 already; leave one of them out",
            "vm.yaml:7:9: memory.size: «1.5G» is not a size: write a whole number with a smaller suffix, as in 1536M for one \
             and a half G",
            "vm.yaml:8:14: memory.hugepages: «4M» is not possible here; known are: off, 2M, 1G",
            "vm.yaml:9:15: confidential: fields with a `kind` must stand here, not «tdx»; write {kind: tdx}",
            "vm.yaml:10:23: lifecycle.on_reset: «reboot» is not possible here; known are: restart, exit",
            "vm.yaml:12:3: serial.type: it is missing; it is one of: stdio, file, socket, pty, api, off",
            "vm.yaml:14:11: devices[0].type: «disc» is no type here; did you mean «disk»? Known are: disk, net, console, rng",
            "vm.yaml:16:5: devices[1].type: it is missing; it is one of: disk, net, console, rng",
            "vm.yaml:17:5: devices[2]: nothing is named that the disk is on; give `path` or `fd`",
            "vm.yaml:19:5: devices[3].tap: «interface-name-that-is-too-long» is 31 bytes long; an interface's name has at most 15",
            "vm.yaml:20:10: devices[3].mac: «52:54:00:12:34» is not a hardware address: write six pairs of hexadecimal digits, \
             as in 52:54:00:12:34:56",
            "vm.yaml:23:13: devices[4].serial: a text must stand here, not the number 0123; write it in quotes: \"0123\"",
            "vm.yaml:24:13: devices[4].queues: a whole number from 0 to 65535 must stand here, not the number 70000",
            "vm.yaml:25:15: devices[4].readonly: true or false must stand here, not «yes»",
            "vm.yaml:26:5: devices[5]: fields with a `type` must stand here, not «disk»; write {type: disk}",
        ]
    );
}

#[test]
fn wrong_shapes() {
    let cases = [
        ("", "vm.yaml: the configuration is empty; at least `kernel: {path: …}` is needed"),
        ("# nothing\n", "vm.yaml: the configuration is empty; at least `kernel: {path: …}` is needed"),
        (
            "kernel: {}",
            "vm.yaml:1:9: kernel.path: it is missing; needed is: A Linux kernel: a bzImage (vmlinuz) or an ELF file (vmlinux, or \
             any kernel with a PVH entry)",
        ),
        ("hello", "vm.yaml:1:1: fields (`name: value`) must stand here, not «hello»"),
        ("[kernel]", "vm.yaml:1:1: fields (`name: value`) must stand here, not a list"),
        ("kernel: vmlinuz", "vm.yaml:1:9: kernel: fields (`name: value`) must stand here, not «vmlinuz»"),
        ("kernel: {path: }", "vm.yaml:1:14: kernel.path: a text must stand here, not nothing"),
        (
            "kernel: {path: k}\ndevices: {}",
            "vm.yaml:2:10: devices: a list must stand here, not fields; begin each item with `- `",
        ),
        (
            "kernel: {path: k}\ncpus: {count: 1.5}",
            "vm.yaml:2:15: cpus.count: a whole number from 0 to 4294967295 must stand here, not the number 1.5",
        ),
        (
            "kernel: {path: k}\ncpus: {count: -1}",
            "vm.yaml:2:15: cpus.count: a whole number from 0 to 4294967295 must stand here, not the number -1",
        ),
        (
            "kernel: {path: k}\nmemory: {size: -1}",
            "vm.yaml:2:16: memory.size: «-1» is not a size: write bytes, or a number with K, M, G or T, as in 512M",
        ),
        (
            "kernel: {path: k}\nmemory: {size: 1MB}",
            "vm.yaml:2:16: memory.size: «1MB» is not a size: a B after the prefix may mean steps of 1000 or of 1024; write M or MiB for 1024",
        ),
        (
            "kernel: {path: k}\nmemory: {size: 20000000T}",
            "vm.yaml:2:16: memory.size: «20000000T» is not a size: it is larger than any address",
        ),
        (
            "kernel: {path: k}\nmemory: {size: }",
            "vm.yaml:2:14: memory.size: a size such as 512M must stand here, not nothing",
        ),
        (
            "kernel: {path: k}\nserial: {type: stdio, path: x}",
            "vm.yaml:2:23: serial.path: «path» is no field here; known are: type",
        ),
        (
            "kernel: {path: k}\ndevices: [{type: console}]",
            "vm.yaml:2:11: devices[0].endpoint: it is missing; needed is: Where it leads on the host",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(messages(text), [expected], "{text}");
    }
}

#[test]
fn what_makes_a_vm_confidential_is_checked_field_by_field() {
    for (text, expected) in [
        (
            "kernel: {path: k}\nconfidential: {kind: snp, policy: 1}",
            "vm.yaml:2:27: confidential.policy: «policy» is no field here; known are: kind",
        ),
        (
            "kernel: {path: k}\nconfidential: {kind: tdy}",
            "vm.yaml:2:22: confidential.kind: «tdy» is no kind here; did you mean «tdx»? Known are: tdx, snp, \
             software-protected",
        ),
        (
            "kernel: {path: k}\nconfidential: {kind: tdx, owner: 00}",
            "vm.yaml:2:34: confidential.owner: a text must stand here, not the number 00; write it in quotes: \"00\"",
        ),
        (
            "kernel: {path: k}\nconfidential: {kind: tdx, owner: ff}",
            "vm.yaml:2:34: confidential.owner: «ff» is no identity: write 96 hexadecimal digits",
        ),
        (
            "kernel: {path: k}\nconfidential: {kind: tdx, quote_service: qgs}",
            "vm.yaml:2:42: confidential.quote_service: «qgs» is no quote service: write \
             unix:/var/run/tdx-qgs/qgs.socket or vsock:2:4050",
        ),
    ] {
        assert_eq!(messages(text), [expected], "{text}");
    }
}

#[test]
fn json_is_reported_like_yaml() {
    let text = "{\n\t\"kernel\": {\"path\": \"k\", \"path\": \"l\"},\n\t\"cpus\": {\"count\": \"2\"}\n}\n";
    assert_eq!(
        messages(text),
        [
            "vm.yaml:2:26: kernel.path: the field «path» is repeated: it stands in line 2 already; leave one of them out",
            "vm.yaml:3:20: cpus.count: a whole number from 0 to 4294967295 must stand here, not «2»",
        ]
    );
}

#[test]
fn a_flood_of_problems_is_cut_short() {
    let text: String = (0..1000).map(|number| format!("field{number}: 1\n")).collect();
    let messages = messages(&text);
    assert_eq!(messages.len(), 51);
    assert_eq!(messages.last().unwrap(), "vm.yaml: and 951 more");

    // So is one that comes before a place where the text is not YAML.
    let repeated = "kernel: 1\n".repeat(1000) + "memory: [\n";
    let messages = self::messages(&repeated);
    assert_eq!(messages.len(), 51);
    assert!(messages.last().unwrap().starts_with("vm.yaml: and 9"), "{messages:?}");
}

#[test]
fn files_that_cannot_be_read() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let message = |path: &Path| ConfigText::read(path).map(|_| ()).unwrap_err().to_string();

    assert!(
        message(&at("none.yaml")).ends_with("none.yaml: there is no such file; name a configuration in YAML or JSON")
    );
    assert!(message(directory.path()).ends_with(": it is a directory; name a file in it"));
    symlink("loop", at("loop")).unwrap();
    assert!(message(&at("loop")).contains("loop: Too many levels of symbolic links"), "{}", message(&at("loop")));

    fs::write(at("latin1"), b"kernel: {path: \xe9}").unwrap();
    assert!(
        message(&at("latin1")).ends_with("latin1: it is not text in UTF-8, as byte 15 shows; is it a configuration?")
    );
    fs::write(at("large"), vec![b'#'; MAX_CONFIG_BYTES + 1]).unwrap();
    assert!(message(&at("large")).ends_with("large: it is larger than 1024 KiB; is it a configuration?"));
    fs::write(at("just"), vec![b'#'; MAX_CONFIG_BYTES]).unwrap();
    ConfigText::read(&at("just")).unwrap();
    assert!(message(Path::new("/dev/zero")).contains("larger than"));

    fs::write(at("secret"), "kernel: {path: k}").unwrap();
    fs::set_permissions(at("secret"), fs::Permissions::from_mode(0o0)).unwrap();
    // A user who may read every file gets no message here.
    if fs::File::open(at("secret")).is_err() {
        assert!(message(&at("secret")).ends_with("secret: no permission to read it; make it readable for this user"));
    }
}

/// The problems of a configuration that only `change` makes wrong.
fn problems(host: &HostFacts, change: impl FnOnce(&mut VmConfig)) -> Vec<String> {
    let mut config = VmConfig::new("/boot/vmlinuz");
    assert_eq!(validate(&config, host), []);
    change(&mut config);
    validate(&config, host).iter().map(ToString::to_string).collect()
}

fn small_host() -> HostFacts {
    HostFacts {
        max_vcpus: 64,
        physical_address_bits: 40,
        max_memory: (1 << 40) - (4 << 30),
        max_devices: 30,
        kinds: vec![KindName::Standard],
    }
}

#[test]
fn processors() {
    let host = small_host();
    assert_eq!(
        problems(&host, |vm| vm.cpus.count = 0),
        ["cpus.count: a VM without vCPUs cannot run; 1 to 64 are possible"]
    );
    assert_eq!(
        problems(&host, |vm| vm.cpus.count = 65),
        ["cpus.count: 65 vCPUs are too many; 1 to 64 are possible on this host"]
    );
    assert_eq!(
        problems(&HostFacts::unlimited(), |vm| vm.cpus.count = 300),
        ["cpus.count: 300 vCPUs are too many; 1 to 254 are possible in a VM"]
    );
    let topology = |sockets, cores, threads| Some(Topology { sockets, cores, threads });
    assert_eq!(
        problems(&host, |vm| {
            vm.cpus.count = 8;
            vm.cpus.topology = topology(2, 3, 1);
        }),
        ["cpus.topology: 2 sockets × 3 cores × 1 threads are 6 vCPUs, not 8; the product must be the number of vCPUs"]
    );
    assert_eq!(
        problems(&host, |vm| vm.cpus.topology = topology(0, 1, 0)),
        [
            "cpus.topology.sockets: 0 sockets leave no vCPU; at least 1 is needed",
            "cpus.topology.threads: 0 threads leave no vCPU; at least 1 is needed",
        ]
    );
    assert_eq!(problems(&host, |vm| vm.cpus.topology = topology(u32::MAX, u32::MAX, u32::MAX)).len(), 1);
}

#[test]
fn processors_that_may_come() {
    let host = small_host();
    let cpus = |count, max, topology: Option<(u32, u32, u32)>| {
        let topology = topology.map(|(sockets, cores, threads)| Topology { sockets, cores, threads });
        problems(&host, |vm| vm.cpus = api::Cpus { count, max: Some(max), topology })
    };
    assert!(cpus(1, 8, None).is_empty() && cpus(8, 8, None).is_empty() && cpus(3, 8, Some((2, 2, 2))).is_empty());
    assert_eq!(
        cpus(4, 2, None),
        ["cpus.max: there cannot be 4 vCPUs where there may be 2; give at least cpus.count, or leave it out"]
    );
    assert_eq!(cpus(1, 65, None), ["cpus.max: 65 vCPUs are too many; 1 to 64 are possible on this host"]);
    assert_eq!(cpus(1, 0, None).len(), 1);
    assert_eq!(
        cpus(4, 8, Some((1, 4, 1))),
        ["cpus.topology: 1 sockets × 4 cores × 1 threads are 4 vCPUs, not 8; the product must be cpus.max"]
    );
}

#[test]
fn a_shared_kernel_goes_with_plain_memory_only() {
    let host = small_host();
    let with = |change: fn(&mut VmConfig)| {
        problems(&host, |vm| {
            vm.memory.share_kernel = true;
            change(vm);
        })
    };
    assert!(with(|_| ()).is_empty());
    assert_eq!(
        with(|vm| vm.memory.shared = true),
        [
            "memory.share_kernel: it cannot be had with memory.shared: other processes map this memory, and would not see the \
          kernel's pages; leave out one of the two"
        ]
    );
    let all = with(|vm| {
        vm.memory.prefault = true;
        vm.memory.lock = true;
        vm.memory.hugepages = Hugepages::Size2M;
        vm.kernel.cache = KernelCache::Off;
    });
    for field in ["memory.prefault", "memory.lock", "memory.hugepages", "kernel.cache"] {
        assert!(all.iter().any(|problem| problem.contains(field)), "{field}: {all:?}");
    }
}

#[test]
fn memory() {
    let host = small_host();
    let sized = |bytes: u64| problems(&host, |vm| vm.memory.size = ByteSize::new(bytes));
    assert_eq!(sized(0), ["memory.size: a VM without memory cannot run; at least 2M are needed"]);
    assert_eq!(
        sized(512),
        [
            "memory.size: 512 bytes are too little; at least 2M are needed; write 512M for 512 MiB",
            "memory.size: 512 is not a multiple of the 4K that pages have; 2M would be one",
        ]
    );
    assert_eq!(
        sized((1 << 30) + 1),
        ["memory.size: 1073741825 is not a multiple of the 4K that pages have; 1G would be one"]
    );
    assert_eq!(sized(2 << 20), [""; 0]);
    assert_eq!(
        sized(1 << 40),
        [
            "memory.size: 1T do not fit into this host's address space for guests (40 bits); at most 1020G fit beside the devices"
        ]
    );
    assert_eq!(sized(u64::MAX - 4095).len(), 1);
    assert_eq!(
        problems(&host, |vm| {
            vm.memory.size = ByteSize::mib(1536);
            vm.memory.hugepages = Hugepages::Size1G;
        }),
        ["memory.size: 1536M is not a multiple of the 1G that huge pages have; 1G would be one"]
    );
}

#[test]
fn memory_that_may_come() {
    let host = small_host();
    let with = |size: u32, max: u64, hugepages| {
        problems(&host, |vm| {
            (vm.memory.size, vm.memory.max) = (ByteSize::mib(size), Some(ByteSize::new(max << 20)));
            vm.memory.hugepages = hugepages;
        })
    };
    assert_eq!(with(1024, 4096, Hugepages::Off), [""; 0]);
    assert_eq!(with(1024, 1024, Hugepages::Off), [""; 0]);
    assert_eq!(with(100, 228, Hugepages::Off), [""; 0], "what may come is a multiple, not the whole");
    assert_eq!(with(1024, 3072, Hugepages::Size1G), [""; 0]);
    assert_eq!(
        with(1024, 512, Hugepages::Off),
        [
            "memory.max: 512M are less than memory.size, 1G; it is the most that the guest can have: memory.size at least"
        ]
    );
    assert_eq!(
        with(1024, 1100, Hugepages::Off),
        ["memory.max: 1100M are not memory.size, 1G, and a multiple of 128M; 1G or 1152M would be"]
    );
    assert_eq!(
        with(1024, 1536, Hugepages::Size1G),
        ["memory.max: 1536M are not memory.size, 1G, and a multiple of 1G; 1G or 2G would be"]
    );
    assert_eq!(
        with(1024, 1 << 20, Hugepages::Off),
        [
            "memory.max: 1T do not fit into this host's address space for guests (40 bits); at most 1020G fit beside the devices"
        ]
    );
    let timed = |time| problems(&host, |vm| vm.memory.resize_timeout = TimeSpan::from_millis(time));
    assert_eq!(timed(0), ["memory.resize_timeout: no guest answers in no time; write 60s, or leave it out"]);
    assert_eq!(timed(86_400_001).len(), 1);
}

#[test]
fn firmware_finds_a_kernel_by_itself() {
    let host = small_host();
    let without_kernel = |vm: &mut VmConfig| {
        vm.kernel = Kernel::default();
        vm.firmware = Some(Firmware { path: "OVMF.fd".into() });
    };
    assert_eq!(problems(&host, without_kernel), [""; 0]);
    let text = ConfigText::new("vm.yaml", "firmware: {path: OVMF.fd}\n");
    let mut config = text.parse().unwrap();
    config.fill_defaults();
    assert_eq!((validate(&config, &host), &config.kernel), (Vec::new(), &Kernel::default()));
    let found = problems(&host, |vm| {
        without_kernel(vm);
        vm.kernel.initramfs = Some("initrd.img".into());
        vm.kernel.cmdline = Some("quiet".into());
    });
    let problem =
        "no kernel is named that it would be for: firmware goes by what is on the disk; name a kernel, or leave it out";
    assert_eq!(found, [format!("kernel.initramfs: {problem}"), format!("kernel.cmdline: {problem}")]);
}

#[test]
fn kernel_and_kind() {
    let host = small_host();
    assert_eq!(
        problems(&host, |vm| vm.kernel.path = "".into()),
        [
            "kernel.path: no kernel is named; name a bzImage (vmlinuz) or an ELF kernel (vmlinux), or firmware that finds one on a disk"
        ]
    );
    assert_eq!(
        problems(&host, |vm| vm.kernel.initramfs = Some("a\0b".into())),
        ["kernel.initramfs: the path has a NUL character in it; a file's path cannot have one"]
    );
    for (cmdline, byte) in [("quiet\n", 5), ("a\0b", 1)] {
        let found = problems(&host, |vm| vm.kernel.cmdline = Some(cmdline.into()));
        assert!(
            found[0].starts_with(&format!(
                "kernel.cmdline: it has a control character (a line break or NUL, for example) at byte {byte};"
            )),
            "{found:?}"
        );
    }
    assert_eq!(
        problems(&host, |vm| vm.kernel.cmdline = Some("x".repeat(2048))),
        ["kernel.cmdline: it is 2048 bytes long; the kernel takes at most 2047"]
    );
    assert_eq!(problems(&host, |vm| vm.kernel.cmdline = Some("x".repeat(2047))), [""; 0]);
    assert_eq!(
        problems(&host, |vm| vm.confidential = Some(Confidential::Snp {})),
        [
            "confidential.kind: this host cannot run VMs of the kind «snp»; it can run: standard; `halyard probe` says why"
        ]
    );
}

#[test]
fn disks_and_ids() {
    let host = small_host();
    let disk = |id: &str, path: &str, readonly| DeviceConfig::Disk(Disk { id: id.into(), readonly, ..Disk::new(path) });
    assert_eq!(
        problems(&host, |vm| vm.devices = vec![disk("a", "x", true), disk("a", "y", false), disk("serial", "", false)]),
        [
            "devices[2].id: «serial» is the serial port's id; choose another",
            "devices[2].path: the path is empty; name a file",
            "devices[1].id: «a» is taken by devices[0].id already; a device's id must be its own",
        ]
    );
    assert_eq!(
        problems(&host, |vm| vm.devices = vec![disk("", "x", true), disk("", "x", false)]),
        [
            "devices[1].path: x is the disk of devices[0] already; two disks may share a file only where both are `readonly`"
        ]
    );
    assert_eq!(problems(&host, |vm| vm.devices = vec![disk("", "x", true), disk("", "x", true)]), [""; 0]);
    for id in ["a/b", "-a", "ä", "a b", "."] {
        let found = problems(&host, |vm| vm.devices = vec![disk(id, "x", true)]);
        assert_eq!(
            found,
            [format!(
                "devices[0].id: «{id}» cannot be a name; begin with a letter or a digit and go on with letters, digits, `.`, `_` and `-`"
            )]
        );
    }
    assert_eq!(
        problems(&host, |vm| vm.devices = vec![disk(&"a".repeat(65), "x", true)]),
        ["devices[0].id: it is 65 bytes long; at most 64 are possible"]
    );
    assert_eq!(
        problems(&host, |vm| {
            let size = Some(ByteSize::new(513));
            let odd = Disk { serial: Some("é".repeat(11)), queues: 0, size, ..Disk::new("x") };
            vm.devices = vec![DeviceConfig::Disk(odd)];
        }),
        [
            "devices[0].serial: it is 22 bytes long; at most 20 are possible",
            "devices[0].serial: «ééééééééééé» has other than printable ASCII characters; leave them out",
            "devices[0].size: 513 bytes are not a whole number of sectors of 512; the next that is, is 1024",
            "devices[0].queues: 0 queues are not possible; 1 to 64 are",
        ]
    );
    assert_eq!(
        problems(&host, |vm| vm.devices = vec![DeviceConfig::Rng(Rng::default()); 31]),
        ["devices: 31 devices are too many; a VM has room for 30"]
    );
}

#[test]
fn networks() {
    let host = small_host();
    let tap = |name: &str| Net { tap: Some(name.into()), ..Net::default() };
    let found = |nets: Vec<Net>| problems(&host, |vm| vm.devices = nets.into_iter().map(DeviceConfig::Net).collect());
    assert_eq!(
        found(vec![Net::default()]),
        ["devices[0]: nothing is named that the network card leads to; give `tap` or `fd`"]
    );
    assert_eq!(
        found(vec![Net { fd: Some(2), ..tap("t") }]),
        [
            "devices[0]: both `tap` and `fd` are given; leave one of them out",
            "devices[0].fd: descriptor 2 cannot be a tap interface; 0 to 2 are the standard streams; pass another one",
        ]
    );
    assert_eq!(
        found(vec![tap("tap0"), tap("tap0")]),
        [
            "devices[1].tap: «tap0» is taken by devices[0].tap already; each network card needs a tap interface of its own"
        ]
    );
    assert_eq!(found(vec![tap("exactly15bytes!")]), [""; 0]);
    assert_eq!(
        found(vec![tap("exactly-16-bytes")]),
        ["devices[0].tap: «exactly-16-bytes» is 16 bytes long; an interface's name has at most 15"]
    );
    for name in ["a/b", "a b", "a\n", "a:b"] {
        assert!(found(vec![tap(name)])[0].contains("cannot be an interface's name"), "{name}");
    }
    assert!(found(vec![tap("")])[0].contains("name a tap interface, as in tap0"));
    let mac = |name: &str, mac: &str| Net { mac: Some(mac.parse::<MacAddr>().unwrap()), ..tap(name) };
    assert_eq!(
        found(vec![
            mac("a", "01:00:5e:00:00:01"),
            mac("b", "52:54:00:00:00:01"),
            mac("c", "52:54:00:00:00:01"),
            mac("d", "00:00:00:00:00:00")
        ]),
        [
            "devices[0].mac: 01:00:5e:00:00:01 is a group's address (multicast); the first byte must be even",
            "devices[3].mac: 00:00:00:00:00:00 is nobody's address; leave it out for a random one",
            "devices[2].mac: «52:54:00:00:00:01» is taken by devices[1].mac already; each network card needs an address of its own",
        ]
    );
    assert_eq!(
        found(vec![Net { mtu: Some(67), ..tap("a") }]),
        ["devices[0].mtu: 67 bytes are too few; 68 to 65535 are possible"]
    );
}

#[test]
fn consoles() {
    let host = small_host();
    let console = |name: Option<&str>, endpoint| {
        DeviceConfig::Console(Console { id: String::new(), name: name.map(Into::into), endpoint })
    };
    assert_eq!(
        problems(&host, |vm| {
            vm.serial = Some(Endpoint::Stdio {});
            vm.devices = vec![console(None, Endpoint::Stdio {})];
        }),
        [
            "devices[0].endpoint: standard input and output are used by serial already; choose file, socket, pty or off for one of them"
        ]
    );
    assert_eq!(
        problems(&host, |vm| {
            vm.devices = vec![
                console(Some("a/b"), Endpoint::Socket { path: "s".repeat(108).into() }),
                console(Some("p"), Endpoint::File { path: "log".into() }),
                console(Some("p"), Endpoint::File { path: "log".into() }),
                console(None, Endpoint::File { path: "".into() }),
            ];
        }),
        [
            "devices[0].name: «a/b» cannot be a name; begin with a letter or a digit and go on with letters, digits, `.`, `_` and `-`",
            "devices[0].endpoint.path: the socket's path is 108 bytes long; Linux allows 107: use a shorter directory, or a relative path",
            "devices[3].endpoint.path: the path is empty; name a file",
            "devices[2].name: «p» is taken by devices[1].name already; each port needs a name of its own",
            "devices[2].endpoint.path: «log» is taken by devices[1].endpoint.path already; each needs a file or socket of its own",
        ]
    );
    assert_eq!(
        problems(&host, |vm| vm.devices = vec![console(None, Endpoint::Socket { path: "s".repeat(107).into() })]),
        [""; 0]
    );
}

#[test]
fn validated_problems_find_their_place_in_the_text() {
    let source = ConfigText::new("vm.yaml", "kernel: {path: k}\ncpus:\n  count: 100\nconfidential: {kind: snp}\n");
    let mut found = validate(&source.parse().unwrap(), &small_host());
    source.locate(&mut found);
    let lines: Vec<String> = found.iter().map(|problem| source.describe(problem)).collect();
    assert_eq!(lines[0], "vm.yaml:3:3: cpus.count: 100 vCPUs are too many; 1 to 64 are possible on this host");
    assert!(lines[1].starts_with("vm.yaml:4:16: confidential.kind: "), "{lines:?}");
}

#[test]
fn what_other_yaml_dialects_misread_is_read_right() {
    let config = parse("kernel: {path: no, cmdline: 'on'}\nmemory: {hugepages: off}\ndevices: [{type: net, tap: y, mac: 00:11:22:33:44:55}]\n").unwrap();
    assert_eq!(config.kernel.path.to_str(), Some("no"));
    assert_eq!(config.memory.hugepages, Hugepages::Off);
    let DeviceConfig::Net(net) = &config.devices[0] else { panic!("no net") };
    assert_eq!(net.tap.as_deref(), Some("y"));
    assert_eq!(net.mac.unwrap().to_string(), "00:11:22:33:44:55");
}
