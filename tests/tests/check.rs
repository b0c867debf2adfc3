//! Verb `check`: with every privilege all rows pass; with one gate closed the row names it; and
//! nothing stays in the kernel. Needs root.

use std::collections::BTreeSet;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use proxy_tests::capabilities::keep_capabilities;
use proxy_tests::facts::kernel;
use proxy_tests::proxy::binary;
use proxy_tests::seccomp::Call;
use proxy_tests::wait::patient;
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::CapabilitySet;
use serde_json::Value;

/// `check` gives up on its own after three minutes.
fn bound() -> Duration {
    patient(Duration::from_secs(200))
}

/// One `check` at a time, because one of the tests looks at what the kernel holds.
fn alone() -> MutexGuard<'static, ()> {
    static KERNEL: Mutex<()> = Mutex::new(());
    assert!(rustix::process::geteuid().is_root(), "this suite needs root: it loads programs");
    KERNEL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A finished `check --output json`.
struct Checked {
    output: Output,
    report: Value,
}

impl Checked {
    fn run(mut command: Command) -> Self {
        let begun = Instant::now();
        let output = command.args(["check", "--output", "json"]).output().expect("it starts");
        assert!(begun.elapsed() < bound(), "took {:?}", begun.elapsed());
        let report = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
            panic!("no JSON: {error}\n{}", String::from_utf8_lossy(&output.stderr))
        });
        Self { output, report }
    }

    fn status(&self) -> i32 {
        self.output.status.code().expect("not killed")
    }

    fn row(&self, gate: &str) -> &Value {
        let rows = self.report["rows"].as_array().expect("rows");
        rows.iter().find(|row| row["gate"] == gate).unwrap_or_else(|| panic!("{gate}: {rows:#?}"))
    }

    fn gates(&self, status: &str) -> Vec<&str> {
        let rows = self.report["rows"].as_array().expect("rows");
        rows.iter()
            .filter(|row| row["status"] == status)
            .map(|row| row["gate"].as_str().expect("a name"))
            .collect()
    }

    /// Fails, names the gate in its own row, and says there what to do.
    fn blames(&self, gate: &str, remedy: &str) {
        assert_eq!(self.status(), 1, "{:#}", self.report);
        assert_eq!(self.report["ok"], false);
        let row = self.row(gate);
        assert_eq!(row["status"], "failed", "{:#}", self.report);
        let text = row["remedy"].as_str().unwrap_or_default();
        assert!(text.contains(remedy), "{remedy:?} is not in {text:?}");
    }
}

/// `check` with these capabilities and no others.
fn with_capabilities(kept: CapabilitySet) -> Command {
    let mut command = Command::new(binary());
    keep_capabilities(&mut command, kept);
    command
}

/// `check` under a seccomp filter that answers EPERM to one system call.
fn without_call(number: libc::c_long) -> Command {
    let mut command = Command::new(binary());
    Call::new(number).refuse_to(&mut command);
    command
}

#[test]
fn root_passes_every_row_and_sees_both_handshakes() {
    let _alone = alone();
    let checked = Checked::run(Command::new(binary()));
    assert_eq!(checked.status(), 0, "{:#}", checked.report);
    assert_eq!(checked.report["ok"], true);
    let stages =
        ["ring buffer", "load program", "own namespace", "attach", "handshake", "packet relay"];
    for gate in stages {
        assert_eq!(checked.row(gate)["status"], "ok", "{:#}", checked.report);
    }
    for family in ["127.0.0.1:", "[::1]:"] {
        let segments = segments_of(&checked.report, family);
        if segments.is_empty() && family == "[::1]:" {
            assert!(!Path::new("/proc/net/if_inet6").exists(), "IPv6 is on, yet nothing was seen");
            continue;
        }
        judge(&segments);
    }
}

fn segments_of<'r>(report: &'r Value, family: &str) -> Vec<&'r Value> {
    let all = report["handshakes"].as_array().expect("handshakes");
    all.iter().filter(|s| s["source"].as_str().is_some_and(|a| a.starts_with(family))).collect()
}

