//! Threads with a descriptor table of their own: what one process may have open (`ulimit -Hn`) does
//! not bound how many connections a test can have.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::netns::Host;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A thread on a host, and what it holds. Nothing with a descriptor in it may come in or go out:
/// its number means something else there. Dropping it closes all that it holds.
pub struct Holder<S> {
    jobs: Option<Sender<Job<S>>>,
    worker: Option<JoinHandle<()>>,
}

/// What [`Holder::begin`] began.
pub struct Begun<T>(Receiver<Result<T, Box<dyn Any + Send>>>);

impl<S: 'static> Holder<S> {
    /// A thread on `host` with what `make` makes there.
    ///
    /// # Panics
    /// `make` did, or the kernel refuses.
    #[track_caller]
    #[must_use]
    pub fn on(host: &Host, make: impl FnOnce() -> S + Send + 'static) -> Self {
        let (jobs, inbox) = channel::<Job<S>>();
        let worker = host.run(move || {
            std::thread::spawn(move || {
                // SAFETY: the table becomes this thread's own before anything in it is closed, and
                // this thread has no descriptor that was opened before.
                let status = unsafe { libc::close_range(3, u32::MAX, UNSHARE) };
                assert_eq!(status, 0, "close_range: {}", std::io::Error::last_os_error());
                let mut held = make();
                inbox.iter().for_each(|job| job(&mut held));
            })
        });
        Self { jobs: Some(jobs), worker: Some(worker) }
    }

    /// Has the thread do `job`, and does not wait for it.
    ///
    /// # Panics
    /// The thread has ended.
    #[track_caller]
    pub fn begin<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut S) -> T + Send + 'static,
    ) -> Begun<T> {
        let (tell, told) = channel();
        let job = Box::new(move |held: &mut S| {
            let _ = tell.send(catch_unwind(AssertUnwindSafe(|| job(held))));
        });
        let jobs = self.jobs.as_ref().expect("there until dropped");
        jobs.send(job).expect("the holder's thread lives");
        Begun(told)
    }

    /// Has the thread do `job`, and waits for the result. A panic in it goes on here.
    ///
    /// # Panics
    /// `job` did.
    #[track_caller]
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce(&mut S) -> T + Send + 'static) -> T {
        self.begin(job).end()
    }
}

impl<T> Begun<T> {
    /// Waits for the result. A panic in the job goes on here.
    ///
    /// # Panics
    /// The job did.
    #[track_caller]
    pub fn end(self) -> T {
        match self.0.recv().expect("the holder's thread answers") {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }
}

impl<S> Drop for Holder<S> {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

/// linux/close_range.h: not for the process's other threads. Linux 5.9.
const UNSHARE: i32 = 2;
