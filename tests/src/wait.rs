//! Waiting for conditions, with one generous bound for all.

use std::time::{Duration, Instant};

/// How long anything may take before a test calls it stuck. Only ever an upper bound: a loaded
/// machine must not fail a test that would have passed.
pub const BOUND: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(10);

/// Asks until there is an answer.
///
/// # Panics
/// None came within [`BOUND`]; the message names `what`.
#[track_caller]
pub fn eventually<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    within(BOUND, what, ask)
}

/// As [`eventually`], for what has a time of its own.
///
/// # Panics
/// No answer came within `bound`; the message names `what`.
#[track_caller]
pub fn within<T>(bound: Duration, what: &str, ask: impl FnMut() -> Option<T>) -> T {
    ask_until(bound, what, ask, String::new)
}

#[track_caller]
fn ask_until<T>(
    bound: Duration,
    what: &str,
    mut ask: impl FnMut() -> Option<T>,
    state: impl FnOnce() -> String,
) -> T {
    let deadline = Instant::now() + bound;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {bound:?}: {what} {}", state());
        std::thread::sleep(PAUSE);
    }
}

/// Waits until `condition` holds.
///
/// # Panics
/// It did not within [`BOUND`]; the message names `what`.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    eventually(what, || condition().then_some(()));
}

/// Waits until `condition` holds.
///
/// # Panics
/// It did not within [`BOUND`]; the message names `what`, and says what `state` says then.
#[track_caller]
pub fn until_or(what: &str, mut condition: impl FnMut() -> bool, state: impl FnOnce() -> String) {
    ask_until(BOUND, what, || condition().then_some(()), state);
}
