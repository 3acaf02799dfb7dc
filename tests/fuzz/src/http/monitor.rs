//! A monitor on a scripted hypervisor, in this process: an owner with its server. Its owner may use its own folder and no
//! other path, since a configuration may name any.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::{fs, thread};

use api::{Client, EventKind, Reason};
use hal::Hypervisor;
use hal::fake::{Fake, Live};
use nix::sys::prctl::set_no_new_privs;
use nix::sys::resource::{Resource, setrlimit};
use vmm::board::Board;
use vmm::host;
use vmm::inbox::{Event, Inbox};
use vmm::owner::{Owner, Until};
use vmm::sandbox::{Access, Grant, restrict};
use vmm::server::{ApiSocket, Server};

use super::{PATH, PATIENCE};
use crate::seeds;

/// Events that are kept: few, so that readers lose some.
const EVENTS: usize = 64;
/// Address space for guests and threads, beyond what the process has at first.
const ROOM: u64 = 700 << 20;

/// Has guests' memory be refused where it is too large for this machine.
pub fn limit_memory() {
    let text = fs::read_to_string("/proc/self/statm").expect("this process's memory");
    let pages: u64 = text.split(' ').next().and_then(|pages| pages.parse().ok()).expect("a number");
    let limit = pages * 4096 + ROOM;
    setrlimit(Resource::RLIMIT_AS, limit, limit).expect("a limit");
}

/// An owner, its server and its folder.
pub struct Monitor {
    folder: tempfile::TempDir,
    fake: Fake,
    board: Arc<Board>,
    inbox: Inbox,
    owner: Option<JoinHandle<()>>,
    server: Option<Server>,
}

impl Monitor {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        fs::write(folder.path().join("kernel"), seeds::elf(18)).expect("a kernel");
        let (fake, board) = (Fake::new(), Arc::new(Board::new(EVENTS)));
        let (hypervisor, shown): (Box<dyn Hypervisor>, _) = (Box::new(fake.clone()), board.clone());
        let (send, receive) = channel();
        let path = folder.path().to_owned();
        let owner = thread::spawn(move || {
            confine(&path);
            let mut owner = Owner::new(Ok(hypervisor), shown).expect("an owner");
            send.send(owner.inbox().clone()).expect("who started it waits");
            owner.serve(Until::Signal).expect("it serves");
        });
        let inbox = receive.recv().expect("the owner's");
        let socket = ApiSocket::Path { path: folder.path().join("api"), access: vmm::server::Access::default() };
        let host = host::report(&Ok(Box::new(fake.clone())));
        let server = Server::start(socket.listen().expect("a socket"), host, board.clone(), inbox.clone());
        Self { folder, fake, board, inbox, owner: Some(owner), server: Some(server.expect("a server")) }
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("api")
    }

    /// The path of a kernel, which has always as many bytes.
    pub fn kernel(&self) -> String {
        let folder = self.folder.path().display().to_string();
        format!("{folder}{}kernel", "/".repeat(PATH - folder.len() - "kernel".len()))
    }

    /// A well-behaved client is served, and removes the VM.
    pub fn tidy_up(&self) {
        let mut client = Client::connect_within(self.socket(), Some(PATIENCE)).expect("the next client is let in");
        assert_eq!(client.ping().expect("it is answered").pid, std::process::id());
        client.metrics().expect("there are metrics");
        client.destroy().expect("there can be no VM");
        assert_eq!(self.fake.live(), Live::default(), "something of the VM is left");
        // Readers of events who are gone are noticed at the next event.
        self.board.publish(EventKind::PowerButton { reason: Reason::Request });
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.inbox.post(Event::Quit);
        let owner = self.owner.take().map(JoinHandle::join);
        drop(self.server.take());
        assert!(matches!(owner, Some(Ok(()))) || thread::panicking(), "the owner has panicked");
    }
}

/// Lets the calling thread use what is in its folder, and nothing else.
fn confine(folder: &Path) {
    set_no_new_privs().expect("Linux");
    let grants = [Grant { path: folder.to_owned(), access: Access::Use }];
    restrict(grants.iter()).expect("Landlock");
    assert!(fs::File::open("/proc/self/status").is_err(), "without Landlock a client could name any file of this host");
}
