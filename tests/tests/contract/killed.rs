//! `kill -9` of the proxy at every stage: both sides get RST, never a clean end.

use std::io::ErrorKind::ConnectionReset;
use std::sync::Barrier;
use std::thread;

use proxy_tests::peers::{Ending, Peer};
use proxy_tests::stream::Stream;

use crate::setting::{Relayed, Setting, Side};

pub fn while_idle(at: &Setting) {
    let Relayed { mut proxy, client, server, .. } = at.relayed();
    client.send(b"hello");
    server.receive(b"hello");
    server.send(b"hello to you");
    client.receive(b"hello to you");
    proxy.kill9();
    client.expect_reset();
    server.expect_reset();
}

pub fn in_the_middle_of_transfers(at: &Setting) {
    const SOME: u64 = 2_000_000;
    let Relayed { mut proxy, client, server, .. } = at.relayed();
    let well_on_its_way = Barrier::new(3);
    let read = |reader: &Peer, seed| {
        reader.receive_stream(seed, SOME);
        well_on_its_way.wait();
        let mut stream = Stream::new(seed);
        stream.advance(SOME as usize);
        reader.receive_rest(stream).1
    };
    thread::scope(|threads| {
        let ends = [(&client, 1, 2), (&server, 2, 1)].map(|(peer, out, back)| {
            let read = &read;
            let writing = threads.spawn(move || peer.send_until_error(out).1);
            (writing, threads.spawn(move || read(peer, back)))
        });
        well_on_its_way.wait();
        proxy.kill9();
        for (writing, reading) in ends {
            let error = writing.join().expect("an error");
            let ending = reading.join().expect("an end");
            // The kernel tells of a reset once, here or there; a clean end it never calls so.
            let reset = error.kind() == ConnectionReset || ending == Ending::Reset;
            assert!(reset, "writing ended with {error}, reading with {ending:?}");
        }
    });
}

pub fn after_one_direction_ended(at: &Setting) {
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

pub fn while_a_reader_is_stalled(at: &Setting) {
    for side in Side::BOTH {
        let (mut proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let sent = writer.fill(1, at.backlog_bound());
        proxy.kill9();
        writer.expect_reset();
        let (received, ending) = reader.receive_until_end(1);
        assert_eq!(ending, Ending::Reset, "{side:?}: after {received} of {sent} bytes");
    }
}

/// The writer has said that this is all, and the reader must not be told so before it has all.
pub fn with_an_end_still_behind_the_backlog(at: &Setting) {
    for side in Side::BOTH {
        let (mut proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let sent = writer.fill(1, at.backlog_bound());
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
pub fn before_the_server_read_anything(at: &Setting) {
    let Relayed { mut proxy, client, server, .. } = at.relayed();
    client.send_stream(1, 10_000);
    server.await_unread(10_000);
    proxy.kill9();
    client.expect_reset();
    assert_eq!(server.receive_until_end(1), (10_000, Ending::Reset));
}

pub fn while_dialling(at: &Setting) {
    let hole = at.blackhole();
    let mut proxy = at.launch(hole.address()).flag("connect-timeout", "25s").start();
    let client = at.connect(&proxy);
    client.send(b"hello?");
    proxy.await_metric("connections_dialling", &[], 1.0);
    proxy.kill9();
    client.expect_reset();
}
