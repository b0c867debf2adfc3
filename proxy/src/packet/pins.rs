//! Where kernel objects are kept beyond their process, and which processes use them.
//!
//! Only one at a time: two would both read the programs' events, end connections for each other
//! and use slots twice. A process has the pins as long as it holds a lock (flock(2)) on their
//! directory; the kernel ends that with the process, however it ends.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use proxy_common::LAYOUT;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::attach;

/// BPF_FS_MAGIC of linux/magic.h.
pub const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// How long a process that ends may take to let go: it does so as soon as no switch is under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long one that was killed may: the kernel closes one of its descriptors after the other.
const AFTERMATH: Duration = Duration::from_secs(1);

/// How often [`Failure::passes`] looks for what the kernel does not tell of.
const LOOK: Duration = Duration::from_secs(5);

/// The directory of this network namespace, ours until this is dropped.
#[derive(Debug)]
pub struct Pins {
    directory: PathBuf,
    _lock: File,
}

/// Why there are no pins, or no engine for us.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There is no bpffs to be had: one can do without.
    #[error("{0}")]
    Absent(String),
    /// One cannot do beside another process.
    #[error("another process uses {what}")]
    Taken {
        /// As people call it.
        what: String,
        /// Whose lock it holds.
        path: PathBuf,
    },
    /// One cannot do beside what another process has pinned elsewhere.
    #[error(
        "an earlier process has left programs, and perhaps connections, pinned elsewhere: start with \
         its --bpffs, or end them with `steward-tcp-proxy cleanup`"
    )]
    Foreign {
        /// Our own pins.
        ours: Option<PathBuf>,
    },
}

impl Failure {
    /// Waits until that is over, which may be never; `false` if it has nothing to do with others, or
    /// `is_awaited` says that nobody waits any more. Holds nothing meanwhile, and does not run while
    /// another process is in the way.
    #[must_use]
    pub fn passes(&self, is_awaited: impl Fn() -> bool) -> bool {
        match self {
            Self::Absent(_) => return false,
            // A directory that is gone is nobody's; whether we may have it shows when it is tried.
            Self::Taken { path, .. } => drop(lock_late(path)),
            Self::Foreign { ours } => {
                while is_awaited() && is_foreign(ours.as_deref()).unwrap_or(false) {
                    std::thread::sleep(LOOK);
                }
            }
        }
        is_awaited()
    }
}

impl Pins {
    /// Makes the directory for pins, and takes it for this process.
    ///
    /// # Errors
    /// See [`Failure`].
    pub fn open(bpffs: &Path) -> Result<Self, Failure> {
        let directory = directory(bpffs).map_err(|error| Failure::Absent(error.to_string()))?;
        let absent = |path: &Path, error: &dyn std::fmt::Display| {
            Failure::Absent(format!("{}: {error}", path.display()))
        };
        let existing = existing(&directory);
        if !is_bpffs(existing).map_err(|error| absent(existing, &error))? {
            return Err(absent(existing, &"no bpffs"));
        }
        fs::create_dir_all(&directory).map_err(|error| absent(&directory, &error))?;
        match lock_soon(&directory).map_err(|error| absent(&directory, &error))? {
            Some(lock) => Ok(Self { directory, _lock: lock }),
            None => Err(Failure::Taken { what: directory.display().to_string(), path: directory }),
        }
    }

    /// Where pins are.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }
}

/// The nearest directory to `path` that exists; what is made at `path` is on its file system.
#[must_use]
pub fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

/// Whether `path` is on a bpffs.
///
/// # Errors
/// It is not there.
pub fn is_bpffs(path: &Path) -> io::Result<bool> {
    Ok(rustix::fs::statfs(path)?.f_type as u32 == BPF_FS_MAGIC)
}

