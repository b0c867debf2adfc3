//! How passes, rounds of writes and single writes end.

use super::plan::Subject;
use super::trouble::Trouble;

/// How a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All is as it should be.
    Unchanged,
    /// Something was written, and all is as it should be.
    Changed,
    /// No address is known, or none that may be published yet.
    Waiting,
    /// Another replica may write the same, or a pause has not ended.
    Deferred,
    /// A rival undoes our writes.
    Rival,
    /// Something could not be written.
    Failed(&'static str),
}

impl Outcome {
    pub(super) fn as_label(self) -> &'static str {
        match self {
            Self::Unchanged => "unchanged",
            Self::Changed => "changed",
            Self::Waiting => "waiting",
            Self::Deferred => "deferred",
            Self::Rival => "rival",
            Self::Failed(why) => why,
        }
    }
}

/// How a round of writes ended.
pub(super) enum Round {
    /// All was written.
    Wrote,
    /// An object was not as we saw it; it has been fetched.
    Stale(Subject, Trouble),
    /// No more to be done in this pass.
    Over(Outcome),
}

/// How one write ended.
pub(super) enum Progress {
    Done,
    Stale(Trouble),
    Failed(&'static str),
}
