//! The trial: the real kernel programs, loaded, attached and shown a handshake.

use std::error::Error;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{MapData, MapError, MapType, RingBuf};
use aya::programs::tc::{self, NlOptions, TcAttachOptions, TcError};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::sys::SyscallError;
use aya::{Ebpf, EbpfError, EbpfLoader};
use proxy_common::{
    HOOK_EGRESS, HOOK_INGRESS, Handshake, STEP_ACK, STEP_SYN, STEP_SYN_ACK, WATCH_LOCAL, names,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{loopback, show};
use crate::packet::object::{OBJECT, Watched};
use crate::packet::selftest::{self, Verdict};

/// The whole trial takes about a second; after this long it is given up.
const PATIENCE: Duration = selftest::LONGEST.saturating_add(Duration::from_secs(30));

/// How long to wait for events of handshakes that are over.
const EVENTS_WITHIN: Duration = Duration::from_secs(2);

/// What is tried, in this order; each needs all those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    RingBuffer,
    Load,
    Namespace,
    Attach,
    Handshake,
    Relay,
}

impl Stage {
    pub(super) const ALL: [Self; 6] =
        [Self::RingBuffer, Self::Load, Self::Namespace, Self::Attach, Self::Handshake, Self::Relay];

    /// The name of its row.
    pub(super) fn as_label(self) -> &'static str {
        match self {
            Self::RingBuffer => "ring buffer",
            Self::Load => "load program",
            Self::Namespace => "own namespace",
            Self::Attach => "attach",
            Self::Handshake => "handshake",
            Self::Relay => "packet relay",
        }
    }

    /// The system call that decides it.
    pub(super) fn call(self) -> &'static str {
        match self {
            Self::Namespace => "unshare",
            Self::Relay => "membarrier",
            Self::RingBuffer | Self::Load | Self::Attach | Self::Handshake => "bpf",
        }
    }

    /// What to do when nothing but the kernel itself can be at fault.
    pub(super) fn kernel_remedy(self) -> String {
        let option = match self {
            Self::RingBuffer | Self::Load => "CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_ACT",
            Self::Namespace => "CONFIG_NET_NS",
            Self::Attach => "CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF (or 6.6 for TCX)",
            Self::Handshake => "CONFIG_NET_CLS_ACT",
            Self::Relay => "CONFIG_CHECKPOINT_RESTORE, CONFIG_MEMBARRIER and CONFIG_VETH",
        };
        format!("use a kernel from 5.10 on, built with {option}; or engine splice")
    }
}

/// A stage's outcome: what to say about it, or why it failed.
pub(super) type Finding = Result<String, Failure>;

/// Why a stage failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum Failure {
    #[error("{0}")]
    Refused(#[source] Chain),
    #[error("{call}: {error}")]
    Call { call: &'static str, error: Chain },
    #[error("this kernel has no {0}")]
    Unsupported(&'static str),
    #[error("the object lacks {0}, so it is another version's")]
    Lacking(&'static str),
    #[error("not seen: {0}")]
    Unseen(String),
    #[error("seen, but wrong: {0}")]
    Wrong(String),
    #[error("no answer within {} s", PATIENCE.as_secs())]
    Hung,
}

/// An error with all its causes in one line.
#[derive(Debug)]
pub(super) struct Chain {
    text: String,
    errno: Option<i32>,
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Chain {}

impl Chain {
    fn of(error: &(dyn Error + 'static)) -> Self {
        let mut text = String::new();
        let mut errno = None;
        let mut cause = Some(error);
        while let Some(error) = cause {
            let words = error.to_string();
            // Some errors repeat their cause in their own words.
            if !text.contains(&words) {
                text.push_str(if text.is_empty() { "" } else { ": " });
                text.push_str(&words);
            }
            errno = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error).or(errno);
            cause = error.source();
        }
        Self { text: show::last_lines(&text), errno }
    }
}

macro_rules! failure_from {
    ($($error:ty),*) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Self {
                Self::Refused(Chain::of(&error))
            }
        })*
    };
}

failure_from!(io::Error, EbpfError, MapError, ProgramError, SyscallError, TcError);

impl Failure {
    /// The same, naming the call that failed.
    pub(super) fn during(self, call: &'static str) -> Self {
        match self {
            Self::Refused(error) => Self::Call { call, error },
            other => other,
        }
    }

    /// The kernel's error number, if it was the kernel that refused.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused(error) | Self::Call { error, .. } => error.errno,
            _ => None,
        }
    }
}

/// All that the trial found.
#[derive(Debug, Default)]
pub(super) struct Findings {
    pub(super) stages: Vec<(Stage, Finding)>,
    pub(super) segments: Vec<Handshake>,
}

enum News {
    Stage(Stage, Finding),
    Segments(Vec<Handshake>),
}

