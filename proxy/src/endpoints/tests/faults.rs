//! An API server that misbehaves.

use std::io::Write;
use std::sync::{Arc, Mutex, Once};

use serde_json::json;
use tracing_subscriber::fmt::MakeWriter;

use super::fake::Effect;
use super::harness::*;

/// Log lines at warning level or above, of our own crate.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<u8>>>);

impl Write for Warnings {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("not poisoned").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Warnings {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        self.clone()
    }
}

impl Warnings {
    /// Collects from here on, for this thread.
    fn collect() -> (Self, tracing::subscriber::DefaultGuard) {
        // What a line was worth to the first thread that came by is kept for all, and that may have
        // had nobody who listens. One listens for ever, so that every line is worth something.
        static LISTENS: Once = Once::new();
        LISTENS.call_once(|| {
            tracing::subscriber::set_global_default(tracing_subscriber::registry())
                .expect("nobody else sets it");
        });
        let warnings = Self::default();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::WARN)
            .with_ansi(false)
            .with_writer(warnings.clone())
            .finish();
        (warnings, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().expect("not poisoned").clone()).expect("UTF-8");
        text.lines().filter(|line| line.contains("proxy::")).map(str::to_owned).collect()
    }
}

#[tokio::test(start_paused = true)]
async fn a_conflict_is_answered_with_a_fresh_look_and_another_try() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    foreign_slice(&fake, "tcp-proxy", "kubernetes", "IPv4", &["10.96.7.7"]);
    fake.fault(2, Effect::Refuse(409, "Conflict"), |call| call.verb() == "patch");
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    let verbs: Vec<_> = fake.calls().iter().map(super::fake::Call::verb).collect();
    assert!(verbs.windows(2).any(|pair| pair == ["patch", "get"]), "{verbs:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_again_and_again_is_tried_ever_less_often() {
    for (code, reason) in
        [(409, "Conflict"), (422, "Invalid"), (500, "InternalError"), (403, "Forbidden")]
    {
        let fake = cluster();
        ready_on(&fake, &[7]);
        fake.fault(usize::MAX, Effect::Refuse(code, reason), |call| {
            call.kind == "endpointslices" && call.verb() == "patch"
        });
        let (warnings, _guard) = Warnings::collect();
        let replica = Replica::start(&fake, config("10.0.0.7"));
        seconds(600).await;
        let tries = fake.writes().iter().filter(|call| call.kind == "endpointslices").count();
        assert!((5..150).contains(&tries), "{code}: {tries} tries in ten minutes");
        assert_eq!(warnings.lines().len(), 1, "{code}: {:?}", warnings.lines());
        assert_eq!(core_addresses(&fake), ["10.0.0.7"], "{code}: the Endpoints do not suffer");
        fake.no_more_faults();
        seconds(61).await;
        assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"], "{code}: not recovered");
        assert!(replica.passes("changed") > 0);
    }
}

#[tokio::test(start_paused = true)]
async fn while_ours_cannot_be_written_slices_in_its_way_stay() {
    for (code, reason) in [(403, "Forbidden"), (422, "Invalid"), (500, "InternalError")] {
        let fake = cluster();
        ready_on(&fake, &[7]);
        foreign_slice(&fake, "x", "kubernetes-abcde", "IPv4", &["192.0.2.10"]);
        fake.fault(usize::MAX, Effect::Refuse(code, reason), |call| {
            call.kind == "endpointslices" && call.verb() == "patch"
        });
        let _replica = Replica::start(&fake, config("10.0.0.7"));
        seconds(120).await;
        assert_eq!(addresses(&fake, "kubernetes-abcde"), ["192.0.2.10"], "{code}: the only one");
        fake.no_more_faults();
        seconds(61).await;
        assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"], "{code}: not recovered");
        assert!(slice(&fake, "kubernetes-abcde").is_none(), "{code}: still in the way");
    }
}

