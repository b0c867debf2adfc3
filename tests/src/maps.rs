//! The bpf maps that a process holds: what the kernel says they cost, and what is in them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::process::Watched;

/// Commands of bpf(2), from linux/bpf.h.
const MAP_LOOKUP_ELEM: i64 = 1;
const MAP_GET_NEXT_KEY: i64 = 4;
const MAP_GET_FD_BY_ID: i64 = 14;
const OBJ_GET_INFO_BY_FD: i64 = 15;

/// A map, held open: it stays as long as this does.
#[derive(Debug)]
pub struct BpfMap {
    /// As the object calls it.
    pub name: String,
    key_size: usize,
    value_size: usize,
    fd: OwnedFd,
}

/// The beginning of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
    name: [u8; 16],
}

/// `union bpf_attr` of the commands on elements.
#[repr(C)]
#[derive(Default)]
struct Element {
    map: u32,
    padding: u32,
    key: u64,
    value_or_next_key: u64,
    flags: u64,
}

/// `union bpf_attr` of OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct Question {
    fd: u32,
    length: u32,
    info: u64,
}

fn bpf<T>(command: i64, attribute: &T) -> io::Result<i32> {
    let size = size_of::<T>();
    // SAFETY: the attribute is what the command wants, and the buffers that it points to live in
    // the caller for the time of the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attribute, size) };
    match i32::try_from(result) {
        Ok(result) if result >= 0 => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Numbers of the maps that `process` holds, and bytes of the kernel's memory for each. Kernels
/// before 6.4 say what a full map would take.
///
/// # Panics
/// The process is gone.
#[track_caller]
#[must_use]
pub fn of(process: Watched) -> BTreeMap<u32, u64> {
    let folder = format!("/proc/{}/fdinfo", process.id());
    let files = fs::read_dir(&folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let texts = files.filter_map(|file| fs::read_to_string(file.ok()?.path()).ok());
    texts
        .filter_map(|text| {
            let id = number(&text, "map_id:")?;
            Some((u32::try_from(id).ok()?, number(&text, "memlock:")?))
        })
        .collect()
}

fn number(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name))?.trim().parse().ok()
}

/// The map that `process` holds under this name.
///
/// # Panics
/// It holds none.
#[track_caller]
#[must_use]
pub fn named(process: Watched, name: &str) -> BpfMap {
    let mut maps = of(process).into_keys().filter_map(|id| BpfMap::open(id).ok());
    maps.find(|map| map.name == name).unwrap_or_else(|| panic!("no map {name}"))
}

/// Whether the kernel still has a map of this number.
#[must_use]
pub fn is_there(id: u32) -> bool {
    BpfMap::open(id).is_ok()
}

impl BpfMap {
    fn open(id: u32) -> io::Result<Self> {
        let fd = bpf(MAP_GET_FD_BY_ID, &[id, 0, 0])?;
        // SAFETY: the kernel just made it for us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut info = Info::default();
        let question = Question {
            fd: fd.as_raw_fd() as u32,
            length: size_of::<Info>() as u32,
            info: &raw mut info as u64,
        };
        bpf(OBJ_GET_INFO_BY_FD, &question)?;
        let name = String::from_utf8_lossy(&info.name).trim_end_matches('\0').to_owned();
        let (key_size, value_size) = (info.key_size as usize, info.value_size as usize);
        Ok(Self { name, key_size, value_size, fd })
    }

    /// See [`of`].
    ///
    /// # Panics
    /// The kernel does not tell.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        let path = format!("/proc/self/fdinfo/{}", self.fd.as_raw_fd());
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        number(&text, "memlock:").expect("a size")
    }

    fn element(&self, key: Option<&[u8]>, other: &mut [u8]) -> Element {
        Element {
            map: self.fd.as_raw_fd() as u32,
            key: key.map_or(0, |key| key.as_ptr() as u64),
            value_or_next_key: other.as_mut_ptr() as u64,
            ..Element::default()
        }
    }

    /// The values of all entries. Nobody may change the map meanwhile.
    ///
    /// # Panics
    /// The kernel refuses.
    #[track_caller]
    #[must_use]
    pub fn values(&self) -> Vec<Vec<u8>> {
        let mut values = Vec::new();
        let mut key: Option<Vec<u8>> = None;
        loop {
            let mut next = vec![0; self.key_size];
            match bpf(MAP_GET_NEXT_KEY, &self.element(key.as_deref(), &mut next)) {
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return values,
                Err(error) => panic!("keys of {}: {error}", self.name),
            }
            let mut value = vec![0; self.value_size];
            match bpf(MAP_LOOKUP_ELEM, &self.element(Some(&next), &mut value)) {
                Ok(_) => values.push(value),
                Err(error) => panic!("values of {}: {error}", self.name),
            }
            key = Some(next);
        }
    }
}
