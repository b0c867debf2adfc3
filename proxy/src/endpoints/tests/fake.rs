//! An API server in memory: objects, versions, watches with selectors, server-side apply with
//! field ownership as far as the reconciler relies on it, and faults on demand.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use futures::StreamExt;
use futures::channel::mpsc;
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use kube::Client;
use kube::client::Body;
use serde_json::{Map, Value, json};

use crate::endpoints::ownership::MANAGER;

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;
type Refusal = (u16, &'static str, String);

/// A request as the server saw it.
#[derive(Debug, Clone)]
pub struct Call {
    pub method: Method,
    /// `endpointslices`, `services`, `endpoints` or `events`.
    pub kind: String,
    pub namespace: String,
    pub name: Option<String>,
    pub query: BTreeMap<String, String>,
    pub body: Value,
    apply: bool,
}

impl Call {
    pub fn is_write(&self) -> bool {
        self.method != Method::GET
    }

    pub fn is_watch(&self) -> bool {
        self.query.contains_key("watch")
    }

    /// As RBAC names it.
    pub fn verb(&self) -> &'static str {
        match (&self.method, &self.name) {
            (&Method::DELETE, _) => "delete",
            (&Method::PATCH, _) => "patch",
            (&Method::POST, _) => "create",
            (&Method::PUT, _) => "update",
            (_, Some(_)) => "get",
            _ if self.is_watch() => "watch",
            _ => "list",
        }
    }

    fn selects(&self, object: &Value) -> bool {
        let meta = &object["metadata"];
        let pair = |selector: &str| -> (String, String) {
            let (key, value) = selector.split_once('=').expect("one selector with =");
            (key.to_owned(), value.trim_start_matches('=').to_owned())
        };
        let labels = self.query.get("labelSelector").is_none_or(|selector| {
            let (key, value) = pair(selector);
            meta["labels"][&key] == json!(value)
        });
        let fields = self.query.get("fieldSelector").is_none_or(|selector| {
            let (key, value) = pair(selector);
            assert_eq!(key, "metadata.name");
            meta["name"] == json!(value)
        });
        labels && fields && meta["namespace"] == json!(self.namespace)
    }
}

/// What happens to a call that a fault applies to.
#[derive(Debug, Clone, Copy)]
pub enum Effect {
    /// This HTTP status and reason.
    Refuse(u16, &'static str),
    /// No answer, ever.
    Hang,
}

struct Fault {
    applies: Box<dyn Fn(&Call) -> bool + Send>,
    effect: Effect,
    times: usize,
}

struct Watcher {
    call: Call,
    out: mpsc::UnboundedSender<Bytes>,
}

#[derive(Clone)]
struct Change {
    version: u64,
    kind: String,
    old: Option<Value>,
    new: Option<Value>,
}

type Rival = dyn Fn(&Fake, &Call) + Send + Sync;
type Key = (String, String, String);

#[derive(Default)]
struct State {
    version: u64,
    objects: BTreeMap<Key, Value>,
    history: Vec<Change>,
    watchers: Vec<Watcher>,
    faults: Vec<Fault>,
    calls: Vec<Call>,
    /// Called after each write by a client, to play a rival that reacts at once.
    rival: Option<Arc<Rival>>,
}

/// The server; clones are the same one.
#[derive(Clone, Default)]
pub struct Fake(Arc<Mutex<State>>);

fn key(kind: &str, namespace: &str, name: &str) -> Key {
    (kind.to_owned(), namespace.to_owned(), name.to_owned())
}

fn event(change: &Change, call: &Call) -> Option<Bytes> {
    if change.kind != call.kind {
        return None;
    }
    let selected = |object: &Option<Value>| object.clone().filter(|object| call.selects(object));
    let (kind, mut object) = match (selected(&change.old), selected(&change.new)) {
        (None, Some(new)) => ("ADDED", new),
        (Some(_), Some(new)) => ("MODIFIED", new),
        (Some(old), None) => ("DELETED", old),
        (None, None) => return None,
    };
    object["metadata"]["resourceVersion"] = json!(change.version.to_string());
    Some(line(&json!({ "type": kind, "object": object })))
}

fn line(value: &Value) -> Bytes {
    Bytes::from(format!("{value}\n"))
}

impl Fake {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panicked while holding it")
    }

