//! What is published, and that every drift from it is repaired and nothing else written.

use serde_json::{Value, json};

use super::fake::Fake;
use super::harness::*;
use crate::config::EndpointMode;

#[tokio::test(start_paused = true)]
async fn the_ready_endpoints_of_our_service_are_published_with_node_and_zone() {
    let fake = cluster();
    own_slice(
        &fake,
        "own-v4",
        "IPv4",
        &[
            own_endpoint("10.0.0.8", "n8", true),
            own_endpoint("10.0.0.9", "n9", false),
            own_endpoint("10.0.0.7", "n7", true),
        ],
    );
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;

    let slice = slice(&fake, "kubernetes").expect("created");
    let ready = json!({ "ready": true, "serving": true, "terminating": false });
    assert_eq!(
        slice["metadata"]["labels"],
        json!({
            "kubernetes.io/service-name": "kubernetes",
            "endpointslice.kubernetes.io/managed-by": "steward-tcp-proxy",
        })
    );
    assert_eq!(slice["addressType"], "IPv4");
    assert_eq!(slice["ports"], json!([{ "name": "https", "port": 6443, "protocol": "TCP" }]));
    assert_eq!(
        slice["endpoints"],
        json!([
            { "addresses": ["10.0.0.7"], "conditions": ready, "nodeName": "n7", "zone": "zone-n7" },
            { "addresses": ["10.0.0.8"], "conditions": ready, "nodeName": "n8", "zone": "zone-n8" },
        ])
    );
    let endpoints = fake.get("endpoints", "default", "kubernetes").expect("created");
    assert_eq!(
        endpoints["metadata"]["labels"],
        json!({ "endpointslice.kubernetes.io/skip-mirror": "true" })
    );
    assert_eq!(
        endpoints["subsets"],
        json!([{
            "addresses": [
                { "ip": "10.0.0.7", "nodeName": "n7" },
                { "ip": "10.0.0.8", "nodeName": "n8" },
            ],
            "ports": [{ "name": "https", "port": 6443, "protocol": "TCP" }],
        }])
    );
    assert_eq!((replica.published("ipv4"), replica.published("ipv6")), (2, 0));
    assert!(replica.passes("changed") >= 1);
}

#[tokio::test(start_paused = true)]
async fn nothing_is_written_when_nothing_changed() {
    let fake = cluster();
    ready_on(&fake, &[7, 8]);
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    assert_eq!(fake.writes().len(), 2, "the slice and the Endpoints");
    let calls = fake.calls().len();
    seconds(600).await;
    ready_on(&fake, &[7, 8]);
    // Said otherwise, meaning the same.
    fake.edit("somebody", "endpointslices", "kubernetes", |slice| {
        slice["endpoints"][0]["conditions"] = json!({ "ready": true });
        slice["endpoints"].as_array_mut().expect("a list").reverse();
        slice["metadata"]["annotations"] = json!({ "note": "by an admin" });
        slice["metadata"]["labels"]["team"] = json!("blue");
    });
    fake.edit("kube-apiserver", "endpoints", "kubernetes", |endpoints| {
        endpoints["subsets"][0]["addresses"].as_array_mut().expect("a list").reverse();
    });
    seconds(600).await;
    assert_eq!(fake.writes().len(), 2);
    assert!(replica.passes("unchanged") >= 40, "compared every 30 s all the same");
    let lists = fake.calls().split_off(calls).iter().filter(|call| !call.is_watch()).count();
    assert!(lists <= 4 * 3, "comparing every 30 s costs the API server nothing: {lists} lists");
}

