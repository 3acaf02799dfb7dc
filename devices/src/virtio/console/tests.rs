use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;

use tempfile::TempDir;
use virtio_queue::desc::split::Descriptor;

use super::*;
use crate::endpoint::{ConsoleIo, Endpoint, EndpointKind, EndpointOptions};
use crate::virtio::testing::{Buf, DriverQueue, NEXT, PciDriver, TIMEOUT, wait};

const MIB: usize = 1 << 20;
const PAGE: u32 = 4096;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// A console and an agent's port, each on a socket.
struct Bench {
    driver: PciDriver,
    queues: Vec<DriverQueue>,
    /// Buffers of queues that the device writes to: queue, head and address.
    buffers: Vec<(u16, u32, u64)>,
    size: Option<Arc<ConsoleSize>>,
    // The device goes before its endpoints, and they before what waits for them.
    endpoints: Vec<Endpoint>,
    dir: TempDir,
    _io: ConsoleIo,
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1_u32;
    let mut data = Vec::with_capacity(len);
    for _ in 0..len {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        data.push(state.to_le_bytes()[3]);
    }
    data
}

fn path(dir: &TempDir, port: usize) -> PathBuf {
    dir.path().join(port.to_string())
}

impl Bench {
    /// `names` are the ports'; the first is a console.
    fn new(names: &[&str], size: Option<(u16, u16)>) -> Self {
        let (dir, io) = (TempDir::new().unwrap(), ConsoleIo::new().unwrap());
        let endpoints: Vec<Endpoint> = (0..names.len())
            .map(|port| {
                let kind = EndpointKind::Socket { path: path(&dir, port) };
                let options = EndpointOptions { history: 0, ..EndpointOptions::new("test", kind) };
                Endpoint::open(options, &io).unwrap()
            })
            .collect();
        let ports = names.iter().zip(&endpoints).enumerate().map(|(index, (name, endpoint))| Port {
            name: (*name).into(),
            console: index == 0,
            endpoint: endpoint.handle(),
        });
        let device = Console::new("con0", ports.collect(), size).unwrap();
        let size = device.size();
        let driver = PciDriver::new(Box::new(device));
        let mut bench = Self { driver, queues: Vec::new(), buffers: Vec::new(), size, endpoints, dir, _io: io };
        bench.start();
        bench
    }

    fn start(&mut self) {
        self.driver.negotiate(u64::MAX);
        self.driver.setup_config_vector();
        let ports = u16::try_from(self.endpoints.len()).unwrap();
        let count = if ports == 1 { 2 } else { 2 * ports + 2 };
        self.queues = (0..count).map(|index| self.driver.setup_queue(index, 64)).collect();
        self.buffers.clear();
        self.driver.driver_ok();
    }

    fn client(&self, port: usize) -> UnixStream {
        let client = UnixStream::connect(path(&self.dir, port)).unwrap();
        client.set_read_timeout(Some(TIMEOUT)).unwrap();
        let handle = self.endpoints[port].handle();
        // The device waits for the same event and may take the signal, so this only looks.
        while !handle.connected() {
            thread::yield_now();
        }
        client
    }

    /// Kicks only where the device asks for it, as an honest driver with EVENT_IDX.
    fn kick(&self, queue: u16) {
        if self.queues[usize::from(queue)].wants_kick(true) {
            self.driver.kick(queue);
        }
    }

    /// Makes a buffer for the device to write to available.
    fn room(&mut self, queue: u16, len: u32) {
        let at = self.driver.alloc(len.into());
        let head = self.queues[usize::from(queue)].add(&[Buf::writable(at, len)]);
        self.buffers.push((queue, head.into(), at));
        self.kick(queue);
    }

    /// Waits for what the device writes to a queue. The buffer is made available again.
    fn receive(&mut self, queue: u16) -> Vec<u8> {
        let used = self.driver.wait_used(queue, &mut self.queues[usize::from(queue)]);
        let place = self.buffers.iter().position(|(own, head, _)| (*own, *head) == (queue, used.id)).unwrap();
        let (.., at) = self.buffers.swap_remove(place);
        let data = self.driver.bytes(at, usize::try_from(used.len).unwrap());
        let head = self.queues[usize::from(queue)].add(&[Buf::writable(at, PAGE)]);
        self.buffers.push((queue, head.into(), at));
        self.kick(queue);
        data
    }

