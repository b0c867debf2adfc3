//! The loop: wait for news, compare, write what differs.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Endpoints;
use kube::runtime::watcher::Event;
use kube::{Client, ResourceExt};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::Asked;
use super::address::Family;
use super::content;
use super::desired::{Desired, Known, asked, desired};
use super::observe::{Health, News, Observed, SELDOM, Seen, watches};
use super::outcome::{Outcome, Progress, Round};
use super::pace::{Pace, Verdict, describe_rival};
use super::plan::{Action, Found, Legacy, Plan, Step, Subject, plan};
use super::report;
use super::trouble::Trouble;
use super::write::{self, Written};
use crate::config::{EndpointConfig, EndpointMode};
use crate::metrics::Metrics;

/// News that come together are taken together.
const GATHER: Duration = Duration::from_millis(20);

/// While we may not publish our own address yet, how often to ask again.
const LEAVE_POLL: Duration = Duration::from_secs(1);

/// Replicas that are not the first of the list let the first one write, at least and at most so
/// long; if it does, there is nothing left to do for a thousand others.
const COURTESY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(500));

/// Looks at fresh objects and tries again so often before a pause.
const TRIES: usize = 5;

/// Whether this process serves clients now, so that its address may be published.
pub(super) trait Leave {
    fn granted(&self) -> impl Future<Output = bool> + Send;
}

/// All the state of the loop.
pub(super) struct Reconciler<L> {
    config: EndpointConfig,
    leave: L,
    metrics: Arc<Metrics>,
    client: Client,
    asked: Asked,
    observed: Observed,
    known: Known,
    pace: Pace,
    /// Let other replicas go first until then.
    courtesy: Option<Instant>,
    no_delete_until: Option<Instant>,
    no_endpoints_until: Option<Instant>,
    /// The word about missing permission for `Endpoints` has been said.
    said_no_endpoints: bool,
    next_full: Instant,
    /// An address waits for us to be ready.
    waits: bool,
    /// What [`Leave`] said last.
    granted: bool,
    /// The last pass found nothing to publish, and that was said.
    said_waiting: bool,
    /// Endpoints beyond what a slice may hold, as last said.
    said_left_out: usize,
}

impl<L: Leave> Reconciler<L> {
    pub(super) fn new(
        config: EndpointConfig,
        leave: L,
        metrics: Arc<Metrics>,
        client: Client,
        asked: Asked,
    ) -> Self {
        Self {
            config,
            leave,
            metrics,
            client,
            asked,
            observed: Observed::default(),
            known: Known::new(),
            pace: Pace::default(),
            courtesy: None,
            no_delete_until: None,
            no_endpoints_until: None,
            said_no_endpoints: false,
            next_full: Instant::now(),
            waits: false,
            granted: false,
            said_waiting: false,
            said_left_out: 0,
        }
    }

    /// Never ends.
    pub(super) async fn run(mut self) {
        let mut news = watches(&self.client, &self.config);
        loop {
            tokio::select! {
                Some(seen) = news.next() => {
                    self.take(seen);
                    tokio::time::sleep(GATHER).await;
                    while let Some(Some(seen)) = news.next().now_or_never() {
                        self.take(seen);
                    }
                }
                () = tokio::time::sleep_until(self.wake_at()) => {}
            }
            let now = Instant::now();
            if now >= self.next_full {
                let jitter = 0.9 + 0.2 * fastrand::f64();
                self.next_full = now + self.config.reconcile_interval.mul_f64(jitter);
            }
            if self.observed.suffices(self.config.mode) {
                let outcome = self.pass().await;
                self.metrics.reconciles.with_label_values(&[outcome.as_label()]).inc();
                self.explain(outcome);
            }
        }
    }

    fn wake_at(&self) -> Instant {
        let now = Instant::now();
        let leave = self.waits.then(|| now + LEAVE_POLL);
        let times = [self.courtesy, self.pace.next_change(now), leave];
        times.into_iter().flatten().fold(self.next_full.max(now), Instant::min)
    }

    /// Says once why nothing is published.
    fn explain(&mut self, outcome: Outcome) {
        let waiting = outcome == Outcome::Waiting;
        if waiting && !std::mem::replace(&mut self.said_waiting, waiting) {
            let why = match (self.waits, self.config.pod_ip) {
                (true, _) => "this process is not ready to serve yet",
                (false, _) if self.config.mode == EndpointMode::ClusterIp => {
                    "our Service has no ClusterIP"
                }
                (false, None) => "our Service has no ready endpoint, and POD_IP is not set",
                (false, Some(_)) => "neither our Service nor POD_IP has an address to publish",
            };
            info!(service = self.config.service_name, "nothing is published yet: {why}");
        }
        self.said_waiting = waiting;
    }

