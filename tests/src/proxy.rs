//! The proxy as a process: started with flags, known by its log, ended by signals.

use std::fmt::Display;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, prlimit};
use serde_json::Value;

use crate::admin::{self, Answer};
use crate::netns::Host;
use crate::process::Watched;
use crate::seccomp::Call;
use crate::wait::{bound, eventually};

/// Lines of the log shown when a test fails.
const SHOWN: usize = 200;

/// The program under test.
///
/// # Panics
/// There is none.
#[must_use]
pub fn binary() -> PathBuf {
    if let Some(named) = std::env::var_os("STEWARD_TCP_PROXY_BIN") {
        return named.into();
    }
    // Test executables lie in target/<profile>/deps, the program one level above.
    let this = std::env::current_exe().expect("this program has a path");
    let beside = this.parent().and_then(|deps| deps.parent()).map(|p| p.join("steward-tcp-proxy"));
    match beside.filter(|program| program.exists()) {
        Some(program) => program,
        None => panic!(
            "steward-tcp-proxy is not built: run `cargo build -p proxy` first, or name it in \
             STEWARD_TCP_PROXY_BIN"
        ),
    }
}

/// How to start the proxy.
#[derive(Debug, Clone)]
pub struct Launch {
    flags: Vec<String>,
    open_files: Option<u64>,
    hosts: Option<PathBuf>,
    host: Option<Arc<Host>>,
    refused: Option<Call>,
}

impl Launch {
    /// A proxy in front of `upstream` (as in `--upstream-addr`) that listens on ports of
    /// 127.0.0.1 that the kernel chooses, writes no endpoints, has no admin socket (its place is
    /// one for the whole host) and logs JSON.
    #[must_use]
    pub fn new(upstream: impl Display) -> Self {
        let flags = [
            "--log-format=json",
            "--listen-addr=127.0.0.1:0",
            "--admin-addr=127.0.0.1:0",
            "--admin-socket=off",
            "--endpoint-mode=off",
            // With privileges, `auto` would attach programs to this machine's own devices.
            "--engine=splice",
            "--bpffs=off",
        ];
        let flags = flags.map(str::to_owned).to_vec();
        Self { flags, open_files: None, hosts: None, host: None, refused: None }
            .flag("upstream-addr", upstream)
    }

    /// Adds `--name=value`; the last of several wins.
    #[must_use]
    pub fn flag(mut self, name: &str, value: impl Display) -> Self {
        self.flags.push(format!("--{name}={value}"));
        self
    }

    /// Lets the proxy have at most `limit` file descriptors.
    #[must_use]
    pub fn open_files(mut self, limit: u64) -> Self {
        self.open_files = Some(limit);
        self
    }

    /// Has the kernel refuse this call to the proxy.
    #[must_use]
    pub fn refuse(mut self, call: Call) -> Self {
        self.refused = Some(call);
        self
    }

    /// Shows the proxy, and nobody else, `file` as /etc/hosts. Needs root (a mount namespace).
    /// Change the file in place: another one under its name would not be seen.
    #[must_use]
    pub fn hosts(mut self, file: &Path) -> Self {
        self.hosts = Some(file.to_owned());
        self
    }

    /// Starts it on `host`. Its admin address is asked from there, too.
    #[must_use]
    pub fn on(mut self, host: &Arc<Host>) -> Self {
        self.host = Some(Arc::clone(host));
        self
    }

