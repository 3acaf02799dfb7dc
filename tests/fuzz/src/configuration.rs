//! A configuration of any text.

use std::collections::HashSet;

use api::{ConfigText, HostFacts, KindName, Problem, VmConfig, validate};

/// More than any message needs, however long the text that it is about.
const MESSAGE_MAX: usize = 8 << 10;

/// Takes a text through all that is done with a configuration before a machine is made.
pub fn read(text: &str) {
    let source = ConfigText::new("vm.yaml", text);
    let mut config = match source.parse() {
        Ok(config) => config,
        Err(problems) => {
            assert!(!problems.0.is_empty(), "a configuration is refused without a reason");
            assert!(problems.0.len() <= 51, "{} problems are told", problems.0.len());
            return check(&source, text, &problems.0);
        }
    };
    survives_writing(&config);
    config.fill_defaults();
    let mut again = config.clone();
    again.fill_defaults();
    assert!(config == again, "defaults are filled in once");
    let ids: HashSet<&str> = config.devices.iter().map(|device| device.id()).collect();
    for host in [HostFacts::unlimited(), small_host()] {
        let mut problems = validate(&config, &host);
        source.locate(&mut problems);
        check(&source, text, &problems);
        assert!(!problems.is_empty() || ids.len() == config.devices.len(), "two devices have one id");
    }
    survives_writing(&config);
}

fn small_host() -> HostFacts {
    HostFacts {
        max_vcpus: 2,
        physical_address_bits: 36,
        max_memory: 1 << 30,
        max_devices: 3,
        kinds: vec![KindName::Standard],
    }
}

/// What was read can be written, and read again as the same.
fn survives_writing(config: &VmConfig) {
    let json = serde_json::to_string(config).expect("a configuration can be written");
    match api::parse(&json) {
        Ok(again) => assert!(again == *config, "{json}\nreads back as another configuration"),
        // A value that is refused by `validate` on any host is refused here too, and nothing else.
        Err(problems) => {
            let found = validate(config, &HostFacts::unlimited());
            assert!(!found.is_empty(), "{json}\nis refused: {problems}");
        }
    }
}

fn check(source: &ConfigText, text: &str, problems: &[Problem]) {
    for problem in problems {
        let line = source.describe(problem);
        assert!(!problem.problem.is_empty(), "a problem without words");
        assert!(line.len() <= MESSAGE_MAX, "a message of {} bytes", line.len());
        if let Some(at) = problem.position {
            let lines = text.split(['\n', '\r']).count();
            assert!(at.line >= 1 && at.line <= lines + 1 && at.column >= 1, "{line}: no such place in {lines} lines");
        }
    }
}
