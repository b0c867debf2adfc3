//! What is seen in the cluster: watches, and what they have told so far.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use futures::stream::{BoxStream, SelectAll, StreamExt, unfold};
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::ListParams;
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;

use super::content::{NAME, NAMESPACE, SERVICE_LABEL};
use super::desired::View;
use super::plan::Legacy;
use super::trouble::{ANSWER, Trouble, in_time};
use crate::config::{EndpointConfig, EndpointMode, SERVICE_NAMESPACE};

/// A watch is renewed this often (seconds). One whose connection died silently is noticed 5 s
/// later, so this bounds how old our view can be.
const WATCH_SECONDS: u32 = 60;

/// After so long without a word all is listed anew, whatever the connection looks like: kube bounds
/// the silence of a watch, but neither that of the list before it nor that before its first byte.
const SILENCE: Duration = Duration::from_secs(600);

/// Where core `Endpoints` are forbidden, a permission granted later is noticed within this.
pub(super) const SELDOM: Duration = Duration::from_secs(600);

/// One thing that a watch told.
pub(super) type News<K> = Result<Event<K>, Trouble>;

/// News of any watch.
pub(super) enum Seen {
    Service(News<Service>),
    Slice(News<EndpointSlice>),
    OwnService(News<Service>),
    OwnSlice(News<EndpointSlice>),
    Endpoints(News<Endpoints>),
}

/// The objects of one watch.
#[derive(Debug)]
pub(super) struct Store<K> {
    objects: BTreeMap<String, K>,
    /// Objects of a list that is still being told.
    incoming: BTreeMap<String, K>,
    /// The list has been told once.
    known: bool,
    /// What keeps us from knowing more, if anything.
    trouble: Option<Trouble>,
}

impl<K> Default for Store<K> {
    fn default() -> Self {
        Self { objects: BTreeMap::new(), incoming: BTreeMap::new(), known: false, trouble: None }
    }
}

/// How a watch's health changed.
#[derive(Debug)]
pub(super) enum Health {
    Same,
    Failed(Trouble),
    Recovered,
}

impl<K: Resource<DynamicType = ()> + Clone> Store<K> {
    /// Takes in what a watch told.
    pub(super) fn take(&mut self, news: News<K>) -> Health {
        let event = match news {
            Ok(event) => event,
            Err(trouble) => {
                let first = self.trouble.replace(trouble.clone()).is_none();
                return if first { Health::Failed(trouble) } else { Health::Same };
            }
        };
        let begins = matches!(event, Event::Init);
        match event {
            Event::Init => self.incoming.clear(),
            Event::InitApply(object) => {
                self.incoming.insert(object.name_any(), object);
            }
            Event::InitDone => {
                self.objects = std::mem::take(&mut self.incoming);
                self.known = true;
            }
            Event::Apply(object) => self.put(object),
            Event::Delete(object) => {
                let name = object.name_any();
                if !self.objects.get(&name).is_some_and(|known| is_newer(known, &object)) {
                    self.objects.remove(&name);
                }
            }
        }
        // Init is told before anything was asked of the API server, so it proves nothing.
        if !begins && self.trouble.take().is_some() { Health::Recovered } else { Health::Same }
    }

    /// Takes in an object that the API server answered with, which a watch will tell later: what
    /// it then tells may already be older.
    pub(super) fn put(&mut self, object: K) {
        let name = object.name_any();
        if !self.objects.get(&name).is_some_and(|known| is_newer(known, &object)) {
            self.objects.insert(name, object);
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        self.objects.remove(name);
    }

    pub(super) fn objects(&self) -> &BTreeMap<String, K> {
        &self.objects
    }

    /// Something can be concluded: the list was told, or it is clear that it will not be soon.
    fn is_settled(&self) -> bool {
        self.known || self.trouble.is_some()
    }
}

/// Whether `known` is of a later version. The API promises that versions of one kind can be
/// compared as numbers only since 1.35, but all servers with etcd behind them always did.
fn is_newer<K: ResourceExt>(known: &K, other: &K) -> bool {
    let version = |object: &K| object.resource_version()?.parse::<u64>().ok();
    version(known) > version(other)
}

/// All that is seen.
#[derive(Debug, Default)]
pub(super) struct Observed {
    pub service: Store<Service>,
    pub slices: Store<EndpointSlice>,
    pub own_service: Store<Service>,
    pub own_slices: Store<EndpointSlice>,
    pub endpoints: Store<Endpoints>,
}

impl Observed {
    /// For the pure functions.
    pub(super) fn view<'a>(&'a self, config: &EndpointConfig) -> View<'a> {
        View {
            service: self.service.objects.get(NAME),
            slices: &self.slices.objects,
            own_service: self.own_service.objects.get(&config.service_name),
            own_slices: &self.own_slices.objects,
        }
    }

    pub(super) fn legacy(&self) -> Legacy<'_> {
        match self.endpoints.objects.get(NAME) {
            _ if !self.endpoints.known => Legacy::OutOfReach,
            Some(endpoints) => Legacy::There(endpoints),
            None => Legacy::Absent,
        }
    }

    /// Enough was told to decide. The slices to be written must be known; of the rest it is
    /// enough to know that it cannot be had.
    pub(super) fn suffices(&self, mode: EndpointMode) -> bool {
        let source = match mode {
            EndpointMode::Mirror => self.own_slices.is_settled(),
            EndpointMode::ClusterIp => self.own_service.is_settled(),
            EndpointMode::Off => false,
        };
        self.slices.known && self.service.is_settled() && source
    }
}

