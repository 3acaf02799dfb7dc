//! A YAML text as a tree that knows where in the text each part stands.
//!
//! YAML 1.2 with its core schema, which JSON is a part of, less what a configuration has no use for: anchors, aliases
//! and merge keys (which let a short text stand for an endless one), tags, and several documents in a file.

use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, ScanError, Span, StrInput};
use serde_json::{Map, Number, Value};

use crate::problem::{Position, Problem};
use crate::units::shorten;

/// How deep lists and mappings may nest. A configuration needs five levels.
pub(crate) const MAX_DEPTH: usize = 32;
/// How many values a configuration may have. One with 254 devices has some 2000.
pub(crate) const MAX_VALUES: usize = 10_000;

/// A part of the text.
pub(crate) struct Node {
    /// Where it begins.
    pub(crate) at: Position,
    pub(crate) shape: Shape,
}

/// What a part is.
pub(crate) enum Shape {
    /// A single value, and the text that stands for it.
    Scalar {
        text: String,
        value: Value,
    },
    List(Vec<Node>),
    Map(Vec<Entry>),
}

/// A field of a mapping.
pub(crate) struct Entry {
    pub(crate) key: String,
    /// Where the key begins.
    pub(crate) at: Position,
    pub(crate) value: Node,
}

impl Node {
    /// The value of a field.
    pub(crate) fn get(&self, key: &str) -> Option<&Entry> {
        match &self.shape {
            Shape::Map(entries) => entries.iter().find(|entry| entry.key == key),
            _ => None,
        }
    }

    pub(crate) fn is_null(&self) -> bool {
        matches!(&self.shape, Shape::Scalar { value: Value::Null, .. })
    }

    /// The same without positions.
    pub(crate) fn to_json(&self) -> Value {
        match &self.shape {
            Shape::Scalar { value, .. } => value.clone(),
            Shape::List(items) => items.iter().map(Node::to_json).collect(),
            Shape::Map(entries) => {
                let fields = entries.iter().map(|entry| (entry.key.clone(), entry.value.to_json()));
                Value::Object(fields.collect::<Map<_, _>>())
            }
        }
    }

    /// Whether a list stands anywhere but as devices. serde takes one for any struct, its fields in their order, and only
    /// the schema says whether it may be.
    pub(crate) fn has_odd_list(&self) -> bool {
        match &self.shape {
            Shape::Scalar { .. } => false,
            Shape::List(_) => true,
            Shape::Map(entries) => entries.iter().any(|entry| match &entry.value.shape {
                Shape::List(items) if entry.key == "devices" => items.iter().any(Node::has_odd_list),
                _ => entry.value.has_odd_list(),
            }),
        }
    }

    /// Where the field with this path stands, as in `devices[1].path`, or else the nearest field around it.
    pub(crate) fn locate(&self, field: &str) -> Position {
        let mut node = self;
        let mut at = self.at;
        for step in field.split(['.', '[']).filter(|step| !step.is_empty()) {
            let next = match (&node.shape, step.strip_suffix(']')) {
                (Shape::List(items), Some(index)) => {
                    let item = index.parse::<usize>().ok().and_then(|index| items.get(index));
                    item.map(|item| (item.at, item))
                }
                (Shape::Map(_), None) => node.get(step).map(|entry| (entry.at, &entry.value)),
                _ => None,
            };
            let Some((position, child)) = next else { break };
            at = position;
            node = child;
        }
        at
    }
}

/// Reads `text`. The tree is missing where the text's syntax is broken; the problems are those of the syntax and
/// those parts that a configuration may not have, each field's first value being kept where it is repeated.
pub(crate) fn read(text: &str) -> (Option<Node>, Vec<Problem>) {
    let mut builder = Builder { events: Parser::new_from_str(text), problems: Vec::new(), values: 0 };
    match builder.document() {
        Ok(tree) => (tree, builder.problems),
        Err(problem) => {
            builder.problems.push(problem);
            (None, builder.problems)
        }
    }
}

struct Builder<'text> {
    events: Parser<'text, StrInput<'text>>,
    problems: Vec<Problem>,
    values: usize,
}

impl<'text> Builder<'text> {
    fn next(&mut self) -> Result<(Event<'text>, Position), Problem> {
        match self.events.next() {
            Some(Ok((event, span))) => Ok((event, position(&span))),
            Some(Err(error)) => Err(broken(&error)),
            None => Ok((Event::StreamEnd, Position { line: 1, column: 1 })),
        }
    }

