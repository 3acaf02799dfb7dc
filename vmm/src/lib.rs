//! The machine: a VM made from its configuration, run, and taken apart again.
//!
//! The straight road: [`carry_out`] has the [`owner`] create and boot a VM. To create is to validate the configuration
//! and to open what it names ([`Inputs`](inputs::Inputs)); to boot is to load the kernel into new memory ([`boot`]) and
//! to make the machine around it ([`machine`]). Then the owner, and it alone, decides what each report of the guest and
//! each [`request`] of a client means. What clients may know of the VM stands on the [`board`]; they come through the
//! [`server`].

pub mod board;
pub mod boot;
pub mod confidential;
pub mod devices;
pub mod endpoints;
pub mod firmware;
pub mod functions;
pub mod host;
pub mod inbox;
pub mod inputs;
pub mod kernel;
pub mod kinds;
pub mod machine;
pub mod memory;
pub mod notify;
pub mod owner;
pub mod pluggable;
pub mod processors;
pub mod quotes;
pub mod reach;
pub mod request;
mod run;
pub mod sandbox;
pub mod seams;
pub mod server;
pub mod trace;
pub mod troubles;
pub mod vcpu;

pub use run::{Failure, Plan, carry_out, carry_out_on};
pub use trace::Watching;
