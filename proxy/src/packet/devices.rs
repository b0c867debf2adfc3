//! Which devices packets can be taken from and sent to.

use std::collections::HashMap;
use std::io;

use rustix::net::netlink::GENERIC;

use super::netlink::{Answer, Attributes, Body, Netlink, context};

/// Length of ifinfomsg, in bytes.
const IFINFOMSG: usize = 16;
/// RTEXT_FILTER_SKIP_STATS: leaves out a kilobyte for each device.
const SKIP_STATS: u32 = 1 << 3;

/// What a packet on the device begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Layer {
    /// An Ethernet header.
    Ethernet,
    /// The IP header: tun, WireGuard, IP in IP.
    Bare,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Device {
    /// Its number, which it keeps.
    pub index: u32,
    /// Its name, which may change.
    pub name: String,
    /// Bytes of the largest IP packet that it sends.
    pub mtu: u32,
    /// What its packets begin with.
    pub layer: Layer,
}

/// Why a device cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Unfit {
    /// Traffic of this host with itself, which no packet engine speeds up.
    Loopback,
    /// Its packets have a form that we do not read.
    UnknownKind,
    /// A port of a bridge, bond, team or switch: its traffic is seen at that one.
    Enslaved,
    /// It is not up.
    Down,
    /// `rx-gro-list` is on: a list of segments with headers of their own arrives as one packet,
    /// of which a rewrite would reach only the first.
    FragmentList,
    /// `large-receive-offload` is on: the card merges segments in a way that cannot be undone.
    Lro,
}

impl Unfit {
    /// Its name in metrics and logs.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Loopback => "loopback",
            Self::UnknownKind => "unknown_kind",
            Self::Enslaved => "enslaved",
            Self::Down => "down",
            Self::FragmentList => "rx_gro_list",
            Self::Lro => "large_receive_offload",
        }
    }
}

/// All devices of the namespace, each with the reason if it is unfit.
///
/// # Errors
/// The kernel refuses a list. Without ETHTOOL_NETLINK (a kernel option from 5.6 on, which every
/// distribution sets) it cannot be known which devices are fit.
pub fn list(netlink: &mut Netlink) -> io::Result<Vec<(Device, Option<Unfit>)>> {
    let offloads = Offloads::read().map_err(context("features of devices (ethtool)"))?;
    Ok(links(netlink)?.into_iter().map(|link| link.judge(&offloads)).collect())
}

/// Index and name of all devices, fit or not.
pub(super) fn indices(netlink: &mut Netlink) -> io::Result<Vec<u32>> {
    Ok(links(netlink)?.into_iter().map(|link| link.index).collect())
}

/// Bytes of the largest IP packet that the device sends.
pub(super) fn mtu(netlink: &mut Netlink, index: u32) -> io::Result<u32> {
    let mut header = [0; IFINFOMSG];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    let body = Body::new(&header).with_u32(libc::IFLA_EXT_MASK, SKIP_STATS);
    let answers = netlink
        .request(libc::RTM_GETLINK, 0, &body)
        .map_err(context(format_args!("device {index} (RTM_GETLINK)")))?;
    let link = answers.first().map(Link::from_answer).transpose()?;
    link.map(|link| link.mtu).ok_or_else(|| io::ErrorKind::NotFound.into())
}

fn links(netlink: &mut Netlink) -> io::Result<Vec<Link>> {
    let body = Body::new(&[0; IFINFOMSG]).with_u32(libc::IFLA_EXT_MASK, SKIP_STATS);
    let answers =
        netlink.dump(libc::RTM_GETLINK, &body).map_err(context("devices (RTM_GETLINK)"))?;
    let links = answers.iter().filter(|answer| answer.kind == libc::RTM_NEWLINK);
    links.map(Link::from_answer).collect()
}

/// What the kernel says of a device.
#[derive(Debug, Clone, Default)]
struct Link {
    index: u32,
    name: String,
    mtu: u32,
    /// ARPHRD_*.
    hardware: u16,
    /// IFF_*.
    flags: u32,
    is_slave: bool,
    /// As in `ip link add type`; empty for hardware.
    kind: String,
}

