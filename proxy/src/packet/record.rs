//! What a record says of its connection.

use std::time::Duration;

use proxy_common::{MARK_FIRST, Record, SERVER};

use super::tcp;
use crate::relay::{Reason, Side};

/// Both FINs are acknowledged.
pub fn is_over(record: &Record) -> bool {
    record.halves.iter().all(|half| half.acked_fin != 0)
}

/// How a connection that is over has ended.
pub fn ending(record: &Record) -> Reason {
    let [client, server] = &record.halves;
    if client.reset != 0 {
        Reason::Reset(Side::Client)
    } else if server.reset != 0 {
        Reason::Reset(Side::Server)
    } else {
        Reason::Closed(first_to_close(record))
    }
}

/// The end whose FIN came first.
pub fn first_to_close(record: &Record) -> Side {
    if record.halves[SERVER].marks & MARK_FIRST != 0 { Side::Server } else { Side::Client }
}

/// Time since the last segment of either end.
pub fn silence(record: &Record) -> Duration {
    let seen = record.halves.iter().map(|half| half.seen_ns).max().unwrap_or(0);
    Duration::from_nanos(tcp::monotonic_ns().saturating_sub(seen))
}
