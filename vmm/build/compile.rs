//! From a list of allowed system calls to the program that the kernel runs at each of them.
//!
//! The lists are in seccompiler's JSON format. Its own compiler compares the call's number with one after the other,
//! at five instructions each, and the kernel takes time to check and translate a filter for each of its instructions:
//! some 150 µs for a list of ours, in every thread and at every start. Here the numbers are searched as a tree with an
//! instruction for each bound of a range, which takes a third of that. That both say the same is tested
//! (`tests/seccomp.rs`).

use std::collections::BTreeMap;

use serde_json::Value;

/// Kinds of thread, each with the lists that its policy consists of. A thread's children begin under its policy, and
/// each policy after that can only take away: the owner thread, which makes all others, needs what they need. The list
/// with the most frequent ioctl comes first.
pub const POLICIES: [(&str, &[&str]); 9] = [
    ("vmm", &["vcpu", "io", "console", "watch", "quotes", "vmm", "common"]),
    ("clients", &["vcpu", "io", "console", "watch", "quotes", "loader", "vmm", "clients", "common"]),
    ("vcpu", &["vcpu", "common"]),
    ("io", &["io", "common"]),
    ("console", &["console", "common"]),
    ("api", &["api", "common"]),
    ("loader", &["loader", "common"]),
    ("watch", &["watch", "common"]),
    ("quotes", &["quotes", "common"]),
];

/// `AUDIT_ARCH_X86_64`: a 64-bit, little-endian machine with ELF's number 62.
pub const X86_64: u32 = 0xc000_003e;

/// One instruction of classic BPF, as the kernel's `struct sock_filter`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// The operation.
    pub code: u16,
    /// Instructions to skip where a comparison holds.
    pub jt: u8,
    /// Instructions to skip where it does not.
    pub jf: u8,
    /// Its operand.
    pub k: u32,
}

/// What is returned for a call that is allowed (`SECCOMP_RET_ALLOW`).
pub const ALLOW: u32 = 0x7fff_0000;
/// What is returned for one that is not (`SECCOMP_RET_TRAP`): the thread gets SIGSYS in its place.
pub const TRAP: u32 = 0x0003_0000;
/// What is returned for calls of another architecture (`SECCOMP_RET_KILL_PROCESS`).
const KILL: u32 = 0x8000_0000;

