//! What the endpoints of `default/kubernetes` should be: a pure function of the configuration
//! and of what is seen in the cluster.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};

use super::address::{Entry, Family, publishable};
use super::ownership;
use crate::config::{EndpointConfig, EndpointMode};

/// Endpoints that one slice (and one `Endpoints`) may hold; the API server refuses more.
pub(super) const LIMIT: usize = 1000;

/// What is seen in the cluster.
#[derive(Debug, Clone, Copy)]
pub(super) struct View<'a> {
    /// `default/kubernetes`.
    pub service: Option<&'a Service>,
    /// Slices of `default/kubernetes`, ours and others'.
    pub slices: &'a BTreeMap<String, EndpointSlice>,
    /// Our own Service.
    pub own_service: Option<&'a Service>,
    /// Slices of our own Service.
    pub own_slices: &'a BTreeMap<String, EndpointSlice>,
}

/// What to publish of one family.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Published {
    pub family: Family,
    /// Sorted, each address once, never empty.
    pub entries: Vec<Entry>,
    /// Our Service has no ready endpoint: replicas add themselves to what is there, and none
    /// takes away another's address, of which it cannot judge. So they cannot fight.
    pub provisional: bool,
}

/// What to publish.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Desired {
    /// The Service's families in its order, without those of which no address is known.
    pub families: Vec<Published>,
    /// The family whose slice is named like the Service, and which `Endpoints` hold.
    pub primary: Option<Family>,
    /// Entries beyond [`LIMIT`].
    pub left_out: usize,
    /// There is an address that may be published once we are ready to serve.
    pub waits: bool,
}

/// Addresses last published, by family.
pub(super) type Known = BTreeMap<Family, Vec<Entry>>;

/// `ready` tells whether this process serves clients: only then is its own address published.
pub(super) fn desired(
    config: &EndpointConfig,
    view: View<'_>,
    known: &Known,
    ready: bool,
) -> Desired {
    let (mut wanted, waits) = match config.mode {
        EndpointMode::Mirror => mirrored(config, view, known, ready),
        EndpointMode::ClusterIp => cluster_ips(view, known, ready),
        EndpointMode::Off => (BTreeMap::new(), false),
    };
    let mut left_out = 0;
    for published in wanted.values_mut() {
        left_out += published.entries.len().saturating_sub(LIMIT);
        published.entries.truncate(LIMIT);
    }
    let families = service_families(view.service);
    let order = if families.is_empty() { guess_families(view, &wanted) } else { families.clone() };
    let mut published: Vec<_> = order.iter().filter_map(|f| wanted.remove(f)).collect();
    if published.is_empty() {
        // None of the Service's families: better an address of the other than none at all.
        published.extend(wanted.into_values());
    }
    Desired { primary: order.first().copied(), families: published, left_out, waits }
}

/// The families of `default/kubernetes`, primary first; empty if it is not seen.
fn service_families(service: Option<&Service>) -> Vec<Family> {
    let Some(spec) = service.and_then(|service| service.spec.as_ref()) else { return Vec::new() };
    let listed: Vec<_> =
        spec.ip_families.iter().flatten().filter_map(|text| Family::parse(text)).collect();
    if listed.is_empty() {
        service_ips(service).into_iter().map(Family::of).collect()
    } else {
        listed
    }
}

/// ClusterIPs, primary first.
fn service_ips(service: Option<&Service>) -> Vec<IpAddr> {
    let Some(spec) = service.and_then(|service| service.spec.as_ref()) else { return Vec::new() };
    let all = spec.cluster_ips.iter().flatten().chain(&spec.cluster_ip);
    let mut ips = Vec::new();
    // "None" and "" do not parse, which is as well.
    for ip in all.filter_map(|text| text.parse().ok()).filter_map(publishable) {
        if !ips.contains(&ip) {
            ips.push(ip);
        }
    }
    ips
}

/// Without the Service: the family that slice `kubernetes` has already, else the first there is.
fn guess_families(view: View<'_>, wanted: &BTreeMap<Family, Published>) -> Vec<Family> {
    let existing = view
        .slices
        .get(super::plan::NAME)
        .and_then(|slice| Family::parse(&slice.address_type))
        .filter(|family| wanted.contains_key(family));
    let first = existing.or_else(|| wanted.keys().next().copied());
    let mut order: Vec<_> = first.into_iter().collect();
    order.extend(wanted.keys().filter(|family| Some(**family) != first));
    order
}

/// The ready endpoints of our Service; while it has none, what is known and our own address.
fn mirrored(
    config: &EndpointConfig,
    view: View<'_>,
    known: &Known,
    ready: bool,
) -> (BTreeMap<Family, Published>, bool) {
    let mut wanted = BTreeMap::new();
    for family in Family::ALL {
        let entries = ready_entries(view, family);
        if !entries.is_empty() {
            wanted.insert(family, Published { family, entries, provisional: false });
        }
    }
    let none_ready = wanted.is_empty();
    let own = config.pod_ip.and_then(publishable).filter(|_| none_ready);
    let mut waits = false;
    for family in Family::ALL {
        // A family that our Service does not even list, beside one that it does, is gone for good.
        if wanted.contains_key(&family) || !(none_ready || lists(view, family)) {
            continue;
        }
        let mut entries = held(view, known, family);
        if let Some(ip) = own.filter(|ip| Family::of(*ip) == family) {
            if ready {
                add(&mut entries, own_entry(view, ip));
            } else {
                waits = true;
            }
        }
        if !entries.is_empty() {
            wanted.insert(family, Published { family, entries, provisional: true });
        }
    }
    (wanted, waits)
}

