//! Commands to run in a host or guest, and what they leave behind.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::client::PATIENCE;
use crate::protocol::Status;
use crate::text::Text;

/// A command to run.
#[derive(Clone, Debug)]
pub struct Cmd {
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) folder: Option<String>,
    pub(crate) input: Vec<u8>,
    pub(crate) patience: Duration,
}

impl Cmd {
    /// A program, searched in `PATH`.
    pub fn new(program: impl Into<String>) -> Self {
        Self { argv: vec![program.into()], env: Vec::new(), folder: None, input: Vec::new(), patience: PATIENCE }
    }

    /// A line for `sh`.
    pub fn shell(line: impl Into<String>) -> Self {
        Self::new("sh").arg("-c").arg(line)
    }

    /// One argument more.
    #[must_use]
    pub fn arg(mut self, argument: impl Into<String>) -> Self {
        self.argv.push(argument.into());
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<T: Into<String>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.argv.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    /// Sets the working directory.
    #[must_use]
    pub fn folder(mut self, folder: impl Into<String>) -> Self {
        self.folder = Some(folder.into());
        self
    }

    /// What [`Client::run`] writes to its standard input, which is then closed.
    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.input = bytes.into();
        self
    }

    /// How long [`Client::run`] waits for its end; [`PATIENCE`] by default.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// As a person would type it, for messages.
    pub(crate) fn line(&self) -> String {
        match self.argv.as_slice() {
            [shell, flag, line] if shell == "sh" && flag == "-c" => line.clone(),
            argv => argv.join(" "),
        }
    }
}

impl From<&str> for Cmd {
    fn from(line: &str) -> Self {
        Self::shell(line)
    }
}

impl From<String> for Cmd {
    fn from(line: String) -> Self {
        Self::shell(line)
    }
}

/// What a command left behind.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command as a line, for messages.
    pub command: String,
    /// How it ended.
    pub status: Status,
    /// All of its standard output.
    pub stdout: Vec<u8>,
    /// All of its standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Standard output as text without the newline at its end.
    ///
    /// # Errors
    /// Where the command did not exit with 0: its status and the end of what it wrote.
    pub fn ok(self) -> Result<String> {
        if !self.status.success() {
            bail!(
                "`{}` ended with {}\n--- its error output ends ---\n{}\n--- its output ends ---\n{}",
                self.command,
                self.status,
                Text::tail_of(&self.stderr),
                Text::tail_of(&self.stdout)
            );
        }
        Ok(String::from_utf8_lossy(&self.stdout).trim_end().to_owned())
    }
}
