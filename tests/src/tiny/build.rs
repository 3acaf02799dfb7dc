//! Assembles and links guests, by binutils, into `target/tiny-guests`.

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The ELF file of the guest `tests/guests/NAME.S`, made where it is not there yet.
///
/// Its name holds a hash of all sources in that directory, so a stale one is never found; and it appears by a rename,
/// so that tests may run side by side.
///
/// # Errors
/// Where the source is missing or has errors, or binutils are not installed.
pub fn build(name: &str) -> Result<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = tests.join("guests");
    let source = sources.join(format!("{name}.S"));
    let cache = tests.join("../target/tiny-guests");
    fs::create_dir_all(&cache).with_context(|| cache.display().to_string())?;
    let elf = cache.canonicalize()?.join(format!("{name}-{:016x}", hash(&sources)?));
    if elf.is_file() {
        return Ok(elf);
    }
    let work = tempfile::tempdir_in(&cache).context("a directory to build the guest in")?;
    let (object, linked) = (work.path().join("object"), work.path().join("guest"));
    tool("as", [OsStr::new("--64"), "-I".as_ref(), sources.as_ref(), "-o".as_ref(), object.as_ref(), source.as_ref()])?;
    let script = sources.join("guest.ld");
    // Pages of 4 KiB keep the file small; the one segment has all rights, as the script says.
    let flags = ["-m", "elf_x86_64", "-z", "max-page-size=4096", "--no-warn-rwx-segments", "-T"].map(OsStr::new);
    let files = [script.as_os_str(), "-o".as_ref(), linked.as_ref(), object.as_ref()];
    tool("ld", flags.into_iter().chain(files))?;
    fs::rename(&linked, &elf).with_context(|| elf.display().to_string())?;
    Ok(elf)
}

/// A hash of all files in `directory`, with their names.
fn hash(directory: &Path) -> Result<u64> {
    let listing = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut files = listing.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in files {
        file.file_name().hash(&mut hasher);
        fs::read(&file).with_context(|| file.display().to_string())?.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

fn tool<'a>(program: &str, args: impl IntoIterator<Item = &'a OsStr>) -> Result<()> {
    let output = Command::new(program).args(args).output().with_context(|| format!("{program}, of binutils"))?;
    ensure!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