    fn send(&mut self, queue: u16, data: &[u8]) {
        let at = self.driver.alloc_bytes(data);
        let len = u32::try_from(data.len()).unwrap();
        self.queues[usize::from(queue)].add(&[Buf::readable(at, len)]);
        self.kick(queue);
    }

    fn wait_sent(&mut self, queue: u16) {
        self.driver.wait_used(queue, &mut self.queues[usize::from(queue)]);
    }

    fn control(&mut self, port: u32, event: u16, value: u16) {
        self.send(3, &message(port, event, value));
        self.wait_sent(3);
    }

    /// Sets both ports up as Linux does.
    fn set_up(&mut self) {
        for _ in 0..16 {
            self.room(2, PAGE);
        }
        self.control(u32::MAX, DEVICE_READY, 1);
        assert_eq!(self.receive(2), message(0, PORT_ADD, 1));
        assert_eq!(self.receive(2), message(1, PORT_ADD, 1));
        self.control(0, PORT_READY, 1);
        assert_eq!(self.receive(2), message(0, CONSOLE_PORT, 1));
        assert_eq!(self.receive(2), message(0, PORT_OPEN, 1));
        self.control(1, PORT_READY, 1);
        assert_eq!(self.receive(2), [&message(1, PORT_NAME, 1)[..], b"org.halyard.agent"].concat());
    }

    /// Takes `len` bytes of input from a queue.
    fn input(&mut self, queue: u16, len: usize) -> Vec<u8> {
        let mut data = Vec::new();
        while data.len() < len {
            data.extend(self.receive(queue));
        }
        data
    }
}

fn message(port: u32, event: u16, value: u16) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&port.to_le_bytes());
    bytes[4..6].copy_from_slice(&event.to_le_bytes());
    bytes[6..].copy_from_slice(&value.to_le_bytes());
    bytes
}

const AGENT: &[&str] = &["", "org.halyard.agent"];

#[test]
fn a_console_carries_a_mebibyte_each_way_whole() {
    let mut bench = Bench::new(&[""], None);
    let data = pattern(MIB);
    let mut client = bench.client(0);
    let (mut reading, sent) = (client.try_clone().unwrap(), data.clone());
    let writer = thread::spawn(move || client.write_all(&sent).unwrap());
    for _ in 0..4 {
        bench.room(0, PAGE);
    }
    assert!(bench.input(0, MIB) == data, "input");
    writer.join().unwrap();
    // Nobody reads at first: the guest is held back, and no byte is lost.
    let mut in_flight = 0;
    let mut chunks = data.chunks(40_000);
    for chunk in chunks.by_ref().take(20) {
        bench.send(1, chunk);
        in_flight += 1;
    }
    let reader = thread::spawn(move || {
        let mut got = vec![0; MIB];
        reading.read_exact(&mut got).unwrap();
        got
    });
    for chunk in chunks {
        bench.send(1, chunk);
        in_flight += 1;
    }
    for _ in 0..in_flight {
        bench.wait_sent(1);
    }
    assert!(reader.join().unwrap() == data, "output");
}

#[test]
fn output_that_nobody_reads_does_not_stop_the_guest() {
    let mut bench = Bench::new(&[""], None);
    for _ in 0..30 {
        bench.send(1, &pattern(100_000));
        bench.wait_sent(1);
    }
    assert!(!bench.driver.needs_reset());
}

#[test]
fn ports_are_set_up_and_carry_both_ways() {
    let mut bench = Bench::new(AGENT, None);
    bench.set_up();
    let mut client = bench.client(1);
    assert_eq!(bench.receive(2), message(1, PORT_OPEN, 1));
    for _ in 0..4 {
        bench.room(4, PAGE);
    }
    // Input waits until a program in the guest opens the port.
    client.write_all(b"ping").unwrap();
    bench.control(1, PORT_OPEN, 1);
    assert_eq!(bench.receive(4), b"ping");
    bench.send(5, b"pong");
    let mut answer = [0; 4];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"pong");
    drop(client);
    assert_eq!(bench.receive(2), message(1, PORT_OPEN, 0));
    let _again = bench.client(1);
    assert_eq!(bench.receive(2), message(1, PORT_OPEN, 1));
}

