//! The DSDT: devices that a guest cannot find by probing, in AML (ACPI 6.5 §20).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, Field,
    FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Memory32Fixed, Method, Name,
    NotEqual, Notify, ONE, OpRegion, OpRegionSpace, Or, Package, Path, ResourceTemplate, Return, Scope, Store, Uuid,
    ZERO,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};
use hal::GpaRange;

use super::super::layout;
use super::super::platform::{HostBridge, Platform};
use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, processors};

/// Bytes of the header of a description table.
const HEADER_SIZE: u32 = 36;
/// From revision 2 on integers have 64 bits (ACPI 6.5 §5.2.11.1).
const REVISION: u8 = 2;

/// A device's `_STA`: present, enabled, shown and working (ACPI 6.5 §6.3.7).
const STATUS_PRESENT: u8 = 0xf;
/// The notification that a button was pressed (ACPI 6.5 §5.6.6, table 5.169).
const NOTIFY_PRESSED: u8 = 0x80;

/// `_OSC` of a PCI host bridge (PCI Firmware 3.3 §4.5.1): what the guest may drive itself: native hot-plug (bit 0) and the
/// PCIe capability structure (4). No port tells of power management events or errors, and a guest that were to drive
/// them would set up both at each.
const OSC_GRANTED: u32 = 1 | 1 << 4;
const OSC_UUID: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// Offset of the third word of the capabilities, in bytes.
const OSC_WISHES_OFFSET: u8 = 8;
/// Bits of the first word that `_OSC` returns: the UUID is unknown, the revision is unknown, wishes were refused.
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;

/// The DSDT of a platform.
pub(super) fn build(platform: &Platform) -> Sdt {
    let mut aml = Vec::new();
    sleep_states(&mut aml);
    let mut devices = Vec::new();
    processors::devices(platform, &mut devices);
    // More bridges than names would not fit into the area of the tables.
    for (number, bridge) in (0u16..=0xfff).zip(&platform.host_bridges) {
        host_bridge(number, bridge, &mut devices);
    }
    reserved_memory(&platform.host_bridges, &mut devices);
    if platform.serial {
        serial_port(&mut devices);
    }
    if platform.pvpanic {
        panic_device(&mut devices);
    }
    power_button(&mut devices);
    event_device(platform.pluggable.is_some(), &mut devices);
    aml.extend(Scope::raw(Path::new("\\_SB_"), devices));

    let mut table = Sdt::new(*b"DSDT", HEADER_SIZE, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    table.append_slice(&aml);
    table
}

/// Objects in AML, as the children of another.
pub(super) struct Raw(pub(super) Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// `\_S5`: the sleep type to write for switching off (ACPI 6.5 §7.4.2). There are no other sleep states.
fn sleep_states(aml: &mut Vec<u8>) {
    let values = Package::new(vec![&layout::ACPI_SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]);
    Name::new(Path::new("\\_S5_"), &values).to_aml_bytes(aml);
}

/// A PCI Express host bridge (PCI Firmware 3.3 §4.1.3): its buses and windows. Interrupts are message-signalled only,
/// so there is no `_PRT`.
fn host_bridge(number: u16, bridge: &HostBridge, aml: &mut Vec<u8>) {
    let mut body = Vec::new();
    Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")).to_aml_bytes(&mut body);
    Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")).to_aml_bytes(&mut body);
    Name::new(Path::new("_UID"), &number).to_aml_bytes(&mut body);
    Name::new(Path::new("_SEG"), &bridge.segment).to_aml_bytes(&mut body);
    Name::new(Path::new("_BBN"), &bridge.first_bus).to_aml_bytes(&mut body);
    if let Some(proximity) = bridge.proximity {
        Name::new(Path::new("_PXM"), &proximity).to_aml_bytes(&mut body);
    }
    let buses = AddressSpace::<u16>::new_bus_number(bridge.first_bus.into(), bridge.last_bus.into());
    let windows: Vec<AddressSpace<u64>> = [bridge.mmio32, bridge.mmio64].into_iter().filter_map(window).collect();
    let mut resources: Vec<&dyn Aml> = vec![&buses];
    resources.extend(windows.iter().map(|window| window as &dyn Aml));
    Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)).to_aml_bytes(&mut body);
    operating_system_capabilities(&mut body);
    let name = format!("P{number:03X}");
    Device::new(Path::new(&name), vec![&Raw(body)]).to_aml_bytes(aml);
}

/// A window of BARs. It is not called prefetchable, so that BARs of both sorts may go there.
fn window(range: GpaRange) -> Option<AddressSpace<u64>> {
    let last = range.start.checked_add(range.len.checked_sub(1)?)?;
    Some(AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, range.start, last, None))
}