    fn take(&mut self, seen: Seen) {
        let observed = &mut self.observed;
        let ours = matches!(&seen, Seen::Slice(Ok(Event::Apply(_) | Event::Delete(_))));
        let is_service = matches!(&seen, Seen::Service(Ok(_)));
        let (what, health) = match seen {
            Seen::Service(news) => ("the Service default/kubernetes", observed.service.take(news)),
            Seen::Slice(news) => {
                ("EndpointSlices of default/kubernetes", observed.slices.take(news))
            }
            Seen::OwnService(news) => ("our own Service", observed.own_service.take(news)),
            Seen::OwnSlice(news) => {
                ("EndpointSlices of our own Service", observed.own_slices.take(news))
            }
            Seen::Endpoints(news) => return self.take_endpoints(news),
        };
        match health {
            Health::Same => {}
            Health::Failed(trouble) => {
                self.metrics.reconciles.with_label_values(&[trouble.as_label()]).inc();
                warn!(error = %trouble, "cannot watch {what}; trying again quietly");
            }
            Health::Recovered => info!("watching {what} again"),
        }
        if is_service {
            asked(self.observed.view(&self.config)).for_each(&self.asked);
        }
        if ours {
            self.notice();
        }
    }

    fn take_endpoints(&mut self, news: News<Endpoints>) {
        let ours = matches!(&news, Ok(Event::Apply(_) | Event::Delete(_)));
        match self.observed.endpoints.take(news) {
            Health::Failed(trouble @ Trouble::Forbidden(_)) => self.no_endpoints(&trouble),
            Health::Failed(trouble) => debug!(error = %trouble, "cannot watch core Endpoints"),
            Health::Recovered if self.said_no_endpoints => {
                self.said_no_endpoints = false;
                info!("core Endpoints default/kubernetes may be kept now");
            }
            Health::Recovered | Health::Same => {}
        }
        if ours {
            self.notice();
        }
    }

    /// Without that permission all else goes on; the original's role does not give it.
    fn no_endpoints(&mut self, trouble: &Trouble) {
        self.no_endpoints_until = Some(Instant::now() + SELDOM);
        if !std::mem::replace(&mut self.said_no_endpoints, true) {
            warn!(
                error = %trouble,
                "may not keep core Endpoints default/kubernetes, only its EndpointSlices; \
                 conformance wants both. It takes get, list, watch, create and patch of endpoints"
            );
        }
    }

    /// Compares and writes, again with fresh objects where ours were stale.
    async fn pass(&mut self) -> Outcome {
        let mut changed = false;
        let mut stale = None;
        for attempt in 0..TRIES {
            if attempt > 0 {
                // Replicas that collided come back apart from one another.
                tokio::time::sleep(Duration::from_millis(fastrand::u64(5..50))).await;
            }
            let desired = self.desire().await;
            let plan = match self.plan(&desired).await {
                Ok(plan) => plan,
                Err(trouble) => return Outcome::Failed(trouble.as_label()),
            };
            self.note_right(&desired, &plan);
            if plan.steps.is_empty() {
                self.courtesy = None;
                let waiting = desired.families.is_empty();
                return match changed {
                    true => Outcome::Changed,
                    false if waiting => Outcome::Waiting,
                    false => Outcome::Unchanged,
                };
            }
            let steps = self.judge(plan.steps).await;
            if steps.is_empty() {
                let rival = self.pace.has_rival();
                return if rival { Outcome::Rival } else { Outcome::Deferred };
            }
            if attempt == 0 && self.lets_others_go_first(&desired) {
                return Outcome::Deferred;
            }
            match self.take_steps(steps).await {
                // Once more, which finds nothing left to do or what else differs.
                Round::Wrote => changed = true,
                Round::Stale(subject, trouble) => stale = Some((subject, trouble)),
                Round::Over(outcome) => return outcome,
            }
        }
        // Five times in a row somebody was quicker, or what we write is not taken.
        if let Some((subject, trouble)) = stale {
            self.failed(&subject, "write", &trouble);
            return Outcome::Failed(trouble.as_label());
        }
        Outcome::Changed
    }

