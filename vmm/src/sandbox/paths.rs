//! Paths: by Landlock nothing can be opened but what was granted, no TCP port used, and no signal sent to others.

use std::io;
use std::path::{Path, PathBuf};

use api::{DeviceConfig, Endpoint, VmConfig};
use landlock::{
    ABI, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

/// The newest rights that are given up. Later ABIs add the right to send to a socket by its path, which telling the
/// service manager needs.
const NEWEST: ABI = ABI::V8;

/// What is granted on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Files and sockets can be removed from the directory, and nothing in it opened.
    Remove,
    /// What is at or below the path can be read.
    Read,
    /// Files and links in the directory can be listed, read, written, made, renamed and removed.
    Keep,
    /// What is at or below the path can be read and written to, and files and sockets be made and removed; programs
    /// cannot be started.
    Use,
}

impl Access {
    fn rights(self) -> BitFlags<AccessFs> {
        match self {
            Self::Remove => AccessFs::RemoveFile.into(),
            Self::Read => AccessFs::ReadFile.into(),
            Self::Keep => {
                AccessFs::ReadFile
                    | AccessFs::ReadDir
                    | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::MakeReg
                    | AccessFs::MakeSym
                    | AccessFs::RemoveFile
            }
            Self::Use => {
                AccessFs::ReadFile
                    | AccessFs::WriteFile
                    | AccessFs::Truncate
                    | AccessFs::MakeReg
                    | AccessFs::MakeSock
                    | AccessFs::RemoveFile
                    | AccessFs::IoctlDev
            }
        }
    }
}

/// A path that can be used though all others cannot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// The path.
    pub path: PathBuf,
    /// What for.
    pub access: Access,
}

impl Grant {
    /// That a file, which need not be there yet, can be removed.
    pub fn removal(file: &Path) -> Self {
        let directory = file.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."));
        Self { path: directory.to_owned(), access: Access::Remove }
    }
}

/// What a VM needs on paths once all that its configuration names is open: the directories of its sockets, which are
/// removed at the end.
pub fn grants(config: &VmConfig) -> Vec<Grant> {
    let consoles = config.devices.iter().filter_map(|device| match device {
        DeviceConfig::Console(console) => Some(console.endpoint.clone()),
        _ => None,
    });
    let sockets = std::iter::once(config.serial_endpoint()).chain(consoles).filter_map(|endpoint| match endpoint {
        Endpoint::Socket { path } => Some(path),
        _ => None,
    });
    sockets.map(|path| Grant::removal(&path)).collect()
}

/// Gives up every path but the granted, as far as the kernel can, and says in the log how far that was.
pub fn give_up<'a>(grants: impl Iterator<Item = &'a Grant> + Clone) -> io::Result<()> {
    let status = restrict(grants.clone()).map_err(|error| io::Error::other(format!("landlock: {error}")))?;
    let abi = match status.landlock {
        LandlockStatus::Available { effective_abi, .. } => effective_abi as i32,
        LandlockStatus::NotEnabled | LandlockStatus::NotImplemented => 0,
    };
    let paths = grants.count();
    match (status.ruleset, abi) {
        (RulesetStatus::FullyEnforced, _) => tracing::debug!(abi, paths, "landlock: all paths but these are given up"),
        (RulesetStatus::NotEnforced, 0) => {
            tracing::warn!("landlock: this kernel has none; what keeps the VM from paths is seccomp alone");
        }
        _ => tracing::info!("landlock: this kernel has ABI {abi} of {}: the rest is left to seccomp", NEWEST as i32),
    }
    Ok(())
}

fn restrict<'a>(grants: impl Iterator<Item = &'a Grant>) -> Result<landlock::RestrictionStatus, RulesetError> {
    use landlock::Access as _;
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    for Grant { path, access } in grants {
        match PathFd::new(path) {
            Ok(fd) => ruleset = ruleset.add_rule(PathBeneath::new(fd, access.rights()))?,
            // What is not there cannot be used either.
            Err(error) => tracing::warn!("landlock: {error}"),
        }
    }
    // It was done before.
    ruleset.no_new_privs(false).restrict_self()
}
