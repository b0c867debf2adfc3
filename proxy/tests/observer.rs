//! What the tc program reports and what it passes over, one made-up packet at a time: the kernel
//! runs the program on each (BPF_PROG_TEST_RUN), attached to nothing. Needs root.

use std::net::{IpAddr, SocketAddr};

use aya::maps::{Array, HashMap, RingBuf};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use proxy_common::{
    Endpoint, Handshake, STEP_ACK, STEP_SYN, STEP_SYN_ACK, TcpOptions, WATCH_LOCAL, WATCH_REMOTE,
    flags, names, port_bit,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/steward-ebpf"));

/// "Whatever other programs say": never a verdict of our own.
const TC_ACT_UNSPEC: u32 = u32::MAX;

const CLIENT: &str = "192.0.2.1:40000";
const SERVER: &str = "198.51.100.2:6443";

/// The programs with maps of their own.
struct Observer(Ebpf);

impl Observer {
    fn watching(ends: &[(&str, u32)]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "this suite needs root: it loads programs");
        let mut ebpf = EbpfLoader::new()
            .override_global(aya_log::LEVEL, &0u8, true)
            .override_global(names::REPORT, &1u8, true)
            .load(OBJECT)
            .expect("the object");
        for name in [names::PACKET_INGRESS, names::PACKET_EGRESS] {
            program(&mut ebpf, name).load().expect("the verifier's leave");
        }
        let mut observer = Self(ebpf);
        for (end, role) in ends {
            observer.watch(address(end), *role);
        }
        observer
    }

    fn watch(&mut self, end: SocketAddr, role: u32) {
        let ends = self.0.map_mut(names::WATCHED).expect("the map");
        HashMap::try_from(ends)
            .expect("a hash")
            .insert(Endpoint::from(end), role, 0)
            .expect("room");
        let (word, bit) = port_bit(end.port());
        let ports = self.0.map_mut(names::WATCHED_PORTS).expect("the map");
        Array::<_, u64>::try_from(ports).expect("an array").set(word, bit, 0).expect("in range");
    }

    /// Runs one hook on one packet; the events it made.
    fn see(&mut self, hook: &'static str, packet: &[u8]) -> Vec<Handshake> {
        let options = TestRunOptions { data_in: Some(packet), ..TestRunOptions::new() };
        let result = program(&mut self.0, hook).test_run(options).expect("a run");
        assert_eq!(result.return_value, TC_ACT_UNSPEC, "others must have their say");
        let map = self.0.map_mut(names::HANDSHAKES).expect("the map");
        let mut ring = RingBuf::try_from(map).expect("a ring buffer");
        let mut events = Vec::new();
        while let Some(record) = ring.next() {
            events.extend(Handshake::from_record(&record));
        }
        events
    }

    fn arrives(&mut self, packet: &Packet) -> Vec<Handshake> {
        self.see(names::PACKET_INGRESS, &packet.bytes())
    }

    fn leaves(&mut self, packet: &Packet) -> Vec<Handshake> {
        self.see(names::PACKET_EGRESS, &packet.bytes())
    }
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> &'e mut SchedClassifier {
    ebpf.program_mut(name).expect("in the object").try_into().expect("a classifier")
}

fn address(text: &str) -> SocketAddr {
    text.parse().expect("an address")
}

/// A TCP segment in an Ethernet frame.
#[derive(Clone)]
struct Packet {
    source: SocketAddr,
    destination: SocketAddr,
    sequence: u32,
    acknowledgement: u32,
    flags: u16,
    /// Multiples of four bytes.
    options: Vec<u8>,
    payload: usize,
    /// Of IPv4: multiples of four bytes.
    ip_options: usize,
    /// Of IPv4, in units of eight bytes.
    fragment: u16,
}

impl Packet {
    fn new(source: &str, destination: &str, flags: u16) -> Self {
        Self {
            source: address(source),
            destination: address(destination),
            sequence: 1000,
            acknowledgement: 0,
            flags,
            options: Vec::new(),
            payload: 0,
            ip_options: 0,
            fragment: 0,
        }
    }