    async fn desire(&mut self) -> Desired {
        self.granted = self.would_publish(false).waits && self.leave.granted().await;
        let wanted = self.would_publish(self.granted);
        self.waits = wanted.waits;
        if std::mem::replace(&mut self.said_left_out, wanted.left_out) != wanted.left_out {
            warn!(left_out = wanted.left_out, "more endpoints than one EndpointSlice may hold");
        }
        wanted
    }

    fn would_publish(&self, granted: bool) -> Desired {
        desired(&self.config, self.observed.view(&self.config), &self.known, granted)
    }

    /// Sees undone writes and their repair one by one, as they are told: by the time of a pass
    /// another replica may have repaired what was undone, and each must count the same.
    fn notice(&mut self) {
        if !self.observed.suffices(self.config.mode) {
            return;
        }
        let desired = self.would_publish(self.granted);
        let found = Found {
            slices: self.observed.slices.objects(),
            // What is not seen counts as not there.
            free: None,
            legacy: self.observed.legacy(),
            may_delete: self.no_delete_until.is_none_or(|until| until <= Instant::now()),
        };
        let plan = plan(&desired, found, self.config.service_port);
        self.note_right(&desired, &plan);
        for step in &plan.steps {
            self.pace.notice(step, Instant::now());
        }
    }

    async fn plan(&mut self, desired: &Desired) -> Result<Plan, Trouble> {
        let now = Instant::now();
        let passed = |until: Option<Instant>| until.is_none_or(|until| until <= now);
        let mut free = BTreeSet::new();
        loop {
            let found = Found {
                slices: self.observed.slices.objects(),
                free: Some(&free),
                legacy: match passed(self.no_endpoints_until) {
                    true => self.observed.legacy(),
                    false => Legacy::OutOfReach,
                },
                may_delete: passed(self.no_delete_until),
            };
            let plan = plan(desired, found, self.config.service_port);
            if plan.unseen.is_empty() {
                return Ok(plan);
            }
            for name in plan.unseen {
                match write::slice(&self.client, &name).await {
                    Ok(Some(slice)) => self.observed.slices.put(slice),
                    Ok(None) => drop(free.insert(name)),
                    Err(trouble) => {
                        self.failed(&Subject::Slice(name), "read", &trouble);
                        return Err(trouble);
                    }
                }
            }
        }
    }

