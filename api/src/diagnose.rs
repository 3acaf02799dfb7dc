//! What is wrong with a text that is YAML but no configuration: all of it at once, by walking the text's tree beside
//! the configuration's JSON schema. It runs only after the configuration was refused.

use serde_json::{Map, Value};

use crate::confidential::{Identity, QuoteService};
use crate::config::VmConfig;
use crate::host::HostFacts;
use crate::problem::{Position, Problem};
use crate::schema::SCHEMA_JSON;
use crate::suggest::did_you_mean;
use crate::tree::{Node, Shape, join};
use crate::units::{ByteSize, MacAddr, TimeSpan, UnitError, shorten};
use crate::validate::validate;

/// Every problem of `tree`, given what serde said of it. Values that cannot be used are replaced by harmless ones, so
/// that the rest is validated too.
pub(crate) fn diagnose(tree: &Node, refused: Option<serde_json::Error>) -> Vec<Problem> {
    let Ok(schema) = serde_json::from_str(SCHEMA_JSON) else { return refused.map(unexplained).into_iter().collect() };
    let Diagnosis { mut problems, unusable, usable } = walk(tree, &schema, &schema);
    match usable.map(serde_json::from_value::<VmConfig>) {
        Some(Ok(config)) => {
            let apart = |problem: &Problem| !unusable.iter().any(|field| depends(problem, field));
            problems.extend(validate(&config, &HostFacts::unlimited()).into_iter().filter(apart));
        }
        // The schema allows what serde does not. Better said in serde's words than not at all.
        Some(Err(_)) if problems.is_empty() => problems.extend(refused.map(unexplained)),
        _ => {}
    }
    problems
}

/// What a walk beside a schema found.
pub(crate) struct Diagnosis {
    /// What is wrong.
    pub(crate) problems: Vec<Problem>,
    /// Fields whose value was replaced by a harmless one.
    pub(crate) unusable: Vec<String>,
    /// What the tree stands for with those.
    pub(crate) usable: Option<Value>,
}

/// Walks `tree` beside `schema`, whose references lead into `root`.
pub(crate) fn walk(tree: &Node, root: &Value, schema: &Value) -> Diagnosis {
    let mut walk = Walk { root, problems: Vec::new(), unusable: Vec::new() };
    let usable = walk.check(tree, schema, "");
    Diagnosis { problems: walk.problems, unusable: walk.unusable, usable }
}

/// A problem that is one of the value with which a field's own was replaced.
pub(crate) fn depends(problem: &Problem, replaced: &str) -> bool {
    problem.field.starts_with(replaced) || (replaced == "cpus.count" && problem.field == "cpus.topology")
}

fn unexplained(error: serde_json::Error) -> Problem {
    Problem::new("", error.to_string(), "")
}

struct Walk<'schema> {
    root: &'schema Value,
    problems: Vec<Problem>,
    /// Fields whose value was replaced.
    unusable: Vec<String>,
}

impl<'schema> Walk<'schema> {
    fn add(&mut self, at: Position, field: &str, problem: impl Into<String>, remedy: impl Into<String>) {
        self.problems.push(Problem::new(field, problem, remedy).at(at));
    }

    /// What `node` stands for, as far as it can be used; `None` where it cannot, which has been reported then.
    fn check(&mut self, node: &Node, schema: &'schema Value, path: &str) -> Option<Value> {
        let (schema, optional) = self.resolve(schema);
        if optional && node.is_null() {
            return Some(Value::Null);
        }
        if let Some(words) = words(schema) {
            return self.choice(node, &words, path);
        }
        if let Some(branches) = schema.get("oneOf").and_then(Value::as_array) {
            return self.tagged(node, branches, path);
        }
        match (type_of(schema), &node.shape) {
            ("object", Shape::Map(_)) => Some(self.object(node, schema, path)),
            ("array", Shape::List(items)) => {
                let items_schema = schema.get("items").unwrap_or(&Value::Null);
                let each = items.iter().enumerate().map(|(index, item)| {
                    let path = format!("{path}[{index}]");
                    self.check(item, items_schema, &path).unwrap_or_else(|| self.replace(items_schema, path))
                });
                Some(each.collect())
            }
            ("object", _) => self.mismatch(node, path, "fields (`name: value`)", ""),
            ("array", _) => self.mismatch(node, path, "a list", "begin each item with `- `"),
            (_, Shape::Scalar { text, value }) => self.scalar(node, schema, path, (text, value)),
            _ => self.mismatch(node, path, "a single value", ""),
        }
    }

    /// Follows references; whether null is allowed.
    fn resolve(&self, mut schema: &'schema Value) -> (&'schema Value, bool) {
        let mut optional = false;
        loop {
            let target = schema.get("$ref").and_then(Value::as_str).and_then(|target| target.strip_prefix('#'));
            let branches = schema.get("anyOf").and_then(Value::as_array);
            if let Some(target) = target.and_then(|target| self.root.pointer(target)) {
                schema = target;
            } else if let Some(branch) = branches.and_then(|all| all.iter().find(|branch| type_of(branch) != "null")) {
                optional = true;
                schema = branch;
            } else {
                let types = schema.get("type").and_then(Value::as_array);
                return (schema, optional || types.is_some_and(|types| types.iter().any(|one| one == "null")));
            }
        }
    }

