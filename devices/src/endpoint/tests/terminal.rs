//! The mode of a terminal on standard input.

use super::*;

#[test]
fn a_terminal_is_raw_and_then_as_before() {
    let pty = openpty(None, None).unwrap();
    let before = tcgetattr(&pty.slave).unwrap();
    assert!(before.local_flags.contains(LocalFlags::ICANON | LocalFlags::ECHO));
    let raw = RawTerminal::enter(&pty.slave).unwrap().expect("a terminal");
    let now = tcgetattr(&pty.slave).unwrap();
    assert!(!now.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG));
    assert_eq!(now.output_flags, before.output_flags);
    assert!(RawTerminal::enter(&pty.slave).is_err(), "only one at a time");
    // A panic puts it back, wherever it is.
    let panicked = thread::spawn(|| panic!("on purpose")).join();
    assert!(panicked.is_err());
    assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
    drop(raw);
    assert_eq!(tcgetattr(&pty.slave).unwrap(), before);
    let pipe = pipe().unwrap();
    assert!(RawTerminal::enter(&pipe.0).unwrap().is_none());
}

#[test]
fn signals_and_exit_put_the_terminal_back() {
    if let Ok(what) = std::env::var(CHILD) {
        let _raw = RawTerminal::enter(&io::stdin()).unwrap().expect("a terminal");
        println!("raw");
        if what == "exit" {
            std::process::exit(3);
        }
        loop {
            thread::park();
        }
    }
    let run = |what: &str| {
        let pty = openpty(None, None).unwrap();
        // Whoever started this may have signals ignored, which is inherited.
        let mut child = Command::new("env")
            .arg("--default-signal")
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", "endpoint::tests::terminal::signals_and_exit_put_the_terminal_back", "--nocapture"])
            .env(CHILD, what)
            .stdin(Stdio::from(pty.slave.try_clone().unwrap()))
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = io::BufRead::lines(io::BufReader::new(child.stdout.take().unwrap()));
        assert!(lines.any(|line| line.unwrap().contains("raw")), "the child did not get so far");
        (pty, child)
    };
    let is_cooked = |slave: &OwnedFd| tcgetattr(slave).unwrap().local_flags.contains(LocalFlags::ICANON);
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGABRT] {
        let (pty, mut child) = run("wait");
        assert!(!is_cooked(&pty.slave), "raw before {signal}");
        kill(Pid::from_raw(child.id().cast_signed()), signal).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(signal as i32));
        assert!(is_cooked(&pty.slave), "after {signal}");
    }
    let (pty, mut child) = run("exit");
    assert_eq!(child.wait().unwrap().code(), Some(3));
    assert!(is_cooked(&pty.slave), "after exit");
}
