//! Assembles and links guests, by binutils.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::cache::{self, Inputs};

/// The ELF file of the guest `tests/guests/NAME.S`, from the cache, or made where a source has changed.
///
/// # Errors
/// Where the source is missing or has errors, or binutils are not installed.
pub fn build(name: &str) -> Result<PathBuf> {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests");
    let listing = fs::read_dir(&sources).with_context(|| sources.display().to_string())?;
    let mut files = listing.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    files.sort();
    // All of them: guests include others.
    let inputs = files.iter().try_fold(Inputs::default(), |inputs, file| inputs.file(file))?;
    cache::file(&format!("tiny-{name}"), &inputs, || assemble(&sources, name))
}

fn assemble(sources: &Path, name: &str) -> Result<Vec<u8>> {
    let work = tempfile::tempdir().context("a directory to build the guest in")?;
    let (object, guest) = (work.path().join("object"), work.path().join("guest"));
    let source = sources.join(format!("{name}.S"));
    tool("as", [OsStr::new("--64"), "-I".as_ref(), sources.as_ref(), "-o".as_ref(), object.as_ref(), source.as_ref()])?;
    let script = sources.join("guest.ld");
    // Pages of 4 KiB keep the file small; the one segment has all rights, as the script says.
    let flags = ["-m", "elf_x86_64", "-z", "max-page-size=4096", "--no-warn-rwx-segments", "-T"].map(OsStr::new);
    let files = [script.as_os_str(), "-o".as_ref(), guest.as_ref(), object.as_ref()];
    tool("ld", flags.into_iter().chain(files))?;
    fs::read(&guest).with_context(|| guest.display().to_string())
}

fn tool<'a>(program: &str, args: impl IntoIterator<Item = &'a OsStr>) -> Result<()> {
    let output = Command::new(program).args(args).output().with_context(|| format!("{program}, of binutils"))?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
