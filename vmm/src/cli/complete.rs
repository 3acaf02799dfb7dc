//! `halyard complete`: what may stand where a command line is not finished yet. A shell asks it at each press of Tab; the
//! answers come from the command line's own description, and from the monitor where a device, console or job is to be
//! named.
//!
//! Each answer is a line: a word, a tab, and what it means. A line [`FILES`] says that paths of files may stand there.

use std::process::ExitCode;
use std::time::Duration;

use api::{Client, DeviceConfig, Endpoint};
use clap::{Arg, Command};

use super::args::{self, CompleteArgs};
use super::print;
use crate::logging::Format;

/// The answer where a path may stand.
const FILES: &str = ":files";
/// How long a monitor has for its answer: a person waits.
const PATIENCE: Duration = Duration::from_millis(500);

/// Prints what may stand in the place of the last word.
pub fn complete(args: &CompleteArgs, format: Format) -> ExitCode {
    let mut command = args::command();
    command.build();
    let (last, before) = args.words.split_last().map_or((String::new(), &[][..]), |(last, rest)| (last.clone(), rest));
    let text: String = candidates(&command, before, &last).into_iter().map(|line| line + "\n").collect();
    print(&text, ExitCode::SUCCESS, format)
}

/// Where a command line has come to.
struct Place<'a> {
    command: &'a Command,
    /// The flag whose value comes next.
    flag: Option<&'a Arg>,
    /// How many values without a flag there were.
    positional: usize,
    /// No flags come any more.
    only_values: bool,
    socket: Option<String>,
}

fn candidates(command: &Command, before: &[String], last: &str) -> Vec<String> {
    let mut place = Place { command, flag: None, positional: 0, only_values: false, socket: None };
    for word in before.iter().skip(1) {
        place.step(word);
    }
    // Bash takes `=` for a word of its own.
    let last = if last == "=" { "" } else { last };
    if let Some(flag) = place.flag {
        return place.values(flag, "", last);
    }
    if let Some((name, value)) = last.strip_prefix("--").and_then(|flag| flag.split_once('='))
        && let Some(flag) = place.long(name)
    {
        return place.values(flag, &format!("--{name}="), value);
    }
    if last.starts_with('-') && !place.only_values {
        return place.flags(last);
    }
    let mut found: Vec<String> = place
        .command
        .get_subcommands()
        .filter(|one| !one.is_hide_set() && one.get_name().starts_with(last))
        .map(|one| answer(one.get_name(), &one.get_about().map(ToString::to_string).unwrap_or_default()))
        .collect();
    let positionals: Vec<&Arg> = place.command.get_positionals().collect();
    if let Some(arg) = positionals.get(place.positional).or_else(|| positionals.last().filter(|arg| many(arg))) {
        found.extend(place.values(arg, "", last));
    }
    found
}

fn many(arg: &Arg) -> bool {
    arg.get_num_args().is_some_and(|count| count.max_values() > 1)
        || matches!(arg.get_action(), clap::ArgAction::Append)
}

/// A word, and the first sentence of what it means.
fn answer(word: &str, meaning: &str) -> String {
    let first = meaning.lines().next().unwrap_or_default();
    format!("{word}\t{first}")
}

impl<'a> Place<'a> {
    /// Goes on by a word that is finished.
    fn step(&mut self, word: &str) {
        if let Some(flag) = self.flag {
            if word != "=" {
                self.take(flag, word);
                self.flag = None;
            }
        } else if word == "--" {
            self.only_values = true;
        } else if let Some(name) = word.strip_prefix("--").filter(|_| !self.only_values) {
            let (name, value) = name.split_once('=').map_or((name, None), |(name, value)| (name, Some(value)));
            let takes = |arg: &&Arg| arg.get_action().takes_values() && !arg.is_require_equals_set();
            match (self.long(name), value) {
                (Some(flag), Some(value)) => self.take(flag, value),
                (flag, _) => self.flag = flag.filter(takes),
            }
        } else if let Some(letter) = word.strip_prefix('-').and_then(|rest| rest.chars().next())
            && !self.only_values
        {
            let flag = self.arguments().find(|arg| arg.get_short() == Some(letter));
            // A value may be written right behind the letter.
            self.flag = flag.filter(|arg| arg.get_action().takes_values() && word.len() == 2);
        } else if let Some(command) = self.command.find_subcommand(word) {
            (self.command, self.positional) = (command, 0);
        } else {
            self.positional += 1;
        }
    }

    fn arguments(&self) -> impl Iterator<Item = &'a Arg> + use<'a> {
        self.command.get_arguments().filter(|arg| !arg.is_hide_set())
    }

