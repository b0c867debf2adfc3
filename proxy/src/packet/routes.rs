//! Where packets to an address go, as the kernel's own tables and rules have it.

use std::io;
use std::net::IpAddr;

use rustix::io::Errno;
use rustix::net::netlink::XFRM;

use super::devices;
use super::netlink::{Answer, Body, Netlink, context};

/// Length of rtmsg, in bytes.
const RTMSG: usize = 12;
/// rtnetlink.h, inside RTA_METRICS; libc lacks it.
const RTAX_MTU: u16 = 2;

/// The first step of a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hop {
    /// The device it leaves by.
    pub ifindex: u32,
    /// Bytes of the largest IP packet: the device's limit or the route's, whichever is smaller.
    /// The route's includes what a router on the way has said (path MTU), while that is valid.
    pub mtu: u32,
    /// The destination is this host itself.
    pub is_local: bool,
}

/// Where packets from `source` to `destination` go now.
///
/// IPv4 knows a route from a source only if that is an address of this host; for others, and for
/// `0.0.0.0` and `::`, the answer is that for the destination alone.
///
/// # Errors
/// Of kind `NetworkUnreachable` or `HostUnreachable` if there is no way (also if a route forbids
/// it, or leads to several hosts at once); otherwise the kernel refuses to answer.
pub fn towards(netlink: &mut Netlink, destination: IpAddr, source: IpAddr) -> io::Result<Hop> {
    let (destination, source) = (destination.to_canonical(), source.to_canonical());
    let is_usable = source.is_ipv4() == destination.is_ipv4() && !source.is_unspecified();
    let source = is_usable.then_some(source);
    find(netlink, destination, source)
        .map_err(context(format_args!("route to {destination} (RTM_GETROUTE)")))
}

fn find(netlink: &mut Netlink, destination: IpAddr, source: Option<IpAddr>) -> io::Result<Hop> {
    let route = match ask(netlink, destination, source) {
        // IPv4 has no answer for a source that is not ours; but a refusal that is meant for a
        // source of ours must stand. (Kernels differ in how they say it.)
        Err(_) if source.is_some_and(|source| !is_ours(netlink, source)) => {
            ask(netlink, destination, None)
        }
        other => other,
    };
    let route = route.map_err(|error| match error.raw_os_error() {
        // Routes of type blackhole and prohibit.
        Some(libc::EINVAL | libc::EACCES) => Errno::HOSTUNREACH.into(),
        _ => error,
    })?;
    let is_local = match route.kind {
        libc::RTN_UNICAST => false,
        libc::RTN_LOCAL => true,
        _ => return Err(Errno::HOSTUNREACH.into()),
    };
    let ifindex = route.ifindex.ok_or(Errno::HOSTUNREACH)?;
    let device = devices::mtu(netlink, ifindex)?;
    let mtu = route.mtu.filter(|&mtu| mtu > 0).map_or(device, |mtu| mtu.min(device));
    Ok(Hop { ifindex, mtu, is_local })
}

fn ask(netlink: &mut Netlink, destination: IpAddr, source: Option<IpAddr>) -> io::Result<Route> {
    let answers = netlink.request(libc::RTM_GETROUTE, 0, &question(destination, source))?;
    let answer = answers.iter().find(|answer| answer.kind == libc::RTM_NEWROUTE);
    Route::from_answer(answer.ok_or(io::ErrorKind::InvalidData)?)
}

/// Whether packets to `ip` never leave this host. Unlike what a socket's own address tells, this
/// holds as well for those from which the kernel would not send by itself: 127.0.0.2, or the second
/// address of a network.
///
/// # Errors
/// Those of [`Netlink::open`].
pub fn is_own(ip: IpAddr) -> io::Result<bool> {
    Ok(is_ours(&mut Netlink::open()?, ip.to_canonical()))
}

fn is_ours(netlink: &mut Netlink, ip: IpAddr) -> bool {
    ask(netlink, ip, None).is_ok_and(|route| route.kind == libc::RTN_LOCAL)
}

fn question(destination: IpAddr, source: Option<IpAddr>) -> Body {
    let bits = |ip: IpAddr| if ip.is_ipv4() { 32 } else { 128 };
    let family = if destination.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // rtmsg: family, bits of destination and source, then what only matters for changes.
    let mut header = [0; RTMSG];
    header[0] = family as u8;
    header[1] = bits(destination);
    header[2] = source.map_or(0, bits);
    let body = Body::new(&header).with(libc::RTA_DST, &octets(destination));
    match source {
        Some(source) => body.with(libc::RTA_SRC, &octets(source)),
        None => body,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// What the kernel says of a route.
struct Route {
    /// RTN_*.
    kind: u8,
    ifindex: Option<u32>,
    mtu: Option<u32>,
}

impl Route {
    fn from_answer(answer: &Answer) -> io::Result<Self> {
        let header = answer.header(RTMSG)?;
        let attributes = answer.attributes(RTMSG);
        Ok(Self {
            kind: header[7],
            ifindex: attributes.u32(libc::RTA_OIF),
            mtu: attributes.nest(libc::RTA_METRICS).u32(RTAX_MTU),
        })
    }
}

/// linux/xfrm.h.
mod xfrm {
    pub(super) const NEW_SPD_INFO: u16 = 0x24;
    pub(super) const GET_SPD_INFO: u16 = 0x25;
    /// struct xfrmu_spdinfo: numbers of policies in, out, fwd, then those of single sockets.
    pub(super) const SPD_INFO: u16 = 1;
}

/// Whether IPsec policies may apply to packets that leave or pass. Packets that the engine sends
/// on never meet them, so where there are any they would leave unencrypted.
///
/// # Errors
/// The kernel refuses to answer (it wants CAP_NET_ADMIN). One without IPsec has no policies.
pub fn has_ipsec_policies() -> io::Result<bool> {
    policies().map_err(context("IPsec policies (XFRM_MSG_GETSPDINFO)"))
}

fn policies() -> io::Result<bool> {
    let mut netlink = match Netlink::open_protocol(Some(XFRM)) {
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(false),
        other => other?,
    };
    let answers = netlink.request(xfrm::GET_SPD_INFO, 0, &Body::new(&[0; 4]))?;
    let info = answers
        .iter()
        .find(|answer| answer.kind == xfrm::NEW_SPD_INFO)
        .and_then(|answer| answer.attributes(4).get(xfrm::SPD_INFO))
        .ok_or(io::ErrorKind::InvalidData)?;
    let mut counts = info.chunks_exact(4).map(|count| count.iter().any(|&byte| byte != 0));
    // Those for packets that arrive say what must have been encrypted, and concern nobody else.
    Ok(counts.by_ref().skip(1).take(2).any(|is_some| is_some))
}