type Drift = (&'static str, fn(&mut Value));

const SLICE_DRIFT: &[Drift] = &[
    ("service label lost", |s| s["metadata"]["labels"] = json!({})),
    ("service label changed", |s| {
        s["metadata"]["labels"]["kubernetes.io/service-name"] = json!("other");
    }),
    ("managed-by changed", |s| {
        s["metadata"]["labels"]["endpointslice.kubernetes.io/managed-by"] = json!("me");
    }),
    ("address changed", |s| s["endpoints"][0]["addresses"] = json!(["10.9.9.9"])),
    ("address added", |s| {
        s["endpoints"].as_array_mut().expect("a list").push(json!({ "addresses": ["10.9.9.9"] }));
    }),
    ("all addresses gone", |s| s["endpoints"] = json!([])),
    ("not ready", |s| s["endpoints"][0]["conditions"]["ready"] = json!(false)),
    ("not serving", |s| s["endpoints"][0]["conditions"]["serving"] = json!(false)),
    ("terminating", |s| s["endpoints"][0]["conditions"]["terminating"] = json!(true)),
    ("node name", |s| s["endpoints"][0]["nodeName"] = json!("elsewhere")),
    ("zone", |s| s["endpoints"][0]["zone"] = Value::Null),
    ("hints", |s| s["endpoints"][0]["hints"] = json!({ "forZones": [{ "name": "a" }] })),
    ("port name", |s| s["ports"][0]["name"] = json!("http")),
    ("port number", |s| s["ports"][0]["port"] = json!(443)),
    ("protocol", |s| s["ports"][0]["protocol"] = json!("UDP")),
    ("application protocol", |s| s["ports"][0]["appProtocol"] = json!("http")),
    ("port added", |s| {
        let ports = s["ports"].as_array_mut().expect("a list");
        ports.push(json!({ "name": "x", "port": 1, "protocol": "TCP" }));
    }),
    ("no port", |s| s["ports"] = json!([])),
];

const ENDPOINTS_DRIFT: &[Drift] = &[
    ("label lost", |e| e["metadata"]["labels"] = json!({})),
    ("address", |e| e["subsets"][0]["addresses"] = json!([{ "ip": "10.9.9.9" }])),
    ("not ready", |e| {
        e["subsets"][0]["notReadyAddresses"] = e["subsets"][0]["addresses"].clone();
        e["subsets"][0]["addresses"] = json!([]);
    }),
    ("port name", |e| e["subsets"][0]["ports"][0]["name"] = json!("http")),
    ("port number", |e| e["subsets"][0]["ports"][0]["port"] = json!(443)),
    ("protocol", |e| e["subsets"][0]["ports"][0]["protocol"] = json!("UDP")),
    ("subset added", |e| {
        let subset = json!({ "addresses": [{ "ip": "10.9.9.9" }], "ports": [{ "port": 1 }] });
        e["subsets"].as_array_mut().expect("a list").push(subset);
    }),
    ("all gone", |e| e["subsets"] = json!([])),
];

fn content(fake: &Fake, kind: &str) -> Value {
    let mut object = fake.get(kind, "default", "kubernetes").unwrap_or_default();
    let labels = object["metadata"]["labels"].take();
    object["metadata"] = json!({ "labels": labels });
    object
}

async fn every_drift_is_repaired(kind: &'static str, drifts: &[Drift]) {
    let fake = cluster();
    ready_on(&fake, &[7, 8]);
    let replica = Replica::start(&fake, config("10.0.0.8"));
    seconds(2).await;
    let right = content(&fake, kind);
    for (what, drift) in drifts {
        let writes = fake.writes().len();
        fake.edit("kubectl-edit", kind, "kubernetes", drift);
        assert_ne!(content(&fake, kind), right, "{what}: no drift");
        seconds(1).await;
        assert_eq!(content(&fake, kind), right, "{what}: not repaired");
        assert_eq!(fake.writes().len(), writes + 1, "{what}: one write suffices");
    }
    fake.delete(kind, "default", "kubernetes");
    seconds(1).await;
    assert_eq!(content(&fake, kind), right, "deletion: not repaired");
    assert_eq!(replica.rival(), 0, "one who changes many things is no rival");
}

#[tokio::test(start_paused = true)]
async fn drift_of_each_field_of_a_slice_is_repaired_within_a_second() {
    every_drift_is_repaired("endpointslices", SLICE_DRIFT).await;
}

#[tokio::test(start_paused = true)]
async fn drift_of_each_field_of_the_endpoints_is_repaired_within_a_second() {
    every_drift_is_repaired("endpoints", ENDPOINTS_DRIFT).await;
}

#[tokio::test(start_paused = true)]
async fn labels_of_others_stay() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    fake.edit("kubectl", "endpointslices", "kubernetes", |slice| {
        slice["metadata"]["labels"]["team"] = json!("blue");
        slice["ports"][0]["port"] = json!(1);
    });
    seconds(1).await;
    let slice = slice(&fake, "kubernetes").expect("there");
    assert_eq!(slice["metadata"]["labels"]["team"], "blue");
    assert_eq!(slice["ports"][0]["port"], 6443);
}

#[tokio::test(start_paused = true)]
async fn the_slice_of_the_original_is_taken_over() {
    let fake = cluster();
    as_steward_grants(&fake);
    foreign_slice(&fake, "tcp-proxy", "kubernetes", "IPv4", &["10.96.7.7"]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"], "not beside its ClusterIP");
    ready_on(&fake, &[7, 8]);
    seconds(1).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7", "10.0.0.8"]);
}

#[tokio::test(start_paused = true)]
async fn a_slice_that_lost_its_label_before_we_came_is_compared_before_it_is_written() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    drop({
        let replica = Replica::start(&fake, config("10.0.0.7"));
        seconds(2).await;
        replica
    });
    fake.edit("kubectl", "endpointslices", "kubernetes", |slice| {
        slice["metadata"]["labels"] = json!({ "kept": "yes" });
    });
    let uid = slice(&fake, "kubernetes").expect("there")["metadata"]["uid"].clone();
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    let slice = slice(&fake, "kubernetes").expect("there");
    assert_eq!(slice["metadata"]["labels"]["kubernetes.io/service-name"], "kubernetes");
    assert_eq!(
        (&slice["metadata"]["labels"]["kept"], &slice["metadata"]["uid"]),
        (&json!("yes"), &uid)
    );
    let last = fake.writes().pop().expect("a write");
    assert!(last.body["metadata"]["resourceVersion"].is_string(), "compared, not blind");
}