impl Link {
    fn from_answer(answer: &Answer) -> io::Result<Self> {
        // ifinfomsg: family, padding, u16 type, i32 index, u32 flags, u32 change.
        let header = answer.header(IFINFOMSG)?;
        let number = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let attributes = answer.attributes(IFINFOMSG);
        Ok(Self {
            index: number(4),
            name: attributes.text(libc::IFLA_IFNAME).unwrap_or_default(),
            mtu: attributes.u32(libc::IFLA_MTU).unwrap_or_default(),
            hardware: u16::from_ne_bytes([header[2], header[3]]),
            flags: number(8),
            is_slave: attributes.u32(libc::IFLA_MASTER).is_some_and(|master| master != 0),
            kind: attributes
                .nest(libc::IFLA_LINKINFO)
                .text(libc::IFLA_INFO_KIND)
                .unwrap_or_default(),
        })
    }

    fn judge(self, offloads: &Offloads) -> (Device, Option<Unfit>) {
        let layer = self.layer();
        let features = offloads.0.get(&self.index).copied().unwrap_or_default();
        let unfit = if self.flags & libc::IFF_LOOPBACK as u32 != 0 {
            Some(Unfit::Loopback)
        } else if layer.is_none() {
            Some(Unfit::UnknownKind)
        } else if self.is_slave {
            Some(Unfit::Enslaved)
        } else if self.flags & libc::IFF_UP as u32 == 0 {
            Some(Unfit::Down)
        } else if features.fragment_list {
            Some(Unfit::FragmentList)
        } else if features.lro {
            Some(Unfit::Lro)
        } else {
            None
        };
        let layer = layer.unwrap_or(Layer::Bare);
        (Device { index: self.index, name: self.name, mtu: self.mtu, layer }, unfit)
    }

    /// None where we do not know what packets look like, or where the hooks do not see them all.
    fn layer(&self) -> Option<Layer> {
        /// if_arp.h; libc lacks it.
        const ARPHRD_RAWIP: u16 = 519;
        match self.kind.as_str() {
            // The hooks of a VRF do not see what arrives; xfrm and vti encrypt; ifb only delays
            // packets of other devices.
            "vrf" | "xfrm" | "vti" | "vti6" | "ifb" => return None,
            _ => {}
        }
        match self.hardware {
            libc::ARPHRD_ETHER => Some(Layer::Ethernet),
            // GRE and PPP are left out: their packets begin with one header on the way in and
            // with another on the way out.
            libc::ARPHRD_NONE
            | ARPHRD_RAWIP
            | libc::ARPHRD_TUNNEL
            | libc::ARPHRD_TUNNEL6
            | libc::ARPHRD_SIT => Some(Layer::Bare),
            _ => None,
        }
    }
}

/// Receive offloads that are on, by device. Devices that have no such settings are absent.
#[derive(Debug, Default)]
struct Offloads(HashMap<u32, Offload>);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Offload {
    fragment_list: bool,
    lro: bool,
}

/// linux/ethtool_netlink.h.
mod ethtool {
    /// The name of the generic netlink family, and its version.
    pub(super) const FAMILY: &str = "ethtool";
    pub(super) const VERSION: u8 = 1;
    pub(super) const FEATURES_GET: u8 = 11;
    pub(super) const FEATURES_HEADER: u16 = 1;
    pub(super) const FEATURES_ACTIVE: u16 = 4;
    pub(super) const HEADER_DEV_INDEX: u16 = 1;
    pub(super) const BITSET_BITS: u16 = 3;
    pub(super) const BIT_NAME: u16 = 2;
}

/// Length of genlmsghdr, in bytes: command, version, padding.
const GENLMSGHDR: usize = 4;

impl Offloads {
    /// One list for all devices, through generic netlink: unlike the ioctl it goes by index, so a
    /// device that is renamed meanwhile cannot be mistaken for another.
    fn read() -> io::Result<Self> {
        let mut netlink = Netlink::open_protocol(Some(GENERIC))?;
        let family = family(&mut netlink)?;
        let command = [ethtool::FEATURES_GET, ethtool::VERSION, 0, 0];
        // An empty header: all devices, bits by name.
        let body =
            Body::new(&command).with_nest(ethtool::FEATURES_HEADER | NESTED, Body::default());
        let answers = netlink.dump(family, &body)?;
        Ok(Self(answers.iter().filter_map(Self::of_device).collect()))
    }

