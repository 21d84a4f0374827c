//! Rows in columns, for people.

use std::io::{self, Write};

/// Writes rows so that their columns stand below each other. The first row is the heading.
///
/// # Errors
/// When they cannot be written.
pub(super) fn write<const N: usize>(out: &mut dyn Write, rows: &[[String; N]]) -> io::Result<()> {
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = width(column).unwrap_or(0);
            line.push_str(&format!("{cell:width$}  "));
        }
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_below_each_other() {
        let row = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
        let mut out = Vec::new();
        write(&mut out, &[row("ID", "TIER"), row("дора", "free"), row("x", "")]).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "ID    TIER\nдора  free\nx\n");
    }
}
