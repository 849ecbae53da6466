//! Aligned columns for a terminal.

use std::fmt::Write;

use anstyle::Style;

/// Text in a style.
#[derive(Clone, Debug, Default)]
pub(super) struct Cell {
    text: String,
    style: Style,
}

impl Cell {
    /// A cell with this text, in the terminal's own colour.
    pub(super) fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), style: Style::new() }
    }

    /// The same cell in `style`.
    pub(super) fn styled(mut self, style: Style) -> Self {
        self.style = style;
        self
    }

    fn width(&self) -> usize {
        self.text.chars().count()
    }
}

/// Renders rows of cells: the first column to the left, the others to the right, two spaces between
/// them. Rows may be of different lengths.
pub(super) fn render(rows: &[Vec<Cell>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|at| rows.iter().filter_map(|row| row.get(at)).map(Cell::width).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        // Spaces wait until something follows them, so that no line ends in any.
        let mut owed = 0;
        for (at, (cell, width)) in row.iter().zip(&widths).enumerate() {
            let padding = width - cell.width();
            let (before, after) = if at == 0 { (0, padding) } else { (padding + 2, 0) };
            owed += before;
            if !cell.text.is_empty() {
                let style = cell.style;
                // Writing to a String cannot fail.
                let _ = write!(line, "{:owed$}{style}{}{style:#}", "", cell.text);
                owed = 0;
            }
            owed += after;
        }
        text.push_str(&line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(texts: &[&str]) -> Vec<Cell> {
        texts.iter().map(|text| Cell::new(*text)).collect()
    }

    #[test]
    fn columns_line_up() {
        let rows = [cells(&["", "ours", "min…max"]), cells(&["pp512", "7", ""]), cells(&["b"])];
        assert_eq!(render(&rows), "       ours  min…max\npp512     7\nb\n");
    }

    #[test]
    fn styles_do_not_move_anything() {
        let bold = |text: &str| Cell::new(text).styled(Style::new().bold());
        let styled = render(&[vec![bold("a"), bold("bc")], cells(&["long", "x"])]);
        assert!(styled.contains("\u{1b}[1m"), "{styled:?}");
        let plain = anstream::adapter::strip_str(&styled).to_string();
        assert_eq!(plain, "a     bc\nlong   x\n");
    }
}
