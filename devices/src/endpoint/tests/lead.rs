//! Endpoints that lead elsewhere after a while.

use super::*;

/// A socket with a client.
fn connected(bench: &Bench) -> (Endpoint, EndpointHandle, UnixStream) {
    let endpoint = bench.socket(OUTPUT_CAPACITY);
    let (handle, client) = (endpoint.handle(), bench.client());
    wait_connected(&handle, true);
    (endpoint, handle, client)
}

#[test]
fn an_endpoint_leads_elsewhere_and_its_device_goes_on() {
    let bench = Bench::new();
    let (mut endpoint, handle, mut client) = connected(&bench);
    handle.write_over(b"first");
    assert_eq!(read_exact(&mut client, 5), b"first");
    client.write_all(b"typed").unwrap();
    assert_eq!(read_input(&handle, 5), b"typed");

    // Into a file: who read is sent away, the socket is gone, and what was read is not repeated.
    let file = bench.dir.path().join("file");
    endpoint.lead(EndpointKind::File { path: file.clone(), append: true }, &bench.io).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0, "the reader is sent away");
    assert!(!bench.path().exists());
    handle.write_over(b"second");
    assert_eq!(fs::read(&file).unwrap(), b"second");
    assert!(handle.connected());

    // Handed-in clients, the same socket again, nowhere: with a history from then on.
    endpoint.lead(EndpointKind::Handed, &bench.io).unwrap();
    wait_connected(&handle, false);
    handle.write_over(b"third");
    let (near, mut far) = UnixStream::pair().unwrap();
    endpoint.reserve(false).unwrap().attach(near.into(), b"").unwrap();
    assert_eq!(read_exact(&mut far, 5), b"third");
    endpoint.lead(EndpointKind::Socket { path: bench.path() }, &bench.io).unwrap();
    assert_eq!(far.read(&mut [0]).unwrap(), 0);
    let mut client = bench.client();
    assert_eq!(read_exact(&mut client, 5), b"third", "the last output is shown");
    endpoint.lead(EndpointKind::Off, &bench.io).unwrap();
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(handle.write(&pattern(MIB)), MIB);
    endpoint.lead(EndpointKind::Pty, &bench.io).unwrap();
    let mut terminal = open_pty(&endpoint);
    wait_connected(&handle, true);
    handle.write_over(b"fourth");
    assert_eq!(read_exact(&mut terminal, 6), b"fourth");
}

#[test]
fn what_cannot_be_leaves_an_endpoint_where_it_led() {
    let bench = Bench::new();
    let (mut endpoint, handle, mut client) = connected(&bench);
    for kind in [
        EndpointKind::Socket { path: bench.path() },
        EndpointKind::Socket { path: "/nonexistent/socket".into() },
        EndpointKind::File { path: bench.dir.path().to_owned(), append: true },
        EndpointKind::File { path: "/nonexistent/file".into(), append: true },
    ] {
        endpoint.lead(kind, &bench.io).unwrap_err();
    }
    handle.write_over(b"still here");
    assert_eq!(read_exact(&mut client, 10), b"still here");
}

#[test]
fn a_device_that_is_held_back_by_a_reader_who_is_sent_away_goes_on() {
    let bench = Bench::new();
    let (mut endpoint, handle, _client) = connected(&bench);
    while handle.write(&pattern(OUTPUT_CAPACITY)) > 0 {}
    endpoint.lead(EndpointKind::Off, &bench.io).unwrap();
    assert!(wait(handle.writable_event(), TIMEOUT), "the device is told");
    assert_eq!(handle.write(b"more"), 4);
}

#[test]
fn a_client_on_the_way_does_not_arrive_where_it_leads_then() {
    let bench = Bench::new();
    let mut endpoint = bench.open(EndpointKind::Handed, 0);
    let reservation = endpoint.reserve(false).unwrap();
    let path = bench.dir.path().join("file");
    endpoint.lead(EndpointKind::File { path: path.clone(), append: true }, &bench.io).unwrap();
    let (near, mut far) = UnixStream::pair().unwrap();
    reservation.attach(near.into(), b"early").unwrap();
    assert_eq!(far.read(&mut [0]).unwrap(), 0, "it is sent away");
    endpoint.handle().write_over(b"output");
    assert_eq!(fs::read(&path).unwrap(), b"output");
    assert!(!endpoint.handle().input_waits());
}
