//! Quotes of a platform that is played: of trust domains that Halyard and a real QEMU launch behind the recorder, and beside a
//! verifier that has nothing to do with ours: Google's, in Go. It takes a compiler of 57 MiB, another build of Halyard and some
//! minutes, so it is not in `make test`.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use halyard_qgs::{Platform, Registers, Service};
use halyard_tests::quotes::{
    build_go_verifier, bytes, configure, digits, foretold_registers, go_tree, quoted, write_collateral,
};
use halyard_tests::recorder::Recorder;
use halyard_tests::tiny::{Running, Served, run_halyard};
use halyard_tests::{Cmd, Host, HostSpec, Status};
use serde_json::Value;
use tempfile::TempDir;

/// Longer than the 30 s after which a service that says nothing is given up.
const PATIENCE: Duration = Duration::from_secs(90);
/// Bytes of a quote in front of its signature: the header, and the body.
const SIGNED: usize = 48 + 584;

/// What the guest writes to a buffer in which it asks for a quote of a report.
fn request(report: &[u8]) -> String {
    let header = [1_u64, 0, 1024].map(u64::to_le_bytes);
    digits(&[header.as_flattened(), report].concat())
}

/// A folder with vm.yaml, whose quote service is at the socket qgs, and the two monitors that launch it.
struct Monitors {
    folder: TempDir,
    recorder: Recorder,
}