    fn document(&mut self) -> Result<Option<Node>, Problem> {
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(None),
                (Event::StreamStart | Event::DocumentStart(..), _) => {}
                (event, at) => {
                    let root = self.node(event, at, "", 0)?;
                    self.end()?;
                    return Ok(Some(root));
                }
            }
        }
    }

    /// Nothing may follow the first document.
    fn end(&mut self) -> Result<(), Problem> {
        loop {
            match self.next()? {
                (Event::StreamEnd, _) => return Ok(()),
                (Event::DocumentEnd, _) => {}
                (_, at) => {
                    let problem = Problem::new("", "a second document begins here", "write one document in a file");
                    return Err(problem.at(at));
                }
            }
        }
    }

    fn node(&mut self, event: Event<'text>, at: Position, path: &str, depth: usize) -> Result<Node, Problem> {
        if depth > MAX_DEPTH {
            let problem = format!("lists and mappings are nested more than {MAX_DEPTH} deep");
            return Err(Problem::new(path, problem, "a configuration needs five levels").at(at));
        }
        self.values += 1;
        if self.values > MAX_VALUES {
            let problem =
                Problem::new("", format!("there are more than {MAX_VALUES} values"), "is it a configuration?");
            return Err(problem.at(at));
        }
        let shape = match event {
            Event::Scalar(text, style, anchor, tag) => {
                self.refuse_properties(anchor, tag.is_some(), path, at);
                let value = if style == ScalarStyle::Plain { resolve(&text) } else { Value::from(text.as_ref()) };
                Shape::Scalar { text: text.into_owned(), value }
            }
            Event::SequenceStart(_, anchor, tag) => {
                self.refuse_properties(anchor, tag.is_some(), path, at);
                Shape::List(self.list(path, depth)?)
            }
            Event::MappingStart(_, anchor, tag) => {
                self.refuse_properties(anchor, tag.is_some(), path, at);
                Shape::Map(self.map(path, depth)?)
            }
            Event::Alias(_) => {
                let problem = Problem::new(path, "an alias (`*name`) stands here", "write the value itself");
                self.problems.push(problem.at(at));
                Shape::Scalar { text: String::new(), value: Value::Null }
            }
            // The parser gives no other event where a value stands.
            _ => return Err(Problem::new(path, "a value is missing", "").at(at)),
        };
        Ok(Node { at, shape })
    }

    fn list(&mut self, path: &str, depth: usize) -> Result<Vec<Node>, Problem> {
        let mut items = Vec::new();
        loop {
            match self.next()? {
                (Event::SequenceEnd, _) => return Ok(items),
                (event, at) => items.push(self.node(event, at, &format!("{path}[{}]", items.len()), depth + 1)?),
            }
        }
    }

    fn map(&mut self, path: &str, depth: usize) -> Result<Vec<Entry>, Problem> {
        let mut entries = Vec::new();
        let mut seen: HashMap<String, Position> = HashMap::new();
        loop {
            let (event, at) = self.next()?;
            let key = match event {
                Event::MappingEnd => return Ok(entries),
                Event::Scalar(text, _, anchor, tag) => {
                    self.refuse_properties(anchor, tag.is_some(), path, at);
                    text.into_owned()
                }
                _ => {
                    let problem = Problem::new(path, "a field's name must be a plain word", "write `name: value`");
                    return Err(problem.at(at));
                }
            };
            let (event, value_at) = self.next()?;
            let field = join(path, &key);
            let value = self.node(event, value_at, &field, depth + 1)?;
            if let Some(first) = seen.get(&key) {
                let problem =
                    format!("the field «{}» is repeated: it stands in line {} already", shorten(&key), first.line);
                self.problems.push(Problem::new(field, problem, "leave one of them out").at(at));
            } else {
                seen.insert(key.clone(), at);
                entries.push(Entry { key, at, value });
            }
        }
    }

    fn refuse_properties(&mut self, anchor: usize, tagged: bool, path: &str, at: Position) {
        if anchor != 0 {
            let problem = Problem::new(path, "an anchor (`&name`) stands here", "leave it out and repeat the value");
            self.problems.push(problem.at(at));
        }
        if tagged {
            let problem = Problem::new(path, "a tag (`!name`) stands here", "leave it out; write texts in quotes");
            self.problems.push(problem.at(at));
        }
    }
}

/// The path of a field of what stands at `path`.
pub(crate) fn join(path: &str, key: &str) -> String {
    let key = shorten(key);
    if path.is_empty() { key.into_owned() } else { format!("{path}.{key}") }
}

fn position(span: &Span) -> Position {
    marker(span.start.line(), span.start.col())
}

/// The parser counts lines from 1 and columns from 0.
fn marker(line: usize, column: usize) -> Position {
    Position { line: line.max(1), column: column + 1 }
}

fn broken(error: &ScanError) -> Problem {
    let at = error.marker();
    Problem::new("", format!("this is not YAML: {}", error.info()), "").at(marker(at.line(), at.col()))
}

