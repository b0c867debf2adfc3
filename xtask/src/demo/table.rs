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
    group: &'static str,
    name: &'static str,
    decimals: usize,
    /// Whether the comparison with direct says anything.
    is_compared: bool,
    value: fn(&Row) -> f64,
}

const WIDTH: usize = 9;

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
const COLUMNS: [Column; 11] = [
    column("connec-", "tions", 0, |row| row.moved.connections as f64),
    column("moved", "MB", 0, |row| (row.moved.sent + row.moved.received) as f64 / 1e6),
    compared("requests", "/s", 0, |row| row.requests.per_second()),
    compared("p50", "us", 0, |row| row.requests.quantile_us(0.5)),
    compared("p99", "us", 0, |row| row.requests.quantile_us(0.99)),
    compared("new conn.", "/s", 0, |row| row.fresh.per_second()),
    compared("p50", "us", 0, |row| row.fresh.quantile_us(0.5)),
    compared("p99", "us", 0, |row| row.fresh.quantile_us(0.99)),
    compared("down", "Gbit/s", 2, |row| row.down.gbit_per_second()),
    compared("up", "Gbit/s", 2, |row| row.up.gbit_per_second()),
    compared("watch p50", "us", 0, |row| row.events.quantile_us(0.5)),
];

const fn column(
    group: &'static str,
    name: &'static str,
    decimals: usize,
    value: fn(&Row) -> f64,
) -> Column {
    Column { group, name, decimals, is_compared: false, value }
}

const fn compared(
    group: &'static str,
    name: &'static str,
    decimals: usize,
    value: fn(&Row) -> f64,
) -> Column {
    Column { is_compared: true, ..column(group, name, decimals, value) }
}

/// A line per way, the first of which is what the others are compared with.
pub fn render(rows: &[Row]) -> String {
    let mut lines = vec![
        line("engine", |column| column.group.to_owned()),
        line("", |column| column.name.to_owned()),
    ];
    for row in rows {
        lines.push(line(row.way, |column| format!("{:.*}", column.decimals, (column.value)(row))));
    }
    if let Some((direct, others)) = rows.split_first() {
        for row in others {
            lines.push(line(&format!("{} : {}", row.way, direct.way), |column| {
                let ratio = (column.value)(row) / (column.value)(direct);
                if column.is_compared { format!("{ratio:.2}") } else { String::new() }
            }));
        }
    }
    lines.join("\n")
}

fn line(title: &str, cell: impl Fn(&Column) -> String) -> String {
    let cells: String = COLUMNS.iter().map(|column| format!(" {:>WIDTH$}", cell(column))).collect();
    format!("{title:<16}{cells}").trim_end().to_owned()
}
