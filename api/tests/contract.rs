//! What holds for every configuration: it survives being written and read, defaults are filled in once, and no text
//! makes the parser panic or take long.

use std::time::Duration;

use api::{
    BootUntil, ByteSize, Confidential, ConfigText, Console, Cpus, DeviceConfig, Disk, Endpoint, HostFacts, Hugepages,
    Identity, Lifecycle, Link, MAX_CONFIG_BYTES, MacAddr, Memory, Net, OnPanic, OnReset, Outcome, Platform,
    QuoteService, Rng, Tdx, TimeSpan, Topology, Vfio, VmConfig, parse, validate,
};
use nix::time::{ClockId, clock_gettime};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn endpoint() -> impl Strategy<Value = Endpoint> {
    prop_oneof![
        Just(Endpoint::Stdio {}),
        Just(Endpoint::Pty {}),
        Just(Endpoint::Off {}),
        Just(Endpoint::Api {}),
        any::<String>().prop_map(|path| Endpoint::File { path: path.into() }),
        any::<String>().prop_map(|path| Endpoint::Socket { path: path.into() }),
    ]
}

fn device() -> impl Strategy<Value = DeviceConfig> {
    let place = any::<(Option<String>, Option<i32>)>();
    let numbers = any::<(bool, bool, u16, Option<u64>)>();
    let disk = (any::<String>(), place, numbers, option::of(any::<String>())).prop_map(
        |(id, (path, fd), (readonly, direct, queues, size), serial)| {
            let (path, size) = (path.map(Into::into), size.map(ByteSize::new));
            DeviceConfig::Disk(Disk { id, path, fd, readonly, size, direct, serial, queues })
        },
    );
    let net = any::<(String, Option<String>, Option<i32>, Option<[u8; 6]>, Option<u16>, bool)>().prop_map(
        |(id, tap, fd, mac, mtu, up)| {
            let (mac, link) = (mac.map(MacAddr::new), if up { Link::Up } else { Link::Down });
            DeviceConfig::Net(Net { id, tap, fd, mac, mtu, link })
        },
    );
    let console = (any::<String>(), any::<Option<String>>(), endpoint())
        .prop_map(|(id, name, endpoint)| DeviceConfig::Console(Console { id, name, endpoint }));
    let rng = any::<String>().prop_map(|id| DeviceConfig::Rng(Rng { id }));
    let vfio = any::<(String, Option<String>, Option<i32>, Option<i32>)>()
        .prop_map(|(id, host, fd, iommu_fd)| DeviceConfig::Vfio(Vfio { id, host, fd, iommu_fd }));
    prop_oneof![disk, net, console, rng, vfio]
}

fn confidential() -> impl Strategy<Value = Confidential> {
    let service = prop_oneof![
        "\\PC+".prop_map(|path| QuoteService::Unix(path.into())),
        any::<(u32, u32)>().prop_map(|(cid, port)| QuoteService::Vsock { cid, port }),
    ];
    let identity =
        || option::of(any::<[[u8; 24]; 2]>().prop_map(|halves| Identity::new(halves.concat().try_into().unwrap())));
    let tdx = (any::<bool>(), identity(), identity(), identity(), option::of(service)).prop_map(
        |(sept_ve_disable, config_id, owner, owner_config, quote_service)| Tdx {
            sept_ve_disable,
            config_id,
            owner,
            owner_config,
            quote_service,
        },
    );
    prop_oneof![tdx.prop_map(Confidential::Tdx), Just(Confidential::Snp {}), Just(Confidential::SoftwareProtected {})]
}

fn machine() -> impl Strategy<Value = (Cpus, Memory, Option<Confidential>, Platform, Lifecycle)> {
    let cpus = any::<(u32, Option<u32>, Option<[u32; 3]>)>().prop_map(|(count, max, topology)| Cpus {
        count,
        max,
        topology: topology.map(|[sockets, cores, threads]| Topology { sockets, cores, threads }),
    });
    let hugepages = prop_oneof![Just(Hugepages::Off), Just(Hugepages::Size2M), Just(Hugepages::Size1G)];
    let sizes = any::<(u64, Option<u64>, u64)>();
    let memory = (sizes, any::<[bool; 5]>(), hugepages).prop_map(|((size, max, time), flags, hugepages)| Memory {
        size: ByteSize::new(size),
        max: max.map(ByteSize::new),
        resize_timeout: TimeSpan::from_millis(time),
        hugepages,
        transparent_huge_pages: flags[0],
        prefault: flags[1],
        shared: flags[2],
        lock: flags[3],
        share_kernel: flags[4],
    });
    let platform = any::<[bool; 2]>().prop_map(|flags| Platform { pvpanic: flags[0], debug_exit: flags[1] });
    let on_reset = prop_oneof![Just(OnReset::Restart), Just(OnReset::Exit)];
    let on_panic = prop_oneof![Just(OnPanic::Exit), Just(OnPanic::Restart), Just(OnPanic::Ignore)];
    let boot = (option::of(any::<u64>()), prop_oneof![Just(BootUntil::UserMode), Just(BootUntil::Told)]);
    let times = (any::<u64>(), boot);
    let lifecycle = (on_reset, on_panic, times).prop_map(|(on_reset, on_panic, (off, (time, boot_until)))| Lifecycle {
        on_reset,
        on_panic,
        shutdown_timeout: TimeSpan::from_millis(off),
        boot_timeout: time.map(TimeSpan::from_millis),
        boot_until,
    });
    (cpus, memory, option::of(confidential()), platform, lifecycle)
}

