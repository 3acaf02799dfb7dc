//! vCPUs that come and go on a scripted hypervisor: what the owner makes of the guest's answers, and of none.

use std::time::{Duration, Instant};

use api::{Cpus, EventKind, JobState, PhaseName, TimeSpan};
use arch::layout;
use hal::VcpuId;
use hal::fake::{Call, Live, Step};
use vmm::request::{Answer, Change, Refusal, Request};

mod guest;
mod jobs;
mod service;

use jobs::{end_of, job};
use service::Service;

const LONG: u64 = 3_600_000;
const NEXT: u16 = layout::PROCESSORS_PORT;
const ANSWER: u16 = NEXT + 4;
const NONE: u32 = layout::PROCESSORS_NONE;

fn status_port(number: u8) -> u16 {
    NEXT + u16::from(layout::PROCESSORS_STATUS) + u16::from(number)
}

/// A service whose VM has these vCPUs, in a phase.
fn start_in(phase: PhaseName, count: u32, max: u32, timeout: u64) -> Service {
    Service::start_in(phase, |config| {
        config.cpus = Cpus { count, max: Some(max), topology: None };
        config.pci.hotplug_timeout = TimeSpan::from_millis(timeout);
    })
}

fn resize(service: &Service, count: u32) -> Result<Answer, Refusal> {
    service.ask(Request::Change { change: Change::Vcpus(api::VcpusPatch { count }), expected: None })
}

/// What the guest reads, as a number.
#[track_caller]
fn read(service: &Service, port: u16, size: usize) -> u32 {
    let seen = service.fake.reads(VcpuId(0)).len();
    service.script([Step::pio_read(port, size)]);
    service.wait_for("a read", |service| service.fake.reads(VcpuId(0)).len() > seen);
    let data = service.fake.reads(VcpuId(0)).last().unwrap().data.clone();
    data.iter().rev().fold(0, |value, byte| value << 8 | u32::from(*byte))
}

/// The guest asks what it is asked, until that is nothing.
#[track_caller]
fn asked(service: &Service) -> Vec<(u32, u32)> {
    let mut all = Vec::new();
    loop {
        match read(service, NEXT, 4) {
            NONE => return all,
            one => all.push((one & 0xff, one >> 8)),
        }
    }
}

fn answer(service: &Service, number: u8, to: u8, status: u8) {
    service.script([Step::pio_write(ANSWER, &[number, to, status, 0])]);
}

fn eject(service: &Service, number: u8) {
    service.script([Step::pio_write(status_port(number), &[1])]);
}

/// vCPUs that are wanted, and that the guest has.
fn counts(service: &Service) -> (u32, u32) {
    (service.board.info().0.running.unwrap().cpus.count, service.board.present().0)
}

/// The numbers of those that have counters, and so a thread.
fn running(service: &Service) -> Vec<u8> {
    service.board.counters().unwrap().vcpus.iter().map(|(number, _)| *number).collect()
}

/// The guest has more vCPUs, which it has taken.
#[track_caller]
fn grow(service: &Service, count: u32) {
    let growing = job(resize(service, count));
    for (number, _) in asked(service) {
        answer(service, u8::try_from(number).unwrap(), 1, 0);
    }
    assert_eq!(end_of(service, growing).state, JobState::Succeeded);
}

