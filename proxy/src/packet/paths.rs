//! Which devices carry the programs, and by which of them each end is reached.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{IpAddr, Ipv6Addr};

use aya::Ebpf;

use super::attach::{Attachments, Method};
use super::devices::{self, Layer};
use super::netlink::Netlink;
use super::routes::{self, Hop};

/// The present state of devices and routes, as far as it was asked for.
pub struct Paths {
    netlink: Netlink,
    attachments: Attachments,
    /// Devices that carry our programs undisturbed and are fit for switched connections.
    fit: HashSet<u32>,
    hops: HashMap<IpAddr, Hop>,
    has_ipsec: bool,
    largest_mtu: u32,
}

impl Paths {
    /// Attaches to every device that is fit, and removes what earlier processes left there.
    ///
    /// # Errors
    /// The kernel does not tell about devices.
    pub fn open(
        ebpf: &mut Ebpf,
        method: Method,
        pins: Option<&std::path::Path>,
    ) -> io::Result<Self> {
        let mut paths = Self {
            netlink: Netlink::open()?,
            attachments: Attachments::new(method),
            fit: HashSet::new(),
            hops: HashMap::new(),
            has_ipsec: routes::has_ipsec_policies()?,
            largest_mtu: 0,
        };
        let wanted = paths.wanted()?;
        let adopted = paths.attachments.adopt_and_replace(ebpf, &wanted, pins)?;
        for (index, error) in &adopted.failed {
            tracing::info!(device = index, %error, "device without kernel relay");
        }
        paths.fit = paths.attachments.indices().collect();
        Ok(paths)
    }

    fn wanted(&mut self) -> io::Result<Vec<devices::Device>> {
        let all = devices::list(&mut self.netlink)?;
        let wanted: Vec<_> = all
            .into_iter()
            .filter(|(device, unfit)| unfit.is_none() && device.layer == Layer::Ethernet)
            .map(|(device, _)| device)
            .collect();
        self.largest_mtu = wanted.iter().map(|device| device.mtu).max().unwrap_or(0);
        Ok(wanted)
    }

    /// Looks again, after something changed. How many devices had lost the programs.
    ///
    /// # Errors
    /// The kernel does not tell about devices.
    pub fn refresh(&mut self, ebpf: &mut Ebpf) -> io::Result<usize> {
        self.hops.clear();
        self.has_ipsec = routes::has_ipsec_policies()?;
        let wanted = self.wanted()?;
        let lost = self.attachments.missing();
        let mut count = 0;
        let there: HashSet<u32> = wanted.iter().map(|device| device.index).collect();
        for index in self.attachments.indices().collect::<Vec<_>>() {
            if !there.contains(&index) {
                let _ = self.attachments.detach(index);
            }
        }
        let had: HashSet<u32> = self.attachments.indices().collect();
        for device in wanted {
            let is_lost = lost.contains(&device.index);
            count += usize::from(is_lost);
            if (is_lost || !had.contains(&device.index))
                && let Err(error) = self.attachments.attach(ebpf, &device)
            {
                tracing::info!(device = device.name, %error, "device without kernel relay");
            }
        }
        self.fit = self.attachments.indices().collect();
        Ok(count)
    }

    /// Whether segments of the device pass the programs.
    pub fn is_fit(&self, ifindex: u32) -> bool {
        self.fit.contains(&ifindex)
    }

    /// Bytes of the largest packet that any device takes.
    pub fn largest_mtu(&self) -> u32 {
        self.largest_mtu
    }

    /// IPsec may be wanted for some of what we would rewrite.
    pub fn has_ipsec(&self) -> bool {
        self.has_ipsec
    }

    /// The way to a server from whatever address is ours there.
    pub fn towards_server(&mut self, server: IpAddr) -> Option<Hop> {
        let hop = routes::towards(&mut self.netlink, server, Ipv6Addr::UNSPECIFIED.into()).ok()?;
        (!hop.is_local).then_some(hop)
    }

    /// The way to an end, if it leads over a device that is fit.
    pub fn towards(&mut self, end: IpAddr, from: IpAddr) -> Option<Hop> {
        let hop = match self.hops.get(&end) {
            Some(hop) => *hop,
            None => {
                let hop = routes::towards(&mut self.netlink, end, from).ok()?;
                // Clients come and go; the next change of a route would clear it anyway.
                if self.hops.len() >= 4096 {
                    self.hops.clear();
                }
                self.hops.insert(end, hop);
                hop
            }
        };
        (!hop.is_local && self.is_fit(hop.ifindex)).then_some(hop)
    }
}
