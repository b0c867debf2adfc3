//! `connections list` and `connections kill`: the socket's other end.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{self, BufRead as _, BufReader, ErrorKind, Write as _};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;

use super::{Last, PATIENCE, Request, Which, as_line};
use crate::cli::{ConnectionsFlags, ConnectionsVerb, Output};

/// The verb. Exit status 0, or 1 with one line of what is wrong.
#[must_use]
pub fn run(flags: &ConnectionsFlags) -> ExitCode {
    let done = match &flags.verb {
        ConnectionsVerb::List { output } => list(&flags.admin_socket, *output),
        ConnectionsVerb::Kill(which) => kill(&flags.admin_socket, which.which()),
    };
    // Written by hand, since the macros panic where nobody reads.
    let (text, failure) = match done {
        Ok((text, failure)) => (text, failure),
        Err(error) => (String::new(), Some(error)),
    };
    let shown = io::stdout().write_all(text.as_bytes());
    if let Some(failure) = &failure {
        let _ = writeln!(io::stderr(), "steward-tcp-proxy: {failure}");
    }
    if failure.is_none() && shown.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What to print, and what went wrong in spite of that.
type Done = Result<(String, Option<String>), String>;

fn list(socket: &Path, output: Output) -> Done {
    let (rows, count) = ask(socket, &Request::List)?;
    if rows.len() != count {
        return Err(format!("{} of {count} connections came", rows.len()));
    }
    let text = match output {
        Output::Json => format!("{{\"connections\":[{}]}}\n", rows.join(",")),
        Output::Table => table(&rows).map_err(|error| format!("not understood: {error}"))?,
    };
    Ok((text, None))
}

fn kill(socket: &Path, which: Which) -> Done {
    // The answer is a number alone, so who is not there is asked before.
    let rows = match &which {
        Which::Ids(_) => ask(socket, &Request::List)?.0,
        Which::Client(_) | Which::All(_) => Vec::new(),
    };
    let (_, count) = ask(socket, &Request::Kill(which.clone()))?;
    let failure = match which {
        Which::Ids(ids) => {
            let present = rows.iter().filter_map(|row| serde_json::from_str(row).ok());
            missing(ids, &present.map(|row: Shown| row.id).collect(), count)
        }
        Which::Client(client) => (count == 0).then(|| format!("no connection is {client}'s")),
        Which::All(_) => None,
    };
    Ok((format!("killed {count}\n"), failure))
}

/// Which of `ids` were not killed, where `count` were and `present` were there before.
fn missing(mut ids: Vec<String>, present: &HashSet<String>, count: usize) -> Option<String> {
    ids.sort();
    ids.dedup();
    let missing = ids.len().checked_sub(count).filter(|missing| *missing > 0)?;
    let of = ids.len();
    ids.retain(|id| !present.contains(id));
    // The others have ended in between.
    let text = match (ids.len() == missing, of) {
        (true, 1) => format!("{} is no connection (any more)", ids[0]),
        (true, _) => format!("no connections (any more): {}", ids.join(", ")),
        (false, _) => format!("{missing} of {of} have ended; not there before: {ids:?}"),
    };
    Some(text)
}

/// The lines of the answer, and the count that ends it.
fn ask(socket: &Path, request: &Request) -> Result<(Vec<String>, usize), String> {
    let shown = socket.display();
    let stream = UnixStream::connect(socket).map_err(|error| match error.kind() {
        ErrorKind::NotFound => {
            format!("no proxy answers: there is no {shown} (its --admin-socket may be another)")
        }
        ErrorKind::ConnectionRefused => {
            format!("no proxy answers at {shown}: the one that made this socket has ended")
        }
        ErrorKind::PermissionDenied => {
            format!("{shown}: permission denied: only root and the user that runs the proxy may")
        }
        _ => format!("{shown}: {error}"),
    })?;
    let talk = |mut stream: &UnixStream| -> io::Result<Vec<String>> {
        // The proxy's own patience, and a little more for the way.
        stream.set_read_timeout(Some(PATIENCE + Duration::from_secs(1)))?;
        stream.write_all(&as_line(request))?;
        let mut lines = Vec::new();
        for line in BufReader::new(stream).lines() {
            let line = line?;
            let is_last = serde_json::from_str::<Last>(&line).is_ok();
            lines.push(line);
            if is_last {
                break;
            }
        }
        Ok(lines)
    };
    let mut lines =
        talk(&stream).map_err(|error| format!("no proxy answers at {shown}: {error}"))?;
    let last = lines.pop().and_then(|line| serde_json::from_str(&line).ok());
    match last {
        Some(Last::Count(count)) => Ok((lines, count)),
        Some(Last::Error(error)) => Err(format!("the proxy at {shown} says: {error}")),
        None => Err(format!("the proxy at {shown} broke off; it may have too many who ask")),
    }
}

/// A [`super::Row`] as another version of this program may send it.
#[derive(Deserialize)]
struct Shown {
    id: String,
    client: SocketAddr,
    upstream: SocketAddr,
    engine: String,
    age_seconds: f64,
    idle_seconds: f64,
    bytes_up: u64,
    bytes_down: u64,
}

fn table(rows: &[String]) -> serde_json::Result<String> {
    const HEAD: [&str; 8] = ["ID", "CLIENT", "UPSTREAM", "ENGINE", "AGE", "IDLE", "UP", "DOWN"];
    let mut cells = vec![HEAD.map(str::to_owned)];
    for row in rows {
        let row: Shown = serde_json::from_str(row)?;
        cells.push([
            row.id,
            row.client.to_string(),
            row.upstream.to_string(),
            row.engine,
            time(row.age_seconds),
            time(row.idle_seconds),
            row.bytes_up.to_string(),
            row.bytes_down.to_string(),
        ]);
    }
    let width = |column: usize| cells.iter().map(|row| row[column].len()).max().unwrap_or(0);
    let widths: [usize; 8] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &cells {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(widths).enumerate() {
            // Numbers of bytes are compared by their length.
            let _ = match column {
                6.. => write!(line, "{cell:>width$}  "),
                _ => write!(line, "{cell:<width$}  "),
            };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    Ok(text)
}

/// `3.2s`, `4m12s`, `2h3m`, `5d1h`: two units are enough.
fn time(seconds: f64) -> String {
    let whole = seconds.max(0.0) as u64;
    match whole {
        0..60 => format!("{:.1}s", seconds.max(0.0)),
        60..3600 => format!("{}m{}s", whole / 60, whole % 60),
        3600..86_400 => format!("{}h{}m", whole / 3600, whole % 3600 / 60),
        _ => format!("{}d{}h", whole / 86_400, whole % 86_400 / 3600),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::Row;

    #[test]
    fn the_table_is_aligned_and_shows_every_figure() {
        let row = |id: &str, bytes_up| Row {
            id: id.into(),
            client: "192.0.2.1:4".parse().expect("an address"),
            upstream: "[2001:db8::1]:6443".parse().expect("an address"),
            engine: "splice",
            age_seconds: 3723.4,
            idle_seconds: 0.25,
            bytes_up,
            bytes_down: 0,
        };
        let lines = [row("7", 5), row("12345", 1_234_567)].map(|row| as_line(&row));
        let lines = lines.map(|line| String::from_utf8(line).expect("text"));
        let text = table(&lines).expect("well-formed");
        assert_eq!(
            text,
            "ID     CLIENT       UPSTREAM            ENGINE  AGE   IDLE       UP  DOWN\n\
             7      192.0.2.1:4  [2001:db8::1]:6443  splice  1h2m  0.2s        5     0\n\
             12345  192.0.2.1:4  [2001:db8::1]:6443  splice  1h2m  0.2s  1234567     0\n"
        );
    }

    #[test]
    fn whoever_is_not_there_is_named() {
        let present = HashSet::from(["1".to_owned()]);
        let told = |ids: &[&str], count| {
            missing(ids.iter().map(|id| (*id).to_owned()).collect(), &present, count)
        };
        assert_eq!(told(&["1", "1"], 1), None);
        assert_eq!(told(&["9-9"], 0).as_deref(), Some("9-9 is no connection (any more)"));
        let several = told(&["1", "9-9", "8"], 1);
        assert_eq!(several.as_deref(), Some("no connections (any more): 8, 9-9"));
        // It was there when it was asked for.
        assert!(told(&["1"], 0).expect("a failure").starts_with("1 of 1 "));
    }

    #[test]
    fn times_have_two_units_at_most() {
        let shown = [0.0, 59.94, 60.0, 3599.0, 86_399.0, 90_000.0].map(time);
        assert_eq!(shown, ["0.0s", "59.9s", "1m0s", "59m59s", "23h59m", "1d1h"]);
    }
}
