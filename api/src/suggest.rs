//! "Did you mean …?"

/// The name among `known` that `wrong` was most likely meant to be, if any is close.
pub fn did_you_mean<'a>(wrong: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Longer than any name, and a bound on the quadratic distance below.
    if wrong.is_empty() || wrong.len() > 64 {
        return None;
    }
    let wrong = wrong.to_ascii_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|name| (distance(&wrong, &name.replace('-', "_")), name))
        .filter(|(distance, name)| *distance <= 1 + name.len() / 4 && *distance < name.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// How many characters must be inserted, removed or replaced to make `b` of `a` (Levenshtein).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (above, a_char) in a.chars().enumerate() {
        let mut diagonal = above;
        let mut left = above + 1;
        for (cell, b_char) in row.iter_mut().skip(1).zip(&b) {
            let replaced = diagonal + usize::from(a_char != *b_char);
            diagonal = *cell;
            *cell = replaced.min(left + 1).min(*cell + 1);
            left = *cell;
        }
        if let Some(first) = row.first_mut() {
            *first = above + 1;
        }
    }
    row.last().copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, expected) in
            [("", "", 0), ("a", "", 1), ("", "abc", 3), ("kitten", "sitting", 3), ("path", "paht", 2)]
        {
            assert_eq!(distance(a, b), expected, "{a} {b}");
        }
    }

    #[test]
    fn suggests_only_what_is_close() {
        let known = ["kernel", "initramfs", "cmdline", "readonly"];
        assert_eq!(did_you_mean("kernal", known), Some("kernel"));
        assert_eq!(did_you_mean("read-only", known), Some("readonly"));
        assert_eq!(did_you_mean("Cmdline", known), Some("cmdline"));
        assert_eq!(did_you_mean("memory", known), None);
        assert_eq!(did_you_mean(&"x".repeat(100), known), None);
    }
}
