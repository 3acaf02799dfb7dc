//! Problem documents (RFC 9457): how the API says that a request failed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::problem::Problem;

/// The media type of a problem document.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Why a request failed: a problem document (RFC 9457).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProblemDocument {
    /// What kind of problem it is: `about:blank`, which says that the status tells it.
    #[serde(rename = "type")]
    pub kind: String,
    /// The status in words.
    pub title: String,
    /// The HTTP status.
    #[schemars(range(min = 100, max = 599))]
    pub status: u16,
    /// What happened, in a sentence.
    pub detail: String,
    /// The request's id, as in the log and in the header `X-Request-Id`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub request_id: String,
    /// Every problem of the request's body.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<FieldProblem>,
}

/// One thing wrong with a request's body.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FieldProblem {
    /// The field, as a JSON pointer (RFC 6901); empty for the body as a whole.
    pub pointer: String,
    /// What is wrong.
    pub problem: String,
    /// What would be right; empty where the problem says it.
    pub remedy: String,
}

impl ProblemDocument {
    /// A document for an HTTP status. `title` is the status in words.
    pub fn new(status: u16, title: impl Into<String>, detail: impl Into<String>) -> Self {
        Self {
            kind: "about:blank".into(),
            title: title.into(),
            status,
            detail: detail.into(),
            request_id: String::new(),
            problems: Vec::new(),
        }
    }

    /// The same, with what is wrong with fields of the body.
    #[must_use]
    pub fn with_problems(mut self, problems: &[Problem]) -> Self {
        self.problems = problems.iter().map(FieldProblem::from).collect();
        self
    }
}

impl std::fmt::Display for ProblemDocument {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}: {}", self.status, self.title, self.detail)?;
        for FieldProblem { pointer, problem, remedy } in &self.problems {
            let separator = if remedy.is_empty() { "" } else { "; " };
            write!(f, "\n{pointer}: {problem}{separator}{remedy}")?;
        }
        Ok(())
    }
}

impl From<&Problem> for FieldProblem {
    fn from(problem: &Problem) -> Self {
        Self { pointer: pointer(&problem.field), problem: problem.problem.clone(), remedy: problem.remedy.clone() }
    }
}

/// The JSON pointer of a field's path: `devices[1].path` is `/devices/1/path`.
pub fn pointer(field: &str) -> String {
    let steps = field.split(['.', '[']).filter(|step| !step.is_empty());
    steps.fold(String::new(), |mut pointer, step| {
        let step = step.strip_suffix(']').unwrap_or(step);
        pointer.push('/');
        pointer += &step.replace('~', "~0").replace('/', "~1");
        pointer
    })
}

/// The path of the field that a JSON pointer leads to: `/devices/1/path` is `devices[1].path`.
pub fn field_of(pointer: &str) -> String {
    pointer.split('/').skip(1).fold(String::new(), |mut field, step| {
        let step = step.replace("~1", "/").replace("~0", "~");
        if !step.is_empty() && step.bytes().all(|byte| byte.is_ascii_digit()) {
            field += &format!("[{step}]");
        } else {
            field += if field.is_empty() { "" } else { "." };
            field += &step;
        }
        field
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_fields_become_pointers() {
        for (field, expected) in [
            ("", ""),
            ("kernel", "/kernel"),
            ("devices[12].path", "/devices/12/path"),
            ("a/b.c~d", "/a~1b/c~0d"),
            ("[3]", "/3"),
        ] {
            assert_eq!(pointer(field), expected, "{field}");
        }
        for field in ["", "kernel", "devices[12].path", "[3]", "a.b[0][1].c"] {
            assert_eq!(field_of(&pointer(field)), field);
        }
    }
}
