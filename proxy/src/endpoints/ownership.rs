//! Who wrote an object, as its `managedFields` tell.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, ObjectMeta};

/// The name under which we write; also the value of the label managed-by, as the original has it.
pub(super) const MANAGER: &str = "steward-tcp-proxy";

/// Our own entry. The operation tells us from the original, which may go by the same name but
/// writes by plain updates.
fn is_ours(entry: &ManagedFieldsEntry) -> bool {
    entry.manager.as_deref() == Some(MANAGER) && entry.operation.as_deref() == Some("Apply")
}

fn owns(entry: &ManagedFieldsEntry, field: &str) -> bool {
    entry.fields_v1.as_ref().is_some_and(|fields| fields.0.get(field).is_some())
}

/// Whether we wrote the field (named as in `managedFields`: `f:endpoints`) and no other did since.
pub(super) fn is_ours_alone(meta: &ObjectMeta, field: &str) -> bool {
    let mut owners = meta.managed_fields.iter().flatten().filter(|entry| owns(entry, field));
    owners.next().is_some_and(is_ours) && owners.next().is_none()
}

/// Who wrote last, apart from us; ourselves if there is nobody else.
pub(super) fn last_writer(meta: &ObjectMeta) -> String {
    let others = meta.managed_fields.iter().flatten().filter(|entry| !is_ours(entry));
    let last = others.max_by_key(|entry| entry.time.as_ref().map(|time| time.0));
    last.and_then(|entry| entry.manager.clone()).unwrap_or_else(|| MANAGER.to_owned())
}
