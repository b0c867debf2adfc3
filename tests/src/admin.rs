//! The admin address, asked over plain HTTP.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};

use crate::wait::bound;

/// The prefix of every metric.
const PREFIX: &str = "steward_tcp_proxy_";

/// An HTTP answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// 200 and so on.
    pub status: u16,
    /// All after the headers.
    pub body: String,
}

/// Asks for `path` on a connection of its own.
///
/// # Errors
/// Nobody listens, or what answers is not HTTP.
pub fn get(admin: SocketAddr, path: &str) -> std::io::Result<Answer> {
    let mut stream = TcpStream::connect_timeout(&admin, bound())?;
    stream.set_read_timeout(Some(bound()))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {admin}\r\nConnection: close\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let not_http = || std::io::Error::other(format!("not HTTP: {text:?}"));
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(not_http)?;
    let status = head.split_whitespace().nth(1).and_then(|s| s.parse().ok());
    Ok(Answer { status: status.ok_or_else(not_http)?, body: body.to_owned() })
}

/// Adds up the samples of `name` (without the common prefix) that carry all of `labels`; 0 if
/// there is none.
///
/// # Panics
/// A sample's value is no number.
#[track_caller]
#[must_use]
pub fn sum(metrics: &str, name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: Vec<String> =
        labels.iter().map(|(key, value)| format!("{key}=\"{value}\"")).collect();
    let samples = metrics.lines().filter_map(|line| {
        let rest = line.strip_prefix(PREFIX)?.strip_prefix(name)?;
        let (labels, value) = match rest.strip_prefix('{') {
            Some(rest) => rest.rsplit_once("} ")?,
            None => ("", rest.strip_prefix(' ')?),
        };
        let carried: Vec<&str> = labels.split(',').collect();
        wanted.iter().all(|w| carried.contains(&w.as_str())).then_some(value)
    });
    samples
        .map(|value| value.parse::<f64>().unwrap_or_else(|e| panic!("{name} is {value:?}: {e}")))
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_found_by_name_and_labels() {
        let text = "# HELP steward_tcp_proxy_ended_total x\n\
                    steward_tcp_proxy_ended_total{engine=\"copy\",reason=\"a\"} 2\n\
                    steward_tcp_proxy_ended_total{engine=\"splice\",reason=\"a\"} 3\n\
                    steward_tcp_proxy_ended_total_more 7\n\
                    steward_tcp_proxy_draining 1\n";
        assert_eq!(sum(text, "ended_total", &[]), 5.0);
        assert_eq!(sum(text, "ended_total", &[("engine", "copy"), ("reason", "a")]), 2.0);
        assert_eq!(sum(text, "ended_total", &[("reason", "b")]), 0.0);
        assert_eq!(sum(text, "draining", &[]), 1.0);
    }
}
