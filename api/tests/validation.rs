//! Configurations that are read, and cannot be: each with the messages that it gets.

use api::{
    ByteSize, Confidential, ConfigText, Console, DeviceConfig, Disk, Endpoint, Firmware, HostFacts, Hugepages, Kernel,
    KernelCache, KindName, MacAddr, Net, Rng, TimeSpan, Topology, Vfio, VmConfig, validate,
};

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
fn functions_of_the_host() {
    let vfio = |host: &str| DeviceConfig::Vfio(Vfio { host: Some(host.into()), ..Vfio::default() });
    let found =
        |hosts: &[&str]| problems(&small_host(), |vm| vm.devices = hosts.iter().map(|host| vfio(host)).collect());
    assert_eq!(found(&["0000:01:00.0", "0000:01:1f.7", "ffff:ff:00.1"]), [""; 0]);
    for wrong in
        ["", "01:00.0", "0000:01:00.8", "0000:01:20.0", "0000:01:00:0", "0000:0A:00.0", "/sys/bus", "0000:01:0é.0"]
    {
        let told = found(&[wrong]);
        assert!(
            told.len() == 1 && told[0].contains("devices[0].host") && told[0].contains("as in 0000:01:00.0"),
            "{told:?}"
        );
    }
    assert_eq!(
        found(&["0000:01:00.0", "0000:01:00.0"]),
        [
            "devices[1].host: «0000:01:00.0» is taken by devices[0].host already; a function of the host's can be one device only"
        ]
    );
    let by_descriptor = |fd, iommu_fd| {
        let vfio = DeviceConfig::Vfio(Vfio { fd, iommu_fd, ..Vfio::default() });
        problems(&small_host(), |vm| vm.devices = vec![vfio])
    };
    assert_eq!(by_descriptor(Some(5), Some(6)), [""; 0]);
    assert_eq!(by_descriptor(Some(5), None), [""; 0]);
    assert_eq!(by_descriptor(None, None), ["devices[0]: no function of the host's is named; give `host` or `fd`"]);
    assert!(
        by_descriptor(Some(5), Some(5))[0].starts_with("devices[0].iommu_fd: «5» is taken by devices[0].fd already")
    );
    assert!(
        by_descriptor(None, Some(6))
            .contains(&"devices[0].iommu_fd: it is for functions by descriptor; give `fd`, or leave it out".to_owned())
    );
    let shares = problems(&small_host(), |vm| {
        vm.devices = vec![vfio("0000:01:00.0")];
        vm.memory.share_kernel = true;
    });
    assert!(shares.len() == 1 && shares[0].contains("with a device of the type vfio"), "{shares:?}");
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
