//! The first inputs of each target: sound ones and some that break a rule, so that fuzzing starts behind the first
//! checks.

use std::path::Path;
use std::{env, fs};

use crate::guest::ops as guest;
use crate::http::{Op, PATH};
use crate::input::Step;
use crate::payload::{Format, room_for};
use crate::quotes::{Call, message};
use crate::relocations::place;
use crate::{functions, hosts, layout, platform, tdvf as firmware};

const START: u64 = arch::layout::HIGH_RAM_START;

/// Writes the first inputs of a target to the folder that `HALYARD_FUZZ_SEEDS` names, if it names one. It is done before
/// libFuzzer looks into its folders, so that it may be one of them.
pub fn write(target: &str) {
    let Some(folder) = env::var_os("HALYARD_FUZZ_SEEDS") else { return };
    for (number, input) in of(target).iter().enumerate() {
        let path = Path::new(&folder).join(format!("seed-{number}"));
        fs::write(&path, input).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// First inputs of the target of this name.
fn of(target: &str) -> Vec<Vec<u8>> {
    match target {
        "queue" => queue(),
        "pci" => pci(),
        "config" => config(),
        "kernel" => kernel(),
        "registers" => registers(),
        "payload" => payload(),
        "relocations" => relocations(),
        "json" => json(),
        "tdvf" => tdvf(),
        "igvm" => igvm(),
        "event_log" => event_log(),
        "authority" => authority(),
        "fw_cfg" => fw_cfg(),
        "vfio" => vfio(),
        "http" => http(),
        "quote" => quote(),
        "qgs" => qgs(),
        _ => panic!("there is no target {target}"),
    }
}

/// A key that has signed, the second of two, one that signed itself, and none.
fn authority() -> Vec<Vec<u8>> {
    use crate::authority::signed;
    vec![
        signed(&[b"root"], b"leaf", b"root"),
        signed(&[b"other", b"root"], b"leaf", b"root"),
        signed(&[b"root"], b"root", b"root"),
        signed(&[b"other"], b"leaf", b"root"),
    ]
}

/// A sound IGVM file for TDX, one for SEV-SNP, one with a page twice, and one with parameters.
fn igvm() -> Vec<Vec<u8>> {
    let platform = |kind: u8| {
        let body = [&1_u32.to_le_bytes()[..], &[0, kind, 1, 0], &[0; 8]].concat();
        (1, body)
    };
    let page = |gpa: u64, flags: u32, offset: u32| {
        let words = [1, offset, flags, 0];
        let words = words.iter().flat_map(|word: &u32| word.to_le_bytes());
        (0x302, gpa.to_le_bytes().into_iter().chain(words).collect())
    };
    let area = (0x301, [&0x2000_u64.to_le_bytes()[..], &[0; 8]].concat());
    let insert = (0x303, [&0x8000_u64.to_le_bytes()[..], &1_u32.to_le_bytes(), &[0; 4]].concat());
    [
        vec![platform(3), page(0x1000, 0, 0), page(0x2000, 2, 0)],
        vec![platform(2), page(0x1000, 0, 0)],
        vec![platform(3), page(0x1000, 0, 0), page(0x1000, 0, 0)],
        vec![platform(3), area, insert],
    ]
    .iter()
    .map(|headers| crate::igvm::file(headers))
    .collect()
}

/// A log with a variable and a text, one of MRTD, and an empty one that is filled up.
fn event_log() -> Vec<Vec<u8>> {
    let name = [&[0x61; 16][..], &2_u64.to_le_bytes(), &1_u64.to_le_bytes(), b"P\0K\0!"].concat();
    let full = [crate::event_log::log(&[]), vec![0xff; 64]].concat();
    vec![
        crate::event_log::log(&[(1, 0x8000_0001, &name), (2, 4, &[0; 4]), (2, 0x8000_0007, b"Exit Boot Services")]),
        crate::event_log::log(&[(0, 1, b"firmware"), (5, 4, b"")]),
        full,
    ]
}

/// A disk whose driver uses MSI-X, and one whose driver uses MSI; both move its memory.
fn vfio() -> Vec<Vec<u8>> {
    use crate::vfio::ops::{MAP, MEMORY, READ, WRITE};
    use devices::vfio::testing::{MSI, MSIX, disk};
    let config = |op: u8, at: u16, width: u8, value: u32| {
        let [low, high] = at.to_le_bytes();
        Step::new(op, low, high, width, value)
    };
    let begin = [config(WRITE, 4, 1, 6), Step::new(MAP, 0, 1, 0, 0x10_0000), config(READ, 0x10, 2, 0)];
    let vector = (0..4).map(|field| Step::new(MEMORY, 0x80, 0, 2, 0x2010 + 4 * field));
    let msix = [config(WRITE, MSIX + 2, 1, 0xc000), config(WRITE, MSIX + 2, 1, 0x8000)];
    let msi =
        [config(WRITE, MSI + 4, 3, 0xfee0_0000), config(WRITE, MSI + 12, 1, 0x40), config(WRITE, MSI + 2, 1, 0x21)];
    let end = [Step::new(MAP, 0, 1, 0, 0x20_0000), config(WRITE, 4, 1, 0)];
    let program = |steps: Vec<Step>| [disk(), steps.iter().flat_map(Step::encode).collect()].concat();
    vec![
        program(begin.into_iter().chain(vector).chain(msix).chain(end).collect()),
        program(begin.into_iter().chain(msi).chain(end).collect()),
    ]
}

/// Items selected and read by the port and by requests.
fn fw_cfg() -> Vec<Vec<u8>> {
    let step = |operation: u8, item: u8, length: u16, control: u32, address: u64| {
        [&[operation, item][..], &length.to_le_bytes(), &control.to_le_bytes(), &address.to_le_bytes()].concat()
    };
    let port = [step(0, 2, 0, 0, 0), step(1, 0, 0, 0, 0), step(1, 0, 0, 0, 0)].concat();
    let requests = [
        step(2, 3, 300, 1 << 3 | 1 << 1, 0x2000),
        step(2, 3, 100, 1 << 3 | 1 << 2, 0),
        step(2, 3, 300, 1 << 1, 0x2000),
        step(2, 2, 8, 1 << 3 | 1 << 1, 0),
        step(2, 2, 8, 1 << 4, 0x2000),
        step(3, 3, 4, 0, 0),
    ];
    vec![port, requests.concat()]
}

/// A sound firmware, and two with a rule broken.
fn tdvf() -> Vec<Vec<u8>> {
    let own = (4_u64 << 30) - 0x4000;
    let boot = (0x1000, 0x2800, own + 0x1000, 0x3000, 0, 1);
    let variables = (0, 0x1000, own, 0x1000, 1, 0);
    let (hob, stack) = ((0, 0, 0x80_9000, 0x2000, 2, 0), (0, 0, 0x81_0000, 0x1_0000, 3, 0));
    let overlap = (0, 0, 0x80_a000, 0x1000, 3, 0);
    [vec![boot, variables, stack, hob], vec![boot, hob, overlap], vec![hob, hob, boot]]
        .iter()
        .map(|sections| [vec![16], firmware::firmware(sections)].concat())
        .collect()
}

/// A call as Linux makes it, in both regions of memory and answered both ways, and some with a rule broken.
fn quote() -> Vec<Vec<u8>> {
    let good = Call { gpa: 0x2000, len: 0x2_0000, version: 1, report: 1024, quote: 5006, private: 0, later: 0 };
    let high = Call { gpa: 0x2_7000, len: 0x5000, quote: 1, ..good };
    let private = [Call { private: 1 << 5, ..good }, Call { later: 1 << 5, ..good }];
    let broken = [
        Call { gpa: 0x2001, ..good },
        Call { len: 0x3_0000, ..good },
        Call { version: 2, ..good },
        Call { report: 0x2_0000 - 23, ..good },
        Call { gpa: 0x2_5000, len: 0x3000, ..good },
    ];
    let programs = [&[good, high][..], &private, &broken, &[Call { report: 7, ..good }]];
    programs.iter().map(|calls| calls.iter().flat_map(Call::encode).collect()).collect()
}

/// Answers of both kinds, and some with a rule broken.
fn qgs() -> Vec<Vec<u8>> {
    let quote = |id: u32, len: u32| [&id.to_le_bytes()[..], &len.to_le_bytes(), b"id and quote"].concat();
    [
        (0xfe, message(1, 1, 0, &quote(2, 10))),
        (3, message(1, 5, 0, b"a platform")),
        (8, message(1, 1, 0x1_2001, &[0; 8])),
        (8, message(1, 1, 0, &quote(u32::MAX, 13))),
        (8, vec![0xff; 64]),
    ]
    .into_iter()
    .map(|(first, message)| [vec![first], message].concat())
    .collect()
}

fn program(steps: &[Step]) -> Vec<u8> {
    steps.iter().flat_map(Step::encode).collect()
}

fn queue() -> Vec<Vec<u8>> {
    let step = Step::new;
    (0..hosts::KINDS)
        .flat_map(|kind| {
            let started = step(kind, 0, 0, 0, 0);
            let requests =
                |shape: u8| (0..layout::QUEUES).map(move |queue| step(guest::REQUEST, queue, shape, 0x1b, 0x10001));
            let host = (0..5).map(|what| step(guest::HOST, what, 0, 8, u32::from(what)));
            let control = [(0, 1), (3, 1), (6, 1)]
                .map(|(event, value): (u32, u32)| step(guest::REQUEST, 3, 0, 0, event << 16 | value << 24));
            // A disk's requests of each kind, in its middle and about its end.
            let kinds = [2, 0xe007, 0xe008]
                .into_iter()
                .flat_map(|sector| (0..8).map(move |kind| step(guest::REQUEST, 0, 1, 0x1b, kind << 16 | sector)));
            let loops = [
                step(guest::DESCRIPTOR, 1 << 3, 0, 0x10, 1 << 16 | 0x1000),
                step(guest::DESCRIPTOR, 1 << 3, 1, 0x10, 0x1000),
                step(guest::PUBLISH, 0, 0, 0, 0),
                step(guest::KICK, 0, 0, 0, 0),
                step(guest::RESET, 0, 0, 0, 0),
                step(guest::JUMP, 1, 0, 0, 300),
                step(guest::KICK, 1, 1, 0, 1),
            ];
            let negotiation = [
                Step { a: 1, ..started },
                step(guest::NEGOTIATE, 0, 0, 2, u32::MAX),
                step(guest::QUEUE, 0, 3, 0, 0),
                step(guest::QUEUE, 1, 6, 2, 0x800),
                step(guest::VECTOR, 1, 0, 0, 1),
                step(guest::MSIX, 0x80, 0, 0, 0),
                step(guest::RUN, 0, 0, 0, 0),
                step(guest::REQUEST, 0, 3, 0x1b, 1),
                step(guest::EVENT_INDEX, 0, 0, 0, 0x0003_0001),
                step(guest::SUSPEND, 1, 0, 0, 0),
                step(guest::PLACE, 2, 0, 0, 0),
                step(guest::WINDOW, 0x14, 0, 0, 0),
                step(guest::REQUEST, 0, 1, 0x1b, 2),
                step(guest::STATUS, 0, 0, 0, 0),
            ];
            [
                vec![started],
                [started].into_iter().chain(requests(1)).chain(requests(2)).collect(),
                [started].into_iter().chain(kinds).collect(),
                [started]
                    .into_iter()
                    .chain(chain())
                    .chain(host.clone())
                    .chain(control)
                    .chain(host)
                    .chain(requests(0))
                    .collect(),
                [started].into_iter().chain(loops).collect(),
                negotiation.to_vec(),
            ]
        })
        .map(|steps| program(&steps))
        .collect()
}

/// A chain of two descriptors.
fn chain() -> [Step; 4] {
    [
        Step::new(guest::DESCRIPTOR, 1 << 3, 0, 0x10, 1 << 16 | 0x1000),
        Step::new(guest::DESCRIPTOR, 2 << 3, 1, 0x50, 0x1100),
        Step::new(guest::PUBLISH, 0, 0, 0, 0),
        Step::new(guest::KICK, 0, 0, 0, 0),
    ]
}

fn pci() -> Vec<Vec<u8>> {
    use functions::ops;

    let step = Step::new;
    let each = |op: u8, b: u8, c: u8, d: u32| (0..6).map(move |function| step(op, function, b, c, d));
    [
        each(ops::COMMAND, 6, 0, 0).chain(each(ops::PLACE, 0, 3, 0x1000)).collect::<Vec<_>>(),
        each(ops::COMMAND, 2, 0, 0).chain(each(ops::PLACE, 2, 0x80, 0)).chain(each(ops::REPLUG, 0, 0, 0)).collect(),
        each(ops::WRITE, 0x10, 0x20, u32::MAX).chain(each(ops::READ, 0x10, 0x30, 0)).collect(),
        // Ports are behind six functions, and behind them what is plugged: memory and a message, a card, its windows.
        vec![
            step(ops::COMMAND, 6, 6, 0, 0),
            step(ops::WRITE, 6, 0x80, 0x20, 0xfee0_0000),
            step(ops::WRITE, 6, 0x7e, 0x10, 1),
            step(ops::WRITE, 6, 0x58, 0x10, 0x1329),
            step(ops::PLUG, 0, 0, 0, 0),
            step(ops::COMMAND, 8, 6, 0, 0),
            step(ops::PRESS, 0, 0, 0, 0),
            step(ops::WRITE, 6, 0x5a, 0x10, 0x109),
            step(ops::WRITE, 6, 0x20, 0x20, 0xc0f0_c000),
            step(ops::PLACE, 8, 2, 0x80, 0x1000),
            step(ops::PLUG, 0, 0, 0, 0),
        ],
        each(ops::MMIO, 0, 0, 0x1000).chain(each(ops::ECAM, 3, 0, 0xfff)).collect(),
    ]
    .map(|steps| program(&steps))
    .to_vec()
}

/// Bodies of each type, behind the byte that chooses it.
fn json() -> Vec<Vec<u8>> {
    let whole = r#"{"kernel": {"path": "k", "cmdline": "a"}, "cpus": {"count": 2, "topology": {"sockets": 1, "cores": 2,
        "threads": 1}}, "memory": {"size": "64M", "hugepages": "2M"}, "kind": {"type": "standard"},
        "serial": {"type": "api"}, "devices": [{"type": "disk", "path": "d", "serial": "s"}, {"type": "net", "tap": "t",
        "mac": "52:54:00:12:34:56", "mtu": 1500}, {"type": "console", "endpoint": {"type": "file", "path": "f"}}]}"#;
    let bodies = [
        (0, r#"{"kernel": {"path": "k"}}"#),
        (0, whole),
        (0, r#"{"kernel": {}, "cpus": {"count": 300}, "x": 1, "x": 2, "memory": {"size": 1.0}}"#),
        (1, r#"{"type": "disk", "id": "root", "fd": 3, "queues": 4}"#),
        (1, r#"{"type": "rng"}"#),
        (2, r#"{"deadline": "30s", "force": true}"#),
        (3, r#"{"count": 2.0}"#),
        (4, r#"{"size": "1G"}"#),
        (4, r#"{"size": 18446744073709551615}"#),
    ];
    bodies.iter().map(|(kind, text)| [&[*kind], text.as_bytes()].concat()).collect()
}

/// Requests of all operations in an order that makes sense, each in a piece, in many, and by clients in turn; then such that
/// break a rule.
fn http() -> Vec<Vec<u8>> {
    let ask = |line: &str, body: &[u8]| {
        // The path of a kernel is longer than its operation.
        let paths = body.windows(2).filter(|pair| pair == &Op::Kernel.with(0)).count();
        let length = body.len() + paths * (PATH - 2);
        [format!("{line} HTTP/1.1\r\ncontent-length: {length}\r\n\r\n").as_bytes(), body].concat()
    };
    let act = |name: &str| format!("POST /api/v1/vm/actions/{name} HTTP/1.1\r\n\r\n").into_bytes();
    let get = |path: &str| format!("GET /api/v1/{path} HTTP/1.1\r\n\r\n").into_bytes();
    let config = [
        br#"{"kernel": {"path": ""#.as_slice(),
        &Op::Kernel.with(0),
        br#""}, "memory": {"size": "64M"}, "serial": {"type": "api"}, "pci": {"hotplug_ports": 4}}"#,
    ];
    let create = ask("PUT /api/v1/vm", &config.concat());
    let plug = ask("PUT /api/v1/vm/devices/a", br#"{"type": "disk", "fd": 3}"#);
    let upgrade = "?takeover=true HTTP/1.1\r\nconnection: upgrade\r\nupgrade: halyard-console\r\n\r\nhello";
    let console = format!("GET /api/v1/vm/consoles/serial{upgrade}").into_bytes();
    let events = b"GET /api/v1/events HTTP/1.1\r\nlast-event-id: 1\r\n\r\n".to_vec();
    let reads: Vec<_> =
        ["ping", "version", "host", "openapi.json", "vm", "vm/devices", "vm/vcpus", "vm/memory", "jobs"]
            .map(get)
            .into();
    let life: Vec<_> = ["boot", "pause", "resume", "reset", "nmi"].map(act).into();
    let removal = b"DELETE /api/v1/vm/devices/a?force=true HTTP/1.1\r\nif-match: *\r\n\r\n".to_vec();
    let shutdown = ask("POST /api/v1/vm/actions/shutdown", br#"{"deadline": "1s", "force": true}"#);
    let patch = ask("PATCH /api/v1/vm/devices/a", br#"{"readonly": true}"#);
    let with_disk = [Op::Descriptors.with(1).to_vec(), plug.clone()].concat();
    let whole =
        [vec![create.clone()], life.clone(), vec![with_disk.clone(), patch, removal, shutdown, get("jobs/1")]].concat();
    let chunked =
        b"PUT /api/v1/vm HTTP/1.1\r\nexpect: 100-continue\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"a\":\r\n3\r\n \
                    1}\r\n0\r\n\r\n"
            .to_vec();
    let broken = [
        b"PUT /api/v1/vm HTTP/1.1\r\ncontent-length: 100\r\n\r\n{".to_vec(),
        b"PUT /api/v1/vm HTTP/1.1\r\ncontent-length: 99999999999\r\n\r\n{".to_vec(),
        b"HEAD /metrics HTTP/1.0\r\nconnection: keep-alive\r\nx-request-id: 7\r\n\r\n".to_vec(),
        b"GET http://a/%2e%2e/ HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n".to_vec(),
        [b"GET /metrics HTTP/1.1\r\n".to_vec(), b"a: b\r\n".repeat(70), b"\r\n".to_vec()].concat(),
        [Op::Descriptors.with(31).to_vec(), plug].concat(),
        [Op::Escape.with(0).to_vec(), vec![0xff; 64]].concat(),
        chunked,
    ];
    let pieces = |requests: &[Vec<u8>], between: Op| requests.join(between.with(0).as_slice());
    let slow = |request: &[u8]| request.chunks(7).map(<[u8]>::to_vec).collect::<Vec<_>>().join(&Op::Send.with(0)[..]);
    let two = [create, life[0].clone(), Op::Client.with(1).to_vec(), console, Op::Send.with(0).to_vec()].concat();
    let readers = [two, Op::Client.with(2).to_vec(), events, Op::Send.with(0).to_vec(), Op::Client.with(0).to_vec()];
    let readers = [readers.concat(), with_disk, Op::Finish.with(0).to_vec(), Op::Client.with(2).to_vec()].concat();
    let mut all = vec![reads.concat(), pieces(&whole, Op::Send), pieces(&whole, Op::Read), pieces(&whole, Op::Leave)];
    all.extend([slow(&reads.concat()), readers]);
    all.extend(broken);
    all
}

fn config() -> Vec<Vec<u8>> {
    let all = include_str!("../../../examples/vm.yaml");
    let kinds = "{kernel: {path: k}, confidential: {kind: tdx, quote_service: 'vsock:2:4050'}, cpus: {count: 4, topology: {sockets: 1, cores: 2, threads: 2}}, \
                 memory: {size: 512M, hugepages: 2M}, platform: {debug_exit: true}}";
    let endpoints = "kernel: {path: k}\nserial: {type: socket, path: s}\ndevices:\n- {type: console, name: a, endpoint: \
                     {type: pty}}\n- {type: console, endpoint: {type: file, path: f}}\n- {type: net, tap: t, mac: \
                     '52:54:00:00:00:01', mtu: 1500}\n- {type: disk, path: d, queues: 2, serial: x, readonly: true}\n";
    [all, include_str!("../../../examples/minimal.yaml"), kinds, endpoints, "a: [&x 1, *x]", "- |\n  a\n- >-\n  b\n"]
        .map(|text| text.as_bytes().to_vec())
        .to_vec()
}

pub(crate) fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage that prefers an address.
pub(crate) fn bzimage(preferred: u64) -> Vec<u8> {
    let mut image = vec![0; 2 * 512 + 0x800];
    put(&mut image, 0x1f1, &[1]); // setup_sects
    put(&mut image, 0x1f4, &0x80_u32.to_le_bytes()); // syssize
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]); // boot_flag, jump
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x020f_u16.to_le_bytes()); // version
    put(&mut image, 0x211, &[1]); // loadflags: LOADED_HIGH
    put(&mut image, 0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(&mut image, 0x230, &0x20_0000_u32.to_le_bytes()); // kernel_alignment
    put(&mut image, 0x234, &[1, 21, 3, 0]); // relocatable_kernel, min_alignment, xloadflags
    put(&mut image, 0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(&mut image, 0x258, &preferred.to_le_bytes()); // pref_address
    put(&mut image, 0x260, &0x1_0000_u32.to_le_bytes()); // init_size
    image[0x400..].fill(0xcc);
    image
}

/// An x86-64 ELF executable with a segment to load and a note of a PVH entry point.
pub(crate) fn elf(note_kind: u32) -> Vec<u8> {
    let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let halves = |halves: &[u16]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<_>>();
    let entry = u32::try_from(START).unwrap_or(0).to_le_bytes();
    let note = [&[4, 0, 0, 0, 4, 0, 0, 0], &note_kind.to_le_bytes()[..], b"Xen\0", &entry].concat();
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend(halves(&[2, 62, 1, 0])); // executable, x86-64, version 1
    image.extend(words(&[START, 64, 0])); // entry, program headers, no section headers
    image.extend(halves(&[0, 0, 64, 56, 2, 64, 0, 0]));
    let contents = 64 + 2 * 56;
    for (kind, offset, address, size, memory) in [(1, contents, START, 64, 0x2000), (4, contents + 64, 0, 20, 0)] {
        image.extend([u32::to_le_bytes(kind), 7_u32.to_le_bytes()].concat());
        image.extend(words(&[offset, address, address, size, memory, 4]));
    }
    image.extend([0x90; 64]);
    image.extend(note);
    image
}

fn kernel() -> Vec<Vec<u8>> {
    let files = [bzimage(START), elf(18), elf(1), b"\x28\xb5\x2f\xfd".to_vec()];
    let ways = [Step::new(0, 0, 1, 1, 13), Step::new(0, 1, 0, 0, 0), Step::new(0, 2, 2, 1, 2047)];
    ways.iter().flat_map(|way| files.iter().map(|file| [&way.encode()[..], file].concat())).collect()
}

/// Each format with a small kernel and with one that is longer than a block, sound and with lies about the size: payloads
/// that end too early, and that go on for long.
fn payload() -> Vec<Vec<u8>> {
    let small = [elf(18), crate::input::pattern(7, 600), vec![0; 3000]].concat();
    let long = |len: u32| (0..len).map(|at| (at >> 16).to_le_bytes()[0]).collect::<Vec<u8>>();
    let mut all = Vec::new();
    for format in Format::ALL {
        // The blocks of lz4 have 8 MiB, those of zstd 128 KiB.
        let long = long(if matches!(format, Format::Lz4) { 9 << 20 } else { 300 << 10 });
        for content in [&small, &long] {
            let len = u32::try_from(content.len()).unwrap_or(0);
            for size in [len, len - 1, len + 1, 5000] {
                let sound = Step::new(0, room_for(content.len()), 0, 0, 0);
                all.push([&sound.encode()[..], &format.pack(content, size)].concat());
            }
        }
        // Headers that lie about the payload's place, its length, and their own.
        for lie in [Step::new(1, 14, 0, 0, 0x80), Step::new(2, 14, 0, 0, 0x10), Step::new(4, 14, 0x46, 0, 0)] {
            all.push([&lie.encode()[..], &format.pack(&small, 0x1000)].concat());
        }
    }
    all
}

/// Tables with two lists and with three, sound ones first; then with places at and beyond each edge of the kernel, next
/// to and over one another, and with other numbers of lists.
fn relocations() -> Vec<Vec<u8>> {
    let end = 0x1000 + 0x180;
    let tables: [&[u32]; 12] = [
        &[],
        &[0, place(0), place(0x208), 0, place(0x300), place(0x304)],
        &[0, place(8), place(0x1001), 0, place(0x400), place(0x9ff), 0, place(0x9f0), place(0x1100)],
        &[0, place(end - 8), 0, place(end - 4), 0, place(end - 4)],
        &[0, place(end - 7), 0, place(0)],
        &[0, 0, place(end - 3)],
        &[0, 0, place(0).wrapping_sub(1), 0],
        &[0, 0x8000_0000, 0, 0x7fff_ffff],
        &[0, u32::MAX, 0, 1],
        &[0, place(0x10), place(0x12), place(0x14), 0, place(0x16), place(0x17)],
        &[place(0), 0, place(0)],
        &[0, 0, 0, 0, 0],
    ];
    let ways = [Step::new(0, 0, 0, 0, 0x0003_0007), Step::new(2, 0, 40, 2, 0x1234_5678), Step::new(8, 0, 0, 0, 99)];
    ways.iter().flat_map(|way| tables.iter().map(|table| crate::relocations::program(*way, table))).collect()
}

fn registers() -> Vec<Vec<u8>> {
    use platform::ops;

    let step = Step::new;
    let serial: Vec<Step> = [
        step(ops::INPUT, 0, 0, 100, 7),
        step(ops::OUT, 0, 1, 0, 1),
        step(ops::IN, 0, 5, 0, 0),
        step(ops::IN, 0, 0, 0, 0),
        step(ops::OUT, 0, 3, 0, 0x80),
        step(ops::OUT, 0, 4, 0, 0x10),
        step(ops::SAVE, 0, 0, 0, 0),
    ]
    .to_vec();
    let apic = [
        step(ops::APIC_REGISTER, 0x18, 0, 0, 0x8031),
        step(ops::LEVEL, 4, 1, 0, 0),
        step(ops::END, 0x31, 0, 0, 0),
        step(ops::APIC_WRITE, 0x40, 0, 0, 0x31),
        step(ops::APIC_READ, 0x10, 0, 2, 0),
        step(ops::SAVE, 0, 0, 0, 0),
        step(ops::RESET, 0, 0, 0, 0),
    ];
    let rest = (0..6).flat_map(|device| (0..8).map(move |offset| step(ops::OUT, device, offset, 0, 0x34)));
    let rest = rest.chain([step(ops::BUTTON, 0, 0, 0, 0), step(ops::IN, 4, 4, 2, 0)]);
    vec![program(&serial), program(&apic), program(&rest.collect::<Vec<_>>())]
}