    /// Remembers what is in place, and sees quarrels end.
    fn note_right(&mut self, desired: &Desired, plan: &Plan) {
        let now = Instant::now();
        let mut right = plan.settled.clone();
        let in_the_way = |subject: &Subject| plan.steps.iter().any(|step| step.subject == *subject);
        let cleared = self.pace.foreign().filter(|subject| !in_the_way(subject));
        right.extend(cleared.map(|subject| (subject.clone(), content::absence())));
        for (subject, content) in &right {
            if let Some(rival) = self.pace.right(subject, *content, now) {
                info!(%rival, "{subject} is no longer undone");
            }
        }
        self.metrics.endpoint_rival.set(i64::from(self.pace.has_rival()));
        for family in Family::ALL {
            let name = plan.names.iter().find(|(of, _)| *of == family).map(|(_, name)| name);
            let in_place = right.iter().any(|(subject, _)| Some(subject) == name);
            let published = desired.families.iter().find(|published| published.family == family);
            let entries = published.filter(|_| in_place).map(|published| &published.entries);
            if let Some(entries) = entries {
                self.known.insert(family, entries.clone());
            }
            let count = entries.map_or(0, Vec::len);
            let gauge = self.metrics.endpoint_addresses.with_label_values(&[family.as_label()]);
            gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// True while another replica, the first by address, should do what is to be done.
    fn lets_others_go_first(&mut self, desired: &Desired) -> bool {
        let Some(first) = desired.families.first() else { return false };
        let own = self.config.pod_ip;
        let leads = match self.config.mode {
            EndpointMode::Mirror if first.provisional => first.entries.len() == 1,
            EndpointMode::Mirror => first.entries.first().map(|entry| entry.ip) == own,
            EndpointMode::ClusterIp | EndpointMode::Off => false,
        };
        let now = Instant::now();
        let (least, most) = COURTESY;
        let until = *self
            .courtesy
            .get_or_insert_with(|| now + least + (most - least).mul_f64(fastrand::f64()));
        if leads || until <= now {
            self.courtesy = None;
        }
        self.courtesy.is_some()
    }

    /// The steps that may be taken now.
    async fn judge(&mut self, steps: Vec<Step>) -> Vec<Step> {
        let now = Instant::now();
        let mut go = Vec::new();
        for step in steps {
            match self.pace.judge(&step, now) {
                Verdict::Go => go.push(step),
                Verdict::Later => {}
                Verdict::Rival { by, undone } => self.announce(&step, &by, undone).await,
            }
        }
        go
    }

    async fn take_steps(&mut self, steps: Vec<Step>) -> Round {
        let mut failed: Option<(Subject, &'static str)> = None;
        for step in steps {
            // A slice that could not be deleted is in the way of its successor.
            if failed.as_ref().is_some_and(|(subject, _)| *subject == step.subject) {
                continue;
            }
            match self.take_step(&step).await {
                Progress::Done => {}
                Progress::Stale(trouble) => return Round::Stale(step.subject, trouble),
                Progress::Failed(why) => failed = Some((step.subject, why)),
            }
        }
        failed.map_or(Round::Wrote, |(_, why)| Round::Over(Outcome::Failed(why)))
    }

    async fn take_step(&mut self, step: &Step) -> Progress {
        let result = write::write(&self.client, &step.action).await;
        let label = result.as_ref().err().map_or("ok", Trouble::as_label);
        self.metrics.endpoint_writes.with_label_values(&[step.action.kind_label(), label]).inc();
        match result {
            Ok(written) => {
                match written {
                    Written::Slice(slice) => self.observed.slices.put(*slice),
                    Written::Endpoints(endpoints) => self.observed.endpoints.put(*endpoints),
                    Written::Deleted(name) => self.observed.slices.remove(&name),
                }
                info!(by = step.by, "{}: {}", step.subject, step.changes);
                Progress::Done
            }
            Err(trouble @ Trouble::Forbidden(_)) => self.refused(step, &trouble),
            Err(trouble) if trouble.is_stale_view() => match self.look_again(&step.action).await {
                Ok(()) => Progress::Stale(trouble),
                Err(trouble) => self.failed(&step.subject, "read", &trouble),
            },
            Err(trouble) => self.failed(&step.subject, "write", &trouble),
        }
    }

    /// Some permissions we can do without.
    fn refused(&mut self, step: &Step, trouble: &Trouble) -> Progress {
        match step.action {
            Action::Delete { .. } => {
                self.no_delete_until = Some(Instant::now() + SELDOM);
                debug!(error = %trouble, "may not delete EndpointSlices; foreign ones are emptied");
                Progress::Stale(trouble.clone())
            }
            Action::ApplyEndpoints(_) => {
                self.no_endpoints(trouble);
                Progress::Done
            }
            Action::Apply(_) | Action::Empty { .. } => self.failed(&step.subject, "write", trouble),
        }
    }

    /// Fetches the object of the action as it is now.
    async fn look_again(&mut self, action: &Action) -> Result<(), Trouble> {
        let name = match action {
            Action::Apply(slice) => slice.name_any(),
            Action::Delete { name, .. } | Action::Empty { name, .. } => name.clone(),
            Action::ApplyEndpoints(_) => {
                match write::endpoints(&self.client).await? {
                    Some(endpoints) => self.observed.endpoints.put(endpoints),
                    None => self.observed.endpoints.remove(content::NAME),
                }
                return Ok(());
            }
        };
        match write::slice(&self.client, &name).await? {
            Some(slice) => self.observed.slices.put(slice),
            None => self.observed.slices.remove(&name),
        }
        Ok(())
    }

    fn failed(&mut self, subject: &Subject, what: &str, trouble: &Trouble) -> Progress {
        if self.pace.failed(subject, Instant::now()) {
            warn!(error = %trouble, "cannot {what} {subject}; trying again quietly");
        } else {
            debug!(error = %trouble, "still cannot {what} {subject}");
        }
        Progress::Failed(trouble.as_label())
    }

    /// Says once, in the log and to the cluster, that another writer undoes ours.
    async fn announce(&mut self, step: &Step, by: &str, undone: usize) {
        let subject = &step.subject;
        let rival = describe_rival(by);
        self.metrics.endpoint_rival.set(1);
        warn!(%rival, undone, "{subject} keeps being undone; from now on trying only seldom");
        let service = self.observed.service.objects().get(content::NAME);
        if let Err(trouble) = report::rival(&self.client, service, subject, by, undone).await {
            debug!(error = %trouble, "cannot write the Event");
        }
    }
}
