//! From flags to a configuration. Nothing fails early: every problem is collected, each with the flag that has it.

use std::path::PathBuf;
use std::str::FromStr;

use api::{
    BootUntil, ByteSize, Confidential, Console, DeviceConfig, Disk, Endpoint, Firmware, Hugepages, KindName, Link,
    MacAddr, Net, OnPanic, OnReset, Problem, Rng, Tdx, Topology, Vfio, VmConfig, did_you_mean,
};

use vmm::sandbox::Mode;
use vmm::server::{Access, ApiSocket};

use super::args::RunArgs;
use super::keys::{Pair, pairs};

/// A configuration that flags have changed, and where its fields come from.
#[derive(Debug, Default)]
pub struct Flags {
    /// What is wrong with the flags.
    pub problems: Vec<Problem>,
    /// Paths of fields, each with the flag that set it.
    origins: Vec<(String, String)>,
}

impl Flags {
    /// Changes `config` as `args` say: a flag for a single field replaces it, a flag for a device adds one.
    pub fn apply(&mut self, args: &RunArgs, config: &mut VmConfig) {
        self.boot(args, config);
        if let Some(text) = &args.boot_timeout {
            self.boot_timeout(text, config);
        }
        if let Some(text) = &args.cpus {
            self.cpus(text, config);
        }
        if let Some(text) = &args.memory {
            self.memory(text, config);
        }
        if let Some(text) = &args.confidential {
            self.confidential(text, config);
        }
        self.choose(
            "lifecycle.on_reset",
            "--on-reset",
            args.on_reset.as_deref(),
            &RESETS,
            &mut config.lifecycle.on_reset,
        );
        self.choose(
            "lifecycle.on_panic",
            "--on-panic",
            args.on_panic.as_deref(),
            &PANICS,
            &mut config.lifecycle.on_panic,
        );
        self.choose("platform.pvpanic", "--pvpanic", args.pvpanic.as_deref(), &SWITCH, &mut config.platform.pvpanic);
        config.platform.debug_exit |= args.debug_exit;
        if let Some(text) = &args.hotplug_ports {
            self.origin("pci.hotplug_ports", "--hotplug-ports", text);
            let at = format!("--hotplug-ports {}", brief(text));
            match text.parse() {
                Ok(ports) => config.pci.hotplug_ports = ports,
                Err(_) => self.add(&at, "it is no number of ports", "0 to 224 are possible"),
            }
        }
        self.devices(args, config);
    }

    /// What boots: firmware, kernel and what the kernel gets.
    fn boot(&mut self, args: &RunArgs, config: &mut VmConfig) {
        if let Some(kernel) = &args.kernel {
            self.origin("kernel.path", "--kernel", kernel);
            config.kernel.path = kernel.into();
        } else if args.config.is_none() && args.firmware.is_none() {
            self.origins.push(("kernel.path".to_owned(), "--kernel".to_owned()));
            let remedy =
                "give --kernel FILE, --config FILE with a kernel in it, or --firmware FILE, which finds one on a disk";
            self.add("--kernel", "no kernel is named", remedy);
        }
        if let Some(firmware) = &args.firmware {
            self.origin("firmware.path", "--firmware", firmware);
            config.firmware = Some(Firmware { path: firmware.into() });
        }
        if let Some(initramfs) = &args.initramfs {
            self.origin("kernel.initramfs", "--initramfs", initramfs);
            config.kernel.initramfs = Some(initramfs.into());
        }
        if let Some(cmdline) = &args.cmdline {
            self.origin("kernel.cmdline", "--cmdline", cmdline);
            config.kernel.cmdline = Some(cmdline.clone());
        }
        if let Some(cache) = &args.kernel_cache {
            self.origin("kernel.cache", "--kernel-cache", cache);
            config.kernel.cache = PathBuf::from(cache).into();
        }
        if let Some(map) = &args.system_map {
            self.origin("kernel.system_map", "--system-map", map);
            config.kernel.system_map = Some(map.into());
        }
    }

    /// What `--sandbox` says. It is no part of the configuration: whoever may configure the VM is not who decides on the
    /// walls around it.
    pub fn sandbox(&mut self, text: Option<&str>) -> Mode {
        let Some(text) = text else { return Mode::On };
        self.word(&format!("--sandbox {}", brief(text)), text, &SANDBOXES).unwrap_or(Mode::On)
    }