    fn of_device(answer: &Answer) -> Option<(u32, Offload)> {
        let attributes = answer.attributes(GENLMSGHDR);
        let index = attributes.nest(ethtool::FEATURES_HEADER).u32(ethtool::HEADER_DEV_INDEX)?;
        let bits = attributes.nest(ethtool::FEATURES_ACTIVE).nest(ethtool::BITSET_BITS);
        Some((index, Self::active(bits)))
    }

    /// The list holds exactly those bits that are set.
    fn active(bits: Attributes<'_>) -> Offload {
        let mut offload = Offload::default();
        for (_, bit) in bits.iter() {
            match Attributes::of(bit).text(ethtool::BIT_NAME).as_deref() {
                Some("rx-gro-list") => offload.fragment_list = true,
                Some("rx-lro") => offload.lro = true,
                _ => {}
            }
        }
        offload
    }
}

/// NLA_F_NESTED, on which newer families insist.
const NESTED: u16 = 1 << 15;

/// The number of the family `ethtool`, which this kernel gave it when it started.
fn family(netlink: &mut Netlink) -> io::Result<u16> {
    let command = [libc::CTRL_CMD_GETFAMILY as u8, 1, 0, 0];
    let body = Body::new(&command).with_text(libc::CTRL_ATTR_FAMILY_NAME as u16, ethtool::FAMILY);
    let answers = netlink.request(libc::GENL_ID_CTRL as u16, 0, &body)?;
    let id = answers
        .first()
        .and_then(|answer| answer.attributes(GENLMSGHDR).get(libc::CTRL_ATTR_FAMILY_ID as u16));
    match id.and_then(|id| id.try_into().ok()) {
        Some(id) => Ok(u16::from_ne_bytes(id)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ethernet() -> Link {
        let flags = libc::IFF_UP as u32;
        Link { index: 7, name: "eth0".into(), mtu: 1500, hardware: 1, flags, ..Link::default() }
    }

    fn verdict(link: Link) -> (Layer, Option<Unfit>) {
        let (device, unfit) = link.judge(&Offloads::default());
        (device.layer, unfit)
    }

    #[test]
    fn hardware_that_is_up_fits() {
        assert_eq!(verdict(ethernet()), (Layer::Ethernet, None));
        let vlan = Link { kind: "vlan".into(), ..ethernet() };
        assert_eq!(verdict(vlan), (Layer::Ethernet, None));
        for hardware in [libc::ARPHRD_NONE, libc::ARPHRD_TUNNEL, libc::ARPHRD_SIT, 519] {
            assert_eq!(verdict(Link { hardware, ..ethernet() }), (Layer::Bare, None));
        }
    }

    #[test]
    fn each_reason_is_found() {
        let unfit = |link| verdict(link).1.map(Unfit::as_label);
        let loopback = libc::IFF_UP as u32 | libc::IFF_LOOPBACK as u32;
        let hardware = libc::ARPHRD_LOOPBACK;
        assert_eq!(unfit(Link { flags: loopback, hardware, ..ethernet() }), Some("loopback"));
        assert_eq!(unfit(Link { flags: 0, ..ethernet() }), Some("down"));
        assert_eq!(unfit(Link { is_slave: true, ..ethernet() }), Some("enslaved"));
        for hardware in [libc::ARPHRD_IPGRE, libc::ARPHRD_PPP, libc::ARPHRD_INFINIBAND] {
            assert_eq!(unfit(Link { hardware, ..ethernet() }), Some("unknown_kind"));
        }
        for kind in ["vrf", "xfrm", "vti", "ifb"] {
            assert_eq!(unfit(Link { kind: kind.into(), ..ethernet() }), Some("unknown_kind"));
        }
    }

    #[test]
    fn offloads_that_merge_packets_for_good_make_a_device_unfit() {
        let with = |fragment_list, lro| {
            let offloads = Offloads(HashMap::from([(7, Offload { fragment_list, lro })]));
            ethernet().judge(&offloads).1
        };
        assert_eq!(with(false, false), None);
        assert_eq!(with(true, false), Some(Unfit::FragmentList));
        assert_eq!(with(false, true), Some(Unfit::Lro));
    }
}
