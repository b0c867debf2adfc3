//! Figures side by side, and what they are of the direct way's and the best peer's.

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::load::{Figures, Load};
use super::ways::PEERS;

/// One load's column of the bench.
#[derive(Clone, Copy)]
pub struct Column {
    /// Its name.
    pub title: &'static str,
    /// What is done.
    pub load: Load,
}

/// What one way has achieved.
pub struct Row {
    /// The way.
    pub name: &'static str,
    /// By column, round by round; `None` where it failed.
    pub figures: Vec<Vec<Option<Figures>>>,
}

/// One figure of a column.
struct Cell {
    title: String,
    column: usize,
    value: fn(&Figures) -> f64,
    /// Rates are better when they are higher, times when they are lower.
    is_rate: bool,
}

/// The figures that are shown for each column.
fn cells(columns: &[Column]) -> Vec<Cell> {
    let mut cells = Vec::new();
    for (column, Column { title, load }) in columns.iter().enumerate() {
        let mut add = |what: &str, is_rate, value| {
            cells.push(Cell { title: format!("{title}{what}"), column, value, is_rate });
        };
        match load {
            Load::Up(_) | Load::Down(_) => add(" Gb/s", true, |f| f.gbit),
            Load::Echo(_) => {
                add(" /s", true, |f| f.per_second);
                add(" p50", false, |f| f.p50_us);
                add(" p99", false, |f| f.p99_us);
            }
            Load::Connect(_) => {
                add(" /s", true, |f| f.per_second);
                add(" p50", false, |f| f.p50_us);
            }
        }
    }
    cells
}

fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        length if length % 2 == 0 => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}

impl Row {
    fn median(&self, cell: &Cell) -> Option<f64> {
        median(self.figures[cell.column].iter().flatten().map(cell.value))
    }

    /// The median of the rounds' ratios: what slows the machine for a while slows both.
    fn ratio(&self, base: &Row, cell: &Cell) -> Option<f64> {
        let rounds = self.figures[cell.column].iter().zip(&base.figures[cell.column]);
        let both = rounds.filter_map(|(ours, base)| {
            let (ours, base) = ((cell.value)(ours.as_ref()?), (cell.value)(base.as_ref()?));
            (base > 0.0).then(|| ours / base)
        });
        median(both)
    }

    fn sum(
        &self,
        columns: &[Column],
        wanted: fn(&Load) -> bool,
        value: fn(&Figures) -> f64,
    ) -> f64 {
        let all = columns.iter().zip(&self.figures).filter(|(column, _)| wanted(&column.load));
        all.flat_map(|(_, figures)| figures.iter().flatten()).map(value).sum()
    }
}

fn is_echo(load: &Load) -> bool {
    matches!(load, Load::Echo(_))
}

fn is_connect(load: &Load) -> bool {
    matches!(load, Load::Connect(_))
}

fn is_bulk(load: &Load) -> bool {
    matches!(load, Load::Up(_) | Load::Down(_))
}

/// All tables of one run.
pub struct Tables<'a> {
    /// What was done.
    pub columns: &'a [Column],
    /// What came of it.
    pub rows: &'a [Row],
    /// Seconds of each measurement.
    pub seconds: f64,
}