    fn long(&self, name: &str) -> Option<&'a Arg> {
        self.arguments().find(|arg| arg.get_long() == Some(name))
    }

    fn take(&mut self, flag: &Arg, value: &str) {
        if flag.get_long() == Some("socket") {
            self.socket = Some(value.to_owned());
        }
    }

    fn flags(&self, last: &str) -> Vec<String> {
        let names = self.arguments().filter_map(|arg| arg.get_long().map(|name| (format!("--{name}"), arg)));
        let fitting = names.filter(|(name, _)| name.starts_with(last));
        fitting.map(|(name, arg)| answer(&name, &arg.get_help().map(ToString::to_string).unwrap_or_default())).collect()
    }

    /// What a value may be that begins with `last`. `prefix` stands before it in the same word.
    fn values(&self, arg: &Arg, prefix: &str, last: &str) -> Vec<String> {
        let known = arg.get_possible_values();
        let name = arg.get_value_names().and_then(|names| names.first()).map(clap::builder::Str::as_str);
        let named: Vec<(String, String)> = match name {
            _ if !known.is_empty() => {
                let help = |value: &clap::builder::PossibleValue| value.get_help().map(ToString::to_string);
                known.iter().map(|value| (value.get_name().to_owned(), help(value).unwrap_or_default())).collect()
            }
            Some("DEVICE") => self.devices(|_| true),
            Some("CONSOLE") => self.consoles(),
            Some("JOB") => self.jobs(),
            Some(name) if ["FILE", "PATH", "DIR"].iter().any(|word| name.starts_with(word)) => {
                return vec![FILES.to_owned()];
            }
            _ => Vec::new(),
        };
        let fitting = named.into_iter().filter(|(word, _)| word.starts_with(last));
        fitting.map(|(word, meaning)| answer(&format!("{prefix}{word}"), &meaning)).collect()
    }

    /// The monitor, if it answers.
    fn monitor(&self) -> Option<Client> {
        let socket = self.socket.clone().or_else(|| std::env::var("HALYARD_SOCKET").ok())?;
        Client::connect_within(socket, Some(PATIENCE)).ok()
    }

    fn devices(&self, wanted: impl Fn(&DeviceConfig) -> bool) -> Vec<(String, String)> {
        let devices = self.monitor().and_then(|mut monitor| monitor.devices().ok()).unwrap_or_default();
        let named = devices.into_iter().filter(wanted);
        named.map(|device| (device.id().to_owned(), device.type_name().to_owned())).collect()
    }

    fn consoles(&self) -> Vec<(String, String)> {
        let leads_here = |device: &DeviceConfig| match device {
            DeviceConfig::Console(console) => console.endpoint == Endpoint::Api {},
            _ => false,
        };
        let mut found = self.devices(leads_here);
        let config = self.monitor().and_then(|mut monitor| monitor.vm().ok()).and_then(|vm| vm.running);
        if config.is_some_and(|config| config.serial == Some(Endpoint::Api {})) {
            found.push(("serial".to_owned(), "the serial port".to_owned()));
        }
        found
    }

    fn jobs(&self) -> Vec<(String, String)> {
        let jobs = self.monitor().and_then(|mut monitor| monitor.jobs().ok()).unwrap_or_default();
        let word = |job: &api::Job| format!("{:?}, {:?}", job.kind, job.state).to_lowercase();
        jobs.iter().map(|job| (job.id.to_string(), word(job))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The words that may complete a line, whose last word is after its last blank.
    fn words(line: &str) -> Vec<String> {
        let mut command = args::command();
        command.build();
        let mut words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let last = words.pop().unwrap_or_default();
        let found = candidates(&command, &words, &last);
        found.iter().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect()
    }

    #[test]
    fn commands_flags_and_words_are_known() {
        for (line, expected) in [
            ("halyard pr", &["probe"][..]),
            ("halyard ctl dev", &["devices"]),
            ("halyard ctl --socket s devices re", &["remove"]),
            ("halyard ctl devices remove --f", &["--force"]),
            ("halyard ctl -o ", &["table", "json", "yaml"]),
            ("halyard ctl --output=y", &["--output=yaml"]),
            ("halyard ctl --output = y", &["yaml"]),
            ("halyard ctl shutdown --de", &["--deadline"]),
            ("halyard run --kernel ", &[FILES]),
            ("halyard run --kernel k --cp", &["--cpus"]),
            ("halyard ctl create ", &[FILES]),
            ("halyard ctl -s ", &[FILES]),
            ("halyard ctl show x", &[]),
            ("halyard complet", &[]),
            ("halyard ctl --socket /nonexistent devices remove ", &[]),
            ("halyard ctl devices remove -- --f", &[]),
        ] {
            assert_eq!(words(line), expected, "{line}");
        }
    }

    #[test]
    fn every_command_is_offered_but_those_that_are_hidden() {
        let found = words("halyard ");
        for name in ["run", "serve", "validate", "probe", "measure", "verify", "schema", "ctl"] {
            assert!(found.iter().any(|word| word == name), "{name} is not in {found:?}");
        }
        assert_eq!(found.len(), 8, "{found:?}");
    }
}
