//! Segments and ICMP errors for connections without a socket, judged by a real peer's kernel.
//! Needs root and the `ip` command.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use proxy::packet::inject::{Injector, Segment, TooBig};
use proxy_tests::netns::{Host, Wire};
use proxy_tests::segments::{self, Capture, connection, numbers, pass, path_mtu, vanish};
use proxy_tests::wait::{bound, until};
use socket2::{Domain, Protocol, Socket, Type};

const ACK: u8 = 1 << 4;
const RST: u8 = 1 << 2;

/// Two hosts on one wire. All that is sent for no socket comes from `near`.
struct Hosts {
    near: Host,
    far: Host,
    wire: Wire,
    injector: Injector,
}

impl Hosts {
    fn new() -> Self {
        let (near, far) = (Host::new("near"), Host::new("far"));
        let wire = near.join(&far, 21);
        let injector = near.run(Injector::new).expect("raw sockets");
        Self { near, far, wire, injector }
    }

    /// Addresses of the near and the far end, for each family.
    fn families(&self) -> [(IpAddr, IpAddr); 2] {
        [(self.wire.v4(1), self.wire.v4(2)), (self.wire.v6(1), self.wire.v6(2))]
    }
}

/// The segment that `ours` would send next.
fn next(ours: &TcpStream) -> Segment {
    let segments::Numbers { sequence, acknowledgement, timestamp } = numbers(ours);
    Segment {
        source: local(ours),
        destination: ours.peer_addr().expect("connected"),
        sequence,
        acknowledgement,
        window: 500,
        timestamps: Some((timestamp, 0)),
    }
}

fn local(stream: &TcpStream) -> SocketAddr {
    stream.local_addr().expect("connected")
}

fn there_and_back(ours: &TcpStream, theirs: &TcpStream) {
    pass(ours, theirs, 10);
    pass(theirs, ours, 10);
}

fn assert_reset(mut stream: &TcpStream) {
    let error = stream.read(&mut [0]).expect_err("no byte and no FIN was sent");
    assert_eq!(error.kind(), ErrorKind::ConnectionReset, "{error}");
}

#[test]
fn only_a_reset_with_exact_numbers_ends_a_connection() {
    let hosts = Hosts::new();
    for (_, far) in hosts.families() {
        let (ours, theirs) = connection(&hosts.near, &hosts.far, SocketAddr::new(far, 0));
        for off_by in [1, u32::MAX, 1000, 1 << 30] {
            let exact = next(&ours);
            let sequence = exact.sequence.wrapping_add(off_by);
            hosts.injector.reset(&Segment { sequence, ..exact }).expect("sends");
            there_and_back(&ours, &theirs);
        }
        let exact = next(&ours);
        vanish(ours);
        hosts.injector.reset(&exact).expect("sends");
        assert_reset(&theirs);
    }
}

#[test]
fn a_reset_may_come_from_an_address_that_is_not_ours() {
    let hosts = Hosts::new();
    let foreign: [IpAddr; 2] = ["203.0.113.1", "2001:db8::1"].map(|ip| ip.parse().expect("one"));
    for ((near, _), foreign) in hosts.families().into_iter().zip(foreign) {
        // Without nodad an IPv6 address is no use for a moment, even here.
        let (length, flags) = if foreign.is_ipv4() { (32, "") } else { (128, "nodad") };
        hosts.near.ip(&format!("addr add {foreign}/{length} dev lo {flags}"));
        hosts.far.ip(&format!("route add {foreign}/{length} via {near}"));
        let (theirs, ours) = connection(&hosts.far, &hosts.near, SocketAddr::new(foreign, 0));
        there_and_back(&ours, &theirs);
        let exact = next(&ours);
        assert_eq!(exact.source.ip(), foreign);
        vanish(ours);
        hosts.near.ip(&format!("addr del {foreign}/{length} dev lo"));
        let bound = hosts.near.run(move || TcpListener::bind((foreign, 0)));
        assert_eq!(bound.expect_err("not ours").kind(), ErrorKind::AddrNotAvailable);
        hosts.injector.reset(&exact).expect("sends");
        assert_reset(&theirs);
    }
}

