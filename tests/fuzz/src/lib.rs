//! What the fuzz targets share: inputs as programs of a guest, the guest that carries them out, the host's side of each
//! device, and the first inputs that fuzzing starts from.
//!
//! Helpers panic where the monitor's code has gone wrong: that is how libFuzzer learns of it.

pub mod allocated;
pub mod authority;
pub mod bodies;
pub mod census;
pub mod configuration;
pub mod event_log;
pub mod functions;
pub mod fw_cfg;
pub mod guest;
pub mod hosts;
pub mod http;
pub mod igvm;
pub mod input;
pub mod kernel;
pub mod layout;
pub mod memory;
pub mod payload;
pub mod platform;
pub mod quotes;
pub mod relocations;
pub mod seeds;
pub mod tdvf;
pub mod vfio;
