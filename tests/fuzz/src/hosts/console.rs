//! The host's side of a console: a client of a socket.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Instant;

use devices::endpoint::{ConsoleIo, Endpoint, EndpointKind, EndpointOptions};
use devices::virtio::VirtioDevice;
use devices::virtio::console::{Console, ConsoleSize, Port};
use devices::virtio::testing::{Buf, DriverQueue, PciDriver, TIMEOUT};
use tempfile::TempDir;

use super::{Host, begin};
use crate::input::{Step, pattern};

/// What lasts from input to input.
struct Common {
    io: ConsoleIo,
    folder: TempDir,
    next: AtomicU64,
}

fn common() -> &'static Common {
    static COMMON: OnceLock<Common> = OnceLock::new();
    COMMON.get_or_init(|| Common {
        io: ConsoleIo::new().expect("the console's thread"),
        folder: TempDir::new().expect("a folder for sockets"),
        next: AtomicU64::new(0),
    })
}

/// Clients and endpoints of a console's ports.
pub struct Terminal {
    names: Vec<String>,
    paths: Vec<PathBuf>,
    clients: Vec<Option<UnixStream>>,
    size: Option<Arc<ConsoleSize>>,
    endpoints: Vec<Endpoint>,
}

impl Terminal {
    /// Ports of these names, the first of which is a console.
    pub fn new(names: &[&str]) -> Self {
        let Common { io, folder, next } = common();
        let path = |_: &&str| folder.path().join(next.fetch_add(1, Ordering::Relaxed).to_string());
        let paths: Vec<PathBuf> = names.iter().map(path).collect();
        let endpoint = |path: &PathBuf| {
            let kind = EndpointKind::Socket { path: path.clone() };
            Endpoint::open(EndpointOptions { history: 0, ..EndpointOptions::new("port", kind) }, io)
        };
        Self {
            names: names.iter().map(ToString::to_string).collect(),
            endpoints: paths.iter().map(endpoint).collect::<Result<_, _>>().expect("sockets"),
            clients: names.iter().map(|_| None).collect(),
            paths,
            size: None,
        }
    }

    fn console(&self, endpoints: &[Endpoint]) -> Console {
        let ports = self.names.iter().zip(endpoints).map(|(name, endpoint)| Port {
            name: name.clone(),
            console: name.is_empty(),
            endpoint: endpoint.handle(),
        });
        Console::new("con0", ports.collect(), Some((80, 25))).expect("a console")
    }

    fn connect(&mut self, port: usize) {
        let client = UnixStream::connect(&self.paths[port]).expect("the port's socket");
        client.set_nonblocking(true).expect("a client");
        self.clients[port] = Some(client);
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.endpoints.clear();
        // The console's thread may be busy with an endpoint, whose last owner it is then.
        let deadline = Instant::now() + TIMEOUT;
        for path in &self.paths {
            while fs::symlink_metadata(path).is_ok() {
                assert!(Instant::now() < deadline, "a socket is left behind");
                thread::yield_now();
            }
        }
    }
}

impl Host for Terminal {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let console = self.console(&self.endpoints);
        self.size = console.size();
        Box::new(console)
    }

    fn twin(&mut self) -> Box<dyn VirtioDevice> {
        let off = || Endpoint::open(EndpointOptions::new("port", EndpointKind::Off), &common().io);
        let endpoints: Vec<Endpoint> = self.names.iter().map(|_| off().expect("nowhere")).collect();
        Box::new(self.console(&endpoints))
    }

    fn act(&mut self, step: Step) {
        let port = usize::from(step.b) % self.names.len();
        match (step.a % 5, &mut self.clients[port]) {
            (0, None) => self.connect(port),
            (0, client) => *client = None,
            // A client that is not served yet, or was sent away, is as good as any.
            (1 | 2, Some(client)) => drop(client.write(&pattern(step.d, usize::from(step.c) * 64))),
            (3, Some(client)) => drop(client.read(&mut [0; 4096])),
            (4, _) => {
                if let Some(size) = &self.size {
                    size.set(step.d_low(), step.d_high());
                }
            }
            _ => {}
        }
    }

    fn header(&self, step: Step) -> Vec<u8> {
        match step.a {
            // The control queue from the driver: port, event, value.
            3 => [u32::from(step.d_low() & 0x103), (step.d >> 16) & 7 | (step.d >> 24) << 16]
                .map(u32::to_le_bytes)
                .concat(),
            _ => Vec::new(),
        }
    }

    fn check(&mut self, driver: &mut PciDriver) {
        // Without a reader all output is taken.
        self.clients.iter_mut().for_each(|client| *client = None);
        begin(driver, u64::MAX);
        let (mut input, mut output) = (driver.setup_queue(0, 16), driver.setup_queue(1, 16));
        let mut control = (self.names.len() > 1).then(|| driver.setup_queue(2, 16));
        driver.driver_ok();
        if let Some(control) = &mut control {
            control.add(&[Buf::writable(driver.alloc(256), 256)]);
            driver.kick(2);
        }
        let at = driver.alloc_bytes(&pattern(5, 200));
        give(driver, &mut output, at, 200);

        // Input of clients before may come first; it is over when the new one's arrives.
        self.connect(0);
        let client = self.clients[0].as_mut().expect("it is connected");
        client.write_all(b"\x00typed\xff").expect("a client writes");
        let at = driver.alloc(256);
        let mut got = Vec::new();
        while !got.ends_with(b"\x00typed\xff") {
            let head = input.add(&[Buf::writable(at, 256)]);
            driver.kick(0);
            let used = driver.wait_used(0, &mut input);
            assert_eq!(used.id, u32::from(head));
            assert!((1..=256).contains(&used.len));
            got.extend(driver.bytes(at, usize::try_from(used.len).expect("a length")));
        }

        let sent = pattern(11, 9000);
        let at = driver.alloc_bytes(&sent);
        for (offset, len) in [(0, 200), (200, 1), (201, 8799)] {
            give(driver, &mut output, at + offset, len);
        }
        client.set_nonblocking(false).and_then(|()| client.set_read_timeout(Some(TIMEOUT))).expect("a client");
        let mut got = vec![0; sent.len()];
        client.read_exact(&mut got).expect("output arrives");
        assert!(got == sent, "other output arrives than was written");
        // The driver has not said that it is ready, so there is nothing to tell it, least of all something old.
        assert_eq!(control.and_then(|mut control| control.used()), None, "a message for a driver that is not ready");
    }
}

/// Has the device take output.
fn give(driver: &PciDriver, output: &mut DriverQueue, at: u64, len: u32) {
    let head = output.add(&[Buf::readable(at, len)]);
    driver.kick(1);
    let used = driver.wait_used(1, output);
    assert_eq!((used.id, used.len), (u32::from(head), 0));
}
