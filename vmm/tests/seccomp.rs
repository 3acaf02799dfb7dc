//! The compiled policies say the same as seccompiler's own compiler, call by call, and allow nothing that would make
//! the rest of them worthless.

#[path = "../build/compile.rs"]
mod compile;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use compile::{ALLOW, AND, IF_AT_LEAST, IF_EQUAL, Instruction, JUMP, LOAD, POLICIES, Policy, RETURN, TRAP, X86_64};
use serde_json::Value;
use syscalls::Sysno;

/// `AUDIT_ARCH_I386`.
const I386: u32 = 0x4000_0003;
/// What calls of another architecture get: `SECCOMP_RET_KILL_PROCESS`.
const KILL: u32 = 0x8000_0000;

fn list(name: &str) -> (String, Value) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/seccomp").join(name).with_extension("json");
    let text = fs::read_to_string(&path).unwrap();
    let json: Value = serde_json::from_str(&text).unwrap();
    let rules = json[name]["filter"].clone();
    (text, rules)
}

fn number(name: &str) -> Option<u32> {
    name.parse().ok().map(|call: Sysno| u32::try_from(call.id()).unwrap())
}

/// What a program answers to a call, as the kernel runs it.
fn run(program: &[Instruction], architecture: u32, call: u32, args: [u64; 6]) -> u32 {
    let mut data = [call.to_le_bytes(), architecture.to_le_bytes(), [0; 4], [0; 4]].concat();
    args.iter().for_each(|arg| data.extend(arg.to_le_bytes()));
    let (mut at, mut word) = (0, 0_u32);
    loop {
        let Instruction { code, jt, jf, k } = program[at];
        at += 1;
        let jump = |holds| usize::from(if holds { jt } else { jf });
        match code {
            LOAD => word = u32::from_le_bytes(data[k as usize..][..4].try_into().unwrap()),
            AND => word &= k,
            JUMP => at += k as usize,
            IF_EQUAL => at += jump(word == k),
            IF_AT_LEAST => at += jump(word >= k),
            RETURN => return k,
            // seccompiler's own.
            0x25 => at += jump(word > k),
            0x45 => at += jump(word & k != 0),
            _ => panic!("an instruction of code {code:#x}"),
        }
    }
}

/// Every policy, as it is compiled here and by seccompiler, and the rules that it consists of.
fn policies() -> impl Iterator<Item = (&'static str, Vec<Instruction>, Vec<Instruction>, Vec<Value>)> {
    POLICIES.iter().map(|(name, lists)| {
        let mut policy = Policy::default();
        let mut rules = Vec::new();
        for one in *lists {
            let (text, value) = list(one);
            policy.add(&text, one, number).unwrap();
            rules.extend(value.as_array().unwrap().clone());
        }
        // seccompiler wants calls without conditions by themselves.
        let always: BTreeSet<String> =
            rules.iter().filter(|rule| rule.get("args").is_none()).map(|rule| rule["syscall"].to_string()).collect();
        let filter: Vec<&Value> = rules
            .iter()
            .filter(|rule| rule.get("args").is_none() || !always.contains(&rule["syscall"].to_string()))
            .collect();
        let json = serde_json::json!({"p": {"default_action": "trap", "filter_action": "allow", "filter": filter}});
        let target = seccompiler::TargetArch::x86_64;
        let compiled = seccompiler::compile_from_json(json.to_string().as_bytes(), target).unwrap();
        let reference =
            compiled["p"].iter().map(|i| Instruction { code: i.code, jt: i.jt, jf: i.jf, k: i.k }).collect();
        (*name, policy.compile(X86_64), reference, rules)
    })
}

