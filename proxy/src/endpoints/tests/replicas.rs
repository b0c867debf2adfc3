//! Many replicas, pods that come and go, and the last address that is never taken away.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;

use serde_json::json;

use super::harness::*;

#[tokio::test(start_paused = true)]
async fn our_own_address_is_published_while_the_service_has_none_but_not_before_we_serve() {
    let fake = cluster();
    let replica = Replica::start(&fake, config("10.0.0.7"));
    replica.ready.store(false, Ordering::SeqCst);
    seconds(60).await;
    assert!(fake.writes().is_empty(), "nobody would be served there");
    assert!(replica.passes("waiting") > 0);
    replica.ready.store(true, Ordering::SeqCst);
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    assert_eq!(core_addresses(&fake), ["10.0.0.7"]);
}

#[tokio::test(start_paused = true)]
async fn where_clients_ask_is_told_before_anything_is_published() {
    let fake = cluster();
    let replica = Replica::start(&fake, config("10.0.0.7"));
    replica.ready.store(false, Ordering::SeqCst);
    let asked = || {
        let asked = replica.asked.lock().expect("no panic");
        asked.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    seconds(2).await;
    assert_eq!(asked(), ["10.96.0.1:443"]);
    service(&fake, &["IPv4", "IPv6"]);
    seconds(2).await;
    assert_eq!(asked(), ["10.96.0.1:443", "[fd00:10:96::1]:443"]);
}

#[tokio::test(start_paused = true)]
async fn replicas_that_start_together_share_the_slice_and_do_not_fight() {
    let fake = cluster();
    let replicas: Vec<_> =
        (1..=20).map(|n| Replica::start(&fake, config(&format!("10.0.0.{n}")))).collect();
    seconds(20).await;
    let all: Vec<_> = (1..=20).map(|n| format!("10.0.0.{n}")).collect();
    assert_eq!(addresses(&fake, "kubernetes"), all);
    let writes = fake.writes().len();
    assert!(writes < 20 * 2 * 8, "{writes} writes");
    seconds(600).await;
    assert_eq!(fake.writes().len(), writes, "at rest");

    // The controller catches up: what it says replaces all that.
    ready_on(&fake, &[3, 4, 5]);
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.3", "10.0.0.4", "10.0.0.5"]);
    assert!(fake.writes().len() <= writes + 4, "the first replica writes, the others find it done");
    assert!(replicas.iter().all(|replica| replica.rival() == 0));
}

#[tokio::test(start_paused = true)]
async fn an_address_lost_while_the_service_has_none_comes_back() {
    let fake = cluster();
    let _replicas: Vec<_> =
        (7..=8).map(|n| Replica::start(&fake, config(&format!("10.0.0.{n}")))).collect();
    seconds(5).await;
    fake.edit("kubectl", "endpointslices", "kubernetes", |slice| {
        slice["endpoints"] = json!([{ "addresses": ["10.9.9.9"] }]);
    });
    seconds(5).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7", "10.0.0.8"], "and not the intruder");
    fake.delete("endpointslices", "default", "kubernetes");
    seconds(5).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7", "10.0.0.8"]);
}

#[tokio::test(start_paused = true)]
async fn pods_that_turn_unready_or_terminate_are_withdrawn_but_never_the_last() {
    let fake = cluster();
    ready_on(&fake, &[7, 8]);
    let replica = Replica::start(&fake, config("10.0.0.9"));
    replica.ready.store(false, Ordering::SeqCst);
    seconds(2).await;
    let mut leaving = own_endpoint("10.0.0.7", "n7", true);
    leaving["conditions"]["terminating"] = json!(true);
    own_slice(&fake, "own-v4", "IPv4", &[leaving, own_endpoint("10.0.0.8", "n8", true)]);
    seconds(1).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"]);

    let unready = |n: u8| own_endpoint(&format!("10.0.0.{n}"), &format!("n{n}"), false);
    own_slice(&fake, "own-v4", "IPv4", &[unready(8), unready(9)]);
    seconds(60).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"], "the last known stays");
    own_slice(&fake, "own-v4", "IPv4", &[]);
    seconds(60).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"], "even without any pod");
    fake.delete("endpointslices", "kube-system", "own-v4");
    seconds(60).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"], "even without a slice");
    fake.delete("endpointslices", "default", "kubernetes");
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"], "as remembered");

    // We serve, whatever the kubelet has not noticed yet.
    own_slice(&fake, "own-v4", "IPv4", &[unready(8), unready(9)]);
    replica.ready.store(true, Ordering::SeqCst);
    seconds(3).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8", "10.0.0.9"]);
    let slice = slice(&fake, "kubernetes").expect("there");
    assert_eq!(slice["endpoints"][1]["nodeName"], "n9", "as our Service says of it");

    ready_on(&fake, &[9]);
    seconds(1).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.9"]);
}

#[tokio::test(start_paused = true)]
async fn a_restarted_replica_keeps_what_was_published() {
    let fake = cluster();
    ready_on(&fake, &[7, 8]);
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    drop(replica);
    own_slice(&fake, "own-v4", "IPv4", &[]);
    let writes = fake.writes().len();
    let replica = Replica::start(&fake, config("10.0.0.7"));
    replica.ready.store(false, Ordering::SeqCst);
    seconds(60).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7", "10.0.0.8"]);
    assert_eq!(fake.writes().len(), writes);
}

#[tokio::test(start_paused = true)]
async fn the_family_that_loses_its_pods_keeps_its_last_address_while_the_other_goes_on() {
    let fake = cluster();
    service(&fake, &["IPv4", "IPv6"]);
    ready_on(&fake, &[7]);
    own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", true)]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", false)]);
    ready_on(&fake, &[8]);
    seconds(60).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"]);
    assert_eq!(addresses(&fake, "kubernetes-v6"), ["fd00::7"]);
}

#[tokio::test(start_paused = true)]
async fn the_first_replica_by_address_writes_and_another_if_it_does_not() {
    let fake = cluster();
    ready_on(&fake, &[1, 2, 3]);
    let mut replicas: Vec<_> =
        (1..=3).map(|n| Replica::start(&fake, config(&format!("10.0.0.{n}")))).collect();
    seconds(5).await;
    let by = |replicas: &[Replica]| -> Vec<u64> {
        let ok = |r: &Replica| {
            r.metrics.endpoint_writes.with_label_values(&["endpointslice", "ok"]).get()
        };
        replicas.iter().map(ok).collect()
    };
    let before = by(&replicas);
    fake.edit("kubectl", "endpointslices", "kubernetes", |s| s["ports"][0]["port"] = json!(1));
    seconds(1).await;
    assert_eq!(by(&replicas), [before[0] + 1, before[1], before[2]]);
    drop(replicas.remove(0));
    fake.edit("kubectl", "endpointslices", "kubernetes", |s| s["ports"][0]["port"] = json!(2));
    seconds(1).await;
    assert_eq!(slice(&fake, "kubernetes").expect("there")["ports"][0]["port"], 6443);
    let written: BTreeSet<_> = by(&replicas).into_iter().collect();
    assert!(written.contains(&(before[1] + 1)) || written.contains(&(before[2] + 1)));
}