    /// A client of this server.
    pub fn client(&self) -> Client {
        let fake = self.clone();
        let service = tower::service_fn(move |request: Request<Body>| {
            let fake = fake.clone();
            async move { Ok::<_, Infallible>(fake.serve(request).await) }
        });
        Client::new(service, "default")
    }

    /// Makes the next `times` calls that `applies` to misbehave.
    pub fn fault(
        &self,
        times: usize,
        effect: Effect,
        applies: impl Fn(&Call) -> bool + Send + 'static,
    ) {
        self.lock().faults.push(Fault { applies: Box::new(applies), effect, times });
    }

    pub fn no_more_faults(&self) {
        self.lock().faults.clear();
    }

    /// Lets `rival` act after each successful write of a client.
    pub fn on_write(&self, rival: impl Fn(&Fake, &Call) + Send + Sync + 'static) {
        self.lock().rival = Some(Arc::new(rival));
    }

    pub fn no_more_rival(&self) {
        self.lock().rival = None;
    }

    /// All calls so far.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// Calls that write, without Events.
    pub fn writes(&self) -> Vec<Call> {
        let calls = self.calls();
        calls.into_iter().filter(|call| call.is_write() && call.kind != "events").collect()
    }

    pub fn get(&self, kind: &str, namespace: &str, name: &str) -> Option<Value> {
        self.lock().objects.get(&key(kind, namespace, name)).cloned()
    }

    /// All objects of a kind.
    pub fn all(&self, kind: &str) -> Vec<Value> {
        let state = self.lock();
        state.objects.iter().filter(|(key, _)| key.0 == kind).map(|(_, v)| v.clone()).collect()
    }

    /// Creates or replaces an object as `manager` would.
    pub fn put(&self, manager: &str, kind: &str, object: Value) {
        let meta = &object["metadata"];
        let name = meta["name"].as_str().expect("a name").to_owned();
        let namespace = meta["namespace"].as_str().expect("a namespace").to_owned();
        let mut state = self.lock();
        let old = state.objects.get(&key(kind, &namespace, &name)).cloned();
        let fields: Vec<_> = top_fields(&object);
        let new = with_owner(object, old.as_ref(), manager, "Update", &fields, state.version);
        state.store(kind, &namespace, &name, Some(new));
    }

    /// Changes an object as `manager` would with a plain update.
    pub fn edit(&self, manager: &str, kind: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let mut state = self.lock();
        let old = state.objects.get(&key(kind, "default", name)).cloned().expect("to be there");
        let mut new = old.clone();
        change(&mut new);
        let changed: Vec<_> =
            top_fields(&new).into_iter().filter(|field| new[field] != old[field]).collect();
        let new = with_owner(new, Some(&old), manager, "Update", &changed, state.version);
        state.store(kind, "default", name, Some(new));
    }

    pub fn delete(&self, kind: &str, namespace: &str, name: &str) {
        self.lock().store(kind, namespace, name, None);
    }

    /// Ends all watches, as a restarting server does.
    pub fn cut_watches(&self) {
        self.lock().watchers.clear();
    }

    /// Tells all watches that their version is too old, and ends them.
    pub fn expire_watches(&self) {
        let gone = line(&json!({ "type": "ERROR", "object": {
            "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410,
            "reason": "Expired", "message": "too old resource version" } }));
        for watcher in self.lock().watchers.drain(..) {
            let _ = watcher.out.unbounded_send(gone.clone());
        }
    }

    async fn serve(self, request: Request<Body>) -> Answer {
        let call = read(request).await;
        let effect = {
            let mut state = self.lock();
            state.calls.push(call.clone());
            let fault = state.faults.iter_mut().find(|f| f.times > 0 && (f.applies)(&call));
            fault.map(|fault| {
                fault.times -= 1;
                fault.effect
            })
        };
        match effect {
            Some(Effect::Hang) => std::future::pending().await,
            Some(Effect::Refuse(code, reason)) => refuse((code, reason, "as told".to_owned())),
            None if call.is_watch() => self.lock().watch(call),
            None => self.answer(&call),
        }
    }

    fn answer(&self, call: &Call) -> Answer {
        let result = self.lock().answer(call);
        match result {
            Err(refusal) => refuse(refusal),
            Ok(value) => {
                let rival = self.lock().rival.clone().filter(|_| call.is_write());
                if let Some(rival) = rival {
                    rival(self, call);
                }
                reply(200, &value)
            }
        }
    }
}