    fn object(&mut self, node: &Node, schema: &'schema Value, path: &str) -> Value {
        let mut usable = Map::new();
        let Some(properties) = schema.get("properties").and_then(Value::as_object) else {
            return Value::Object(usable);
        };
        let Shape::Map(entries) = &node.shape else { return Value::Object(usable) };
        let required = |name: &str| {
            schema.get("required").and_then(Value::as_array).is_some_and(|names| names.iter().any(|one| one == name))
        };
        for entry in entries {
            let field = join(path, &entry.key);
            let Some(property) = properties.get(&entry.key) else {
                let known = || properties.keys().map(String::as_str);
                let remedy = suggestion(&entry.key, known);
                self.add(entry.at, &field, format!("«{}» is no field here", shorten(&entry.key)), remedy);
                continue;
            };
            match self.check(&entry.value, property, &field) {
                Some(value) => drop(usable.insert(entry.key.clone(), value)),
                None if required(&entry.key) => {
                    drop(usable.insert(entry.key.clone(), self.replace(property, field)));
                }
                None => self.unusable.push(field),
            }
        }
        for (name, property) in properties.iter().filter(|(name, _)| required(name)) {
            if !usable.contains_key(name) {
                let field = join(path, name);
                self.add(
                    node.at,
                    &field,
                    "it is missing",
                    meaning(property).map_or(String::new(), |it| format!("needed is: {it}")),
                );
                let value = self.replace(property, field);
                usable.insert(name.clone(), value);
            }
        }
        Value::Object(usable)
    }

    /// An object of one of several types, told by one of its fields.
    fn tagged(&mut self, node: &Node, branches: &'schema [Value], path: &str) -> Option<Value> {
        let tag = tag(branches);
        let types = || branches.iter().filter_map(|branch| type_named(branch, tag)?.as_str());
        let Shape::Map(_) = &node.shape else {
            let example = match &node.shape {
                Shape::Scalar { text, .. } if types().any(|one| one == text) => format!("write {{{tag}: {text}}}"),
                _ => format!("write {{{tag}: …}} with one of: {}", list(types())),
            };
            return self.mismatch(node, path, &format!("fields with a `{tag}`"), &example);
        };
        let field = join(path, tag);
        let Some(entry) = node.get(tag) else {
            self.add(node.at, &field, "it is missing", format!("it is one of: {}", list(types())));
            return None;
        };
        let found = match &entry.value.shape {
            Shape::Scalar { text, .. } => text.as_str(),
            _ => "",
        };
        let branch = branches.iter().zip(types()).find(|(_, name)| *name == found);
        let Some((branch, _)) = branch else {
            self.add(
                entry.value.at,
                &field,
                format!("«{}» is no {tag} here", shorten(found)),
                suggestion(found, types),
            );
            return None;
        };
        Some(self.object(node, branch, path))
    }

    /// One of several words.
    fn choice(&mut self, node: &Node, words: &[&str], path: &str) -> Option<Value> {
        let words = || words.iter().copied();
        let Shape::Scalar { text, .. } = &node.shape else {
            return self.mismatch(node, path, "a word", &format!("it is one of: {}", list(words())));
        };
        if words().any(|word| word == text) {
            return Some(text.as_str().into());
        }
        self.add(node.at, path, format!("«{}» is not possible here", shorten(text)), suggestion(text, words));
        None
    }

    fn scalar(&mut self, node: &Node, schema: &Value, path: &str, found: (&str, &Value)) -> Option<Value> {
        let (text, value) = found;
        let format = schema.get("format").and_then(Value::as_str).unwrap_or_default();
        if format == "byte-size" {
            return self.size(node, path, found);
        }
        match type_of(schema) {
            "boolean" if !value.is_boolean() => self.mismatch(node, path, "true or false", ""),
            "integer" => match bounds(format) {
                Some((least, most)) => match value.as_i64().filter(|number| (least..=most).contains(number)) {
                    Some(number) => Some(number.into()),
                    None => self.mismatch(node, path, &format!("a whole number from {least} to {most}"), ""),
                },
                None => Some(value.clone()),
            },
            "string" if value.is_null() => self.mismatch(node, path, "a text", ""),
            "string" if !value.is_string() => {
                self.mismatch(node, path, "a text", &format!("write it in quotes: \"{}\"", shorten(text)))
            }
            "string" if format == "identity" => {
                self.parsed(node, path, text.parse::<Identity>().map(|_| value.clone()))
            }
            "string" if format == "quote-service" => {
                self.parsed(node, path, text.parse::<QuoteService>().map(|_| value.clone()))
            }
            "string" if format == "mac-address" => {
                self.parsed(node, path, text.parse::<MacAddr>().map(|_| value.clone()))
            }
            "string" if format == "time-span" => {
                self.parsed(node, path, text.parse::<TimeSpan>().map(|_| value.clone()))
            }
            _ => Some(value.clone()),
        }
    }

