//! What is left on the node, and that a clean-up ends it.

use crate::ground::Ground;

pub fn cleanup_leaves_nothing_behind(at: &Ground) {
    // As a host may have it.
    at.row.node.sysctl("ipv4.ip_local_reserved_ports", "8080,30000-30009");
    at.row.node.ip("link add spare0 type veth peer name spare1");
    at.row.node.output("tc", &["qdisc", "add", "dev", "spare0", "clsact"]);
    let before = at.traces();
    let mut proxy = at.launch().start();
    let pairs = at.switched(&proxy, 2);
    let (code, shown, error) = at.cleanup();
    assert_eq!((code, shown.as_str()), (Some(1), ""), "while a proxy runs: {error}");
    assert!(error.contains("a proxy runs"), "{error}");
    pairs[0].talk();
    proxy.kill9();
    pairs[0].talk();
    assert_ne!(at.traces(), before, "nothing is left, so this test proves nothing");
    let (code, shown, error) = at.cleanup();
    assert_eq!(code, Some(0), "{error}");
    for said in ["reset 2 connections", "programs from devices", "gave back", "removed /"] {
        assert!(shown.contains(said), "{said}: {shown}");
    }
    for pair in &pairs {
        pair.expect_reset();
    }
    // A device that had filters of nobody else has its clsact qdisc as before, also if it was
    // there already.
    assert_eq!(at.traces(), before);
    let (code, shown, error) = at.cleanup();
    assert_eq!((code, shown.lines().count()), (Some(0), 1), "{shown}{error}");
    assert!(shown.starts_with("nothing"), "{shown}");
    // And a new process begins anew.
    let next = at.launch().start();
    at.switched(&next, 1)[0].talk();
}
