//! Switched connections without their process, and with the next one.

use std::thread;

use proxy_tests::peers::{Ending, Peer};
use proxy_tests::proxy::Proxy;
use proxy_tests::servers::Upstream;
use proxy_tests::wait::until;

use crate::ground::{Ground, Pair, TALK, await_relayed_by_kernel, relayed_by_kernel};

const BULK: u64 = 150_000_000;
const SEEN: u64 = 10_000_000;

/// Sends bulk both ways, calls `meanwhile` well before its end, and checks every byte.
#[track_caller]
pub fn bulk(pair: &Pair, bytes: u64, meanwhile: impl FnOnce()) {
    let begun = std::sync::Barrier::new(3);
    let read = |reader: &proxy_tests::peers::Peer, seed| {
        let mut stream = proxy_tests::stream::Stream::new(seed);
        reader.receive_next(&mut stream, SEEN);
        begun.wait();
        reader.receive_rest(stream)
    };
    thread::scope(|threads| {
        threads.spawn(|| pair.client.try_send_all(1, bytes).expect("to the end"));
        threads.spawn(|| pair.server.try_send_all(2, bytes).expect("to the end"));
        let up = threads.spawn(|| read(&pair.server, 1));
        let down = threads.spawn(|| read(&pair.client, 2));
        begun.wait();
        meanwhile();
        for ended in [up, down] {
            assert_eq!(ended.join().expect("read"), (bytes, Ending::Eof));
        }
    });
}

/// The access log tells of `pair` with the bytes of so many talks and `more` each way.
#[track_caller]
fn expect_ended(proxy: &Proxy, pair: &Pair, talks: u64, more: u64, reason: &str) {
    let ended = proxy.ended_of(pair.client.address());
    assert_eq!(ended.engine.as_deref(), Some("packet"), "{ended:?}");
    assert_eq!(ended.bytes_up, talks * TALK.0 + more, "{ended:?}");
    assert_eq!(ended.bytes_down, talks * TALK.1 + more, "{ended:?}");
    assert!(ended.reason == reason || reason == "any", "{ended:?}, not {reason}");
}

pub fn killed_in_the_middle_and_taken_over(at: &Ground) {
    let mut first = at.launch().start();
    let pairs = at.switched(&first, 3);
    bulk(&pairs[0], BULK, || first.kill9());
    pairs[1].talk();
    // A process comes while bytes are on their way, too.
    let mut second = None;
    bulk(&pairs[1], BULK, || second = Some(at.launch().start()));
    let mut second = second.expect("started");
    expect_ended(&second, &pairs[0], 1, BULK, "any");
    expect_ended(&second, &pairs[1], 2, BULK, "any");
    await_relayed_by_kernel(&second, 1.0);
    pairs[2].talk();
    let [row] = at.list().try_into().expect("one row");
    assert_eq!(row["client"], pairs[2].client.address().to_string(), "{row}");
    assert_eq!((row["bytes_up"].as_u64(), row["bytes_down"].as_u64()), (Some(20), Some(18)));
    // New ones are relayed beside it, by the kernel as well.
    let more = at.switched(&second, 2);
    pairs[2].close();
    expect_ended(&second, &pairs[2], 2, 0, "client_closed");
    await_relayed_by_kernel(&second, 2.0);
    // And they survive this process in turn.
    second.kill9();
    more.iter().for_each(Pair::talk);
    let third = at.launch().start();
    await_relayed_by_kernel(&third, 2.0);
    for pair in &more {
        pair.talk();
        pair.close();
        expect_ended(&third, pair, 3, 0, "client_closed");
    }
    await_relayed_by_kernel(&third, 0.0);
}

pub fn an_upgrade_by_sigterm(at: &Ground) {
    let mut first = at.launch().flag("drain-timeout", "10m").start();
    let pairs = at.switched(&first, 2);
    first.sigterm();
    assert_eq!(first.exit_code(), Some(0), "it waited for connections that do without it");
    pairs[0].talk();
    let second = at.launch().start();
    await_relayed_by_kernel(&second, 2.0);
    for pair in &pairs {
        pair.talk();
        pair.close();
    }
    expect_ended(&second, &pairs[0], 3, 0, "client_closed");
    expect_ended(&second, &pairs[1], 2, 0, "client_closed");
}

