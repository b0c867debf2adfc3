//! Slices of others, and others who write ours.

use serde_json::{Value, json};

use super::fake::{Call, Fake};
use super::harness::*;

/// As kube-apiserver with its lease reconciler: all slices and `Endpoints` as it wants them.
fn api_server_writes(fake: &Fake) {
    foreign_slice(fake, "kube-apiserver", "kubernetes", "IPv4", &["192.0.2.10"]);
    fake.put(
        "kube-apiserver",
        "endpoints",
        json!({
            "metadata": { "name": "kubernetes", "namespace": "default",
                          "labels": { "endpointslice.kubernetes.io/skip-mirror": "true" } },
            "subsets": [{ "addresses": [{ "ip": "192.0.2.10" }],
                          "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }] }],
        }),
    );
}

fn slice_writes(fake: &Fake) -> usize {
    fake.writes().iter().filter(|call| call.kind == "endpointslices").count()
}

#[tokio::test(start_paused = true)]
async fn a_rival_is_recognised_reported_and_no_longer_fought_until_it_stops() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    for _ in 0..8 {
        api_server_writes(&fake);
        seconds(10).await;
    }
    assert_eq!(replica.rival(), 1);
    assert!(slice_writes(&fake) <= 6, "{} writes of the slice", slice_writes(&fake));
    assert_eq!(addresses(&fake, "kubernetes"), ["192.0.2.10"], "left to the rival");
    assert_eq!(replica.published("ipv4"), 0);
    let events = fake.all("events");
    let messages: Vec<_> = events.iter().filter_map(|event| event["message"].as_str()).collect();
    assert_eq!(events.len(), 2, "one for the slice, one for the Endpoints: {messages:?}");
    assert!(messages[0].contains("kube-apiserver"), "{messages:?}");
    assert!(messages[0].contains("--endpoint-reconciler-type=none"), "{messages:?}");
    assert_eq!(events[0]["involvedObject"]["name"], "kubernetes");
    assert_eq!(events[0]["involvedObject"]["kind"], "Service");

    // An hour of it costs few writes.
    let before = slice_writes(&fake);
    for _ in 0..360 {
        if addresses(&fake, "kubernetes") != ["192.0.2.10"] {
            api_server_writes(&fake);
        }
        seconds(10).await;
    }
    let more = slice_writes(&fake) - before;
    assert!((8..20).contains(&more), "{more} tries in an hour");
    assert_eq!(replica.rival(), 1);
    assert_eq!(fake.all("events").len(), 2, "said once");

    // It stops.
    seconds(400).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    assert_eq!(replica.rival(), 0);
    fake.edit("kubectl", "endpointslices", "kubernetes", |s| s["ports"][0]["port"] = json!(1));
    seconds(1).await;
    assert_eq!(slice(&fake, "kubernetes").expect("there")["ports"][0]["port"], 6443, "as ever");
}

#[tokio::test(start_paused = true)]
async fn all_replicas_recognise_the_rival_and_none_goes_on_fighting() {
    let fake = cluster();
    let hosts: Vec<u8> = (1..=10).collect();
    ready_on(&fake, &hosts);
    let replicas: Vec<_> =
        hosts.iter().map(|n| Replica::start(&fake, config(&format!("10.0.0.{n}")))).collect();
    seconds(2).await;
    for _ in 0..60 {
        if addresses(&fake, "kubernetes") != ["192.0.2.10"] {
            api_server_writes(&fake);
        }
        seconds(10).await;
    }
    assert!(replicas.iter().all(|replica| replica.rival() == 1));
    assert!(slice_writes(&fake) < 12, "{} writes of the slice", slice_writes(&fake));
    assert_eq!(fake.all("events").len(), 2, "the replicas share their Events");
}

#[tokio::test(start_paused = true)]
async fn a_rival_that_answers_at_once_does_not_make_us_spin() {
    let fake = cluster();
    as_steward_grants(&fake);
    ready_on(&fake, &[7]);
    fake.on_write(|fake, call| {
        if call.kind == "endpointslices" {
            foreign_slice(fake, "other", "kubernetes", "IPv4", &["10.8.8.8"]);
        }
    });
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(50).await;
    assert_eq!(replica.rival(), 1);
    assert!(slice_writes(&fake) < 10, "{} writes", slice_writes(&fake));
    fake.no_more_rival();
    seconds(600).await;
    assert_eq!((replica.rival(), addresses(&fake, "kubernetes")), (0, vec!["10.0.0.7".to_owned()]));
}

#[tokio::test(start_paused = true)]
async fn somebody_who_keeps_deleting_the_slice_is_a_rival_too() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    for _ in 0..30 {
        fake.delete("endpointslices", "default", "kubernetes");
        seconds(5).await;
    }
    assert_eq!(replica.rival(), 1);
}

