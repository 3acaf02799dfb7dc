//! What firmware and kernel extend a trust domain's registers with until the kernel runs on its own, event by event (edk2:
//! `OvmfPkg`, `SecurityPkg`; Linux: `drivers/firmware/efi/libstub`). Events are in the order in which they come for each
//! register; those of different registers come in between each other.
//!
//! The events are those of OVMF (`IntelTdxX64`, 2025-05 and later) that is given a kernel. Firmware that looks for one on a
//! disk goes on by what it finds there: then the registers are not known before.

use std::fs::File;
use std::io;

use sha2::{Digest, Sha384};

use super::super::acpi;
use super::super::boot::{FileImage, KernelImage};
use super::super::firmware::{Executable, Item, ItemContents, ItemKey, PeError};
use super::measure::{Digest384, Event, event};
use super::plan::LaunchPlan;
use super::tdvf::SectionKind;
use super::variables::Variables;

/// Types of events (TCG PC Client Platform Firmware Profile, §10.4.1).
const EV_SEPARATOR: u32 = 4;
const EV_EVENT_TAG: u32 = 6;
const EV_PLATFORM_CONFIG_FLAGS: u32 = 0xa;
const EV_EFI_VARIABLE_DRIVER_CONFIG: u32 = 0x8000_0001;
const EV_EFI_VARIABLE_BOOT: u32 = 0x8000_0002;
const EV_EFI_BOOT_SERVICES_APPLICATION: u32 = 0x8000_0003;
const EV_EFI_ACTION: u32 = 0x8000_0007;
const EV_EFI_VARIABLE_AUTHORITY: u32 = 0x8000_00e0;
/// Those whose data is a variable.
pub(super) const EV_EFI_VARIABLES: [u32; 3] =
    [EV_EFI_VARIABLE_DRIVER_CONFIG, EV_EFI_VARIABLE_BOOT, EV_EFI_VARIABLE_AUTHORITY];

/// Items that firmware measures when it first looks at them, in its order: the boot menu is one with a number.
const MEASURED_ITEMS: [(ItemKey, &str); 6] = [
    (ItemKey::Name("etc/extra-pci-roots"), "fw_cfg etc/extra-pci-roots"),
    (ItemKey::Number(0x0e), "fw_cfg BootMenu"),
    (ItemKey::Name("etc/boot-menu-wait"), "fw_cfg etc/boot-menu-wait"),
    (ItemKey::Name("etc/reserved-memory-end"), "fw_cfg etc/reserved-memory-end"),
    (ItemKey::Name("opt/ovmf/X-PciMmio64Mb"), "fw_cfg opt/ovmf/X-PciMmio64Mb"),
    (ItemKey::Name("bootorder"), "fw_cfg bootorder"),
];
/// The order in which it loads the ACPI tables.
const TABLES: [&str; 3] = [acpi::LOADER_FILE, acpi::RSDP_FILE, acpi::TABLES_FILE];

/// What there is to boot before firmware has looked at any disk: its own menu, as the application eec25bdc-67f2-4d95-b1d5-f81b2039d11d
/// of the volume 7cb8bdc9-f8eb-4f34-aaea-3ee4af6516a1 (UEFI 2.10 §3.1.3, `EFI_LOAD_OPTION`).
const BOOT_ORDER: [u8; 2] = [0, 0];
const MENU_NAME: &str = "BootManagerMenuApp\0";
/// Active, hidden, an application.
const MENU_ATTRIBUTES: [u8; 4] = [0x09, 0x01, 0, 0];
const MENU_PATH: [u8; 44] = [
    4, 7, 20, 0, 0xc9, 0xbd, 0xb8, 0x7c, 0xeb, 0xf8, 0x34, 0x4f, 0xaa, 0xea, 0x3e, 0xe4, 0xaf, 0x65, 0x16, 0xa1, 4, 6,
    20, 0, 0xdc, 0x5b, 0xc2, 0xee, 0xf2, 0x67, 0x95, 0x4d, 0xb1, 0xd5, 0xf8, 0x1b, 0x20, 0x39, 0xd1, 0x1d, 0x7f, 0xff,
    4, 0,
];

const CALLING: &str = "Calling EFI Application from Boot Option";
const EXIT_INVOKED: &str = "Exit Boot Services Invocation";
const EXIT_SUCCEEDED: &str = "Exit Boot Services Returned with Success";
/// What firmware puts in front of the command line where there is an initramfs.
const INITRD_WORD: &str = "initrd=initrd ";

/// A kernel that firmware is given.
#[derive(Debug, Clone, Copy)]
pub struct MeasuredKernel<'a> {
    /// An EFI executable.
    pub kernel: &'a File,
    /// An initramfs.
    pub initramfs: Option<&'a File>,
    /// The kernel's command line.
    pub cmdline: &'a str,
}

