//! Halyard as a stranger would run it: user 107 without a capability, in a read-only root that holds nothing but the
//! program, the files that it is to boot and `/dev/kvm`. All else it has by descriptors.

/// Makes the root (a tmpfs that goes with the process) and runs a program: `ROOT [FROM NAME]… -- PROGRAM…`.
const SCRIPT: &str = r#"set -e
root=$1
shift
mount -t tmpfs -o mode=755 halyard "$root"
mkdir "$root/dev"
mknod -m 666 "$root/dev/kvm" c 10 232
while [ "$1" != -- ]; do
    cp "$1" "$root/$2"
    chmod 755 "$root/$2"
    shift 2
done
shift
mount -o remount,ro "$root"
exec "$@""#;

/// What is started, and with what.
#[derive(Debug, Default)]
pub struct Confined {
    /// An empty folder to mount the root at.
    pub root: String,
    /// The `with-descriptors` program of this crate.
    pub helper: String,
    /// The `halyard` program.
    pub halyard: String,
    /// Files to be found in the root, each with its name there.
    pub files: Vec<(String, String)>,
    /// What is opened for it, from descriptor 3 on: `--file PATH`, `--tap NAME`.
    pub descriptors: Vec<String>,
    /// The arguments of `halyard`.
    pub arguments: Vec<String>,
}

impl Confined {
    /// The words of the command. It needs the rights of root for a moment, and the process that is started becomes
    /// `halyard`.
    pub fn command(&self) -> Vec<String> {
        let mut words: Vec<String> =
            ["unshare", "--mount", "sh", "-c", SCRIPT, "sh", &self.root].map(Into::into).into();
        words.extend([self.halyard.clone(), "halyard".into()]);
        words.extend(self.files.iter().flat_map(|(from, name)| [from.clone(), name.clone()]));
        words.extend(["--".into(), self.helper.clone()]);
        words.extend(self.descriptors.iter().cloned());
        let user = ["--", "chroot", "--userspec=107:107", "--groups=", &self.root, "/halyard"];
        words.extend(user.map(Into::into));
        words.extend(self.arguments.iter().cloned());
        words
    }
}
