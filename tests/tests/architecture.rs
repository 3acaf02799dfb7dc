//! The house's rules, held by machine: arrows between crates, one door for `cfg`, one version of each rust-vmm
//! crate, sizes of files, and where the hypervisor and `unsafe` may be named.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const CRATES: [&str; 8] = ["hal", "arch", "devices", "api", "vmm", "verify", "tests", "tests/qgs"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate lies in the workspace").to_path_buf()
}

fn manifest(dir: &str) -> toml::Table {
    let path = root().join(dir).join("Cargo.toml");
    fs::read_to_string(&path).expect("a manifest can be read").parse().expect("a manifest is TOML")
}

/// Every Rust source below a crate's `folder`, with its text.
fn sources(dir: &str, folder: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(dir).join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("a folder can be listed").path()) {
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source is UTF-8");
                found.push((path.strip_prefix(root()).expect("below the root").to_path_buf(), text));
            }
        }
    }
    found.sort();
    found
}

/// A source without its unit tests, which stand at its end.
fn without_tests(text: &str) -> &str {
    match text.find("\n#[cfg(test)]\nmod ") {
        Some(end) if text[end..].contains('{') => &text[..end],
        _ => text,
    }
}

/// A line without its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

#[test]
fn crates_know_each_other_only_along_the_arrows() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("hal", &[][..]),
        ("arch", &["hal"][..]),
        ("devices", &[][..]),
        ("api", &[][..]),
        ("vmm", &["api", "arch", "devices", "hal"][..]),
        ("verify", &["api"][..]),
        ("tests", &["api"][..]),
        ("tests/qgs", &[][..]),
    ]);
    for dir in CRATES {
        let manifest = manifest(dir);
        let mut found = BTreeSet::new();
        for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
            if let Some(dependencies) = manifest.get(table).and_then(toml::Value::as_table) {
                found.extend(dependencies.keys().filter(|name| CRATES.contains(&name.as_str())).cloned());
            }
        }
        let expected: BTreeSet<String> = allowed[dir].iter().map(ToString::to_string).collect();
        assert!(found.is_subset(&expected), "{dir} depends on {found:?}, and only {expected:?} is allowed");
    }
}

#[test]
fn there_are_no_cargo_features_and_versions_stand_in_one_table() {
    for dir in CRATES {
        let manifest = manifest(dir);
        assert!(!manifest.contains_key("features"), "{dir}/Cargo.toml has [features]");
        for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
            let Some(dependencies) = manifest.get(table).and_then(toml::Value::as_table) else { continue };
            for (name, value) in dependencies {
                let shared = value.get("workspace").and_then(toml::Value::as_bool) == Some(true);
                assert!(shared, "{dir}/Cargo.toml names a version of {name} instead of workspace = true");
            }
        }
        let lints = manifest.get("lints").and_then(|lints| lints.get("workspace")).and_then(toml::Value::as_bool);
        assert_eq!(lints, Some(true), "{dir}/Cargo.toml does not use the workspace's lints");
    }
}

#[test]
fn cfg_stands_only_where_a_module_is_chosen() {
    let mut found = BTreeMap::new();
    for (path, text) in CRATES.iter().flat_map(|dir| sources(dir, "src")) {
        let count = without_tests(&text)
            .lines()
            .map(code)
            .filter(|line| ["#[cfg(", "#![cfg(", "cfg!(", "cfg_attr("].iter().any(|word| line.contains(word)))
            .filter(|line| !line.contains("cfg(test)"))
            .count();
        if count > 0 {
            found.insert(path.display().to_string(), count);
        }
    }
    let most = BTreeMap::from([("hal/src/lib.rs", 4), ("arch/src/lib.rs", 4)]);
    for (path, count) in found {
        let limit = most.get(path.as_str()).copied().unwrap_or(0);
        assert!(count <= limit, "{path} has {count} cfg, and {limit} are allowed there");
    }
}

#[test]
fn one_version_of_each_rust_vmm_crate() {
    const FAMILY: [&str; 14] = [
        "acpi_tables",
        "event-manager",
        "kvm-bindings",
        "kvm-ioctls",
        "linux-loader",
        "seccompiler",
        "vfio-bindings",
        "vhost",
        "virtio-bindings",
        "virtio-queue",
        "vm-allocator",
        "vm-memory",
        "vm-superio",
        "vmm-sys-util",
    ];
    let lock: toml::Table =
        fs::read_to_string(root().join("Cargo.lock")).expect("Cargo.lock").parse().expect("Cargo.lock is TOML");
    let mut versions: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for package in lock["package"].as_array().expect("packages") {
        let name = package["name"].as_str().expect("a name");
        if FAMILY.contains(&name) {
            versions.entry(name).or_default().push(package["version"].as_str().expect("a version"));
        }
    }
    assert!(versions.contains_key("vm-memory"), "the lock file names no vm-memory: is the check still right?");
    for (name, versions) in versions {
        assert_eq!(versions.len(), 1, "{name} is there in versions {versions:?}");
    }
}

#[test]
fn only_the_kvm_backend_speaks_kvm() {
    for (path, text) in CRATES.iter().flat_map(|dir| sources(dir, "src")) {
        // The floor of the benchmark is a bare program of ioctls, and no part of the monitor.
        if path.starts_with("hal/src/kvm") || path.starts_with("tests") {
            continue;
        }
        for (number, line) in without_tests(&text).lines().enumerate() {
            let code = code(line);
            let named = code.contains("kvm_ioctls") || code.contains("kvm_bindings") || code.contains("/dev/kvm");
            let fine = path.starts_with("vmm/src/cli");
            assert!(!named || fine, "{}:{} names KVM: {line}", path.display(), number + 1);
        }
    }
}

#[test]
fn a_source_file_stays_under_600_lines() {
    for (path, text) in CRATES.iter().flat_map(|dir| sources(dir, "src")) {
        if path.ends_with("tests.rs") {
            continue;
        }
        let lines = without_tests(&text).lines().count();
        let reasoned = text.lines().take(30).any(|line| line.contains("Longer than 600 lines because"));
        assert!(lines <= 600 || reasoned, "{} has {lines} lines without its tests", path.display());
    }
}

#[test]
fn unsafe_is_excepted_by_name_with_a_reason() {
    for (path, text) in CRATES.iter().flat_map(|dir| sources(dir, "src")) {
        for (number, line) in text.lines().enumerate() {
            let line = code(line);
            let place = format!("{}:{}", path.display(), number + 1);
            assert!(!line.contains("allow(unsafe_code"), "{place}: use #[expect(unsafe_code, reason = ...)]");
            assert!(!line.contains("todo!(") && !line.contains("unimplemented!("), "{place}: unfinished work");
        }
    }
}

#[test]
fn no_mirror_and_no_machine_is_named() {
    let listed = std::process::Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    let Ok(listed) = listed else { return };
    let forbidden =
        ["deb.".to_owned() + "debian.org", "static.".to_owned() + "crates.io", "/work/".to_owned() + "main"];
    for name in String::from_utf8_lossy(&listed.stdout).split('\0').filter(|name| !name.is_empty()) {
        let Ok(text) = fs::read_to_string(root().join(name)) else { continue };
        for word in &forbidden {
            assert!(!text.contains(word.as_str()), "{name} names {word}");
        }
    }
}