impl Tables<'_> {
    fn row(&self, name: &str) -> Option<&Row> {
        self.rows.iter().find(|row| row.name == name)
    }

    /// By its ratio to the direct way, which noise moves less than the figure itself.
    fn best_peer(&self, cell: &Cell) -> Option<&Row> {
        let peers = self.rows.iter().filter(|row| PEERS.contains(&row.name));
        let figure = |row: &Row| match self.row("direct") {
            Some(direct) => row.ratio(direct, cell),
            None => row.median(cell),
        };
        let known = peers.filter_map(|row| Some((row, figure(row)?)));
        let best = |a: &(&Row, f64), b: &(&Row, f64)| {
            let order = a.1.total_cmp(&b.1);
            if cell.is_rate { order } else { order.reverse() }
        };
        known.max_by(best).map(|(row, _)| row)
    }

    /// What `row` is of the direct way's figure.
    fn of_direct(&self, row: &Row, cell: &Cell) -> Option<f64> {
        row.ratio(self.row("direct")?, cell)
    }

    /// What `row` is of the best peer's figure.
    fn of_peer(&self, row: &Row, cell: &Cell) -> Option<f64> {
        row.ratio(self.best_peer(cell)?, cell)
    }

    /// Prints them.
    pub fn print(&self) {
        let cells = cells(self.columns);
        println!("\nMedians; p50 and p99 in microseconds:");
        self.grid(&cells, |row, cell| row.median(cell));
        if self.row("direct").is_some() {
            println!("\nOf direct (medians of the rounds' ratios; times: lower is better):");
            self.grid(&cells, |row, cell| self.of_direct(row, cell));
        }
        if self.rows.iter().any(|row| PEERS.contains(&row.name)) {
            let best = cells.iter().map(|cell| self.best_peer(cell).map_or("-", |row| row.name));
            println!("\nOf the best peer, which is named first:");
            let best: Vec<&str> = best.collect();
            self.head(&cells);
            self.line("best", best.iter().map(|name| (*name).to_owned()), &cells);
            self.body(&cells, |row, cell| self.of_peer(row, cell));
        }
        self.print_cpu();
    }

    /// A kernel engine's work is done on behalf of whoever sends or receives: there only the time
    /// of all three tells what it costs.
    fn print_cpu(&self) {
        println!(
            "\nProcessor time: of the proxy and its children, then of client, proxy and server \
             together"
        );
        println!("(microseconds per exchange and per connection, seconds per gigabyte):");
        println!(
            "{:<8} {:>8} {:>8} {:>8}   {:>8} {:>8} {:>8}",
            "way", "us/exch", "us/conn", "s/GB", "us/exch", "us/conn", "s/GB"
        );
        for row in self.rows {
            print!("{:<8}", row.name);
            for cost in [self.cost(row, |f| f.proxy_seconds), self.cost(row, |f| f.all_seconds)] {
                print!(
                    " {:>8.2} {:>8.2} {:>8.3}  ",
                    cost.us_per_exchange, cost.us_per_connection, cost.s_per_gb
                );
            }
            println!();
        }
    }

    fn cost(&self, row: &Row, seconds: fn(&Figures) -> f64) -> Cost {
        let each = |wanted: fn(&Load) -> bool| {
            let exchanges = row.sum(self.columns, wanted, |f| f.exchanges as f64);
            row.sum(self.columns, wanted, seconds) * 1e6 / exchanges.max(1.0)
        };
        let gigabytes = row.sum(self.columns, is_bulk, |f| f.gbit) / 8.0 * self.seconds;
        Cost {
            us_per_exchange: each(is_echo),
            us_per_connection: each(is_connect),
            s_per_gb: row.sum(self.columns, is_bulk, seconds) / gigabytes.max(1e-9),
        }
    }

    fn grid(&self, cells: &[Cell], value: impl Fn(&Row, &Cell) -> Option<f64>) {
        self.head(cells);
        self.body(cells, value);
    }

    fn head(&self, cells: &[Cell]) {
        self.line("way", cells.iter().map(|cell| cell.title.clone()), cells);
    }

    fn body(&self, cells: &[Cell], value: impl Fn(&Row, &Cell) -> Option<f64>) {
        for row in self.rows {
            let values = cells.iter().map(|cell| value(row, cell).map_or("-".to_owned(), shown));
            self.line(row.name, values, cells);
        }
    }

    fn line(&self, name: &str, values: impl Iterator<Item = String>, cells: &[Cell]) {
        print!("{name:<8}");
        for (value, cell) in values.zip(cells) {
            print!(" {value:>width$}", width = cell.title.len().max(7));
        }
        println!();
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let cells = cells(self.columns);
        let by_cell = |value: &dyn Fn(&Cell) -> Option<f64>| -> Map<String, Value> {
            cells.iter().map(|cell| (cell.title.clone(), json!(value(cell)))).collect()
        };
        let ways = self.rows.iter().map(|row| {
            let way = json!({
                "median": by_cell(&|cell| row.median(cell)),
                "of_direct": by_cell(&|cell| self.of_direct(row, cell)),
                "of_best_peer": by_cell(&|cell| self.of_peer(row, cell)),
                "cpu_of_proxy": self.cost(row, |f| f.proxy_seconds).json(),
                "cpu_of_all": self.cost(row, |f| f.all_seconds).json(),
            });
            (row.name.to_owned(), way)
        });
        Value::Object(ways.collect())
    }
}

/// Processor time of one way.
struct Cost {
    us_per_exchange: f64,
    us_per_connection: f64,
    s_per_gb: f64,
}

impl Cost {
    fn json(&self) -> Value {
        json!({
            "us_per_exchange": self.us_per_exchange,
            "us_per_connection": self.us_per_connection,
            "seconds_per_gb": self.s_per_gb,
        })
    }
}

fn shown(value: f64) -> String {
    match value {
        0.0..100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

/// Writes `value` to `file`.
///
/// # Errors
/// Those of writing.
pub fn write(file: &std::path::Path, value: &Value) -> Result<()> {
    std::fs::write(file, serde_json::to_string_pretty(value)? + "\n")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(name: &'static str, rates: &[f64]) -> Row {
        let figures = |rate: &f64| {
            Some(Figures { per_second: *rate, p50_us: 1e6 / rate, ..Figures::default() })
        };
        Row { name, figures: vec![rates.iter().map(figures).collect()] }
    }

    #[test]
    fn ratios_are_of_the_same_round_and_the_best_peer_is_each_figures_own() {
        let columns = [Column { title: "echo", load: Load::Echo(1) }];
        let rows = [
            row("direct", &[100.0, 10.0, 1000.0]),
            row("splice", &[50.0, 5.0, 500.0]),
            row("nginx", &[25.0, 2.5, 250.0]),
            row("haproxy", &[10.0, 1.0, 100.0]),
        ];
        let tables = Tables { columns: &columns, rows: &rows, seconds: 1.0 };
        let all = tables.json();
        assert_eq!(all["splice"]["median"]["echo /s"], 50.0);
        assert_eq!(all["splice"]["of_direct"]["echo /s"], 0.5);
        assert_eq!(all["splice"]["of_best_peer"]["echo /s"], 2.0);
        assert_eq!(all["splice"]["of_best_peer"]["echo p50"], 0.5);
        assert_eq!(all["haproxy"]["of_best_peer"]["echo /s"], 0.4);
    }

    #[test]
    fn a_way_that_failed_has_what_it_has() {
        assert_eq!(median([]), None);
        assert_eq!(median([3.0, 1.0]), Some(2.0));
        let columns = [Column { title: "echo", load: Load::Echo(1) }];
        let mut rows = [row("direct", &[10.0, 20.0]), row("packet", &[5.0])];
        rows[1].figures[0].push(None);
        let tables = Tables { columns: &columns, rows: &rows, seconds: 1.0 };
        assert_eq!(tables.json()["packet"]["of_direct"]["echo /s"], 0.5);
    }
}