fn config() -> impl Strategy<Value = VmConfig> {
    let kernel = any::<(String, Option<String>, Option<String>)>();
    (kernel, machine(), option::of(endpoint()), vec(device(), 0..5)).prop_map(
        |((path, initramfs, cmdline), (cpus, memory, confidential, platform, lifecycle), serial, devices)| {
            let mut config =
                VmConfig { cpus, memory, confidential, platform, lifecycle, serial, devices, ..VmConfig::new(path) };
            config.kernel.initramfs = initramfs.map(Into::into);
            config.kernel.cmdline = cmdline;
            config
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn written_and_read_it_is_the_same(config in config()) {
        let compact = serde_json::to_string(&config).unwrap();
        prop_assert_eq!(&parse(&compact).map_err(|error| error.to_string()).unwrap(), &config);
        let pretty = serde_json::to_string_pretty(&config).unwrap();
        prop_assert_eq!(&parse(&pretty).map_err(|error| error.to_string()).unwrap(), &config);
    }

    /// The schema takes all that the types write: beside one unknown field, nothing but the rules' own problems is told.
    #[test]
    fn schema_and_types_agree(config in config()) {
        let mut json = serde_json::to_value(&config).unwrap();
        json.as_object_mut().unwrap().insert("unknown_field".into(), 1.into());
        let told = parse(&json.to_string()).unwrap_err().0;
        let mut told: Vec<String> = told.iter().map(ToString::to_string).collect();
        let mut expected: Vec<String> = validate(&config, &HostFacts::unlimited()).iter().map(ToString::to_string).collect();
        let unknown = told.iter().position(|problem| problem.starts_with("unknown_field: «unknown_field» is no field here"));
        told.remove(unknown.expect("the unknown field"));
        told.sort();
        expected.sort();
        prop_assert_eq!(told, expected);
    }

    #[test]
    fn defaults_are_filled_in_once(config in config()) {
        let mut filled = config;
        filled.fill_defaults();
        let mut again = filled.clone();
        again.fill_defaults();
        prop_assert_eq!(&again, &filled);
        prop_assert!(filled.serial.is_some() && (filled.kernel.cmdline.is_some() || filled.kernel.is_none()));
        prop_assert!(filled.devices.iter().all(|device| !device.id().is_empty()));
        // Whatever is wrong with it is told, never a panic.
        validate(&filled, &HostFacts::unlimited());
    }

    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        drop(parse(&text));
    }

    #[test]
    fn texts_of_yaml_marks_never_panic(text in "[a:\\-,\\[\\]{}&*!|>'\"%@`?# \n\t0~<.]{0,200}") {
        drop(parse(&text));
    }

    /// A configuration with something cut out of it or put into it: refused with at least one problem, or accepted.
    #[test]
    fn damaged_configurations_never_panic(config in config(), at in any::<prop::sample::Index>(), with in "[a:\\-\\[{\"0 \n]{0,3}", cut in 0_usize..4) {
        let text: Vec<char> = serde_json::to_string(&config).unwrap().chars().collect();
        let at = at.index(text.len());
        let damaged: String = text[..at].iter().copied().chain(with.chars()).chain(text[at..].iter().skip(cut).copied()).collect();
        if let Err(problems) = parse(&damaged) {
            prop_assert!(!problems.0.is_empty(), "refused without a reason: {}", damaged);
            for problem in &problems.0 {
                prop_assert!(!problem.problem.is_empty());
            }
        }
    }

    #[test]
    fn sizes_survive(bytes in any::<u64>()) {
        let size = ByteSize::new(bytes);
        prop_assert_eq!(size.to_string().parse::<ByteSize>().unwrap(), size);
    }

    #[test]
    fn arbitrary_sizes_and_addresses_never_panic(text in any::<String>()) {
        drop(text.parse::<ByteSize>());
        drop(text.parse::<MacAddr>());
    }

    #[test]
    fn addresses_survive(bytes in any::<[u8; 6]>()) {
        let mac = MacAddr::new(bytes);
        prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
    }
}

/// The time that this thread has had of a processor.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap().into()
}

