//! Verb `cleanup`: removes what kernel engines have left in the kernel.
//!
//! Pins live in a bpffs and outlast every process, on purpose, and so do filters on devices and
//! settings; this is how they end. Connections that the kernel still relays are reset, so that
//! their ends learn of it at once. Nothing is touched while a proxy runs that needs it.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, fstat, fstatfs, openat, unlinkat};
use rustix::io::Errno;

use crate::cli::CleanupFlags;
use crate::packet::{self, attach, pins, ports};

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
    let mut told = false;
    let outcome = remove_all(&flags.bpffs, &mut |what| {
        told = true;
        let _ = writeln!(stdout, "{what}");
    });
    match outcome {
        Ok(()) => {
            let existing = pins::existing(&flags.bpffs);
            let (bpffs, existing_at) = (flags.bpffs.display(), existing.display());
            // A path on another file system that exists was refused above.
            let has_bpffs = pins::is_bpffs(existing).unwrap_or(true);
            let mut stdout = io::stdout();
            let _ = match (told, has_bpffs) {
                (true, true) => Ok(()),
                (false, true) => {
                    writeln!(stdout, "nothing is left, on devices, in settings, at {bpffs}")
                }
                (_, false) => writeln!(
                    stdout,
                    "nothing {}is left, on devices, in settings; there may be pins, which were not \
                     looked at: no bpffs is mounted at {existing_at} (--bpffs={bpffs})",
                    if told { "else " } else { "" }
                ),
            };
            ExitCode::SUCCESS
        }
        Err(failure) => {
            let _ = writeln!(io::stderr(), "steward-tcp-proxy: {failure:#}");
            ExitCode::FAILURE
        }
    }
}

/// Removes it all, telling line by line. What can be harmed comes last: as long as a directory is
/// not known to be pins, nothing is done.
fn remove_all(bpffs: &Path, tell: &mut dyn FnMut(&str)) -> anyhow::Result<()> {
    let directory = check(bpffs)?;
    let Some(_alone) = pins::be_alone().context("/proc")? else {
        bail!(
            "a proxy runs the packet engine in this network namespace: end it first (with \
             pins its connections go on until the clean-up, without they end with it); nothing \
             was removed"
        );
    };
    // Of other network namespaces, whose proxies use this bpffs as well.
    let mut locks = Vec::new();
    if directory.is_some() {
        for used in pins::all(bpffs)? {
            match pins::lock(&used).with_context(|| used.display().to_string())? {
                Some(lock) => locks.push(lock),
                None => bail!("a proxy uses {}; nothing was removed", used.display()),
            }
        }
    }
    let ours = pins::directory(bpffs)?;
    let ended = packet::end_all_pinned(&ours).context("connections")?;
    if ended > 0 {
        tell(&format!("reset {}", number_of(ended, "connection")));
    }
    let detached = attach::remove_all(Some(&ours)).context("programs on devices")?;
    if detached > 0 {
        tell(&format!("removed {} from devices", number_of(detached, "program")));
    }
    if ports::release_reservation(ports::note().as_deref()).context("reserved ports")? {
        tell("gave back reserved ports (net.ipv4.ip_local_reserved_ports)");
    }
    remove_pins(bpffs, &mut |path| tell(&format!("removed {}", path.display())))?;
    Ok(())
}

fn number_of(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// Opens the directory, which must be on a bpffs and not all of it. `None` if it is not there.
fn check(directory: &Path) -> Result<Option<OwnedFd>, Failure> {
    let failed = |error: Errno| Failure::Io(directory.to_owned(), error.into());
    let opened = match open(CWD, directory.as_os_str()) {
        Err(Errno::NOENT) => return Ok(None),
        opened => opened.map_err(failed)?,
    };
    // The magic is a 32-bit number in a type that differs by architecture.
    if fstatfs(&opened).map_err(failed)?.f_type as u32 != pins::BPF_FS_MAGIC {
        return Err(Failure::NoBpffs(directory.to_owned()));
    }
    if fstat(&opened).map_err(failed)?.st_ino == ROOT {
        return Err(Failure::Root(directory.to_owned()));
    }
    Ok(Some(opened))
}

/// Removes everything in `directory`, which must be on a bpffs, and the directory itself. Calls
/// `removed` with each path that is gone; how many that were. A directory that is not there is
/// no failure.
///
/// # Errors
/// It is no such directory, or something cannot be removed; the rest then stays.
pub fn remove_pins(directory: &Path, removed: &mut dyn FnMut(&Path)) -> Result<usize, Failure> {
    let failed = |error: Errno| Failure::Io(directory.to_owned(), error.into());
    let Some(opened) = check(directory)? else { return Ok(0) };
    let device = fstat(&opened).map_err(failed)?;
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
