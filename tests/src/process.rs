//! What `/proc` tells about a process.

use std::fs;
use std::path::PathBuf;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A process, watched from the outside.
#[derive(Debug, Clone, Copy)]
pub struct Watched {
    pid: u32,
}

impl Watched {
    /// The process `pid`.
    #[must_use]
    pub fn new(pid: u32) -> Self {
        Self { pid }
    }

    /// Its number.
    #[must_use]
    pub fn id(self) -> u32 {
        self.pid
    }

    #[track_caller]
    fn read(self, file: &str) -> String {
        let path = PathBuf::from(format!("/proc/{}/{file}", self.pid));
        fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
    }

    /// Resident set, in bytes, shared pages included.
    ///
    /// # Panics
    /// The process is gone.
    #[track_caller]
    #[must_use]
    pub fn resident_memory(self) -> u64 {
        field(&self.read("status"), "VmRSS:") * 1024
    }

    /// Resident memory that is backed by nothing but itself, in bytes: heap and stacks, without
    /// files and without the kernel's maps that it has in its address space.
    ///
    /// # Panics
    /// The process is gone.
    #[track_caller]
    #[must_use]
    pub fn anonymous_memory(self) -> u64 {
        field(&self.read("smaps_rollup"), "Anonymous:") * 1024
    }

    /// CPU time used by all its threads so far, in clock ticks (hundredths of a second).
    ///
    /// # Panics
    /// The process is gone.
    #[track_caller]
    #[must_use]
    pub fn cpu_ticks(self) -> u64 {
        let text = self.read("stat");
        // The name, in parentheses, may hold anything; utime and stime are fields 14 and 15.
        let after_name = text.rsplit_once(')').map_or("", |(_, rest)| rest);
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks = fields.get(11..13).unwrap_or_default();
        assert_eq!(ticks.len(), 2, "unexpected /proc/PID/stat: {text}");
        ticks.iter().filter_map(|t| t.parse::<u64>().ok()).sum()
    }

    /// How often threads that live now have gone to sleep of their own will: each wake-up ends
    /// with one more.
    ///
    /// # Panics
    /// The process is gone.
    #[track_caller]
    #[must_use]
    pub fn sleeps(self) -> u64 {
        let tasks = format!("/proc/{}/task", self.pid);
        let tasks = fs::read_dir(&tasks).unwrap_or_else(|e| panic!("{tasks}: {e}"));
        tasks
            .filter_map(|task| fs::read_to_string(task.ok()?.path().join("status")).ok())
            .map(|status| field(&status, "voluntary_ctxt_switches:"))
            .sum()
    }

    /// Open file descriptors.
    ///
    /// # Panics
    /// The process is gone.
    #[track_caller]
    #[must_use]
    pub fn open_files(self) -> usize {
        let fds = format!("/proc/{}/fd", self.pid);
        fs::read_dir(&fds).unwrap_or_else(|e| panic!("{fds}: {e}")).count()
    }
}

#[track_caller]
fn field(text: &str, name: &str) -> u64 {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in {text}"))
}

/// Lets this process (and children started later) hold at least `files` file descriptors.
///
/// # Panics
/// The hard limit is below that: the machine must be told (`ulimit -Hn`), not the test skipped.
#[track_caller]
pub fn need_open_files(files: u64) {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    assert!(hard >= files, "this test needs {files} open files; the hard limit is {hard}");
    if limit.current.is_some_and(|soft| soft < files) {
        let raised = Rlimit { current: Some(files), maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised).expect("raising the soft limit to the hard one");
    }
}