    /// Starts it and waits until it listens.
    ///
    /// # Panics
    /// It ends, or does not listen within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn start(&self) -> Proxy {
        let mut child = match &self.host {
            None => self.spawn(),
            Some(host) => {
                let bare = Self { host: None, ..self.clone() };
                host.run(move || bare.spawn())
            }
        };
        let stderr = child.stderr.take().expect("stderr is a pipe");
        let log = Log::follow(stderr);
        let host = self.host.clone();
        let mut proxy = Proxy { child, log, address: None, admin: None, host };
        proxy.admin = proxy.bound("admin listening");
        proxy.address = proxy.bound("listening");
        proxy
    }

    fn spawn(&self) -> Child {
        let mut command = match &self.hosts {
            None => command(Command::new(binary()), &self.flags),
            Some(hosts) => {
                assert!(
                    rustix::process::geteuid().is_root(),
                    "a mount namespace: run this as root"
                );
                let mut unshare = Command::new("unshare");
                let script = "mount --bind \"$0\" /etc/hosts && exec \"$@\"";
                unshare.args(["--mount", "--propagation", "private", "sh", "-c", script]);
                unshare.arg(hosts).arg(binary());
                command(unshare, &self.flags)
            }
        };
        if let Some(call) = &self.refused {
            call.clone().refuse_to(&mut command);
        }
        let open_files = self.open_files;
        // SAFETY: between fork and exec only async-signal-safe calls are made (prctl, setrlimit),
        // and nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                if let Some(limit) = open_files {
                    let limit = Rlimit { current: Some(limit), maximum: Some(limit) };
                    rustix::process::setrlimit(Resource::Nofile, limit)?;
                }
                Ok(())
            });
        }
        command.spawn().unwrap_or_else(|e| panic!("{}: {e}", binary().display()))
    }
}

/// `command` with `flags`, all its streams in pipes, killed when the starting thread ends.
fn command(mut command: Command, flags: &[String]) -> Command {
    command.args(flags).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in
        ["UPSTREAM_ADDR", "POD_IP", "KUBECONFIG", "TLS_CERT_FILE", "TLS_KEY_FILE", "RUST_LOG"]
    {
        command.env_remove(name);
    }
    // SAFETY: prctl is async-signal-safe and nothing is allocated between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
    command
}

/// What a run that ended by itself left behind.
#[derive(Debug)]
pub struct Outcome {
    /// Exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    /// All of stdout.
    pub stdout: String,
    /// All of stderr.
    pub stderr: String,
}

/// Runs the program with just these `arguments` until it ends.
///
/// # Panics
/// It does not end within [`bound`].
#[track_caller]
#[must_use]
pub fn run(arguments: &[&str]) -> Outcome {
    let arguments: Vec<String> = arguments.iter().map(|&a| a.to_owned()).collect();
    let mut child = command(Command::new(binary()), &arguments).spawn().expect("starts");
    let mut out = child.stdout.take().expect("stdout is a pipe");
    let mut err = child.stderr.take().expect("stderr is a pipe");
    std::thread::scope(|threads| {
        let read = |pipe: &mut dyn Read| {
            let mut text = String::new();
            pipe.read_to_string(&mut text).map(|_| text).expect("UTF-8")
        };
        let stdout = threads.spawn(move || read(&mut out));
        let stderr = threads.spawn(move || read(&mut err));
        let status = wait_or_kill(&mut child);
        let [stdout, stderr] = [stdout, stderr].map(|t| t.join().expect("readable output"));
        let status = status.unwrap_or_else(|| panic!("{arguments:?} did not end: {stderr}"));
        Outcome { code: status.code(), stdout, stderr }
    })
}

/// The child's end, or `None` if it had to be killed after [`bound`].
fn wait_or_kill(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + bound();
    while Instant::now() < deadline {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}

/// One line of the access log.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// The client's address.
    pub client: String,
    /// The upstream address that was used, if one was reached.
    pub upstream: Option<String>,
    /// The engine that relayed, if one did.
    pub engine: Option<String>,
    /// Bytes from the client that went on to the server.
    pub bytes_up: u64,
    /// Bytes from the server that went on to the client.
    pub bytes_down: u64,
    /// Milliseconds from accept to end.
    pub duration_ms: f64,
    /// Why it ended.
    pub reason: String,
}

