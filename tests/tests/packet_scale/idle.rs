//! As many idle connections as the ephemeral range has ports, and others that are stuck.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proxy_tests::facts::{self, Socket, State};
use proxy_tests::holder::Holder;
use proxy_tests::maps;
use proxy_tests::netns::Host;
use proxy_tests::peers::Peer;
use proxy_tests::process::need_open_files;
use proxy_tests::row::{Family, Row};
use proxy_tests::servers::Upstream;
use proxy_tests::stalled::{self, Stalled};
use proxy_tests::wait::{bound, patient, until};

use crate::node::Node;

const COUNT: usize = 28_000;

/// What the first ones need once and for all (the allocator's arenas, above all for the moment that
/// they spend in userspace) is not the price of one more. So these come all at once, and the
/// others by ever so many.
const FIRST: usize = 8_000;
const BATCH: usize = 500;

/// Every so many'th carries a byte.
const SAMPLE: usize = 100;

/// What one may cost, whatever holds it.
const MOST: u64 = 512;

/// Nothing must happen for so long.
const QUIET: Duration = Duration::from_secs(60);

/// It may take so long until that begins: the proxy looks every 100 s whether somebody has been
/// silent for long, which takes a moment, whatever the number of connections.
const SETTLED: Duration = Duration::from_secs(200);

/// Readers that stall meanwhile, elsewhere.
const STALLED: usize = 100;

/// Ends of half of the connections, on either side.
type Clients = Holder<Vec<Peer>>;
type Servers = Holder<(Upstream, Vec<Peer>)>;

struct Crowd {
    clients: [Clients; 2],
    servers: [Servers; 2],
    accepted: Arc<AtomicUsize>,
    upstream: SocketAddr,
}

impl Crowd {
    fn new(row: &Row, family: Family) -> Self {
        // Half of the connections for each table; which half is the kernel's choice at the server.
        need_open_files(COUNT as u64 * 6 / 10);
        let clients = [(); 2].map(|()| Holder::on(&row.client, Vec::new));
        let server = |host: &Host, at: SocketAddr| {
            Holder::on(host, move || (Upstream::sharing(at), Vec::new()))
        };
        let first = server(&row.server, SocketAddr::new(row.back(family), 0));
        let upstream = first.run(|(upstream, _)| upstream.address());
        let servers = [first, server(&row.server, upstream)];
        Self { clients, servers, accepted: Arc::default(), upstream }
    }

