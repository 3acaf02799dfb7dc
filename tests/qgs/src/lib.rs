//! What Intel's hardware and services do for a quote, played for tests: a TDX module that makes reports, a quote service
//! that speaks the protocol of Intel's (`qgs_msg_lib.h`), a quoting enclave that signs, and the certificates and
//! collateral with which its quotes can be checked. All keys are made anew for each [`Platform`].

mod der;
mod platform;
mod report;
mod service;

pub use platform::Platform;
pub use report::{Registers, report};
pub use service::{Service, ask};
