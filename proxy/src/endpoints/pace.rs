//! How often each object may be written: at once as a rule, later after a failure, and seldom
//! while a rival undoes every write. Pure: time comes from the caller.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::ownership::MANAGER;
use super::plan::{Step, Subject};

/// Undone writes count for this long.
const WINDOW: Duration = Duration::from_secs(300);
/// A writer that brought the same content back this often will do so again.
const SAME_UNDONE: usize = 4;
/// A writer that undid us this often is a rival, whatever it wrote.
const ANY_UNDONE: usize = 20;
/// The first pause in a quarrel, doubled after each try up to [`LONGEST_TRUCE`].
const FIRST_TRUCE: Duration = Duration::from_secs(60);
/// See [`FIRST_TRUCE`].
const LONGEST_TRUCE: Duration = Duration::from_secs(300);
/// Our content left alone for so long: the rival is gone.
const PEACE: Duration = Duration::from_secs(60);
/// First and longest pause after failures.
const FIRST_RETRY: Duration = Duration::from_millis(500);
/// See [`FIRST_RETRY`].
const LONGEST_RETRY: Duration = Duration::from_secs(60);

/// Whether to write now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Now.
    Go,
    /// Not now.
    Later,
    /// Not now, for a rival was recognised just now.
    Rival {
        /// Who.
        by: String,
        /// How often it undid us.
        undone: usize,
    },
}

#[derive(Debug)]
struct Undone {
    at: Instant,
    by: String,
    found: u64,
}

#[derive(Debug)]
struct Truce {
    rival: String,
    until: Instant,
    pause: Duration,
    /// Since when our content has been in place.
    quiet_since: Option<Instant>,
}

#[derive(Debug, Default)]
struct Record {
    /// The content last seen as it should be, whichever replica wrote it: every replica counts
    /// the same undone writes and comes to the same verdict, else each would quarrel in turn.
    was_right: Option<u64>,
    undone: VecDeque<Undone>,
    truce: Option<Truce>,
    failures: u32,
    retry_at: Option<Instant>,
}

/// The memory behind the verdicts.
#[derive(Debug, Default)]
pub(super) struct Pace {
    records: HashMap<Subject, Record>,
}

impl Pace {
    /// Something needs this step: if all was right before, somebody has undone it.
    pub(super) fn notice(&mut self, step: &Step, now: Instant) {
        self.records.entry(step.subject.clone()).or_default().count(step, now);
    }

    /// May this step be taken now? To be asked once for each step of a plan, before any is taken.
    pub(super) fn judge(&mut self, step: &Step, now: Instant) -> Verdict {
        self.notice(step, now);
        let record = self.records.entry(step.subject.clone()).or_default();
        if let Some(truce) = &mut record.truce {
            truce.quiet_since = None;
        } else if let Some((by, undone)) = record.rival() {
            record.truce = Some(Truce {
                rival: by.clone(),
                until: now + FIRST_TRUCE,
                pause: FIRST_TRUCE,
                quiet_since: None,
            });
            return Verdict::Rival { by, undone };
        }
        let truce = record.truce.as_ref().map(|truce| truce.until);
        let wait = truce.max(record.retry_at).is_some_and(|until| now < until);
        if wait { Verdict::Later } else { Verdict::Go }
    }

    /// The subject is as it should be, by our write or anyhow. Names the rival that gave up.
    pub(super) fn right(&mut self, subject: &Subject, want: u64, now: Instant) -> Option<String> {
        let record = self.records.entry(subject.clone()).or_default();
        record.was_right = Some(want);
        record.failures = 0;
        record.retry_at = None;
        let truce = record.truce.as_mut()?;
        let since = *truce.quiet_since.get_or_insert_with(|| {
            truce.pause = (truce.pause * 2).min(LONGEST_TRUCE);
            truce.until = now + truce.pause;
            now
        });
        if now < since + PEACE {
            return None;
        }
        record.undone.clear();
        record.truce.take().map(|truce| truce.rival)
    }

    /// The write failed. True for the first time in a row, which deserves a louder word.
    pub(super) fn failed(&mut self, subject: &Subject, now: Instant) -> bool {
        let record = self.records.entry(subject.clone()).or_default();
        let pause = FIRST_RETRY.saturating_mul(1 << record.failures.min(16)).min(LONGEST_RETRY);
        // Half fixed, half random: replicas that failed together do not come back together.
        record.retry_at = Some(now + pause.mul_f64(0.5 + 0.5 * fastrand::f64()));
        record.failures = record.failures.saturating_add(1);
        record.failures == 1
    }

    /// Foreign subjects that are not in the way now, but were: they count as right.
    pub(super) fn foreign(&self) -> impl Iterator<Item = &Subject> {
        self.records.keys().filter(|subject| matches!(subject, Subject::Foreign(_)))
    }

    /// Whether some rival is known.
    pub(super) fn has_rival(&self) -> bool {
        self.records.values().any(|record| record.truce.is_some())
    }

    /// When a verdict may change by itself.
    pub(super) fn next_change(&self, now: Instant) -> Option<Instant> {
        let times = self.records.values().flat_map(|record| {
            let truce = record.truce.as_ref();
            let peace = truce.and_then(|truce| Some(truce.quiet_since? + PEACE));
            [record.retry_at, truce.map(|truce| truce.until), peace]
        });
        times.flatten().filter(|at| *at > now).min()
    }
}

impl Record {
    fn expire(&mut self, now: Instant) {
        while self.undone.front().is_some_and(|undone| undone.at + WINDOW < now) {
            self.undone.pop_front();
        }
    }

    /// Notes that what was right no longer is, once each time.
    fn count(&mut self, step: &Step, now: Instant) {
        self.expire(now);
        if self.was_right == Some(step.want) {
            self.was_right = None;
            self.undone.push_back(Undone { at: now, by: step.by.clone(), found: step.found });
        }
    }

    /// Who undid us too often, and how often.
    fn rival(&self) -> Option<(String, usize)> {
        let last = self.undone.back()?;
        let by_same = || self.undone.iter().filter(|undone| undone.by == last.by);
        let same = by_same().filter(|undone| undone.found == last.found).count();
        let any = by_same().count();
        // Nobody signs a deletion, and a deleted object always looks the same; be patient then.
        let same_enough = same >= SAME_UNDONE && !last.by.is_empty();
        (same_enough || any >= ANY_UNDONE).then(|| {
            let by = if last.by.is_empty() {
                "somebody who deletes it".to_owned()
            } else {
                last.by.clone()
            };
            (by, any)
        })
    }
}

/// A rival of our own name is a replica with other flags.
pub(super) fn describe_rival(by: &str) -> String {
    if by == MANAGER { format!("another {MANAGER} with other settings") } else { by.to_owned() }
}
