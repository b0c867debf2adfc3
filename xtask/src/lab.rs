//! Three hosts made from network namespaces: client, node and server, joined by two wires.
//!
//! ```text
//! client .2 --198.18.1.0/24-- .1 node .1 --198.18.2.0/24-- .2 server
//! ```
//!
//! A host is a thread that lives in a namespace of its own. Nothing is named or mounted, so
//! nothing can be left behind: a namespace goes with the last thread and process in it, whichever
//! way the demo ends.

mod delay;

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use rustix::process::{Signal, WaitOptions, getpid, getppid, set_parent_process_death_signal};
use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};
use tokio::process::Child;
use tokio::runtime::Handle;

use crate::shell::which;

type Job = Box<dyn FnOnce() + Send>;

/// One host. Processes started on it end with it.
#[derive(Debug)]
pub struct Host {
    name: &'static str,
    thread: i32,
    jobs: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
}

/// The three hosts.
#[derive(Debug)]
pub struct Lab {
    /// Where the traffic begins.
    pub client: Host,
    /// Where the proxy runs; it routes between the other two as well.
    pub node: Host,
    /// Where the API server's stand-in runs.
    pub server: Host,
    /// Their addresses.
    pub plan: Plan,
}

/// Who is reached where.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The node, as the client reaches it.
    pub node: IpAddr,
    /// The server.
    pub server: IpAddr,
    /// The server's port; 0 for any.
    pub server_port: u16,
    /// The address of the first proxy's `--listen-addr`, and its port; 0 for any.
    listen: (&'static str, u16),
    /// The port of its `--admin-addr`; 0 for any.
    admin: u16,
}

impl Plan {
    /// `--listen-addr` and `--admin-addr` of one of several proxies.
    pub fn listen(&self, index: u16) -> (String, String) {
        let port = |first: u16| if first == 0 { 0 } else { first + index };
        let (address, first) = self.listen;
        (format!("{address}:{}", port(first)), format!("127.0.0.1:{}", port(self.admin)))
    }
}

/// From 198.18.0.0/15, which is set aside for such tests.
const NAMESPACES: Plan = Plan {
    node: IpAddr::V4(Ipv4Addr::new(198, 18, 1, 1)),
    server: IpAddr::V4(Ipv4Addr::new(198, 18, 2, 2)),
    server_port: 6443,
    listen: ("", 6443),
    admin: 6480,
};

const LOOPBACK: Plan = Plan {
    node: IpAddr::V4(Ipv4Addr::LOCALHOST),
    server: IpAddr::V4(Ipv4Addr::LOCALHOST),
    server_port: 0,
    listen: ("127.0.0.1", 0),
    admin: 0,
};

impl Lab {
    /// Hosts from namespaces. Needs root and the `ip` command.
    ///
    /// # Errors
    /// The first thing that this machine does not allow.
    pub fn from_namespaces() -> Result<Self> {
        let lab = Self::bare_namespaces()?;
        let wire = format!("link add node type veth peer name client netns {}", lab.node.thread);
        lab.client.ip(&wire)?;
        lab.join()
    }

    /// The same with a client that is far away: `round_trip` is what its wire takes both ways
    /// together.
    ///
    /// # Errors
    /// The first thing that this machine does not allow.
    pub fn with_far_client(round_trip: Duration) -> Result<Self> {
        let lab = Self::bare_namespaces()?;
        let wire = [(&lab.client, "node"), (&lab.node, "client")]
            .map(|(host, device)| host.run(move || delay::open(device)));
        let [one, other] = wire;
        delay::connect(one??, other??, round_trip / 2)?;
        lab.join()
    }

