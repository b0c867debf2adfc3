//! RST from either side, at every stage: the other side gets RST, never a clean end.

use std::io::ErrorKind::{BrokenPipe, ConnectionReset};

use proxy_tests::peers::{Ending, both};

use crate::setting::{Setting, Side};

pub fn before_any_byte(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, resetting, other) = at.relayed().seen_from(side);
        // A server that resets earlier still counts as one that refused.
        proxy.await_metric("connections_relaying", &[("engine", at.engine)], 1.0);
        resetting.reset();
        other.expect_reset();
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

pub fn in_the_middle_of_a_transfer(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, writer, reader) = at.relayed().seen_from(side);
        both(
            || {
                writer.send_stream(1, 20_000_000);
                writer.reset();
            },
            || {
                let (_, ending) = reader.receive_until_end(1);
                assert_eq!(ending, Ending::Reset);
            },
        );
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

pub fn from_a_reader_in_the_middle_of_a_transfer(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, reader, writer) = at.relayed().seen_from(side);
        both(
            || {
                let (_, error) = writer.send_until_error(1);
                // Which of the two depends on whether RST or the next write came first.
                let kind = error.kind();
                assert!(matches!(kind, ConnectionReset | BrokenPipe), "{side:?}: {error}");
            },
            || {
                reader.receive_stream(1, 5_000_000);
                reader.reset();
            },
        );
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

pub fn after_its_own_end(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, resetting, other) = at.relayed().seen_from(side);
        resetting.send(b"all there is");
        resetting.finish();
        other.receive(b"all there is");
        other.expect_eof();
        resetting.reset();
        other.expect_reset_unread();
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

pub fn after_the_end_of_the_other_side(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, resetting, other) = at.relayed().seen_from(side);
        other.send(b"all there is");
        other.finish();
        resetting.receive(b"all there is");
        resetting.expect_eof();
        resetting.reset();
        other.expect_reset();
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

/// The writer leaves while what it wrote is stuck behind a reader that does not read: the proxy
/// waits for room there, and must notice all the same.
pub fn while_the_other_side_is_stalled(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, writer, reader) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let sent = writer.fill(1, at.backlog_bound());
        writer.reset();
        assert_eq!(proxy.ended().reason, side.reset());
        reader.expect_reset_unread();
        let (received, ending) = reader.receive_until_end(1);
        // The error was taken with the reset, so what follows the bytes is of no interest; but
        // there cannot be as many as were sent.
        assert!(received < sent, "{side:?}: {received} of {sent} bytes, then {ending:?}");
    }
}

pub fn from_the_stalled_side(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, reader, writer) = at.relayed().seen_from(side);
        reader.shrink_buffers();
        let _ = writer.fill(1, at.backlog_bound());
        reader.reset();
        writer.expect_reset();
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

/// `close` looks like an orderly end until more bytes come for the one that closed.
pub fn by_a_peer_that_closed_while_bytes_were_on_their_way(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, closing, other) = at.relayed().seen_from(side);
        drop(closing);
        other.expect_eof();
        let (_, error) = other.send_until_error(1);
        assert!(matches!(error.kind(), ConnectionReset | BrokenPipe), "{side:?}: {error}");
        assert_eq!(proxy.ended().reason, side.reset());
    }
}

/// As when a server refuses a large request early: its answer, then RST for what it did not read.
pub fn an_answer_right_before_it_arrives(at: &Setting) {
    const ANSWER: u64 = 5_000;
    let (proxy, upstream) = at.start();
    for _ in 0..30 {
        let (client, server) = at.pair(&proxy, &upstream);
        let request = || {
            let _ = client.send_until_error(1);
        };
        let answer = || {
            server.receive_stream(1, 1_000);
            server.send_stream(2, ANSWER);
            drop(server);
        };
        both(request, answer);
        // How it ends, the writer above was told; an error is told once.
        assert_eq!(client.receive_until_end(2).0, ANSWER);
    }
}

/// `close` with bytes unread makes the kernel send RST instead of FIN.
pub fn by_a_peer_that_closed_with_bytes_unread(at: &Setting) {
    for side in Side::BOTH {
        let (proxy, closing, other) = at.relayed().seen_from(side);
        other.send_stream(1, 1_000);
        closing.receive_stream(1, 500);
        closing.await_unread(500);
        drop(closing);
        other.expect_reset();
        assert_eq!(proxy.ended().reason, side.reset());
    }
}
