//! Sections of a device's saved state.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Error, Result, StateSink, StateSource};

/// Adds a section.
pub(crate) fn save<T: Serialize>(into: &mut dyn StateSink, name: &str, version: u32, state: &T) -> Result<()> {
    let data = serde_json::to_vec(state).map_err(|e| Error::State(format!("{name}: {e}")))?;
    into.section(name, version, &data)
}

/// Reads a section of exactly this version.
pub(crate) fn restore<T: DeserializeOwned>(from: &mut dyn StateSource, name: &str, version: u32) -> Result<T> {
    let Some((found, data)) = from.section(name)? else {
        return Err(Error::State(format!("{name}: the section is missing")));
    };
    if found != version {
        return Err(Error::State(format!(
            "{name}: the section is of version {found}, this is a reader of version {version}"
        )));
    }
    serde_json::from_slice(&data).map_err(|e| Error::State(format!("{name}: {e}")))
}
