//! Two processes at once, as while the one is replaced by the other: the second relays in userspace,
//! and does all that the first has done once that has ended.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use proxy_tests::peers::Peer;
use proxy_tests::proxy::{Launch, Proxy};

use crate::ground::{Ground, Pair, TALK, await_relayed_by_kernel};
use crate::lives::bulk;

const BULK: u64 = 150_000_000;

/// Two cannot listen on one port.
const PORT: u16 = 6444;

fn second(at: &Ground) -> Launch {
    at.launch().flag("engine", "auto").flag("listen-addr", format!(":{PORT}"))
}

fn await_reason(proxy: &Proxy, part: &str) {
    proxy.log_line("why it must wait", |line| {
        line["reason"].as_str().is_some_and(|reason| reason.contains(part))
    });
}

/// A connection through the second one.
#[track_caller]
fn pair(at: &Ground) -> Pair {
    let to = SocketAddr::new(at.address().ip(), PORT);
    let client = at.row.client.run(move || Peer::connect(to));
    let pair = Pair { client, server: at.upstream.accept() };
    pair.talk();
    pair
}

fn is_there(line: &serde_json::Value) -> bool {
    line["message"].as_str().is_some_and(|text| text.starts_with("the kernel relays"))
}

fn ends_by_sigterm(first: &mut Proxy) {
    first.sigterm();
    assert_eq!(first.exit_code(), Some(0));
}

pub fn the_first_ends_by_sigterm(at: &Ground) {
    the_second_takes_over(at, ends_by_sigterm);
}

pub fn the_first_is_killed(at: &Ground) {
    the_second_takes_over(at, Proxy::kill9);
}

fn the_second_takes_over(at: &Ground, end: fn(&mut Proxy)) {
    let mut first = at.launch().start();
    let pairs = at.switched(&first, 3);
    let second = second(at).start();
    await_reason(&second, "another process uses");
    let own = pair(at);
    // It leaves alone what is the first one's, and that one's new connections still become so.
    let [fourth] = at.switched(&first, 1).try_into().expect("one");
    pairs[0].talk();
    await_relayed_by_kernel(&second, 0.0);
    // Bytes are on their way all the time: many when the first ends, some when the second begins.
    let is_over = AtomicBool::new(false);
    let talks = std::thread::scope(|threads| {
        let talking = threads.spawn(|| {
            let talks = std::iter::from_fn(|| (!is_over.load(Ordering::Relaxed)).then_some(()));
            talks.inspect(|()| pairs[1].talk()).count() as u64
        });
        bulk(&pairs[0], BULK, || end(&mut first));
        await_relayed_by_kernel(&second, 3.0);
        is_over.store(true, Ordering::Relaxed);
        talking.join().expect("it talked")
    });
    second.log_line("the engine's line", is_there);
    let ended = second.ended_of(pairs[0].client.address());
    assert_eq!(
        (ended.engine.as_deref(), ended.bytes_up, ended.bytes_down),
        (Some("packet"), 2 * TALK.0 + BULK, 2 * TALK.1 + BULK)
    );
    // What it shows, by the socket that was the first one's: those that are left, and none of its
    // own yet.
    let mut shown: Vec<String> =
        at.list().iter().map(|row| row["client"].as_str().expect("a client").to_owned()).collect();
    let living = [&pairs[1], &pairs[2], &fourth];
    let mut clients = living.map(|pair| pair.client.address().to_string());
    shown.sort();
    clients.sort();
    assert_eq!(shown, clients);
    living.into_iter().for_each(Pair::talk);
    own.talk();
    // And it does for new ones what the first did.
    let new = pair(at);
    await_relayed_by_kernel(&second, 4.0);
    new.talk();
    at.connections(&["kill", "--client", &fourth.client.address().to_string()]);
    fourth.expect_reset();
    for (pair, talks) in [(&pairs[1], talks + 2), (&pairs[2], 2), (&new, 2)] {
        pair.close();
        let ended = second.ended_of(pair.client.address());
        assert_eq!(
            (ended.reason.as_str(), ended.bytes_up, ended.bytes_down),
            ("client_closed", talks * TALK.0, talks * TALK.1)
        );
    }
    await_relayed_by_kernel(&second, 0.0);
    own.close();
    assert_eq!(second.ended_of(own.client.address()).engine.as_deref(), Some("splice"));
}

/// Nothing is taken over without pins; what comes later is the second one's all the same.
pub fn the_first_is_killed_without_pins(at: &Ground) {
    let mut first = at.launch().flag("bpffs", "off").start();
    let pairs = at.switched(&first, 1);
    let second = second(at).flag("bpffs", "off").start();
    await_reason(&second, "another process uses");
    let own = pair(at);
    first.kill9();
    second.log_line("the engine's line", is_there);
    let (_, error) = pairs[0].client.send_until_error(1);
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let new = pair(at);
    await_relayed_by_kernel(&second, 1.0);
    new.talk();
    own.talk();
}

/// Who must wait ends like any other, also while the other goes on.
pub fn the_second_ends_before(at: &Ground) {
    let first = at.launch().start();
    let pairs = at.switched(&first, 1);
    let mut waiting = second(at).start();
    await_reason(&waiting, "another process uses");
    ends_by_sigterm(&mut waiting);
    pairs[0].talk();
    // One whose turn comes while it drains has no use for it any more.
    let mut draining = second(at).flag("drain-timeout", "10m").start();
    await_reason(&draining, "another process uses");
    let own = pair(at);
    draining.sigterm();
    draining.await_metric("draining", &[], 1.0);
    drop(first);
    let third = at.launch().start();
    await_relayed_by_kernel(&third, 1.0);
    pairs[0].talk();
    own.close();
    assert_eq!(draining.exit_code(), Some(0));
}

/// Connections of which only other pins know: they are waited for as well, until a clean-up.
pub fn what_another_has_pinned_is_cleaned_up(at: &Ground) {
    let mut first = at.launch().start();
    let pairs = at.switched(&first, 1);
    ends_by_sigterm(&mut first);
    let second = second(at).flag("bpffs", "off").start();
    await_reason(&second, "pinned elsewhere");
    let own = pair(at);
    pairs[0].talk();
    let (code, _, error) = at.cleanup();
    assert_eq!(code, Some(0), "{error}");
    pairs[0].expect_reset();
    second.log_line("the engine's line", is_there);
    let new = pair(at);
    await_relayed_by_kernel(&second, 1.0);
    new.talk();
    own.talk();
}
