//! A JSON text as the same tree that a YAML text becomes ([`tree`]), for bodies of requests: what a JSON reader accepts
//! and a YAML reader does not, such as control characters and halves of surrogate pairs in escapes, is read as JSON
//! means it (RFC 8259). A number without a fraction is an integer, however it is written, as in `1.0` (JSON Schema
//! 2020-12 §4.2.1).
//!
//! [`tree`]: crate::tree

use std::collections::HashSet;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use crate::problem::{Position, Problem};
use crate::tree::{Entry, MAX_DEPTH, MAX_VALUES, Node, Shape, join};
use crate::units::shorten;

/// Nobody is told where a part of a body stands: it is named by its pointer.
const NOWHERE: Position = Position { line: 1, column: 1 };
/// Beyond this a double cannot tell an integer from the next (2^53).
const EXACT: f64 = 9_007_199_254_740_992.0;

/// Reads `text`. The problems are those of fields that are repeated, of which the first is kept.
///
/// # Errors
/// What is no JSON, is nested too deep or has too many values.
pub(crate) fn read(text: &str) -> Result<(Node, Vec<Problem>), serde_json::Error> {
    let mut found = Found { problems: Vec::new(), values: 0 };
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let tree = Part { found: &mut found, path: String::new(), depth: 0 }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok((tree, found.problems))
}

struct Found {
    problems: Vec<Problem>,
    values: usize,
}

/// What is read next, and where it stands.
struct Part<'a> {
    found: &'a mut Found,
    path: String,
    depth: usize,
}

fn scalar(text: String, value: Value) -> Node {
    Node { at: NOWHERE, shape: Shape::Scalar { text, value } }
}

fn plain(value: Value) -> Node {
    scalar(value.to_string(), value)
}

impl<'de> DeserializeSeed<'de> for Part<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        if self.depth > MAX_DEPTH {
            return Err(D::Error::custom(format!("lists and objects are nested more than {MAX_DEPTH} deep")));
        }
        self.found.values += 1;
        if self.found.values > MAX_VALUES {
            return Err(D::Error::custom(format!("there are more than {MAX_VALUES} values")));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Part<'_> {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(plain(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(plain(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(plain(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        if value.fract() == 0.0 && value.abs() <= EXACT {
            // It is written without fraction or exponent, and so it is read.
            if let Ok(whole) = format!("{value:.0}").parse::<i64>() {
                return Ok(plain(whole.into()));
            }
        }
        Ok(plain(value.into()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(scalar(value.to_owned(), value.into()))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(plain(Value::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Node, A::Error> {
        let Self { found, path, depth } = self;
        let mut nodes = Vec::new();
        while let Some(node) = items.next_element_seed(Part {
            found: &mut *found,
            path: format!("{path}[{}]", nodes.len()),
            depth: depth + 1,
        })? {
            nodes.push(node);
        }
        Ok(Node { at: NOWHERE, shape: Shape::List(nodes) })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Node, A::Error> {
        let Self { found, path, depth } = self;
        let mut entries: Vec<Entry> = Vec::new();
        let mut seen = HashSet::new();
        while let Some(key) = fields.next_key::<String>()? {
            let field = join(&path, &key);
            let value = fields.next_value_seed(Part { found: &mut *found, path: field.clone(), depth: depth + 1 })?;
            if seen.insert(key.clone()) {
                entries.push(Entry { key, at: NOWHERE, value });
            } else {
                let problem = format!("the field «{}» is repeated", shorten(&key));
                found.problems.push(Problem::new(field, problem, "leave one of them out"));
            }
        }
        Ok(Node { at: NOWHERE, shape: Shape::Map(entries) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Value {
        read(text).unwrap().0.to_json()
    }

    #[test]
    fn it_is_what_json_means() {
        for text in ["null", "[]", r#"{"a": [true, -1, 18446744073709551615, 1.5, "x"], "b": {}}"#, "1e300", "\"\""] {
            assert_eq!(value(text), serde_json::from_str::<Value>(text).unwrap(), "{text}");
        }
        assert_eq!(value("\"\u{99}\u{7f}\u{feff} \\ud83d\\ude00 \\/\""), Value::from("\u{99}\u{7f}\u{feff} 😀 /"));
        assert_eq!(value("[1.0, -2e3, -0.0]"), serde_json::json!([1, -2000, 0]));
    }

    #[test]
    fn limits_and_repeated_fields_are_told() {
        let nested = |depth| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(read(&nested(MAX_DEPTH)).is_ok());
        assert!(read(&nested(MAX_DEPTH + 2)).is_err());
        let many = |count| format!("[{}0]", "0,".repeat(count - 1));
        assert!(read(&many(MAX_VALUES - 1)).is_ok());
        assert!(read(&many(MAX_VALUES)).is_err());
        assert!(read("1 2").is_err());
        let (tree, problems) = read(r#"{"a": [{"b": 1, "b": 2}]}"#).unwrap();
        assert_eq!(problems.len(), 1);
        assert_eq!(problems[0].field, "a[0].b");
        assert_eq!(tree.to_json(), serde_json::json!({"a": [{"b": 1}]}));
    }
}
