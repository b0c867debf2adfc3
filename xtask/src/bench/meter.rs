//! What a process and its children cost.

use std::fs;

/// Watches a process, or none.
#[derive(Debug, Clone, Copy)]
pub struct Meter(Option<u32>);

impl Meter {
    /// Costs nothing.
    pub fn none() -> Self {
        Self(None)
    }

    /// Of this process and all below it.
    pub fn of(pid: Option<u32>) -> Self {
        Self(pid)
    }

    /// Processor time so far, in seconds. What has ended is not in it; proxies keep their
    /// threads.
    pub fn seconds(self) -> f64 {
        self.0.map_or(0.0, |pid| nanoseconds(pid) as f64 / 1e9)
    }
}

/// The first number of a task's schedstat is its time on a processor
/// (Documentation/scheduler/sched-stats.rst), exact where /proc/PID/stat counts hundredths.
fn nanoseconds(pid: u32) -> u64 {
    let mut sum = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let read = |file: &str| fs::read_to_string(task.path().join(file)).unwrap_or_default();
        let time = |text: &str| text.split_whitespace().next()?.parse::<u64>().ok();
        sum += time(&read("schedstat")).unwrap_or_default();
        let children = read("children");
        let children = children.split_whitespace().filter_map(|child| child.parse().ok());
        sum += children.map(nanoseconds).sum::<u64>();
    }
    sum
}
