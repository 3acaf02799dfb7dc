//! Writing YAML (1.2, core schema) that reads back as the same value, here and where YAML 1.1 is read.

use std::fmt::{self, Write};

use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::tree;

/// A value as YAML, its fields in the order of its type. It ends with a line break.
///
/// # Errors
/// The value cannot be written as JSON either.
pub fn to_yaml(value: &impl Serialize) -> serde_json::Result<String> {
    let value: Ordered = serde_json::from_str(&serde_json::to_string(value)?)?;
    let mut text = String::new();
    match &value {
        Ordered::List(items) if !items.is_empty() => list(items, 0, &mut text),
        Ordered::Map(fields) if !fields.is_empty() => map(fields, 0, &mut text),
        scalar => inline(scalar, 2, &mut text),
    }
    Ok(text)
}

/// Reads a value in YAML.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub fn from_yaml(text: &str) -> Result<Value, String> {
    match tree::read(text) {
        (Some(tree), problems) if problems.is_empty() => Ok(tree.to_json()),
        (None, problems) if problems.is_empty() => Ok(Value::Null),
        (_, problems) => Err(problems.first().map(ToString::to_string).unwrap_or_default()),
    }
}

/// A value of JSON that keeps the order of its fields.
enum Ordered {
    Null,
    Bool(bool),
    Number(Number),
    Text(String),
    List(Vec<Ordered>),
    Map(Vec<(String, Ordered)>),
}