#[test]
fn messages_wait_for_the_drivers_buffers_and_its_own_wait_with_them() {
    let mut bench = Bench::new(AGENT, None);
    // A driver that asks and asks and takes no answer is not served beyond a limit.
    for _ in 0..60 {
        bench.send(3, &message(u32::MAX, DEVICE_READY, 1));
    }
    for _ in 0..32 {
        bench.wait_sent(3);
    }
    bench.room(2, PAGE);
    for _ in 0..60 {
        assert_eq!(bench.receive(2), message(0, PORT_ADD, 1));
        assert_eq!(bench.receive(2), message(1, PORT_ADD, 1));
    }
    for _ in 32..60 {
        bench.wait_sent(3);
    }
    assert!(!bench.driver.needs_reset());
}

#[test]
fn the_size_is_told_and_so_are_its_changes() {
    let mut bench = Bench::new(AGENT, Some((80, 25)));
    assert_eq!(bench.driver.read(bench.driver.config), [80, 0, 25, 0, 2, 0, 0, 0]);
    for _ in 0..16 {
        bench.room(2, PAGE);
    }
    bench.control(0, PORT_READY, 1);
    assert_eq!(bench.receive(2), message(0, CONSOLE_PORT, 1));
    assert_eq!(bench.receive(2), message(0, PORT_OPEN, 1));
    assert_eq!(bench.receive(2), [&message(0, RESIZE, 0)[..], &[25, 0, 80, 0]].concat());
    bench.size.clone().unwrap().set(132, 50);
    assert_eq!(bench.receive(2), [&message(0, RESIZE, 0)[..], &[50, 0, 132, 0]].concat());
    // A single console has a configuration instead of messages.
    let bench = Bench::new(&[""], Some((80, 25)));
    bench.size.clone().unwrap().set(132, 50);
    assert!(bench.driver.wait_vector(0), "no interrupt for the configuration");
    assert_eq!(bench.driver.read(bench.driver.config), [132, 0, 50, 0]);
    bench.driver.write(bench.driver.config, &[1, 0]);
    assert_eq!(bench.driver.read(bench.driver.config), [132, 0]);
}

#[test]
fn the_emergency_register_writes_at_once() {
    let bench = Bench::new(&[""], None);
    let mut client = bench.client(0);
    for byte in b"panic" {
        bench.driver.write(bench.driver.config + 8, &u32::from(*byte).to_le_bytes());
    }
    let mut got = [0; 5];
    client.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"panic");
}

#[test]
fn stopping_and_starting_amid_output_and_input_loses_and_doubles_nothing() {
    let mut bench = Bench::new(&[""], None);
    let mut client = bench.client(0);
    let data = pattern(MIB);
    for _ in 0..2 {
        bench.room(0, PAGE);
    }
    let mut reading = client.try_clone().unwrap();
    for chunk in data.chunks(MIB / 16) {
        bench.send(1, chunk);
        bench.driver.device.suspend();
        bench.driver.device.resume();
    }
    let mut got = vec![0; MIB];
    let (first, rest) = got.split_at_mut(300_000);
    reading.read_exact(first).unwrap();
    bench.driver.device.suspend();
    bench.driver.device.resume();
    reading.read_exact(rest).unwrap();
    for _ in 0..16 {
        bench.wait_sent(1);
    }
    assert!(got == data, "output");
    let sent = data.clone();
    let writer = thread::spawn(move || client.write_all(&sent).unwrap());
    let mut got = Vec::new();
    while got.len() < MIB {
        got.extend(bench.receive(0));
        bench.driver.device.suspend();
        bench.driver.device.resume();
    }
    writer.join().unwrap();
    assert!(got == data, "input");
}

#[test]
fn a_reset_amid_output_starts_afresh() {
    let mut bench = Bench::new(AGENT, None);
    bench.set_up();
    let mut client = bench.client(0);
    for _ in 0..10 {
        bench.send(1, &pattern(100_000));
    }
    bench.driver.reset();
    let mut rest = vec![0; 1 << 16];
    client.set_nonblocking(true).unwrap();
    bench.start();
    // What was taken before the reset still goes to its reader; nothing that was not.
    bench.set_up();
    bench.send(1, b"after the reset");
    client.set_nonblocking(false).unwrap();
    let mut got = Vec::new();
    while !got.ends_with(b"after the reset") {
        let count = client.read(&mut rest).unwrap();
        got.extend_from_slice(&rest[..count]);
    }
    assert!(got.len() < 1_000_000);
    bench.wait_sent(1);
}

