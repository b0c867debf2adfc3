//! Single calls to the API server, each bounded in time.

use k8s_openapi::api::core::v1::Endpoints;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client};
use serde_json::json;

use super::content::{NAME, NAMESPACE};
use super::observe::api;
use super::ownership::MANAGER;
use super::plan::Action;
use super::trouble::{Trouble, in_time};

/// The object after a write.
#[derive(Debug)]
pub(super) enum Written {
    Slice(Box<EndpointSlice>),
    Endpoints(Box<Endpoints>),
    Deleted(String),
}

impl Action {
    /// The kind of object, in metrics.
    pub(super) fn kind_label(&self) -> &'static str {
        match self {
            Self::Apply(_) | Self::Delete { .. } | Self::Empty { .. } => "endpointslice",
            Self::ApplyEndpoints(_) => "endpoints",
        }
    }
}

fn slices(client: &Client) -> Api<EndpointSlice> {
    api(client, NAMESPACE)
}

/// Server-side apply, by force: what others wrote into fields of ours goes, labels and
/// annotations that they added stay. Each object carries the version it was compared with, so
/// two replicas that add themselves at once cannot lose one another's address.
fn by_force() -> PatchParams {
    PatchParams::apply(MANAGER).force()
}

/// Takes the one action.
pub(super) async fn write(client: &Client, action: &Action) -> Result<Written, Trouble> {
    match action {
        Action::Apply(slice) => {
            let name = slice.metadata.name.as_deref().unwrap_or(NAME);
            let patch = Patch::Apply(slice);
            let written = in_time(slices(client).patch(name, &by_force(), &patch)).await?;
            Ok(Written::Slice(Box::new(written)))
        }
        Action::ApplyEndpoints(endpoints) => {
            let api = api::<Endpoints>(client, NAMESPACE);
            let written = in_time(api.patch(NAME, &by_force(), &Patch::Apply(endpoints))).await?;
            Ok(Written::Endpoints(Box::new(written)))
        }
        Action::Delete { name, uid, version } => {
            let seen = Preconditions { uid: uid.clone(), resource_version: version.clone() };
            let params = DeleteParams { preconditions: Some(seen), ..DeleteParams::default() };
            in_time(slices(client).delete(name, &params)).await?;
            Ok(Written::Deleted(name.clone()))
        }
        Action::Empty { name, version } => {
            let params =
                PatchParams { field_manager: Some(MANAGER.to_owned()), ..Default::default() };
            let patch = json!({ "metadata": { "resourceVersion": version }, "endpoints": [] });
            let written =
                in_time(slices(client).patch(name, &params, &Patch::Merge(patch))).await?;
            Ok(Written::Slice(Box::new(written)))
        }
    }
}

/// The slice as it is now; `None` if there is none.
pub(super) async fn slice(client: &Client, name: &str) -> Result<Option<EndpointSlice>, Trouble> {
    in_time(slices(client).get_opt(name)).await
}

/// The `Endpoints` as they are now.
pub(super) async fn endpoints(client: &Client) -> Result<Option<Endpoints>, Trouble> {
    in_time(api::<Endpoints>(client, NAMESPACE).get_opt(NAME)).await
}
