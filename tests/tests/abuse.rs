//! Clients that mean no good, while a guest works on its disk and a well-behaved client asks all the time: in short here,
//! for minutes in `soak.rs`.

use std::time::Duration;

use halyard_tests::abuse::{self, Kind};
use halyard_tests::tiny::kvm;

/// How long each kind of abuse lasts.
const EACH: Duration = Duration::from_millis(500);

#[test]
fn bad_clients_disturb_neither_the_guest_nor_others_and_leave_nothing_behind() {
    if !kvm() {
        return;
    }
    let report = abuse::endure(&Kind::ALL, EACH, 2_000);
    eprintln!("{report}");
}

#[test]
fn clients_that_are_killed_in_the_middle_lose_only_themselves() {
    if !kvm() {
        return;
    }
    abuse::kill_clients(10);
}