    /// A problem with the flag that has it in the place of the configuration's field, where a flag set the field.
    /// `None` where the field comes from elsewhere.
    pub fn trace(&self, problem: &Problem) -> Option<Problem> {
        let (field, flag) = self.origin_of(problem)?;
        let rest = problem.field.get(field.len()..)?;
        let field = match rest.trim_start_matches('.') {
            "" => flag.to_owned(),
            rest => format!("{flag}: {rest}"),
        };
        Some(Problem::new(field, problem.problem.as_str(), problem.remedy.as_str()))
    }

    /// The problem's field was set by a flag that could not be understood as a whole.
    pub fn left_default(&self, problem: &Problem) -> bool {
        let Some((_, flag)) = self.origin_of(problem) else { return false };
        let of_flag = |rest: &str| rest.is_empty() || rest.starts_with(": ");
        self.problems.iter().filter_map(|known| known.field.strip_prefix(flag)).any(of_flag)
    }

    /// What `--api-socket` says.
    pub fn api_socket(&mut self, text: Option<&str>) -> Option<ApiSocket> {
        let text = text?;
        let at = format!("--api-socket {}", brief(text));
        let (mut path, mut fd, mut access) = (None, None, Access::default());
        for Pair { key, value } in self.list(&at, text, Some("path"), &["path", "fd", "mode", "uid", "gid"]) {
            match key.as_str() {
                "path" => path = self.given(&at, &key, value).map(PathBuf::from),
                "fd" => fd = self.value(&at, &key, value, "the number of a descriptor"),
                "uid" => access.uid = self.value(&at, &key, value, "the number of a user"),
                "gid" => access.gid = self.value(&at, &key, value, "the number of a group"),
                _ => {
                    let Some(value) = self.given(&at, &key, value) else { continue };
                    match u32::from_str_radix(&value, 8).ok().filter(|mode| *mode <= 0o777) {
                        Some(mode) => access.mode = mode,
                        None => self.add(&at, format!("mode: «{}» is no mode", brief(&value)), "write 0600 or 0660"),
                    }
                }
            }
        }
        match (path, fd) {
            (Some(path), None) if !path.as_os_str().is_empty() => Some(ApiSocket::Path { path, access }),
            (None, Some(fd)) => Some(ApiSocket::Fd(fd)),
            _ => {
                self.add(&at, "it names no socket, or more than one", "give a path, or fd=N");
                None
            }
        }
    }

    /// A flag that is needed is not there.
    pub fn missing(&mut self, flag: &str, problem: &str, remedy: &str) {
        self.add(flag, problem, remedy);
    }

    fn origin_of(&self, problem: &Problem) -> Option<(&str, &str)> {
        let fitting = self.origins.iter().filter(|(field, _)| problem.field.starts_with(field.as_str()));
        fitting.max_by_key(|(field, _)| field.len()).map(|(field, flag)| (field.as_str(), flag.as_str()))
    }

    fn origin(&mut self, field: impl Into<String>, flag: &str, value: &str) {
        self.origins.push((field.into(), format!("{flag} {}", brief(value))));
    }

    /// Sets a field to what a flag's word stands for.
    fn choose<T: Copy>(&mut self, field: &str, flag: &str, text: Option<&str>, words: &[(&str, T)], into: &mut T) {
        let Some(text) = text else { return };
        self.origin(field, flag, text);
        if let Some(chosen) = self.word(&format!("{flag} {}", brief(text)), text, words) {
            *into = chosen;
        }
    }

    fn devices(&mut self, args: &RunArgs, config: &mut VmConfig) {
        for text in &args.disk {
            self.device("--disk", text, config, Self::disk);
        }
        for text in &args.net {
            self.device("--net", text, config, Self::net);
        }
        if let Some(text) = &args.serial {
            self.origin("serial", "--serial", text);
            let at = format!("--serial {}", brief(text));
            let parts = self.list(&at, text, None, &ENDPOINT_KEYS);
            config.serial = self.endpoint(&at, &parts).or(config.serial.take());
        }
        for text in &args.console {
            self.device("--console", text, config, Self::console);
        }
        if let Some(text) = &args.rng {
            self.device("--rng", text, config, Self::rng);
        }
        for text in &args.vfio {
            self.device("--vfio", text, config, Self::vfio);
        }
    }

