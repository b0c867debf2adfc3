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
    ask_until(what, ask, String::new)
}

#[track_caller]
fn ask_until<T>(
    what: &str,
    mut ask: impl FnMut() -> Option<T>,
    state: impl FnOnce() -> String,
) -> T {
    let deadline = Instant::now() + BOUND;
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < deadline, "not within {BOUND:?}: {what} {}", state());
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
    ask_until(what, || condition().then_some(()), state);
}