    fn size(&mut self, node: &Node, path: &str, (text, value): (&str, &Value)) -> Option<Value> {
        if value.is_u64() {
            return Some(value.clone());
        }
        if value.is_null() {
            return self.mismatch(node, path, "a size such as 512M", "");
        }
        self.parsed(node, path, text.parse::<ByteSize>().map(|_| text.into()))
    }

    /// A value that a type's own reading accepts.
    fn parsed(&mut self, node: &Node, path: &str, value: Result<Value, UnitError>) -> Option<Value> {
        value.map_err(|error| self.add(node.at, path, error.to_string(), "")).ok()
    }

    fn mismatch(&mut self, node: &Node, path: &str, expected: &str, remedy: &str) -> Option<Value> {
        let found = match &node.shape {
            Shape::List(_) => "a list".to_owned(),
            Shape::Map(_) => "fields".to_owned(),
            Shape::Scalar { value: Value::Null, .. } => "nothing".to_owned(),
            Shape::Scalar { text, value: Value::Number(_) } => format!("the number {}", shorten(text)),
            Shape::Scalar { text, .. } => format!("«{}»", shorten(text)),
        };
        self.add(node.at, path, format!("{expected} must stand here, not {found}"), remedy);
        None
    }

    /// A harmless value for a field that has none that can be used.
    fn replace(&mut self, schema: &'schema Value, field: String) -> Value {
        self.unusable.push(field);
        self.stand_in(schema)
    }

    fn stand_in(&self, schema: &'schema Value) -> Value {
        let (schema, _) = self.resolve(schema);
        let needs_type_only = |branch: &&Value| {
            branch.get("required").and_then(Value::as_array).is_some_and(|required| required.len() == 1)
        };
        // The last such type of a device is `rng` and of an endpoint `off`: neither conflicts with another.
        let branches = schema.get("oneOf").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let tag = tag(branches);
        let name = branches.iter().rfind(needs_type_only).and_then(|branch| type_named(branch, tag));
        match (name, type_of(schema)) {
            (Some(name), _) => Value::Object(Map::from_iter([(tag.to_owned(), name.clone())])),
            (None, "object") => {
                let mut fields = Map::new();
                let required = schema.get("required").and_then(Value::as_array);
                for name in required.into_iter().flatten().filter_map(Value::as_str) {
                    if let Some(property) = schema.get("properties").and_then(|all| all.get(name)) {
                        fields.insert(name.to_owned(), self.stand_in(property));
                    }
                }
                Value::Object(fields)
            }
            (None, "array") => Value::Array(Vec::new()),
            (None, "integer") => 1.into(),
            (None, "boolean") => false.into(),
            _ => "stand-in".into(),
        }
    }
}

/// The field that tells the types of an object apart: the one whose value is given in each.
pub(crate) fn tag(branches: &[Value]) -> &str {
    let properties = branches.first().and_then(|branch| branch.get("properties")?.as_object());
    let given = properties.and_then(|all| all.iter().find(|(_, property)| property.get("const").is_some()));
    given.map_or("type", |(name, _)| name)
}

/// What a type of an object has in its `tag`.
pub(crate) fn type_named<'schema>(branch: &'schema Value, tag: &str) -> Option<&'schema Value> {
    branch.get("properties")?.get(tag)?.get("const")
}

/// The words that a value is one of, each with a description (`oneOf`) or without (`enum`).
pub(crate) fn words(schema: &Value) -> Option<Vec<&str>> {
    if let Some(words) = schema.get("enum").and_then(Value::as_array) {
        return words.iter().map(Value::as_str).collect();
    }
    let branches = schema.get("oneOf").and_then(Value::as_array)?;
    branches.iter().map(|branch| branch.get("const")?.as_str()).collect()
}

/// The one type of a value beside null.
fn type_of(schema: &Value) -> &str {
    match schema.get("type") {
        Some(Value::String(name)) => name,
        Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).find(|name| *name != "null").unwrap_or(""),
        _ => "",
    }
}

/// What an integer's format has room for.
fn bounds(format: &str) -> Option<(i64, i64)> {
    match format {
        "uint8" => Some((0, u8::MAX.into())),
        "uint16" => Some((0, u16::MAX.into())),
        "uint32" => Some((0, u32::MAX.into())),
        "int32" => Some((i32::MIN.into(), i32::MAX.into())),
        _ => None,
    }
}

/// What the schema says of a field.
fn meaning(property: &Value) -> Option<String> {
    let text = property.get("description")?.as_str()?.trim_end_matches('.');
    Some(text.to_owned())
}

fn suggestion<'a, I: Iterator<Item = &'a str>>(wrong: &str, known: impl Fn() -> I) -> String {
    match did_you_mean(wrong, known()) {
        Some(name) => format!("did you mean «{name}»? Known are: {}", list(known())),
        None => format!("known are: {}", list(known())),
    }
}

fn list<'a>(names: impl Iterator<Item = &'a str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}
