//! The cache outside of the repository: kernels that `scripts/install` unpacked, and what is built from them once.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// How many versions of one thing are kept: others may still be using the one before.
const KEPT: usize = 8;

/// The cache's folder: `HALYARD_CACHE`, or `halyard` in the user's cache folder.
///
/// # Errors
/// Where the environment names no home.
pub fn folder() -> Result<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HALYARD_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("halyard")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/halyard")))
        .context("neither HALYARD_CACHE nor HOME is set: where is the cache?")
}

/// What a cached thing was built from, as a hash for its name.
#[derive(Default)]
pub struct Inputs(DefaultHasher);

impl Inputs {
    /// Adds text.
    #[must_use]
    pub fn text(mut self, text: &str) -> Self {
        text.hash(&mut self.0);
        self
    }

    /// Adds a file's content.
    ///
    /// # Errors
    /// Where it cannot be read.
    pub fn file(mut self, path: &Path) -> Result<Self> {
        fs::read(path).with_context(|| path.display().to_string())?.hash(&mut self.0);
        Ok(self)
    }

    fn name(&self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

/// The file `NAME-HASH` in the cache: as it is there, else as `build` makes it. It appears whole or not at all.
///
/// # Errors
/// Where it cannot be built or written.
pub fn file(name: &str, inputs: &Inputs, build: impl FnOnce() -> Result<Vec<u8>>) -> Result<PathBuf> {
    let folder = folder()?.join("built");
    let path = folder.join(format!("{name}-{}", inputs.name()));
    if path.exists() {
        return Ok(path);
    }
    let bytes = build().with_context(|| format!("building {name}"))?;
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let mut file = tempfile::NamedTempFile::new_in(&folder).with_context(|| folder.display().to_string())?;
    file.write_all(&bytes).with_context(|| path.display().to_string())?;
    file.as_file().set_permissions(fs::Permissions::from_mode(0o755))?;
    file.persist(&path).with_context(|| path.display().to_string())?;
    forget_old(&folder, name);
    Ok(path)
}

/// Removes all but the newest versions of a thing. What cannot be removed stays: it is only a cache.
fn forget_old(folder: &Path, name: &str) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    let mut versions: Vec<(std::time::SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| {
            let file = entry.file_name().to_string_lossy().into_owned();
            file.strip_prefix(name).and_then(|rest| rest.strip_prefix('-')).is_some_and(|hash| hash.len() == 16)
        })
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    versions.sort();
    for (_, path) in versions.iter().rev().skip(KEPT) {
        let _ = fs::remove_file(path);
    }
}

/// Output of a filter such as `xz -dc` for these bytes.
///
/// # Errors
/// Where it cannot be started or fails.
pub fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut source = tempfile::tempfile()?;
    source.write_all(input)?;
    std::io::Seek::rewind(&mut source)?;
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::from(source))
        .output()
        .with_context(|| format!("cannot run {program}: has scripts/install been run?"))?;
    if !output.status.success() {
        bail!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(output.stdout)
}

/// The agent's executable, which cargo builds beside this one.
///
/// # Errors
/// Where it is not there.
pub fn agent() -> Result<PathBuf> {
    let path = build_folder()?.join("agent");
    File::open(&path)
        .with_context(|| format!("{}: `cargo build -p halyard-tests --bins` builds it", path.display()))?;
    Ok(path)
}

/// The agent without symbols, as it goes into an initramfs.
///
/// # Errors
/// Where it is not there or cannot be stripped.
pub fn small_agent() -> Result<PathBuf> {
    let agent = agent()?;
    file("agent", &Inputs::default().file(&agent)?, || {
        let folder = tempfile::tempdir()?;
        let small = folder.path().join("agent");
        let output = Command::new("strip").arg("-o").arg(&small).arg(&agent).output().context("cannot run strip")?;
        if !output.status.success() {
            bail!("strip: {}", String::from_utf8_lossy(&output.stderr).trim_end());
        }
        Ok(fs::read(&small)?)
    })
}

/// Where cargo puts executables of the profile that this one was built in.
///
/// # Errors
/// Where this executable's own path is not known.
pub fn build_folder() -> Result<PathBuf> {
    let own = std::env::current_exe().context("the path of this executable")?;
    let folder = own.parent().context("the folder of this executable")?;
    // Tests lie one deeper than the executables they test.
    let folder = if folder.ends_with("deps") { folder.parent().unwrap_or(folder) } else { folder };
    Ok(folder.to_path_buf())
}
