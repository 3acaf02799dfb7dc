//! The tables as firmware takes them: in files without addresses, and a script by which the firmware, which chooses where
//! they go, puts addresses and checksums in (QEMU, `hw/acpi/bios-linker-loader.c`). All numbers are little-endian.
//!
//! The same platform gives the same bytes on every host: what is measured of them can be foretold.

use acpi_tables::rsdp::Rsdp;

use super::super::platform::Platform;
use super::{Area, place_tables};

/// The files, by the names under which firmware looks for them.
pub const TABLES_FILE: &str = "etc/acpi/tables";
/// The file with the root pointer alone, which goes where old systems search for it.
pub const RSDP_FILE: &str = "etc/acpi/rsdp";
/// The script.
pub const LOADER_FILE: &str = "etc/table-loader";

/// Bytes of a command, and of a file's name in it.
const COMMAND_SIZE: usize = 128;
const NAME_SIZE: usize = 56;
const ALLOCATE: u32 = 1;
const ADD_POINTER: u32 = 2;
const ADD_CHECKSUM: u32 = 3;
/// Zones to allocate from: anywhere, and the last 128 KiB of the first megabyte.
const ZONE_HIGH: u8 = 1;
const ZONE_F_SEGMENT: u8 = 2;

/// Where a table has its length and its checksum.
const LENGTH_OFFSET: usize = 4;
const CHECKSUM_OFFSET: usize = 9;
const HEADER_SIZE: usize = 36;
/// Where the FADT has the address of the DSDT (`X_DSDT`).
const FADT_DSDT_OFFSET: usize = 140;
/// The root pointer: the XSDT's address, and checksums of its first 20 bytes and of all.
const RSDP_XSDT_OFFSET: usize = 24;
const RSDP_CHECKSUMS: [(usize, usize); 2] = [(8, 20), (32, 36)];
const ADDRESS_SIZE: usize = 8;

/// Tables in files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkedTables {
    /// What is in [`TABLES_FILE`]: an address in it is an offset from its start.
    pub tables: Vec<u8>,
    /// What is in [`RSDP_FILE`].
    pub rsdp: Vec<u8>,
    /// What is in [`LOADER_FILE`].
    pub loader: Vec<u8>,
}

/// The tables of a platform, to be linked by firmware.
pub fn link(platform: &Platform) -> LinkedTables {
    let mut area = Area { base: 0, bytes: Vec::new() };
    let places = place_tables(&mut area, platform);
    let mut rsdp = Vec::new();
    acpi_tables::Aml::to_aml_bytes(&Rsdp::new(super::OEM_ID, places.xsdt), &mut rsdp);
    let mut script = Script { tables: area.bytes, rsdp, commands: Vec::new() };

    // Firmware measures files in the order in which it loads them. This is QEMU's.
    script.command(ALLOCATE, &[&name(RSDP_FILE), &16_u32.to_le_bytes(), &[ZONE_F_SEGMENT]]);
    script.command(ALLOCATE, &[&name(TABLES_FILE), &64_u32.to_le_bytes(), &[ZONE_HIGH]]);
    let at = |offset: u64| usize::try_from(offset).unwrap_or(usize::MAX);
    let (fadt, xsdt) = (at(places.fadt), at(places.xsdt));
    script.point(TABLES_FILE, fadt + FADT_DSDT_OFFSET);
    for entry in 0..places.listed {
        script.point(TABLES_FILE, xsdt + HEADER_SIZE + entry * ADDRESS_SIZE);
    }
    script.point(RSDP_FILE, RSDP_XSDT_OFFSET);
    for table in [fadt, xsdt] {
        let length = script.tables.get(table + LENGTH_OFFSET..).and_then(|rest| rest.first_chunk());
        let length = length.map_or(0, |length| u32::from_le_bytes(*length));
        script.check(TABLES_FILE, table + CHECKSUM_OFFSET, table, at(length.into()));
    }
    for (checksum, length) in RSDP_CHECKSUMS {
        script.check(RSDP_FILE, checksum, 0, length);
    }
    LinkedTables { tables: script.tables, rsdp: script.rsdp, loader: script.commands }
}

/// Files and the script for them.
struct Script {
    tables: Vec<u8>,
    rsdp: Vec<u8>,
    commands: Vec<u8>,
}

impl Script {
    fn command(&mut self, number: u32, arguments: &[&[u8]]) {
        let end = self.commands.len() + COMMAND_SIZE;
        self.commands.extend_from_slice(&number.to_le_bytes());
        self.commands.extend(arguments.iter().copied().flatten());
        self.commands.resize(end, 0);
    }

    /// What is at `offset` is an offset into the tables, and becomes an address.
    fn point(&mut self, file: &str, offset: usize) {
        let size = u8::try_from(ADDRESS_SIZE).unwrap_or(0);
        self.command(ADD_POINTER, &[&name(file), &name(TABLES_FILE), &number(offset), &[size]]);
    }

    /// The byte at `offset` becomes what lets all `length` bytes from `start` sum to zero. It counts itself as zero.
    fn check(&mut self, file: &str, offset: usize, start: usize, length: usize) {
        let bytes = if file == RSDP_FILE { &mut self.rsdp } else { &mut self.tables };
        if let Some(byte) = bytes.get_mut(offset) {
            *byte = 0;
        }
        self.command(ADD_CHECKSUM, &[&name(file), &number(offset), &number(start), &number(length)]);
    }
}

fn name(file: &str) -> [u8; NAME_SIZE] {
    let mut name = [0; NAME_SIZE];
    name.iter_mut().zip(file.bytes()).for_each(|(to, from)| *to = from);
    name
}

/// Offsets are far below 4 GiB: tables of more than that many bytes fit nowhere.
fn number(offset: usize) -> [u8; 4] {
    u32::try_from(offset).unwrap_or(u32::MAX).to_le_bytes()
}
