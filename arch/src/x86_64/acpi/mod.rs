//! The ACPI tables of a hardware-reduced platform: RSDP, XSDT, FADT, MADT, MCFG and DSDT (ACPI 6.5 §5.2).

mod dsdt;
mod linked;
mod processors;
mod tables;
#[cfg(test)]
mod tests;

use acpi_tables::Aml;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

pub use self::linked::{LOADER_FILE, LinkedTables, RSDP_FILE, TABLES_FILE, link};
use super::layout;
use super::platform::Platform;

/// Who made the tables, as they state it.
const OEM_ID: [u8; 6] = *b"HALYRD";
const OEM_TABLE_ID: [u8; 8] = *b"HALYARD ";
const OEM_REVISION: u32 = 1;

/// Tables begin at multiples of this, in bytes.
const ALIGNMENT: usize = 16;

/// The tables could not be built or written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// There is no room for them.
    #[error("the ACPI tables take {size} bytes, and {room} are reserved for them: use fewer vCPUs or host bridges")]
    TooLarge {
        /// Their size in bytes.
        size: usize,
        /// The room in bytes.
        room: u64,
    },
    /// Guest memory is not writable where they go.
    #[error("the ACPI tables could not be written to guest memory at {at:#x}: {source}")]
    Write {
        /// Where they go.
        at: u64,
        /// Why not.
        source: GuestMemoryError,
    },
}

/// Writes the tables to [`layout::ACPI_TABLES`], with the RSDP first.
///
/// # Errors
/// [`AcpiError`] where they do not fit or cannot be written.
pub fn write(memory: &GuestMemoryMmap, platform: &Platform) -> Result<(), AcpiError> {
    let tables = build(platform, layout::ACPI_TABLES.start);
    let room = layout::ACPI_TABLES.len;
    if u64::try_from(tables.len()).map_or(true, |size| size > room) {
        return Err(AcpiError::TooLarge { size: tables.len(), room });
    }
    let at = layout::ACPI_TABLES.start;
    memory.write_slice(&tables, GuestAddress(at)).map_err(|source| AcpiError::Write { at, source })
}

/// All tables as one piece of memory that will lie at `base`, the RSDP first.
fn build(platform: &Platform, base: u64) -> Vec<u8> {
    let mut area = Area { base, bytes: vec![0; Rsdp::len()] };
    let xsdt = place_tables(&mut area, platform).xsdt;
    area.finish(&Rsdp::new(OEM_ID, xsdt))
}

/// Where tables are that have addresses of others, or that others have the addresses of.
struct Places {
    fadt: u64,
    xsdt: u64,
    /// How many tables the XSDT lists.
    listed: usize,
}

/// Appends all tables but the RSDP.
fn place_tables(area: &mut Area, platform: &Platform) -> Places {
    let dsdt = area.add(&dsdt::build(platform));
    let fadt = area.add(&tables::fadt(platform, dsdt));
    let madt = area.add(&tables::madt(platform));
    let mcfg = area.add(&tables::mcfg(&platform.host_bridges));
    let listed = [fadt, madt, mcfg];
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in listed {
        xsdt.add_entry(table);
    }
    Places { fadt, xsdt: area.add(&xsdt), listed: listed.len() }
}

/// Tables one behind the other.
struct Area {
    base: u64,
    bytes: Vec<u8>,
}

impl Area {
    /// Appends a table and tells its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGNMENT), 0);
        let offset = u64::try_from(self.bytes.len()).unwrap_or(u64::MAX);
        table.to_aml_bytes(&mut self.bytes);
        self.base.saturating_add(offset)
    }

    /// Puts the RSDP into the room that was left for it.
    fn finish(mut self, rsdp: &Rsdp) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(Rsdp::len());
        rsdp.to_aml_bytes(&mut bytes);
        for (to, from) in self.bytes.iter_mut().zip(bytes) {
            *to = from;
        }
        self.bytes
    }
}