#[test]
fn vcpus_come_when_the_guest_takes_them_and_go_when_it_ejects_them() {
    let service = start_in(PhaseName::Running, 1, 4, LONG);
    assert_eq!((counts(&service), service.fake.live().vcpus), ((1, 1), 1), "those that may come cost nothing");
    let growing = job(resize(&service, 3));
    assert_eq!(job(resize(&service, 3)), growing, "who asks again waits for the same");
    assert!(matches!(resize(&service, 2), Err(Refusal::Conflict(_))));
    assert_eq!(counts(&service), (3, 1));
    assert_eq!(asked(&service), [(1, 1), (2, 1)]);
    assert_eq!([1, 2, 3].map(|number| read(&service, status_port(number), 1)), [0xf, 0xf, 0]);
    answer(&service, 1, 1, 0x80);
    answer(&service, 1, 1, 0);
    service.wait_for("the first", |service| service.board.job(growing).unwrap().progress == Some(50));
    assert_eq!(counts(&service), (3, 2));
    answer(&service, 2, 1, 0);
    assert_eq!(end_of(&service, growing).state, JobState::Succeeded);
    assert_eq!((counts(&service), running(&service)), ((3, 3), vec![0, 1, 2]));
    // Vcpu 1 waits for another to start it.
    assert_eq!(service.fake.reset_of(VcpuId(1)).unwrap().entry, None);

    let shrinking = job(resize(&service, 1));
    assert_eq!(asked(&service), [(1, 3), (2, 3)]);
    answer(&service, 2, 3, 0x84);
    eject(&service, 2);
    answer(&service, 2, 3, 0);
    service.wait_for("the second to go", |service| running(service) == [0, 1]);
    eject(&service, 1);
    assert_eq!(end_of(&service, shrinking).state, JobState::Succeeded);
    assert_eq!((counts(&service), running(&service)), ((1, 1), vec![0]));
    assert_eq!(service.fake.live().vcpus, 3, "a hypervisor does not take them back");
    service.end();
}

#[test]
fn one_that_was_there_before_is_reset_and_used_again() {
    let service = start_in(PhaseName::Running, 2, 2, LONG);
    for _ in 0..3 {
        let shrinking = job(resize(&service, 1));
        eject(&service, 1);
        assert_eq!(end_of(&service, shrinking).state, JobState::Succeeded);
        asked(&service);
        grow(&service, 2);
    }
    let calls = service.fake.calls();
    assert_eq!(calls.iter().filter(|call| **call == Call::CreateVcpu(VcpuId(1))).count(), 1);
    assert_eq!(calls.iter().filter(|call| **call == Call::Reset(VcpuId(1))).count(), 4);
    service.ask(Request::Pause).unwrap();
    service.ask(Request::Resume).unwrap();
    service.end();
}

#[test]
fn what_the_guest_refuses_is_not_wanted_any_more() {
    let service = start_in(PhaseName::Running, 1, 8, LONG);
    let growing = job(resize(&service, 4));
    asked(&service);
    answer(&service, 1, 1, 0);
    answer(&service, 2, 1, 0x81);
    answer(&service, 3, 1, 0);
    let ended = end_of(&service, growing);
    let error = ended.error.unwrap();
    assert_eq!((ended.state, error.status), (JobState::Failed, 409));
    assert!(error.detail.contains("did not take 1 of 3") && error.detail.contains("it has 3, and 4"), "{error:?}");
    assert_eq!((counts(&service), running(&service)), ((3, 3), vec![0, 1, 3]));
    // The lowest numbers that are free come, and the highest go.
    grow(&service, 4);
    assert_eq!(running(&service), [0, 1, 2, 3]);
    let shrinking = job(resize(&service, 1));
    asked(&service);
    answer(&service, 3, 3, 0x82);
    [1, 2].iter().for_each(|number| eject(&service, *number));
    assert_eq!(end_of(&service, shrinking).state, JobState::Failed);
    assert_eq!((counts(&service), running(&service)), ((2, 2), vec![0, 3]));
    service.end();
}

#[test]
fn a_guest_that_does_not_answer_keeps_what_it_had() {
    let service = start_in(PhaseName::Running, 2, 4, 50);
    let ended = end_of(&service, job(resize(&service, 4)));
    assert_eq!((ended.state, ended.error.unwrap().status), (JobState::Failed, 504));
    assert_eq!((counts(&service), running(&service), asked(&service)), ((2, 2), vec![0, 1], vec![]));
    let ended = end_of(&service, job(resize(&service, 1)));
    assert_eq!((ended.state, ended.error.unwrap().status), (JobState::Failed, 504));
    assert_eq!((counts(&service), running(&service), asked(&service)), ((2, 2), vec![0, 1], vec![]));
    service.end();
}

