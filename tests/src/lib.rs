//! The harness: hosts to start Halyard in, guests to start in it, and an agent that does in both what a test asks.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! use halyard_tests::{Host, Kernel, VmSpec};
//!
//! let host = Host::shared()?;
//! let vm = host.halyard(&VmSpec::guest(Kernel::Debian6_12Cloud)?.cpus(2).memory("512M"))?;
//! vm.wait_line("HALYARD-GUEST ready")?;
//! assert_eq!(vm.run("grep -c ^processor /proc/cpuinfo")?.ok()?, "2");
//! # Ok(())
//! # }
//! ```

pub mod abuse;
pub mod agent;
pub mod bench;
pub mod cache;
pub mod census;
pub mod client;
pub mod command;
pub mod confined;
pub mod contract;
pub mod cpio;
pub mod esp;
pub mod firmware;
pub mod forward;
pub mod host;
pub mod images;
pub mod kaslr;
pub mod kernels;
pub mod loads;
pub mod measured;
pub mod network;
pub mod pool;
pub mod process;
pub mod protocol;
pub mod pty;
pub mod python;
mod qemu;
pub mod quotes;
pub mod recorder;
pub mod service;
pub mod story;
pub mod text;
pub mod tiny;
pub mod vm;

pub use client::Client;
pub use command::{Cmd, Output};
pub use forward::Forward;
pub use host::{Host, HostSpec, Kind};
pub use kernels::Kernel;
pub use network::{Bridge, Tap};
pub use pool::Lent;
pub use process::{Process, Socket};
pub use protocol::Status;
pub use vm::{Vm, VmSpec};