#[tokio::test(start_paused = true)]
async fn each_family_of_the_service_has_its_slice_and_the_primary_one_the_plain_name() {
    for (families, plain, second) in [
        (&["IPv4", "IPv6"][..], "10.0.0.7", Some(("kubernetes-v6", "fd00::7"))),
        (&["IPv6", "IPv4"][..], "fd00::7", Some(("kubernetes-v4", "10.0.0.7"))),
        (&["IPv6"][..], "fd00::7", None),
        (&["IPv4"][..], "10.0.0.7", None),
    ] {
        let fake = Fake::default();
        service(&fake, families);
        ready_on(&fake, &[7]);
        own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", true)]);
        let _replica = Replica::start(&fake, config("10.0.0.7"));
        seconds(2).await;
        assert_eq!(addresses(&fake, "kubernetes"), [plain], "{families:?}");
        assert_eq!(core_addresses(&fake), [plain], "{families:?}");
        assert_eq!(slice(&fake, "kubernetes").expect("there")["addressType"], families[0]);
        for name in ["kubernetes-v4", "kubernetes-v6"] {
            let want: Vec<_> = second.iter().filter(|s| s.0 == name).map(|s| s.1).collect();
            assert_eq!(addresses(&fake, name), want, "{families:?} {name}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_service_that_becomes_dual_stack_gets_its_second_slice() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", true)]);
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    assert_eq!(slice(&fake, "kubernetes-v6"), None);
    service(&fake, &["IPv4", "IPv6"]);
    seconds(1).await;
    assert_eq!(addresses(&fake, "kubernetes-v6"), ["fd00::7"]);
    assert_eq!((replica.published("ipv4"), replica.published("ipv6")), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_address_of_the_other_family_is_better_than_none() {
    let fake = cluster();
    own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", true)]);
    let _replica = Replica::start(&fake, config("fd00::7"));
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes-v6"), ["fd00::7"]);
    assert_eq!(slice(&fake, "kubernetes"), None, "that name is the primary family's");
}

#[tokio::test(start_paused = true)]
async fn a_node_is_published_once_and_no_address_that_is_another_host_everywhere() {
    let fake = cluster();
    own_slice(
        &fake,
        "own-v4",
        "IPv4",
        &[
            own_endpoint("10.0.0.9", "n7", true),
            own_endpoint("10.0.0.7", "n7", true),
            own_endpoint("127.0.0.1", "n1", true),
            own_endpoint("169.254.3.4", "n2", true),
        ],
    );
    own_slice(&fake, "own-v4-more", "IPv4", &[own_endpoint("10.0.0.7", "n7", true)]);
    let _replica = Replica::start(&fake, config("127.0.0.1"));
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
}

#[tokio::test(start_paused = true)]
async fn more_endpoints_than_a_slice_may_hold_are_cut_off() {
    let fake = cluster();
    let many: Vec<_> = (0..1100)
        .map(|n| own_endpoint(&format!("10.1.{}.{}", n / 250, n % 250 + 1), &format!("n{n}"), true))
        .collect();
    own_slice(&fake, "own-v4", "IPv4", &many);
    let _replica = Replica::start(&fake, config("10.1.0.1"));
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes").len(), 1000);
}

#[tokio::test(start_paused = true)]
async fn cluster_ip_mode_publishes_the_cluster_ips_of_our_service() {
    let fake = cluster();
    let own = json!({
        "metadata": { "name": "steward-tcp-proxy", "namespace": "kube-system" },
        "spec": { "clusterIP": "10.96.0.77", "clusterIPs": ["10.96.0.77"], "ipFamilies": ["IPv4"] },
    });
    fake.put("steward", "services", own.clone());
    let mut config = config("10.0.0.7");
    config.mode = EndpointMode::ClusterIp;
    let replica = Replica::start(&fake, config);
    replica.ready.store(false, std::sync::atomic::Ordering::SeqCst);
    seconds(5).await;
    assert_eq!(slice(&fake, "kubernetes"), None, "nobody listens yet");
    replica.ready.store(true, std::sync::atomic::Ordering::SeqCst);
    seconds(3).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.96.0.77"]);
    // Drift is repaired even while the upstream does not answer for a moment.
    replica.ready.store(false, std::sync::atomic::Ordering::SeqCst);
    fake.delete("endpointslices", "default", "kubernetes");
    seconds(1).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.96.0.77"]);
    fake.delete("services", "kube-system", "steward-tcp-proxy");
    seconds(40).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.96.0.77"], "the last address stays");
    let mut headless = own;
    headless["spec"] = json!({ "clusterIP": "None", "clusterIPs": ["None"] });
    fake.put("steward", "services", headless);
    seconds(40).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.96.0.77"]);
}
