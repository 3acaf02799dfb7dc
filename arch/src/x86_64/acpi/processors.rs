//! The processors of the DSDT, and the methods by which they come and go (ACPI 6.5 §8.4, §6.3).
//!
//! What the guest is asked, what it answers and which processors there are is in the registers at
//! [`layout::PROCESSORS_PORT`]. No access to them depends on one before it, so that methods need no lock.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Arg, BufferData, Device, Equal, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Local,
    Method, MethodCall, Name, NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Path, Return, ShiftLeft, ShiftRight,
    Store, While, ZERO,
};
use acpi_tables::madt::{EnabledStatus, ProcessorLocalApic};

use super::super::layout;
use super::super::platform::Platform;
use super::dsdt::Raw;

/// Asks the guest what processors it is asked for.
const NEXT: &str = "PNXT";
/// Takes the guest's answers.
const ANSWER: &str = "PANS";
/// The methods that go through what is asked, notify a processor by its number, and answer for one.
const SCAN: &str = "PSCN";
const NOTIFY: &str = "PNTF";
const REPORT: &str = "POST";

/// A processor device for each vCPU, with the UID that it has in the MADT.
pub(super) fn devices(platform: &Platform, aml: &mut Vec<u8>) {
    let vcpus = platform.topology.vcpus();
    if platform.pluggable.is_some() {
        registers(vcpus, aml);
        methods(vcpus, aml);
    }
    let hid = Name::new(Path::new("_HID"), &"ACPI0007");
    for (uid, id) in (0..vcpus).zip(platform.topology.vcpu_ids()) {
        let name_of_uid = Name::new(Path::new("_UID"), &uid);
        let mut parts: Vec<&dyn Aml> = vec![&hid, &name_of_uid];
        // The boot processor stays.
        let pluggable = (platform.pluggable.is_some() && uid > 0).then(|| pluggable(uid, id.0));
        parts.extend(pluggable.as_ref().map(|objects| objects as &dyn Aml));
        Device::new(device(uid), parts).to_aml_bytes(aml);
    }
}

/// The call of the method that asks the guest what it is asked for and notifies processors of it.
pub(super) fn scan() -> MethodCall<'static> {
    MethodCall::new(Path::new(SCAN), Vec::new())
}

fn device(uid: u32) -> Path {
    Path::new(&format!("C{:03X}", uid & 0xfff))
}

fn status_name(uid: u32) -> String {
    format!("S{:03X}", uid & 0xfff)
}

/// The registers with their names, a byte for each processor but the first.
fn registers(vcpus: u32, aml: &mut Vec<u8>) {
    let size = u32::from(layout::PROCESSORS_STATUS) + vcpus;
    OpRegion::new(Path::new("PREG"), OpRegionSpace::SystemIO, &layout::PROCESSORS_PORT, &size).to_aml_bytes(aml);
    let field = |access, entries| {
        let (lock, update) = (FieldLockRule::NoLock, FieldUpdateRule::WriteAsZeroes);
        Field::new(Path::new("PREG"), access, lock, update, entries)
    };
    let named = |name: &str, bits| {
        let bytes = name.as_bytes();
        FieldEntry::Named(std::array::from_fn(|at| bytes.get(at).copied().unwrap_or(b'_')), bits)
    };
    field(FieldAccessType::DWord, vec![named(NEXT, 32), named(ANSWER, 32)]).to_aml_bytes(aml);
    let mut bytes = vec![FieldEntry::Reserved((usize::from(layout::PROCESSORS_STATUS) + 1) * 8)];
    bytes.extend((1..vcpus).map(|uid| named(&status_name(uid), 8)));
    field(FieldAccessType::Byte, bytes).to_aml_bytes(aml);
}

/// The methods that all processors share.
fn methods(vcpus: u32, aml: &mut Vec<u8>) {
    let mut body = Vec::new();
    for uid in 1..vcpus {
        If::new(&Equal::new(&Arg(0), &uid), vec![&Notify::new(&device(uid), &Arg(1))]).to_aml_bytes(&mut body);
    }
    Method::new(Path::new(NOTIFY), 2, false, vec![&Raw(body)]).to_aml_bytes(aml);

    // The processor's number, the event in the second byte, what became of it in the upper half.
    let (event, result) = (And::new(&ZERO, &Arg(1), &0xff_u8), And::new(&ZERO, &Arg(2), &0xffff_u16));
    let (event, result) = (ShiftLeft::new(&ZERO, &event, &8_u8), ShiftLeft::new(&ZERO, &result, &16_u8));
    let both = Or::new(&ZERO, &event, &result);
    let (register, all) = (Path::new(ANSWER), Or::new(&ZERO, &Arg(0), &both));
    let answer = Store::new(&register, &all);
    Method::new(Path::new(REPORT), 3, false, vec![&answer]).to_aml_bytes(aml);

    let (asked, next) = (Local(0), Path::new(NEXT));
    let ask = Store::new(&asked, &next);
    let (number, what) = (And::new(&ZERO, &asked, &0xff_u8), ShiftRight::new(&ZERO, &asked, &8_u8));
    let notify = MethodCall::new(Path::new(NOTIFY), vec![&number, &what]);
    let more = NotEqual::new(&asked, &layout::PROCESSORS_NONE);
    Method::new(Path::new(SCAN), 0, true, vec![&ask, &While::new(&more, vec![&notify, &ask])]).to_aml_bytes(aml);
}

/// What a processor that comes and goes has: its entry of the MADT, as of one that is there, whether it is there, what
/// removes it, and what takes the guest's answers.
fn pluggable(uid: u32, apic_id: u8) -> Raw {
    let mut objects = Vec::new();
    let status = Path::new(&status_name(uid));
    let number = u8::try_from(uid).unwrap_or(u8::MAX);
    let mut entry = Vec::new();
    ProcessorLocalApic::new(number, apic_id, EnabledStatus::Enabled).to_aml_bytes(&mut entry);
    Name::new(Path::new("_MAT"), &BufferData::new(entry)).to_aml_bytes(&mut objects);
    Method::new(Path::new("_STA"), 0, false, vec![&Return::new(&status)]).to_aml_bytes(&mut objects);
    Method::new(Path::new("_EJ0"), 1, false, vec![&Store::new(&status, &ONE)]).to_aml_bytes(&mut objects);
    let report = MethodCall::new(Path::new(REPORT), vec![&uid, &Arg(0), &Arg(1)]);
    Method::new(Path::new("_OST"), 3, false, vec![&report]).to_aml_bytes(&mut objects);
    Raw(objects)
}
