//! Compiles the system-call policies of `resources/seccomp` into the program, so that none is parsed at a start.

#[path = "build/compile.rs"]
mod compile;

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::{env, fs};

use compile::{POLICIES, Policy, X86_64};

fn main() {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("../resources/seccomp");
    println!("cargo::rerun-if-changed={}", folder.display());
    println!("cargo::rerun-if-changed=build");
    // Relocations of a static executable that can lie anywhere, as bits instead of 24 bytes each (DT_RELR; glibc 2.36).
    println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    let target = env::var("CARGO_CFG_TARGET_ARCH").expect("cargo sets it");
    assert_eq!(target, "x86_64", "the policies' ioctls are those of x86-64");
    let mut source = String::new();
    for (kind, lists) in POLICIES {
        let mut policy = Policy::default();
        for list in lists {
            let path = folder.join(list).with_extension("json");
            let json = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let number = |name: &str| name.parse().ok().and_then(|call: syscalls::Sysno| u32::try_from(call.id()).ok());
            policy.add(&json, list, number).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        }
        let program = policy.compile(X86_64);
        let name = kind.to_uppercase();
        writeln!(source, "/// What threads of the kind `{kind}` may do.").expect("a string has room");
        writeln!(source, "pub static {name}: [sock_filter; {}] = [", program.len()).expect("a string has room");
        for compile::Instruction { code, jt, jf, k } in program {
            writeln!(source, "    sock_filter {{ code: {code}, jt: {jt}, jf: {jf}, k: {k} }},").expect("room");
        }
        source.push_str("];\n");
    }
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it")).join("policies.rs");
    fs::write(&out, source).unwrap_or_else(|error| panic!("{}: {error}", out.display()));
}