impl Ended {
    fn from_line(line: &Value) -> Option<Self> {
        let is_access = line["message"] == "connection" && line["target"] == "access";
        is_access.then(|| {
            let text = |name: &str| line[name].as_str().map(str::to_owned);
            let number = |name: &str| match line[name].as_u64() {
                Some(number) => number,
                None => panic!("no {name} in the access log's {line}"),
            };
            Self {
                client: text("client").unwrap_or_else(|| panic!("no client in {line}")),
                upstream: text("upstream"),
                engine: text("engine"),
                bytes_up: number("bytes_up"),
                bytes_down: number("bytes_down"),
                duration_ms: line["duration_ms"]
                    .as_f64()
                    .unwrap_or_else(|| panic!("no duration_ms in {line}")),
                reason: text("reason").unwrap_or_else(|| panic!("no reason in {line}")),
            }
        })
    }
}

/// A running proxy. Dropping it kills it; if the test is failing, its log is shown.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    log: Arc<Log>,
    address: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    host: Option<Arc<Host>>,
}

impl Proxy {
    #[track_caller]
    fn bound(&self, message: &str) -> Option<SocketAddr> {
        let line = self.log_line(message, |line| line["message"] == message);
        match line["addr"].as_str().map(str::parse) {
            Some(Ok(address)) => Some(address),
            _ => panic!("no address in {line}"),
        }
    }

    /// Where clients are accepted.
    ///
    /// # Panics
    /// Never on a proxy that has started.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address.expect("known since the start")
    }

    /// Where metrics and health are served.
    ///
    /// # Panics
    /// Never on a proxy that has started.
    #[must_use]
    pub fn admin(&self) -> SocketAddr {
        self.admin.expect("known since the start")
    }

    /// What `/proc` tells about it.
    #[must_use]
    pub fn process(&self) -> Watched {
        Watched::new(self.child.id())
    }

    /// Waits for a log line (one JSON object) that `matches`.
    ///
    /// # Panics
    /// None came within [`bound`], or the proxy ended without it; the message names `what`.
    #[track_caller]
    pub fn log_line(&self, what: &str, matches: impl Fn(&Value) -> bool) -> Value {
        match self.log.wait_for(|lines| lines.iter().find(|line| matches(line)).cloned()) {
            Some(line) => line,
            None => panic!("no log line for {what:?}"),
        }
    }

    /// How many log lines (JSON objects) so far match.
    #[must_use]
    pub fn count_lines(&self, matches: impl Fn(&Value) -> bool) -> usize {
        self.log.lock().parsed.iter().filter(|line| matches(line)).count()
    }

    /// Waits until `count` connections have ended, and says how all of them did, in their order.
    ///
    /// # Panics
    /// Fewer ended within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn access_log(&self, count: usize) -> Vec<Ended> {
        let entries = self.log.wait_for(|lines| {
            let ended: Vec<_> = lines.iter().filter_map(Ended::from_line).collect();
            (ended.len() >= count).then_some(ended)
        });
        entries.unwrap_or_else(|| {
            let lines = self.count_lines(|line| Ended::from_line(line).is_some());
            // Who is still relayed has not ended for the proxy; who is not has lost its line.
            let left = self.try_metric("connections_relaying");
            panic!("{lines} lines in the access log instead of {count}; still relayed: {left:?}")
        })
    }

    /// How the one connection so far ended.
    ///
    /// # Panics
    /// None ended, or more than one did.
    #[track_caller]
    #[must_use]
    pub fn ended(&self) -> Ended {
        let [ended] = self.access_log(1).try_into().expect("one connection");
        ended
    }

    /// How the connection of `client` ended.
    ///
    /// # Panics
    /// It has not ended within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn ended_of(&self, client: SocketAddr) -> Ended {
        let client = client.to_string();
        let find = |lines: &[Value]| {
            lines.iter().filter_map(Ended::from_line).find(|ended| ended.client == client)
        };
        self.log.wait_for(find).unwrap_or_else(|| panic!("{client} is not in the access log"))
    }

    /// Asks the admin address for `path`.
    ///
    /// # Panics
    /// It does not answer.
    #[track_caller]
    #[must_use]
    pub fn get(&self, path: &str) -> Answer {
        let (admin, wanted) = (self.admin(), path.to_owned());
        let answer = match &self.host {
            None => admin::get(admin, path),
            Some(host) => host.run(move || admin::get(admin, &wanted)),
        };
        answer.unwrap_or_else(|e| panic!("GET {path}: {e}"))
    }

    /// The sum of a metric's samples that carry all of `labels`; names go without their prefix.
    ///
    /// # Panics
    /// The admin address does not answer.
    #[track_caller]
    #[must_use]
    pub fn metric(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        admin::sum(&self.get("/metrics").body, name, labels)
    }

    /// The sum of all of a metric's samples, if there is an answer.
    fn try_metric(&self, name: &str) -> Option<f64> {
        let admin = self.admin();
        let answer = match &self.host {
            None => admin::get(admin, "/metrics"),
            Some(host) => host.run(move || admin::get(admin, "/metrics")),
        };
        Some(admin::sum(&answer.ok()?.body, name, &[]))
    }

    /// Waits until [`Self::metric`] is `value`.
    ///
    /// # Panics
    /// It was not within [`bound`].
    #[track_caller]
    pub fn await_metric(&self, name: &str, labels: &[(&str, &str)], value: f64) {
        let what = format!("{name}{labels:?} is {value}");
        eventually(&what, || (self.metric(name, labels) == value).then_some(()));
    }

    /// Sends SIGTERM.
    pub fn sigterm(&self) {
        self.signal(Signal::TERM);
    }

    /// Sends SIGSTOP, so that nothing moves until [`Self::resume`].
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets the running proxy have at most `limit` file descriptors from now on; those it has
    /// stay open.
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn limit_open_files(&self, limit: u64) {
        // The hard limit stays what it is, the one it has from us.
        let maximum = getrlimit(Resource::Nofile).maximum;
        let new = Rlimit { current: Some(limit), maximum };
        prlimit(Some(Pid::from_child(&self.child)), Resource::Nofile, new).expect("our own child");
    }

    /// Sends SIGCONT.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("our own child");
    }

    /// Sends SIGKILL and waits until the process is gone.
    ///
    /// # Panics
    /// The kernel refuses.
    pub fn kill9(&mut self) {
        self.child.kill().expect("our own child");
        self.child.wait().expect("our own child");
    }

    /// Waits until it ends by itself; gives its exit status, `None` after a signal.
    ///
    /// # Panics
    /// It did not within [`bound`].
    #[track_caller]
    #[must_use]
    pub fn exit_code(&mut self) -> Option<i32> {
        match wait_or_kill(&mut self.child) {
            Some(status) => status.code(),
            None => panic!("the proxy did not end within {:?}", bound()),
        }
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// The kernel refuses.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("our own child").is_some()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            self.log.show();
        }
    }
}

