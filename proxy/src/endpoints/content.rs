//! The objects as we write them, and how they differ from those found: by meaning, not by bytes,
//! so that what the API server or another replica merely spells otherwise is left alone.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort as CorePort, EndpointSubset, Endpoints,
};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::address::Entry;
use super::desired::Published;
use super::ownership::MANAGER;

/// Name and namespace of the Service whose endpoints we keep.
pub(super) const NAME: &str = "kubernetes";
/// See [`NAME`].
pub(super) const NAMESPACE: &str = "default";
/// Says which Service a slice belongs to.
pub(super) const SERVICE_LABEL: &str = "kubernetes.io/service-name";
/// Says who writes a slice; controllers leave those of others alone.
pub(super) const MANAGED_BY_LABEL: &str = "endpointslice.kubernetes.io/managed-by";
/// Keeps Kubernetes's mirroring controller from making a second slice out of `Endpoints`.
const SKIP_MIRROR_LABEL: &str = "endpointslice.kubernetes.io/skip-mirror";

const PORT_NAME: &str = "https";
const PROTOCOL: &str = "TCP";

fn labels(pairs: &[(&str, &str)]) -> Option<BTreeMap<String, String>> {
    Some(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
}

/// The slice that publishes these entries.
pub(super) fn slice(name: &str, published: &Published, port: u16) -> EndpointSlice {
    let ready =
        EndpointConditions { ready: Some(true), serving: Some(true), terminating: Some(false) };
    let endpoint = |entry: &Entry| Endpoint {
        addresses: vec![entry.ip.to_string()],
        conditions: Some(ready.clone()),
        node_name: entry.node.clone(),
        zone: entry.zone.clone(),
        ..Endpoint::default()
    };
    EndpointSlice {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            labels: labels(&[(SERVICE_LABEL, NAME), (MANAGED_BY_LABEL, MANAGER)]),
            ..ObjectMeta::default()
        },
        address_type: published.family.address_type().to_owned(),
        endpoints: published.entries.iter().map(endpoint).collect(),
        ports: Some(vec![EndpointPort {
            name: Some(PORT_NAME.to_owned()),
            port: Some(i32::from(port)),
            protocol: Some(PROTOCOL.to_owned()),
            ..EndpointPort::default()
        }]),
    }
}

/// The `Endpoints` of the same content. Kubernetes gives them one family, the primary one.
pub(super) fn endpoints(published: &Published, port: u16) -> Endpoints {
    let address = |entry: &Entry| EndpointAddress {
        ip: entry.ip.to_string(),
        node_name: entry.node.clone(),
        ..EndpointAddress::default()
    };
    Endpoints {
        metadata: ObjectMeta {
            name: Some(NAME.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            labels: labels(&[(SKIP_MIRROR_LABEL, "true")]),
            ..ObjectMeta::default()
        },
        subsets: Some(vec![EndpointSubset {
            addresses: Some(published.entries.iter().map(address).collect()),
            not_ready_addresses: None,
            ports: Some(vec![CorePort {
                name: Some(PORT_NAME.to_owned()),
                port: i32::from(port),
                protocol: Some(PROTOCOL.to_owned()),
                ..CorePort::default()
            }]),
        }]),
    }
}

/// An endpoint by its meaning, absent conditions read as the API defines them.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Meaning {
    addresses: Vec<String>,
    ready: bool,
    serving: bool,
    terminating: bool,
    node: Option<String>,
    zone: Option<String>,
    /// Fields that we leave empty: hints would keep zones from using an address.
    extras: bool,
}

fn canonical(address: &str) -> String {
    address.parse::<IpAddr>().map_or_else(|_| address.to_owned(), |ip| ip.to_string())
}

fn meaning(endpoint: &Endpoint) -> Meaning {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let ready = conditions.ready.unwrap_or(true);
    Meaning {
        addresses: endpoint.addresses.iter().map(|address| canonical(address)).collect(),
        ready,
        serving: conditions.serving.unwrap_or(ready),
        terminating: conditions.terminating.unwrap_or(false),
        node: endpoint.node_name.clone(),
        zone: endpoint.zone.clone(),
        extras: endpoint.hints.is_some()
            || endpoint.hostname.is_some()
            || endpoint.target_ref.is_some(),
    }
}