    fn bare_namespaces() -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "not root");
        Ok(Self {
            client: Host::new("client", true)?,
            node: Host::new("node", true)?,
            server: Host::new("server", true)?,
            plan: NAMESPACES,
        })
    }

    /// Addresses and routes; the client's wire is there.
    fn join(self) -> Result<Self> {
        let lab = self;
        lab.client.ip("link set lo up
             addr add 198.18.1.2/24 dev node
             link set node up
             route add default via 198.18.1.1")?;
        lab.node.ip(&format!(
            "link set lo up
             addr add 198.18.1.1/24 dev client
             link set client up
             link add server type veth peer name node netns {}
             addr add 198.18.2.1/24 dev server
             link set server up",
            lab.server.thread
        ))?;
        lab.server.ip("link set lo up
             addr add 198.18.2.2/24 dev node
             link set node up
             route add default via 198.18.2.1")?;
        // This file shows the namespace of the thread that opens it.
        let forward = || std::fs::write("/proc/sys/net/ipv4/ip_forward", "1");
        lab.node.run(forward)?.context("the node cannot be told to route")?;
        Ok(lab)
    }

    /// All three are this machine, over loopback.
    ///
    /// # Errors
    /// No more threads.
    pub fn on_loopback() -> Result<Self> {
        Ok(Self {
            client: Host::new("client", false)?,
            node: Host::new("node", false)?,
            server: Host::new("server", false)?,
            plan: LOOPBACK,
        })
    }
}

impl Host {
    fn new(name: &'static str, is_apart: bool) -> Result<Self> {
        let (jobs, inbox) = channel::<Job>();
        let (tell, told) = channel();
        let worker = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let entered = if is_apart { leave_namespace() } else { Ok(()) };
            let is_there = entered.is_ok();
            let thread = gettid().as_raw_nonzero().get();
            if tell.send(entered.map(|()| thread)).is_ok() && is_there {
                inbox.iter().for_each(|job| job());
            }
        })?;
        let thread = told.recv()?.context("no network namespace can be made")?;
        Ok(Self { name, thread, jobs: Some(jobs), worker: Some(worker) })
    }

    /// Runs `job` on this host and waits for its result. Threads and processes that it starts,
    /// and sockets that it makes, are on this host as well.
    ///
    /// # Errors
    /// `job` panicked.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (tell, told) = channel();
        let job: Job = Box::new(move || {
            let _ = tell.send(job());
        });
        let jobs = self.jobs.as_ref().context("the host is gone")?;
        jobs.send(job).map_err(|_| anyhow!("host {} has ended", self.name))?;
        told.recv().with_context(|| format!("host {} has failed", self.name))
    }

    /// Starts a process on this host, from within a runtime. See [`spawn_here`].
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, command: tokio::process::Command) -> Result<Child> {
        let runtime = Handle::current();
        self.run(move || {
            let _entered = runtime.enter();
            spawn_here(command)
        })?
    }

    /// Runs lines of `ip` commands on this host.
    fn ip(&self, lines: &str) -> Result<()> {
        let program = which("ip").context("no ip command (package iproute2)")?;
        let lines = lines.to_owned();
        let job = move || -> std::io::Result<_> {
            let mut ip = Command::new(program)
                .args(["-batch", "-"])
                .stdin(Stdio::piped())
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()?;
            if let Some(mut input) = ip.stdin.take() {
                input.write_all(lines.as_bytes())?;
            }
            ip.wait_with_output()
        };
        let output = self.run(job)?.context("ip")?;
        if !output.status.success() {
            let message = String::from_utf8_lossy(&output.stderr);
            bail!("ip on host {}: {}", self.name, message.trim().replace('\n', "; "));
        }
        Ok(())
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
    }
}

fn leave_namespace() -> rustix::io::Result<()> {
    // SAFETY: only the network namespace of this one thread changes; memory, descriptors and
    // whatever else threads rely on stay shared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
}

/// Starts a process that ends with its handle, and with the thread that calls this (so it also
/// goes if we are killed). It is in a process group of its own: Ctrl-C reaches us alone, and we
/// end it.
///
/// # Errors
/// It cannot be started.
pub fn spawn_here(mut command: tokio::process::Command) -> Result<Child> {
    let parent = getpid();
    let die_with_parent = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // Had the parent died before that call, its death would go unnoticed.
        if getppid() == Some(parent) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: between fork and exec the closure makes two system calls and touches no memory
    // but its own; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(die_with_parent) };
    command.kill_on_drop(true).process_group(0).stdin(Stdio::null());
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    command.spawn().with_context(|| format!("cannot start {program}"))
}

/// Collects what has ended of the processes that were started here, and waits a moment for the
/// rest: in a container there may be no one else to do so.
pub fn reap() {
    for _ in 0..100 {
        while let Ok(Some(_)) = rustix::process::wait(WaitOptions::NOHANG) {}
        if rustix::process::wait(WaitOptions::NOHANG).is_err() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
