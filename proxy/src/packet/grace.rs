//! Waiting until no kernel program can still be at work on what was just changed.
//!
//! tc programs run inside RCU read-side sections, and membarrier(2) with MEMBARRIER_CMD_GLOBAL
//! waits for a grace period of RCU (`synchronize_rcu`, kernel/sched/membarrier.c). It takes some
//! milliseconds of sleep, so one thread does it for all who wait.

use std::io;
use std::sync::mpsc::{Sender, channel};

use tokio::sync::oneshot;

/// The thread that waits.
#[derive(Debug, Clone)]
pub struct Grace {
    requests: Sender<oneshot::Sender<()>>,
}

impl Grace {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel has no membarrier (a seccomp profile may refuse it; kernels booted with
    /// `nohz_full` do), or no thread can be started.
    pub fn start() -> io::Result<Self> {
        synchronize()?;
        let (requests, inbox) = channel::<oneshot::Sender<()>>();
        std::thread::Builder::new().name("grace".into()).spawn(move || {
            while let Ok(first) = inbox.recv() {
                let mut waiting = vec![first];
                waiting.extend(inbox.try_iter());
                if synchronize().is_err() {
                    // It worked at the start; whoever waits gives up.
                    continue;
                }
                for sender in waiting {
                    let _ = sender.send(());
                }
            }
        })?;
        Ok(Self { requests })
    }

    /// Ends after a grace period that began after the call. False if there is none to be had.
    pub async fn pass(&self) -> bool {
        let (tell, told) = oneshot::channel();
        self.requests.send(tell).is_ok() && told.await.is_ok()
    }
}

/// Waits here and now.
///
/// # Errors
/// See [`Grace::start`].
pub fn synchronize() -> io::Result<()> {
    const MEMBARRIER_CMD_GLOBAL: i32 = 1;
    // SAFETY: the call touches no memory of ours.
    let status = unsafe { libc::syscall(libc::SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
