//! Waiting for conditions, with one generous bound for all.

use std::sync::LazyLock;
use std::time::{Duration, Instant};

/// On a machine of its own.
const BOUND: Duration = Duration::from_secs(30);

const PAUSE: Duration = Duration::from_millis(10);

/// How many times longer everything may take, where a whole processor is emulated
/// (`STEWARD_TEST_PATIENCE`; `cargo xtask kernels` sets it).
static PATIENCE: LazyLock<u32> = LazyLock::new(|| match std::env::var("STEWARD_TEST_PATIENCE") {
    Ok(text) => text.parse().expect("STEWARD_TEST_PATIENCE is a number"),
    Err(_) => 1,
});

/// An upper bound that holds for a real machine, as one that holds for this one.
#[must_use]
pub fn patient(bound: Duration) -> Duration {
    bound * *PATIENCE
}

/// How long anything may take before a test calls it stuck. Only ever an upper bound: a loaded
/// machine must not fail a test that would have passed.
#[must_use]
pub fn bound() -> Duration {
    patient(BOUND)
}

/// Asks until there is an answer.
///
/// # Panics
/// None came within [`bound`]; the message names `what`.
#[track_caller]
pub fn eventually<T>(what: &str, ask: impl FnMut() -> Option<T>) -> T {
    ask_until(bound(), what, ask, String::new)
}

/// As [`eventually`], for what has a time of its own.
///
/// # Panics
/// No answer came within `bound`; the message names `what`.
#[track_caller]
pub fn within<T>(bound: Duration, what: &str, ask: impl FnMut() -> Option<T>) -> T {
    ask_until(patient(bound), what, ask, String::new)
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
/// It did not within [`bound`]; the message names `what`.
#[track_caller]
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    eventually(what, || condition().then_some(()));
}

/// Waits until `condition` holds.
///
/// # Panics
/// It did not within [`bound`]; the message names `what`, and says what `state` says then.
#[track_caller]
pub fn until_or(what: &str, mut condition: impl FnMut() -> bool, state: impl FnOnce() -> String) {
    ask_until(bound(), what, || condition().then_some(()), state);
}
