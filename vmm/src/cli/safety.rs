//! What the command line says of the process itself: its sandbox, core dumps, and the descriptors that it keeps.

use std::io;
use std::os::fd::RawFd;
use std::path::PathBuf;

use api::{DeviceConfig, KernelCache, VmConfig};
use vmm::sandbox::{self, Access, Grant, Mode};
use vmm::server::ApiSocket;

use super::args::ServiceArgs;
use crate::logging::Format;

/// What has to be settled for the whole process before it opens anything: `config` and `api` name descriptors that it
/// was started with, and all others are closed.
///
/// # Errors
/// The kernel does not let the process do without core dumps.
pub fn prepare(
    config: Option<&VmConfig>,
    api: Option<&ApiSocket>,
    mode: Mode,
    args: &ServiceArgs,
    format: Format,
) -> io::Result<()> {
    sandbox::close_unclaimed(claimed(config, api));
    if !args.core_dumps {
        sandbox::forbid_core_dumps()?;
    }
    // What functions of the host's reach is locked, too. A client may ask for either.
    if config.is_none_or(VmConfig::locks_memory) {
        sandbox::allow_locked_memory();
    }
    if format == Format::Json {
        sandbox::report_as_json();
    }
    let cache = config.map(|config| config.kernel.cache.clone()).unwrap_or_default();
    sandbox::begin(mode, grants(api, &cache, args))
}

fn claimed(config: Option<&VmConfig>, api: Option<&ApiSocket>) -> impl Iterator<Item = RawFd> {
    let devices = config
        .into_iter()
        .flat_map(|config| config.devices.iter().flat_map(DeviceConfig::descriptors).map(|(_, number)| number));
    let socket = api.and_then(|api| match api {
        ApiSocket::Fd(number) => Some(*number),
        ApiSocket::Path { .. } => None,
    });
    devices.chain(socket)
}

/// The paths that the process goes on to need: files that it removes at its end, and what clients may name.
fn grants(api: Option<&ApiSocket>, cache: &KernelCache, args: &ServiceArgs) -> Vec<Grant> {
    let socket = match api {
        Some(ApiSocket::Path { path, .. }) => Some(path),
        _ => None,
    };
    let mut grants: Vec<Grant> = socket.into_iter().chain(&args.pid_file).map(|path| Grant::removal(path)).collect();
    let named: Vec<PathBuf> = match api {
        None => Vec::new(),
        Some(_) if args.grant.is_empty() => vec![PathBuf::from("/")],
        Some(_) => args.grant.iter().map(PathBuf::from).collect(),
    };
    if api.is_some() {
        // Where the metrics of memory and threads come from.
        grants.push(Grant { path: PathBuf::from("/proc/self"), access: Access::Read });
        grants.extend(vmm::kernel::grant(cache));
    }
    grants.extend(named.into_iter().map(|path| Grant { path, access: Access::Use }));
    grants
}
