//! TCX: programs as links on a device's hook (Linux 6.6). They run before every clsact filter.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use aya::programs::tc::TcAttachOptions;
use aya::programs::{LinkOrder, MultiProgLink, ProgramError, SchedClassifier};

use super::Hook;

/// Attaches the program in front of all others; the link, which holds it there while it is open
/// or pinned. None: this kernel has no TCX.
pub(super) fn attach(
    program: &mut SchedClassifier,
    name: &str,
    hook: Hook,
) -> Result<Option<OwnedFd>, ProgramError> {
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = match program.attach_with_options(name, hook.into(), options) {
        Err(ProgramError::SyscallError(error)) if is_unknown(&error.io_error) => return Ok(None),
        other => other?,
    };
    // From here on it is ours alone: aya's own handle on it closes, and with it nothing ends.
    let link = program.take_link(id)?;
    let fd = link.fd().map_err(|error| ProgramError::IOError(io::Error::other(error)))?;
    Ok(Some(fd.try_clone_to_owned().map_err(ProgramError::IOError)?))
}

/// What kernels say to an attach type that they do not know.
fn is_unknown(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::E2BIG | libc::ENOSYS)
    )
}

/// Ids of the programs on a hook, in the order in which they run. None on a kernel without TCX.
pub(super) fn programs(index: u32, hook: Hook) -> io::Result<Vec<u32>> {
    // BPF_MPROG_MAX: a hook holds no more.
    let mut ids = [0u32; 64];
    let mut query = Query {
        ifindex: index,
        attach_type: match hook {
            Hook::Ingress => 46,
            Hook::Egress => 47,
        },
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..Query::default()
    };
    // SAFETY: the kernel writes at most `count` numbers into `ids`, which outlives the call.
    match unsafe { bpf(PROG_QUERY, &mut query) } {
        Ok(_) => Ok(ids[..query.count as usize].to_vec()),
        // Nobody was ever there, or there is no TCX.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) || is_unknown(&error) => {
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Ids of the programs of the socket lookup in a network namespace.
pub(super) fn lookups(namespace: impl AsFd) -> io::Result<Vec<u32>> {
    const SK_LOOKUP: u32 = 36;
    // MAX_SK_LOOKUP_PROGS is 64 as well.
    let mut ids = [0u32; 64];
    let mut query = Query {
        ifindex: namespace.as_fd().as_raw_fd() as u32,
        attach_type: SK_LOOKUP,
        ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..Query::default()
    };
    // SAFETY: as above.
    unsafe { bpf(PROG_QUERY, &mut query) }?;
    Ok(ids[..query.count as usize].to_vec())
}

/// Keeps a link alive by a file, which must be on a bpffs.
pub(super) fn pin(link: &OwnedFd, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut object =
        Object { path: path.as_ptr() as u64, fd: link.as_raw_fd() as u32, ..Object::default() };
    // SAFETY: the kernel reads the path, which outlives the call.
    unsafe { bpf(OBJ_PIN, &mut object) }.map(drop)
}

/// Opens what is pinned there.
pub(super) fn open(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut object = Object { path: path.as_ptr() as u64, ..Object::default() };
    // SAFETY: the kernel reads the path, which outlives the call.
    let fd = unsafe { bpf(OBJ_GET, &mut object) }?;
    // SAFETY: the kernel made this descriptor for us just now.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Takes the program off its device at once, whoever else has the link open or pinned. Fine if it
/// is off already.
pub(super) fn detach(link: impl AsFd) -> io::Result<()> {
    let mut words = [link.as_fd().as_raw_fd() as u32, 0];
    // SAFETY: there are no pointers in this one.
    unsafe { bpf(LINK_DETACH, &mut words) }.map(drop)
}

// linux/bpf.h, enum bpf_cmd.
const OBJ_PIN: i32 = 6;
const OBJ_GET: i32 = 7;
const PROG_QUERY: i32 = 16;
const LINK_DETACH: i32 = 34;

/// `query` in union bpf_attr.
#[repr(C)]
#[derive(Default)]
struct Query {
    /// Or another target's descriptor.
    ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    ids: u64,
    count: u32,
    padding: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// For OBJ_PIN and OBJ_GET in union bpf_attr.
#[repr(C)]
#[derive(Default)]
struct Object {
    path: u64,
    fd: u32,
    flags: u32,
}

/// # Safety
/// `attribute` is what the command wants, without bytes that are not set, and its pointers hold.
unsafe fn bpf<T>(command: i32, attribute: &mut T) -> io::Result<i32> {
    // SAFETY: the kernel reads and writes no more than the size given; the rest is the caller's.
    let result =
        unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attribute, size_of::<T>()) };
    match result {
        // Descriptors fit; other commands return 0.
        result if result >= 0 => Ok(result as i32),
        _ => Err(io::Error::last_os_error()),
    }
}