#[test]
fn a_probe_is_answered_by_who_has_the_connection_and_reset_by_who_has_not() {
    let hosts = Hosts::new();
    let [four, six] = hosts.families().map(|(_, far)| far);
    // Where no timestamp is known, none is better than an old one.
    for (far, with_timestamps) in [(four, true), (four, false), (six, true), (six, false)] {
        let (ours, theirs) = connection(&hosts.near, &hosts.far, SocketAddr::new(far, 0));
        let capture = Capture::new(&hosts.near);
        pass(&theirs, &ours, 10);
        let received = numbers(&ours).acknowledgement;
        capture.next(|seen| seen.source == local(&ours) && seen.acknowledgement == received);
        // From here on nobody owes an acknowledgement, and no timestamp is newer than this one.
        let exact = next(&ours);
        let from_far = |flags| {
            move |seen: &segments::Seen| seen.source == exact.destination && seen.flags == flags
        };
        let sequence = exact.sequence.wrapping_sub(1);
        let timestamps = exact.timestamps.filter(|_| with_timestamps);
        let probe = Segment { sequence, timestamps, ..exact };
        hosts.injector.probe(&probe).expect("sends");
        let answer = capture.next(from_far(ACK));
        assert_eq!(answer.destination, exact.source);
        assert_eq!(answer.payload, 0);
        assert_eq!(answer.acknowledgement, exact.sequence);
        assert_eq!(answer.sequence, exact.acknowledgement);

        vanish(theirs);
        hosts.injector.probe(&probe).expect("sends");
        let refusal = capture.next(from_far(RST));
        assert_eq!(refusal.sequence, exact.acknowledgement, "as the probe acknowledged");
        assert_reset(&ours);
    }
}

#[test]
fn too_big_lowers_the_senders_path_mtu_if_it_quotes_what_was_sent() {
    let hosts = Hosts::new();
    // Routers on the way are known by no route of ours.
    let routers: [IpAddr; 2] = ["203.0.113.9", "2001:db8::9"].map(|ip| ip.parse().expect("one"));
    for ((_, far), router) in hosts.families().into_iter().zip(routers) {
        let (ours, theirs) = connection(&hosts.near, &hosts.far, SocketAddr::new(far, 0));
        there_and_back(&ours, &theirs);
        until("everything is acknowledged", || {
            let (ours, theirs) = (numbers(&ours), numbers(&theirs));
            theirs.sequence == ours.acknowledgement && ours.sequence == theirs.acknowledgement
        });
        let sender = local(&theirs);
        let original = TooBig {
            source: sender,
            destination: theirs.peer_addr().expect("connected"),
            sequence: numbers(&theirs).sequence,
            length: 1500,
        };
        assert_eq!(path_mtu(&theirs), 1500);
        for off_by in [1000, (-1000_i32).cast_unsigned(), 1 << 31] {
            let sequence = original.sequence.wrapping_add(off_by);
            let wrong = TooBig { sequence, ..original };
            hosts.injector.too_big(router, sender, &wrong, 1300).expect("sends");
            // Ordered behind it. From us only: the peer's own numbers stay.
            pass(&ours, &theirs, 10);
            assert_eq!(path_mtu(&theirs), 1500, "{off_by}");
        }
        let original = TooBig { sequence: numbers(&theirs).sequence, ..original };
        hosts.injector.too_big(router, sender, &original, 1300).expect("sends");
        until("the path MTU is lowered", || path_mtu(&theirs) == 1300);
        let capture = Capture::new(&hosts.near);
        let fits = 1300 - if far.is_ipv4() { 20 } else { 40 } - 20 - 12;
        pass(&theirs, &ours, 50 * fits);
        let mut sent = capture.so_far();
        sent.retain(|seen| seen.source == sender && seen.payload > 0);
        // Offloading hands several on as one.
        assert!(sent.iter().all(|seen| seen.payload % fits == 0), "{fits}: {sent:?}");
        assert_eq!(sent.iter().map(|seen| seen.payload).sum::<usize>(), 50 * fits);
    }
}

#[test]
fn an_injector_queues_nothing_that_arrives() {
    let hosts = Hosts::new();
    let [(near, far), _] = hosts.families();
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (far, near) else {
        unreachable!("the first family is IPv4")
    };
    // The protocol that such a socket would receive, and one that shows that it arrives.
    let open = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
    let control = hosts.near.run(open).expect("a raw socket");
    control.set_read_timeout(Some(bound())).expect("is a socket");
    let sender = hosts.far.run(open).expect("a raw socket");
    let mut packet = [&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 255, 0, 0][..], &source.octets()].concat();
    packet.extend(destination.octets());
    packet.extend([0; 20]);
    for _ in 0..3 {
        sender.send_to(&packet, &SocketAddr::new(near, 0).into()).expect("sends");
    }
    // When the second one is here, the first one is wherever it goes.
    for _ in 0..2 {
        assert_eq!((&control).read(&mut [0; 100]).expect("arrives"), 40);
    }
    let waiting = || {
        let table = hosts.near.read("/proc/thread-self/net/raw");
        let queue = |line: &str| {
            let field = line.split_whitespace().nth(4).expect("queues");
            u32::from_str_radix(&field[9..], 16).expect("a number")
        };
        table.lines().skip(1).map(queue).collect::<Vec<_>>()
    };
    until("the control socket holds the third", || waiting().iter().any(|bytes| *bytes > 0));
    let waiting = waiting();
    assert_eq!(waiting.len(), 2, "this host's raw sockets of IPv4");
    assert!(waiting.contains(&0), "the injector queues: {waiting:?}");
}