/// Six segments between two ends, each at the right time and with the numbers it must carry.
fn judge(segments: &[&Value]) {
    let find = |step: &str, hook: &str| {
        let mut found = segments.iter().filter(|s| s["step"] == step && s["hook"] == hook);
        let first = *found.next().unwrap_or_else(|| panic!("{step} at {hook}: {segments:#?}"));
        assert!(found.next().is_none(), "{step} at {hook} twice: {segments:#?}");
        first
    };
    assert_eq!(segments.len(), 6, "{segments:#?}");
    let mut last = 0;
    for step in ["SYN", "SYN-ACK", "ACK"] {
        for hook in ["egress", "ingress"] {
            let time = find(step, hook)["time_ns"].as_u64().expect("a time");
            assert!(time >= last, "{step} at {hook} out of order: {segments:#?}");
            last = time;
        }
    }
    let (syn, answer, ack) =
        (find("SYN", "ingress"), find("SYN-ACK", "ingress"), find("ACK", "ingress"));
    assert_eq!((&syn["source"], &syn["destination"]), (&ack["source"], &ack["destination"]));
    assert_eq!((&syn["source"], &syn["destination"]), (&answer["destination"], &answer["source"]));
    let number = |segment: &Value, name: &str| segment[name].as_u64().expect("a number") as u32;
    let next = |segment: &Value| number(segment, "sequence").wrapping_add(1);
    assert_eq!(number(answer, "acknowledgement"), next(syn));
    assert_eq!(number(ack, "sequence"), next(syn));
    assert_eq!(number(ack, "acknowledgement"), next(answer));
    for segment in [syn, answer] {
        assert!(number(segment, "mss") >= 536, "{segment:#}");
        assert!(segment["window_scale"].is_number() && segment["timestamps"].is_array());
        assert_eq!(segment["sack_permitted"], true);
    }
    assert_eq!(answer["timestamps"][1], syn["timestamps"][0], "TSecr echoes TSval");
}

#[test]
fn the_table_has_a_row_per_gate_and_a_verdict() {
    let _alone = alone();
    let output = Command::new(binary()).arg("check").output().expect("it starts");
    let text = String::from_utf8(output.stdout).expect("text");
    for gate in ["kernel", "CAP_BPF", "seccomp", "BTF", "bpffs", "memlock", "attach", "handshake"] {
        assert!(text.lines().any(|line| line.starts_with(gate)), "{gate} in {text}");
    }
    assert!(text.ends_with("everything that the kernel engines need is there\n"), "{text}");
}

#[test]
fn verbose_shows_the_kernel_programs_own_messages() {
    let _alone = alone();
    let output = Command::new(binary()).args(["check", "--verbose"]).output().expect("it starts");
    let log = String::from_utf8(output.stderr).expect("text");
    assert!(output.status.success(), "{log}");
    let messages = log.lines().filter(|line| line.contains("steward_ebpf")).count();
    assert!(messages >= 6, "{messages} messages in {log}");
}

/// First kernel that does not charge what programs take to the limit of locked memory.
const WITHOUT_MEMLOCK: (u32, u32) = (5, 11);

/// What README and deploy/packet.yaml name.
fn documented() -> CapabilitySet {
    let old = match kernel() < WITHOUT_MEMLOCK {
        true => CapabilitySet::SYS_RESOURCE,
        false => CapabilitySet::empty(),
    };
    CapabilitySet::BPF
        | CapabilitySet::NET_ADMIN
        | CapabilitySet::NET_RAW
        | CapabilitySet::PERFMON
        | CapabilitySet::SYS_ADMIN
        | old
}

#[test]
fn the_documented_capabilities_are_enough() {
    let _alone = alone();
    let checked = Checked::run(with_capabilities(documented()));
    assert_eq!(checked.status(), 0, "{:#}", checked.report);
}

#[test]
fn without_a_limit_of_locked_memory_no_capability_is_needed_for_it() {
    let _alone = alone();
    if kernel() >= WITHOUT_MEMLOCK {
        eprintln!("not tested, this kernel has no such limit");
        return;
    }
    let mut command = with_capabilities(documented() - CapabilitySet::SYS_RESOURCE);
    // SAFETY: between fork and exec only system calls are made, and no memory is allocated.
    unsafe {
        command.pre_exec(|| {
            // The soft one, as container runtimes leave it, is the program's own to raise.
            let limit = Rlimit { current: Some(64 << 10), maximum: None };
            Ok(setrlimit(Resource::Memlock, limit)?)
        });
    }
    let checked = Checked::run(command);
    assert_eq!(checked.status(), 0, "{:#}", checked.report);
}

