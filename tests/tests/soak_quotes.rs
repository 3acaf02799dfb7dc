//! Quotes of a platform that is played, beside a verifier that has nothing to do with ours: Google's, in Go. It takes a
//! compiler of 57 MiB and some minutes, so it is not in `make test`.

use std::fs;
use std::path::Path;
use std::process::Command;

use halyard_qgs::Registers;
use halyard_tests::quotes::{build_go_verifier, go_tree, quoted};
use halyard_tests::tiny::run_halyard;
use tempfile::TempDir;

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
