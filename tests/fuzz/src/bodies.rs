//! Bodies of requests of any text.

use api::{BodyError, DeviceConfig, MemoryPatch, ProblemDocument, Shutdown, VcpusPatch, VmConfig, parse_body};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// More than any reply to a bad body needs: so many problems, each with a message that is cut.
const REPLY_MAX: usize = 128 << 10;

/// How many types of bodies there are.
pub const TYPES: u8 = 5;

/// Takes a body of the type that its first byte chooses through all that is done with it before the VM's owner is asked.
pub fn read(input: &[u8]) {
    let Some((kind, text)) = input.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    match kind % TYPES {
        0 => body::<VmConfig>(text, "VmConfig"),
        1 => body::<DeviceConfig>(text, "DeviceConfig"),
        2 => body::<Shutdown>(text, "Shutdown"),
        3 => body::<VcpusPatch>(text, "VcpusPatch"),
        _ => body::<MemoryPatch>(text, "MemoryPatch"),
    }
}

/// What is read is written and read back as the same; what is refused is refused with reasons.
fn body<T: DeserializeOwned + Serialize + PartialEq>(text: &str, name: &str) {
    match parse_body::<T>(text, name) {
        Ok(value) => {
            assert!(serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok(), "{text:?} is taken and is no JSON");
            let json = serde_json::to_string(&value).expect("a body can be written");
            match parse_body::<T>(&json, name) {
                Ok(again) => assert!(again == value, "{json} reads back as another {name}"),
                Err(error) => panic!("{json} is refused: {error}"),
            }
        }
        Err(BodyError::Syntax(reason)) => assert!(!reason.is_empty() && reason.len() < REPLY_MAX),
        Err(BodyError::Problems(problems)) => {
            assert!(!problems.0.is_empty(), "{text:?} is refused without a reason");
            assert!(problems.0.iter().all(|problem| !problem.problem.is_empty()), "a problem without words");
            let document = ProblemDocument::new(422, "", "").with_problems(&problems.0);
            let length = serde_json::to_string(&document).expect("a reply can be written").len();
            assert!(length <= REPLY_MAX, "{length} bytes of problems for {} bytes", text.len());
        }
    }
}
