//! Telling people in the cluster about a rival, by an Event on the Service `default/kubernetes`.

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::{Client, ResourceExt};

use super::content::{NAME, NAMESPACE};
use super::observe::api;
use super::ownership::MANAGER;
use super::pace::describe_rival;
use super::plan::Subject;
use super::trouble::{Trouble, in_time};

/// The Event about the subject. Its name is the same from every replica, so that there is one
/// Event and not one per node. Of the core group, which is the one that the add-on's role allows.
fn event(service: Option<&Service>, subject: &Subject, message: String) -> Event {
    let kind: String = subject
        .to_string()
        .to_lowercase()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
        .collect();
    let now = Some(Time(Timestamp::now()));
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{NAME}.{MANAGER}.{}", kind.trim_matches('-'))),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Service".to_owned()),
            name: Some(NAME.to_owned()),
            namespace: Some(NAMESPACE.to_owned()),
            uid: service.and_then(ResourceExt::uid),
            ..ObjectReference::default()
        },
        type_: Some("Warning".to_owned()),
        reason: Some("EndpointRival".to_owned()),
        message: Some(message),
        source: Some(EventSource { component: Some(MANAGER.to_owned()), host: None }),
        reporting_component: Some(MANAGER.to_owned()),
        first_timestamp: now.clone(),
        last_timestamp: now,
        count: Some(1),
        ..Event::default()
    }
}

/// What happened, what follows from it and, where we know, what to do about it.
fn message(subject: &Subject, by: &str, undone: usize) -> String {
    let rival = describe_rival(by);
    let advice = match by {
        "kube-apiserver" => " Start the API server with --endpoint-reconciler-type=none.",
        _ => "",
    };
    format!(
        "{rival} has undone {undone} writes of {subject} lately, so they are repeated only seldom \
         and clients may not reach the API server through this proxy.{advice}"
    )
}

/// Writes the Event; one of the same subject is brought up to date.
pub(super) async fn rival(
    client: &Client,
    service: Option<&Service>,
    subject: &Subject,
    by: &str,
    undone: usize,
) -> Result<(), Trouble> {
    let event = event(service, subject, message(subject, by, undone));
    let name = event.name_any();
    let params = PatchParams::apply(MANAGER).force();
    in_time(api::<Event>(client, NAMESPACE).patch(&name, &params, &Patch::Apply(&event)))
        .await
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_named_after_its_subject_alone() {
        let name = |subject| event(None, &subject, String::new()).name_any();
        assert_eq!(
            name(Subject::Slice("kubernetes-v6".into())),
            "kubernetes.steward-tcp-proxy.endpointslice-default-kubernetes-v6"
        );
        assert_eq!(
            name(Subject::Foreign("Some/Controller.io".into())),
            "kubernetes.steward-tcp-proxy.endpointslices-of-some-controller-io"
        );
    }
}