/// All watches that the mode needs.
pub(super) fn watches(
    client: &Client,
    config: &EndpointConfig,
) -> SelectAll<BoxStream<'static, Seen>> {
    let name = |name: &str| settings().fields(&format!("metadata.name={name}"));
    let of_service = |name: &str| settings().labels(&format!("{SERVICE_LABEL}={name}"));
    let mut all = vec![
        watch(api(client, NAMESPACE), name(NAME), false).map(Seen::Service).boxed(),
        watch(api(client, NAMESPACE), of_service(NAME), false).map(Seen::Slice).boxed(),
        watch(api(client, NAMESPACE), name(NAME), true).map(Seen::Endpoints).boxed(),
    ];
    let own = &config.service_name;
    all.push(match config.mode {
        EndpointMode::ClusterIp => {
            watch(api(client, SERVICE_NAMESPACE), name(own), false).map(Seen::OwnService).boxed()
        }
        EndpointMode::Mirror | EndpointMode::Off => {
            let slices = watch(api(client, SERVICE_NAMESPACE), of_service(own), false);
            slices.map(|news| Seen::OwnSlice(news.map(without_history))).boxed()
        }
    });
    futures::stream::select_all(all)
}

/// With a thousand nodes, who wrote what is the greater part of these slices, and we never ask.
fn without_history(event: Event<EndpointSlice>) -> Event<EndpointSlice> {
    event.modify(|slice| slice.metadata.managed_fields = None)
}

/// Namespaced objects.
pub(super) fn api<K>(client: &Client, namespace: &str) -> Api<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
{
    Api::namespaced(client.clone(), namespace)
}

fn settings() -> watcher::Config {
    watcher::Config::default().timeout(WATCH_SECONDS)
}

/// What [`watch`] carries from one item to the next.
struct Watch<K: Clone + Debug + DeserializeOwned + 'static> {
    api: Api<K>,
    settings: watcher::Config,
    optional: bool,
    stream: Option<BoxStream<'static, watcher::Result<Event<K>>>>,
    listing: bool,
    backoff: DefaultBackoff,
    pause: Option<Duration>,
}

/// A watch that goes on for ever. An `optional` one asks first whether it may, and where that is
/// forbidden asks again but seldom.
fn watch<K>(api: Api<K>, settings: watcher::Config, optional: bool) -> BoxStream<'static, News<K>>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    let backoff = DefaultBackoff::default();
    let watch =
        Watch { api, settings, optional, stream: None, listing: true, backoff, pause: None };
    unfold(watch, |mut watch| async move { Some((watch.next().await, watch)) }).boxed()
}

impl<K> Watch<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static,
{
    async fn next(&mut self) -> News<K> {
        if let Some(pause) = self.pause.take() {
            tokio::time::sleep(pause).await;
        }
        let news = self.step().await;
        match &news {
            Err(Trouble::Forbidden(_)) if self.optional => {
                // Begin anew with the question.
                self.stream = None;
                self.pause = Some(SELDOM.mul_f64(0.9 + 0.2 * fastrand::f64()));
            }
            Err(_) => self.pause = self.backoff.next(),
            Ok(Event::Init) => self.listing = true,
            Ok(Event::InitDone | Event::Apply(_) | Event::Delete(_)) => {
                self.listing = false;
                self.backoff.reset();
            }
            Ok(Event::InitApply(_)) => {}
        }
        news
    }

    async fn step(&mut self) -> News<K> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            empty => {
                if self.optional {
                    ask(&self.api, &self.settings).await?;
                }
                self.listing = true;
                let stream = watcher(self.api.clone(), self.settings.clone());
                empty.insert(stream.boxed())
            }
        };
        let patience = if self.listing { ANSWER } else { SILENCE };
        match tokio::time::timeout(patience, stream.next()).await {
            Ok(Some(event)) => event.map_err(Trouble::from),
            Ok(None) => {
                self.stream = None;
                Err(Trouble::Other("the watch ended".to_owned()))
            }
            Err(_) if self.listing => {
                self.stream = None;
                Err(Trouble::Timeout(ANSWER))
            }
            Err(_) => {
                self.stream = None;
                Box::pin(self.step()).await
            }
        }
    }
}

/// kube's watcher logs a warning for each refusal; for what is merely nice to have, one of ours
/// is enough.
async fn ask<K>(api: &Api<K>, settings: &watcher::Config) -> Result<(), Trouble>
where
    K: Clone + Debug + DeserializeOwned,
{
    let mut question = ListParams::default().limit(1);
    question.field_selector.clone_from(&settings.field_selector);
    in_time(api.list(&question)).await.map(drop)
}
