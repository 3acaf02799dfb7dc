//! Telling the service manager how the process fares: systemd's notification protocol (sd_notify(3)).

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

/// The service manager that started the process, where it wants to be told.
#[derive(Debug, Default)]
pub struct ServiceManager {
    to: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Watchdog>,
}

#[derive(Debug)]
struct Watchdog {
    every: Duration,
    next: Instant,
}

impl ServiceManager {
    /// Reads `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID` from the environment. A manager that cannot be told is
    /// none.
    pub fn from_environment() -> Self {
        let Some(name) = std::env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        match connect(&name) {
            Ok(to) => Self { to: Some(to), watchdog: watchdog() },
            Err(error) => {
                tracing::warn!("the service manager cannot be told anything: {error}");
                Self::default()
            }
        }
    }

    /// All is set up.
    pub fn ready(&self) {
        self.tell("READY=1");
    }

    /// What the process does, for people.
    pub fn status(&self, status: &str) {
        self.tell(&format!("STATUS={status}"));
    }

    /// The process comes to its end, which takes `patience` at the most.
    pub fn stopping(&self, patience: Duration) {
        let extended = patience + Duration::from_secs(10);
        self.tell(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={}", extended.as_micros()));
    }

    /// When [`ServiceManager::tick`] is to be called next.
    pub fn next_tick(&self) -> Option<Instant> {
        self.watchdog.as_ref().map(|watchdog| watchdog.next)
    }

    /// Says that the process is alive, where it is time.
    pub fn tick(&mut self) {
        let now = Instant::now();
        match &mut self.watchdog {
            Some(watchdog) if now >= watchdog.next => watchdog.next = now + watchdog.every,
            _ => return,
        }
        self.tell("WATCHDOG=1");
    }

    fn tell(&self, what: &str) {
        let Some((socket, address)) = &self.to else { return };
        if let Err(error) = socket.send_to_addr(what.as_bytes(), address) {
            tracing::debug!("telling the service manager: {error}");
        }
    }
}

fn connect(name: &OsStr) -> std::io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A manager that does not read must not hold the VM up.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

/// Half the time after which the manager takes the process for dead.
fn watchdog() -> Option<Watchdog> {
    let number = |name| std::env::var(name).ok()?.parse::<u64>().ok();
    if number("WATCHDOG_PID").is_some_and(|pid| pid != u64::from(std::process::id())) {
        return None;
    }
    let every = Duration::from_micros(number("WATCHDOG_USEC")?.max(20_000) / 2);
    Some(Watchdog { every, next: Instant::now() })
}
