//! From the body of a request to what it stands for, with everything that is wrong with it.

use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config::VmConfig;
use crate::device::DeviceConfig;
use crate::diagnose::{self, Diagnosis};
use crate::host::HostFacts;
use crate::openapi::{OPENAPI_JSON, SCHEMAS};
use crate::parse::MAX_PROBLEMS;
use crate::problem::{Problem, Problems};
use crate::{json, validate};

/// Why a body cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It is no JSON: what is wrong, and where.
    #[error("{0}")]
    Syntax(String),
    /// It is JSON, but not of the type that is needed.
    #[error("{0}")]
    Problems(Problems),
}

/// Reads a body of JSON as the type with this name in the API's description.
///
/// # Errors
/// [`BodyError::Syntax`] where it is no JSON or is nested too deep; [`BodyError::Problems`] with everything that is wrong
/// otherwise: for a configuration, that is what [`validate`] finds on an unlimited host, too, as far as it can be read.
pub fn parse_body<T: DeserializeOwned>(text: &str, type_name: &str) -> Result<T, BodyError> {
    let (tree, mut problems) =
        json::read(text).map_err(|error| BodyError::Syntax(format!("the body cannot be read as JSON: {error}")))?;
    let parsed = match serde_json::from_value(tree.to_json()) {
        Ok(value) if problems.is_empty() && !tree.has_odd_list() => return Ok(value),
        parsed => parsed,
    };
    let description: Value = serde_json::from_str(OPENAPI_JSON).unwrap_or_default();
    let schema = description.pointer(&format!("{SCHEMAS}/{type_name}")).unwrap_or(&Value::Null);
    let Diagnosis { problems: found, unusable, usable } = diagnose::walk(&tree, &description, schema);
    problems.extend(found);
    let apart = |problem: &Problem| !unusable.iter().any(|field| diagnose::depends(problem, field));
    problems.extend(usable.map(|usable| rules(usable, type_name)).unwrap_or_default().into_iter().filter(apart));
    if problems.is_empty() {
        match parsed {
            Ok(value) => return Ok(value),
            // The schema allows what serde does not. Better said in serde's words than not at all.
            Err(error) => problems.push(Problem::new("", error.to_string(), "")),
        }
    }
    problems.truncate(MAX_PROBLEMS);
    Err(BodyError::Problems(Problems(problems)))
}

/// What breaks a configuration's rules in a value of this type, where it has some.
fn rules(value: Value, type_name: &str) -> Vec<Problem> {
    match type_name {
        "VmConfig" => match serde_json::from_value::<VmConfig>(value) {
            Ok(config) => validate(&config, &HostFacts::unlimited()),
            Err(_) => Vec::new(),
        },
        "DeviceConfig" => match serde_json::from_value(value) {
            Ok(device) => of_device(device),
            Err(_) => Vec::new(),
        },
        _ => Vec::new(),
    }
}

/// What is wrong with a device, wherever it will stand.
fn of_device(device: DeviceConfig) -> Vec<Problem> {
    let config = VmConfig { devices: vec![device], ..VmConfig::new("any") };
    let problems = validate(&config, &HostFacts::unlimited()).into_iter();
    let of_it = problems.filter_map(|problem| {
        let field = problem.field.strip_prefix("devices[0]")?.trim_start_matches('.').to_owned();
        Some(Problem { field, ..problem })
    });
    of_it.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Shutdown, VcpusPatch};

    fn problems<T: DeserializeOwned + std::fmt::Debug>(text: &str, name: &str) -> Vec<String> {
        match parse_body::<T>(text, name) {
            Err(BodyError::Problems(problems)) => problems.0.iter().map(ToString::to_string).collect(),
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn bodies_are_read() {
        let config: VmConfig = parse_body(r#"{"kernel": {"path": "k"}}"#, "VmConfig").unwrap();
        assert_eq!(config, VmConfig::new("k"));
        let shutdown: Shutdown = parse_body(r#"{"deadline": "3s"}"#, "Shutdown").unwrap();
        assert_eq!(shutdown, Shutdown { deadline: Some(crate::TimeSpan::from_millis(3000)), force: false });
        assert_eq!(parse_body::<VcpusPatch>(r#"{"count": 2.0}"#, "VcpusPatch").unwrap(), VcpusPatch { count: 2 });
    }

    #[test]
    fn every_problem_is_told_with_its_field() {
        let told = problems::<VmConfig>(r#"{"kernel": {}, "cpus": {"count": 300}, "x": 1}"#, "VmConfig");
        let fields: Vec<&str> = told.iter().filter_map(|problem| problem.split(": ").next()).collect();
        assert_eq!(fields, ["kernel.path", "x", "cpus.count"], "{told:?}");
        let told = problems::<DeviceConfig>(r#"{"type": "disk", "readonly": 1, "queues": "x"}"#, "DeviceConfig");
        assert_eq!(told.len(), 3, "{told:?}");
        let told = problems::<VmConfig>(r#"{"kernel": {"path": "k"}, "memory": {"hugepages": "4M"}}"#, "VmConfig");
        assert!(told[0].starts_with("memory.hugepages: «4M» is not possible here"), "{told:?}");
        assert_eq!(problems::<VcpusPatch>("[]", "VcpusPatch").len(), 1);
        // serde would take these.
        assert_eq!(problems::<VcpusPatch>("[2]", "VcpusPatch").len(), 1);
        assert_eq!(problems::<Shutdown>("[]", "Shutdown").len(), 1);
        for text in [r#"{"kernel": ["k"]}"#, r#"{"kernel": {"path": "k"}, "platform": []}"#, r#"[{"path": "k"}]"#] {
            assert!(!problems::<VmConfig>(text, "VmConfig").is_empty(), "{text}");
        }
        let device = r#"{"kernel": {"path": "k"}, "devices": [["disk", "d"]]}"#;
        assert!(!problems::<VmConfig>(device, "VmConfig").is_empty());
        assert_eq!(problems::<VcpusPatch>("null", "VcpusPatch").len(), 1);
        assert_eq!(problems::<Shutdown>(r#"{"force": 1, "force": true}"#, "Shutdown").len(), 2);
    }

    #[test]
    fn what_is_no_json_is_said_so() {
        let deep = "[".repeat(10_000);
        for text in ["", "{", "kernel: {path: k}", "{\"a\": 1} x", "'a'", deep.as_str()] {
            assert!(matches!(parse_body::<Shutdown>(text, "Shutdown"), Err(BodyError::Syntax(_))), "{text:.20}");
        }
    }
}