#[test]
fn a_missing_capability_is_named_with_the_way_to_add_it() {
    let _alone = alone();
    // SYS_ADMIN stands for these two, so that goes as well.
    let bpf = CapabilitySet::BPF | CapabilitySet::SYS_ADMIN;
    let perfmon = CapabilitySet::PERFMON | CapabilitySet::SYS_ADMIN;
    // Where SYS_ADMIN stands for NET_ADMIN at a map of sockets, one comes further without it.
    let without_net_admin = if kernel() < (6, 9) { "load program" } else { "attach" };
    let mut cases = vec![
        (bpf, "CAP_BPF", "add capability BPF", "ring buffer"),
        (perfmon, "CAP_PERFMON", "add capability PERFMON", "load program"),
        (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN", "add capability NET_ADMIN", without_net_admin),
        (CapabilitySet::NET_RAW, "CAP_NET_RAW", "add capability NET_RAW", "packet relay"),
        (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN", "add capability SYS_ADMIN", "own namespace"),
    ];
    if kernel() < WITHOUT_MEMLOCK {
        let raise = CapabilitySet::SYS_RESOURCE;
        cases.push((raise, "memlock", "add capability SYS_RESOURCE", "load program"));
    }
    for (dropped, gate, remedy, stage) in cases {
        let checked = Checked::run(with_capabilities(CapabilitySet::all() - dropped));
        checked.blames(gate, remedy);
        let row = checked.row(stage);
        assert_eq!(row["status"], "failed", "{:#}", checked.report);
        let detail = row["detail"].as_str().expect("words");
        assert!(detail.ends_with(&format!("closed gate: {gate}")), "{detail}");
    }
}

#[test]
fn an_ordinary_user_gets_a_table_instead_of_an_error() {
    let _alone = alone();
    // A copy that this user can reach, wherever the repository is.
    let folder = tempfile::tempdir().expect("a folder");
    let copy = folder.path().join("steward-tcp-proxy");
    std::fs::copy(binary(), &copy).expect("a copy");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(folder.path(), open).expect("a folder open to all");
    let mut command = Command::new(copy);
    command.uid(65532).gid(65532);
    let checked = Checked::run(command);
    checked.blames("CAP_BPF", "add capability BPF");
    checked.blames("CAP_NET_ADMIN", "add capability NET_ADMIN");
    assert_eq!(checked.row("attach")["status"], "not_tried");
    assert_eq!(checked.row("handshake")["status"], "not_tried");
}

#[test]
fn a_seccomp_profile_that_refuses_a_call_is_named() {
    let _alone = alone();
    let checked = Checked::run(without_call(libc::SYS_bpf));
    checked.blames("seccomp", "refuses bpf()");
    let failed = checked.gates("failed");
    assert_eq!(failed, ["seccomp", "ring buffer"], "the capabilities are all there");
    let checked = Checked::run(without_call(libc::SYS_unshare));
    checked.blames("seccomp", "refuses unshare()");
    assert_eq!(checked.row("load program")["status"], "ok");
    let checked = Checked::run(without_call(libc::SYS_membarrier));
    checked.blames("seccomp", "refuses membarrier()");
    assert_eq!(checked.gates("failed"), ["seccomp", "packet relay"]);
}

#[test]
fn nothing_stays_in_the_kernel() {
    let _alone = alone();
    let before = Held::now();
    let checked = Checked::run(Command::new(binary()));
    assert_eq!(checked.status(), 0, "{:#}", checked.report);
    // Programs and maps are freed after a grace period, so soon, not at once.
    let deadline = Instant::now() + bound();
    loop {
        let left = Held::now().without(&before);
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline, "still there: {left:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Ids of everything BPF in the kernel.
#[derive(Debug)]
struct Held {
    programs: BTreeSet<u32>,
    maps: BTreeSet<u32>,
    links: BTreeSet<u32>,
}

impl Held {
    fn now() -> Self {
        // Commands of bpf(2).
        const PROG_GET_NEXT_ID: libc::c_long = 11;
        const MAP_GET_NEXT_ID: libc::c_long = 12;
        const LINK_GET_NEXT_ID: libc::c_long = 31;
        Self {
            programs: ids(PROG_GET_NEXT_ID),
            maps: ids(MAP_GET_NEXT_ID),
            links: ids(LINK_GET_NEXT_ID),
        }
    }

    fn without(&self, other: &Self) -> Self {
        Self {
            programs: &self.programs - &other.programs,
            maps: &self.maps - &other.maps,
            links: &self.links - &other.links,
        }
    }

    fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.maps.is_empty() && self.links.is_empty()
    }
}

fn ids(command: libc::c_long) -> BTreeSet<u32> {
    let mut found = BTreeSet::new();
    // The beginning of union bpf_attr for these commands: start_id, next_id, open_flags.
    let mut attributes = [0u32; 3];
    loop {
        // SAFETY: the pointer and the size describe `attributes`; the call reads and writes it.
        let status = unsafe {
            libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(&attributes))
        };
        if status != 0 {
            return found;
        }
        found.insert(attributes[1]);
        attributes[0] = attributes[1];
    }
}
