//! Sizes in bytes and hardware addresses, as people write them.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A text that is no size, or no hardware address. The message says what would be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct UnitError(pub(crate) String);

/// Has a type that is written and parsed as a text stand so in configurations and replies, with this name and schema.
macro_rules! written_as_text {
    ($type:ty, $name:literal, $schema:tt) => {
        impl Serialize for $type {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }

        impl JsonSchema for $type {
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }

            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}
pub(crate) use written_as_text;

/// A number of bytes. Written as a number, or as a number with a suffix: `K`, `M`, `G` and `T` count in steps of
/// 1024; `MiB` and `Mi` are the same as `M`, in either case of letters. `MB` is refused, since it may mean either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

const SUFFIXES: [(char, u32); 4] = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];

impl ByteSize {
    /// This many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// This many MiB.
    pub const fn mib(mib: u32) -> Self {
        Self((mib as u64) << 20)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = |why: &str| UnitError(format!("«{}» is not a size: {why}", shorten(text)));
        let text = text.trim();
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, suffix) = text.split_at(digits);
        if number.is_empty() {
            return Err(wrong("write bytes, or a number with K, M, G or T, as in 512M"));
        }
        if suffix.starts_with(['.', ',']) {
            return Err(wrong("write a whole number with a smaller suffix, as in 1536M for one and a half G"));
        }
        let number: u64 = number.parse().map_err(|_| wrong("it is larger than any address"))?;
        let shift = match suffix.trim_start().to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "KB" | "MB" | "GB" | "TB" => {
                return Err(wrong("a B after the prefix may mean steps of 1000 or of 1024; write M or MiB for 1024"));
            }
            other => SUFFIXES
                .iter()
                .find(|(letter, _)| other.strip_prefix(*letter).is_some_and(|rest| matches!(rest, "" | "I" | "IB")))
                .map(|(_, shift)| *shift)
                .ok_or_else(|| wrong("the suffixes are K, M, G and T, in steps of 1024"))?,
        };
        number.checked_mul(1 << shift).map(Self).ok_or_else(|| wrong("it is larger than any address"))
    }
}

/// As it is written: with the largest suffix that leaves a whole number.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (letter, shift) in SUFFIXES.iter().rev() {
            if self.0 != 0 && self.0.trailing_zeros() >= *shift {
                return write!(f, "{}{letter}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as 512M")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::custom("a size is not negative"))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_any(SizeVisitor)
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> Cow<'static, str> {
        "ByteSize".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A number of bytes, or a number with K, M, G or T in steps of 1024, as in 512M or 6GiB.",
            "type": ["string", "integer"],
            "format": "byte-size",
            "minimum": 0,
            "pattern": "^[0-9]+ *([Bb]|[KMGTkmgt]([Ii][Bb]?)?)?$"
        })
    }
}

/// A span of time. Written as a whole number with a unit, `ms`, `s`, `m` or `h`, as in `30s`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TimeSpan {
    /// In milliseconds.
    milliseconds: u64,
}

/// Units of time in milliseconds, the largest first.
const TIME_UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];

impl TimeSpan {
    /// This many milliseconds.
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self { milliseconds }
    }

    /// As the standard library has it.
    pub const fn duration(self) -> Duration {
        Duration::from_millis(self.milliseconds)
    }
}

impl FromStr for TimeSpan {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = |why: &str| UnitError(format!("«{}» is not a span of time: {why}", shorten(text)));
        let trimmed = text.trim();
        let digits = trimmed.len() - trimmed.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = trimmed.split_at(digits);
        let known = TIME_UNITS.iter().find(|(known, _)| *known == unit.trim_start());
        let (Ok(number), Some((_, factor))) = (number.parse::<u64>(), known) else {
            return Err(wrong("write a whole number with ms, s, m or h, as in 30s"));
        };
        number.checked_mul(*factor).map(Self::from_millis).ok_or_else(|| wrong("it is longer than can be counted"))
    }
}

/// As it is written: in the largest unit that leaves a whole number.
impl fmt::Display for TimeSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(_, factor): &&(&str, u64)| self.milliseconds != 0 && self.milliseconds.is_multiple_of(*factor);
        let (unit, factor) = TIME_UNITS.iter().find(fits).unwrap_or(&("s", 1000));
        write!(f, "{}{unit}", self.milliseconds / factor)
    }
}

written_as_text!(
    TimeSpan,
    "TimeSpan",
    {
        "description": "A whole number with ms, s, m or h, as in 30s.",
        "type": "string",
        "format": "time-span",
        "pattern": "^[0-9]+ *(ms|s|m|h)$"
    }
);

/// An Ethernet hardware address, written as six pairs of hexadecimal digits with colons between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr([u8; 6]);

impl MacAddr {
    /// The address with these bytes, in the order in which they are sent.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// Its bytes, in the order in which they are sent.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// The address is a group's (multicast or broadcast), not one card's: bit 0 of the first byte.
    pub const fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// A random address that is locally administered (bit 1 of the first byte) and one card's.
    pub fn random() -> Self {
        use std::hash::{BuildHasher, RandomState};
        // A hasher's keys are the standard library's only source of randomness; the hash of nothing depends on them.
        let [a, b, c, d, e, f, ..] = RandomState::new().hash_one(()).to_le_bytes();
        Self([(a & !1) | 2, b, c, d, e, f])
    }
}

impl FromStr for MacAddr {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let wrong = || {
            UnitError(format!(
                "«{}» is not a hardware address: write six pairs of hexadecimal digits, as in 52:54:00:12:34:56",
                shorten(text)
            ))
        };
        let mut bytes = [0; 6];
        let mut pairs = text.split(':');
        for byte in &mut bytes {
            let pair = pairs.next().filter(|pair| pair.len() == 2).ok_or_else(wrong)?;
            if !pair.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(pair, 16).map_err(|_| wrong())?;
        }
        if pairs.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, f] = self.0;
        write!(out, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
    }
}

written_as_text!(
    MacAddr,
    "MacAddr",
    {
        "description": "An Ethernet hardware address, as in 52:54:00:12:34:56.",
        "type": "string",
        "format": "mac-address",
        "pattern": "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$"
    }
);

/// A text from outside, cut so that a message stays readable.
pub(crate) fn shorten(text: &str) -> Cow<'_, str> {
    const LONGEST: usize = 60;
    if text.chars().count() <= LONGEST && !text.contains(char::is_control) {
        return text.into();
    }
    let mut short: String = text.chars().take(LONGEST).flat_map(char::escape_debug).collect();
    if text.chars().count() > LONGEST {
        short.push('…');
    }
    short.into()
}