/// Runs the trial in a thread of its own, whose namespace changes, and never longer than
/// [`PATIENCE`].
pub(super) fn run(verbose: bool) -> Findings {
    let (sender, receiver) = mpsc::channel();
    // Not joined: a thread that hangs in the kernel ends with the process.
    thread::spawn(move || Trial { sender, verbose }.run());
    let deadline = Instant::now() + PATIENCE;
    let mut findings = Findings::default();
    loop {
        match receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(News::Stage(stage, finding)) => findings.stages.push((stage, finding)),
            Ok(News::Segments(segments)) => findings.segments = segments,
            Err(RecvTimeoutError::Disconnected) => return findings,
            Err(RecvTimeoutError::Timeout) => {
                if let Some(stage) = Stage::ALL.get(findings.stages.len()) {
                    findings.stages.push((*stage, Err(Failure::Hung)));
                }
                return findings;
            }
        }
    }
}

struct Trial {
    sender: Sender<News>,
    verbose: bool,
}

impl Trial {
    /// Does one stage after the other until one fails. The object, and with it everything that it
    /// holds in the kernel, lives exactly as long as this function.
    fn run(&self) -> Option<()> {
        self.stage(Stage::RingBuffer, ring_buffer)?;
        let mut ebpf = None;
        self.stage(Stage::Load, || {
            let (loaded, detail) = load(self.verbose)?;
            ebpf = Some(loaded);
            Ok(detail)
        })?;
        let mut ebpf = ebpf?;
        self.stage(Stage::Namespace, namespace)?;
        self.stage(Stage::Attach, || attach(&mut ebpf))?;
        let mut logger = self.verbose.then(|| aya_log::EbpfLogger::init(&mut ebpf).ok()).flatten();
        let handshakes = self.stage(Stage::Handshake, || {
            let (segments, outcome) = handshakes(&mut ebpf);
            let _ = self.sender.send(News::Segments(segments));
            outcome
        });
        if let Some(logger) = &mut logger {
            logger.flush();
        }
        handshakes?;
        self.stage(Stage::Relay, relay)
    }

    fn stage(&self, stage: Stage, work: impl FnOnce() -> Finding) -> Option<()> {
        let finding = work();
        let outcome = finding.is_ok().then_some(());
        let _ = self.sender.send(News::Stage(stage, finding));
        outcome
    }
}

fn ring_buffer() -> Finding {
    match aya::sys::is_map_supported(MapType::RingBuf)? {
        true => Ok("can be created".to_owned()),
        false => Err(Failure::Unsupported("BPF ring buffer")),
    }
}

/// Loads the object's maps and both programs.
fn load(verbose: bool) -> Result<(Ebpf, String), Failure> {
    // The level is a constant of the object: below it, the verifier removes the messages' code.
    let level: u8 = if verbose { aya_log::Level::Debug as u8 } else { 0 };
    let mut ebpf = EbpfLoader::new()
        .override_global(aya_log::LEVEL, &level, true)
        .override_global(names::REPORT, &1u8, true)
        .load(OBJECT)?;
    let begun = Instant::now();
    let mut steps = 0;
    for name in [names::PACKET_INGRESS, names::PACKET_EGRESS] {
        let program = program(&mut ebpf, name)?;
        program.load()?;
        // Known from 5.16 on.
        steps += program.info()?.verified_instruction_count().unwrap_or(0);
    }
    let took = begun.elapsed().as_millis();
    let steps = if steps > 0 { format!(" and {steps} steps") } else { String::new() };
    Ok((ebpf, format!("both programs passed the verifier in {took} ms{steps}")))
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &'static str) -> Result<&'e mut SchedClassifier, Failure> {
    let program = ebpf.program_mut(name).ok_or(Failure::Lacking(name))?;
    Ok(program.try_into()?)
}

fn namespace() -> Finding {
    loopback::enter().map_err(|error| Failure::from(error).during("unshare"))?;
    Ok("made; it ends with this program".to_owned())
}

/// TCX where the kernel has it (6.6), else a filter on a clsact qdisc.
fn attach(ebpf: &mut Ebpf) -> Finding {
    loopback::bring_up().map_err(|error| Failure::from(error).during("rtnetlink"))?;
    let hooks = [
        (names::PACKET_INGRESS, TcAttachType::Ingress),
        (names::PACKET_EGRESS, TcAttachType::Egress),
    ];
    let tcx = hooks.iter().try_for_each(|&(name, hook)| {
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        program(ebpf, name)?.attach_with_options(loopback::DEVICE, hook, options)?;
        Ok::<(), Failure>(())
    });
    if tcx.is_ok() {
        return Ok("by TCX".to_owned());
    }
    tc::qdisc_add_clsact(loopback::DEVICE)?;
    for (name, hook) in hooks {
        let options = TcAttachOptions::Netlink(NlOptions::default());
        program(ebpf, name)?.attach_with_options(loopback::DEVICE, hook, options)?;
    }
    Ok("to a clsact qdisc; this kernel has no TCX".to_owned())
}

/// The whole engine, as it tests itself before each start.
fn relay() -> Finding {
    match selftest::run() {
        Verdict::Passed(detail) => Ok(detail),
        Verdict::NotTried(error) => Err(error.into()),
        Verdict::Failed(error) => Err(Failure::Refused(Chain::of(error.as_ref()))),
    }
}

/// One connection per family, over the watched loopback device.
fn handshakes(ebpf: &mut Ebpf) -> (Vec<Handshake>, Finding) {
    let mut segments = Vec::new();
    let mut families = Vec::new();
    let mut watched = match Watched::take(ebpf) {
        Ok(watched) => watched,
        Err(error) => return (segments, Err(Failure::Refused(Chain::of(error.as_ref())))),
    };
    for ip in [IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST)] {
        let Ok(listener) = loopback::listen(ip) else {
            // A kernel without IPv6 is no fault of ours; without IPv4 the check below fails.
            continue;
        };
        if let Err(failure) = handshake(ebpf, &mut watched, &listener, &mut segments) {
            return (segments, Err(failure));
        }
        families.push(if ip.is_ipv4() { "IPv4" } else { "IPv6" });
    }
    if families.is_empty() {
        return (segments, Err(Failure::Unseen("a loopback address to listen on".to_owned())));
    }
    let detail = format!("SYN, SYN-ACK and ACK seen at both hooks ({})", families.join(", "));
    (segments, Ok(detail))
}