#[tokio::test(start_paused = true)]
async fn foreign_slices_that_lead_elsewhere_are_deleted_and_no_others() {
    let fake = cluster();
    ready_on(&fake, &[7, 8]);
    foreign_slice(&fake, "x", "kubernetes-abcde", "IPv4", &["192.0.2.10"]);
    foreign_slice(&fake, "x", "kubernetes-mixed", "IPv4", &["10.0.0.7", "192.0.2.10"]);
    foreign_slice(&fake, "x", "kubernetes-same", "IPv4", &["10.0.0.8"]);
    foreign_slice(&fake, "x", "kubernetes-other-family", "IPv6", &["2001:db8::1"]);
    foreign_slice(&fake, "x", "kubernetes-port", "IPv4", &["10.0.0.7"]);
    fake.edit("x", "endpointslices", "kubernetes-port", |s| s["ports"][0]["port"] = json!(1));
    foreign_slice(&fake, "x", "kubernetes-unused", "IPv4", &["192.0.2.10"]);
    fake.edit("x", "endpointslices", "kubernetes-unused", |s| {
        s["endpoints"][0]["conditions"] = json!({ "ready": false, "serving": false });
    });
    foreign_slice(&fake, "x", "unrelated", "IPv4", &["192.0.2.10"]);
    fake.edit("x", "endpointslices", "unrelated", |s| {
        s["metadata"]["labels"]["kubernetes.io/service-name"] = json!("another");
    });
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    let left: Vec<_> = fake.all("endpointslices").iter().map(name).collect();
    assert_eq!(
        left,
        [
            "kubernetes",
            "kubernetes-other-family",
            "kubernetes-same",
            "kubernetes-unused",
            "unrelated",
            "own-v4",
        ]
    );
    assert_eq!(replica.rival(), 0);
    // The order matters: at no time is there no endpoint.
    let verbs: Vec<_> =
        fake.writes().iter().filter(|c| c.kind == "endpointslices").map(Call::verb).collect();
    assert_eq!(verbs[0], "patch", "{verbs:?}");
}