/// The records keep their number, and connections beyond the new limit are not lost.
pub fn another_limit_of_connections(at: &Ground) {
    let mut proxy = at.launch().flag("max-connections", 40).start();
    let pairs = at.switched(&proxy, 20);
    for limit in [5, 500] {
        proxy.kill9();
        proxy = at.launch().flag("max-connections", limit).start();
        await_relayed_by_kernel(&proxy, 20.0);
        pairs.iter().for_each(Pair::talk);
    }
    proxy.kill9();
    // Those taken over count: there is no place for another until enough of them have ended.
    let proxy = at.launch().flag("max-connections", 5).start();
    let to = at.address();
    let refused = at.row.client.run(move || Peer::connect(to));
    refused.expect_reset();
    let mut pairs = pairs.into_iter();
    for pair in pairs.by_ref().take(15) {
        pair.client.reset();
        pair.server.expect_reset();
    }
    await_relayed_by_kernel(&proxy, 5.0);
    let refused = at.row.client.run(move || Peer::connect(to));
    refused.expect_reset();
    let pair = pairs.next().expect("five are left");
    pair.client.reset();
    pair.server.expect_reset();
    await_relayed_by_kernel(&proxy, 4.0);
    at.switched(&proxy, 1)[0].talk();
}

pub fn ends_that_no_process_saw(at: &Ground) {
    let mut first = at.launch().start();
    let pairs = at.switched(&first, 5);
    let addresses: Vec<_> = pairs.iter().map(|pair| pair.client.address()).collect();
    first.kill9();
    let [closed, closed_by_server, half, client_resets, server_resets] =
        <[Pair; 5]>::try_from(pairs).expect("five");
    closed.talk();
    closed.close();
    closed_by_server.server.finish();
    closed_by_server.client.expect_eof();
    closed_by_server.client.finish();
    closed_by_server.server.expect_eof();
    half.client.finish();
    half.server.expect_eof();
    client_resets.client.reset();
    client_resets.server.expect_reset();
    server_resets.server.reset();
    server_resets.client.expect_reset();
    let mut second = at.launch().start();
    expect_ended(&second, &closed, 2, 0, "client_closed");
    expect_ended(&second, &closed_by_server, 1, 0, "server_closed");
    for (address, reason) in [(addresses[3], "client_reset"), (addresses[4], "server_reset")] {
        let ended = second.ended_of(address);
        assert_eq!((ended.bytes_up, ended.bytes_down), TALK, "{ended:?}");
        assert_eq!(ended.reason, reason);
    }
    await_relayed_by_kernel(&second, 1.0);
    // Ends are told of once, by whom it may be: the tuples of the closed ones are still kept.
    second.kill9();
    let third = at.launch().start();
    await_relayed_by_kernel(&third, 1.0);
    half.server.send(b"the last word");
    half.client.receive(b"the last word");
    half.server.finish();
    half.client.expect_eof();
    let ended = third.ended_of(half.client.address());
    assert_eq!((ended.bytes_up, ended.bytes_down), (TALK.0, TALK.1 + 13), "{ended:?}");
    assert_eq!(ended.reason, "client_closed");
    assert_eq!(third.access_log(1).len(), 1, "some were told of twice");
    assert_eq!(relayed_by_kernel(&third), 0.0);
}

pub fn the_next_process_kills_them(at: &Ground) {
    let mut first = at.launch().start();
    let pairs = at.switched(&first, 3);
    first.kill9();
    let mut second = at.launch().start();
    await_relayed_by_kernel(&second, 3.0);
    let rows = at.list();
    let address = pairs[0].client.address().to_string();
    let row = rows.iter().find(|row| row["client"] == address.as_str());
    let id = row.and_then(|row| row["id"].as_str()).unwrap_or_else(|| panic!("{rows:?}"));
    at.connections(&["kill", id]);
    pairs[0].expect_reset();
    expect_ended(&second, &pairs[0], 1, 0, "killed");
    pairs[1].talk();
    at.connections(&["kill", "--all"]);
    pairs[1].expect_reset();
    pairs[2].expect_reset();
    await_relayed_by_kernel(&second, 0.0);
    assert!(at.list().is_empty());
    second.sigterm();
    assert_eq!(second.exit_code(), Some(0));
}

/// The proxy holds bytes that an end does not take: it has all the time it wants, until the process
/// must end.
pub fn an_end_that_does_not_read_and_sigterm(at: &Ground) {
    // Little room there, and little announced by us: nothing but those bytes speaks against a switch.
    at.row.server.sysctl("ipv4.tcp_rmem", "4096 16384 6291456");
    at.row.node.sysctl("ipv4.tcp_rmem", "4096 65536 6291456");
    let back = at.row.back(at.family);
    let upstream = at.row.server.run(move || Upstream::new(back));
    let launch = at.launch().flag("upstream-addr", upstream.address());
    let mut proxy = launch.flag("drain-timeout", "1s").start();
    let to = at.address();
    let client = at.row.client.run(move || Peer::connect(to));
    let server = upstream.accept();
    client.send_stream(1, 30_000);
    let labels = [("reason", "window")];
    until("it was looked at", || proxy.metric("packet_ineligible_total", &labels) > 0.0);
    proxy.sigterm();
    client.expect_reset();
    server.expect_reset_unread();
    assert_eq!(proxy.exit_code(), Some(1));
}