/// The part of this network namespace under `--bpffs`: one directory for each layout of the maps,
/// and in it one for each network namespace, whose connections have nothing to do with another's.
///
/// # Errors
/// The namespace cannot be told.
pub fn directory(bpffs: &Path) -> io::Result<PathBuf> {
    let namespace = fs::metadata("/proc/thread-self/ns/net")?.ino();
    Ok(bpffs.join(LAYOUT).join(format!("net-{namespace}")))
}

/// Every directory of pins under `--bpffs`, also of other layouts and namespaces.
///
/// # Errors
/// Directories cannot be read.
pub fn all(bpffs: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for layout in children(bpffs)? {
        found.extend(children(&layout)?);
    }
    Ok(found)
}

fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Asks until there is an answer, or for so long.
fn soon<T>(
    patience: Duration,
    mut ask: impl FnMut() -> io::Result<Option<T>>,
) -> io::Result<Option<T>> {
    let deadline = Instant::now() + patience;
    loop {
        match ask()? {
            None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            outcome => return Ok(outcome),
        }
    }
}

/// [`lock`], with a process before us that is about to let go.
fn lock_soon(path: &Path) -> io::Result<Option<File>> {
    soon(PATIENCE, || lock(path))
}

/// The same, however long that takes.
fn lock_late(path: &Path) -> io::Result<File> {
    let file = File::open(path)?;
    rustix::io::retry_on_intr(|| flock(&file, FlockOperation::LockExclusive))?;
    Ok(file)
}

/// Locks a directory of pins; `None` while another process has it.
///
/// # Errors
/// It cannot be opened.
pub fn lock(directory: &Path) -> io::Result<Option<File>> {
    let file = File::open(directory)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(Some(file)),
    }
}

/// Whether a guard is at work that no process runs and that is not of these pins: then there may be
/// connections of which only other pins know.
fn is_foreign(ours: Option<&Path>) -> io::Result<bool> {
    Ok(!ours.is_some_and(has_guard) && attach::is_guarded()?)
}

/// Makes sure that no pins but `ours` (those of this process) relay in this network namespace. To be
/// called by [the one](be_the_one).
///
/// # Errors
/// [`Failure::Foreign`]; or the kernel does not tell.
pub fn refuse_foreign(ours: Option<&Path>) -> anyhow::Result<()> {
    let none = soon(AFTERMATH, || Ok((!is_foreign(ours)?).then_some(())));
    match none.context("programs of this network namespace")? {
        Some(()) => Ok(()),
        None => Err(Failure::Foreign { ours: ours.map(Path::to_owned) }.into()),
    }
}

/// Name of the guard's link, and of one that is about to take its place.
pub const GUARD: &str = "guard";
/// See [`GUARD`].
pub const NEW_GUARD: &str = "guard-new";

/// Whether the programs of the network namespace may be an earlier process's of this directory.
#[must_use]
pub fn has_guard(directory: &Path) -> bool {
    // The second one is on its way to the first's place: a process may have ended in between.
    [GUARD, NEW_GUARD].iter().any(|name| directory.join(name).exists())
}

/// The network namespace that the calling thread is in; a lock on it is one for all its processes.
const NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Makes this the one process of its network namespace that runs the engine, with pins or without,
/// until the lock is dropped: two would give out the same ports, and a switched connection has no
/// socket that tells the other of it.
///
/// # Errors
/// See [`Failure`].
pub fn be_the_one() -> Result<File, Failure> {
    let lock = lock_soon(Path::new(NAMESPACE));
    let lock = lock.map_err(|error| Failure::Absent(format!("{NAMESPACE}: {error}")))?;
    lock.ok_or_else(|| Failure::Taken {
        what: "the packet engine of this network namespace".to_owned(),
        path: NAMESPACE.into(),
    })
}

/// Makes sure that no process of this network namespace runs the engine, nor begins to until the
/// lock is dropped. `None` if one does.
///
/// # Errors
/// /proc is not there.
pub fn be_alone() -> io::Result<Option<File>> {
    lock(Path::new(NAMESPACE))
}
