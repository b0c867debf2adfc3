//! What the kernel tells about a host: its TCP sockets, and the memory they hold.
//!
//! Read through `/proc/thread-self/net` on the host's own thread: `/proc/net` would be that of the
//! process's first thread, which is on another host.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::netns::Host;

/// A socket's state, as numbered in the kernel's `include/net/tcp_states.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are TCP's own")]
pub enum State {
    Established = 1,
    SynSent,
    SynReceived,
    FinWait1,
    FinWait2,
    TimeWait,
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
    NewSynReceived,
}

impl State {
    const ALL: [Self; 12] = [
        Self::Established,
        Self::SynSent,
        Self::SynReceived,
        Self::FinWait1,
        Self::FinWait2,
        Self::TimeWait,
        Self::Close,
        Self::CloseWait,
        Self::LastAck,
        Self::Listen,
        Self::Closing,
        Self::NewSynReceived,
    ];
}

/// A TCP socket of a host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Socket {
    /// Its own address; that of an IPv4 connection is IPv4 on an IPv6 socket, too.
    pub local: SocketAddr,
    /// The other end's; port 0 if there is none.
    pub remote: SocketAddr,
    /// Its state.
    pub state: State,
}

#[track_caller]
fn read(host: &Host, file: &str) -> String {
    host.read(&format!("/proc/thread-self/net/{file}"))
}

/// All TCP sockets of `host`, of both families, whoever owns them.
///
/// # Panics
/// The kernel does not tell.
#[track_caller]
#[must_use]
pub fn sockets(host: &Host) -> Vec<Socket> {
    let text = read(host, "tcp") + &read(host, "tcp6");
    text.lines().filter(|line| !line.contains("local_address")).map(socket).collect()
}

/// How many of them carry a connection: neither listening nor in TIME_WAIT, which is no more than
/// a memory of one.
///
/// # Panics
/// The kernel does not tell.
#[track_caller]
#[must_use]
pub fn connections(host: &Host) -> usize {
    let carries = |socket: &Socket| {
        !matches!(socket.state, State::Listen | State::TimeWait) && socket.remote.port() != 0
    };
    sockets(host).iter().filter(|socket| carries(socket)).count()
}

#[track_caller]
fn socket(line: &str) -> Socket {
    let columns: Vec<&str> = line.split_whitespace().collect();
    let parsed = || {
        let [local, remote] = [address(columns.get(1)?)?, address(columns.get(2)?)?];
        let state = usize::from_str_radix(columns.get(3)?, 16).ok()?;
        Some(Socket { local, remote, state: *State::ALL.get(state.checked_sub(1)?)? })
    };
    parsed().unwrap_or_else(|| panic!("not a line of /proc/net/tcp: {line}"))
}

/// `0100007F:1F90` is 127.0.0.1:8080: words of 32 bits, printed as this machine reads them.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for word in 0..ip.len() / 8 {
        let word = u32::from_str_radix(ip.get(word * 8..word * 8 + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?)),
        _ => Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical(),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

/// `/proc/net/sockstat`, above all TCP's line of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sockstat {
    /// Sockets of the host that exist, of every kind, whether or not anybody still holds them:
    /// [`Self::allocated`] for one host.
    pub used: u64,
    /// IPv4 sockets of the host in use.
    pub in_use: u64,
    /// Sockets that no process holds any more; of the whole machine.
    pub orphans: u64,
    /// TIME_WAIT sockets of the host.
    pub time_wait: u64,
    /// Allocated sockets of the whole machine.
    pub allocated: u64,
    /// Memory in socket buffers, in pages; of the whole machine.
    pub pages: u64,
}

/// What `host` counts.
///
/// # Panics
/// The kernel does not tell.
#[track_caller]
#[must_use]
pub fn sockstat(host: &Host) -> Sockstat {
    let text = read(host, "sockstat");
    let value_in = |line: &str, name: &str| {
        let line = text.lines().find_map(|text| text.strip_prefix(line)).unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        let at = words.iter().position(|word| *word == name);
        let value = at.and_then(|at| words.get(at + 1)?.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    let value = |name| value_in("TCP:", name);
    Sockstat {
        used: value_in("sockets:", "used"),
        in_use: value("inuse"),
        orphans: value("orphan"),
        time_wait: value("tw"),
        allocated: value("alloc"),
        pages: value("mem"),
    }
}

/// Connections that `host`'s conntrack knows, of every state. Those whose time is over are gone
/// after this, not only once the kernel comes round to them.
///
/// # Panics
/// The kernel does not tell.
#[track_caller]
#[must_use]
pub fn tracked(host: &Host) -> usize {
    read(host, "nf_conntrack").lines().filter(|line| line.contains(" tcp ")).count()
}

/// Major and minor number of the kernel's version.
///
/// # Panics
/// It does not begin with two numbers.
#[must_use]
pub fn kernel() -> (u32, u32) {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor),
        _ => panic!("not a kernel's version: {release}"),
    }
}

/// Whether programs can be on devices by TCX. Says so if they cannot: then they are filters, and
/// what a test is about TCX it does not show.
///
/// # Panics
/// As [`kernel`] does.
#[must_use]
pub fn has_tcx() -> bool {
    let has = kernel() >= (6, 6);
    if !has {
        eprintln!("not tested, this kernel lacks it: TCX");
    }
    has
}

/// MemAvailable of the whole machine, in bytes. Kernel memory that no counter of sockets shows is
/// missing from it.
///
/// # Panics
/// The kernel does not tell.
#[track_caller]
#[must_use]
pub fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").expect("/proc/meminfo");
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    kib.expect("MemAvailable") * 1024
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::peers::Peer;
    use crate::servers::Upstream;

    #[test]
    fn sockets_of_a_host_are_its_own() {
        let (one, two) = (Host::new("one"), Host::new("two"));
        let wire = one.join(&two, 12);
        for ip in [wire.v4(2), wire.v6(2)] {
            let upstream = two.run(move || Upstream::new(ip));
            let to = upstream.address();
            assert_eq!((connections(&one), connections(&two)), (0, 0));
            let client = one.run(move || Peer::connect(to));
            let server = upstream.accept();
            assert_eq!((connections(&one), connections(&two)), (1, 1));
            let (near, far) = (client.address(), server.address());
            let wanted = Socket { local: near, remote: far, state: State::Established };
            assert!(sockets(&one).contains(&wanted), "{:?}", sockets(&one));
            assert!(sockets(&two).iter().any(|s| s.local == to && s.state == State::Listen));
            assert!(!sockets(&one).iter().any(|s| s.state == State::Listen));
            drop((client, server));
            crate::wait::until("they are gone", || connections(&one) + connections(&two) == 0);
        }
        assert!(sockstat(&one).allocated > 0 && available_memory() > 1 << 20);
        assert_eq!(sockstat(&one).in_use, 0);
    }
}
