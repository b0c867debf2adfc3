//! Three hosts for the self-test: a client's, ours, and a server's, each a network namespace, with
//! a wire from ours to either of the others.
//!
//! All by one thread: a socket belongs for ever to the namespace in which its thread was when it
//! was made. Nothing has a name outside, so all of it goes with the thread and its sockets.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use crate::packet::netlink::{Body, Netlink, context};
use crate::packet::routes;

/// The kernel's part of bringing a wire up takes a millisecond or so.
const READY_WITHIN: Duration = Duration::from_secs(2);

/// Loopback is the first device of a namespace.
const LOOPBACK: u32 = 1;
/// Numbers of the wires' devices, higher than those that the kernel may have given to tunnels of
/// its own. The two of a wire differ: where they are alike, the kernel takes up to a second to
/// notice that a carrier came (`linkwatch_urgent_event`).
const CLIENT_WIRE: u32 = 1001;
const SERVER_WIRE: u32 = 1002;
const FAR: u32 = 100;

/// Prefix lengths.
const BITS_V4: u8 = 30;
const BITS_V6: u8 = 64;

/// linux/veth.h.
const VETH_INFO_PEER: u16 = 1;
/// linux/if_link.h and if_addr.h, where libc lacks them or has them with other types.
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_DATA: u16 = 2;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 0x02;

/// The other end of a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

impl End {
    /// The number of its device, or of ours towards it.
    fn wire(self, is_far: bool) -> u32 {
        let near = match self {
            Self::Client => CLIENT_WIRE,
            Self::Server => SERVER_WIRE,
        };
        if is_far { near + FAR } else { near }
    }
}

/// The hosts. The thread that made them is on ours.
pub(super) struct Ground {
    client: File,
    server: File,
    node: File,
    /// Whether there is IPv6.
    pub(super) has_v6: bool,
}

impl Ground {
    /// Makes everything; from then on the calling thread is in a namespace of its own.
    pub(super) fn make() -> io::Result<Self> {
        let (client, server, node) = (host()?, host()?, host()?);
        let mut ground = Self { client, server, node, has_v6: true };
        let mut netlink = Netlink::open()?;
        bring_up(&mut netlink, LOOPBACK)?;
        join(&mut netlink, End::Client, "client", &ground.client)?;
        join(&mut netlink, End::Server, "server", &ground.server)?;
        let mut at_client = ground.at(End::Client, Netlink::open)?;
        let mut at_server = ground.at(End::Server, Netlink::open)?;
        for end in [End::Client, End::Server] {
            let far = if end == End::Client { &mut at_client } else { &mut at_server };
            for (netlink, is_far) in [(&mut netlink, false), (far, true)] {
                bring_up(netlink, end.wire(is_far))?;
                ground.has_v6 &= address(netlink, end, is_far)?;
            }
        }
        for netlink in [&mut netlink, &mut at_client, &mut at_server] {
            wait(|| is_running(netlink))?;
        }
        if ground.has_v6 {
            for end in [End::Client, End::Server] {
                wait(|| is_own(&mut netlink, ip(end, false, true)))?;
            }
            wait(|| is_own(&mut at_client, ip(End::Client, true, true)))?;
            wait(|| is_own(&mut at_server, ip(End::Server, true, true)))?;
        }
        Ok(ground)
    }

    /// Does `work`, which must not wait, on the host at that end.
    pub(super) fn at<T>(&self, end: End, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let host = match end {
            End::Client => &self.client,
            End::Server => &self.server,
        };
        enter(host)?;
        let done = work();
        enter(&self.node)?;
        done
    }
}

/// The address of the host at that end, or ours towards it. Those for documentation (RFC 5737,
/// RFC 3849).
pub(super) fn ip(end: End, is_far: bool, is_v6: bool) -> IpAddr {
    let host = if is_far { 2 } else { 1 };
    match (is_v6, end) {
        (false, End::Client) => Ipv4Addr::new(192, 0, 2, host).into(),
        (false, End::Server) => Ipv4Addr::new(198, 51, 100, host).into(),
        (true, end) => {
            let net = if end == End::Client { 1 } else { 2 };
            Ipv6Addr::new(0x2001, 0xdb8, net, 0, 0, 0, 0, host.into()).into()
        }
    }
}

