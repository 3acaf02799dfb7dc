//! The log, on standard error.

use std::fmt;
use std::io;

use clap::ValueEnum;
use tracing::level_filters::LevelFilter;

/// What is logged: a level and all that weigh more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Level {
    /// An action of the user, or of the guest on the host, failed
    Error,
    /// Something is not as it should be; the guest goes on
    Warn,
    /// What a user may want to know, as the name of a pseudo-terminal
    Info,
    /// The steps of the monitor
    Debug,
    /// Every exit and request
    Trace,
}

impl From<Level> for LevelFilter {
    fn from(level: Level) -> Self {
        match level {
            Level::Error => Self::ERROR,
            Level::Warn => Self::WARN,
            Level::Info => Self::INFO,
            Level::Debug => Self::DEBUG,
            Level::Trace => Self::TRACE,
        }
    }
}

/// How a line of the log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people, with the seconds since the start
    Text,
    /// An object of JSON in each line, with date and time
    Json,
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        LevelFilter::from(*self).fmt(f)
    }
}

/// Starts the log. It is to be called once.
pub fn start(level: Level, format: Format) {
    let log = tracing_subscriber::fmt().with_max_level(level).with_writer(io::stderr);
    match format {
        Format::Text => log.with_timer(tracing_subscriber::fmt::time::uptime()).with_target(false).init(),
        Format::Json => log.json().flatten_event(true).init(),
    }
}