    /// Adds the device that a flag describes. `read` gives the device even where parts of it are wrong, so that the
    /// numbers of the devices behind it stay right.
    fn device(
        &mut self,
        flag: &str,
        text: &str,
        config: &mut VmConfig,
        read: impl FnOnce(&mut Self, &str, &str) -> DeviceConfig,
    ) {
        self.origin(format!("devices[{}]", config.devices.len()), flag, text);
        config.devices.push(read(self, &format!("{flag} {}", brief(text)), text));
    }

    fn disk(&mut self, at: &str, text: &str) -> DeviceConfig {
        let mut disk = Disk { path: None, ..Disk::new("") };
        for Pair { key, value } in
            self.list(at, text, Some("path"), &["path", "fd", "readonly", "size", "direct", "serial", "queues", "id"])
        {
            match key.as_str() {
                "readonly" => disk.readonly = self.on(at, &key, value),
                "size" => disk.size = self.unit::<ByteSize>(at, &key, value),
                "direct" => disk.direct = self.on(at, &key, value),
                "fd" => disk.fd = self.value(at, &key, value, "the number of a descriptor"),
                "queues" => disk.queues = self.value(at, &key, value, "a number").unwrap_or(disk.queues),
                _ => {
                    let Some(value) = self.given(at, &key, value) else { continue };
                    match key.as_str() {
                        "path" => disk.path = Some(value.into()),
                        "serial" => disk.serial = Some(value),
                        _ => disk.id = value,
                    }
                }
            }
        }
        DeviceConfig::Disk(disk)
    }

    fn net(&mut self, at: &str, text: &str) -> DeviceConfig {
        let mut net = Net::default();
        for Pair { key, value } in self.list(at, text, Some("tap"), &["tap", "fd", "mac", "mtu", "link", "id"]) {
            match key.as_str() {
                "fd" => net.fd = self.value(at, &key, value, "the number of a descriptor"),
                "mtu" => net.mtu = self.value(at, &key, value, "a number of bytes"),
                "mac" => net.mac = self.unit::<MacAddr>(at, &key, value),
                "link" => {
                    let word = self.given(at, &key, value).unwrap_or_default();
                    net.link = self.word(&format!("{at}: {key}"), &word, &LINKS).unwrap_or_default();
                }
                "tap" => net.tap = self.given(at, &key, value),
                _ => net.id = self.given(at, &key, value).unwrap_or_default(),
            }
        }
        DeviceConfig::Net(net)
    }

    fn console(&mut self, at: &str, text: &str) -> DeviceConfig {
        let known = [ENDPOINT_KEYS.as_slice(), &["name", "id"]].concat();
        let (own, endpoint): (Vec<_>, Vec<_>) =
            self.list(at, text, None, &known).into_iter().partition(|pair| matches!(pair.key.as_str(), "name" | "id"));
        let endpoint = self.endpoint(at, &endpoint).unwrap_or(Endpoint::Off {});
        let mut console = Console { id: String::new(), name: None, endpoint };
        for Pair { key, value } in own {
            match key.as_str() {
                "name" => console.name = self.given(at, &key, value),
                _ => console.id = self.given(at, &key, value).unwrap_or_default(),
            }
        }
        DeviceConfig::Console(console)
    }

    fn rng(&mut self, at: &str, text: &str) -> DeviceConfig {
        let mut rng = Rng::default();
        if text.is_empty() {
            return DeviceConfig::Rng(rng);
        }
        for Pair { key, value } in self.list(at, text, None, &["id"]) {
            rng.id = self.given(at, &key, value).unwrap_or_default();
        }
        DeviceConfig::Rng(rng)
    }

    fn vfio(&mut self, at: &str, text: &str) -> DeviceConfig {
        let mut vfio = Vfio::default();
        for Pair { key, value } in self.list(at, text, Some("host"), &["host", "fd", "iommu_fd", "id"]) {
            match key.as_str() {
                "fd" => vfio.fd = self.value(at, &key, value, "the number of a descriptor"),
                "iommu_fd" => vfio.iommu_fd = self.value(at, &key, value, "the number of a descriptor"),
                "host" => vfio.host = self.given(at, &key, value),
                _ => vfio.id = self.given(at, &key, value).unwrap_or_default(),
            }
        }
        DeviceConfig::Vfio(vfio)
    }

