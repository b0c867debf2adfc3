//! What to write, so that what is becomes what should be: a pure function.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use k8s_openapi::api::core::v1::Endpoints;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt;

use super::address::Family;
use super::content;
pub(super) use super::content::NAME;
use super::desired::{Desired, Published};
use super::ownership::{self, MANAGER};

/// What is kept right by one line of writes, and what another may keep undoing.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Subject {
    /// A slice of ours.
    Slice(String),
    /// The core `Endpoints`.
    Endpoints,
    /// Slices of another manager that lead clients elsewhere. Not by name: a controller whose
    /// slice was deleted makes one of another name.
    Foreign(String),
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slice(name) => write!(f, "EndpointSlice default/{name}"),
            Self::Endpoints => write!(f, "Endpoints default/{NAME}"),
            Self::Foreign(manager) => write!(f, "EndpointSlices of {manager}"),
        }
    }
}

/// One write.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    /// Create, or bring to this content. Carries the version it was compared with.
    Apply(Box<EndpointSlice>),
    /// The same for `Endpoints`.
    ApplyEndpoints(Box<Endpoints>),
    /// Delete this very slice.
    Delete { name: String, uid: Option<String>, version: Option<String> },
    /// Where deleting is forbidden: leave the slice without endpoints. Its label stays, for
    /// kube-proxy ignores an update that takes the label away and keeps the old endpoints.
    Empty { name: String, version: Option<String> },
}

/// One write and its reason.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Step {
    pub subject: Subject,
    pub action: Action,
    /// Stands for the content wanted.
    pub want: u64,
    /// Stands for the content found.
    pub found: u64,
    /// Who wrote what was found; empty if nothing was.
    pub by: String,
    /// What changes, for the log.
    pub changes: String,
}

/// Core `Endpoints` as far as they are our business.
#[derive(Debug, Clone, Copy)]
pub(super) enum Legacy<'a> {
    /// We may not read them, or do not know yet.
    OutOfReach,
    /// There are none.
    Absent,
    /// These.
    There(&'a Endpoints),
}

/// What is needed beside the desired state.
#[derive(Debug, Clone, Copy)]
pub(super) struct Found<'a> {
    /// Slices seen, those of other Services' label included that were fetched by name.
    pub slices: &'a BTreeMap<String, EndpointSlice>,
    /// Names known to be free; `None` to take all as free that no watch shows.
    pub free: Option<&'a BTreeSet<String>>,
    pub legacy: Legacy<'a>,
    pub may_delete: bool,
}

/// All that is to be done.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Plan {
    pub steps: Vec<Step>,
    /// What is right as it is, with its content.
    pub settled: Vec<(Subject, u64)>,
    /// The slices of ours, by family.
    pub names: Vec<(Family, Subject)>,
    /// Slices to be fetched first: a slice that lost its label is there, but no watch shows it.
    pub unseen: Vec<String>,
}

pub(super) fn plan(desired: &Desired, found: Found<'_>, port: u16) -> Plan {
    let mut plan = Plan::default();
    let mut ours = BTreeMap::new();
    for published in &desired.families {
        let name = choose_name(published.family, desired.primary, found);
        let slice = content::slice(&name, published, port);
        plan.keep_slice(&slice, found);
        plan.names.push((published.family, Subject::Slice(name.clone())));
        ours.insert(name, (published.family, slice));
    }
    if !plan.unseen.is_empty() {
        return Plan { unseen: plan.unseen, ..Plan::default() };
    }
    for (name, slice) in found.slices {
        let family = Family::parse(&slice.address_type);
        let ours_of_family = ours.iter().find(|(_, (own, _))| Some(*own) == family);
        let Some((own_name, (_, own))) = ours_of_family.filter(|_| !ours.contains_key(name)) else {
            continue;
        };
        // Ours first, and seen to be there: at no time is there no endpoint. The pass after the
        // one that writes ours finds it so.
        if plan.is_settled(own_name) {
            plan.clear_foreign(slice, own, found);
        }
    }
    if let Some(published) = desired.families.first().filter(|p| Some(p.family) == desired.primary)
    {
        plan.keep_endpoints(published, found, port);
    }
    plan
}