/// Moves the calling thread into a new namespace.
fn host() -> io::Result<File> {
    // SAFETY: of this thread only the network namespace changes; no descriptors are unshared.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
        .map_err(|error| context("network namespace (unshare)")(error.into()))?;
    File::open("/proc/thread-self/ns/net")
}

fn enter(host: &File) -> io::Result<()> {
    move_into_link_name_space(host.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(())
}

/// ifinfomsg: family, padding, u16 type, i32 index, u32 flags, u32 which of them to change.
fn link(index: u32, flags: u32) -> Body {
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    Body::new(&header)
}

fn bring_up(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    let body = link(index, libc::IFF_UP as u32);
    netlink.request(libc::RTM_NEWLINK, 0, &body).map_err(context("device (RTM_NEWLINK)"))?;
    Ok(())
}

/// A veth pair, one end here, the other on `far`. (Neither can be up before both are there.)
fn join(netlink: &mut Netlink, end: End, name: &str, far: &File) -> io::Result<()> {
    let far = u32::try_from(far.as_raw_fd()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let device = |is_far| link(end.wire(is_far), 0).with_text(libc::IFLA_IFNAME, name);
    let peer = device(true).with_u32(IFLA_NET_NS_FD, far);
    let data = Body::default().with_nest(VETH_INFO_PEER, peer);
    let info =
        Body::default().with_text(libc::IFLA_INFO_KIND, "veth").with_nest(IFLA_INFO_DATA, data);
    let body = device(false).with_nest(libc::IFLA_LINKINFO, info);
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    netlink.request(libc::RTM_NEWLINK, flags, &body).map_err(context("veth (RTM_NEWLINK)"))?;
    Ok(())
}

/// Gives one end of a wire its addresses. False: no IPv6 here.
fn address(netlink: &mut Netlink, end: End, is_far: bool) -> io::Result<bool> {
    let mut add = |is_v6| {
        let (family, bits) =
            if is_v6 { (libc::AF_INET6, BITS_V6) } else { (libc::AF_INET, BITS_V4) };
        let octets = match ip(end, is_far, is_v6) {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        // ifaddrmsg: family, bits, flags, scope, u32 index. NODAD: of use at once.
        let mut header = [family as u8, bits, IFA_F_NODAD, 0, 0, 0, 0, 0];
        header[4..].copy_from_slice(&end.wire(is_far).to_ne_bytes());
        let body = Body::new(&header).with(IFA_LOCAL, &octets).with(IFA_ADDRESS, &octets);
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        netlink.request(libc::RTM_NEWADDR, flags, &body)
    };
    add(false).map_err(context("address (RTM_NEWADDR)"))?;
    Ok(add(true).is_ok())
}

/// Whether all wires here carry packets: until then the kernel drops what is sent.
fn is_running(netlink: &mut Netlink) -> io::Result<bool> {
    let links = netlink.dump(libc::RTM_GETLINK, &Body::new(&[0; 16]))?;
    for link in &links {
        let header = link.header(16)?;
        let number = |at: usize| header[at..at + 4].try_into().map_or(0, u32::from_ne_bytes);
        let is_wire = number(4) >= CLIENT_WIRE;
        if is_wire && number(8) & libc::IFF_RUNNING as u32 == 0 {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the kernel takes packets for this address: it adds that route some time after the
/// device is up.
fn is_own(netlink: &mut Netlink, ip: IpAddr) -> io::Result<bool> {
    Ok(routes::towards(netlink, ip, ip).is_ok_and(|hop| hop.is_local))
}

fn wait(mut is_ready: impl FnMut() -> io::Result<bool>) -> io::Result<()> {
    let deadline = Instant::now() + READY_WITHIN;
    while !is_ready()? {
        if Instant::now() >= deadline {
            return Err(context("wires")(io::ErrorKind::TimedOut.into()));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
