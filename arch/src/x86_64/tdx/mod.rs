//! Launching a trust domain of Intel TDX: from a firmware file to the pages that are added and measured, in their order.
//!
//! [`Tdvf`] is what a firmware says of itself, [`LaunchPlan`] what is added to a trust domain because of it, and
//! [`measure`] what the TDX module makes of that, [`events`] what firmware and kernel make of what they are given ([`authority`]: and of who signed it): whoever
//! launches and whoever only predicts goes by the same plan. [`log`] is what a guest says that it was, and [`corim`]
//! tells verifiers.

pub mod authority;
pub mod corim;
pub mod events;
mod hob;
mod igvm;
pub mod log;
pub mod measure;
mod plan;
mod tdvf;
#[cfg(test)]
mod tests;
mod variables;

pub use self::igvm::IgvmError;
pub use hob::HobError;
pub use plan::{LaunchPlan, LaunchRegion, PlanError};
pub use tdvf::{Section, SectionKind, Tdvf, TdvfError};
pub use variables::Variables;
