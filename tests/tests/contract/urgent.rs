//! Urgent data (MSG_OOB) means nothing to a relay; its bytes are part of the stream and arrive
//! in their place.

use proxy_tests::peers::{Peer, both};
use proxy_tests::proxy::Proxy;

use crate::setting::{Setting, Side};

/// A proxy, and a connection with `side`'s peer first.
fn pair(at: &Setting, side: Side) -> (Proxy, Peer, Peer) {
    let (proxy, writer, reader) = at.relayed().seen_from(side);
    // An engine may pass the mark on; then this keeps the byte in its place.
    reader.take_urgent_inline();
    (proxy, writer, reader)
}

pub fn an_urgent_byte_arrives_in_its_place(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, writer, reader) = pair(at, side);
        writer.send(b"before ");
        writer.send_urgent(b'!');
        writer.send(b" after");
        reader.receive(b"before ! after");
        drop(proxy);
        // As the very first byte, and two in a row.
        let (_proxy, writer, reader) = pair(at, side);
        writer.send_urgent(b'1');
        writer.send_urgent(b'2');
        writer.send(b"3");
        reader.receive(b"123");
    }
}

pub fn urgent_bytes_in_the_middle_of_bulk(at: &Setting) {
    const TURNS: u64 = 30;
    for side in Side::BOTH {
        let (proxy, writer, reader) = pair(at, side);
        both(
            || {
                for turn in 0..TURNS {
                    writer.send_stream(turn, 300_000);
                    writer.send_urgent(b'!');
                }
                writer.finish();
            },
            || {
                for turn in 0..TURNS {
                    reader.receive_stream(turn, 300_000);
                    reader.receive(b"!");
                }
                reader.expect_eof();
            },
        );
        reader.finish();
        let ended = proxy.ended();
        assert_eq!(ended.bytes_up + ended.bytes_down, TURNS * 300_001);
    }
}

/// The urgent byte waits at the proxy behind so much that an engine is in its stride when it comes
/// to it, and then nothing, or the end, follows.
pub fn an_urgent_byte_behind_queued_bulk(at: &Setting) {
    for side in Side::BOTH {
        for (bulk, ends) in [(120_000, false), (120_000, true), (65_536, false), (65_536, true)] {
            let (proxy, writer, reader) = pair(at, side);
            writer.send(b"-");
            reader.receive(b"-");
            proxy.pause();
            writer.send_stream(1, bulk);
            writer.send_urgent(b'!');
            if ends {
                writer.finish();
            }
            proxy.resume();
            reader.receive_stream(1, bulk);
            reader.receive(b"!");
            if ends {
                reader.expect_eof();
            }
        }
    }
}

/// Nothing follows the urgent byte, neither bytes nor an end, that would push it out.
pub fn a_lone_urgent_byte_is_not_held_back(at: &Setting) {
    for side in Side::BOTH {
        let (_proxy, writer, reader) = pair(at, side);
        writer.send(b"abc");
        reader.receive(b"abc");
        writer.send_urgent(b'!');
        reader.receive(b"!");
        writer.send(b"de");
        writer.send_urgent(b'f');
        reader.receive(b"def");
        // The direction is as alive as before.
        let write = || {
            writer.send_stream(1, 400_000);
            writer.send_urgent(b'?');
        };
        both(write, || reader.receive_stream(1, 400_000));
        reader.receive(b"?");
    }
}

pub fn an_urgent_byte_right_before_the_end(at: &Setting) {
    for side in Side::BOTH {
        for bulk in [0, 1, 200_000] {
            let (proxy, writer, reader) = pair(at, side);
            writer.send_stream(1, bulk);
            writer.send_urgent(b'!');
            writer.finish();
            reader.receive_stream(1, bulk);
            reader.receive(b"!");
            reader.expect_eof();
            reader.send(b"answer");
            writer.receive(b"answer");
            reader.finish();
            writer.expect_eof();
            assert_eq!(proxy.ended().reason, side.closed());
        }
    }
}
