//! What should be published, as a table: from what is seen to what follows, without a server.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use serde_json::{Value, json};

use super::harness::config;
use crate::config::EndpointMode;
use crate::endpoints::address::{Entry, Family};
use crate::endpoints::desired::{Desired, Known, View, desired};

/// One line of the table. Everything is text, so that a line reads at a glance.
#[derive(Clone, Copy)]
struct Case {
    what: &'static str,
    cluster_ip_mode: bool,
    pod_ip: &'static str,
    ready: bool,
    /// Families of `default/kubernetes`; "" if it cannot be seen.
    service: &'static str,
    /// Endpoints of our Service: address, `!` before one that is not ready, `@node` after.
    own: &'static str,
    /// ClusterIPs of our Service.
    own_ips: &'static str,
    /// Addresses in slice `kubernetes`, which is ours if they end in `*`.
    slice: &'static str,
    /// Addresses published before, as this process remembers.
    known: &'static str,
    /// Families in order; `?` after one that is provisional, `...` at the end if one waits.
    want: &'static str,
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split_whitespace()
}

fn from<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("as the API has it")
}

fn family(address: &str) -> Family {
    if address.contains(':') { Family::V6 } else { Family::V4 }
}

fn own_slices(text: &str) -> BTreeMap<String, EndpointSlice> {
    let mut slices = BTreeMap::new();
    for (n, word) in words(text).enumerate() {
        let (ready, word) = word.strip_prefix('!').map_or((true, word), |rest| (false, rest));
        let (address, node) =
            word.split_once('@').map_or((word, None), |(ip, node)| (ip, Some(node)));
        let slice = json!({
            "metadata": {}, "addressType": family(address).address_type(),
            "endpoints": [{ "addresses": [address], "nodeName": node,
                            "conditions": { "ready": ready } }],
        });
        slices.insert(format!("own-{n}"), from(slice));
    }
    slices
}

fn published_slice(text: &str) -> BTreeMap<String, EndpointSlice> {
    let (text, manager) =
        text.strip_suffix('*').map_or((text, "kube-apiserver"), |rest| (rest, "steward-tcp-proxy"));
    let addresses: Vec<_> = words(text).collect();
    let Some(first) = addresses.first() else { return BTreeMap::new() };
    let endpoints: Vec<_> = addresses.iter().map(|ip| json!({ "addresses": [ip] })).collect();
    let slice = json!({
        "metadata": { "managedFields": [{ "manager": manager, "operation": "Apply",
                                          "fieldsV1": { "f:endpoints": {} } }] },
        "addressType": family(first).address_type(), "endpoints": endpoints,
    });
    BTreeMap::from([("kubernetes".to_owned(), from(slice))])
}

fn known(text: &str) -> Known {
    let mut known = Known::new();
    for word in words(text) {
        let ip = word.parse().expect("an address");
        known.entry(family(word)).or_default().push(Entry { ip, node: None, zone: None });
    }
    known
}

fn service(spec: Value) -> Service {
    from(json!({ "metadata": {}, "spec": spec }))
}

fn told(desired: &Desired) -> String {
    let mut lines: Vec<_> = desired
        .families
        .iter()
        .map(|published| {
            let ips: Vec<_> = published.entries.iter().map(|e| e.ip.to_string()).collect();
            let mark = if published.provisional { "?" } else { "" };
            format!("{}{mark}", ips.join(" "))
        })
        .collect();
    lines.extend(desired.waits.then(|| "...".to_owned()));
    lines.join(" | ")
}

impl Case {
    fn run(self) -> String {
        let mut config = config(self.pod_ip);
        if self.cluster_ip_mode {
            config.mode = EndpointMode::ClusterIp;
        }
        let families: Vec<_> = words(self.service).collect();
        let kubernetes = (!families.is_empty()).then(|| service(json!({ "ipFamilies": families })));
        let ips: Vec<_> = words(self.own_ips).collect();
        let own_service =
            (!ips.is_empty()).then(|| service(json!({ "clusterIP": ips[0], "clusterIPs": ips })));
        let view = View {
            service: kubernetes.as_ref(),
            slices: &published_slice(self.slice),
            own_service: own_service.as_ref(),
            own_slices: &own_slices(self.own),
        };
        told(&desired(&config, view, &known(self.known), self.ready))
    }
}

const BASE: Case = Case {
    what: "",
    cluster_ip_mode: false,
    pod_ip: "10.0.0.7",
    ready: true,
    service: "IPv4",
    own: "",
    own_ips: "",
    slice: "",
    known: "",
    want: "",
};

