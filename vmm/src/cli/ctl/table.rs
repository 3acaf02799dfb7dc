//! Tables for people.

use std::fmt::Write;

/// Rows of texts below a line of titles.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these titles. Without any, it has none.
    pub fn new(titles: &[&str]) -> Self {
        let titles: Vec<String> = titles.iter().map(|title| (*title).to_owned()).collect();
        Self { rows: if titles.is_empty() { Vec::new() } else { vec![titles] } }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(cells.into_iter().map(|cell| clean(&cell)).collect());
    }

    /// The table as text: columns as wide as their widest cell, two blanks between them.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a string cannot fail.
                let _ = write!(line, "{cell:<width$}  ");
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

/// A text that a terminal shows and does not obey.
pub fn clean(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let mut table = Table::new(&["ID", "TYPE", "WHERE"]);
        table.row(["disk0".into(), "disk".into(), "/ä".into()]);
        table.row(["r".into(), "rng".into(), String::new()]);
        assert_eq!(table.text(), "ID     TYPE  WHERE\ndisk0  disk  /ä\nr      rng\n");
    }

    #[test]
    fn a_terminal_does_not_obey_what_is_shown() {
        assert_eq!(clean("a\u{1b}[2Jb\n"), "a\\u{1b}[2Jb\\n");
    }
}
