//! Limits: of connections, of descriptors, and what an idle connection may cost.

use std::net::{IpAddr, Ipv4Addr};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::peers::Peer;
use proxy_tests::process::need_open_files;
use proxy_tests::proxy::{Launch, Proxy};
use proxy_tests::servers::Upstream;
use proxy_tests::wait::eventually;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const ENGINES: [&str; 2] = ["copy", "splice"];

/// One more connection through `proxy`, which has carried a byte each way.
#[track_caller]
fn served(proxy: &Proxy, upstream: &Upstream) -> (Peer, Peer) {
    let client = Peer::connect(proxy.address());
    let server = upstream.accept();
    ping(&client, &server);
    (client, server)
}

#[track_caller]
fn ping(client: &Peer, server: &Peer) {
    client.send(b"ping");
    server.receive(b"ping");
    server.send(b"pong");
    client.receive(b"pong");
}

#[test]
fn clients_over_the_limit_are_refused_at_once_and_counted() {
    let upstream = Upstream::new(LOOPBACK);
    let proxy = Launch::new(upstream.address()).flag("max-connections", 3).start();
    let mut live: Vec<_> = (0..3).map(|_| served(&proxy, &upstream)).collect();
    for _ in 0..2 {
        let refused = Peer::connect(proxy.address());
        refused.expect_reset();
        assert_eq!(proxy.ended_of(refused.address()).reason, "over_limit");
    }
    let labels = [("engine", "none"), ("reason", "over_limit")];
    proxy.await_metric("connections_ended_total", &labels, 2.0);
    proxy.await_metric("connections_accepted_total", &[], 5.0);
    live.iter().for_each(|(client, server)| ping(client, server));
    // A place that becomes free is given away again.
    let (client, server) = live.pop().expect("three of them");
    let gone = client.address();
    drop((client, server));
    assert!(proxy.ended_of(gone).reason.ends_with("_closed"));
    let (client, server) = served(&proxy, &upstream);
    ping(&client, &server);
    assert!(upstream.accept_within(Duration::ZERO).is_none(), "a refused one reached the server");
}

#[track_caller]
fn runs_out_of_descriptors(proxy: &Proxy) {
    proxy.log_line("the proxy runs out of descriptors", |line| {
        line["message"].as_str().is_some_and(|text| text.contains("cannot accept"))
    });
}

#[test]
fn without_descriptors_clients_wait_and_are_served_later() {
    let upstream = Upstream::new(LOOPBACK);
    let proxy = Launch::new(upstream.address()).flag("engine", "copy").start();
    let (live, server_of_live) = served(&proxy, &upstream);
    // Below what it has open already: not one more.
    proxy.limit_open_files(3);
    let waiting: Vec<_> = (0..5).map(|_| Peer::connect(proxy.address())).collect();
    runs_out_of_descriptors(&proxy);

    // It waits instead of trying without end, and whoever is there already is served.
    let (before, since) = (proxy.process().cpu_ticks(), Instant::now());
    thread::sleep(Duration::from_secs(3));
    let (ticks, wall) = (proxy.process().cpu_ticks() - before, since.elapsed().as_millis() / 10);
    assert!(u128::from(ticks) < wall / 4, "{ticks} ticks of CPU time in {wall} of waiting");
    ping(&live, &server_of_live);

    proxy.limit_open_files(200);
    let servers: Vec<_> = waiting.iter().map(|_| upstream.accept()).collect();
    servers.iter().for_each(|server| server.send(b"welcome"));
    waiting.iter().for_each(|client| client.receive(b"welcome"));
    let errors = proxy.metric("accept_errors_total", &[("cause", "process_descriptors")]);
    assert!((1.0..1_000.0).contains(&errors), "{errors} failed accepts were counted");
}

