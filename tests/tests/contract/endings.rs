//! An orderly end of one direction: it passes through, only after all bytes before it, and the
//! other direction goes on.

use proxy_tests::peers::{Ending, Peer, both};
use proxy_tests::stream::Stream;

use crate::setting::{Relayed, Setting, Side};

/// `side` sends a request and FIN; the other answers with 10 MB and single bytes.
fn half_close(at: &Setting, side: Side) {
    let (proxy, ending, other) = at.relayed().seen_from(side);
    let request = || {
        ending.send_stream(1, 1_000_000);
        ending.finish();
    };
    both(request, || assert_eq!(other.receive_until_end(1), (1_000_000, Ending::Eof)));
    both(|| other.send_stream(2, 10_000_000), || ending.receive_stream(2, 10_000_000));
    both(|| other.send_byte_by_byte(3, 500), || ending.receive_stream(3, 500));
    other.finish();
    ending.expect_eof();
    let ended = proxy.ended();
    assert_eq!(ended.reason, side.closed());
    let (first, second) = match side {
        Side::Client => (ended.bytes_up, ended.bytes_down),
        Side::Server => (ended.bytes_down, ended.bytes_up),
    };
    assert_eq!((first, second), (1_000_000, 10_000_500));
}

pub fn half_close_from_client_keeps_the_other_direction(at: &Setting) {
    half_close(at, Side::Client);
}

pub fn half_close_from_server_keeps_the_other_direction(at: &Setting) {
    half_close(at, Side::Server);
}

pub fn an_end_waits_for_all_bytes_before_a_slow_reader(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let sent = writer.fill(1, at.backlog_bound());
        writer.finish();
        // The other direction is not held up by the one that is full.
        reader.send(b"meanwhile");
        writer.receive(b"meanwhile");
        reader.receive_in_sizes(1, sent, || 5_000);
        reader.expect_eof();
        reader.finish();
        writer.expect_eof();
        assert_eq!(proxy.ended().reason, side.closed());
    }
}

/// A closed socket is the kernel's alone, which forgets one whose peer does not read for a minute.
pub fn a_connection_lives_until_its_last_byte_has_left(at: &Setting) {
    for side in Side::BOTH {
        // On a busy machine the reader may have caught up before the proxy comes to hand on the rest.
        let is_shown = (0..10).any(|_| lives_until_its_last_byte_has_left(at, side));
        assert!(is_shown, "bytes never waited behind the proxy");
    }
}

/// Whether it could be seen: more waited than the reader's own buffer takes.
fn lives_until_its_last_byte_has_left(at: &Setting, side: Side) -> bool {
    /// Far more than a reader with small buffers takes, and half of what the proxy lets wait unsent.
    const WAITING: u64 = 128 * 1024;
    let (proxy, writer, reader) = at.relayed().seen_from(side);
    reader.shrink_buffers();
    let sent = writer.fill(1, at.backlog_bound());
    writer.finish();
    reader.finish();
    writer.expect_eof();
    let direction = if side == Side::Client { "up" } else { "down" };
    let handed_on = || proxy.metric("bytes_total", &[("direction", direction)]) as u64;
    // Read until the kernel has taken all from the proxy.
    let mut stream = Stream::new(1);
    while handed_on() < sent {
        reader.receive_next(&mut stream, 5_000);
    }
    let waits = sent - stream.position() > WAITING;
    for _ in 0..if waits { 50 } else { 0 } {
        let relaying = proxy.metric("connections_relaying", &[("engine", at.engine)]);
        assert_eq!(relaying, 1.0, "the connection ended with bytes still to be sent");
    }
    let read = stream.position();
    reader.receive_next(&mut stream, sent - read);
    reader.expect_eof();
    // The reader's own direction was free, so it ended first.
    let first = if side == Side::Client { Side::Server } else { Side::Client };
    assert_eq!(proxy.ended().reason, first.closed());
    waits
}

/// Each end is known to the other at once, whoever reads how much of the other direction.
pub fn the_second_end_waits_for_no_reader_of_the_first(at: &Setting) {
    // More than the reader's buffer takes, less than what may wait in the proxy.
    const LEN: u64 = 200_000;
    for side in Side::BOTH {
        let (proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        writer.send_stream(1, LEN);
        writer.finish();
        let direction = if side == Side::Client { "up" } else { "down" };
        if at.engine != "packet" {
            proxy.await_metric("bytes_total", &[("direction", direction)], LEN as f64);
        }
        // By then the proxy knows of the writer's end.
        reader.send(b"meanwhile");
        writer.receive(b"meanwhile");
        reader.finish();
        writer.expect_eof();
        reader.receive_stream(1, LEN);
        reader.expect_eof();
        assert!(proxy.ended().reason.ends_with("_closed"));
    }
}

pub fn both_directions_end_at_once_with_bytes_under_way(at: &Setting) {
    let (proxy, upstream) = at.start();
    const LEN: u64 = 300_000;
    let exchange = |peer: &Peer, out, back| {
        both(
            || {
                peer.send_stream(out, LEN);
                peer.finish();
            },
            || assert_eq!(peer.receive_until_end(back), (LEN, Ending::Eof)),
        );
    };
    for _ in 0..50 {
        let (client, server) = at.pair(&proxy, &upstream);
        both(|| exchange(&client, 1, 2), || exchange(&server, 2, 1));
    }
    for ended in proxy.access_log(50) {
        assert_eq!((ended.bytes_up, ended.bytes_down), (LEN, LEN), "{ended:?}");
        assert!(ended.reason.ends_with("_closed"), "{ended:?}");
    }
}

pub fn a_connection_without_bytes_ends_cleanly(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, first, second) = at.relayed().seen_from(side);
        first.finish();
        second.expect_eof();
        second.finish();
        first.expect_eof();
        let ended = proxy.ended();
        assert_eq!(ended.reason, side.closed());
        assert_eq!((ended.bytes_up, ended.bytes_down), (0, 0));
    }
}

pub fn a_client_gone_before_the_server_accepts(at: &Setting) {
    let (proxy, upstream) = at.start();
    let silent = at.connect(&proxy);
    drop(silent);
    upstream.accept().expect_eof();

    let talking = at.connect(&proxy);
    talking.send_stream(1, 50_000);
    drop(talking);
    let server = upstream.accept();
    assert_eq!(server.receive_until_end(1), (50_000, Ending::Eof));
    drop(server);
    let ended = proxy.access_log(2);
    assert!(ended.iter().all(|e| e.reason == "client_closed"), "{ended:?}");
    assert_eq!(ended.iter().map(|e| e.bytes_up).sum::<u64>(), 50_000);
}

pub fn a_server_that_closes_at_once(at: &Setting) {
    let Relayed { proxy, client, server, .. } = at.relayed();
    drop(server);
    client.expect_eof();
    drop(client);
    assert_eq!(proxy.ended().reason, "server_closed");
}

/// What `nc -N` and HTTP/1.0 clients do: FIN behind the request is no farewell.
pub fn a_request_that_ends_while_dialling_is_still_served(at: &Setting) {
    let hole = at.blackhole();
    let proxy = at.launch(hole.address()).flag("connect-timeout", "25s").start();
    let client = at.connect(&proxy);
    client.send(b"request");
    client.finish();
    proxy.await_metric("connections_dialling", &[], 1.0);
    let upstream = hole.answer();
    let server = upstream.accept();
    server.receive(b"request");
    server.expect_eof();
    server.send(b"response");
    client.receive(b"response");
    drop(server);
    client.expect_eof();
    assert_eq!(proxy.ended().reason, "client_closed");
}
