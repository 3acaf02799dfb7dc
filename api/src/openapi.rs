//! The description of the API (OpenAPI 3.1), generated from the table of routes and the types.

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};

use crate::diagnose::{tag, type_named, words};
use crate::routes::{Content, EVENT_STREAM, Operation, ROUTES, Route};
use crate::schema::unfold;
use crate::{
    DeviceConfig, Event, HostReport, Job, MemoryInfo, MemoryPatch, PROBLEM_JSON, Pong, ProblemDocument, Quotes,
    Shutdown, Vcpus, VcpusPatch, Version, VmConfig, VmInfo,
};

/// The description of the API as text, as it is committed. A test holds it equal to what [`openapi`] generates, so that
/// a running monitor need not generate it.
pub const OPENAPI_JSON: &str = include_str!("../../resources/openapi.json");

/// The path, within [`OPENAPI_JSON`], under which the schema of each type stands by its name.
pub const SCHEMAS: &str = "/components/schemas";

/// The description of the API, generated.
pub fn openapi() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = format!("{SCHEMAS}/").into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    register::<VmConfig>(&mut generator);
    register::<VmInfo>(&mut generator);
    register::<DeviceConfig>(&mut generator);
    register::<Vcpus>(&mut generator);
    register::<VcpusPatch>(&mut generator);
    register::<MemoryInfo>(&mut generator);
    register::<MemoryPatch>(&mut generator);
    register::<Quotes>(&mut generator);
    register::<Shutdown>(&mut generator);
    register::<HostReport>(&mut generator);
    register::<Version>(&mut generator);
    register::<Pong>(&mut generator);
    register::<Job>(&mut generator);
    register::<Event>(&mut generator);
    register::<ProblemDocument>(&mut generator);
    let mut schemas = Value::Object(generator.take_definitions(true));
    unfold(&mut schemas);
    name_variants(&mut schemas);
    list_words(&mut schemas);
    add_patch(&mut schemas);

    let mut paths: Map<String, Value> = Map::new();
    for route in ROUTES {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.verb.as_str().to_lowercase()] = describe(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Halyard",
            "version": "1",
            "description": "One virtual machine, over a Unix socket. Requests and replies are JSON; a request that fails \
                            is answered with a problem document (RFC 9457). Every reply has the request's id in \
                            `X-Request-Id`: the client's own where it sent one.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost" }],
        "paths": paths,
        "components": { "schemas": schemas },
    })
}

fn register<T: JsonSchema>(generator: &mut SchemaGenerator) {
    generator.subschema_for::<T>();
}

/// Gives each variant of a tagged type the type's name with its tag as a title, after which generated clients name it.
fn name_variants(schemas: &mut Value) {
    for (name, schema) in schemas.as_object_mut().into_iter().flatten() {
        let Some(variants) = schema.get_mut("oneOf").and_then(Value::as_array_mut) else { continue };
        let tag = tag(variants).to_owned();
        for variant in variants {
            let type_name = type_named(variant, &tag).and_then(Value::as_str);
            if let Some(title) = type_name.map(|type_name| format!("{name} {type_name}")) {
                variant["title"] = title.into();
            }
        }
    }
}

/// Lists the words that a value is one of as an `enum`, and what they mean in its description: generators of clients
/// take no other form of them.
fn list_words(schemas: &mut Value) {
    for schema in schemas.as_object_mut().into_iter().flat_map(Map::values_mut) {
        let Some(words) = words(schema).map(|words| json!(words)) else { continue };
        let branches = schema.get("oneOf").and_then(Value::as_array).into_iter().flatten();
        let meanings = branches.filter_map(|branch| {
            Some(format!("`{}`: {}", branch.get("const")?.as_str()?, branch.get("description")?.as_str()?))
        });
        let about = schema.get("description").and_then(Value::as_str).map(str::to_owned);
        let description: Vec<String> = about.into_iter().chain(meanings).collect();
        *schema = json!({ "type": "string", "enum": words, "description": description.join("\n") });
    }
}

/// A patch of a device is a part of one: any of its fields.
fn add_patch(schemas: &mut Value) {
    schemas["DevicePatch"] = json!({
        "description": "The fields of a device that change (JSON merge patch, RFC 7396); null takes a field's default.",
        "type": "object",
        "additionalProperties": true,
    });
}

fn describe(route: &Route) -> Value {
    let mut operation = json!({ "operationId": route.id, "summary": route.summary, "responses": {} });
    let parameters = parameters(route);
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(body) = route.body {
        let schema = json!({ "$ref": format!("#{SCHEMAS}/{body}") });
        let required = !route.body_optional;
        operation["requestBody"] =
            json!({ "required": required, "content": { "application/json": { "schema": schema } } });
    }
    let responses = &mut operation["responses"];
    for success in route.replies {
        let mut response = json!({ "description": success.meaning });
        if let Some((media, schema)) = content(success.content) {
            response["content"][media]["schema"] = schema;
        }
        if matches!(success.content, Content::Json("VmInfo" | "DeviceConfig" | "Vcpus" | "MemoryInfo")) {
            response["headers"]["ETag"] = json!({
                "description": "The configuration's generation, for `If-Match`.",
                "schema": { "type": "string" },
            });
        }
        responses[success.status.to_string()] = response;
    }
    for status in route.problems {
        responses[status.to_string()] = problem(meaning(*status));
    }
    responses["default"] = problem("The request failed.");
    operation
}

