//! How many bytes the kernel has relayed, without a number for each connection: what all records
//! say, less what of it our sockets moved before the switch.

use std::sync::atomic::{AtomicU64, Ordering};

use proxy_common::{CLIENT, Record, SERVER};

use crate::relay::Moved;

/// Of both directions: up and down.
#[derive(Debug, Default)]
pub struct Volume {
    /// Counted by others: moved by us before the switch, or by an earlier process.
    elsewhere: [AtomicU64; 2],
    /// Of connections that have ended.
    ended: [AtomicU64; 2],
    /// What was reported so far.
    reported: [AtomicU64; 2],
}

impl Volume {
    /// A connection that is switched from here on, after so much.
    pub fn begins(&self, Moved { up, down }: Moved) {
        add(&self.elsewhere, [up, down]);
    }

    /// A connection that an earlier process has switched.
    pub fn adopted(&self, record: &Record) {
        add(&self.elsewhere, bytes(record));
    }

    /// A connection's last words.
    pub fn ended(&self, record: &Record) {
        add(&self.ended, bytes(record));
    }

    /// What is new since the last call, given the records of all that have not ended.
    pub fn news(&self, living: impl Iterator<Item = Record>) -> [u64; 2] {
        let mut all = [0, 1].map(|way| self.ended[way].load(Ordering::Relaxed));
        for record in living {
            for (all, bytes) in all.iter_mut().zip(bytes(&record)) {
                *all += bytes;
            }
        }
        [0, 1].map(|way| {
            let total = all[way].saturating_sub(self.elsewhere[way].load(Ordering::Relaxed));
            // One that ends right now may be in neither sum: it is in the next.
            let before = self.reported[way].fetch_max(total, Ordering::Relaxed);
            total.saturating_sub(before)
        })
    }
}

fn bytes(record: &Record) -> [u64; 2] {
    [record.halves[CLIENT].bytes, record.halves[SERVER].bytes]
}

fn add(sums: &[AtomicU64; 2], bytes: [u64; 2]) {
    for (sum, bytes) in sums.iter().zip(bytes) {
        sum.fetch_add(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(up: u64, down: u64) -> Record {
        let mut record = Record::default();
        record.halves[CLIENT].bytes = up;
        record.halves[SERVER].bytes = down;
        record
    }

    #[test]
    fn every_byte_is_news_once() {
        let volume = Volume::default();
        volume.begins(Moved { up: 100, down: 10 });
        assert_eq!(volume.news([record(100, 10)].into_iter()), [0, 0]);
        assert_eq!(volume.news([record(150, 30)].into_iter()), [50, 20]);
        volume.adopted(&record(1000, 1000));
        assert_eq!(volume.news([record(150, 30), record(1001, 1000)].into_iter()), [1, 0]);
        // Ended, but in neither sum for a moment.
        assert_eq!(volume.news([record(1001, 1000)].into_iter()), [0, 0]);
        volume.ended(&record(160, 30));
        assert_eq!(volume.news([record(1001, 1000)].into_iter()), [10, 0]);
        assert_eq!(volume.news([record(1001, 1002)].into_iter()), [0, 2]);
    }
}
