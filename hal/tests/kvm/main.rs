//! The KVM backend on the machine's own `/dev/kvm`, with guests of a few bytes.

mod exits;
mod guest;
mod interrupts;
mod kicks;
mod memory;
mod runner;
mod state;
mod vm;
