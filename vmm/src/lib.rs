//! The machine: a VM made from its configuration, run, and taken apart again.
//!
//! The straight road: [`run`] validates the configuration and opens what it names ([`Inputs`](inputs::Inputs)), loads
//! the kernel into new memory ([`boot`]), makes the machine around it ([`machine`]), and then decides, as the one
//! owner of the machine, what each report means ([`owner`]).

pub mod board;
pub mod boot;
pub mod devices;
pub mod endpoints;
pub mod host;
pub mod inbox;
pub mod inputs;
pub mod machine;
pub mod memory;
pub mod notify;
pub mod owner;
pub mod request;
mod run;
pub mod sandbox;
pub mod seams;
pub mod vcpu;

pub use run::{Failure, run, run_on};
