//! What happens now, in one line; and no step takes longer than it may.

use std::future::Future;
use std::io::{IsTerminal as _, Write as _, stderr};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// Redrawn that often on a terminal.
const REDRAW: Duration = Duration::from_millis(200);

/// Counts the steps. On a terminal one line is written over and over, elsewhere a line per step.
#[derive(Debug)]
pub struct Progress {
    step: usize,
    steps: usize,
    is_terminal: bool,
}

impl Progress {
    /// For so many steps.
    pub fn new(steps: usize) -> Self {
        Self { step: 0, steps, is_terminal: stderr().is_terminal() }
    }

    /// Does one step, within `limit`.
    ///
    /// # Errors
    /// The step's own, or that it did not end in time.
    pub async fn step<T>(
        &mut self,
        name: &str,
        limit: Duration,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        self.step += 1;
        let title = format!("demo [{:>2}/{}] {name}", self.step, self.steps);
        if !self.is_terminal {
            eprintln!("{title}");
        }
        let begun = Instant::now();
        let deadline = tokio::time::sleep(limit);
        let mut redraw = tokio::time::interval(REDRAW);
        tokio::pin!(work, deadline);
        loop {
            tokio::select! {
                result = &mut work => return result.with_context(|| name.to_owned()),
                () = &mut deadline => bail!("{name}: has not ended within {} s", limit.as_secs()),
                _ = redraw.tick(), if self.is_terminal => {
                    // Erases the rest of what was there before.
                    eprint!("\r{title} ({:.1} s)\x1b[K", begun.elapsed().as_secs_f64());
                    let _ = stderr().flush();
                }
            }
        }
    }

    /// A line that stays, among those that do not.
    pub fn tell(&self, line: &str) {
        let clear = if self.is_terminal { "\r\x1b[K" } else { "" };
        eprintln!("{clear}{line}");
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_terminal {
            eprint!("\r\x1b[K");
        }
    }
}
