//! The contract between Halyard and those who use it: what a VM is ([`VmConfig`]), what is wrong with one
//! ([`validate`]), what became of it ([`Outcome`]) and what a host can do ([`HostReport`]).
//!
//! One [`VmConfig`] is the configuration file (YAML or JSON), the body of a request and what the command line's
//! flags fill. Fields are written in `snake_case`, values of choice in `kebab-case`; whatever comes in several types
//! (a device, an endpoint) is an object with a `type`, and what makes a VM confidential one with a `kind`. Unknown and repeated fields are refused.
//!
//! The way of a configuration: [`parse`] or flags → [`VmConfig::fill_defaults`] → [`validate`] → the machine. The
//! crate knows nothing of the machine, so that a client can link it alone.

mod body;
mod client;
mod confidential;
mod config;
mod defaults;
mod device;
mod diagnose;
mod document;
mod event;
mod host;
mod json;
mod openapi;
mod outcome;
mod parse;
mod problem;
mod quote;
pub mod routes;
mod schema;
mod suggest;
mod tree;
mod units;
mod validate;
mod vm;
mod yaml;

pub use body::{BodyError, parse_body};
pub use client::{Client, ClientError, Events, Options, Response};
pub use confidential::{Confidential, Identity, QuoteService, Tdx};
pub use config::{
    BootUntil, Cpus, Firmware, Hugepages, Kernel, KernelCache, Lifecycle, Memory, OnPanic, OnReset, Pci, Platform,
    Topology, VmConfig,
};
pub use device::{Console, DeviceConfig, Disk, Endpoint, Link, Net, Rng, Vfio};
pub use document::{FieldProblem, PROBLEM_JSON, ProblemDocument, field_of, pointer};
pub use event::{Event, EventKind, IoOperation, Job, JobKind, JobState};
pub use host::{Check, HostFacts, HostReport, KindName, KindReport};
pub use openapi::{OPENAPI_JSON, SCHEMAS, openapi};
pub use outcome::Outcome;
pub use parse::{ConfigText, MAX_CONFIG_BYTES, parse};
pub use problem::{Position, Problem, Problems};
pub use quote::{QuoteAnswer, QuoteField, QuoteQuestion, QuoteServiceState, QuoteSignature, Quotes};
pub use schema::{SCHEMA_JSON, schema};
pub use suggest::did_you_mean;
pub use units::{ByteSize, MacAddr, TimeSpan, UnitError};
pub use validate::{MAX_CMDLINE_BYTES, MAX_VCPUS, MIN_MEMORY, PAGE_SIZE, validate, validate_running};
pub use vm::{MemoryInfo, MemoryPatch, PhaseName, Pong, Reason, Shutdown, Vcpus, VcpusPatch, Version, VmInfo};
pub use yaml::{from_yaml, to_yaml};
