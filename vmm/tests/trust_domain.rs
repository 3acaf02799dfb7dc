//! The machine of a trust domain on a scripted hypervisor: its launch, what its guest asks for, and its reset.

use std::fs;

use api::{ByteSize, Confidential, Endpoint, EventKind, Firmware, PhaseName, Tdx};
use hal::fake::{Call, GuestAnswer, Step};
use hal::{Conversion, GpaRange, GuestCall, GuestCallStatus, VcpuId, Visibility};
use vmm::request::Request;

mod guest;
mod service;
#[path = "../../arch/src/x86_64/firmware/test_kernel.rs"]
mod test_kernel;

use service::Service;
use test_kernel::kernel;

const PAGE: u64 = 4096;
/// Firmware of 64 KiB, which ends at 4 GiB.
const SIZE: usize = 0x1_0000;
const BASE: u64 = (4 << 30) - SIZE as u64;
/// Its sections: offset and bytes in the file, address and bytes in memory, type, attributes (1: measured).
const SECTIONS: [(u32, u32, u64, u64, u32, u32); 4] = [
    (0x4000, 0xc000, BASE + 0x4000, 0xc000, 0, 1),
    (0, 0x4000, BASE, 0x4000, 1, 0),
    (0, 0, 0x81_0000, 0x1_0000, 3, 0),
    (0, 0, 0x80_9000, 0x2000, 2, 0),
];

/// A firmware file with the metadata of a trust domain's.
fn firmware() -> Vec<u8> {
    let mut file = vec![0x90; SIZE];
    let mut descriptor = b"TDVF".to_vec();
    let count = u32::try_from(SECTIONS.len()).unwrap();
    descriptor.extend([16 + 32 * count, 1, count].map(u32::to_le_bytes).concat());
    for (offset, raw, start, len, kind, attributes) in SECTIONS {
        descriptor.extend([offset, raw].map(u32::to_le_bytes).concat());
        descriptor.extend([start, len].map(u64::to_le_bytes).concat());
        descriptor.extend([kind, attributes].map(u32::to_le_bytes).concat());
    }
    file[SIZE - 0x800..][..descriptor.len()].copy_from_slice(&descriptor);
    let mut table = 0x800_u32.to_le_bytes().to_vec();
    table.extend(22_u16.to_le_bytes());
    table.extend(b"\x35\x65\x7a\xe4\x4a\x98\x98\x47\x86\x5e\x46\x85\xa7\xbf\x8e\xc2");
    table.extend((22_u16 + 18).to_le_bytes());
    table.extend(b"\xde\x82\xb5\x96\xb2\x1f\xf7\x45\xba\xea\xa3\x66\xc5\x5a\x08\x2d");
    file[SIZE - 0x20 - table.len()..][..table.len()].copy_from_slice(&table);
    file
}

/// A service whose trust domain of two vCPUs runs.
fn start() -> Service {
    Service::start_in(PhaseName::Running, |config| {
        let file = config.kernel.path.with_file_name("firmware");
        fs::write(&file, firmware()).unwrap();
        fs::write(&config.kernel.path, kernel()).unwrap();
        (config.firmware, config.cpus.count) = (Some(Firmware { path: file }), 2);
        (config.memory.size, config.serial) = (ByteSize::mib(128), Some(Endpoint::Off {}));
        config.confidential = Some(Confidential::Tdx(Tdx::default()));
    })
}

/// What became of the launches, in the order of the calls.
fn launches(service: &Service) -> Vec<String> {
    let told = |call: &Call| match call {
        Call::LaunchBegin { hand_off } => Some(format!("begin {hand_off:#x}")),
        Call::LaunchAdd { range, measured, .. } => Some(format!("add {:#x} {:#x} {measured}", range.start, range.len)),
        Call::LaunchFinish => Some("finish".to_owned()),
        _ => None,
    };
    service.fake.calls().iter().filter_map(told).collect()
}

const LAUNCH: [&str; 6] = [
    "begin 0x809000",
    "add 0xffff4000 0xc000 true",
    "add 0xffff0000 0x4000 false",
    "add 0x810000 0x10000 false",
    "add 0x809000 0x2000 false",
    "finish",
];

#[test]
fn it_is_launched_measured_and_made_anew_at_a_reset() {
    let service = start();
    assert_eq!(launches(&service), LAUNCH);
    service.wait_for("all vCPUs to run", |service| {
        [0, 1].iter().all(|number| service.fake.calls().contains(&Call::Run(VcpuId(*number))))
    });
    let entry = service.fake.reset_of(VcpuId(0)).unwrap();
    assert!(entry.entry.is_none() && entry.msrs.is_empty() && !entry.cpuid.is_empty());
    let mrtd = service.board.info().0.mrtd.unwrap();
    assert!(mrtd.len() == 96 && mrtd.bytes().all(|digit| digit.is_ascii_hexdigit()), "{mrtd}");
    service.ask(Request::Reset).unwrap();
    service.wait_for("another launch", |service| launches(service) == [LAUNCH, LAUNCH].concat());
    assert_eq!(service.board.info().0.mrtd.unwrap(), mrtd);
    let resets = service.events().iter().filter(|event| matches!(event, EventKind::Reset { .. })).count();
    assert_eq!(resets, 1);
    service.end();
}

#[test]
fn its_guest_shares_memory_and_is_answered() {
    let service = start();
    let range = |start: u64, pages: u64| GpaRange { start, len: pages * PAGE };
    let convert = |start, pages, to| Step::Convert { range: range(start, pages), to };
    service.script([
        convert(0x10_0000, 16, Visibility::Shared),
        convert(0x10_0000, 1, Visibility::Private),
        convert(1 << 40, 1, Visibility::Private),
        Step::MemoryFault { range: range(0x20_0000, 1), want: Visibility::Shared },
        Step::Call(GuestCall::SetupEventNotify { vcpu: VcpuId(0), vector: 0x40 }),
        Step::Call(GuestCall::SetupEventNotify { vcpu: VcpuId(0), vector: 3 }),
        // A buffer that is private, and one that holds no request.
        Step::Call(GuestCall::GetQuote { gpa: 0x10_0000, size: 2 * PAGE }),
        Step::Call(GuestCall::GetQuote { gpa: 0x10_1000, size: 2 * PAGE }),
    ]);
    let expected = [
        GuestAnswer::Conversion(Conversion::Done),
        GuestAnswer::Conversion(Conversion::Done),
        GuestAnswer::Conversion(Conversion::Invalid),
        GuestAnswer::Conversion(Conversion::Done),
        GuestAnswer::Call(GuestCallStatus::Success),
        GuestAnswer::Call(GuestCallStatus::InvalidOperand),
        GuestAnswer::Call(GuestCallStatus::InvalidOperand),
        GuestAnswer::Call(GuestCallStatus::InvalidOperand),
    ];
    service.wait_for("all answers", |service| service.fake.answers(VcpuId(0)).len() == expected.len());
    assert_eq!(service.fake.answers(VcpuId(0)), expected);
    assert_eq!(service.phase(), PhaseName::Running, "a page that is touched is shared, and the guest goes on");
    service.end();
}