    /// Opens so many more, and waits until all have reached a server.
    #[track_caller]
    fn open(&self, to: SocketAddr, count: usize) {
        let total = self.accepted.load(Ordering::Relaxed) + count;
        let connecting: Vec<_> = self
            .clients
            .iter()
            .map(|clients| {
                clients.begin(move |ends| {
                    ends.extend((0..count / 2).map(|_| Peer::connect(to)));
                })
            })
            .collect();
        let accepting: Vec<_> = self
            .servers
            .iter()
            .map(|servers| {
                let accepted = Arc::clone(&self.accepted);
                servers.begin(move |(upstream, ends)| {
                    let deadline = Instant::now() + bound();
                    while accepted.load(Ordering::Relaxed) < total && Instant::now() < deadline {
                        if let Some(end) = upstream.accept_within(Duration::from_millis(50)) {
                            ends.push(end);
                            accepted.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                })
            })
            .collect();
        connecting.into_iter().for_each(|begun| begun.end());
        accepting.into_iter().for_each(|begun| begun.end());
        assert_eq!(self.accepted.load(Ordering::Relaxed), total);
    }

    /// A byte both ways on a sample of the connections; how many those were.
    #[track_caller]
    fn talk(&self) -> usize {
        let mut sent = 0;
        for clients in &self.clients {
            sent += clients.run(|ends| {
                let sample = ends.iter().step_by(SAMPLE);
                sample.inspect(|end| end.send(b"?")).count()
            });
        }
        let mut answered = 0;
        until("the servers are asked", || {
            for servers in &self.servers {
                answered += servers.run(|(_, ends)| {
                    let asked = ends.iter().filter(|end| end.unread() > 0);
                    asked.inspect(|end| end.receive(b"?")).inspect(|end| end.send(b"!")).count()
                });
            }
            answered == sent
        });
        for clients in &self.clients {
            clients.run(|ends| ends.iter().step_by(SAMPLE).for_each(|end| end.receive(b"!")));
        }
        sent
    }
}

#[test]
fn idle_connections_cost_half_a_kibibyte_and_no_wake_up() {
    let family = Family::V4;
    let row = Row::new();
    // One address cannot have more connections to another than it has ports. The proxy's are the
    // upper half of the range, and those above.
    row.client.sysctl("ipv4.ip_local_port_range", "1024 65535");
    row.node.sysctl("ipv4.ip_local_port_range", "8192 65535");
    let crowd = Crowd::new(&row, family);
    let node = Node::new(row, crowd.upstream, COUNT);
    let process = node.proxy.process();
    let start = node.traces();
    let listening = facts::sockstat(node.host()).in_use;
    let process_memory = || process.anonymous_memory();
    let map_memory = || maps::of(process).values().sum::<u64>();
    let empty = map_memory();
    let begun = Instant::now();
    let to = SocketAddr::new(node.row.front(family), node.proxy.address().port());
    crowd.open(to, FIRST);
    node.await_switched(FIRST);
    let before = (map_memory(), process_memory());
    for opened in (FIRST..COUNT).step_by(BATCH) {
        crowd.open(to, BATCH);
        node.await_switched(opened + BATCH);
    }
    node.await_switched(COUNT);
    println!("{COUNT} connections switched in {:?}", begun.elapsed());
    assert_eq!(node.proxy.metric("packet_room", &[]), 0.0);

    // No socket: neither of TCP but listeners, nor one that nobody shows. (Asking for metrics
    // takes some for a moment.)
    let is_at_work = |socket: &Socket| !matches!(socket.state, State::Listen | State::TimeWait);
    until("the node has no sockets but listeners", || {
        let stat = facts::sockstat(node.host());
        stat.in_use == listening
            && stat.used <= start.sockets
            && !facts::sockets(node.host()).iter().any(is_at_work)
    });

    // No memory but the tables': records, which are there from the start, and entries.
    let now = (map_memory(), process_memory());
    let added = (COUNT - FIRST) as u64;
    let record = maps::named(process, "RECORDS").bytes() / COUNT as u64;
    let entries = (now.0 - before.0) / added;
    let memory = now.1.saturating_sub(before.1) / added;
    let each = record + entries + memory;
    println!(
        "each costs {each} bytes: {record} record, {entries} entries, {memory} of the process"
    );
    let empty_entries = maps::named(process, "FLOWS").bytes() / COUNT as u64 - entries;
    println!("and {empty_entries} of the table of entries while it is empty");
    println!("conntrack has {} entries beside it", facts::tracked(node.host()));
    assert!(each < MOST, "{each} bytes for each connection");

    stays_asleep(&node);
    println!("a byte both ways on {}", crowd.talk());

    // Everything ends, half by the clients' hand, half by ours.
    let begun = Instant::now();
    crowd.clients[0].run(|ends| ends.drain(..).for_each(Peer::reset));
    node.await_switched(COUNT / 2);
    println!("half reset after {:?}", begun.elapsed());
    let killed = node.connections(&["kill", "--all"]);
    println!("{} after {:?}", killed.trim(), begun.elapsed());
    crowd.clients[1].run(|ends| ends.drain(..).for_each(|end| end.expect_reset()));
    for servers in &crowd.servers {
        servers.run(|(_, ends)| ends.drain(..).for_each(|end| end.expect_reset_unread()));
    }
    node.await_switched(0);
    node.proxy.await_metric("packet_room", &[], COUNT as f64);
    node.await_traces(&start, bound());
    println!("nothing is left after {:?}", begun.elapsed());
    assert_eq!(map_memory(), empty);
}

/// Another node, where all is stalled.
fn stall() -> (Node, Stalled) {
    let family = Family::V6;
    let row = Row::new();
    stalled::small_buffers(&row);
    let back = row.back(family);
    let upstream = row.server.run(move || Upstream::new(back));
    let node = Node::new(row, upstream.address(), STALLED);
    let before = facts::sockstat(node.host());
    let to = SocketAddr::new(node.row.front(family), node.proxy.address().port());
    let pair = |_| (node.row.client.run(move || Peer::connect(to)), upstream.accept());
    let pairs = (0..STALLED).map(pair).collect();
    node.await_switched(STALLED);
    until("the node has no sockets", || facts::connections(node.host()) == 0);
    let stalled = Stalled::new(&node.row.node, node.proxy.process(), before, pairs);
    (node, stalled)
}

/// For a minute no thread of the proxy wakes up, nor takes any time of a processor. What is done
/// once after a change may be done first, whenever that is. In the same minute, which is long,
/// readers stall at another node.
#[track_caller]
fn stays_asleep(node: &Node) {
    let (_elsewhere, stalled) = stall();
    let state = || (node.proxy.process().sleeps(), node.proxy.process().cpu_ticks());
    let (begun, mut since, mut before) = (Instant::now(), Instant::now(), state());
    while since.elapsed() < QUIET {
        stalled.look();
        std::thread::sleep(Duration::from_secs(1));
        let now = state();
        if now != before {
            println!("awake after {:?}: {before:?}, {now:?} (sleeps, ticks)", begun.elapsed());
            assert!(begun.elapsed() < patient(SETTLED), "idle connections cause wake-ups");
            (since, before) = (Instant::now(), now);
        }
    }
    println!("asleep for {QUIET:?}, {:?} after the last connection", begun.elapsed());
    stalled.end();
}