fn meanings(slice: &EndpointSlice) -> Vec<Meaning> {
    let mut all: Vec<_> = slice.endpoints.iter().map(meaning).collect();
    all.sort();
    all
}

/// Name, number, protocol, application protocol.
type Port = (String, Option<i32>, String, Option<String>);

fn ports(slice: &EndpointSlice) -> Vec<Port> {
    let port = |port: &EndpointPort| {
        let protocol = port.protocol.clone().unwrap_or_else(|| PROTOCOL.to_owned());
        (port.name.clone().unwrap_or_default(), port.port, protocol, port.app_protocol.clone())
    };
    let mut all: Vec<_> = slice.ports.iter().flatten().map(port).collect();
    all.sort();
    all
}

fn label<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(key).map(String::as_str)
}

/// Whether the slice counts as one of `default/kubernetes`.
pub(super) fn belongs(slice: &EndpointSlice) -> bool {
    label(&slice.metadata, SERVICE_LABEL) == Some(NAME)
}

/// Who says it manages the slice, else who wrote it last.
pub(super) fn manager(slice: &EndpointSlice) -> String {
    label(&slice.metadata, MANAGED_BY_LABEL)
        .map_or_else(|| super::ownership::last_writer(&slice.metadata), str::to_owned)
}

fn change(what: &str, found: impl Display, want: impl Display) -> String {
    format!("{what} {found} -> {want}")
}

fn label_changes(want: &ObjectMeta, found: &ObjectMeta) -> Vec<String> {
    let keys = want.labels.iter().flatten().map(|(key, _)| key);
    let differing = keys.filter(|key| label(want, key) != label(found, key));
    let shown = |meta, key| label(meta, key).unwrap_or("(none)").to_owned();
    differing
        .map(|key| change(&format!("label {key}"), shown(found, key), shown(want, key)))
        .collect()
}

/// A list for a log line: the first few, and how many more.
fn listed<T: AsRef<str>>(items: impl IntoIterator<Item = T>) -> String {
    const SHOWN: usize = 8;
    let all: Vec<_> = items.into_iter().collect();
    let first: Vec<_> = all.iter().take(SHOWN).map(AsRef::as_ref).collect();
    let more = all.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("[{}{more}]", first.join(" "))
}

/// What would change if the slice found became the one wanted; empty if nothing that matters.
pub(super) fn slice_changes(want: &EndpointSlice, found: &EndpointSlice) -> Vec<String> {
    let mut changes = label_changes(&want.metadata, &found.metadata);
    if want.address_type != found.address_type {
        changes.push(change("address type", &found.address_type, &want.address_type));
    }
    changes.extend(endpoint_changes(&meanings(want), &meanings(found)));
    changes.extend(port_changes(&ports(want), &ports(found)));
    changes
}

fn endpoint_changes(want: &[Meaning], found: &[Meaning]) -> Vec<String> {
    if want == found {
        return Vec::new();
    }
    let addresses = |all: &[Meaning]| -> Vec<String> {
        all.iter().flat_map(|meaning| meaning.addresses.clone()).collect()
    };
    if addresses(want) != addresses(found) || want.len() != found.len() {
        return vec![change("addresses", listed(addresses(found)), listed(addresses(want)))];
    }
    let differs =
        |field: fn(&Meaning, &Meaning) -> bool| want.iter().zip(found).any(|(w, f)| field(w, f));
    let conditions = |w: &Meaning, f: &Meaning| {
        (w.ready, w.serving, w.terminating) != (f.ready, f.serving, f.terminating)
    };
    [
        ("conditions", differs(conditions)),
        ("node names", differs(|w, f| w.node != f.node)),
        ("zones", differs(|w, f| w.zone != f.zone)),
        ("hints and references", differs(|w, f| w.extras != f.extras)),
    ]
    .into_iter()
    .filter(|(_, differs)| *differs)
    .map(|(what, _)| what.to_owned())
    .collect()
}

