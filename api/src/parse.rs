//! From a file to a configuration.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::body::{BodyError, parse_body};
use crate::config::VmConfig;
use crate::device::DeviceConfig;
use crate::diagnose::diagnose;
use crate::problem::{Problem, Problems};
use crate::tree;

/// The largest configuration that is read, in bytes.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// The most problems that are told at once.
pub(crate) const MAX_PROBLEMS: usize = 50;

/// A configuration's text and where it comes from.
#[derive(Debug, Clone)]
pub struct ConfigText {
    /// The name of its source, as messages give it.
    name: String,
    text: String,
}

impl ConfigText {
    /// A text that was not read from a file.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self { name: name.into(), text: text.into() }
    }

    /// Reads a file, or standard input where `path` is `-`.
    ///
    /// # Errors
    /// A problem that says what is wrong with the file: missing, a directory, not readable, larger than
    /// [`MAX_CONFIG_BYTES`], not UTF-8.
    pub fn read(path: &Path) -> Result<Self, Problem> {
        let stdin = path.as_os_str() == "-";
        let name = if stdin { "standard input".to_owned() } else { path.display().to_string() };
        let failed = |error: io::Error| {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => "name a configuration in YAML or JSON",
                io::ErrorKind::PermissionDenied => "make it readable for this user",
                io::ErrorKind::IsADirectory => "name a file in it",
                _ => "",
            };
            Problem::new("", format!("{name}: {}", reason(&error)), remedy)
        };
        let bytes = if stdin { read_some(io::stdin().lock()) } else { File::open(path).and_then(read_some) };
        let bytes = bytes.map_err(failed)?;
        if bytes.len() > MAX_CONFIG_BYTES {
            let problem = format!("{name}: it is larger than {} KiB", MAX_CONFIG_BYTES >> 10);
            return Err(Problem::new("", problem, "is it a configuration?"));
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Self { name, text }),
            Err(error) => {
                let position = error.utf8_error().valid_up_to();
                let problem = format!("{name}: it is not text in UTF-8, as byte {position} shows");
                Err(Problem::new("", problem, "is it a configuration?"))
            }
        }
    }

    /// The configuration.
    ///
    /// # Errors
    /// Every problem of the text: the first place where it is not YAML, or else all unknown, repeated and missing
    /// fields and all values of a wrong type, and then what [`crate::validate`] finds in the rest on an unlimited host.
    pub fn parse(&self) -> Result<VmConfig, Problems> {
        let (tree, mut problems) = tree::read(&self.text);
        let Some(tree) = tree else {
            if problems.is_empty() {
                let remedy = "at least `kernel: {path: …}` is needed";
                problems.push(Problem::new("", "the configuration is empty", remedy));
            }
            return Err(bounded(problems));
        };
        match serde_json::from_value(tree.to_json()) {
            Ok(config) if problems.is_empty() && !tree.has_odd_list() => Ok(config),
            parsed => {
                let (config, error) = parsed.map_or_else(|error| (None, Some(error)), |config| (Some(config), None));
                problems.extend(diagnose(&tree, error));
                if let (Some(config), true) = (config, problems.is_empty()) {
                    return Ok(config);
                }
                self.locate(&mut problems);
                problems.sort_by_key(|problem| problem.position.map(|at| (at.line, at.column)));
                Err(bounded(problems))
            }
        }
    }

    /// The device that the text describes, as a configuration's list of devices has it.
    ///
    /// # Errors
    /// As [`ConfigText::parse`].
    pub fn parse_device(&self) -> Result<DeviceConfig, Problems> {
        let (tree, mut problems) = tree::read(&self.text);
        let Some(tree) = tree.filter(|_| problems.is_empty()) else {
            if problems.is_empty() {
                problems.push(Problem::new("", "there is no device in it", "at least `type: …` is needed"));
            }
            return Err(bounded(problems));
        };
        parse_body(&tree.to_json().to_string(), "DeviceConfig").map_err(|error| {
            let mut problems = match error {
                BodyError::Problems(problems) => problems.0,
                BodyError::Syntax(problem) => vec![Problem::new("", problem, "")],
            };
            // Their places are those of the JSON in between.
            problems.iter_mut().for_each(|problem| problem.position = None);
            self.locate(&mut problems);
            problems.sort_by_key(|problem| problem.position.map(|at| (at.line, at.column)));
            Problems(problems)
        })
    }

    /// Gives each problem the place of its field in the text, or of the nearest field around it.
    pub fn locate(&self, problems: &mut [Problem]) {
        if let (Some(tree), _) = tree::read(&self.text) {
            for problem in problems.iter_mut().filter(|problem| problem.position.is_none()) {
                problem.position = Some(tree.locate(&problem.field));
            }
        }
    }

    /// A problem as a line for people: source, line and column, field, what is wrong and what would be right.
    pub fn describe(&self, problem: &Problem) -> String {
        match problem.position {
            Some(at) => format!("{}:{}:{}: {problem}", self.name, at.line, at.column),
            None => format!("{}: {problem}", self.name),
        }
    }
}

/// Parses a configuration in YAML or JSON.
///
/// # Errors
/// As [`ConfigText::parse`].
pub fn parse(text: &str) -> Result<VmConfig, Problems> {
    ConfigText::new("configuration", text).parse()
}

/// As many problems as are told at once, and how many there are beside.
fn bounded(mut problems: Vec<Problem>) -> Problems {
    let more = problems.len().saturating_sub(MAX_PROBLEMS);
    if more > 0 {
        problems.truncate(MAX_PROBLEMS);
        problems.push(Problem::new("", format!("and {more} more"), ""));
    }
    Problems(problems)
}

/// Reads one byte more than is allowed, at the most.
fn read_some(from: impl Read) -> io::Result<Vec<u8>> {
    let limit = u64::try_from(MAX_CONFIG_BYTES + 1).unwrap_or(u64::MAX);
    let mut bytes = Vec::new();
    from.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// An error of the operating system in plain words.
fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".to_owned(),
        io::ErrorKind::PermissionDenied => "no permission to read it".to_owned(),
        io::ErrorKind::IsADirectory => "it is a directory".to_owned(),
        _ => error.to_string(),
    }
}
