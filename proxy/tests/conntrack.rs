//! What conntrack knows of translated connections, found, kept and removed. Needs root, and the
//! commands `ip` and `nft`.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use proxy::packet::conntrack::{Conntrack, Tuple, original_destination};
use proxy::packet::inject::{Injector, Segment};
use proxy::packet::tracking::Tracking;
use proxy_tests::netns::{Host, Wire};
use proxy_tests::segments::{Capture, numbers, vanish};
use proxy_tests::wait::{bound, eventually, until};
use tokio_util::sync::CancellationToken;

const SERVICE_PORT: u16 = 443;
const RST: u8 = 1 << 2;

/// A client, and a node whose netfilter translates a service's address to the node's own.
struct Hosts {
    client: Host,
    node: Host,
    wire: Wire,
}

/// A client's end, the node's end, and the service's address between them.
struct Translated {
    client: TcpStream,
    server: TcpStream,
    service: SocketAddr,
}

impl Hosts {
    fn new() -> Self {
        let (client, node) = (Host::new("client"), Host::new("node"));
        let wire = client.join(&node, 31);
        let hosts = Self { client, node, wire };
        for (family, to) in [("ip", wire.v4(2)), ("ip6", wire.v6(2))] {
            let service = service(to).ip();
            hosts.client.ip(&format!("route add {service} via {to}"));
            let to = SocketAddr::new(to, 6443);
            nft(&hosts.node, &format!("add table {family} services"));
            let hook = "{ type nat hook prerouting priority -100; }";
            nft(&hosts.node, &format!("add chain {family} services arrive {hook}"));
            nft(
                &hosts.node,
                &format!(
                    "add rule {family} services arrive {family} daddr {service} \
                     tcp dport {SERVICE_PORT} dnat to {to}"
                ),
            );
        }
        hosts
    }

    fn families(&self) -> [IpAddr; 2] {
        [self.wire.v4(2), self.wire.v6(2)]
    }

    /// Not at the first attempt if a program that another test is just starting still holds a
    /// copy of the last listener.
    fn listen(&self, address: SocketAddr) -> TcpListener {
        eventually("the port is free", || self.node.run(move || TcpListener::bind(address)).ok())
    }

    fn connect(&self, listener: &TcpListener, to: SocketAddr) -> (TcpStream, TcpStream) {
        let client = self.client.run(move || TcpStream::connect_timeout(&to, bound()));
        (client.expect("connects"), listener.accept().expect("accepts").0)
    }

    fn connect_to_service(&self, node: IpAddr) -> Translated {
        let listener = self.listen(SocketAddr::new(node, 6443));
        let service = service(node);
        let (client, server) = self.connect(&listener, service);
        Translated { client, server, service }
    }

    fn conntrack(&self) -> Conntrack {
        let opened = self.node.run(Conntrack::open).expect("CAP_NET_ADMIN");
        opened.expect("this kernel has no ctnetlink (CONFIG_NF_CT_NETLINK)")
    }

    fn count(&self) -> u32 {
        let text = self.node.read("/proc/sys/net/netfilter/nf_conntrack_count");
        text.trim().parse().expect("a number")
    }
}

/// The service's address in the family of the node's.
fn service(node: IpAddr) -> SocketAddr {
    let ip = if node.is_ipv4() { "203.0.113.1" } else { "2001:db8::1" };
    SocketAddr::new(ip.parse().expect("an address"), SERVICE_PORT)
}

fn nft(host: &Host, command: &str) {
    let words = command.to_owned();
    let output = host.run(move || Command::new("nft").arg(words).output());
    let output = output.unwrap_or_else(|error| panic!("the nft command (nftables): {error}"));
    assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
}

fn local(stream: &TcpStream) -> SocketAddr {
    stream.local_addr().expect("connected")
}

#[test]
fn an_entry_is_found_by_either_tuple_refreshed_and_deleted() {
    let hosts = Hosts::new();
    let mut conntrack = hosts.conntrack();
    for node in hosts.families() {
        let start = hosts.count();
        let Translated { client, server, service } = hosts.connect_to_service(node);
        let original = Tuple { source: local(&client), destination: service };
        let reply = Tuple { source: local(&server), destination: local(&client) };
        for tuple in [original, reply] {
            let found = conntrack.find(tuple.source, tuple.destination).expect("asks");
            let entry = found.unwrap_or_else(|| panic!("no entry for {tuple:?}"));
            assert_eq!((entry.original, entry.reply), (original, reply));
            assert!(entry.is_translated);
            assert!(entry.timeout > Duration::from_secs(10_000), "{entry:?}");
            // Either one names the entry; less than before, so that it is this that did it.
            assert!(conntrack.refresh(tuple, Duration::from_secs(5000)).expect("orders"));
            let found = conntrack.find(tuple.source, tuple.destination).expect("asks");
            let timeout = found.expect("there").timeout.as_secs();
            assert!((1..=5000).contains(&timeout), "{timeout}");
            assert!(conntrack.refresh(tuple, Duration::from_secs(50_000)).expect("orders"));
        }
        assert_eq!(conntrack.find(service, local(&client)).expect("asks"), None, "no such tuple");
        assert!(hosts.count() > start);
        assert!(conntrack.delete(original).expect("orders"));
        assert!(!conntrack.delete(original).expect("orders"), "gone already");
        assert!(!conntrack.refresh(reply, bound()).expect("orders"));
        assert_eq!(conntrack.find(reply.source, reply.destination).expect("asks"), None);
        until("the count is back", || hosts.count() == start);
        vanish(client);
        vanish(server);
    }
}