    fn numbers(mut self, sequence: u32, acknowledgement: u32) -> Self {
        (self.sequence, self.acknowledgement) = (sequence, acknowledgement);
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let tcp = self.tcp();
        let mut frame = vec![0; 12];
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let header = 20 + self.ip_options;
                frame.extend(0x0800u16.to_be_bytes());
                frame.extend([0x40 | (header / 4) as u8, 0x02]);
                frame.extend(((header + tcp.len()) as u16).to_be_bytes());
                frame.extend([0, 0]);
                frame.extend(self.fragment.to_be_bytes());
                frame.extend([64, 6, 0, 0]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
                frame.extend(vec![1; self.ip_options]);
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend(0x86ddu16.to_be_bytes());
                frame.extend([0x60, 0x20, 0, 0]);
                frame.extend((tcp.len() as u16).to_be_bytes());
                frame.extend([6, 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            _ => panic!("one family"),
        }
        frame.extend(tcp);
        frame
    }

    fn tcp(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledgement.to_be_bytes());
        let words = 5 + self.options.len() as u16 / 4;
        bytes.extend((words << 12 | self.flags).to_be_bytes());
        bytes.extend(500u16.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(&self.options);
        bytes.extend(vec![b'x'; self.payload]);
        bytes
    }
}

fn syn() -> Packet {
    Packet::new(CLIENT, SERVER, flags::SYN)
}

fn syn_ack() -> Packet {
    Packet::new(SERVER, CLIENT, flags::SYN | flags::ACK).numbers(5000, 1001)
}

fn ack() -> Packet {
    Packet::new(CLIENT, SERVER, flags::ACK).numbers(1001, 5001)
}

fn steps(events: &[Handshake]) -> Vec<u8> {
    events.iter().map(|event| event.step).collect()
}

#[test]
fn a_listeners_handshake_is_three_events_and_then_there_is_silence() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    let events = observer.arrives(&syn());
    assert_eq!(steps(&events), [STEP_SYN]);
    assert_eq!(SocketAddr::from(events[0].source), address(CLIENT));
    assert_eq!(SocketAddr::from(events[0].destination), address(SERVER));
    assert_eq!((events[0].sequence, events[0].window), (1000, 500));
    assert_eq!((events[0].family, events[0].traffic_class), (4, 2));
    assert_eq!(steps(&observer.leaves(&syn_ack())), [STEP_SYN_ACK]);
    assert_eq!(steps(&observer.arrives(&ack())), [STEP_ACK]);
    assert_eq!(steps(&observer.arrives(&ack())), [], "the handshake is over");
    let data = Packet { payload: 100, flags: flags::ACK | 1 << 3, ..ack() };
    assert_eq!(steps(&observer.arrives(&data)), []);
}

#[test]
fn a_connection_of_our_own_is_seen_from_the_other_side() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_REMOTE)]);
    assert_eq!(steps(&observer.leaves(&syn())), [STEP_SYN]);
    assert_eq!(steps(&observer.arrives(&syn_ack())), [STEP_SYN_ACK]);
    assert_eq!(steps(&observer.leaves(&ack())), [STEP_ACK]);
    assert_eq!(steps(&observer.leaves(&ack())), []);
}

#[test]
fn data_completes_a_handshake_whose_bare_acknowledgement_was_lost() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    observer.leaves(&syn_ack());
    let data = Packet { payload: 100, flags: flags::ACK | 1 << 3, ..ack() };
    assert_eq!(steps(&observer.arrives(&data)), [STEP_ACK]);
}

#[test]
fn numbers_that_do_not_continue_the_handshake_complete_nothing() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    assert_eq!(steps(&observer.arrives(&ack())), [], "no answer was seen");
    observer.leaves(&syn_ack());
    for (sequence, acknowledgement) in [(1000, 5001), (1002, 5001), (1001, 5000), (1001, 5002)] {
        let stray = ack().numbers(sequence, acknowledgement);
        assert_eq!(steps(&observer.arrives(&stray)), [], "{sequence} {acknowledgement}");
    }
    assert_eq!(steps(&observer.arrives(&ack())), [STEP_ACK], "strays did no harm");
}

#[test]
fn an_answer_sent_again_is_reported_again_and_so_is_its_acknowledgement() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    for _ in 0..2 {
        assert_eq!(steps(&observer.leaves(&syn_ack())), [STEP_SYN_ACK]);
        assert_eq!(steps(&observer.arrives(&ack())), [STEP_ACK]);
    }
}

#[test]
fn sequence_numbers_wrap() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    observer.leaves(&syn_ack().numbers(u32::MAX, 0));
    assert_eq!(steps(&observer.arrives(&ack().numbers(0, 0))), [STEP_ACK]);
}

#[test]
fn a_listener_on_every_address_is_found_in_both_families() {
    let mut observer = Observer::watching(&[("[::]:6443", WATCH_LOCAL)]);
    assert_eq!(steps(&observer.arrives(&syn())), [STEP_SYN]);
    let six = Packet::new("[2001:db8::1]:40000", "[2001:db8::2]:6443", flags::SYN);
    let events = observer.arrives(&six);
    assert_eq!(steps(&events), [STEP_SYN]);
    assert_eq!(SocketAddr::from(events[0].source), six.source);
    assert_eq!((events[0].family, events[0].traffic_class), (6, 2));
}

