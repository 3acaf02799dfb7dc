//! Debian's stock kernels, as `scripts/install` unpacked them, in the forms in which a guest is booted from them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{self, Inputs, filter};

/// A kernel of the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// A guest's, of Debian 12: everything virtio is a module.
    Debian6_1Cloud,
    /// A guest's, of Debian 13 and 12's backports: virtio's PCI transport and console are built in.
    Debian6_12Cloud,
    /// The lab host's, with 9p, KVM and vhost as modules: Debian's 6.12 for any machine.
    Lab,
    /// Another lab host's, built from Debian's sources: one whose KVM has VMs with private memory without hardware for it.
    Protected,
    /// Debian 12's for any machine, and the one for real-time work.
    Debian6_1Generic,
    /// See there.
    Debian6_1Rt,
    /// Real-time, of Debian 13 and 12's backports.
    Debian6_12Rt,
    /// The newest of Debian 13's backports, of each kind.
    DebianNewCloud,
    /// See there.
    DebianNewGeneric,
    /// See there.
    DebianNewRt,
}

impl Kernel {
    /// Both guest kernels.
    pub const GUESTS: [Self; 2] = [Self::Debian6_1Cloud, Self::Debian6_12Cloud];

    /// Each kind of kernel of each series that Debian ships. `scripts/install soak` unpacks them.
    pub const ALL: [Self; 9] = [
        Self::Debian6_1Cloud,
        Self::Debian6_1Generic,
        Self::Debian6_1Rt,
        Self::Debian6_12Cloud,
        Self::Lab,
        Self::Debian6_12Rt,
        Self::DebianNewCloud,
        Self::DebianNewGeneric,
        Self::DebianNewRt,
    ];

    /// Its label in resources/guest/packages.list and in the cache.
    pub fn label(self) -> &'static str {
        match self {
            Self::Debian6_1Cloud => "cloud-6.1",
            Self::Debian6_12Cloud => "cloud-6.12",
            Self::Lab => "lab-6.12",
            Self::Protected => "protected",
            Self::Debian6_1Generic => "generic-6.1",
            Self::Debian6_1Rt => "rt-6.1",
            Self::Debian6_12Rt => "rt-6.12",
            Self::DebianNewCloud => "cloud-new",
            Self::DebianNewGeneric => "generic-new",
            Self::DebianNewRt => "rt-new",
        }
    }

    /// Its folder in the cache: `vmlinuz`, `config`, `version`, `lib/modules`.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn folder(self) -> Result<PathBuf> {
        let folder = cache::folder()?.join("kernels").join(self.label());
        ensure!(
            folder.join("version").exists(),
            "{} is not there: scripts/install [soak] unpacks it",
            folder.display()
        );
        Ok(folder)
    }

    /// Its release, as `uname -r` says it.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn version(self) -> Result<String> {
        let path = self.folder()?.join("version");
        Ok(fs::read_to_string(&path).with_context(|| path.display().to_string())?.trim_end().to_owned())
    }

    /// Its bzImage.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn bzimage(self) -> Result<PathBuf> {
        Ok(self.folder()?.join("vmlinuz"))
    }

    /// Its bzImage with a setup header that lies.
    ///
    /// # Errors
    /// Where the kernel is not there.
    pub fn bzimage_with(self, lie: Lie) -> Result<PathBuf> {
        let image = self.bzimage()?;
        cache::file(&format!("vmlinuz-{}-{lie:?}", self.label()), &Inputs::default().file(&image)?, || {
            let mut bytes = fs::read(&image)?;
            let field =
                bytes.get_mut(lie.field()..).and_then(|rest| rest.first_chunk_mut()).context("a setup header")?;
            *field = lie.tell(u32::from_le_bytes(*field)).to_le_bytes();
            Ok(bytes)
        })
    }

    /// Its ELF file, taken out of the bzImage the first time.
    ///
    /// # Errors
    /// Where it is not there or not as expected.
    pub fn vmlinux(self) -> Result<PathBuf> {
        let image = self.bzimage()?;
        cache::file(&format!("vmlinux-{}", self.label()), &Inputs::default().file(&image)?, || {
            unpack(&fs::read(&image)?).with_context(|| image.display().to_string())
        })
    }

    /// The folder of its modules.
    ///
    /// # Errors
    /// Where it is not there.
    pub fn modules(self) -> Result<Modules> {
        let folder = self.folder()?.join("lib/modules").join(self.version()?);
        let path = folder.join("modules.dep");
        let index = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        Ok(Modules { folder, index })
    }
}

