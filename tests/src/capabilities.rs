//! Programs that lack capabilities, as in a container.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use rustix::thread::{CapabilitySet, remove_capability_from_bounding_set};

/// Has `command` run with these capabilities and no others. Root without a capability in its
/// bounding set does not get it back by starting a program.
pub fn keep_capabilities(command: &mut Command, kept: CapabilitySet) {
    let dropped: Vec<CapabilitySet> = (CapabilitySet::all() - kept).iter().collect();
    // SAFETY: between fork and exec only system calls are made, and no memory is allocated.
    unsafe {
        command.pre_exec(move || {
            for &capability in &dropped {
                match remove_capability_from_bounding_set(capability) {
                    // An older kernel knows fewer of them.
                    Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            Ok(())
        });
    }
}