#[test]
fn a_guest_that_is_busy_for_ever_has_no_more_time_than_others() {
    let service = start_in(PhaseName::Running, 1, 2, 500);
    let growing = job(resize(&service, 2));
    let began = Instant::now();
    while service.board.job(growing).unwrap().state == JobState::Running {
        assert!(began.elapsed() < Duration::from_secs(20), "the job goes on");
        answer(&service, 1, 1, 0x80);
        read(&service, NEXT, 4);
    }
    assert_eq!(service.board.job(growing).unwrap().error.unwrap().status, 504);
    service.end();
}

#[test]
fn what_a_guest_is_at_work_on_when_nobody_waits_any_more_is_asked_back() {
    let service = start_in(PhaseName::Running, 1, 3, LONG);
    let growing = job(resize(&service, 3));
    assert_eq!(read(&service, NEXT, 4), 0x101);
    service.ask(Request::CancelJob(growing)).unwrap();
    assert_eq!(end_of(&service, growing).state, JobState::Cancelled);
    // It has not heard of the other one.
    assert_eq!((counts(&service), running(&service)), ((1, 1), vec![0, 1]));
    answer(&service, 1, 1, 0);
    assert_eq!(asked(&service), [(1, 3)]);
    assert_eq!(counts(&service), (1, 1));
    eject(&service, 1);
    service.wait_for("it to go", |service| running(service) == [0]);
    // The same, of a guest that keeps it.
    let growing = job(resize(&service, 2));
    asked(&service);
    service.ask(Request::CancelJob(growing)).unwrap();
    answer(&service, 1, 3, 0x81);
    service.wait_for("it to stay", |service| counts(service) == (2, 2));
    // One that was to go, and goes when nobody waits any more.
    let shrinking = job(resize(&service, 1));
    asked(&service);
    service.ask(Request::CancelJob(shrinking)).unwrap();
    assert_eq!(counts(&service), (2, 2));
    eject(&service, 1);
    service.wait_for("it to go", |service| counts(service) == (1, 1));
    service.end();
}

#[test]
fn a_guest_may_let_go_of_any_but_the_first_unasked() {
    let service = start_in(PhaseName::Running, 3, 3, LONG);
    eject(&service, 0);
    eject(&service, 2);
    eject(&service, 3);
    service.wait_for("one to go", |service| counts(service) == (2, 2));
    assert_eq!((running(&service), read(&service, status_port(0), 1)), (vec![0, 1], 0xf));
    let told = service.events();
    assert!(told.contains(&EventKind::VcpusChanged { present: 2 }) && told.contains(&EventKind::ConfigChanged {}));
    service.end();
}

#[test]
fn what_cannot_be_is_refused_and_nothing_is_changed() {
    let service = start_in(PhaseName::Running, 1, 2, LONG);
    for (count, expected) in [(3, "1 to 2 are possible"), (0, "at least 1")] {
        let Err(Refusal::Problems(problems)) = resize(&service, count) else { panic!("{count} is possible") };
        assert_eq!(problems.0[0].field, "count");
        assert!(problems.to_string().contains(expected), "{problems}");
    }
    assert!(matches!(resize(&service, 1), Ok(Answer::Done)));
    service.fake.fail_at(|call| *call == Call::Reset(VcpuId(1)), hal::Error::State("not today".into()));
    assert!(matches!(resize(&service, 2), Err(Refusal::Host(_))));
    assert_eq!((counts(&service), running(&service), asked(&service)), ((1, 1), vec![0], vec![]));
    grow(&service, 2);
    service.end();

    let service = Service::start_in(PhaseName::Running, |_| {});
    let Err(Refusal::Conflict(why)) = resize(&service, 2) else { panic!("it has none to come") };
    assert!(why.contains("cpus.max"), "{why}");
    assert_eq!(read(&service, NEXT, 4), u32::MAX, "nothing is there");
    service.end();
}