#[test]
fn accepting_goes_on_after_a_flood() {
    const FILES: u64 = 64;
    let upstream = Upstream::new(LOOPBACK);
    let proxy = Launch::new(upstream.address()).flag("engine", "copy").open_files(FILES).start();
    let flood: Vec<_> = (0..FILES).map(|_| Peer::connect(proxy.address())).collect();
    runs_out_of_descriptors(&proxy);
    let served = std::iter::from_fn(|| upstream.accept_within(Duration::from_millis(200)));
    let servers: Vec<_> = served.collect();
    assert!(!servers.is_empty(), "nobody was served");
    drop((servers, flood));
    // Each core has a queue of its own: while one of them still holds clients that have left, the
    // client of another may be refused for want of a second descriptor.
    eventually("the flood is over", || {
        // Those that have left are relayed as well, until their servers see it.
        while upstream.accept_within(Duration::from_millis(200)).is_some() {}
        let is_over = proxy.metric("connections_accepted_total", &[]) >= FILES as f64
            && proxy.process().open_files() < FILES as usize / 2;
        is_over.then_some(())
    });
    let client = Peer::connect(proxy.address());
    client.send(b"at last");
    let server = upstream.accept();
    server.receive(b"at last");
    server.send(b"welcome");
    client.receive(b"welcome");
}

/// Many connections that have moved some bytes and then nothing more.
fn idle(proxy: &Proxy, upstream: &Upstream, count: usize) -> Vec<(Peer, Peer)> {
    let pairs: Vec<_> = (0..count).map(|_| served(proxy, upstream)).collect();
    for (client, server) in &pairs {
        client.send_stream(1, 100_000);
        server.receive_stream(1, 100_000);
        server.send_stream(2, 100_000);
        client.receive_stream(2, 100_000);
    }
    pairs
}

#[test]
fn an_idle_connection_costs_less_than_two_kibibytes() {
    const CONNECTIONS: usize = 2_000;
    const BEFORE: usize = 1_000;
    need_open_files(2 * (BEFORE + CONNECTIONS) as u64 + 500);
    for engine in ENGINES {
        let upstream = Upstream::new(LOOPBACK);
        let proxy = Launch::new(upstream.address()).flag("engine", engine).start();
        // What the first ones need once and for all (threads, pipes, the allocator's arenas and the
        // room that dialling takes for a moment) is not the price of one more.
        let _first = idle(&proxy, &upstream, BEFORE);
        let before = proxy.process().anonymous_memory();
        let _pairs = idle(&proxy, &upstream, CONNECTIONS);
        let grown = proxy.process().anonymous_memory().saturating_sub(before);
        let each = grown / CONNECTIONS as u64;
        println!("{engine}: {each} bytes for each idle connection");
        assert!(each < 2048, "{engine}: {each} bytes for each of {CONNECTIONS} idle connections");
    }
}

#[test]
fn idle_connections_cause_no_wake_ups() {
    thread::scope(|threads| {
        for engine in ENGINES {
            threads.spawn(move || stays_asleep(engine));
        }
    });
}

fn stays_asleep(engine: &str) {
    const WINDOW: Duration = Duration::from_secs(5);
    let upstream = Upstream::new(LOOPBACK);
    let proxy = Launch::new(upstream.address()).flag("engine", engine).start();
    let _pairs = idle(&proxy, &upstream, 200);
    let mut windows = Vec::new();
    // What is done once after bytes have moved may be done first, whenever that is; but then
    // comes a time longer than any period that a timer might have.
    while windows.len() < 20 {
        let before = proxy.process().sleeps();
        thread::sleep(WINDOW);
        windows.push(proxy.process().sleeps() - before);
        if windows.len() >= 5 && windows[windows.len() - 5..].iter().sum::<u64>() <= 5 {
            return;
        }
    }
    panic!("{engine}: idle connections cause wake-ups; in windows of {WINDOW:?}: {windows:?}");
}

#[test]
fn an_idle_timeout_ends_idle_connections_and_no_others() {
    for engine in ENGINES {
        let upstream = Upstream::new(LOOPBACK);
        let launch = Launch::new(upstream.address()).flag("engine", engine);
        let proxy = launch.flag("idle-timeout", "2s").start();
        let (idle, server_of_idle) = served(&proxy, &upstream);
        let (busy, server_of_busy) = served(&proxy, &upstream);
        let busy_until = Instant::now() + Duration::from_secs(6);
        while Instant::now() < busy_until {
            ping(&busy, &server_of_busy);
            thread::sleep(Duration::from_millis(50));
        }
        idle.expect_reset();
        server_of_idle.expect_reset();
        let ended = proxy.ended();
        assert_eq!(ended.reason, "idle_timeout");
        assert!(ended.duration_ms >= 2_000.0, "too early: {ended:?}");
    }
}