#[test]
fn what_is_published_follows_from_what_is_seen() {
    let cases = [
        Case {
            what: "ready ones, sorted as numbers",
            own: "10.0.0.10 10.0.0.9",
            want: "10.0.0.9 10.0.0.10",
            ..BASE
        },
        Case {
            what: "one per node",
            own: "10.0.0.9@a 10.0.0.8@a 10.0.0.7@b",
            want: "10.0.0.7 10.0.0.8",
            ..BASE
        },
        Case { what: "one per address", own: "10.0.0.9 10.0.0.9@a", want: "10.0.0.9", ..BASE },
        Case { what: "not the unready", own: "10.0.0.8 !10.0.0.9", want: "10.0.0.8", ..BASE },
        Case { what: "ours, while none is listed", want: "10.0.0.7?", ..BASE },
        Case { what: "ours, while none is ready", own: "!10.0.0.7@a", want: "10.0.0.7?", ..BASE },
        Case { what: "but only once we serve", ready: false, want: "...", ..BASE },
        Case { what: "and not beside ready ones", own: "10.0.0.8", want: "10.0.0.8", ..BASE },
        Case { what: "none", pod_ip: "", want: "", ..BASE },
        Case { what: "loopback is none", pod_ip: "127.0.0.1", want: "", ..BASE },
        Case { what: "link-local is none", pod_ip: "fe80::1", service: "IPv6", ..BASE },
        Case {
            what: "beside what replicas published",
            slice: "10.0.0.5 10.0.0.9*",
            want: "10.0.0.5 10.0.0.7 10.0.0.9?",
            ..BASE
        },
        Case {
            what: "that stays while we do not serve",
            slice: "10.0.0.5*",
            ready: false,
            want: "10.0.0.5? | ...",
            ..BASE
        },
        Case {
            what: "not beside what others wrote",
            slice: "192.0.2.1",
            want: "10.0.0.7?",
            ..BASE
        },
        Case {
            what: "but beside what we remember",
            slice: "192.0.2.1",
            known: "10.0.0.5",
            want: "10.0.0.5 10.0.0.7?",
            ..BASE
        },
        Case {
            what: "the last known",
            pod_ip: "",
            own: "!10.0.0.8",
            known: "10.0.0.8",
            want: "10.0.0.8?",
            ..BASE
        },
        Case {
            what: "both families",
            service: "IPv4 IPv6",
            own: "fd00::7 10.0.0.7",
            want: "10.0.0.7 | fd00::7",
            ..BASE
        },
        Case {
            what: "in the Service's order",
            service: "IPv6 IPv4",
            own: "fd00::7 10.0.0.7",
            want: "fd00::7 | 10.0.0.7",
            ..BASE
        },
        Case { what: "only the Service's", own: "fd00::7 10.0.0.7", want: "10.0.0.7", ..BASE },
        Case { what: "better the other than none", own: "fd00::7", want: "fd00::7", ..BASE },
        Case {
            what: "all of an unseen Service",
            service: "",
            own: "fd00::7 10.0.0.7",
            want: "10.0.0.7 | fd00::7",
            ..BASE
        },
        Case {
            what: "in the order that there is",
            service: "",
            own: "fd00::7 10.0.0.7",
            slice: "fd00::1",
            want: "fd00::7 | 10.0.0.7",
            ..BASE
        },
        Case {
            what: "a family whose pods are unready keeps its last",
            service: "IPv4 IPv6",
            own: "10.0.0.7 !fd00::7",
            known: "fd00::7",
            want: "10.0.0.7 | fd00::7?",
            ..BASE
        },
        Case {
            what: "one that is listed no more does not",
            service: "IPv4 IPv6",
            own: "10.0.0.7",
            known: "fd00::7",
            want: "10.0.0.7",
            ..BASE
        },
        Case {
            what: "ClusterIP",
            cluster_ip_mode: true,
            own_ips: "10.96.0.7",
            own: "10.0.0.7",
            want: "10.96.0.7",
            ..BASE
        },
        Case {
            what: "ClusterIPs",
            cluster_ip_mode: true,
            own_ips: "10.96.0.7 fd00:10:96::7",
            service: "IPv4 IPv6",
            want: "10.96.0.7 | fd00:10:96::7",
            ..BASE
        },
        Case {
            what: "once we serve",
            cluster_ip_mode: true,
            own_ips: "10.96.0.7",
            ready: false,
            want: "...",
            ..BASE
        },
        Case {
            what: "or did before",
            cluster_ip_mode: true,
            own_ips: "10.96.0.7",
            ready: false,
            known: "10.96.0.7",
            want: "10.96.0.7",
            ..BASE
        },
        Case { what: "headless has none", cluster_ip_mode: true, own_ips: "None", ..BASE },
    ];
    for case in cases {
        assert_eq!(case.run(), case.want, "{}", case.what);
    }
}
