//! `halyard` with an API socket, and what it tells the service manager that started it.

use std::ffi::OsString;
use std::ops::{Deref, DerefMut};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::Client;
use tempfile::TempDir;

use super::{DEADLINE, Run, Running, halyard};

/// A `halyard` that serves an API socket. Dropping it kills it.
pub struct Served {
    running: Running,
    manager: UnixDatagram,
    folder: TempDir,
}

impl Served {
    /// Starts `halyard COMMAND --api-socket …` with these arguments, and waits until it is ready.
    ///
    /// # Panics
    /// Where it does not become so.
    #[track_caller]
    pub fn start<A: Into<OsString>>(command: &str, args: impl IntoIterator<Item = A>) -> Self {
        Self::start_as(halyard(), command, args)
    }

    /// The same where `sh` does `line` first, with mounts and a network of its own, as their root.
    ///
    /// # Panics
    /// As [`Served::start`].
    #[track_caller]
    pub fn start_after<A: Into<OsString>>(line: &str, command: &str, args: impl IntoIterator<Item = A>) -> Self {
        let mut started = std::process::Command::new("unshare");
        started.args(["--map-root-user", "--mount", "--net", "sh", "-ec", &format!("{line}\nexec \"$0\" \"$@\"")]);
        started.arg(halyard().get_program());
        Self::start_as(started, command, args)
    }

    /// The same by a command to which these arguments are added.
    ///
    /// # Panics
    /// As [`Served::start`].
    #[track_caller]
    pub fn start_as<A: Into<OsString>>(
        mut started: std::process::Command,
        command: &str,
        args: impl IntoIterator<Item = A>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let manager = UnixDatagram::bind(folder.path().join("notify")).expect("a socket");
        manager.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        started.env("NOTIFY_SOCKET", folder.path().join("notify"));
        started.arg(command).arg("--api-socket").arg(folder.path().join("api"));
        started.args(args.into_iter().map(Into::into)).current_dir(folder.path());
        let mut served = Self { running: Running::start(started, DEADLINE), manager, folder };
        served.wait_for_notice("READY=1");
        served
    }

    /// Gives it more time to come to its end.
    pub fn patient(mut self, deadline: Duration) -> Self {
        self.running.extend(deadline);
        self
    }

    /// A socket or file of this name in the folder that it runs in.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A new connection.
    ///
    /// # Panics
    /// Where there is none to be had.
    #[track_caller]
    pub fn client(&self) -> Client {
        let mut client = Client::connect(self.path("api")).unwrap_or_else(|error| panic!("{error}"));
        client.set_timeout(Some(DEADLINE)).expect("a timeout");
        client
    }

    /// Waits until the service manager is told this.
    ///
    /// # Panics
    /// Where it ends, or time passes, before that.
    #[track_caller]
    pub fn wait_for_notice(&mut self, notice: &str) {
        let deadline = Instant::now() + DEADLINE;
        let mut heard = String::new();
        // Short waits, so that a process that has died is seen soon.
        self.manager.set_read_timeout(Some(Duration::from_millis(200))).expect("a timeout");
        while Instant::now() < deadline && self.running.alive() {
            let mut message = [0; 4096];
            let Ok(length) = self.manager.recv(&mut message) else { continue };
            let text = String::from_utf8_lossy(&message[..length]).into_owned();
            if text.lines().any(|line| line == notice) {
                return;
            }
            heard += &text;
        }
        panic!("{notice:?} was not told, but {heard:?}\n{}", self.running.end());
    }

    /// Waits for its end; see [`Running::finish`].
    ///
    /// # Panics
    /// As there.
    #[track_caller]
    pub fn finish(self) -> Run {
        let Self { running, folder, .. } = self;
        let run = running.finish();
        assert!(!folder.path().join("api").exists(), "the socket was left behind\n{run}");
        run
    }
}

impl Deref for Served {
    type Target = Running;

    fn deref(&self) -> &Running {
        &self.running
    }
}

impl DerefMut for Served {
    fn deref_mut(&mut self) -> &mut Running {
        &mut self.running
    }
}