fn parameters(route: &Route) -> Vec<Value> {
    let mut parameters = Vec::new();
    if route.path.contains("{id}") {
        let schema = match route.operation {
            Operation::GetJob | Operation::CancelJob => number(),
            _ => json!({ "type": "string", "pattern": "^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$" }),
        };
        parameters.push(json!({ "name": "id", "in": "path", "required": true, "schema": schema }));
    }
    match route.operation {
        Operation::PutDevice
        | Operation::PatchDevice
        | Operation::RemoveDevice
        | Operation::PatchVcpus
        | Operation::PatchMemory => parameters.push(json!({
            "name": "If-Match",
            "in": "header",
            "description": "The ETag of the configuration that is to be changed: of another it is not.",
            "schema": { "type": "string" },
        })),
        Operation::ReadEvents => parameters.push(json!({
            "name": "Last-Event-ID",
            "in": "header",
            "description": "The number of the last event that is known: the stream begins with the next. Without it, \
                            with what happens from now on.",
            "schema": number(),
        })),
        Operation::OpenConsole => parameters.push(json!({
            "name": "takeover",
            "in": "query",
            "description": "A client who is connected already is sent away.",
            "schema": { "type": "boolean", "default": false },
        })),
        _ => {}
    }
    if route.operation == Operation::RemoveDevice {
        parameters.push(json!({
            "name": "force",
            "in": "query",
            "description": "Take the device out of a running machine without asking the guest, which loses what it has \
                            not written.",
            "schema": { "type": "boolean", "default": false },
        }));
    }
    parameters
}

fn content(content: Content) -> Option<(&'static str, Value)> {
    let named = |name: &str| json!({ "$ref": format!("#{SCHEMAS}/{name}") });
    match content {
        Content::None => None,
        Content::Json(name) => Some(("application/json", named(name))),
        Content::List(name) => Some(("application/json", json!({ "type": "array", "items": named(name) }))),
        Content::Object => Some(("application/json", json!({ "type": "object" }))),
        // Of a stream it is each event that is described, as OpenAPI had it before 3.2.
        Content::Text(EVENT_STREAM) => Some((EVENT_STREAM, event())),
        Content::Text(media) => Some((media.split(';').next().unwrap_or(media), json!({ "type": "string" }))),
    }
}

/// A number of an event or a job.
fn number() -> Value {
    json!({ "type": "integer", "format": "uint64", "minimum": 0, "maximum": u64::MAX })
}

fn event() -> Value {
    json!({
        "type": "object",
        "required": ["id", "event", "data"],
        "properties": {
            "id": { "type": "string", "pattern": "^[0-9]+$", "description": "The event's number." },
            "event": { "type": "string", "description": "The event's type." },
            "data": {
                "type": "string",
                "description": "The event as JSON.",
                "contentMediaType": "application/json",
                "contentSchema": { "$ref": format!("#{SCHEMAS}/Event") },
            },
        },
    })
}

fn problem(meaning: &str) -> Value {
    let schema = json!({ "$ref": format!("#{SCHEMAS}/ProblemDocument") });
    json!({ "description": meaning, "content": { PROBLEM_JSON: { "schema": schema } } })
}

fn meaning(status: u16) -> &'static str {
    match status {
        400 => "The request cannot be understood.",
        404 => "What the request names is not there.",
        409 => "The VM is in a phase, or has something else, that is in the way.",
        412 => "The configuration is another than `If-Match` names.",
        422 => "The configuration, or what it names on the host, cannot be used: every problem is listed.",
        426 => "The connection must be upgraded.",
        _ => "The request failed.",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE_SCHEMA=1 cargo test -p api openapi` writes the file anew.
    #[test]
    fn committed_description_is_the_generated_one() {
        let generated = serde_json::to_string_pretty(&openapi()).unwrap() + "\n";
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/openapi.json"), generated).unwrap();
            return;
        }
        assert!(
            OPENAPI_JSON == generated,
            "resources/openapi.json differs from the types: run `UPDATE_SCHEMA=1 cargo test -p api openapi`"
        );
    }

    #[test]
    fn every_type_that_a_route_names_is_described() {
        let description = openapi();
        for route in ROUTES {
            let named = route.replies.iter().filter_map(|success| match success.content {
                Content::Json(name) | Content::List(name) => Some(name),
                _ => None,
            });
            for name in named.chain(route.body) {
                assert!(description.pointer(&format!("{SCHEMAS}/{name}")).is_some(), "{}: {name}", route.id);
            }
        }
    }
}