/// All endpoints of our Service, of one family.
fn listed(view: View<'_>, family: Family) -> impl Iterator<Item = (&Endpoint, IpAddr)> {
    view.own_slices
        .values()
        .filter(move |slice| slice.address_type == family.address_type())
        .flat_map(|slice| &slice.endpoints)
        // No meaning is defined for further addresses of one endpoint.
        .filter_map(|endpoint| Some((endpoint, endpoint.addresses.first()?.parse().ok()?)))
        .filter_map(|(endpoint, ip)| Some((endpoint, publishable(ip)?)))
        .filter(move |(_, ip)| Family::of(*ip) == family)
}

fn lists(view: View<'_>, family: Family) -> bool {
    listed(view, family).next().is_some()
}

fn is_ready(endpoint: &Endpoint) -> bool {
    let conditions = endpoint.conditions.as_ref();
    // The API says to take an unknown state as ready.
    conditions.and_then(|c| c.ready).unwrap_or(true)
        && !conditions.and_then(|c| c.terminating).unwrap_or(false)
}

fn entry(endpoint: &Endpoint, ip: IpAddr) -> Entry {
    Entry { ip, node: endpoint.node_name.clone(), zone: endpoint.zone.clone() }
}

/// Ready endpoints, sorted, one per address and one per node (a rolling update may have two).
fn ready_entries(view: View<'_>, family: Family) -> Vec<Entry> {
    let mut all: Vec<_> = listed(view, family)
        .filter(|(endpoint, _)| is_ready(endpoint))
        .map(|(endpoint, ip)| entry(endpoint, ip))
        .collect();
    all.sort();
    // Sorted, an entry without a node comes before its double that has one.
    all.reverse();
    all.dedup_by_key(|entry| entry.ip);
    all.reverse();
    let mut nodes = BTreeSet::new();
    all.retain(|entry| entry.node.as_ref().is_none_or(|node| nodes.insert(node.clone())));
    all
}

/// Our own address, with what our Service says of it, ready or not.
fn own_entry(view: View<'_>, ip: IpAddr) -> Entry {
    listed(view, Family::of(ip))
        .find(|(_, listed)| *listed == ip)
        .map_or(Entry { ip, node: None, zone: None }, |(endpoint, ip)| entry(endpoint, ip))
}

/// What replicas published together so far: in the slices if no other wrote them last, else as
/// this process remembers it.
fn held(view: View<'_>, known: &Known, family: Family) -> Vec<Entry> {
    let mut entries = Vec::new();
    let ours = view
        .slices
        .values()
        .filter(|slice| slice.address_type == family.address_type())
        .filter(|slice| ownership::is_ours_alone(&slice.metadata, "f:endpoints"));
    for endpoint in ours.flat_map(|slice| &slice.endpoints) {
        let ip = endpoint.addresses.first().and_then(|text| text.parse().ok());
        if let Some(ip) = ip.and_then(publishable) {
            add(&mut entries, entry(endpoint, ip));
        }
    }
    if entries.is_empty() { known.get(&family).cloned().unwrap_or_default() } else { entries }
}

/// Adds the entry, keeping order; what is known of its node is not forgotten.
fn add(entries: &mut Vec<Entry>, new: Entry) {
    match entries.binary_search_by_key(&new.ip, |entry| entry.ip) {
        Err(at) => entries.insert(at, new),
        Ok(at) => {
            if let Some(old) = entries.get_mut(at) {
                old.node = new.node.or(old.node.take());
                old.zone = new.zone.or(old.zone.take());
            }
        }
    }
}

/// Where clients reach `default/kubernetes`: each of its ClusterIPs with each of its TCP ports.
pub(super) fn asked(view: View<'_>) -> impl Iterator<Item = SocketAddr> {
    let spec = view.service.and_then(|service| service.spec.as_ref());
    let ports = spec.and_then(|spec| spec.ports.as_ref()).into_iter().flatten();
    let tcp = ports.filter(|port| port.protocol.as_deref().is_none_or(|name| name == "TCP"));
    let ports: Vec<u16> = tcp.filter_map(|port| u16::try_from(port.port).ok()).collect();
    let all = service_ips(view.service);
    all.into_iter()
        .flat_map(move |ip| ports.clone().into_iter().map(move |port| SocketAddr::new(ip, port)))
}

/// The ClusterIPs of our Service, published anew only when we are ready to serve.
fn cluster_ips(view: View<'_>, known: &Known, ready: bool) -> (BTreeMap<Family, Published>, bool) {
    let mut wanted = BTreeMap::new();
    let mut waits = false;
    for ip in service_ips(view.own_service) {
        let family = Family::of(ip);
        let fresh = vec![Entry { ip, node: None, zone: None }];
        let published = known.get(&family);
        let is_new = published != Some(&fresh);
        waits |= is_new && !ready;
        let entries = if is_new && !ready { published.cloned() } else { Some(fresh) };
        if let Some(entries) = entries.filter(|entries| !entries.is_empty()) {
            wanted.entry(family).or_insert(Published { family, entries, provisional: false });
        }
    }
    (wanted, waits)
}
