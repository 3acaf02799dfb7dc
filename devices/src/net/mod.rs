//! Networks on the host.

mod tap;

pub use tap::{Offloads, Tap, TapError};

/// Length in bytes of the header before each frame (virtio 1.2 §5.1.6), as the tap is told to use it.
pub const HEADER_LEN: usize = 12;

/// The longest frame, in bytes, with its header: 65535 of a segmented packet's payload, Ethernet and VLAN headers.
pub const MAX_FRAME: usize = 65562 + HEADER_LEN;