#[tokio::test(start_paused = true)]
async fn without_permission_for_endpoints_there_is_one_warning_and_all_else_goes_on() {
    let fake = cluster();
    as_steward_grants(&fake);
    ready_on(&fake, &[7]);
    let (warnings, _guard) = Warnings::collect();
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(3600).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    let asked = fake.calls().iter().filter(|call| call.kind == "endpoints").count();
    assert!((5..9).contains(&asked), "asked {asked} times in an hour");
    assert_eq!(warnings.lines().len(), 1, "{:?}", warnings.lines());
    assert!(warnings.lines()[0].contains("may not keep core Endpoints"), "{:?}", warnings.lines());

    fake.no_more_faults();
    seconds(700).await;
    assert_eq!(core_addresses(&fake), ["10.0.0.7"], "granted later, kept later");
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_may_be_read_but_not_written_are_left_in_peace() {
    let fake = cluster();
    forbid(&fake, "patch", "endpoints");
    ready_on(&fake, &[7]);
    let (warnings, _guard) = Warnings::collect();
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(3600).await;
    let tries = fake.writes().iter().filter(|call| call.kind == "endpoints").count();
    assert!((5..9).contains(&tries), "{tries} tries in an hour");
    assert_eq!(warnings.lines().len(), 1, "{:?}", warnings.lines());
}

#[tokio::test(start_paused = true)]
async fn with_everything_forbidden_it_waits_and_recovers() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    fake.fault(usize::MAX, Effect::Refuse(403, "Forbidden"), |_| true);
    let (warnings, _guard) = Warnings::collect();
    let replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(600).await;
    assert!(fake.calls().len() < 150, "{} calls in ten minutes", fake.calls().len());
    assert!(replica.passes("forbidden") > 0);
    assert_eq!(warnings.lines().len(), 4, "one for each watch: {:?}", warnings.lines());
    fake.no_more_faults();
    seconds(61).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
}

#[tokio::test(start_paused = true)]
async fn a_watch_whose_version_is_gone_begins_anew() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    fake.expire_watches();
    ready_on(&fake, &[7, 8]);
    fake.edit("kubectl", "endpointslices", "kubernetes", |s| s["ports"][0]["port"] = json!(1));
    seconds(5).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7", "10.0.0.8"]);
    assert_eq!(slice(&fake, "kubernetes").expect("there")["ports"][0]["port"], 6443);
}

#[tokio::test(start_paused = true)]
async fn a_watch_that_was_cut_off_is_taken_up_where_it_was() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    let lists = || fake.calls().iter().filter(|call| call.verb() == "list").count();
    let before = lists();
    for port in 1..4 {
        fake.cut_watches();
        fake.edit("kubectl", "endpointslices", "kubernetes", |s| {
            s["ports"][0]["port"] = json!(port)
        });
        seconds(1).await;
        assert_eq!(slice(&fake, "kubernetes").expect("there")["ports"][0]["port"], 6443);
    }
    assert_eq!(lists(), before, "nothing was listed again");
}

#[tokio::test(start_paused = true)]
async fn a_server_that_goes_away_for_a_while_is_found_again() {
    let fake = cluster();
    ready_on(&fake, &[7]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    fake.fault(usize::MAX, Effect::Refuse(503, "ServiceUnavailable"), |_| true);
    fake.cut_watches();
    ready_on(&fake, &[8]);
    seconds(300).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    fake.no_more_faults();
    seconds(61).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.8"]);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_hangs_is_given_up_and_repeated() {
    for verb in ["list", "watch", "get", "patch"] {
        let fake = cluster();
        ready_on(&fake, &[7]);
        fake.fault(3, Effect::Hang, move |call| call.verb() == verb);
        let _replica = Replica::start(&fake, config("10.0.0.7"));
        seconds(120).await;
        ready_on(&fake, &[7, 8]);
        // A watch that never begins is the slowest to be noticed.
        seconds(if verb == "watch" { 700 } else { 60 }).await;
        assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7", "10.0.0.8"], "{verb}");
        assert_eq!(core_addresses(&fake), ["10.0.0.7", "10.0.0.8"], "{verb}");
    }
}

#[tokio::test(start_paused = true)]
async fn unreadable_services_do_not_keep_it_from_working() {
    let fake = cluster();
    forbid(&fake, "*", "services");
    ready_on(&fake, &[7]);
    own_slice(&fake, "own-v6", "IPv6", &[own_endpoint("fd00::7", "n7", true)]);
    let _replica = Replica::start(&fake, config("10.0.0.7"));
    seconds(2).await;
    assert_eq!(addresses(&fake, "kubernetes"), ["10.0.0.7"]);
    assert_eq!(addresses(&fake, "kubernetes-v6"), ["fd00::7"], "what there is is published");
}
