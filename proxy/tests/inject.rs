//! Segments and ICMP errors for connections without a socket, judged by a real peer's kernel.
//! Needs root and the `ip` command.

use std::io::{ErrorKind, Read as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};

use proxy::packet::inject::{Injector, Segment, TooBig};
use proxy_tests::netns::{Host, Wire};
use proxy_tests::segments::{self, Capture, connection, numbers, pass, path_mtu, vanish};
use proxy_tests::wait::eventually;

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
        source: ours.local_addr().expect("connected"),
        destination: ours.peer_addr().expect("connected"),
        sequence,
        acknowledgement,
        window: 500,
        timestamps: Some((timestamp, 0)),
    }
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
        let length = if foreign.is_ipv4() { 32 } else { 128 };
        hosts.near.ip(&format!("addr add {foreign}/{length} dev lo"));
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
    for (_, far) in hosts.families() {
        let (ours, theirs) = connection(&hosts.near, &hosts.far, SocketAddr::new(far, 0));
        // The last word is ours, so that nobody owes an acknowledgement.
        pass(&theirs, &ours, 10);
        let exact = next(&ours);
        let from_far = |flags| {
            move |seen: &segments::Seen| seen.source == exact.destination && seen.flags == flags
        };
        let capture = Capture::new(&hosts.near);
        let probe = Segment { sequence: exact.sequence.wrapping_sub(1), ..exact };
        hosts.injector.probe(&probe).expect("sends");
        let answer = capture.next(from_far(ACK));
        assert_eq!(answer.destination, exact.source);
        assert_eq!(answer.payload, 0);
        assert_eq!(answer.acknowledgement, exact.sequence);
        assert_eq!(answer.sequence, exact.acknowledgement);
        there_and_back(&ours, &theirs);

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
        eventually("everything is acknowledged", || {
            let (ours, theirs) = (numbers(&ours), numbers(&theirs));
            theirs.sequence == ours.acknowledgement && ours.sequence == theirs.acknowledgement
        });
        let sender = theirs.local_addr().expect("connected");
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
            there_and_back_without_progress(&ours, &theirs);
            assert_eq!(path_mtu(&theirs), 1500, "{off_by}");
        }
        let original = TooBig { sequence: numbers(&theirs).sequence, ..original };
        hosts.injector.too_big(router, sender, &original, 1300).expect("sends");
        eventually("the path MTU is lowered", || path_mtu(&theirs) == 1300);
        let capture = Capture::new(&hosts.near);
        pass(&theirs, &ours, 100_000);
        let header = if far.is_ipv4() { 20 } else { 40 };
        let largest = capture.so_far().into_iter().filter(|seen| seen.source == sender);
        let largest = largest.map(|seen| seen.payload).max().expect("segments");
        // Offloading hands several on as one: whole multiples of what fits.
        assert_eq!(largest % (1300 - header - 32), 0, "{largest}");
    }
}

/// Orders what was sent before: once this is through, so is that. A few bytes from us only, so
/// that the peer's own numbers stay.
fn there_and_back_without_progress(ours: &TcpStream, theirs: &TcpStream) {
    pass(ours, theirs, 10);
}

#[test]
fn an_injector_queues_nothing_that_arrives() {
    let hosts = Hosts::new();
    let [(near, far), _] = hosts.families();
    // Protocol 255 is what such a socket would receive.
    let send = move || {
        let kind = socket2::Type::RAW;
        let protocol = Some(socket2::Protocol::from(255));
        let socket = socket2::Socket::new(socket2::Domain::IPV4, kind, protocol)?;
        let mut packet = vec![0; 40];
        packet[..10].copy_from_slice(&[0x45, 0, 0, 40, 0, 0, 0, 0, 64, 255]);
        let ([IpAddr::V4(source), IpAddr::V4(destination)], _) = ([far, near], ()) else {
            unreachable!("both are IPv4")
        };
        packet[12..16].copy_from_slice(&source.octets());
        packet[16..20].copy_from_slice(&destination.octets());
        socket.send_to(&packet, &SocketAddr::new(near, 0).into())
    };
    let listed = |host: &Host| {
        let table = host.run(|| std::fs::read_to_string("/proc/thread-self/net/raw"));
        table.expect("raw sockets are listed")
    };
    hosts.far.run(send).expect("sends");
    let (ours, theirs) = connection(&hosts.near, &hosts.far, SocketAddr::new(far, 0));
    there_and_back(&ours, &theirs);
    let table = listed(&hosts.near);
    let line = table.lines().nth(1).expect("the injector's socket");
    let fields: Vec<&str> = line.split_whitespace().collect();
    assert!(fields[4].ends_with(":00000000"), "receive queue: {line}");
    assert_ne!(fields[12], "0", "the packet was for this socket, and dropped: {line}");
}