    fn endpoint(&mut self, at: &str, parts: &[Pair]) -> Option<Endpoint> {
        const CHOICE: &str = "choose stdio, pty, api, off, file=PATH or socket=PATH";
        let [Pair { key, value }] = parts else {
            let problem = if parts.is_empty() { "it does not say where it leads" } else { "it leads to more than one" };
            self.add(at, problem, CHOICE);
            return None;
        };
        let path = value.as_ref().map(PathBuf::from);
        match (key.as_str(), path) {
            ("stdio", None) => Some(Endpoint::Stdio {}),
            ("pty", None) => Some(Endpoint::Pty {}),
            ("api", None) => Some(Endpoint::Api {}),
            ("off", None) => Some(Endpoint::Off {}),
            ("file", Some(path)) => Some(Endpoint::File { path }),
            ("socket", Some(path)) => Some(Endpoint::Socket { path }),
            (_, Some(_)) => {
                self.add(at, format!("«{key}» takes no value"), CHOICE);
                None
            }
            (_, None) => {
                self.add(at, format!("«{key}» needs a path"), format!("write {key}=PATH"));
                None
            }
        }
    }

    fn cpus(&mut self, text: &str, config: &mut VmConfig) {
        let at = format!("--cpus {}", brief(text));
        self.origin("cpus", "--cpus", text);
        let (mut max, mut topology) = (None, None);
        for Pair { key, value } in self.list(&at, text, Some("count"), &["count", "max", "sockets", "cores", "threads"])
        {
            let number: Option<u32> = self.value(&at, &key, value, "a whole number");
            let Some(number) = number else { continue };
            match key.as_str() {
                "count" => config.cpus.count = number,
                "max" => max = Some(number),
                "sockets" => topology.get_or_insert(Topology::default()).sockets = number,
                "cores" => topology.get_or_insert(Topology::default()).cores = number,
                _ => topology.get_or_insert(Topology::default()).threads = number,
            }
        }
        (config.cpus.max, config.cpus.topology) = (max, topology);
    }

    fn memory(&mut self, text: &str, config: &mut VmConfig) {
        let at = format!("--memory {}", brief(text));
        self.origin("memory", "--memory", text);
        let known = [
            "size",
            "max",
            "resize_timeout",
            "hugepages",
            "transparent_huge_pages",
            "prefault",
            "shared",
            "lock",
            "share_kernel",
        ];
        let sizes = [("off", Hugepages::Off), ("2M", Hugepages::Size2M), ("1G", Hugepages::Size1G)];
        let memory = &mut config.memory;
        for Pair { key, value } in self.list(&at, text, Some("size"), &known) {
            match key.as_str() {
                "size" => memory.size = self.unit(&at, &key, value).unwrap_or(memory.size),
                "max" => memory.max = self.unit(&at, &key, value).or(memory.max),
                "resize_timeout" => {
                    memory.resize_timeout = self.unit(&at, &key, value).unwrap_or(memory.resize_timeout)
                }
                "hugepages" => {
                    let word =
                        self.given(&at, &key, value).and_then(|word| self.word(&format!("{at}: {key}"), &word, &sizes));
                    memory.hugepages = word.unwrap_or(memory.hugepages);
                }
                "transparent_huge_pages" => memory.transparent_huge_pages = self.on(&at, &key, value),
                "prefault" => memory.prefault = self.on(&at, &key, value),
                "shared" => memory.shared = self.on(&at, &key, value),
                "lock" => memory.lock = self.on(&at, &key, value),
                _ => memory.share_kernel = self.on(&at, &key, value),
            }
        }
    }

    fn confidential(&mut self, text: &str, config: &mut VmConfig) {
        let at = format!("--confidential {}", brief(text));
        self.origin("confidential", "--confidential", text);
        let known = ["kind", "sept_ve_disable", "config_id", "owner", "owner_config", "quote_service"];
        let (mut kind, mut tdx, mut only_tdx) = (None, Tdx::default(), None);
        for Pair { key, value } in self.list(&at, text, Some("kind"), &known) {
            if key == "kind" {
                let word = self.given(&at, &key, value);
                kind = word.and_then(|word| self.word(&at, &word, &KINDS));
                continue;
            }
            match key.as_str() {
                "sept_ve_disable" => tdx.sept_ve_disable = self.on(&at, &key, value),
                "config_id" => tdx.config_id = self.unit(&at, &key, value),
                "owner" => tdx.owner = self.unit(&at, &key, value),
                "owner_config" => tdx.owner_config = self.unit(&at, &key, value),
                _ => tdx.quote_service = self.unit(&at, &key, value),
            }
            only_tdx = Some(key);
        }
        if let (Some(kind), Some(key)) = (kind.filter(|kind| *kind != KindName::Tdx), only_tdx) {
            self.add(&at, format!("a VM of the kind {kind} has no «{key}»"), "only tdx has");
        }
        config.confidential = match kind {
            Some(KindName::Tdx) => Some(Confidential::Tdx(tdx)),
            Some(KindName::Snp) => Some(Confidential::Snp {}),
            Some(KindName::SoftwareProtected) => Some(Confidential::SoftwareProtected {}),
            Some(KindName::Standard) | None => None,
        };
    }

