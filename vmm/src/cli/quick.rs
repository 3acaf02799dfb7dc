//! The plain case of `halyard run` and `halyard serve`, read without clap.
//!
//! Clap builds its whole description of the command line before it reads the first word, which takes tenths of a
//! millisecond: a good part of the time in which the monitor brings a guest to its first instruction. What is read
//! here means the same to clap, which a test holds; whatever is not plain (help, mistakes, other commands) is left to
//! clap.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::ValueEnum;

use super::args::{Action, Cli, LogArgs, RunArgs, ServeArgs, ServiceArgs};
use crate::logging::{Format, Level};

/// Where a flag's value belongs.
enum Slot<'args> {
    One(&'args mut Option<String>),
    Path(&'args mut Option<PathBuf>),
    Many(&'args mut Vec<String>),
    /// A value may follow after `=` only.
    Attached(&'args mut Option<String>),
    Switch(&'args mut bool),
}

/// Reads a command line, the program's name first; `None` where clap is needed.
pub fn read(words: impl IntoIterator<Item = OsString>) -> Option<Cli> {
    let mut words = words.into_iter().skip(1);
    let serves = match words.next()?.to_str()? {
        "run" => false,
        "serve" => true,
        _ => return None,
    };
    let mut args = ServeArgs::default();
    let mut log = LogWords::default();
    while let Some(word) = words.next() {
        let word = word.into_string().ok()?;
        let flag = word.strip_prefix("--")?;
        let (name, attached) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let mut value = |attached: Option<String>| match attached {
            Some(value) => Some(value),
            None => words.next()?.into_string().ok().filter(|value| !value.starts_with('-')),
        };
        let slot = match name {
            "boot" if serves => Some(Slot::Switch(&mut args.boot)),
            _ => slot(&mut args.vm, &mut args.service, &mut log, name),
        };
        match slot {
            Some(Slot::One(slot)) if slot.is_none() => *slot = Some(value(attached)?),
            // Clap knows no empty path.
            Some(Slot::Path(slot)) if slot.is_none() => {
                *slot = Some(value(attached).filter(|path| !path.is_empty())?.into());
            }
            Some(Slot::Many(slot)) => slot.push(value(attached)?),
            Some(Slot::Attached(slot)) if slot.is_none() && attached.as_deref() != Some("") => {
                *slot = Some(attached.unwrap_or_default());
            }
            Some(Slot::Switch(slot)) if !*slot && attached.is_none() => *slot = true,
            _ => return None,
        }
    }
    let level = log.level.map_or(Ok(Level::Info), |word| Level::from_str(&word, false)).ok()?;
    let format = log.format.map_or(Ok(Format::Text), |word| Format::from_str(&word, false)).ok()?;
    let action = if serves {
        Action::Serve(Box::new(args))
    } else {
        let ServeArgs { service, vm, .. } = args;
        Action::Run(Box::new(vm), service)
    };
    Some(Cli { action, log: LogArgs { level, format } })
}

/// The log's flags as they were written.
#[derive(Default)]
struct LogWords {
    level: Option<String>,
    format: Option<String>,
}

fn slot<'args>(
    args: &'args mut RunArgs,
    service: &'args mut ServiceArgs,
    log: &'args mut LogWords,
    name: &str,
) -> Option<Slot<'args>> {
    Some(match name {
        "log-level" => Slot::One(&mut log.level),
        "log-format" => Slot::One(&mut log.format),
        "config" => Slot::One(&mut args.config),
        "kernel" => Slot::One(&mut args.kernel),
        "firmware" => Slot::One(&mut args.firmware),
        "initramfs" => Slot::One(&mut args.initramfs),
        "cmdline" => Slot::One(&mut args.cmdline),
        "kernel-cache" => Slot::One(&mut args.kernel_cache),
        "cpus" => Slot::One(&mut args.cpus),
        "memory" => Slot::One(&mut args.memory),
        "confidential" => Slot::One(&mut args.confidential),
        "disk" => Slot::Many(&mut args.disk),
        "net" => Slot::Many(&mut args.net),
        "serial" => Slot::One(&mut args.serial),
        "console" => Slot::Many(&mut args.console),
        "rng" => Slot::Attached(&mut args.rng),
        "hotplug-ports" => Slot::One(&mut args.hotplug_ports),
        "pvpanic" => Slot::One(&mut args.pvpanic),
        "boot-trace" => Slot::One(&mut args.boot_trace),
        "boot-timeout" => Slot::One(&mut args.boot_timeout),
        "system-map" => Slot::One(&mut args.system_map),
        "debug-exit" => Slot::Switch(&mut args.debug_exit),
        "on-reset" => Slot::One(&mut args.on_reset),
        "on-panic" => Slot::One(&mut args.on_panic),
        "api-socket" => Slot::One(&mut service.api_socket),
        "pid-file" => Slot::Path(&mut service.pid_file),
        "sandbox" => Slot::One(&mut service.sandbox),
        "core-dumps" => Slot::Switch(&mut service.core_dumps),
        "grant" => Slot::Many(&mut service.grant),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn quick(words: &[String]) -> Option<Cli> {
        read(words.iter().map(OsString::from))
    }

    /// A word of a command line: a flag that exists, one that almost does, a value, or anything.
    fn word() -> impl Strategy<Value = String> {
        let names: Vec<String> = super::super::args::command()
            .find_subcommand_mut("serve")
            .map(|serve| {
                serve.build();
                serve.get_arguments().filter_map(|arg| arg.get_long().map(str::to_owned)).collect()
            })
            .unwrap_or_default();
        assert!(names.len() > 15, "{names:?}");
        let names =
            names.into_iter().chain(["kernl".into(), "log-level".into(), "log-format".into()]).collect::<Vec<_>>();
        let name = prop::sample::select(names);
        let value =
            prop::sample::select(vec!["", "a", "stdio", "json", "debug", "-", "-q", "--", "a=b", "=", "a,b", "ä"]);
        prop_oneof![
            4 => name.clone().prop_map(|name| format!("--{name}")),
            4 => (name, value.clone()).prop_map(|(name, value)| format!("--{name}={value}")),
            4 => value.prop_map(str::to_owned),
            1 => any::<String>(),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_it_reads_means_the_same_to_clap(
            command in prop::sample::select(vec!["run", "serve"]),
            words in prop::collection::vec(word(), 0..6),
        ) {
            let words: Vec<String> = ["halyard".into(), command.into()].into_iter().chain(words).collect();
            if let Some(quick) = quick(&words) {
                let clap = Cli::read(&words);
                prop_assert_eq!(Some(quick), clap.ok(), "{:?}", words);
            }
        }
    }

    #[test]
    fn it_reads_the_plain_case() {
        let line = "halyard run --kernel k --cpus=2 --memory 1G --disk a --disk b --net t --serial stdio --console pty \
                    --rng --debug-exit --initramfs i --cmdline quiet --confidential tdx --pvpanic on --on-reset exit --on-panic \
                    exit --sandbox off --core-dumps --log-level debug --log-format json --config c";
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        assert_eq!(quick(&words), Some(Cli::read(&words).unwrap()));
    }

    #[test]
    fn it_reads_the_plain_service() {
        let line =
            "halyard serve --api-socket=vm.sock,mode=0660 --pid-file p --config vm.yaml --boot --grant /a --grant /b";
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        assert_eq!(quick(&words), Some(Cli::read(&words).unwrap()));
    }

    #[test]
    fn it_leaves_the_rest_to_clap() {
        for line in [
            "halyard",
            "halyard probe",
            "halyard run --help",
            "halyard run -h",
            "halyard run x",
            "halyard run --kernel",
            "halyard run --boot",
            "halyard serve --pid-file=",
        ] {
            let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
            assert_eq!(quick(&words), None, "{line}");
        }
    }
}