/// `BPF_LD | BPF_W | BPF_ABS`: takes the word at an offset of `struct seccomp_data`.
pub const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`.
pub const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`.
pub const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`.
pub const IF_EQUAL: u16 = 0x15;
/// `BPF_JMP | BPF_JGE | BPF_K`.
pub const IF_AT_LEAST: u16 = 0x35;
/// `BPF_RET | BPF_K`.
pub const RETURN: u16 = 0x06;

/// Offsets in bytes in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// A comparison of an argument's lower 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Condition {
    /// Which argument, from 0.
    index: u32,
    /// The bits compared.
    mask: u32,
    /// What they must be.
    value: u32,
}

/// When a call is allowed: where all conditions of one of its rules hold.
type Rules = Vec<Vec<Condition>>;

/// The calls that a kind of thread may make, by number.
#[derive(Debug, Clone, Default)]
pub struct Policy(BTreeMap<u32, Rules>);

impl Policy {
    /// Adds the calls of the list `name` in `json`, a map of lists in seccompiler's format, of which this is taken: an
    /// allow list with `eq` and `masked_eq` on `dword` arguments.
    ///
    /// # Errors
    /// What is wrong with the list.
    pub fn add(&mut self, json: &str, name: &str, number: impl Fn(&str) -> Option<u32>) -> Result<(), String> {
        let lists: Value = serde_json::from_str(json).map_err(|error| format!("{name}: {error}"))?;
        let list = lists.get(name).ok_or_else(|| format!("there is no list {name}"))?;
        if (&list["default_action"], &list["filter_action"]) != (&"trap".into(), &"allow".into()) {
            return Err(format!("{name}: is no list of what is allowed"));
        }
        for rule in list["filter"].as_array().into_iter().flatten() {
            let call = rule["syscall"].as_str().unwrap_or_default();
            let number = number(call).ok_or_else(|| format!("{name}: there is no system call {call:?}"))?;
            let conditions: Option<Vec<_>> = rule["args"].as_array().into_iter().flatten().map(condition).collect();
            self.0.entry(number).or_default().push(conditions.ok_or_else(|| format!("{name}: {call}: its args"))?);
        }
        Ok(())
    }

    /// The program for this policy, for calls of an architecture by its number in the kernel (`AUDIT_ARCH_…`).
    ///
    /// # Panics
    /// Where the policy is too large for the jumps of an instruction.
    pub fn compile(&self, architecture: u32) -> Vec<Instruction> {
        let mut ranges: Vec<(u32, Target)> = vec![(0, Target::Trap)];
        let mut blocks = Vec::new();
        for (&number, rules) in &self.0 {
            let target = if rules.iter().any(Vec::is_empty) {
                Target::Allow
            } else {
                blocks.push(block(rules));
                Target::Block(blocks.len() - 1)
            };
            ranges.retain(|&(start, _)| start != number);
            if ranges.last().is_none_or(|&(_, last)| last != target) {
                ranges.push((number, target));
            }
            ranges.push((number + 1, Target::Trap));
        }

        let mut program = vec![
            Instruction { code: LOAD, jt: 0, jf: 0, k: ARCHITECTURE },
            Instruction { code: IF_EQUAL, jt: 1, jf: 0, k: architecture },
            Instruction { code: RETURN, jt: 0, jf: 0, k: KILL },
            Instruction { code: LOAD, jt: 0, jf: 0, k: NUMBER },
        ];
        let mut nodes = Vec::new();
        tree(&ranges, &mut nodes);
        // Behind the tree: both returns, a jump to each block, and the blocks.
        let place = |at: usize, target: Target| match target {
            Target::Node(node) => distance(at, node),
            Target::Allow => distance(at, nodes.len()),
            Target::Trap => distance(at, nodes.len() + 1),
            Target::Block(index) => distance(at, nodes.len() + 2 + index),
        };
        for (at, node) in nodes.iter().enumerate() {
            let (jt, jf) = (place(at, node.at_least), place(at, node.below));
            program.push(Instruction { code: IF_AT_LEAST, jt, jf, k: node.bound });
        }
        program.extend([ALLOW, TRAP].map(|k| Instruction { code: RETURN, jt: 0, jf: 0, k }));
        let mut before = 0;
        for (index, block) in blocks.iter().enumerate() {
            let k = u32::try_from(blocks.len() - 1 - index + before).expect("a short program");
            program.push(Instruction { code: JUMP, jt: 0, jf: 0, k });
            before += block.len();
        }
        program.extend(blocks.into_iter().flatten());
        program
    }
}

fn condition(arg: &Value) -> Option<Condition> {
    let number = |value: &Value| value.as_u64().and_then(|value| u32::try_from(value).ok());
    let mask = match &arg["op"] {
        Value::String(op) if op == "eq" => u32::MAX,
        Value::Object(op) => number(op.get("masked_eq")?)?,
        _ => return None,
    };
    (arg["type"] == "dword").then_some(())?;
    Some(Condition { index: number(&arg["index"])?, mask, value: number(&arg["val"])? & mask })
}

/// Where a comparison leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Node(usize),
    Allow,
    Trap,
    Block(usize),
}

/// Compares the number with a bound between two ranges.
struct Node {
    bound: u32,
    at_least: Target,
    below: Target,
}

/// Adds the comparisons that find a number's range among `ranges`, each given by its start, and gives the first.
fn tree(ranges: &[(u32, Target)], nodes: &mut Vec<Node>) -> Target {
    if let [(_, target)] = ranges {
        return *target;
    }
    let (left, right) = ranges.split_at(ranges.len() / 2);
    let at = nodes.len();
    nodes.push(Node { bound: right[0].0, at_least: Target::Trap, below: Target::Trap });
    nodes[at].below = tree(left, nodes);
    nodes[at].at_least = tree(right, nodes);
    Target::Node(at)
}

/// How many instructions lie between two of them.
fn distance(from: usize, to: usize) -> u8 {
    u8::try_from(to - from - 1).expect("a policy that is too large for the jumps of an instruction")
}

/// Decides by arguments.
fn block(rules: &Rules) -> Vec<Instruction> {
    let mut program: Vec<Instruction> = Vec::new();
    let mut loaded = None;
    for rule in rules {
        let start = program.len();
        for condition in rule {
            let Condition { index, mask, value } = *condition;
            if loaded != Some(index) {
                program.push(Instruction { code: LOAD, jt: 0, jf: 0, k: ARGUMENTS + 8 * index });
            }
            loaded = (mask == u32::MAX).then_some(index);
            if mask != u32::MAX {
                program.push(Instruction { code: AND, jt: 0, jf: 0, k: mask });
            }
            program.push(Instruction { code: IF_EQUAL, jt: 0, jf: 0, k: value });
        }
        if let [Condition { mask: u32::MAX, .. }] = rule[..] {
            continue;
        }
        program.push(Instruction { code: RETURN, jt: 0, jf: 0, k: ALLOW });
        // A comparison that fails leads to the next rule.
        let end = program.len();
        for (at, instruction) in program.iter_mut().enumerate().skip(start) {
            if instruction.code == IF_EQUAL {
                instruction.jf = distance(at, end);
            }
        }
        loaded = None;
    }
    program.extend([TRAP, ALLOW].map(|k| Instruction { code: RETURN, jt: 0, jf: 0, k }));
    // Rules of a single comparison lead to the end where it holds.
    let end = program.len() - 1;
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.code == IF_EQUAL && instruction.jf == 0 {
            instruction.jt = distance(at, end);
        }
    }
    program
}
