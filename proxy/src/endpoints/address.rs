//! Families and addresses, as endpoints know them.

use std::net::IpAddr;

/// An IP family, which is also the type of an EndpointSlice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    pub(super) const ALL: [Self; 2] = [Self::V4, Self::V6];

    pub(super) fn of(ip: IpAddr) -> Self {
        if ip.is_ipv4() { Self::V4 } else { Self::V6 }
    }

    /// From `addressType` of a slice or `ipFamilies` of a Service.
    pub(super) fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.address_type() == text)
    }

    /// As `addressType` and `ipFamilies` spell it.
    pub(super) fn address_type(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }

    /// The name in metrics.
    pub(super) fn as_label(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }

    /// The end of the name of a slice that is not the primary family's.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }
}

/// One address to publish.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    /// Where to connect to; ordering by it makes every replica write the same content.
    pub ip: IpAddr,
    /// The node it is on.
    pub node: Option<String>,
    /// That node's zone.
    pub zone: Option<String>,
}

/// The address, if the API server takes it as an endpoint's: validation refuses those that mean
/// something else on every node (loopback, link-local and the like).
pub(super) fn publishable(ip: IpAddr) -> Option<IpAddr> {
    let ip = ip.to_canonical();
    let special = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    let link_local = match ip {
        IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    (!special && !link_local).then_some(ip)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_mean_another_host_on_every_node_are_never_published() {
        let ok = |text: &str| publishable(text.parse().expect("an address")).map(|a| a.to_string());
        for good in ["10.0.0.7", "192.0.2.1", "2001:db8::1", "fd00::1"] {
            assert_eq!(ok(good).as_deref(), Some(good));
        }
        assert_eq!(ok("::ffff:10.0.0.7").as_deref(), Some("10.0.0.7"));
        for bad in [
            "127.0.0.1",
            "127.8.8.8",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.1.1",
            "fe80::1",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "::ffff:127.0.0.1",
        ] {
            assert_eq!(ok(bad), None, "{bad}");
        }
    }
}