#[test]
fn the_compiler_agrees_with_seccompilers() {
    for (name, ours, reference, rules) in policies() {
        let named = rules.iter().flat_map(|rule| rule["args"].as_array().into_iter().flatten());
        let values: BTreeSet<u64> = named.map(|arg| arg["val"].as_u64().unwrap()).collect();
        let near =
            values.iter().flat_map(|value| [*value, value ^ 1, value + 2, value | 1 << 40, value | 7, value & !4]);
        let words: Vec<u64> = near.chain([0, 1, 3, 4, 5, u64::MAX]).collect();
        let mut allowed = 0;
        for call in (0..700).chain([0x4000_0000, 0x4000_0010, u32::MAX]) {
            let by_args = rules
                .iter()
                .any(|rule| rule.get("args").is_some() && rule["syscall"].as_str().and_then(number) == Some(call));
            for word in if by_args { &words[..] } else { &words[..1] } {
                for (place, others) in [(0, 0), (1, 0), (2, 0), (2, u64::MAX), (1, 1), (0, 4)] {
                    let mut args = [others; 6];
                    args[place] = *word;
                    let answer = run(&ours, X86_64, call, args);
                    assert_eq!(answer, run(&reference, X86_64, call, args), "{name}: call {call} of {args:x?}");
                    allowed += u32::from(answer == ALLOW);
                    assert!(answer == ALLOW || answer == TRAP);
                }
            }
            assert_eq!(run(&ours, I386, call, [0; 6]), KILL);
        }
        assert!(allowed > 0, "{name} allows nothing");
        assert!(ours.len() * 2 < reference.len(), "{name}: {} instructions, {}", ours.len(), reference.len());
    }
}

#[test]
fn no_policy_lets_programs_be_started_or_code_be_made() {
    use Sysno::{
        bpf, execve, execveat, fork, init_module, kexec_load, kill, mount, ptrace, setns, setuid, unshare, vfork,
    };
    for (name, program, _, _) in policies() {
        for call in
            [execve, execveat, fork, vfork, ptrace, bpf, setuid, setns, unshare, mount, kill, init_module, kexec_load]
        {
            assert_eq!(run(&program, X86_64, call as u32, [0; 6]), TRAP, "{name} allows {call}");
        }
        for call in [Sysno::mmap, Sysno::mprotect] {
            let with = |protection| run(&program, X86_64, call as u32, [0, 4096, protection, 0, 0, 0]);
            assert_eq!((with(3), with(7), with(4)), (ALLOW, TRAP, TRAP), "{name}: {call}");
        }
    }
}

#[test]
fn threads_that_serve_the_guest_open_nothing_and_make_no_threads() {
    use Sysno::{accept, bind, clone, clone3, connect, open, openat, openat2, seccomp, socket, unlink};
    for (name, program, _, _) in policies().filter(|policy| ["vcpu", "io", "console", "watch"].contains(&policy.0)) {
        for call in [open, openat, openat2, socket, connect, bind, accept, clone, clone3, seccomp, unlink] {
            assert_eq!(run(&program, X86_64, call as u32, [0; 6]), TRAP, "{name} allows {call}");
        }
    }
    for (name, program, _, _) in policies().filter(|policy| policy.0 == "quotes") {
        for call in [open, openat, openat2, bind, accept, clone, clone3, seccomp, unlink] {
            assert_eq!(run(&program, X86_64, call as u32, [0; 6]), TRAP, "{name} allows {call}");
        }
        // AF_UNIX and AF_VSOCK, and neither AF_INET, AF_INET6, AF_NETLINK nor AF_PACKET.
        let made = |family| run(&program, X86_64, socket as u32, [family, 0, 0, 0, 0, 0]) == ALLOW;
        assert_eq!([1, 40, 2, 10, 16, 17].map(made), [true, true, false, false, false, false]);
    }
    for (name, program, _, _) in policies() {
        // KVM_CREATE_VM is for those who make machines; TIOCSTI, which types into a terminal, for nobody.
        let ioctl = |request| run(&program, X86_64, Sysno::ioctl as u32, [0, request, 0, 0, 0, 0]);
        assert_eq!(ioctl(0xae01) == ALLOW, ["vmm", "clients"].contains(&name), "{name}");
        assert_eq!(ioctl(0xae80) == ALLOW, ["vmm", "clients", "vcpu"].contains(&name), "{name}");
        assert_eq!(ioctl(0x5412), TRAP, "{name}");
    }
}

#[test]
fn unusual_calls_say_why_they_are_allowed() {
    for (_, lists) in POLICIES {
        for name in lists {
            for rule in list(name).1.as_array().unwrap() {
                let explained = rule.get("comment").is_some();
                assert!(explained || rule.get("args").is_none(), "{name}: {rule} has no comment");
            }
        }
    }
}
