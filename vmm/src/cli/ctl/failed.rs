//! Why `halyard ctl` did not do what it was asked, as a person is told and as a script sees it.

use std::io;
use std::process::ExitCode;

use api::{ClientError, FieldProblem, Problem, ProblemDocument, field_of};

use super::table::clean;
use crate::cli::{BAD_INPUT, HOST_FAILED, complain};
use crate::logging::Format;

/// Nobody answers at the socket, or not in time, or the connection broke.
const NO_CONNECTION: u8 = 3;
/// The monitor does not do this now: the VM's phase, or another request, is in the way, or it is not built yet.
const REFUSED: u8 = 4;
/// What was named is not there.
const MISSING: u8 = 5;
/// A job that was waited for failed or was cancelled.
const JOB_FAILED: u8 = 6;

/// Why it was not done.
#[derive(Debug)]
pub struct Failed {
    code: u8,
    /// What is told, a line each, with the field that has it.
    told: Vec<(String, String)>,
}

/// The result of a command.
pub type Done<T = ()> = Result<T, Failed>;

impl Failed {
    fn new(code: u8, told: impl Into<String>) -> Self {
        Self { code, told: vec![(String::new(), told.into())] }
    }

    /// Something that the user gave cannot be used. Each problem comes with the line that tells it.
    pub fn input(problems: impl IntoIterator<Item = (Problem, String)>) -> Self {
        let told = problems.into_iter().map(|(problem, told)| (problem.field, told));
        Self { code: BAD_INPUT, told: told.collect() }
    }

    /// Something that the user gave cannot be used.
    pub fn bad(field: &str, problem: impl Into<String>, remedy: &str) -> Self {
        let problem = Problem::new(field, problem, remedy);
        let told = problem.to_string();
        Self::input([(problem, told)])
    }

    /// This end failed.
    pub fn here(reason: impl Into<String>) -> Self {
        Self::new(HOST_FAILED, reason)
    }

    /// The monitor ended too early.
    pub fn gone(reason: impl Into<String>) -> Self {
        Self::new(NO_CONNECTION, reason)
    }

    /// The monitor refuses.
    pub fn refused(reason: impl Into<String>) -> Self {
        Self::new(REFUSED, reason)
    }

    /// What was named is not there.
    pub fn missing(reason: impl Into<String>) -> Self {
        Self::new(MISSING, reason)
    }

    /// A job did not do what it was to do.
    pub fn job(reason: impl Into<String>) -> Self {
        Self::new(JOB_FAILED, reason)
    }

    /// Nobody reads what is printed any more, which is no failure.
    pub fn unheard() -> Self {
        Self { code: 0, told: Vec::new() }
    }

    /// Whether the connection is what failed, so that another may do better.
    pub fn is_connection(&self) -> bool {
        self.code == NO_CONNECTION
    }

    /// Tells it. The exit code is returned.
    pub fn tell(&self, format: Format) -> ExitCode {
        for (field, told) in &self.told {
            complain(format, field, &clean(told));
        }
        self.code.into()
    }
}

/// Problems of a reply, in the words of a configuration.
pub fn problems(document: &ProblemDocument) -> Vec<Problem> {
    let problem = |FieldProblem { pointer, problem, remedy }: &FieldProblem| {
        Problem::new(field_of(pointer), problem.clone(), remedy.clone())
    };
    document.problems.iter().map(problem).collect()
}

impl From<ClientError> for Failed {
    fn from(error: ClientError) -> Self {
        match error {
            ClientError::Refused(document) => (*document).into(),
            ClientError::Connect { path, source } => Self::new(NO_CONNECTION, format!("{path}: {}", why(&source))),
            ClientError::Broken(source) if is_end(&source) => {
                Self::new(NO_CONNECTION, "the monitor closed the connection before it had answered")
            }
            ClientError::Broken(_) | ClientError::TimedOut(_) => Self::new(NO_CONNECTION, error.to_string()),
            ClientError::Garbled(_) => Self::new(HOST_FAILED, error.to_string()),
        }
    }
}

impl From<ProblemDocument> for Failed {
    fn from(document: ProblemDocument) -> Self {
        let code = match document.status {
            400 | 413 | 415 | 422 => BAD_INPUT,
            404 => MISSING,
            409 | 412 => REFUSED,
            _ => HOST_FAILED,
        };
        let told: Vec<_> = problems(&document).into_iter().map(|one| (one.field.clone(), one.to_string())).collect();
        if told.is_empty() { Self::new(code, document.detail) } else { Self { code, told } }
    }
}

fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe)
}

/// Why a socket cannot be reached, and what would help.
fn why(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such socket; is the monitor running, with --api-socket?".to_owned(),
        io::ErrorKind::ConnectionRefused => "nobody listens at it: its monitor has ended; start it anew".to_owned(),
        io::ErrorKind::PermissionDenied => "no permission: the socket belongs to another user".to_owned(),
        io::ErrorKind::TimedOut => "the monitor does not take connections; does it hang?".to_owned(),
        _ => error.to_string(),
    }
}