/// What a setup header may say that only a monitor believes (Linux, `Documentation/arch/x86/boot.rst`): a kernel's own
/// decompressor knows where its payload is, and runs where it is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// There is no payload.
    NoPayload,
    /// The payload begins 16 bytes later.
    LaterPayload,
    /// The payload ends 16 bytes earlier.
    ShorterPayload,
    /// The kernel prefers to be 16 MiB higher.
    HigherAddress,
}

impl Lie {
    /// Where the field of 32 bits begins.
    fn field(self) -> usize {
        match self {
            Self::LaterPayload => 0x248,
            Self::NoPayload | Self::ShorterPayload => 0x24c,
            Self::HigherAddress => 0x258,
        }
    }

    fn tell(self, truth: u32) -> u32 {
        match self {
            Self::NoPayload => 0,
            Self::LaterPayload => truth.wrapping_add(16),
            Self::ShorterPayload => truth.wrapping_sub(16),
            Self::HigherAddress => truth.wrapping_add(16 << 20),
        }
    }
}

/// The compressed kernel inside of a bzImage, unpacked: an ELF file, and behind it the table of what a kernel at
/// another address must change (Documentation/arch/x86/boot.rst, payload_offset and payload_length).
fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).and_then(|bytes| bytes.first_chunk()).context("it is too short")?;
        Ok(u32::from_le_bytes(*bytes) as usize)
    };
    ensure!(image.get(0x202..0x206) == Some(b"HdrS"), "it has no setup header");
    // Sectors of real-mode code, of 512 bytes; 0 stands for 4; the boot sector comes on top.
    let setup = usize::from(*image.get(0x1f1).context("it is too short")?);
    let start = (if setup == 0 { 4 } else { setup } + 1) * 512 + word(0x248)?;
    let end = start + word(0x24c)?;
    let payload = image.get(start..end).context("its payload lies outside of it")?;
    // The kernel's build puts the unpacked size behind the compressed stream.
    let (payload, size) = payload.split_last_chunk().context("it has no payload")?;
    let vmlinux = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => filter("zstd", &["-dcq"], payload)?,
        [0x02, 0x21, 0x4c, 0x18, ..] => filter("lz4", &["-dcq"], payload)?,
        [0xfd, b'7', b'z', b'X', b'Z', ..] => filter("xz", &["-dcq", "--single-stream"], payload)?,
        [0x1f, 0x8b, ..] => filter("gzip", &["-dcq"], payload)?,
        _ => bail!("its payload is compressed in a way that is not known here"),
    };
    let size = u32::from_le_bytes(*size) as usize;
    ensure!(vmlinux.len() == size, "{} bytes came out of it instead of {size}", vmlinux.len());
    ensure!(vmlinux.starts_with(b"\x7fELF"), "what came out of it is no ELF file");
    Ok(vmlinux)
}

/// The modules of a kernel.
pub struct Modules {
    folder: PathBuf,
    index: String,
}

impl Modules {
    /// Files of some modules and of all that they need, in the order in which they can be loaded, uncompressed.
    /// A module that the kernel does not have, such as one that is built in, is left out.
    ///
    /// # Errors
    /// Where a module's file cannot be read.
    pub fn with_needs(&self, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>> {
        let mut paths: Vec<&str> = Vec::new();
        for name in names {
            let Some((path, needs)) = self
                .index
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(path, _)| module_name(path).replace('-', "_") == name.replace('-', "_"))
            else {
                continue;
            };
            // What is needed stands in the reverse of the order of loading.
            for path in needs.split_whitespace().rev().chain([path]) {
                if !paths.contains(&path) {
                    paths.push(path);
                }
            }
        }
        paths.into_iter().map(|path| Ok((format!("{}.ko", module_name(path)), self.read(path)?))).collect()
    }

    fn read(&self, path: &str) -> Result<Vec<u8>> {
        let file = self.folder.join(path);
        let bytes = fs::read(&file).with_context(|| file.display().to_string())?;
        match Path::new(path).extension().and_then(|extension| extension.to_str()) {
            Some("xz") => filter("xz", &["-dcq"], &bytes),
            Some("zst") => filter("zstd", &["-dcq"], &bytes),
            _ => Ok(bytes),
        }
    }
}

/// The name of the module in a file.
fn module_name(path: &str) -> &str {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split_once(".ko").map_or(file, |(name, _)| name)
}