/// The `_OSC` method of a host bridge (ACPI 6.5 §6.2.11): of the wishes in the third word, those in [`OSC_GRANTED`].
fn operating_system_capabilities(aml: &mut Vec<u8>) {
    let (status, wishes) = (Name::new_field_name("CDW1"), Name::new_field_name("CDW3"));
    let (uuid, revision, capabilities, granted) = (Arg(0), Arg(1), Arg(3), Local(0));
    let refuse = |bit| Or::new(&status, &status, bit);
    Method::new(
        Path::new("_OSC"),
        4,
        true,
        vec![
            &CreateDWordField::new(&status, &capabilities, &ZERO),
            &If::new(
                &Equal::new(&uuid, &Uuid::new(OSC_UUID)),
                vec![
                    &CreateDWordField::new(&wishes, &capabilities, &OSC_WISHES_OFFSET),
                    &And::new(&granted, &wishes, &OSC_GRANTED),
                    &If::new(&NotEqual::new(&revision, &ONE), vec![&refuse(&OSC_UNKNOWN_REVISION)]),
                    &If::new(&NotEqual::new(&wishes, &granted), vec![&refuse(&OSC_MASKED)]),
                    &Store::new(&wishes, &granted),
                ],
            ),
            &Else::new(vec![&refuse(&OSC_UNKNOWN_UUID)]),
            &Return::new(&capabilities),
        ],
    )
    .to_aml_bytes(aml);
}

/// Memory that no device may be given: ECAM. Linux uses ECAM only where it finds it claimed like this.
fn reserved_memory(bridges: &[HostBridge], aml: &mut Vec<u8>) {
    let fixed: Vec<Memory32Fixed> = bridges
        .iter()
        .filter_map(|bridge| {
            let ecam = bridge.ecam();
            Some(Memory32Fixed::new(true, u32::try_from(ecam.start).ok()?, u32::try_from(ecam.len).ok()?))
        })
        .collect();
    let resources = fixed.iter().map(|range| range as &dyn Aml).collect();
    Device::new(
        Path::new("MBRD"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
        ],
    )
    .to_aml_bytes(aml);
}

/// An edge-triggered interrupt, active high and not shared.
fn edge_interrupt(pin: u8) -> Interrupt {
    Interrupt::new(true, true, false, false, pin.into())
}

/// The first serial port.
fn serial_port(aml: &mut Vec<u8>) {
    let port = layout::COM1_PORT;
    let (interrupt, ports) = (edge_interrupt(layout::COM1_PIN), IO::new(port, port, 1, 8));
    let resources = ResourceTemplate::new(vec![&interrupt, &ports]);
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &resources),
        ],
    )
    .to_aml_bytes(aml);
}

/// The panic device, by which a guest tells that its kernel has crashed.
fn panic_device(aml: &mut Vec<u8>) {
    let port = layout::PVPANIC_PORT;
    Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(Path::new("_STA"), &STATUS_PRESENT),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&IO::new(port, port, 1, 1)])),
        ],
    )
    .to_aml_bytes(aml);
}

/// The power button (ACPI 6.5 §4.8.2.2.1.2).
fn power_button(aml: &mut Vec<u8>) {
    Device::new(Path::new("PWRB"), vec![&Name::new(Path::new("_HID"), &EISAName::new("PNP0C0C"))]).to_aml_bytes(aml);
}

/// The generic event device (ACPI 6.5 §5.6.9): its interrupt makes the guest read which events have happened, and
/// notify the devices that they are for.
fn event_device(pluggable_processors: bool, aml: &mut Vec<u8>) {
    let events = Local(0);
    let pressed = And::new(&ZERO, &events, &layout::GED_POWER_BUTTON);
    let (register, button) = (Path::new("ESEL"), Path::new("\\_SB_.PWRB"));
    let notify_button = Notify::new(&button, &NOTIFY_PRESSED);
    let (store, if_pressed) = (Store::new(&events, &register), If::new(&pressed, vec![&notify_button]));
    let asked = And::new(&ZERO, &events, &layout::GED_PROCESSORS);
    let scan = processors::scan();
    let if_asked = If::new(&asked, vec![&scan]);
    let mut handler: Vec<&dyn Aml> = vec![&store, &if_pressed];
    if pluggable_processors {
        handler.push(&if_asked);
    }
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(vec![&edge_interrupt(layout::GED_PIN)])),
            &OpRegion::new(Path::new("EREG"), OpRegionSpace::SystemIO, &layout::GED_PORT, &layout::GED_PORT_SIZE),
            &Field::new(
                Path::new("EREG"),
                FieldAccessType::DWord,
                FieldLockRule::NoLock,
                FieldUpdateRule::WriteAsZeroes,
                vec![FieldEntry::Named(*b"ESEL", usize::from(layout::GED_PORT_SIZE) * 8)],
            ),
            &Method::new(Path::new("_EVT"), 1, true, handler),
        ],
    )
    .to_aml_bytes(aml);
}
