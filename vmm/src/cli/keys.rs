//! Lists of `key=value` as the value of a flag: `path=a.img,readonly,id=root`.

use api::did_you_mean;

/// One part of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The key; `-` and `_` are the same in it.
    pub key: String,
    /// What stands behind the first `=`, if there is one.
    pub value: Option<String>,
}

/// Splits a list at its commas, and each part at its first `=`. A comma in a value is written twice. A first part
/// without `=` that is none of `known` is the value of the key `first`.
///
/// # Errors
/// A sentence for each part whose key is unknown or repeated. The other parts are in the list all the same.
pub fn pairs(text: &str, flag: &str, first: Option<&str>, known: &[&str]) -> (Vec<Pair>, Vec<String>) {
    let mut pairs: Vec<Pair> = Vec::new();
    let mut problems = Vec::new();
    for (index, part) in split(text).into_iter().enumerate() {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (canonical(key), Some(value.to_owned())),
            None => (canonical(&part), None),
        };
        let is_known = known.contains(&key.as_str());
        let pair = match first {
            Some(first) if index == 0 && value.is_none() && !is_known => {
                Pair { key: first.to_owned(), value: Some(part) }
            }
            _ if is_known => Pair { key, value },
            _ => {
                let hint = did_you_mean(&key, known.iter().copied());
                let hint = hint.map_or(String::new(), |name| format!("did you mean «{name}»? "));
                problems.push(format!("unknown key «{key}» of {flag}; {hint}known: {}", known.join(", ")));
                continue;
            }
        };
        if pairs.iter().any(|earlier| earlier.key == pair.key) {
            problems.push(format!("the key «{}» is repeated; give it once", pair.key));
        } else {
            pairs.push(pair);
        }
    }
    (pairs, problems)
}

fn canonical(key: &str) -> String {
    key.trim().replace('-', "_")
}

/// Splits at single commas; two commas stand for one.
fn split(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut chars = text.chars().peekable();
    while let Some(char) = chars.next() {
        if char != ',' {
            part.push(char);
        } else if chars.next_if_eq(&',').is_some() {
            part.push(',');
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Vec<(String, Option<String>)>, Vec<String>) {
        let (pairs, problems) = pairs(text, "--disk", Some("path"), &["path", "readonly", "id"]);
        (pairs.into_iter().map(|pair| (pair.key, pair.value)).collect(), problems)
    }

    fn pair(key: &str, value: Option<&str>) -> (String, Option<String>) {
        (key.into(), value.map(Into::into))
    }

    #[test]
    fn splits_at_single_commas() {
        let expected = vec![pair("path", Some("a.img")), pair("readonly", None), pair("id", Some("x"))];
        assert_eq!(read("path=a.img,readonly,id=x"), (expected.clone(), vec![]));
        assert_eq!(read("a.img,readonly,id=x"), (expected, vec![]));
        assert_eq!(read("path=a,,b=c,,,readonly").0, [pair("path", Some("a,b=c,")), pair("readonly", None)]);
        assert_eq!(read("path=").0, [pair("path", Some(""))]);
        assert_eq!(read("").0, [pair("path", Some(""))]);
        assert_eq!(read("readonly,path=x").0, [pair("readonly", None), pair("path", Some("x"))]);
    }

    #[test]
    fn reports_every_unknown_and_repeated_key() {
        let (pairs, problems) = read("path=a,read_onyl,id=x,id=y,size=3,");
        assert_eq!(pairs, [pair("path", Some("a")), pair("id", Some("x"))]);
        assert_eq!(
            problems,
            [
                "unknown key «read_onyl» of --disk; did you mean «readonly»? known: path, readonly, id",
                "the key «id» is repeated; give it once",
                "unknown key «size» of --disk; known: path, readonly, id",
                "unknown key «» of --disk; known: path, readonly, id",
            ]
        );
    }
}
