//! The table at the end.

use anyhow::Result;

use super::client::Moved;
use super::load::{Times, Volume};

/// All that was measured one way.
#[derive(Debug)]
pub struct Row {
    /// "direct", or the engine.
    pub way: &'static str,
    /// What clients moved in all.
    pub moved: Moved,
    /// Requests on connections that stay open.
    pub requests: Times,
    /// Requests on a connection each.
    pub fresh: Times,
    /// Bulk to the client.
    pub down: Volume,
    /// Bulk to the server.
    pub up: Volume,
    /// Events of watches.
    pub events: Times,
}

impl Row {
    /// Nothing measured yet.
    ///
    /// # Errors
    /// Those of [`Times::start`].
    pub fn new(way: &'static str) -> Result<Self> {
        Ok(Self {
            way,
            moved: Moved::default(),
            requests: Times::start()?,
            fresh: Times::start()?,
            down: Volume::default(),
            up: Volume::default(),
            events: Times::start()?,
        })
    }
}

/// One number of a row.
struct Column {
    head: &'static str,
    unit: &'static str,
    decimals: usize,
    /// Whether the ratio to direct says anything.
    is_compared: bool,
    value: fn(&Row) -> f64,
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
const COLUMNS: [Column; 10] = [
    column("conns", "", 0, |row| row.moved.connections as f64),
    column("moved", "GB", 2, |row| (row.moved.sent + row.moved.received) as f64 / 1e9),
    compared("reqs", "/s", 0, |row| row.requests.per_second()),
    compared("p50", "us", 0, |row| row.requests.quantile_us(0.5)),
    compared("p99", "us", 0, |row| row.requests.quantile_us(0.99)),
    compared("new", "/s", 0, |row| row.fresh.per_second()),
    compared("p50", "us", 0, |row| row.fresh.quantile_us(0.5)),
    compared("down", "Gbit/s", 2, |row| row.down.gbit_per_second()),
    compared("up", "Gbit/s", 2, |row| row.up.gbit_per_second()),
    compared("watch", "p50 us", 0, |row| row.events.quantile_us(0.5)),
];

const fn column(
    head: &'static str,
    unit: &'static str,
    decimals: usize,
    value: fn(&Row) -> f64,
) -> Column {
    Column { head, unit, decimals, is_compared: false, value }
}

const fn compared(
    head: &'static str,
    unit: &'static str,
    decimals: usize,
    value: fn(&Row) -> f64,
) -> Column {
    Column { is_compared: true, ..column(head, unit, decimals, value) }
}

/// A line per way, the first of which is what the others are compared with in a line each.
pub fn render(rows: &[Row]) -> String {
    let mut lines = vec![
        line("engine", |column| column.head.to_owned()),
        line("", |column| column.unit.to_owned()),
    ];
    for (index, row) in rows.iter().enumerate() {
        lines.push(line(row.way, |column| format!("{:.*}", column.decimals, (column.value)(row))));
        if index > 0 {
            lines.push(line("  ratio", |column| {
                let ratio = (column.value)(row) / (column.value)(&rows[0]);
                if column.is_compared { format!("{ratio:.2}") } else { String::new() }
            }));
        }
    }
    aligned(&lines)
}

fn line(title: &str, cell: impl Fn(&Column) -> String) -> Vec<String> {
    std::iter::once(title.to_owned()).chain(COLUMNS.iter().map(cell)).collect()
}

/// Titles to the left, all else to the right, as narrow as it gets: terminals have 80 columns.
fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].len()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..=COLUMNS.len()).map(width).collect();
    let drawn = lines.iter().map(|line| {
        let mut cells = line.iter().zip(&widths);
        let title = cells.next().map(|(title, width)| format!("{title:<width$}"));
        let others = cells.map(|(cell, width)| format!("  {cell:>width$}"));
        let drawn: String = title.into_iter().chain(others).collect();
        drawn.trim_end().to_owned()
    });
    drawn.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_but_the_first_is_followed_by_its_ratio() {
        let ways = ["direct", "splice", "copy"];
        let rows: Vec<Row> = ways.iter().map(|way| Row::new(way).expect("a row")).collect();
        let table = render(&rows);
        let titles: Vec<&str> =
            table.lines().map(|line| line.split("   ").next().unwrap_or_default().trim()).collect();
        assert_eq!(titles, ["engine", "", "direct", "splice", "ratio", "copy", "ratio"], "{table}");
    }
}