/// The name of the family's slice. A slice's address type is immutable: one of that name but the
/// wrong type is replaced, or if we may not delete it, avoided.
fn choose_name(family: Family, primary: Option<Family>, found: Found<'_>) -> String {
    let plain = (Some(family) == primary).then(|| NAME.to_owned());
    let second = format!("{NAME}-{}", family.suffix());
    let last = format!("{MANAGER}-{}", family.suffix());
    let fits = |name: &String| {
        let existing = found.slices.get(name);
        found.may_delete || existing.is_none_or(|s| s.address_type == family.address_type())
    };
    plain.into_iter().chain([second]).find(fits).unwrap_or(last)
}

impl Plan {
    fn keep_slice(&mut self, want: &EndpointSlice, found: Found<'_>) {
        let name = want.name_any();
        let subject = Subject::Slice(name.clone());
        let mut step = Step {
            subject,
            action: Action::Apply(Box::new(want.clone())),
            want: content::slice_fingerprint(want),
            found: content::absence(),
            by: String::new(),
            changes: "created".to_owned(),
        };
        let Some(existing) = found.slices.get(&name) else {
            if found.free.is_none_or(|free| free.contains(&name)) {
                self.steps.push(step);
            } else {
                self.unseen.push(name);
            }
            return;
        };
        let changes = content::slice_changes(want, existing);
        if changes.is_empty() {
            self.settled.push((step.subject, step.want));
            return;
        }
        step.found = content::slice_fingerprint(existing);
        step.by = ownership::last_writer(&existing.metadata);
        step.changes = changes.join("; ");
        if existing.address_type == want.address_type {
            let mut want = want.clone();
            want.metadata.resource_version = existing.resource_version();
            step.action = Action::Apply(Box::new(want));
        } else {
            self.steps.push(Step {
                action: delete(existing),
                changes: format!("deleted, for its address type {}", existing.address_type),
                ..step.clone()
            });
        }
        self.steps.push(step);
    }

    /// Whether our slice of this name is right as it is.
    fn is_settled(&self, name: &str) -> bool {
        let ours =
            |subject: &Subject| matches!(subject, Subject::Slice(settled) if settled == name);
        self.settled.iter().any(|(subject, _)| ours(subject))
    }

    fn clear_foreign(&mut self, slice: &EndpointSlice, own: &EndpointSlice, found: Found<'_>) {
        let manager = content::manager(slice);
        if !content::belongs(slice)
            || slice.metadata.deletion_timestamp.is_some()
            || !content::shadows(slice, own)
        {
            return;
        }
        let name = slice.name_any();
        let (action, verb) = if found.may_delete {
            (delete(slice), "deleted")
        } else {
            (Action::Empty { name, version: slice.resource_version() }, "emptied")
        };
        self.steps.push(Step {
            subject: Subject::Foreign(manager.clone()),
            action,
            want: content::absence(),
            found: content::slice_fingerprint(slice),
            by: manager,
            changes: format!("{verb} {}, which led clients elsewhere", slice.name_any()),
        });
    }

    fn keep_endpoints(&mut self, published: &Published, found: Found<'_>, port: u16) {
        let mut want = content::endpoints(published, port);
        let fingerprint = content::endpoints_fingerprint(&want);
        let (changes, before, by) = match found.legacy {
            Legacy::OutOfReach => return,
            Legacy::Absent => ("created".to_owned(), content::absence(), String::new()),
            Legacy::There(existing) => {
                let changes = content::endpoints_changes(&want, existing);
                if changes.is_empty() {
                    self.settled.push((Subject::Endpoints, fingerprint));
                    return;
                }
                want.metadata.resource_version = existing.resource_version();
                let by = ownership::last_writer(&existing.metadata);
                (changes.join("; "), content::endpoints_fingerprint(existing), by)
            }
        };
        self.steps.push(Step {
            subject: Subject::Endpoints,
            action: Action::ApplyEndpoints(Box::new(want)),
            want: fingerprint,
            found: before,
            by,
            changes,
        });
    }
}

fn delete(slice: &EndpointSlice) -> Action {
    Action::Delete { name: slice.name_any(), uid: slice.uid(), version: slice.resource_version() }
}