#[test]
fn no_text_takes_long() {
    let fill = |unit: &str| unit.repeat(MAX_CONFIG_BYTES / unit.len());
    let mut laughs = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for level in 1..30 {
        laughs += &format!("a{level}: &a{level} [{}]\n", vec![format!("*a{}", level - 1); 10].join(", "));
    }
    let unknown: String = (0..60_000).map(|number| format!("field_{number}: 1\n")).collect();
    let devices: String = (0..15_000).map(|number| format!("- {{type: disk, path: '{number}', mode: ro}}\n")).collect();
    let conflicts: String = (0..30_000).map(|_| "- {type: disk, path: same, id: same}\n").collect();
    let texts = [
        laughs,
        unknown,
        format!("kernel: {{path: k}}\ndevices:\n{devices}"),
        format!("kernel: {{path: k}}\nx: 1\ndevices:\n{conflicts}")[..].chars().take(MAX_CONFIG_BYTES).collect(),
        fill("["),
        fill("{a: "),
        fill("- "),
        fill("? "),
        fill("a: &a b\n"),
        fill("same: 1\n"),
        fill("\n"),
        fill("'"),
        fill("\"\\u0041"),
        fill("kernel: |\n "),
        fill("!a "),
        fill("%A b\n"),
        fill("---\n"),
        fill("# c\n"),
        fill("a,"),
        format!("[{}]", fill("[],")),
        format!("{{{}}}", fill("a b, ")),
        format!("kernel: {{path: {}}}", fill("k")),
        format!("memory: {{size: {}}}", fill("1")),
        (0..700).map(|depth| " ".repeat(depth) + "a:\n").collect(),
    ];
    for text in texts {
        // The processor's time, not the clock's: others may keep the machine busy.
        let start = processor_time();
        drop(ConfigText::new("text", text.as_str()).parse());
        let took = processor_time() - start;
        let head: String = text.chars().take(40).collect();
        // A build without optimization needs about a tenth of this.
        assert!(took < Duration::from_secs(10), "{head:?} took {took:?}");
    }
}

#[test]
fn the_smallest_configuration_boots_with_a_log() {
    let mut config = parse("kernel: {path: vmlinuz}").unwrap();
    assert_eq!(config, VmConfig::new("vmlinuz"));
    config.fill_defaults();
    assert_eq!(config.serial, Some(Endpoint::Stdio {}));
    assert_eq!(config.kernel.cmdline.as_deref(), Some("console=ttyS0"));
    assert_eq!(config.memory.size.to_string(), "512M");
    assert_eq!((config.lifecycle.on_reset, config.lifecycle.on_panic), (OnReset::Restart, OnPanic::Exit));
    assert!(config.platform.pvpanic && !config.platform.debug_exit);
}

#[test]
fn the_log_follows_the_console() {
    let cmdline = |text: &str| {
        let mut config = parse(&format!("kernel: {{path: k}}\n{text}")).unwrap();
        config.fill_defaults();
        (config.serial.unwrap(), config.kernel.cmdline.unwrap())
    };
    let off = Endpoint::Off {};
    assert_eq!(cmdline("devices: [{type: console, endpoint: {type: stdio}}]"), (off.clone(), "console=hvc0".into()));
    assert_eq!(
        cmdline("devices: [{type: console, endpoint: {type: pty}}]"),
        (Endpoint::Stdio {}, "console=ttyS0 console=hvc0".into())
    );
    assert_eq!(
        cmdline("devices: [{type: console, name: agent, endpoint: {type: pty}}]"),
        (Endpoint::Stdio {}, "console=ttyS0".into())
    );
    assert_eq!(cmdline("serial: {type: off}"), (off, String::new()));
}