impl<'de> Deserialize<'de> for Ordered {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Ordered;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Ordered, E> {
                Ok(Ordered::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Ordered, E> {
                Ok(Ordered::Bool(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Ordered, E> {
                Ok(Ordered::Number(value.into()))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Ordered, E> {
                Ok(Ordered::Number(value.into()))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Ordered, E> {
                // JSON has no other numbers.
                Ok(Number::from_f64(value).map_or(Ordered::Null, Ordered::Number))
            }

            fn visit_str<E>(self, value: &str) -> Result<Ordered, E> {
                Ok(Ordered::Text(value.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Ordered, A::Error> {
                let mut list = Vec::new();
                while let Some(item) = items.next_element()? {
                    list.push(item);
                }
                Ok(Ordered::List(list))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Ordered, A::Error> {
                let mut map = Vec::new();
                while let Some(field) = fields.next_entry()? {
                    map.push(field);
                }
                Ok(Ordered::Map(map))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

/// The items of a list, each on lines of its own, `indent` columns from the left.
fn list(items: &[Ordered], indent: usize, into: &mut String) {
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            spaces(indent, into);
        }
        into.push_str("- ");
        match item {
            Ordered::List(items) if !items.is_empty() => list(items, indent + 2, into),
            Ordered::Map(fields) if !fields.is_empty() => map(fields, indent + 2, into),
            scalar => inline(scalar, indent + 2, into),
        }
    }
}

/// The fields of a mapping, `indent` columns from the left; the first stands where the text is now.
fn map(fields: &[(String, Ordered)], indent: usize, into: &mut String) {
    for (index, (key, value)) in fields.iter().enumerate() {
        if index > 0 {
            spaces(indent, into);
        }
        into.push_str(&if is_plain(key) { key.clone() } else { quoted(key) });
        into.push(':');
        match value {
            Ordered::List(items) if !items.is_empty() => {
                into.push('\n');
                spaces(indent + 2, into);
                list(items, indent + 2, into);
            }
            Ordered::Map(fields) if !fields.is_empty() => {
                into.push('\n');
                spaces(indent + 2, into);
                map(fields, indent + 2, into);
            }
            scalar => {
                into.push(' ');
                inline(scalar, indent + 2, into);
            }
        }
    }
}

fn spaces(count: usize, into: &mut String) {
    into.extend(std::iter::repeat_n(' ', count));
}

/// A value that needs no lines of its own, and the end of its line. A text of several lines is a block, `indent` columns
/// from the left.
fn inline(value: &Ordered, indent: usize, into: &mut String) {
    match value {
        Ordered::Null => into.push_str("null"),
        Ordered::Bool(value) => into.push_str(if *value { "true" } else { "false" }),
        Ordered::Number(number) => into.push_str(&number.to_string()),
        Ordered::List(_) => into.push_str("[]"),
        Ordered::Map(_) => into.push_str("{}"),
        Ordered::Text(text) if is_plain(text) => into.push_str(text),
        Ordered::Text(text) if is_block(text) => {
            let whole = text.strip_suffix('\n');
            into.push_str(if whole.is_some() { "|" } else { "|-" });
            for line in whole.unwrap_or(text).split('\n') {
                into.push('\n');
                if !line.is_empty() {
                    spaces(indent, into);
                    into.push_str(line);
                }
            }
        }
        Ordered::Text(text) => into.push_str(&quoted(text)),
    }
    into.push('\n');
}

/// Words that YAML 1.1 takes for booleans, and 1.2 does not.
const OLD_BOOLEANS: [&str; 6] = ["y", "n", "yes", "no", "on", "off"];

/// Whether a text stands for itself without quotes. Many that need none get them: only what is certain has none.
fn is_plain(text: &str) -> bool {
    let begins = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '_');
    let inside = text.chars().all(|c| c.is_ascii_alphanumeric() || " -._/+=,@%".contains(c));
    let old = OLD_BOOLEANS.iter().any(|word| text.eq_ignore_ascii_case(word));
    begins && inside && !old && !text.ends_with(' ') && tree::resolve(text).is_string()
}

/// Whether a text is several lines that a block can hold as they are.
fn is_block(text: &str) -> bool {
    let whole = text.strip_suffix('\n').unwrap_or(text);
    let printable = |c: char| c == '\n' || !must_be_escaped(c);
    whole.contains('\n') && !whole.starts_with([' ', '\n']) && !whole.ends_with('\n') && text.chars().all(printable)
}

fn must_be_escaped(c: char) -> bool {
    c.is_control() || matches!(c, '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

fn quoted(text: &str) -> String {
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if must_be_escaped(c) => {
                // Writing to a string cannot fail.
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[track_caller]
    fn reads_back(value: &Value) {
        let text = to_yaml(value).unwrap();
        assert_eq!(from_yaml(&text).as_ref(), Ok(value), "{text}");
    }

    /// Texts that YAML would take for something else, in part those that only YAML 1.1 would.
    const ODD: &[&str] = &[
        "",
        " ",
        "12",
        "-3",
        "0x10",
        "0o7",
        "1e3",
        ".5",
        "1_000",
        "true",
        "True",
        "null",
        "~",
        "yes",
        "No",
        "on",
        "OFF",
        "y",
        ".inf",
        ".nan",
        "2001-01-01",
        "12:30:45",
        "a: b",
        "a #b",
        "# a",
        "- a",
        "-",
        "?",
        "!x",
        "&x",
        "*x",
        "|",
        ">",
        "%a",
        "@a",
        "`a",
        "'a'",
        "\"a\"",
        "[a",
        "{a",
        "a]",
        ",a",
        "a\\b",
        "a\tb",
        "a\rb",
        "\u{85}",
        "\u{2028}",
        "\u{feff}x",
        "ä€😀",
        "\u{7f}",
        "\u{0}",
        "---",
        "...",
        "= x",
        "<<",
        " a",
        "a ",
    ];

    #[test]
    fn texts_stay_texts() {
        for &text in ODD {
            reads_back(&json!(text));
            reads_back(&json!({ "key": text, text: "key" }));
            reads_back(&json!([text, [text], { "a": [text] }]));
        }
        assert_eq!(
            to_yaml(&json!(["yes", "512M", "a b", "12", "1:2"])).unwrap(),
            "- \"yes\"\n- \"512M\"\n- a b\n- \"12\"\n- \"1:2\"\n"
        );
    }

    #[test]
    fn several_lines_are_a_block() {
        for text in [
            "a\nb",
            "a\nb\n",
            "a\n\nb\n",
            "a\n  b\n",
            "a: 1\n# b\n",
            "a\n\n",
            "\na",
            " a\nb",
            "\n",
            "\n\n",
            "a\r\nb",
            "a \nb",
            "a\n \nb",
        ] {
            reads_back(&json!(text));
            reads_back(&json!({ "key": text, "next": [text, text] }));
        }
        assert_eq!(
            to_yaml(&json!({"a": "b\nc\n", "d": ["e\nf"]})).unwrap(),
            "a: |\n  b\n  c\nd:\n  - |-\n    e\n    f\n"
        );
    }

    #[test]
    fn fields_keep_their_order_and_nothing_is_lost() {
        let config: crate::VmConfig =
            serde_json::from_str(r#"{"kernel": {"path": "k"}, "devices": [{"type": "disk", "path": "d"}]}"#).unwrap();
        let text = to_yaml(&config).unwrap();
        assert!(text.starts_with("kernel:\n  path: k\n"), "{text}");
        assert!(text.contains("devices:\n  - type: disk\n    path: d\n"), "{text}");
        assert_eq!(crate::parse(&text), Ok(config));
        for value in [json!(null), json!([]), json!({}), json!({"a": {}, "b": []}), json!([[[]], [[1], 2]]), json!(1.5)]
        {
            reads_back(&value);
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            "[ \n\ta-c0-9:#'\"|>-]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[ \na-c0-9:#-]{0,6}", inner, 0..4)
                    .prop_map(|fields| Value::Object(fields.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_is_written_reads_back(value in any_value()) {
            let text = to_yaml(&value).unwrap();
            prop_assert_eq!(from_yaml(&text), Ok(value), "{}", text);
        }
    }
}