impl Monitors {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let more = format!(", quote_service: \"unix:{}\"", folder.path().join("qgs").display());
        configure(&folder.path().join("vm.yaml"), 0x33, &more).unwrap();
        Self { folder, recorder: Recorder::build().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn behind(&self, mut command: Command) -> Command {
        command.envs([("RECORDER_LOG", "/dev/stdout".as_ref()), ("RECORDER_EXITS", self.path("exits").as_os_str())]);
        command
    }

    /// The recorder's lines from the launch on, of Halyard, in its sandbox, and of QEMU, whose guests do as the script says;
    /// `look` looks at Halyard when that is done.
    fn run(&self, script: &str, look: impl FnOnce(&Served)) -> [Vec<String>; 2] {
        // The last line only says that all are done: nothing there is shared. Without an "end", Halyard goes on until it is ended.
        fs::write(self.path("exits"), format!("{script}show 0\n")).unwrap();
        let config = self.path("vm.yaml");
        let words = ["--config".as_ref(), config.as_os_str()];
        let mut served = Served::start_as(self.behind(self.recorder.halyard()), "run", words).patient(PATIENCE);
        served.wait_for("show 0\n");
        look(&served);
        served.signal(nix::sys::signal::Signal::SIGHUP);
        let own = served.finish();

        fs::write(self.path("exits"), format!("{script}show 0\nend\n")).unwrap();
        let qemu = self.recorder.qemu(1, Some(&self.path("qgs"))).unwrap();
        let other = Running::start(self.behind(qemu), PATIENCE).finish();
        [own.output(), other.output()].map(|text| {
            let (_, rest) = text.split_once("  mrtd ").unwrap_or_else(|| panic!("no launch: {own}\n{other}"));
            // KVM looks for a local APIC's number in an address alone, and QEMU leaves out what else makes one of it.
            let rest = rest.replace("msi address=0x0 ", "msi address=0xfee00000 ");
            rest.split("show 0\n").next().unwrap().lines().map(str::to_owned).collect()
        })
    }
}

/// The quotes that guests have shown, and all lines without their signatures, which are others each time.
fn quotes(lines: &[String]) -> (Vec<Vec<u8>>, Vec<String>) {
    let quotes = lines.iter().filter_map(|line| line.strip_prefix("  holds ")).map(bytes).collect();
    let without =
        |line: &String| if line.starts_with("  holds ") { line[..8 + 2 * SIGNED].into() } else { line.clone() };
    (quotes, lines.iter().map(without).collect())
}

#[test]
fn a_launched_guest_gets_the_quote_that_a_real_qemus_gets() {
    let monitors = Monitors::new();
    let [config, collateral, root] =
        ["vm.yaml", "collateral.json", "root.pem"].map(|name| monitors.path(name).to_str().unwrap().to_owned());
    let service = Service::start(Platform::new().unwrap(), &monitors.path("qgs")).unwrap();
    write_collateral(monitors.folder.path(), service.platform()).unwrap();
    let foretold = run_halyard(["measure", "--json", "--config", &config]).expect_code(0);
    let foretold: Value = serde_json::from_slice(&foretold.stdout).unwrap();
    let mut registers = foretold_registers(&foretold);
    // QEMU's guest is given no identity, and the module's word for it is played anyway.
    registers.measurements[3] = [0; 48];
    let report = service.platform().report(&registers);
    let mut forged = report;
    forged[700] ^= 1;
    let script = format!(
        "map 100000 8 shared\nwrite 100000 {}\ncall 10002 100000 4000\nwait 100000\nshow 100000\ncall 10004 51\n\
         write 104000 {}\ncall 10002 104000 4000\nwait 104000\nmsi\nshow 104000\n\
         write 100000 {}\ncall 10002 100000 4000\nwait 100000\nmsi\n",
        request(&report),
        request(&report),
        request(&forged)
    );
    let [own, qemus] = monitors.run(&script, |served| {
        assert_eq!(served.client().vm().unwrap().mrtd.as_deref(), foretold["mrtd"].as_str());
        let quotes = served.client().quotes().unwrap();
        assert_eq!((quotes.given, quotes.failed, quotes.in_flight), (2, 1, 0));
    });
    let (given, own) = quotes(&own);
    let (theirs, qemus) = quotes(&qemus);
    assert_eq!(own.join("\n"), qemus.join("\n"));
    // The recorder has measured what was added, as the module does.
    assert_eq!(Value::from(&*own[0]), foretold["mrtd"]);
    let told = |what: &str| own.iter().filter(|line| line.contains(what)).count();
    assert_eq!((told("  version 1 status 0x0 "), told("  version 1 status 0x8000000000000000 ")), (2, 1));
    assert_eq!((told("  msi address=0xfee00000 data=0x51"), told("  no msi")), (2, 0));

    let go = build_go_verifier(monitors.folder.path()).unwrap();
    assert_eq!(given.len() + theirs.len(), 4);
    for quote in given.iter().chain(&theirs) {
        assert_eq!(Value::from(digits(&quote[184..232])), foretold["mrtd"]);
        let path = monitors.path("quote");
        fs::write(&path, quote).unwrap();
        let words = ["verify", path.to_str().unwrap(), "--config", &config, "--collateral", &collateral];
        run_halyard(words.into_iter().chain(["--root-ca", &root, "--report-data", &"99".repeat(64)])).expect_code(0);
        let run = Command::new(&go).args([path.to_str().unwrap(), &root, &collateral]).output().unwrap();
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }
}

/// A service that does this with each question.
fn serve(socket: &Path, with: impl Fn(UnixStream) + Send + 'static) {
    let listener = UnixListener::bind(socket).unwrap();
    thread::spawn(move || listener.incoming().flatten().for_each(with));
}

#[test]
fn services_that_do_not_behave_are_to_the_guest_what_they_are_to_a_real_qemus() {
    let report = request(&[0x81; 1024]);
    let monitors = Monitors::new();
    let script = format!("map 100000 8 shared\nwrite 100000 {report}\ncall 10002 100000 4000\nwait 100000\n");
    // The last line tells of the buffer.
    let run = |script: &str, own_status: &str, qemus_status: &str| {
        let [mut own, mut qemus] = monitors.run(script, |_| {});
        let told = |status: &str| Some(format!("  version 1 status {status} lengths 1024 0"));
        assert_eq!((own.pop(), qemus.pop()), (told(own_status), told(qemus_status)));
        assert_eq!(own.join("\n"), qemus.join("\n"));
        own
    };
    let (failed, unavailable) = ("0x8000000000000000", "0x8000000000000001");
    // Absent; one that ends in the middle of its answer; one that says nothing, whose seventeenth question is one too many.
    run(&script, unavailable, unavailable);
    serve(&monitors.path("qgs"), |mut stream| {
        let _ = stream.read(&mut [0; 2048]);
        let _ = stream.write_all(&[0, 0, 4, 24, 1, 0, 1, 0, 1, 0, 0, 0]);
    });
    run(&script, failed, failed);
    fs::remove_file(monitors.path("qgs")).unwrap();
    serve(&monitors.path("qgs"), std::mem::forget);
    let each = |page: u64| format!("write {page:x}000 {report}\ncall 10002 {page:x}000 1000\n");
    // Who set up an interrupt is not kept waiting by the call. Who asked in vain for 30 s, is told why by Halyard.
    let many: String = (0x100..0x111).map(each).collect();
    let lines = run(&format!("map 100000 11 shared\ncall 10004 51\n{many}wait 100000\n"), unavailable, failed);
    let answers: Vec<&str> =
        lines.iter().filter_map(|line| line.strip_prefix("  answered 0x")?.split(' ').next()).collect();
    assert_eq!(answers, [&["0"; 17][..], &["1"]].concat(), "the interrupt, 16 requests, and one that is to come again");
}

#[test]
fn a_quote_comes_through_a_vm_socket() {
    // Few kernels have a loopback of VM sockets; Debian's is the lab's.
    let host = Host::start(&HostSpec::new()).unwrap();
    let folder = host.run("modprobe vsock_loopback && mktemp -d").unwrap().ok().unwrap();
    let (there, local) = (|name: &str| format!("{folder}/{name}"), |path: PathBuf| path.display().to_string());
    let service = Cmd::new(env!("CARGO_BIN_EXE_quote-service")).args([&folder, "4050"]);
    let service = host.spawn(service).unwrap();
    service.wait_line("ready").unwrap();
    let report = request(&host.read_file(&there("report")).unwrap());
    let script = format!(
        "map 100000 8 shared\nwrite 100000 {report}\ncall 10002 100000 4000\nwait 100000\nshow 100000\nshutdown\n"
    );
    host.write_file(&there("exits"), script).unwrap();

    let monitors = Monitors::new();
    let config = fs::read_to_string(monitors.path("vm.yaml")).unwrap();
    let unix = format!("unix:{}", monitors.path("qgs").display());
    host.write_file(&there("vm.yaml"), config.replace(&unix, "vsock:1:4050")).unwrap();
    let run = Cmd::new(local(monitors.recorder.program()))
        .args(["run", "--config", &there("vm.yaml")])
        .env("LD_PRELOAD", local(monitors.recorder.library()))
        .env("RECORDER_LOG", there("log"))
        .env("RECORDER_EXITS", there("exits"));
    let run = host.run(run).unwrap();
    let messages = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(run.status, Status::Exited(5), "{messages}");
    assert!(messages.contains("the quote service at vsock:1:4050 answers"), "{messages}");
    let log = String::from_utf8(host.read_file(&there("log")).unwrap()).unwrap();
    let (quotes, _) = quotes(&log.lines().map(str::to_owned).collect::<Vec<_>>());
    assert_eq!(quotes.len(), 1, "{messages}\n{log}");
    fs::write(monitors.path("quote"), &quotes[0]).unwrap();
    for name in ["root.pem", "collateral.json"] {
        fs::write(monitors.path(name), host.read_file(&there(name)).unwrap()).unwrap();
    }
    let [quote, root, collateral] = ["quote", "root.pem", "collateral.json"].map(|name| local(monitors.path(name)));
    run_halyard(["verify", &quote, "--root-ca", &root, "--collateral", &collateral]).expect_code(0);
}

#[test]
fn both_verifiers_accept_a_quote_and_refuse_each_flipped_bit() {
    let folder = TempDir::new().unwrap();
    let quote = quoted(folder.path(), &Registers::default()).unwrap();
    let go = build_go_verifier(folder.path()).unwrap();
    let (root, collateral) = (folder.path().join("root.pem"), folder.path().join("collateral.json"));
    let by_go = |quote: &Path| {
        let run = Command::new(&go).arg(quote).args([&root, &collateral]).output().unwrap();
        (run.status.code(), String::from_utf8_lossy(&run.stderr).into_owned())
    };
    let own = |quote: &Path| {
        let words = ["verify".as_ref(), quote.as_os_str(), "--collateral".as_ref(), collateral.as_os_str()];
        run_halyard(words.into_iter().chain(["--root-ca".as_ref(), root.as_os_str()])).code()
    };
    assert_eq!(by_go(&quote), (Some(0), String::new()));
    assert_eq!(own(&quote), Some(0));
    let bytes = fs::read(&quote).unwrap();
    // In the header, the body (MRTD, RTMR0, the report's data), both signatures, the key, and the quoting enclave's report.
    for at in [12, 30, 60, 190, 376, 568, 631, 640, 700, 770, 1090, 1155] {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1;
        let path = folder.path().join("flipped");
        fs::write(&path, flipped).unwrap();
        let (code, why) = by_go(&path);
        assert_eq!(code, Some(1), "Google's verifier, byte {at}: {why}");
        assert_eq!(own(&path), Some(9), "halyard verify, byte {at}");
    }
}

#[test]
fn a_quote_of_real_hardware_that_google_ships_is_read() {
    let quote = "usr/share/gocode/src/github.com/google/go-tdx-guest/testing/testdata/tdx_prod_quote_SPR_E4.dat";
    let quote = go_tree().unwrap().join(quote);
    let words = ["verify".as_ref(), quote.as_os_str(), "--fields-only".as_ref()];
    let run = run_halyard(words).expect_code(0);
    let bytes = fs::read(&quote).unwrap();
    let mrtd: String = bytes[184..232].iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(run.output().contains(&format!("mrtd {mrtd}\n")), "{run}");
}
