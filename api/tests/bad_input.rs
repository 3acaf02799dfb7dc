//! Texts and files that are no configurations, each with the messages that it gets.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use api::{ConfigText, DeviceConfig, Hugepages, MAX_CONFIG_BYTES, parse};

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
            "vm.yaml:14:11: devices[0].type: «disc» is no type here; did you mean «disk»? Known are: disk, net, console, rng, vfio",
            "vm.yaml:16:5: devices[1].type: it is missing; it is one of: disk, net, console, rng, vfio",
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

#[test]
fn what_other_yaml_dialects_misread_is_read_right() {
    let config = parse("kernel: {path: no, cmdline: 'on'}\nmemory: {hugepages: off}\ndevices: [{type: net, tap: y, mac: 00:11:22:33:44:55}]\n").unwrap();
    assert_eq!(config.kernel.path.to_str(), Some("no"));
    assert_eq!(config.memory.hugepages, Hugepages::Off);
    let DeviceConfig::Net(net) = &config.devices[0] else { panic!("no net") };
    assert_eq!(net.tap.as_deref(), Some("y"));
    assert_eq!(net.mac.unwrap().to_string(), "00:11:22:33:44:55");
}
