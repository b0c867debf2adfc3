//! `kill -9` of the proxy at every stage: both sides get RST, never a clean end.

use std::sync::Barrier;
use std::thread;

use proxy_tests::peers::{Blackhole, Ending, Peer, backlog_bound};
use proxy_tests::stream::Stream;

use crate::setting::{Relayed, Setting, Side};

pub fn while_idle(at: Setting) {
    let Relayed { mut proxy, client, server, .. } = at.relayed();
    client.send(b"hello");
    server.receive(b"hello");
    server.send(b"hello to you");
    client.receive(b"hello to you");
    proxy.kill9();
    client.expect_reset();
    server.expect_reset();
}

pub fn in_the_middle_of_transfers(at: Setting) {
    const SOME: u64 = 2_000_000;
    let Relayed { mut proxy, client, server, .. } = at.relayed();
    let well_on_its_way = &Barrier::new(3);
    thread::scope(|threads| {
        for (writer, seed) in [(&client, 1), (&server, 2)] {
            threads.spawn(move || {
                let (_, error) = writer.send_until_error(seed);
                assert_ne!(error.kind(), std::io::ErrorKind::WouldBlock, "stuck: {error}");
            });
        }
        let readers = [(&server, 1), (&client, 2)].map(|(reader, seed)| {
            threads.spawn(move || {
                reader.receive_stream(seed, SOME);
                well_on_its_way.wait();
                let mut stream = Stream::new(seed);
                stream.advance(SOME as usize);
                let (received, ending) = reader.receive_rest(stream);
                assert_eq!(ending, Ending::Reset, "after {received} bytes");
            })
        });
        well_on_its_way.wait();
        proxy.kill9();
        readers.into_iter().for_each(|reader| reader.join().expect("a reset at each end"));
    });
}

pub fn after_one_direction_ended(at: Setting) {
    for side in Side::BOTH {
        let (mut proxy, ended, other) = at.relayed().seen_from(side);
        ended.send_stream(1, 1_000);
        ended.finish();
        assert_eq!(other.receive_until_end(1), (1_000, Ending::Eof));
        other.send(b"part of an answer");
        ended.receive(b"part of an answer");
        proxy.kill9();
        ended.expect_reset();
        other.expect_reset_unread();
    }
}

pub fn while_a_reader_is_stalled(at: Setting) {
    for side in Side::BOTH {
        let (mut proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let sent = writer.fill(1, backlog_bound());
        proxy.kill9();
        writer.expect_reset();
        let (received, ending) = reader.receive_until_end(1);
        assert_eq!(ending, Ending::Reset, "{side:?}: after {received} of {sent} bytes");
    }
}

/// The writer has said that this is all, and the reader must not be told so before it has all.
pub fn with_an_end_still_behind_the_backlog(at: Setting) {
    for side in Side::BOTH {
        let (mut proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let sent = writer.fill(1, backlog_bound());
        writer.finish();
        reader.send(b"x");
        writer.receive(b"x");
        proxy.kill9();
        let (received, ending) = reader.receive_until_end(1);
        assert_eq!(ending, Ending::Reset, "{side:?}: after {received} of {sent} bytes");
        writer.expect_reset_unread();
    }
}

/// All bytes lie in the server's own buffer, and are still not the whole.
pub fn before_the_server_read_anything(at: Setting) {
    let Relayed { mut proxy, client, server, .. } = at.relayed();
    client.send_stream(1, 10_000);
    server.await_unread(10_000);
    proxy.kill9();
    client.expect_reset();
    assert_eq!(server.receive_until_end(1), (10_000, Ending::Reset));
}

pub fn while_dialling(at: Setting) {
    let hole = Blackhole::new(at.ip);
    let mut proxy = at.launch(hole.address()).flag("connect-timeout", "25s").start();
    let client = Peer::connect(proxy.address());
    client.send(b"hello?");
    proxy.await_metric("connections_dialling", &[], 1.0);
    proxy.kill9();
    client.expect_reset();
}