impl State {
    fn store(&mut self, kind: &str, namespace: &str, name: &str, new: Option<Value>) {
        self.version += 1;
        let version = self.version;
        let key = key(kind, namespace, name);
        let old = self.objects.remove(&key);
        let new = new.map(|mut new| {
            let uid = old
                .as_ref()
                .map_or(json!(format!("uid-{version}")), |old| old["metadata"]["uid"].clone());
            new["metadata"]["uid"] = uid;
            new["metadata"]["resourceVersion"] = json!(version.to_string());
            self.objects.insert(key, new.clone());
            new
        });
        let change = Change { version, kind: kind.to_owned(), old, new };
        self.watchers.retain(|watcher| match event(&change, &watcher.call) {
            Some(event) => watcher.out.unbounded_send(event).is_ok(),
            None => true,
        });
        self.history.push(change);
    }

    fn watch(&mut self, call: Call) -> Answer {
        let since: u64 =
            call.query.get("resourceVersion").and_then(|v| v.parse().ok()).unwrap_or(0);
        let (out, events) = mpsc::unbounded();
        let missed = self.history.iter().filter(|change| change.version > since);
        for event in missed.filter_map(|change| event(change, &call)) {
            out.unbounded_send(event).expect("its end is here");
        }
        self.watchers.push(Watcher { call, out });
        let frames = events.map(|bytes| Ok(http_body::Frame::data(bytes)));
        Response::new(StreamBody::new(frames).boxed_unsync())
    }

    fn answer(&mut self, call: &Call) -> Result<Value, Refusal> {
        let Some(name) = call.name.clone() else { return Ok(self.list(call)) };
        let key = key(&call.kind, &call.namespace, &name);
        let old = self.objects.get(&key).cloned();
        match call.method {
            Method::GET => old.ok_or_else(|| missing(&name)),
            Method::DELETE => {
                let old = old.ok_or_else(|| missing(&name))?;
                let conditions = &call.body["preconditions"];
                for field in ["uid", "resourceVersion"] {
                    if !conditions[field].is_null() && conditions[field] != old["metadata"][field] {
                        return Err(stale(&name));
                    }
                }
                self.store(&call.kind, &call.namespace, &name, None);
                Ok(json!({ "kind": "Status", "apiVersion": "v1", "status": "Success" }))
            }
            Method::PATCH => self.patch(call, &name, old),
            _ => Err((405, "MethodNotAllowed", "the reconciler does not use this".to_owned())),
        }
    }

    fn list(&self, call: &Call) -> Value {
        let items: Vec<_> = self
            .objects
            .iter()
            .filter(|(key, object)| key.0 == call.kind && call.selects(object))
            .map(|(_, object)| object.clone())
            .collect();
        let version = self.version.to_string();
        json!({ "kind": "List", "apiVersion": "v1",
                "metadata": { "resourceVersion": version }, "items": items })
    }

    fn patch(&mut self, call: &Call, name: &str, old: Option<Value>) -> Result<Value, Refusal> {
        let wanted_version = &call.body["metadata"]["resourceVersion"];
        // As the real one does: applied with a version, an object that is not there is created.
        if let Some(old) = old.as_ref().filter(|_| !wanted_version.is_null())
            && old["metadata"]["resourceVersion"] != *wanted_version
        {
            return Err(stale(name));
        }
        if old.is_none() && !call.apply {
            return Err(missing(name));
        }
        let mut new = old.clone().unwrap_or_else(|| json!({ "metadata": {} }));
        for (field, value) in call.body.as_object().expect("an object") {
            if field == "metadata" {
                for field in ["name", "namespace"] {
                    if let Some(value) = value.get(field) {
                        new["metadata"][field] = value.clone();
                    }
                }
                let labels = value.get("labels").and_then(Value::as_object);
                for (label, value) in labels.into_iter().flatten() {
                    new["metadata"]["labels"][label] = value.clone();
                }
            } else {
                new[field] = value.clone();
            }
        }
        if old.as_ref().is_some_and(|old| old["addressType"] != new["addressType"]) {
            return Err((422, "Invalid", "addressType: field is immutable".to_owned()));
        }
        let operation = if call.apply { "Apply" } else { "Update" };
        let fields = top_fields(&call.body);
        let new = with_owner(new, old.as_ref(), MANAGER, operation, &fields, self.version);
        if Some(&new) == old.as_ref() {
            return Ok(new);
        }
        self.store(&call.kind, &call.namespace, name, Some(new));
        Ok(self.objects[&key(&call.kind, &call.namespace, name)].clone())
    }
}