/// What a text without quotes stands for (YAML 1.2 §10.3.2, the core schema). `yes`, `no`, `on` and `off` are texts.
pub(crate) fn resolve(text: &str) -> Value {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Value::Null,
        "true" | "True" | "TRUE" => return Value::Bool(true),
        "false" | "False" | "FALSE" => return Value::Bool(false),
        _ => {}
    }
    let based = [("0x", 16), ("0o", 8)].into_iter().find_map(|(prefix, base)| {
        let digits = text.strip_prefix(prefix)?;
        let unsigned = digits.starts_with(|c: char| c.is_ascii_hexdigit());
        u64::from_str_radix(digits, base).ok().filter(|_| unsigned)
    });
    if let Some(number) = based {
        return number.into();
    }
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    let numeric = digits.starts_with(|c: char| c.is_ascii_digit() || c == '.')
        && digits.chars().all(|c| c.is_ascii_digit() || matches!(c, '.' | 'e' | 'E' | '+' | '-'));
    if !numeric {
        return text.into();
    }
    if let Ok(number) = text.parse::<u64>() {
        return number.into();
    }
    if let Ok(number) = text.parse::<i64>() {
        return number.into();
    }
    text.parse().ok().and_then(Number::from_f64).map_or_else(|| text.into(), Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn json_of(text: &str) -> Value {
        let (tree, problems) = read(text);
        assert_eq!(problems, [], "{text}");
        tree.expect("a tree").to_json()
    }

    fn problems_of(text: &str) -> Vec<String> {
        let (_, problems) = read(text);
        problems.iter().map(|problem| format!("{} {problem}", problem.position.map_or(0, |at| at.line))).collect()
    }

    #[test]
    fn plain_scalars_follow_the_core_schema() {
        for (text, expected) in [
            ("~", Value::Null),
            ("true", json!(true)),
            ("no", json!("no")),
            ("off", json!("off")),
            ("NO", json!("NO")),
            ("12", json!(12)),
            ("012", json!(12)),
            ("-3", json!(-3)),
            ("0x10", json!(16)),
            ("0o17", json!(15)),
            ("0x+1", json!("0x+1")),
            ("1e3", json!(1000.0)),
            (".5", json!(0.5)),
            (".", json!(".")),
            ("1-2", json!("1-2")),
            ("18446744073709551615", json!(u64::MAX)),
            ("1.2.3", json!("1.2.3")),
            ("52:54:00:12:34:56", json!("52:54:00:12:34:56")),
            ("10:30", json!("10:30")),
            ("1_000", json!("1_000")),
            ("512M", json!("512M")),
            ("2001-01-01", json!("2001-01-01")),
            ("'12'", json!("12")),
            ("\"true\"", json!("true")),
        ] {
            assert_eq!(json_of(text), expected, "{text}");
        }
    }

    #[test]
    fn json_is_yaml() {
        let text = "\u{feff}{\n\t\"a\": [1, -2, 3.5, true, false, null, {}, []],\r\n\t\"b\":\"\\u00e9\\ud83d\\ude00\\/\\n\",\"c\" : {\"d\":\"x: y # z\"}\n}\n";
        let expected: Value = serde_json::from_str(text.trim_start_matches('\u{feff}')).unwrap();
        assert_eq!(json_of(text), expected);
    }

    #[test]
    fn refuses_what_a_configuration_has_no_use_for() {
        let cases = [
            ("a: 1\nb: 2\na: 3", "3 a: the field «a» is repeated: it stands in line 1 already; leave one of them out"),
            ("a: &x 1\n", "1 a: an anchor (`&name`) stands here; leave it out and repeat the value"),
            ("a: !!str 1\n", "1 a: a tag (`!name`) stands here; leave it out; write texts in quotes"),
            ("a: 1\n---\nb: 2\n", "2 a second document begins here; write one document in a file"),
            ("? [1, 2]\n: 3\n", "1 a field's name must be a plain word; write `name: value`"),
        ];
        for (text, expected) in cases {
            assert_eq!(problems_of(text), [expected], "{text}");
        }
        let aliases = problems_of("a: &x 1\nb: *x\n");
        assert!(aliases[1].starts_with("2 b: an alias"), "{aliases:?}");
    }

    #[test]
    fn says_where_the_syntax_breaks() {
        let problems = problems_of("a: 1\nb: [1, 2\nc: 3\n");
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("this is not YAML: "), "{problems:?}");
        assert!(problems_of(&("[".repeat(100) + &"]".repeat(100))).concat().contains("nested more than 32 deep"));
    }

    #[test]
    fn locates_fields() {
        let (tree, _) = read("a:\n  - b: 1\n  - b: 2\n    c: 3\n");
        let tree = tree.unwrap();
        let at = |field: &str| {
            let at = tree.locate(field);
            (at.line, at.column)
        };
        assert_eq!(at("a[1].c"), (4, 5));
        assert_eq!(at("a[0].b"), (2, 5));
        assert_eq!(at("a[1].missing.deep"), (3, 5));
        assert_eq!(at("a[7]"), (1, 1));
        assert_eq!(at(""), (1, 1));
    }
}