/// Stderr of a running proxy, line by line.
#[derive(Debug, Default)]
struct Log {
    text: Mutex<LogText>,
    grown: Condvar,
}

#[derive(Debug, Default)]
struct LogText {
    lines: Vec<String>,
    parsed: Vec<Value>,
    ended: bool,
}

impl Log {
    fn follow(stderr: impl Read + Send + 'static) -> Arc<Self> {
        let log = Arc::new(Self::default());
        let writer = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let mut text = writer.lock();
                text.parsed.extend(serde_json::from_str(&line).ok());
                text.lines.push(line);
                writer.grown.notify_all();
            }
            writer.lock().ended = true;
            writer.grown.notify_all();
        });
        log
    }

    fn lock(&self) -> MutexGuard<'_, LogText> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `find` finds something among the JSON lines; `None` after [`bound`], or at the
    /// log's end.
    fn wait_for<T>(&self, find: impl Fn(&[Value]) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + bound();
        let mut text = self.lock();
        loop {
            if let Some(found) = find(&text.parsed) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || text.ended {
                return None;
            }
            let (guard, _) =
                self.grown.wait_timeout(text, left).unwrap_or_else(PoisonError::into_inner);
            text = guard;
        }
    }

    fn show(&self) {
        let text = self.lock();
        eprintln!("--- the proxy's log, {} lines, the last {SHOWN} of them:", text.lines.len());
        for line in text.lines.iter().rev().take(SHOWN).rev() {
            eprintln!("{line}");
        }
    }
}