fn port_changes(want: &[Port], found: &[Port]) -> Vec<String> {
    let ([want], [found]) = (want, found) else {
        let count = change("number of ports", found.len(), want.len());
        return if want == found { Vec::new() } else { vec![count] };
    };
    let number =
        |port: Option<i32>| port.map_or_else(|| "(all)".to_owned(), |port| port.to_string());
    let mut changes = Vec::new();
    if want.0 != found.0 {
        changes.push(change("port name", &found.0, &want.0));
    }
    if want.1 != found.1 {
        changes.push(change("port", number(found.1), number(want.1)));
    }
    if want.2 != found.2 {
        changes.push(change("protocol", &found.2, &want.2));
    }
    if want.3 != found.3 {
        changes.push("application protocol".to_owned());
    }
    changes
}

/// Whether the slice leads clients anywhere else than `ours` does. The same addresses and ports
/// once more do no harm, nor do endpoints to which nobody is sent.
pub(super) fn shadows(other: &EndpointSlice, ours: &EndpointSlice) -> bool {
    let own = meanings(ours);
    let own: BTreeSet<_> = own.iter().flat_map(|meaning| &meaning.addresses).collect();
    let mut used = meanings(other);
    used.retain(|meaning| meaning.ready || meaning.serving);
    let elsewhere = used.iter().flat_map(|m| &m.addresses).any(|address| !own.contains(address));
    elsewhere || (!used.is_empty() && ports(other) != ports(ours))
}

/// IP, node, ready, port; the API server regroups subsets freely.
type Route = (String, Option<String>, bool, Option<(String, i32, String)>);

fn routes(endpoints: &Endpoints) -> BTreeSet<Route> {
    let mut routes = BTreeSet::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ready = subset.addresses.iter().flatten().map(|address| (address, true));
        let unready = subset.not_ready_addresses.iter().flatten().map(|address| (address, false));
        let port = |port: &CorePort| {
            let protocol = port.protocol.clone().unwrap_or_else(|| PROTOCOL.to_owned());
            (port.name.clone().unwrap_or_default(), port.port, protocol)
        };
        let ports: Vec<_> = subset.ports.iter().flatten().map(|p| Some(port(p))).collect();
        let ports = if ports.is_empty() { vec![None] } else { ports };
        for (address, ready) in ready.chain(unready) {
            let ip = canonical(&address.ip);
            for port in &ports {
                routes.insert((ip.clone(), address.node_name.clone(), ready, port.clone()));
            }
        }
    }
    routes
}

/// As [`slice_changes`].
pub(super) fn endpoints_changes(want: &Endpoints, found: &Endpoints) -> Vec<String> {
    let mut changes = label_changes(&want.metadata, &found.metadata);
    let (want, found) = (routes(want), routes(found));
    let addresses = |routes: &BTreeSet<Route>| -> BTreeSet<String> {
        routes.iter().map(|route| route.0.clone()).collect()
    };
    if addresses(&want) != addresses(&found) {
        changes.push(change("addresses", listed(addresses(&found)), listed(addresses(&want))));
    } else if want != found {
        changes.push("ports, readiness or node names".to_owned());
    }
    changes
}

fn fingerprint(content: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    content.hash(&mut hasher);
    hasher.finish()
}

/// Stands for the content of an object that is not there.
pub(super) fn absence() -> u64 {
    fingerprint("absent")
}

/// The same number for the same meaning.
pub(super) fn slice_fingerprint(slice: &EndpointSlice) -> u64 {
    let meta = &slice.metadata;
    let labels = (label(meta, SERVICE_LABEL), label(meta, MANAGED_BY_LABEL));
    fingerprint((&slice.address_type, labels, meanings(slice), ports(slice)))
}

/// The same number for the same meaning.
pub(super) fn endpoints_fingerprint(endpoints: &Endpoints) -> u64 {
    fingerprint((label(&endpoints.metadata, SKIP_MIRROR_LABEL), routes(endpoints)))
}