/// Why events cannot be foretold.
#[derive(Debug, thiserror::Error)]
pub enum EventError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] PeError),
    /// The initramfs.
    #[error("cannot be read: {0}")]
    Initramfs(io::Error),
}

/// The firmware's variables.
pub fn variables<'a>(plan: &'a LaunchPlan) -> Variables<'a> {
    let volume = plan.regions.iter().find(|region| region.kind == SectionKind::ConfigurationVolume);
    volume.map(|volume| Variables::read(&volume.contents)).unwrap_or_default()
}

/// What extends RTMR0: what the firmware is told of the machine, whose executables it starts, and by which key it starts the
/// kernel ([`super::authority`]).
pub fn of_firmware(plan: &LaunchPlan, items: &[Item], authority: Option<Digest384>) -> Vec<Event> {
    let mut events = super::measure::first_events(plan);
    let find = |key: ItemKey| items.iter().find(|item| item.key == key).map(|item| &item.contents);
    for (key, what) in MEASURED_ITEMS {
        if let Some(ItemContents::Bytes(bytes)) = find(key) {
            events.push(event(0, EV_PLATFORM_CONFIG_FLAGS, what, bytes));
        }
    }
    for (name, digest) in variables(plan).measured() {
        events.push(Event { register: 0, kind: EV_EFI_VARIABLE_DRIVER_CONFIG, what: name.into(), digest });
    }
    events.push(separator(0));
    for name in TABLES {
        if let Some(ItemContents::Bytes(bytes)) = find(ItemKey::Name(name)) {
            events.push(event(0, EV_PLATFORM_CONFIG_FLAGS, name, bytes));
        }
    }
    let key =
        |digest| Event { register: 0, kind: EV_EFI_VARIABLE_AUTHORITY, what: "the kernel's key in db".into(), digest };
    events.extend(authority.map(key));
    events.push(event(0, EV_EFI_VARIABLE_BOOT, "BootOrder", &BOOT_ORDER));
    events.push(event(0, EV_EFI_VARIABLE_BOOT, "Boot0000", &menu()));
    events
}

/// What extends RTMR1, the kernel, and RTMR2, what the kernel is given.
///
/// # Errors
/// [`EventError`].
pub fn of_kernel(given: &MeasuredKernel) -> Result<Vec<Event>, EventError> {
    let image = image(given.kernel).map_err(PeError::Read)?;
    let digest = Executable::read(&image)?.digest::<Sha384>().map_err(PeError::Read)?;
    let action = |text: &'static str| event(1, EV_EFI_ACTION, text, text.as_bytes());
    let mut events = vec![
        Event { register: 1, kind: EV_EFI_BOOT_SERVICES_APPLICATION, what: "the kernel".into(), digest: digest.into() },
        action(CALLING),
        separator(1),
        action(EXIT_INVOKED),
        action(EXIT_SUCCEEDED),
    ];
    let word = if given.initramfs.is_some() { INITRD_WORD } else { "" };
    let options = [word, given.cmdline, "\0"].concat();
    if options.len() > 1 {
        let options: Vec<u8> = options.encode_utf16().flat_map(u16::to_le_bytes).collect();
        events.push(event(2, EV_EVENT_TAG, "the kernel's command line", &options));
    }
    if let Some(initramfs) = given.initramfs {
        let digest = whole(initramfs).map_err(EventError::Initramfs)?;
        events.push(Event { register: 2, kind: EV_EVENT_TAG, what: "the initramfs".into(), digest });
    }
    Ok(events)
}

/// The registers after these events: RTMR0 to 2.
pub fn registers(events: &[Event]) -> [Digest384; 3] {
    let mut registers = [[0; 48]; 3];
    for event in events {
        if let Some(register) = registers.get_mut(usize::from(event.register)) {
            *register = Sha384::new().chain_update(&register).chain_update(event.digest).finalize().into();
        }
    }
    registers
}

fn separator(register: u8) -> Event {
    event(register, EV_SEPARATOR, "a separator", &[0; 4])
}

fn menu() -> Vec<u8> {
    let mut option = MENU_ATTRIBUTES.to_vec();
    option.extend_from_slice(&u16::try_from(MENU_PATH.len()).unwrap_or(0).to_le_bytes());
    option.extend(MENU_NAME.encode_utf16().flat_map(u16::to_le_bytes));
    option.extend_from_slice(&MENU_PATH);
    option
}

fn image(file: &File) -> io::Result<FileImage<'_>> {
    FileImage::new(file)?.ok_or_else(|| io::Error::other("not a regular file"))
}

fn whole(file: &File) -> io::Result<Digest384> {
    let image = image(file)?;
    let mut hash = Sha384::new();
    image.read(0, image.size(), &mut |bytes| {
        hash.update(bytes);
        Ok(())
    })?;
    Ok(hash.finalize().into())
}