#[test]
fn an_entry_without_translation_says_so() {
    let hosts = Hosts::new();
    let mut conntrack = hosts.conntrack();
    for node in hosts.families() {
        let listener = hosts.node.run(move || TcpListener::bind((node, 0))).expect("binds");
        let (client, server) = hosts.connect(&listener, local_of(&listener));
        let entry = conntrack.find(local(&client), local(&server)).expect("asks").expect("there");
        assert!(!entry.is_translated);
        assert_eq!(entry.reply, entry.original.reversed());
    }
}

#[test]
fn a_host_whose_netfilter_tracks_nothing_knows_no_entry() {
    let host = Host::new("plain");
    let (found, deleted) = host.run(|| {
        let mut conntrack = Conntrack::open().expect("CAP_NET_ADMIN").expect("ctnetlink");
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("binds");
        let client = TcpStream::connect(local_of(&listener)).expect("connects");
        let tuple = Tuple { source: local(&client), destination: local_of(&listener) };
        let found = conntrack.find(tuple.source, tuple.destination).expect("asks");
        (found, conntrack.delete(tuple).expect("orders"))
    });
    assert_eq!(found, None);
    assert!(!deleted);
}

#[test]
fn the_original_destination_is_that_of_translated_connections_only() {
    let hosts = Hosts::new();
    // One that takes both families, and one for each.
    let everywhere = "[::]:6443".parse().expect("an address");
    let [four, six] = hosts.families().map(|ip| SocketAddr::new(ip, 6443));
    for (bind, nodes) in
        [(everywhere, &hosts.families()[..]), (four, &[four.ip()]), (six, &[six.ip()])]
    {
        let listener = hosts.listen(bind);
        for node in nodes {
            let (_client, server) = hosts.connect(&listener, service(*node));
            let asked = original_destination(&server).expect("asks");
            assert_eq!(asked, Some(service(*node)), "{bind}");
            let (_client, server) = hosts.connect(&listener, SocketAddr::new(*node, 6443));
            assert_eq!(original_destination(&server).expect("asks"), None, "{bind} {node}");
        }
    }
}

#[test]
fn nothing_tracked_has_no_original_destination() {
    let host = Host::new("plain");
    let asked = host.run(|| {
        ["127.0.0.1:0", "[::1]:0"].map(|bind| {
            let listener = TcpListener::bind(bind).expect("binds");
            let _client = TcpStream::connect(local_of(&listener)).expect("connects");
            original_destination(listener.accept().expect("accepts").0).expect("asks")
        })
    });
    assert_eq!(asked, [None, None]);
}

#[test]
fn a_refreshed_entry_translates_numbers_that_it_has_not_seen() {
    let hosts = Hosts::new();
    let mut conntrack = hosts.conntrack();
    let injector = hosts.node.run(Injector::new).expect("raw sockets");
    for node in hosts.families() {
        let Translated { client, server, service } = hosts.connect_to_service(node);
        let numbers = numbers(&server);
        // As if a gigabyte had passed unseen.
        let later = Segment {
            source: local(&server),
            destination: local(&client),
            sequence: numbers.sequence.wrapping_add(1 << 30),
            acknowledgement: numbers.acknowledgement.wrapping_add(1 << 30),
            window: 0,
            timestamps: None,
        };
        let capture = Capture::new(&hosts.client);
        let source = || {
            injector.reset(&later).expect("sends");
            capture.next(|seen| seen.flags & RST != 0).source
        };
        assert_eq!(source(), local(&server), "not believed, so not translated");
        let tuple = Tuple { source: local(&server), destination: local(&client) };
        assert!(conntrack.refresh(tuple, Duration::from_secs(600)).expect("orders"));
        assert_eq!(source(), service);
        vanish(client);
        vanish(server);
    }
}

/// However short the host's own time is.
#[test]
fn entries_are_kept_as_long_as_connections_live() {
    const PERIOD: Duration = Duration::from_millis(50);
    let hosts = Hosts::new();
    let mut conntrack = hosts.conntrack();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let keeper = Tracking::new(Some(hosts.conntrack()), PERIOD, runtime.handle().clone());
    let keeper = Arc::new(keeper);
    let node = hosts.families()[0];
    let Translated { client, server, service } = hosts.connect_to_service(node);
    let tuple = Tuple { source: local(&client), destination: service };
    // What the kernel knows nothing of does no harm.
    let nobody = Tuple { source: local(&client), destination: local(&client) };
    let living = Arc::new(AtomicBool::new(true));
    let asked = Arc::new(AtomicUsize::new(0));
    let keep = || {
        let (living, asked) = (Arc::clone(&living), Arc::clone(&asked));
        let list = move || {
            asked.fetch_add(1, Ordering::SeqCst);
            if living.load(Ordering::SeqCst) { vec![[nobody, tuple]] } else { Vec::new() }
        };
        keeper.keep(list, CancellationToken::new());
    };
    let mut about_to_expire_and_kept = || {
        assert!(conntrack.refresh(tuple, bound() * 2).expect("orders"));
        until("it is kept", || {
            let entry = conntrack.find(tuple.source, tuple.destination).expect("asks");
            entry.expect("there").timeout > Duration::from_secs(3600)
        });
    };
    keep();
    // Again and again, and by one task alone.
    for _ in 0..3 {
        about_to_expire_and_kept();
        keep();
    }
    living.store(false, Ordering::SeqCst);
    let count = || asked.load(Ordering::SeqCst);
    // Over once nobody lives; the next connection begins it anew.
    until("the task has ended", || Arc::strong_count(&living) == 1);
    let before = count();
    living.store(true, Ordering::SeqCst);
    keep();
    about_to_expire_and_kept();
    assert!(count() > before);
    keeper.untrack([nobody, tuple]);
    assert_eq!(conntrack.find(tuple.source, tuple.destination).expect("asks"), None);
    vanish(client);
    vanish(server);
}

fn local_of(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("bound")
}