    fn boot_timeout(&mut self, text: &str, config: &mut VmConfig) {
        let at = format!("--boot-timeout {}", brief(text));
        self.origin("lifecycle.boot_timeout", "--boot-timeout", text);
        let words = [("user-mode", BootUntil::UserMode), ("told", BootUntil::Told)];
        for Pair { key, value } in self.list(&at, text, Some("time"), &["time", "until"]) {
            if key == "time" {
                config.lifecycle.boot_timeout = self.unit(&at, &key, value);
            } else {
                let word = self.given(&at, &key, value);
                let word = word.and_then(|word| self.word(&format!("{at}: {key}"), &word, &words));
                config.lifecycle.boot_until = word.unwrap_or_default();
            }
        }
    }

    fn list(&mut self, at: &str, text: &str, first: Option<&str>, known: &[&str]) -> Vec<Pair> {
        let flag = at.split(' ').next().unwrap_or(at);
        let (parts, problems) = pairs(text, flag, first, known);
        self.problems.extend(problems.into_iter().map(|problem| Problem::new(at, problem, "")));
        parts
    }

    fn add(&mut self, at: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem::new(at, problem, remedy));
    }

    /// The value of a key that needs one.
    fn given(&mut self, at: &str, key: &str, value: Option<String>) -> Option<String> {
        if value.is_none() {
            self.add(at, format!("the key «{key}» has no value"), format!("write {key}=VALUE"));
        }
        value
    }

    /// The value of a key that is on where it stands alone.
    fn on(&mut self, at: &str, key: &str, value: Option<String>) -> bool {
        let Some(value) = value else { return true };
        self.word(&format!("{at}: {key}"), &value, &SWITCH).unwrap_or_default()
    }

    fn value<T: FromStr>(&mut self, at: &str, key: &str, value: Option<String>, expected: &str) -> Option<T> {
        let text = self.given(at, key, value)?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            self.add(at, format!("{key}: «{}» is not possible", brief(&text)), format!("write {expected}"));
        }
        parsed
    }

    /// A value whose own error says what would be right.
    fn unit<T: FromStr<Err = api::UnitError>>(&mut self, at: &str, key: &str, value: Option<String>) -> Option<T> {
        let text = self.given(at, key, value)?;
        text.parse().map_err(|error: api::UnitError| self.add(at, format!("{key}: {error}"), "")).ok()
    }

    fn word<T: Copy>(&mut self, at: &str, text: &str, words: &[(&str, T)]) -> Option<T> {
        let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
        if found.is_none() {
            let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
            let hint = did_you_mean(text, known.iter().copied());
            let hint = hint.map_or(String::new(), |word| format!("did you mean «{word}»? "));
            self.add(at, format!("«{}» is not possible", brief(text)), format!("{hint}known: {}", known.join(", ")));
        }
        found
    }
}

const KINDS: [(&str, KindName); 3] =
    [("tdx", KindName::Tdx), ("snp", KindName::Snp), ("software-protected", KindName::SoftwareProtected)];

const RESETS: [(&str, OnReset); 2] = [("restart", OnReset::Restart), ("exit", OnReset::Exit)];
const PANICS: [(&str, OnPanic); 3] =
    [("exit", OnPanic::Exit), ("restart", OnPanic::Restart), ("ignore", OnPanic::Ignore)];
const SANDBOXES: [(&str, Mode); 3] = [("on", Mode::On), ("off", Mode::Off), ("log", Mode::Log)];
const SWITCH: [(&str, bool); 2] = [("on", true), ("off", false)];

/// Words for a network card's link.
const LINKS: [(&str, Link); 2] = [("up", Link::Up), ("down", Link::Down)];

/// The keys of an endpoint, of which one is given.
const ENDPOINT_KEYS: [&str; 6] = ["stdio", "pty", "api", "off", "file", "socket"];

/// A flag's value, cut so that a message stays readable.
fn brief(text: &str) -> String {
    const LONGEST: usize = 80;
    let mut brief: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if text.chars().count() > LONGEST {
        brief.push('…');
    }
    brief
}