#[test]
fn the_configuration_is_changed_before_the_boot() {
    let service = start_in(PhaseName::Ready, 1, 4, LONG);
    assert!(matches!(resize(&service, 5), Err(Refusal::Problems(_))));
    assert!(matches!(resize(&service, 3), Ok(Answer::Done)));
    service.ask(Request::Boot).unwrap();
    assert_eq!((counts(&service), running(&service)), ((3, 3), vec![0, 1, 2]));
    assert_eq!([1, 2, 3].map(|number| read(&service, status_port(number), 1)), [0xf, 0xf, 0]);
    service.end();
}

#[test]
fn what_is_asked_while_the_machine_stands_waits_for_it() {
    let service = start_in(PhaseName::Paused, 1, 3, 100);
    let growing = job(resize(&service, 3));
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(service.board.job(growing).unwrap().state, JobState::Running, "its time has not begun");
    let runs = |service: &Service| service.fake.calls().iter().filter(|call| matches!(call, Call::Run(_))).count();
    let before = runs(&service);
    service.script([Step::pio_write(ANSWER, &[1, 1, 0, 0]), Step::pio_write(ANSWER, &[2, 1, 0, 0])]);
    assert_eq!((running(&service), runs(&service)), (vec![0, 1, 2], before), "they stand, too");
    service.ask(Request::Resume).unwrap();
    assert_eq!(end_of(&service, growing).state, JobState::Succeeded);
    service.wait_for("all to run", |service| {
        service.fake.calls().contains(&Call::Run(VcpuId(1))) && service.fake.calls().contains(&Call::Run(VcpuId(2)))
    });
    service.ask(Request::Pause).unwrap();
    let shrinking = job(resize(&service, 1));
    service.script([1, 2].map(|number| Step::pio_write(status_port(number), &[1])));
    service.ask(Request::Resume).unwrap();
    assert_eq!(end_of(&service, shrinking).state, JobState::Succeeded);
    service.ask(Request::Pause).unwrap();
    service.end();
}

#[test]
fn a_guest_that_is_reset_boots_with_as_many_as_are_wanted() {
    let service = start_in(PhaseName::Running, 1, 4, LONG);
    grow(&service, 2);
    let growing = job(resize(&service, 3));
    asked(&service);
    service.ask(Request::Reset).unwrap();
    assert_eq!(end_of(&service, growing).state, JobState::Succeeded);
    assert_eq!((counts(&service), running(&service)), ((3, 3), vec![0, 1, 2]));
    let shrinking = job(resize(&service, 1));
    service.ask(Request::Reset).unwrap();
    assert_eq!(end_of(&service, shrinking).state, JobState::Succeeded);
    assert_eq!((counts(&service), running(&service), asked(&service)), ((1, 1), vec![0], vec![]));
    service.end();
}

#[test]
fn a_run_that_ends_ends_the_job() {
    let service = start_in(PhaseName::Running, 1, 4, LONG);
    let growing = job(resize(&service, 4));
    service.ask(Request::Destroy).unwrap();
    assert_eq!(end_of(&service, growing).state, JobState::Failed);
    assert_eq!((service.fake.live(), service.board.present().0), (Live::default(), 0));
    service.ask(service.create()).unwrap();
    service.ask(Request::Boot).unwrap();
    let growing = job(resize(&service, 2));
    service.script([Step::pio_write(layout::ACPI_SLEEP_CONTROL_PORT, &[layout::ACPI_SLEEP_CONTROL_S5])]);
    assert_eq!(end_of(&service, growing).state, JobState::Failed);
    service.wait_for_phase(PhaseName::Stopped);
    service.end();
}

#[test]
fn another_generation_is_another_configuration() {
    let service = start_in(PhaseName::Running, 1, 4, LONG);
    let expected = service.board.generation();
    let ask = |count| {
        let change = Change::Vcpus(api::VcpusPatch { count });
        service.ask(Request::Change { change, expected: Some(expected) })
    };
    job(ask(2));
    assert!(matches!(ask(3), Err(Refusal::Changed { .. })), "the wanted number belongs to the configuration");
    service.end();
}
