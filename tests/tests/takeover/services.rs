//! Clients that ask for a service's address, which the node's netfilter translates to the proxy's,
//! as kube-proxy has it: one in a pod of the node, and one behind a wire.

use std::net::SocketAddr;
use std::sync::Arc;

use proxy_tests::netns::Host;
use proxy_tests::peers::Peer;
use proxy_tests::row::Family;
use proxy_tests::wait::{eventually, until};

use crate::ground::{Ground, Pair, await_relayed_by_kernel};

pub fn translated_connections(at: &Ground) {
    let node = &at.row.node;
    let pod = Arc::new(Host::new("pod"));
    let wire = node.join(&pod, 5);
    let (family, service, gateways) = match at.family {
        Family::V4 => {
            ("ip", "10.96.0.1", [(&pod, wire.v4(1)), (&at.row.client, at.row.front(at.family))])
        }
        Family::V6 => {
            ("ip6", "fd00:96::1", [(&pod, wire.v6(1)), (&at.row.client, at.row.front(at.family))])
        }
    };
    for (host, gateway) in gateways {
        host.ip(&format!("route add {service} via {gateway}"));
    }
    let to = at.address();
    let hook = "{ type nat hook prerouting priority -100; }";
    for command in [
        format!("add table {family} services"),
        format!("add chain {family} services arrive {hook}"),
        format!(
            "add rule {family} services arrive {family} daddr {service} tcp dport 443 dnat to {to}"
        ),
    ] {
        node.output("nft", &[&command]);
    }
    // Short, so that an entry shows whether it was made to live longer.
    node.sysctl("netfilter.nf_conntrack_tcp_timeout_established", "100");
    let mut proxy = at.launch().start();
    let service = SocketAddr::new(service.parse().expect("an address"), 443);
    let count = || entries(node).len();
    let start = count();
    let connect = |host: &Arc<Host>| {
        let client = host.run(move || Peer::connect(service));
        let pair = Pair { client, server: at.upstream.accept() };
        pair.talk();
        pair
    };
    // The first one teaches the address.
    let first = connect(&pod);
    let is_learnt = || proxy.metric("packet_ineligible_total", &[("reason", "handshake_not_seen")]);
    eventually("the address is learnt", || (is_learnt() > 0.0).then_some(()));
    let pairs = [connect(&pod), connect(&at.row.client), connect(&pod)];
    await_relayed_by_kernel(&proxy, 3.0);
    pairs.iter().for_each(Pair::talk);
    let long_lived = || entries(node).iter().filter(|seconds| **seconds > 3600).count();
    // Two for each: client and node, node and server.
    until("their entries live on", || long_lived() == 6);
    // Also without a process, and with the next.
    proxy.kill9();
    first.expect_reset();
    pairs.iter().for_each(Pair::talk);
    assert_eq!(long_lived(), 6);
    let next = at.launch().start();
    await_relayed_by_kernel(&next, 3.0);
    pairs.iter().for_each(Pair::talk);
    let [killed, closed, reset] = pairs;
    at.connections(&["kill", "--client", &killed.client.address().to_string()]);
    killed.expect_reset();
    until("its entries are gone", || long_lived() == 4);
    reset.client.reset();
    reset.server.expect_reset();
    until("its entries are gone, too", || long_lived() == 2);
    closed.talk();
    at.connections(&["kill", "--all"]);
    closed.expect_reset();
    // What conntrack remembers of the first one, and of segments after the end, is short-lived.
    until("no entry is left of them", || long_lived() == 0);
    println!("{start} entries before, {} after", count());
}

/// Seconds that the entries of TCP have to live.
fn entries(node: &Arc<Host>) -> Vec<u64> {
    let text = node.read("/proc/thread-self/net/nf_conntrack");
    let lines = text.lines().filter(|line| line.contains(" tcp "));
    // Family, its number, "tcp", 6, and the seconds.
    lines.filter_map(|line| line.split_whitespace().nth(4)?.parse().ok()).collect()
}