#[test]
fn rules_broken_need_a_reset_and_nothing_more() {
    type Break = fn(&mut Bench);
    let rules: [(&str, Break); 7] = [
        ("output to write", |b| {
            let at = b.driver.alloc(64);
            b.queues[1].add(&[Buf::readable(at, 32), Buf::writable(at, 32)]);
            b.driver.kick(1);
        }),
        ("input to read", |b| {
            let at = b.driver.alloc(64);
            b.queues[0].add(&[Buf::readable(at, 32)]);
            b.driver.kick(0);
        }),
        ("a loop", |b| {
            let at = b.driver.alloc(64);
            b.queues[1].add_raw(&[Descriptor::new(at, 4, NEXT, 1), Descriptor::new(at, 4, NEXT, 0)], 0);
            b.driver.kick(1);
        }),
        ("outside memory", |b| {
            b.queues[1].add(&[Buf::readable(u64::MAX - 8, 16)]);
            b.driver.kick(1);
        }),
        ("a short message", |b| b.send(3, &[0; 7])),
        ("no room for a message", |b| {
            b.start();
            b.room(2, 7);
            b.control(u32::MAX, DEVICE_READY, 1);
        }),
        ("an index that jumps", |b| {
            b.queues[3].jump(65);
            b.driver.kick(3);
        }),
    ];
    let mut bench = Bench::new(AGENT, None);
    for (faults, (what, break_rule)) in (1..).zip(rules) {
        break_rule(&mut bench);
        bench.driver.wait_needs_reset();
        assert_eq!(bench.driver.device.faults(), faults, "{what}");
        bench.start();
        bench.set_up();
    }
    // Messages that make no sense are none of these.
    for event in 0..9 {
        bench.control(99, event, 1);
    }
    assert!(!bench.driver.needs_reset());
}

#[test]
fn ports_that_cannot_be_are_refused() {
    let io = ConsoleIo::new().unwrap();
    let endpoint = Endpoint::open(EndpointOptions::new("off", EndpointKind::Off), &io).unwrap();
    let error = |ports: &[(&str, bool)]| {
        let ports = ports.iter().map(|(name, console)| Port {
            name: (*name).into(),
            console: *console,
            endpoint: endpoint.handle(),
        });
        Console::new("con0", ports.collect(), None).err().map(|e| e.to_string())
    };
    assert!(error(&[]).unwrap().contains("0 ports; a console device has 1 to 31"));
    let names: Vec<String> = (0..32).map(|n| format!("port{n}")).collect();
    let many: Vec<(&str, bool)> = names.iter().map(|name| (name.as_str(), false)).collect();
    assert!(error(&many).unwrap().contains("32 ports"));
    assert!(error(&many[..31]).is_none());
    assert!(error(&[("", true), ("", false)]).unwrap().contains("only a console may be without"));
    assert!(error(&[("a", true), ("a", false)]).unwrap().contains("another port's too"));
    assert!(error(&[("a/b", true)]).unwrap().contains("slash"));
    assert!(error(&[(&"n".repeat(129), true)]).unwrap().contains("longer than 128"));
}

#[test]
fn an_endpoint_serves_the_next_device_of_a_machine() {
    let io = ConsoleIo::new().unwrap();
    let dir = TempDir::new().unwrap();
    let kind = EndpointKind::Socket { path: path(&dir, 0) };
    let endpoint = Endpoint::open(EndpointOptions::new("con", kind), &io).unwrap();
    let mut client = UnixStream::connect(path(&dir, 0)).unwrap();
    assert!(wait(endpoint.handle().connection_event(), TIMEOUT));
    for round in [b"first ", b"second"] {
        let port = Port { name: String::new(), console: true, endpoint: endpoint.handle() };
        let device = Console::new("con0", vec![port], None).unwrap();
        let mut driver = PciDriver::new(Box::new(device));
        driver.negotiate(u64::MAX);
        let mut queue = driver.setup_queue(1, 16);
        driver.driver_ok();
        let at = driver.alloc_bytes(round);
        queue.add(&[Buf::readable(at, 6)]);
        driver.kick(1);
        driver.wait_used(1, &mut queue);
        let mut got = [0; 6];
        client.read_exact(&mut got).unwrap();
        assert_eq!(&got, round);
        driver.reset();
    }
}