fn handshake(
    ebpf: &mut Ebpf,
    watched: &mut Watched,
    listener: &TcpListener,
    segments: &mut Vec<Handshake>,
) -> Result<(), Failure> {
    let server = listener.local_addr()?;
    watched.add(server, WATCH_LOCAL)?;
    let stream = loopback::connect(server).map_err(|e| Failure::from(e).during("connect"))?;
    let client = stream.local_addr()?;
    let map = ebpf.map_mut(names::HANDSHAKES).ok_or(Failure::Lacking(names::HANDSHAKES))?;
    let mut events = RingBuf::try_from(map)?;
    let mut seen = Vec::new();
    let deadline = Instant::now() + EVENTS_WITHIN;
    while seen.len() < WANTED.len() && wait_readable(&events, deadline)? {
        while let Some(record) = events.next() {
            seen.extend(Handshake::from_record(&record));
        }
    }
    let verdict = judge(&seen, client, server);
    segments.extend(seen);
    verdict
}

/// False once the deadline has passed.
fn wait_readable(events: &RingBuf<&mut MapData>, deadline: Instant) -> io::Result<bool> {
    let left = deadline.saturating_duration_since(Instant::now());
    let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
    let ready = poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&left))?;
    Ok(ready > 0)
}

/// Over loopback each segment leaves and arrives.
const WANTED: [(u8, u8); 6] = [
    (STEP_SYN, HOOK_EGRESS),
    (STEP_SYN, HOOK_INGRESS),
    (STEP_SYN_ACK, HOOK_EGRESS),
    (STEP_SYN_ACK, HOOK_INGRESS),
    (STEP_ACK, HOOK_EGRESS),
    (STEP_ACK, HOOK_INGRESS),
];

/// Everything was seen, between the right ends, with numbers that continue one another.
fn judge(seen: &[Handshake], client: SocketAddr, server: SocketAddr) -> Result<(), Failure> {
    let find = |step, hook| seen.iter().find(|event| event.step == step && event.hook == hook);
    let missing: Vec<String> = WANTED
        .iter()
        .filter(|(step, hook)| find(*step, *hook).is_none())
        .map(|(step, hook)| format!("{} at {}", show::step(*step), show::hook(*hook)))
        .collect();
    if !missing.is_empty() {
        return Err(Failure::Unseen(missing.join(", ")));
    }
    for event in seen {
        let (source, destination) =
            if event.step == STEP_SYN_ACK { (server, client) } else { (client, server) };
        let is_right = SocketAddr::from(event.source) == source
            && SocketAddr::from(event.destination) == destination
            && event.ifindex == loopback::IFINDEX;
        if !is_right {
            return Err(Failure::Wrong(format!("{:?}", show::Segment::from(event))));
        }
    }
    let (Some(syn), Some(answer), Some(ack)) = (
        find(STEP_SYN, HOOK_INGRESS),
        find(STEP_SYN_ACK, HOOK_INGRESS),
        find(STEP_ACK, HOOK_INGRESS),
    ) else {
        return Ok(());
    };
    let continues = answer.acknowledgement == syn.sequence.wrapping_add(1)
        && ack.sequence == answer.acknowledgement
        && ack.acknowledgement == answer.sequence.wrapping_add(1)
        && syn.time_ns <= answer.time_ns
        && answer.time_ns <= ack.time_ns;
    if continues { Ok(()) } else { Err(Failure::Wrong("numbers that do not continue".into())) }
}
