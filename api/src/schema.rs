//! The JSON schema of the configuration.

use serde_json::Value;

use crate::config::VmConfig;

/// The JSON schema (draft 2020-12) of [`VmConfig`] as text, as it is committed. A test holds it equal to what
/// [`schema`] generates, so that a running monitor need not generate it.
pub const SCHEMA_JSON: &str = include_str!("../../resources/vm.schema.json");

/// The JSON schema (draft 2020-12) of [`VmConfig`], generated from the types.
pub fn schema() -> Value {
    let mut schema = schemars::SchemaGenerator::default().into_root_schema_for::<VmConfig>();
    schema.insert("title".to_owned(), "Halyard VM".into());
    let mut schema = schema.to_value();
    unfold(&mut schema);
    schema
}

/// Doc comments are folded where the source's lines end; descriptions are not.
pub(crate) fn unfold(schema: &mut Value) {
    match schema {
        Value::Object(fields) => {
            if let Some(Value::String(description)) = fields.get_mut("description") {
                *description = description.replace('\n', " ");
            }
            fields.values_mut().for_each(unfold);
        }
        Value::Array(items) => items.iter_mut().for_each(unfold),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `UPDATE_SCHEMA=1 cargo test -p api schema` writes the file anew.
    #[test]
    fn committed_schema_is_the_generated_one() {
        let generated = serde_json::to_string_pretty(&schema()).unwrap() + "\n";
        if std::env::var_os("UPDATE_SCHEMA").is_some() {
            std::fs::write(concat!(env!("CARGO_MANIFEST_DIR"), "/../resources/vm.schema.json"), generated).unwrap();
            return;
        }
        assert!(
            SCHEMA_JSON == generated,
            "resources/vm.schema.json differs from the types: run `UPDATE_SCHEMA=1 cargo test -p api schema`"
        );
    }
}
