//! Verb `cleanup`: removes what kernel engines have left in the kernel.
//!
//! Pins live in a bpffs and outlast every process, on purpose; this is how they end.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, fstatfs, openat, unlinkat};
use rustix::io::Errno;

use crate::cli::CleanupFlags;

/// BPF_FS_MAGIC of linux/magic.h.
const BPF_FS_MAGIC: u32 = 0xcafe_4a11;

/// The inode of a bpffs' root (simple_fill_super in fs/libfs.c gives it 1).
const ROOT: u64 = 1;

/// What `cleanup` could not do.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The directory is none of a bpffs.
    #[error("{} is not on a bpffs: nothing was removed", .0.display())]
    NoBpffs(PathBuf),
    /// The directory is a bpffs as a whole.
    #[error(
        "{} is the root of a bpffs, which others use as well: name a directory in it; nothing was \
         removed",
        .0.display()
    )]
    Root(PathBuf),
    /// A system call failed.
    #[error("{path}: {error}", path = .0.display(), error = .1)]
    Io(PathBuf, io::Error),
}

/// The verb. Prints what it removed; exit status 0 if nothing is left, else 1.
#[must_use]
pub fn run(flags: &CleanupFlags) -> ExitCode {
    let mut stdout = io::stdout();
    // Written by hand, since the macros panic where nobody reads.
    let removed = remove_pins(&flags.bpffs, &mut |path| {
        let _ = writeln!(stdout, "removed {}", path.display());
    });
    match removed {
        Ok(0) => {
            let _ = writeln!(io::stdout(), "nothing is pinned at {}", flags.bpffs.display());
            ExitCode::SUCCESS
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "steward-tcp-proxy: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Removes everything in `directory`, which must be on a bpffs, and the directory itself. Calls
/// `removed` with each path that is gone; how many that were. A directory that is not there is
/// no failure.
///
/// # Errors
/// It is no such directory, or something cannot be removed; the rest then stays.
pub fn remove_pins(directory: &Path, removed: &mut dyn FnMut(&Path)) -> Result<usize, Failure> {
    let failed = |error: Errno| Failure::Io(directory.to_owned(), error.into());
    let opened = match open(CWD, directory.as_os_str()) {
        Err(Errno::NOENT) => return Ok(0),
        opened => opened.map_err(failed)?,
    };
    // The magic is a 32-bit number in a type that differs by architecture.
    if fstatfs(&opened).map_err(failed)?.f_type as u32 != BPF_FS_MAGIC {
        return Err(Failure::NoBpffs(directory.to_owned()));
    }
    let device = fstat(&opened).map_err(failed)?;
    if device.st_ino == ROOT {
        return Err(Failure::Root(directory.to_owned()));
    }
    let mut count = 0;
    let mut counted = |path: &Path| {
        count += 1;
        removed(path);
    };
    empty(opened.as_fd(), directory, device.st_dev, &mut counted)?;
    match unlinkat(CWD, directory, AtFlags::REMOVEDIR) {
        // A volume of the pod ends in this directory: it is empty, and that is enough.
        Err(Errno::BUSY) => {}
        gone => {
            gone.map_err(failed)?;
            counted(directory);
        }
    }
    Ok(count)
}

/// Names are looked up in open directories and links are not followed, so nothing that is moved
/// meanwhile can lead out of them.
fn empty(
    directory: BorrowedFd<'_>,
    path: &Path,
    device: u64,
    removed: &mut dyn FnMut(&Path),
) -> Result<(), Failure> {
    let failed = |error: Errno| Failure::Io(path.to_owned(), error.into());
    for entry in Dir::read_from(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name == "." || name == ".." {
            continue;
        }
        let path = path.join(name);
        let failed = |error: Errno| Failure::Io(path.clone(), error.into());
        let mut flags = AtFlags::empty();
        if entry.file_type() == FileType::Directory {
            let inner = open(directory, name).map_err(failed)?;
            // Somebody's mount in our directory is not ours.
            if fstat(&inner).map_err(failed)?.st_dev != device {
                return Err(failed(Errno::XDEV));
            }
            empty(inner.as_fd(), &path, device, removed)?;
            flags = AtFlags::REMOVEDIR;
        }
        unlinkat(directory, name, flags).map_err(failed)?;
        removed(&path);
    }
    Ok(())
}

fn open(directory: impl AsFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_bpffs_is_left_alone() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("pin"), "").expect("writes");
        let outcome = remove_pins(folder.path(), &mut |path| panic!("{path:?} was removed"));
        assert!(matches!(outcome, Err(Failure::NoBpffs(_))), "{outcome:?}");
        assert!(folder.path().join("pin").exists());
    }

    #[test]
    fn a_directory_that_is_not_there_is_clean() {
        let folder = tempfile::tempdir().expect("a folder");
        let outcome = remove_pins(&folder.path().join("none"), &mut |_| {});
        assert!(matches!(outcome, Ok(0)), "{outcome:?}");
        let file = folder.path().join("file");
        std::fs::write(&file, "").expect("writes");
        assert!(matches!(remove_pins(&file, &mut |_| {}), Err(Failure::Io(..))));
    }
}
