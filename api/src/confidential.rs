//! VMs whose memory their host cannot read.

use std::borrow::Cow;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::host::KindName;
use crate::units::{UnitError, shorten, written_as_text};

/// What hides the guest from its host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Confidential {
    /// An Intel TDX trust domain.
    Tdx(Tdx),
    /// An AMD SEV-SNP guest.
    Snp {},
    /// A VM with private memory but without hardware that keeps it so: for development.
    SoftwareProtected {},
}

impl Confidential {
    /// The kind without its parameters.
    pub fn name(&self) -> KindName {
        match self {
            Self::Tdx(_) => KindName::Tdx,
            Self::Snp {} => KindName::Snp,
            Self::SoftwareProtected {} => KindName::SoftwareProtected,
        }
    }
}

/// An Intel TDX trust domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tdx {
    /// A host that takes a page away ends the trust domain, instead of raising an exception in it at a place of the host's
    /// choice. Linux as a guest insists on it.
    pub sept_ve_disable: bool,
    /// The owner's configuration (MRCONFIGID), in quotes as it is here. Without it: zeros.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub config_id: Option<Identity>,
    /// The owner (MROWNER).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<Identity>,
    /// What the owner chose (MROWNERCONFIG).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner_config: Option<Identity>,
    /// Who signs the guest's reports: the host's Quote Generation Service. Without it the guest is told that there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quote_service: Option<QuoteService>,
}

impl Default for Tdx {
    fn default() -> Self {
        Self { sept_ve_disable: true, config_id: None, owner: None, owner_config: None, quote_service: None }
    }
}

/// 48 bytes that stand for something, most often a SHA-384, written as 96 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity([u8; 48]);

impl Identity {
    /// With these bytes.
    pub const fn new(bytes: [u8; 48]) -> Self {
        Self(bytes)
    }

    /// Its bytes, in the order in which they are written.
    pub const fn bytes(self) -> [u8; 48] {
        self.0
    }
}

impl FromStr for Identity {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || UnitError(format!("«{}» is no identity: write 96 hexadecimal digits", shorten(text)));
        let digits = text.as_bytes();
        let mut bytes = [0; 48];
        if digits.len() != 2 * bytes.len() {
            return Err(wrong());
        }
        let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let [Some(high), Some(low)] = [digit(pair[0]), digit(pair[1])] else { return Err(wrong()) };
            *byte = high << 4 | low;
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

written_as_text!(
    Identity,
    "Identity",
    {
        "description": "48 bytes, most often a SHA-384, as 96 hexadecimal digits.",
        "type": "string",
        "format": "identity",
        "pattern": "^[0-9A-Fa-f]{96}$"
    }
);

/// Where the host's Quote Generation Service listens: `unix:PATH`, or `vsock:CID:PORT`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum QuoteService {
    /// A Unix socket.
    Unix(PathBuf),
    /// A port of a VM socket; the host itself is CID 2, or 1 for a process of its own.
    Vsock {
        /// Who listens.
        cid: u32,
        /// At which port.
        port: u32,
    },
}

impl FromStr for QuoteService {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let vsock = |address: &str| {
            let (cid, port) = address.split_once(':')?;
            Some(Self::Vsock { cid: cid.parse().ok()?, port: port.parse().ok()? })
        };
        let service = match text.split_once(':') {
            Some(("unix", path)) if !path.is_empty() => Some(Self::Unix(path.into())),
            Some(("vsock", address)) => vsock(address),
            _ => None,
        };
        service.ok_or_else(|| {
            let what = shorten(text);
            UnitError(format!("«{what}» is no quote service: write unix:/var/run/tdx-qgs/qgs.socket or vsock:2:4050"))
        })
    }
}

impl fmt::Display for QuoteService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
        }
    }
}

written_as_text!(
    QuoteService,
    "QuoteService",
    {
        "description": "A Unix socket or a VM socket, as in unix:/var/run/tdx-qgs/qgs.socket or vsock:2:4050.",
        "type": "string",
        "format": "quote-service",
        "pattern": "^(unix:.+|vsock:[0-9]+:[0-9]+)$"
    }
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let text = "00ff".repeat(24);
        assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        assert_eq!(text.to_uppercase().parse::<Identity>().unwrap().bytes()[..4], [0, 0xff, 0, 0xff]);
        for text in ["unix:/run/qgs.socket", "vsock:2:4050", "unix:a:b"] {
            assert_eq!(text.parse::<QuoteService>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_is_neither_is_refused_with_what_would_be_right() {
        for text in ["", "00", &"0g".repeat(48), &"0".repeat(97), &"é".repeat(48)] {
            let error = text.parse::<Identity>().unwrap_err().to_string();
            assert!(error.ends_with("is no identity: write 96 hexadecimal digits"), "{error}");
        }
        for text in ["", "/run/qgs.socket", "unix:", "vsock:2", "vsock:2:x", "vsock:2:3:4", "vsock:-1:1"] {
            let error = text.parse::<QuoteService>().unwrap_err().to_string();
            assert!(error.contains("unix:/var/run/tdx-qgs/qgs.socket or vsock:2:4050"), "{error}");
        }
    }
}
