//! Files on a bpffs that keep TCX links alive after their process.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::super::netlink::context;
use super::{Hook, tcx};

/// The file for a link. No two programs have one number while the kernel runs, so no earlier
/// process has used this name.
pub(super) fn path(dir: &Path, hook: Hook, index: u32, program: u32) -> PathBuf {
    dir.join(format!("{}-{index}-{program}", hook.program()))
}

/// Ends the links pinned in a folder, except those to keep. How many. A folder that does not
/// exist has none.
pub(super) fn remove(dir: &Path, is_kept: impl Fn(&Path) -> bool) -> io::Result<usize> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        other => other.map_err(context(dir.display()))?,
    };
    let mut removed = 0;
    for entry in entries {
        let path = entry?.path();
        if !is_pin(&path) || is_kept(&path) {
            continue;
        }
        // At once, and not when a process that still has it open ends.
        tcx::open(&path).and_then(tcx::detach).map_err(context(path.display()))?;
        fs::remove_file(&path).map_err(context(path.display()))?;
        removed += 1;
    }
    Ok(removed)
}

/// Whether it has a name that [`path`] makes.
fn is_pin(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    Hook::ALL.iter().any(|hook| {
        let numbers = name.strip_prefix(hook.program()).and_then(|rest| rest.strip_prefix('-'));
        let numbers = numbers.and_then(|numbers| numbers.split_once('-'));
        numbers.is_some_and(|(index, program)| {
            index.parse::<u32>().is_ok() && program.parse::<u32>().is_ok()
        })
    })
}

/// Removes the file, if there is one.
pub(super) fn unpin(path: Option<&Path>) -> io::Result<()> {
    match path.map(fs::remove_file) {
        Some(Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_own_pins_are_known() {
        for ours in ["/a/packet_gate_in-3-17", "packet_gate_out-12-4000000000"] {
            assert!(is_pin(Path::new(ours)), "{ours}");
        }
        for other in ["/a/packet_gate_in", "packet_gate_in-3", "packet_gate_out-x-1", "STAGES", "/"]
        {
            assert!(!is_pin(Path::new(other)), "{other}");
        }
    }
}