#[test]
fn devices_get_the_first_free_ids_and_their_own_addresses() {
    let text = "\
kernel: {path: k}
devices:
  - {type: disk, path: a}
  - {type: disk, path: b, id: disk0}
  - {type: net, tap: t0}
  - {type: net, tap: t1}
  - {type: rng}
";
    let mut config = parse(text).unwrap();
    config.fill_defaults();
    let ids: Vec<&str> = config.devices.iter().map(DeviceConfig::id).collect();
    assert_eq!(ids, ["disk1", "disk0", "net0", "net1", "rng0"]);
    let macs: Vec<MacAddr> = config
        .devices
        .iter()
        .filter_map(|device| match device {
            DeviceConfig::Net(net) => net.mac,
            _ => None,
        })
        .collect();
    assert_eq!(macs.len(), 2);
    assert_ne!(macs[0], macs[1]);
    for mac in macs {
        assert!(!mac.is_multicast() && mac.bytes()[0] & 2 != 0, "{mac}");
    }
    assert_eq!(validate(&config, &HostFacts::unlimited()), []);
}

#[test]
fn sizes_as_people_write_them() {
    for (text, bytes) in [
        ("4096", 4096),
        ("512M", 512 << 20),
        ("512MiB", 512 << 20),
        ("512Mi", 512 << 20),
        ("6GiB", 6 << 30),
        ("6 GiB", 6 << 30),
        ("2g", 2 << 30),
        ("1T", 1 << 40),
        ("64K", 65536),
        ("0", 0),
    ] {
        assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
    }
    for text in ["", "M", "1MB", "1kb", "1.5G", "-1", "1X", "1MM", "0x10", "1 000", "18446744073709551616", "16777216T"]
    {
        assert!(text.parse::<ByteSize>().is_err(), "{text}");
    }
}

#[test]
fn addresses_as_people_write_them() {
    assert_eq!("52:54:00:aB:CD:ef".parse::<MacAddr>().unwrap().to_string(), "52:54:00:ab:cd:ef");
    for text in
        ["", "52:54:00:12:34", "52:54:00:12:34:56:78", "52-54-00-12-34-56", "5:54:00:12:34:56", "+5:54:00:12:34:56"]
    {
        assert!(text.parse::<MacAddr>().is_err(), "{text}");
    }
}

#[test]
fn every_outcome_has_its_exit_code() {
    let crashed = Outcome::Crashed { reason: "triple fault on vCPU 0".into() };
    let codes = [
        (Outcome::PoweredOff, 0),
        (Outcome::Reset, 3),
        (Outcome::Panicked, 4),
        (crashed, 5),
        (Outcome::BootTimeout { reason: "30s".into() }, 6),
        (Outcome::Destroyed, 7),
        (Outcome::Failed { reason: "no memory".into() }, 1),
        (Outcome::DebugExit { value: 0 }, 64),
        (Outcome::DebugExit { value: 0xff }, 95),
        (Outcome::Quit, 130),
        (Outcome::Signalled { signal: 15 }, 143),
    ];
    for (outcome, code) in codes {
        assert_eq!(outcome.exit_code(), code, "{outcome}");
    }
}

#[test]
fn the_examples_are_configurations_without_problems() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "yaml") {
            let source = ConfigText::read(&path).unwrap();
            let mut config = source.parse().unwrap_or_else(|problems| panic!("{}: {problems}", path.display()));
            config.fill_defaults();
            assert_eq!(validate(&config, &HostFacts::unlimited()), [], "{}", path.display());
            seen += 1;
        }
    }
    assert!(seen >= 2, "only {seen} examples in {directory}");
}

#[test]
fn spans_of_time_are_written_with_a_unit() {
    let cases = [("30s", 30_000), ("500ms", 500), ("2m", 120_000), ("1h", 3_600_000), (" 90 s ", 90_000), ("0s", 0)];
    for (text, millis) in cases {
        assert_eq!(text.parse(), Ok(TimeSpan::from_millis(millis)), "{text}");
    }
    for (millis, text) in [(90_000, "90s"), (120_000, "2m"), (1500, "1500ms"), (7_200_000, "2h"), (0, "0s")] {
        assert_eq!(TimeSpan::from_millis(millis).to_string(), text);
    }
    for text in ["30", "s", "", "-1s", "1.5s", "3 days", "99999999999999999999s", "18446744073709551615h"] {
        let error = text.parse::<TimeSpan>().unwrap_err().to_string();
        assert!(error.contains("is not a span of time"), "{error}");
    }
    let error = parse("kernel: {path: k}\nlifecycle: {boot_timeout: 30}\n").unwrap_err().to_string();
    assert!(error.contains("a text must stand here, not the number 30"), "{error}");
    let error = parse("kernel: {path: k}\nlifecycle: {boot_timeout: 30 days}\n").unwrap_err().to_string();
    assert!(error.contains("write a whole number with ms, s, m or h"), "{error}");
    let config = parse("kernel: {path: k}\nlifecycle: {boot_timeout: 0s}\n").unwrap();
    assert_eq!(validate(&config, &HostFacts::unlimited()).len(), 1);
}
