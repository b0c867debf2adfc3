//! Hosts made from network namespaces: each one thread that lives in its own, joined by veth.
//!
//! Nothing is named or mounted, so nothing can be left behind: a namespace goes with the last
//! thread, process or socket in it, also when a test is killed. Needs root and the `ip` command.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use rustix::thread::{UnshareFlags, gettid, unshare_unsafe};

use crate::wait::until;

type Job = Box<dyn FnOnce() + Send>;

/// One host. Dropping it ends its thread; processes started in it end with that thread.
#[derive(Debug)]
pub struct Host {
    name: String,
    thread: i32,
    jobs: Option<Sender<Job>>,
    worker: Option<JoinHandle<()>>,
}

impl Host {
    /// A host with nothing but loopback (127.0.0.1 and ::1), which is up.
    ///
    /// # Panics
    /// No root, or no `ip` command.
    #[track_caller]
    #[must_use]
    pub fn new(name: &str) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "this test makes hosts from network namespaces and needs root (CAP_SYS_ADMIN)"
        );
        let (jobs, inbox) = channel::<Job>();
        let (tell, told) = channel();
        let worker = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // SAFETY: of this thread only the network namespace changes; no file descriptor
            // table or memory that other threads rely on is unshared.
            let entered = unsafe { unshare_unsafe(UnshareFlags::NEWNET) };
            let thread = entered.map(|()| gettid().as_raw_nonzero().get());
            if tell.send(thread).is_ok() && entered.is_ok() {
                inbox.iter().for_each(|job| job());
            }
        });
        let worker = worker.expect("a thread");
        let thread = match told.recv() {
            Ok(Ok(thread)) => thread,
            other => panic!("a network namespace for {name} cannot be made: {other:?}"),
        };
        let host = Self { name: name.to_owned(), thread, jobs: Some(jobs), worker: Some(worker) };
        host.ip("link set lo up");
        host
    }

    /// Runs `job` on this host and waits for its result; threads and processes that it starts
    /// are on this host, too. A panic in it goes on here.
    ///
    /// # Panics
    /// `job` did.
    #[track_caller]
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> T {
        let (tell, told) = channel();
        let job = Box::new(move || {
            let _ = tell.send(catch_unwind(AssertUnwindSafe(job)));
        });
        let jobs = self.jobs.as_ref().expect("there until dropped");
        jobs.send(job).expect("the host's thread lives");
        match told.recv().expect("the host's thread answers") {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        }
    }

    /// What the host is called in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `ip` with `arguments` (separated by spaces) on this host.
    ///
    /// # Panics
    /// It fails; the message is its own.
    #[track_caller]
    pub fn ip(&self, arguments: &str) {
        if let Err(error) = self.try_ip(arguments) {
            panic!("on {}: ip {arguments}: {error}", self.name);
        }
    }

    /// What `ip` says if it fails.
    ///
    /// # Errors
    /// Just that.
    ///
    /// # Panics
    /// There is no such command.
    #[track_caller]
    pub fn try_ip(&self, arguments: &str) -> Result<(), String> {
        let words: Vec<String> = arguments.split_whitespace().map(str::to_owned).collect();
        let output = self.run(move || Command::new("ip").args(words).output());
        let output = output.unwrap_or_else(|e| panic!("the ip command (iproute2): {e}"));
        let error = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        if output.status.success() { Ok(()) } else { Err(error) }
    }

    /// The text of a file that says something else on each host. (Such as those in
    /// `/proc/thread-self/net`; `/proc/net` is that of the process's first thread.)
    ///
    /// # Panics
    /// It cannot be read.
    #[track_caller]
    #[must_use]
    pub fn read(&self, path: &str) -> String {
        let file = path.to_owned();
        let text = self.run(move || std::fs::read_to_string(file));
        text.unwrap_or_else(|error| panic!("on {}: {path}: {error}", self.name))
    }

    /// Sets `net.<name>` (as in `ipv4.tcp_wmem`) to `value` on this host alone.
    ///
    /// # Panics
    /// The kernel refuses, or has no such setting.
    #[track_caller]
    pub fn sysctl(&self, name: &str, value: &str) {
        let path = format!("/proc/sys/net/{}", name.replace('.', "/"));
        let (file, text) = (path.clone(), value.to_owned());
        if let Err(error) = self.run(move || std::fs::write(file, text)) {
            panic!("on {}: {path} = {value:?}: {error}", self.name);
        }
    }

    /// Gives programs started on this host from here on a bpffs of their own at `bpffs`, a directory
    /// that exists, and an empty /run. Both end with the host.
    ///
    /// # Panics
    /// The kernel refuses, or has no bpffs.
    #[track_caller]
    pub fn mount_own(&self, bpffs: &std::path::Path) {
        let bpffs = bpffs.to_owned();
        self.run(move || {
            // SAFETY: of this thread alone; CLONE_FS, which comes along, means that its working
            // directory is its own from here on.
            unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.expect("a mount namespace");
            let mount = |arguments: &[&std::ffi::OsStr]| {
                let status = Command::new("mount").args(arguments).status();
                assert!(status.is_ok_and(|status| status.success()), "mount {arguments:?}");
            };
            mount(&["--make-rprivate".as_ref(), "/".as_ref()]);
            mount(&["-t".as_ref(), "bpf".as_ref(), "bpf".as_ref(), bpffs.as_ref()]);
            mount(&["-t".as_ref(), "tmpfs".as_ref(), "tmpfs".as_ref(), "/run".as_ref()]);
        });
    }

    /// Runs a program on this host, and returns its stdout.
    ///
    /// # Panics
    /// It fails; the message is its own.
    #[track_caller]
    pub fn output(&self, program: &str, arguments: &[&str]) -> String {
        let (name, words) = (program.to_owned(), arguments.iter().map(|&word| word.to_owned()));
        let words: Vec<String> = words.collect();
        let output = self.run(move || Command::new(name).args(words).output());
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        let error = String::from_utf8_lossy(&output.stderr);
        let host = &self.name;
        assert!(output.status.success(), "on {host}: {program} {arguments:?}: {error}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Joins this host and `other` by a wire. On it, this host is 10.`net`.0.1 and fd00:`net`::1,
    /// the other 10.`net`.0.2 and fd00:`net`::2; both call their device `wire<net>`.
    ///
    /// # Panics
    /// `ip` fails, for example because the number is used already.
    #[track_caller]
    pub fn join(&self, other: &Host, net: u8) -> Wire {
        let peer = other.thread;
        self.ip(&format!("link add wire{net} type veth peer name wire{net} netns {peer}"));
        self.plug(net, 1);
        other.plug(net, 2);
        let wire = Wire { net };
        wire.settle(self, other);
        wire
    }

    /// As [`Self::join`], by frames with VLAN tag `net` on a `wire` that joins the two already. None
    /// where the kernel has no VLAN devices, and a line that says so.
    ///
    /// # Panics
    /// `ip` fails, for example because the number is used already.
    #[track_caller]
    #[must_use]
    pub fn join_tagged(&self, other: &Self, wire: Wire, net: u8) -> Option<Wire> {
        let below = wire.device();
        let link = format!("link add link {below} name wire{net} type vlan id {net}");
        if let Err(error) = self.try_ip(&link) {
            assert!(error.contains("Unknown device type"), "on {}: {error}", self.name);
            eprintln!("not tested, this kernel has no VLAN devices (module 8021q): {error}");
            return None;
        }
        other.ip(&link);
        self.plug(net, 1);
        other.plug(net, 2);
        let wire = Wire { net };
        wire.settle(self, other);
        Some(wire)
    }

    /// Gives this host's device of wire `net` the addresses of its end, and takes it up.
    #[track_caller]
    pub(crate) fn plug(&self, net: u8, end: u8) {
        self.ip(&format!("addr add 10.{net}.0.{end}/24 dev wire{net}"));
        // Without nodad an address is no use for a second.
        self.ip(&format!("-6 addr add fd00:{net}::{end}/64 dev wire{net} nodad"));
        self.ip(&format!("link set wire{net} up"));
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

/// A wire between two hosts.
#[derive(Debug, Clone, Copy)]
pub struct Wire {
    net: u8,
}

impl Wire {
    pub(crate) fn numbered(net: u8) -> Self {
        Self { net }
    }

    /// Waits until each host knows its IPv6 address as its own: the kernel adds that route some
    /// time after the device is up, and looks for the address on the wire until then.
    #[track_caller]
    pub(crate) fn settle(self, one: &Host, other: &Host) {
        for (host, end) in [(one, 1), (other, 2)] {
            let IpAddr::V6(ip) = self.v6(end) else { unreachable!("v6 is IPv6") };
            let digits: String = ip.octets().iter().map(|byte| format!("{byte:02x}")).collect();
            until(&format!("{ip} is {}'s own", host.name), || {
                let routes = host.read("/proc/thread-self/net/ipv6_route");
                routes.lines().any(|line| is_local(line, &digits))
            });
        }
    }

    /// The name of the device at either end.
    #[must_use]
    pub fn device(self) -> String {
        format!("wire{}", self.net)
    }

    /// IPv4 address of end 1 (who called [`Host::join`]) or 2.
    #[must_use]
    pub fn v4(self, end: u8) -> IpAddr {
        Ipv4Addr::new(10, self.net, 0, end).into()
    }

    /// IPv6 address of end 1 (who called [`Host::join`]) or 2.
    #[must_use]
    pub fn v6(self, end: u8) -> IpAddr {
        // The number is read as hexadecimal digits in `join`.
        let net = u16::from_str_radix(&self.net.to_string(), 16).expect("digits");
        Ipv6Addr::new(0xfd00, net, 0, 0, 0, 0, 0, u16::from(end)).into()
    }
}

/// Whether this line of `/proc/net/ipv6_route` says that the address is the host's own. Its
/// columns are destination, prefix length, source, prefix length, next hop, metric, references,
/// uses, flags and device; RTF_LOCAL is the highest flag.
fn is_local(line: &str, digits: &str) -> bool {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let flags = columns.get(8).and_then(|flags| u32::from_str_radix(flags, 16).ok());
    columns[..2] == [digits, "80"] && flags.is_some_and(|flags| flags & 0x8000_0000 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::Peer;
    use crate::servers::Upstream;

    #[test]
    fn hosts_reach_each_other_over_both_families() {
        let (one, two) = (Host::new("one"), Host::new("two"));
        let wire = one.join(&two, 12);
        for ip in [wire.v4(2), wire.v6(2)] {
            let upstream = two.run(move || Upstream::new(ip));
            let to = upstream.address();
            let client = one.run(move || Peer::connect(to));
            let server = upstream.accept();
            client.send(b"through the wire");
            server.receive(b"through the wire");
        }
    }

    #[test]
    #[should_panic(expected = "on the other side")]
    fn a_panic_on_a_host_fails_the_test() {
        Host::new("one").run(|| panic!("on the other side"));
    }
}