fn top_fields(object: &Value) -> Vec<String> {
    let object = object.as_object().expect("an object");
    let not_owned = ["metadata", "kind", "apiVersion"];
    object.keys().filter(|key| !not_owned.contains(&key.as_str())).cloned().collect()
}

/// Gives `manager` the fields, and takes those that it changed from whoever had them.
fn with_owner(
    mut object: Value,
    old: Option<&Value>,
    manager: &str,
    operation: &str,
    fields: &[String],
    version: u64,
) -> Value {
    let mut entries: Vec<Value> = old
        .and_then(|old| old["metadata"]["managedFields"].as_array().cloned())
        .unwrap_or_default();
    let is_own = |e: &Value| e["manager"] == json!(manager) && e["operation"] == json!(operation);
    let owned = |fields: &[String]| -> Map<String, Value> {
        fields.iter().map(|field| (format!("f:{field}"), json!({}))).collect()
    };
    let changed = |field: &String| old.is_none_or(|old| old[field] != object[field]);
    for entry in entries.iter_mut().filter(|entry| !is_own(entry)) {
        let others = entry["fieldsV1"].as_object_mut().expect("fields");
        fields.iter().filter(|field| changed(field)).for_each(|field| {
            others.remove(&format!("f:{field}"));
        });
    }
    // Seconds of virtual time would often be equal; versions order writes as well.
    let time = k8s_openapi::jiff::Timestamp::from_second(i64::try_from(version).expect("small"));
    let time = json!(time.expect("valid").to_string());
    let labels_changed =
        old.is_none_or(|old| old["metadata"]["labels"] != object["metadata"]["labels"]);
    let touched = labels_changed || fields.iter().any(changed);
    if !entries.iter().any(is_own) {
        entries.push(json!({ "manager": manager, "operation": operation, "time": time,
                             "fieldsType": "FieldsV1", "fieldsV1": {} }));
    }
    for entry in entries.iter_mut().filter(|entry| is_own(entry)) {
        let own = entry["fieldsV1"].as_object_mut().expect("fields");
        let before = own.clone();
        own.extend(owned(fields));
        if touched || *own != before {
            entry["time"] = time.clone();
        }
    }
    let empty = |entry: &Value| entry["fieldsV1"].as_object().is_none_or(Map::is_empty);
    entries.retain(|entry| is_own(entry) || !empty(entry));
    object["metadata"]["managedFields"] = json!(entries);
    object
}

fn missing(name: &str) -> Refusal {
    (404, "NotFound", format!("{name} not found"))
}

fn stale(name: &str) -> Refusal {
    (409, "Conflict", format!("{name} has been modified"))
}

fn reply(code: u16, value: &Value) -> Answer {
    let body = Full::new(Bytes::from(value.to_string())).boxed_unsync();
    Response::builder().status(code).body(body).expect("valid")
}

fn refuse((code, reason, message): Refusal) -> Answer {
    let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure",
                         "code": code, "reason": reason, "message": message });
    reply(code, &status)
}

async fn read(request: Request<Body>) -> Call {
    let (head, body) = request.into_parts();
    let body = body.collect().await.expect("a body").to_bytes();
    let content_type = head.headers.get("content-type");
    let apply = content_type.is_some_and(|t| t.as_bytes().starts_with(b"application/apply-patch"));
    // /api/v1/namespaces/NS/KIND[/NAME] or /apis/GROUP/VERSION/namespaces/...
    let path = head.uri.path().to_owned();
    let (_, rest) = path.split_once("/namespaces/").expect("a namespaced path");
    let mut parts = rest.split('/').map(str::to_owned);
    let namespace = parts.next().expect("a namespace");
    let kind = parts.next().expect("a kind");
    let name = parts.next();
    let query = head.uri.query().unwrap_or_default();
    let decode = |text: &str| {
        text.replace("%3D", "=").replace("%2F", "/").replace("%3d", "=").replace("%2f", "/")
    };
    let query = query
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| (decode(key), decode(value)))
        .collect();
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Call { method: head.method, kind, namespace, name, query, body, apply }
}
