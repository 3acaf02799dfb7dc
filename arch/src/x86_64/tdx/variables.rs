//! Variables of firmware as its file has them (edk2, `MdeModulePkg/Include/Guid/VariableFormat.h`): those that say whose
//! executables it starts are measured. All numbers are little-endian.

use std::collections::BTreeMap;

use sha2::{Digest, Sha384};

use super::measure::Digest384;

/// Where a firmware volume has the length of its header (UEFI Platform Initialization Specification 1.8, volume 3,
/// §3.2.1.1); the variables' own header is behind it.
const VOLUME_HEADER_LENGTH: usize = 48;
const STORE_HEADER: usize = 28;
/// aaf32c78-947b-439a-a180-2e144ec37792: a store of firmware that knows secure boot.
const AUTHENTICATED_STORE: [u8; 16] =
    [0x78, 0x2c, 0xf3, 0xaa, 0x7b, 0x94, 0x9a, 0x43, 0xa1, 0x80, 0x2e, 0x14, 0x4e, 0xc3, 0x77, 0x92];
/// A variable: its header, what begins it, and the state of one that was neither changed nor deleted.
const HEADER: usize = 60;
const START: [u8; 2] = [0xaa, 0x55];
const STATE: usize = 2;
const ADDED: u8 = 0x3f;
const NAME_SIZE: usize = 36;
const DATA_SIZE: usize = 40;
const VENDOR: usize = 44;

/// 8be4df61-93ca-11d2-aa0d-00e098032b8c, and d719b2cb-3d3a-4596-a3bc-dad00e67656f.
const GLOBAL: [u8; 16] =
    [0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c];
const SECURITY: [u8; 16] =
    [0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f];
/// Keys and signatures by which firmware decides, in the order in which it measures them: the last where it is there.
const KEYS: [(&str, [u8; 16]); 4] = [("PK", GLOBAL), ("KEK", GLOBAL), (DATABASE, SECURITY), ("dbx", SECURITY)];
/// Whose signatures count.
const DATABASE: &str = "db";
const TIMESTAMPS: (&str, [u8; 16]) = ("dbt", SECURITY);
const SECURE_BOOT: &str = "SecureBoot";

/// The variables of a firmware file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Variables<'a> {
    by_name: BTreeMap<(String, [u8; 16]), &'a [u8]>,
    knows_secure_boot: bool,
}

impl<'a> Variables<'a> {
    /// Reads a configuration volume, up to the first variable that is none.
    pub fn read(volume: &'a [u8]) -> Self {
        let length = volume.get(VOLUME_HEADER_LENGTH..).and_then(|rest| rest.first_chunk());
        let store = usize::from(length.map_or(u16::MAX, |length| u16::from_le_bytes(*length)));
        let mut variables = Self {
            by_name: BTreeMap::new(),
            knows_secure_boot: volume.get(store..).is_some_and(|rest| rest.starts_with(&AUTHENTICATED_STORE)),
        };
        if !variables.knows_secure_boot {
            return variables;
        }
        let mut rest = volume.get(store + STORE_HEADER..).unwrap_or_default();
        while let Some((variable, next)) = take(rest) {
            if variable.added {
                variables.by_name.insert((variable.name, variable.vendor), variable.data);
            }
            rest = next;
        }
        variables
    }

    /// Executables must be signed: there is a platform key.
    pub fn secure_boot(&self) -> bool {
        let (name, vendor) = KEYS[0];
        self.by_name.contains_key(&(name.to_owned(), vendor))
    }

    /// Whose signatures count: EFI signature lists.
    pub(super) fn database(&self) -> &'a [u8] {
        self.by_name.get(&(DATABASE.to_owned(), SECURITY)).copied().unwrap_or_default()
    }

    /// What firmware measures of them, by name: a variable that is missing is one without data.
    pub fn measured(&self) -> Vec<(&'static str, Digest384)> {
        // Firmware makes it from the others.
        let secure_boot: &[u8] = match (self.knows_secure_boot, self.secure_boot()) {
            (false, _) => &[],
            (true, false) => &[0],
            (true, true) => &[1],
        };
        let mut measured = vec![(SECURE_BOOT, digest(SECURE_BOOT, GLOBAL, secure_boot))];
        let find = |name: &str, vendor| self.by_name.get(&(name.to_owned(), vendor)).copied();
        measured.extend(
            KEYS.iter().map(|(name, vendor)| (*name, digest(name, *vendor, find(name, *vendor).unwrap_or_default()))),
        );
        let (name, vendor) = TIMESTAMPS;
        measured.extend(find(name, vendor).map(|data| (name, digest(name, vendor, data))));
        measured
    }
}

/// What firmware measures of an entry of its database.
pub(super) fn digest_of_entry(entry: &[u8]) -> Digest384 {
    digest(DATABASE, SECURITY, entry)
}

/// Of a variable's vendor, the lengths of name (in characters) and data as numbers of 64 bits, and both (TCG PC Client
/// Platform Firmware Profile, §10.2.6, `UEFI_VARIABLE_DATA`).
fn digest(name: &str, vendor: [u8; 16], data: &[u8]) -> Digest384 {
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_le_bytes).collect();
    let mut hash = Sha384::new();
    hash.update(vendor);
    hash.update((name.len() as u64 / 2).to_le_bytes());
    hash.update((data.len() as u64).to_le_bytes());
    hash.update(name);
    hash.update(data);
    hash.finalize().into()
}

struct Variable<'a> {
    name: String,
    vendor: [u8; 16],
    data: &'a [u8],
    added: bool,
}

/// The variable at the start of these bytes, and what is behind it.
fn take(bytes: &[u8]) -> Option<(Variable<'_>, &[u8])> {
    let header = bytes.get(..HEADER).filter(|header| header.starts_with(&START))?;
    let size = |at: usize| {
        let size = header.get(at..)?.first_chunk().map(|size| u32::from_le_bytes(*size))?;
        usize::try_from(size).ok()
    };
    let name = bytes.get(HEADER..)?.get(..size(NAME_SIZE)?)?;
    let from = HEADER + name.len();
    let data = bytes.get(from..)?.get(..size(DATA_SIZE)?)?;
    let units = name.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]])).take_while(|unit| *unit != 0);
    let variable = Variable {
        name: String::from_utf16_lossy(&units.collect::<Vec<_>>()),
        vendor: *header.get(VENDOR..)?.first_chunk()?,
        data,
        added: header.get(STATE) == Some(&ADDED),
    };
    let next = (from + data.len()).next_multiple_of(4);
    Some((variable, bytes.get(next..).unwrap_or_default()))
}