#[test]
fn what_is_not_ours_is_passed_over() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    let silent = [
        ("another port", Packet::new(CLIENT, "198.51.100.2:6444", flags::SYN)),
        ("another address", Packet::new(CLIENT, "198.51.100.3:6443", flags::SYN)),
        ("an answer from another", Packet::new("198.51.100.3:6443", CLIENT, 0x12)),
        ("a SYN from the listener", Packet::new(SERVER, CLIENT, flags::SYN)),
        ("a reset", Packet::new(CLIENT, SERVER, flags::RST)),
        ("SYN and RST", Packet::new(CLIENT, SERVER, flags::SYN | flags::RST)),
        ("SYN and FIN", Packet::new(CLIENT, SERVER, flags::SYN | flags::FIN)),
        ("a first fragment", Packet { fragment: 1 << 13, ..syn() }),
        ("a later fragment", Packet { fragment: 3, ..syn() }),
    ];
    for (what, packet) in silent {
        assert_eq!(steps(&observer.arrives(&packet)), [], "{what}");
        assert_eq!(steps(&observer.leaves(&packet)), [], "{what}, leaving");
    }
    let mut udp = syn().bytes();
    udp[23] = 17;
    assert_eq!(steps(&observer.see(names::PACKET_INGRESS, &udp)), [], "UDP");
    let mut arp = syn().bytes();
    arp[12..14].copy_from_slice(&[8, 6]);
    assert_eq!(steps(&observer.see(names::PACKET_INGRESS, &arp)), [], "ARP");
}

#[test]
fn options_of_ip_and_tcp_are_skipped_and_read() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    let options = vec![2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 1, 2, 0, 0, 0, 0, 1, 3, 3, 7];
    let packet = Packet { options: options.clone(), ip_options: 40, ..syn() };
    let events = observer.arrives(&packet);
    assert_eq!(steps(&events), [STEP_SYN]);
    let found = events[0].options;
    assert_eq!((found.mss, found.window_scale, found.tsval), (1460, 7, 258));
    assert!(found.has(TcpOptions::SACK_PERMITTED | TcpOptions::HAS_TIMESTAMPS));
    assert_eq!(usize::from(events[0].raw_options_len), options.len());
    assert_eq!(events[0].raw_options[..options.len()], options);
}

#[test]
fn the_kernel_and_the_host_parse_every_odd_option_alike() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    let mut state = 0x2545_f491_4f6c_dd1du64;
    for length in (0..=40).step_by(4).cycle().take(2000) {
        let options: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 60) as u8
        })
        .take(length)
        .collect();
        let events = observer.arrives(&Packet { options: options.clone(), ..syn() });
        assert_eq!(steps(&events), [STEP_SYN], "{options:?}");
        let mut buffer = [0; 64];
        buffer[..length].copy_from_slice(&options);
        assert_eq!(events[0].options, TcpOptions::parse(&buffer, length as u32), "{options:?}");
    }
}

#[test]
fn a_header_that_does_not_fit_into_its_packet_is_counted_and_passed() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    let mut lies = Packet { options: vec![1; 40], ..syn() }.bytes();
    lies.truncate(14 + 20 + 20 + 4);
    assert_eq!(steps(&observer.see(names::PACKET_INGRESS, &lies)), []);
    let mut short = syn().bytes();
    // A data offset below five words.
    short[14 + 20 + 12] = 4 << 4;
    assert_eq!(steps(&observer.see(names::PACKET_INGRESS, &short)), []);
    let map = observer.0.map(names::COUNTERS).expect("the map");
    let counters = aya::maps::PerCpuArray::<_, u64>::try_from(map).expect("an array");
    let unreadable = proxy_common::Counter::Unreadable as u32;
    let count: u64 = counters.get(&unreadable, 0).expect("in range").iter().sum();
    assert_eq!(count, 1);
}

#[test]
fn accurate_ecn_and_its_older_sister_are_told_apart() {
    let mut observer = Observer::watching(&[(SERVER, WATCH_LOCAL)]);
    let older = flags::SYN | flags::ECE | flags::CWR;
    for offered in [older, older | flags::AE] {
        let events = observer.arrives(&Packet { flags: offered, ..syn() });
        assert_eq!(events[0].flags, offered);
    }
}