fn name(object: &Value) -> String {
    object["metadata"]["name"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test(start_paused = true)]
async fn where_deleting_is_forbidden_foreign_slices_are_emptied_and_keep_their_label() {
    let fake = cluster();
    as_steward_grants(&fake);
    ready_on(&fake, &[7]);
    foreign_slice(&fake, "x", "kubernetes-abcde", "IPv4", &["192.0.2.10"]);
    foreign_slice(&fake, "x", "kubernetes-fghij", "IPv4", &["192.0.2.11"]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    for name in ["kubernetes-abcde", "kubernetes-fghij"] {
        let slice = slice(&fake, name).expect("still there");
        assert_eq!(slice["endpoints"], json!([]));
        // kube-proxy ignores an update that takes it away, and keeps the old endpoints.
        assert_eq!(slice["metadata"]["labels"]["kubernetes.io/service-name"], "kubernetes");
    }
    let deletes = fake.calls().iter().filter(|call| call.verb() == "delete").count();
    assert_eq!(deletes, 1, "refused once, not asked for each");
    seconds(60).await;
    assert_eq!(slice_writes(&fake), 1 + 1 + 2, "at rest");
}

#[tokio::test(start_paused = true)]
async fn a_controller_that_refills_its_slice_is_a_rival_of_its_own() {
    let fake = cluster();
    as_steward_grants(&fake);
    ready_on(&fake, &[7]);
    let mirror = |fake: &Fake| {
        foreign_slice(fake, "kube-controller-manager", "kubernetes-abcde", "IPv4", &["192.0.2.10"]);
        fake.edit("kube-controller-manager", "endpointslices", "kubernetes-abcde", |slice| {
            slice["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] =
                json!("endpointslicemirroring-controller.k8s.io");
        });
    };
    mirror(&fake);
    fake.on_write(move |fake, call| {
        if call.name.as_deref() == Some("kubernetes-abcde") && call.verb() == "patch" {
            mirror(fake);
        }
    });
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(30).await;
    assert_eq!(replica.rival(), 1);
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"], "ours is kept all the same");
    assert_eq!(replica.published("ipv4"), 1);
    fake.edit("kubectl", "endpointslices", "kubernetes", |s| s["ports"][0]["port"] = json!(1));
    seconds(1).await;
    assert_eq!(slice(&fake, "kubernetes").expect("there")["ports"][0]["port"], 6443);
    let messages = fake.all("events");
    assert_eq!(messages.len(), 1);
    let message = messages[0]["message"].as_str().expect("text");
    assert!(message.contains("endpointslicemirroring-controller.k8s.io"), "{message}");
    let tries =
        fake.writes().iter().filter(|c| c.name.as_deref() == Some("kubernetes-abcde")).count();
    assert!(tries < 8, "{tries} tries");
}

#[tokio::test(start_paused = true)]
async fn a_slice_of_the_wrong_address_type_is_replaced() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    foreign_slice(&fake, "x", "kubernetes", "IPv6", &["2001:db8::1"]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    assert_eq!(slice(&fake, "kubernetes").expect("there")["addressType"], "IPv4");
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    assert_eq!(fake.all("endpointslices").len(), 2, "it and our Service's");
}

#[tokio::test(start_paused = true)]
async fn a_slice_of_the_wrong_address_type_that_may_not_be_deleted_is_avoided() {
    for labelled in [true, false] {
        let fake = cluster();
        service(&fake, &["IPv4", "IPv6"]);
        as_steward_grants(&fake);
        ready_on(&fake, &[7]);
        own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", true)]);
        foreign_slice(&fake, "x", "kubernetes", "IPv6", &["2001:db8::1"]);
        foreign_slice(&fake, "x", "kubernetes-v6", "FQDN", &["api.example"]);
        if !labelled {
            fake.edit("x", "endpointslices", "kubernetes", |s| s["metadata"]["labels"] = json!({}));
        }
        let _replica = Replica::start(&fake, config("10.0.0.7"));
        seconds(5).await;
        assert_eq!(addresses(&fake, "kubernetes-v4"), ["10.0.0.7"], "labelled: {labelled}");
        assert_eq!(addresses(&fake, "steward-tcp-proxy-v6"), ["fd00::7"]);
        let left = if labelled { vec![] } else { vec!["2001:db8::1".to_owned()] };
        assert_eq!(addresses(&fake, "kubernetes"), left, "touched only where it shadows ours");
        let writes = fake.writes().len();
        seconds(300).await;
        assert_eq!(fake.writes().len(), writes, "at rest");

        // Somebody clears the way.
        fake.delete("endpointslices", "default", "kubernetes");
        seconds(2).await;
        let published = addresses(&fake, if labelled { "kubernetes" } else { "kubernetes-v4" });
        assert_eq!(published, ["10.0.0.7"]);
    }
}
