//! Tables for people: columns as wide as their widest cell, two spaces apart, numbers to the right.

/// How a column is laid out.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Left,
    Right,
}

pub struct Table {
    columns: Vec<(&'static str, Align)>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub fn new(columns: &[(&'static str, Align)]) -> Table {
        Table { columns: columns.to_vec(), rows: Vec::new() }
    }

    /// Control characters of a cell are shown as such: nobody's name moves the cursor.
    pub fn row(&mut self, cells: &[String]) {
        let clean = |cell: &String| cell.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
        self.rows.push(cells.iter().map(clean).collect());
    }

    /// The whole table, with a line of headings, without a line end after the last.
    pub fn print(&self) -> String {
        let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
        let widths: Vec<usize> = self
            .columns
            .iter()
            .enumerate()
            .map(|(column, (title, _))| {
                let widest = self.rows.iter().map(|row| cell(row, column).chars().count()).max();
                widest.unwrap_or(0).max(title.chars().count())
            })
            .collect();
        let titles: Vec<String> = self.columns.iter().map(|(title, _)| (*title).to_owned()).collect();
        let line = |row: &[String]| {
            let mut text = String::new();
            for (column, ((_, align), width)) in self.columns.iter().zip(&widths).enumerate() {
                let content = cell(row, column);
                text += &match align {
                    Align::Left => format!("{content:<width$}  "),
                    Align::Right => format!("{content:>width$}  "),
                };
            }
            text.trim_end().to_owned()
        };
        std::iter::once(&titles).chain(&self.rows).map(|row| line(row)).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&[("NAME", Align::Left), ("CPUS", Align::Right), ("STATE", Align::Left)]);
        table.row(&["web01".into(), "2".into(), "running".into()]);
        table.row(&["a\x1b[2J".into(), "16".into(), "off".into()]);
        assert_eq!(table.print(), "NAME   CPUS  STATE\nweb01     2  running\na\u{fffd}[2J    16  off");
    }
}
