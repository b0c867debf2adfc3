//! Child processes that cannot outlive the test, and free ports for them.

use std::fs::{self, File};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;

use anyhow::{Context, Result, anyhow};
use rustix::process::{Signal, getppid, set_parent_process_death_signal};

/// How much of a log an error message quotes.
const TAIL_LINES: usize = 25;

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// The thread that forks all children of one server.
///
/// prctl(2): the parent-death signal comes when the *thread* that forked ends,
/// not the process. Were a child forked by whoever happens to call us, a server
/// started on a short-lived thread (a set-up helper, a pool's worker) would die
/// with that thread. This one ends with its server. It inherits the network
/// namespace of the thread that creates it, and so do the children.
pub(super) struct Nursery {
    jobs: mpsc::Sender<Job>,
}

impl Nursery {
    /// # Errors
    /// When the operating system refuses another thread.
    pub fn new() -> Result<Self> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("nursery".into())
            .spawn(move || {
                for (mut command, reply) in inbox {
                    // A failed send means that the caller is gone; dropping the
                    // result leaves the child to the parent-death signal.
                    let _ = reply.send(command.spawn());
                }
            })
            .context("start the thread that owns the child processes")?;
        Ok(Self { jobs })
    }

    /// Starts `command` with both outputs appended to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program cannot be executed.
    pub fn spawn(&self, name: &'static str, mut command: Command, log: &Path) -> Result<Process> {
        let output = File::options().create(true).append(true).open(log);
        let output = output.with_context(|| format!("open {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        die_with_parent(&mut command);

        let program = command.get_program().to_owned();
        let (reply, answer) = mpsc::channel();
        self.jobs.send((command, reply)).map_err(|_| anyhow!("the nursery thread is gone"))?;
        let child = answer
            .recv()
            .context("the nursery thread is gone")?
            .with_context(|| format!("execute {}", program.display()))?;
        Ok(Process { name, child, log: log.to_owned() })
    }
}

fn die_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: the closure runs in the forked child before exec. It owns nothing
    // but an integer and makes two system calls, which neither allocate nor
    // take locks that another thread may have held at the fork.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // A parent that died before the call above sends no signal any more.
            let orphaned = getppid().is_none_or(|pid| pid.as_raw_nonzero().get() as u32 != parent);
            if orphaned { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
        });
    }
}

/// A running child; dropping it kills it and waits until it is gone.
pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// # Errors
    /// When the child is not running any more; the message quotes its log.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().with_context(|| format!("wait for {}", self.name))? {
            None => Ok(()),
            Some(status) => Err(anyhow!("{} ended ({status})\n{}", self.name, self.log_tail())),
        }
    }

    /// The last lines of the child's output, under a heading.
    pub fn log_tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
        format!("--- end of {} ---\n{}", self.log.display(), tail.join("\n"))
    }

    /// The process id, of this child and no other: it stays reserved until the
    /// child has been waited for, which only `drop` and `check` do.
    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // std refuses to signal a child that was already waited for, so a
        // reused process id is never hit; the errors left mean it is gone.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where ports are sought: below the kernel's default ephemeral range (32768 on),
/// so that no outgoing connection takes the port of a server that is stopped for
/// a while, and below Kubernetes's node ports (30000 on).
const PORTS: std::ops::Range<u16> = 20_000..30_000;

/// `N` different loopback ports on which nothing listens at the moment.
///
/// # Errors
/// When a thousand random tries find too few.
pub(super) fn free_ports<const N: usize>() -> Result<[u16; N]> {
    // All listeners stay open until the end, which makes the ports different.
    let mut held = Vec::with_capacity(N);
    for _ in 0..1000 {
        if held.len() == N {
            break;
        }
        let random = RandomState::new().build_hasher().finish();
        let port = PORTS.start + (random % PORTS.len() as u64) as u16;
        held.extend(TcpListener::bind((Ipv4Addr::LOCALHOST, port)).ok().map(|l| (l, port)));
    }
    let ports: Vec<u16> = held.iter().map(|(_, port)| *port).collect();
    ports.try_into().map_err(|_| anyhow!("found no {N} free ports in {PORTS:?} on loopback"))
}
