//! The socket's place in the file system.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use socket2::{Domain, SockAddr, Socket, Type};
use tracing::{info, warn};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 16;

/// A bound socket's name, which goes with this.
#[derive(Debug)]
pub struct Name {
    path: PathBuf,
    identity: Identity,
}

impl Drop for Name {
    fn drop(&mut self) {
        // A successor may have put its own there, or be about to: under the lock it is one or the
        // other. Who cannot have the lock leaves a leftover, which the next one replaces.
        let Ok(_directory) = locked_parent(&self.path) else { return };
        if identity(&self.path).is_ok_and(|now| now == self.identity) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Device, inode and when it was made: an inode's number is soon another file's.
type Identity = (u64, u64, i64, i64);

fn identity(path: &Path) -> io::Result<Identity> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino(), file.mtime(), file.mtime_nsec()))
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("another process serves it; it is taken over when that one ends")]
    Live,
    #[error("something else is there, which is no socket")]
    Foreign,
    #[error("another process is busy in its directory")]
    Locked,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// What came of a try to have the socket.
#[derive(Debug)]
pub enum Opened {
    /// It is ours.
    Bound(UnixListener, Name),
    /// Another process serves it, so it can be had later.
    Busy,
    /// It cannot be had.
    Never,
}

/// Binds the socket. Without one the proxy runs as well, so a failure is told in one line and no
/// more: as a warning if somebody else has the name, else as information, since few pods may
/// write to the default place.
#[must_use]
pub fn open(path: &Path) -> Opened {
    let shown = path.display();
    match bind(path) {
        Ok((listener, name)) => {
            info!(path = %shown, "admin socket listening");
            Opened::Bound(listener, name)
        }
        Err(failure @ Failure::Io(_)) => {
            info!(path = %shown, error = %failure, "no admin socket");
            Opened::Never
        }
        Err(failure) => {
            warn!(path = %shown, error = %failure, "no admin socket");
            if matches!(failure, Failure::Live) { Opened::Busy } else { Opened::Never }
        }
    }
}

/// Looks once more whether the socket is free by now; that it is not was told before.
#[must_use]
pub fn look_again(path: &Path) -> Opened {
    // Without the lock, which is for those who have something to change.
    if matches!(refuse_others(path), Err(Failure::Live)) {
        return Opened::Busy;
    }
    match bind(path) {
        // Another who waited was faster, or is just about to be.
        Err(Failure::Live | Failure::Locked) => Opened::Busy,
        Ok((listener, name)) => {
            info!(path = %path.display(), "admin socket listening: who served it has ended");
            Opened::Bound(listener, name)
        }
        Err(failure) => {
            warn!(path = %path.display(), error = %failure, "no admin socket");
            Opened::Never
        }
    }
}

fn bind(path: &Path) -> Result<(UnixListener, Name), Failure> {
    let parent = parent(path);
    DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
    // Two that start at once must not both find the same leftover: the second would remove what
    // the first has just bound.
    let _directory = locked_parent(path)?;
    let listener = match listen(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {
            refuse_others(path)?;
            fs::remove_file(path)?;
            listen(path)?
        }
        bound => bound?,
    };
    Ok((listener, Name { path: path.to_owned(), identity: identity(path)? }))
}

fn parent(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

/// The directory, locked until it is closed.
fn locked_parent(path: &Path) -> Result<File, Failure> {
    let directory = File::open(parent(path))?;
    lock(&directory)?;
    Ok(directory)
}

/// The lock is held for microseconds; whoever holds it for longer must not hold up our start.
fn lock(directory: &File) -> Result<(), Failure> {
    for _ in 0..50 {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) => std::thread::sleep(Duration::from_millis(10)),
            locked => return Ok(locked.map_err(io::Error::from)?),
        }
    }
    Err(Failure::Locked)
}

/// Only a socket that nobody listens on is a leftover.
fn refuse_others(path: &Path) -> Result<(), Failure> {
    if !fs::symlink_metadata(path)?.file_type().is_socket() {
        return Err(Failure::Foreign);
    }
    // Waiting for room in the queue of one that stands still could take for ever.
    let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?;
    match socket.connect(&SockAddr::unix(path)?) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() != ErrorKind::WouldBlock => Err(error.into()),
        // A full queue is somebody's, too.
        _ => Err(Failure::Live),
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // The kernel gives the name the socket's own mode, less the umask (unix_bind_bsd in
    // net/unix/af_unix.c), so there is no moment in which others may connect.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn folder() -> tempfile::TempDir {
        tempfile::tempdir().expect("a folder")
    }

    #[test]
    fn only_its_owner_may_connect_and_it_goes_with_its_name() {
        let folder = folder();
        let path = folder.path().join("new/admin.sock");
        let (_listener, name) = bind(&path).expect("binds");
        let mode = |path: &Path| fs::metadata(path).expect("there").permissions().mode() & 0o777;
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().expect("a parent")), 0o700);
        drop(name);
        assert!(!path.exists());
    }

    #[test]
    fn a_leftover_is_replaced_and_a_live_one_is_not() {
        let folder = folder();
        let path = folder.path().join("admin.sock");
        let (listener, name) = bind(&path).expect("binds");
        assert!(matches!(bind(&path), Err(Failure::Live)));
        // As SIGKILL leaves it: the name is there, the listener is not.
        drop(listener);
        let (_listener, _new) = bind(&path).expect("replaces it");
        drop(name);
        assert!(path.exists(), "the old one took the new one's name away");
        UnixStream::connect(&path).expect("the new one listens");
    }

    #[test]
    fn one_that_stands_still_holds_nobody_up() {
        let folder = folder();
        let path = folder.path().join("admin.sock");
        let (_listener, _name) = bind(&path).expect("binds");
        // Nobody accepts: from some time on the queue is full.
        for _ in 0..3 * BACKLOG {
            assert!(matches!(look_again(&path), Opened::Busy));
        }
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = folder();
        let path = folder.path().join("admin.sock");
        fs::write(&path, "precious").expect("writes");
        assert!(matches!(bind(&path), Err(Failure::Foreign)));
        assert_eq!(fs::read_to_string(&path).expect("reads"), "precious");
    }

    #[test]
    fn a_held_lock_is_no_reason_to_wait_for_ever() {
        let folder = folder();
        let holder = File::open(folder.path()).expect("opens");
        flock(&holder, FlockOperation::LockExclusive).expect("locks");
        assert!(matches!(bind(&folder.path().join("a")), Err(Failure::Locked)));
    }
}
