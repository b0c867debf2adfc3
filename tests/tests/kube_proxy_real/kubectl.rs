//! kubectl as it runs in a pod, asking for the Service's address.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use proxy_tests::netns::Host;
use proxy_tests::wait::until;

use crate::scene::{Scene, die_with_parent};

/// A running kubectl; dropping it kills it.
pub struct Kubectl {
    child: Child,
    what: String,
    output: Output,
    errors: Arc<Mutex<String>>,
}

enum Output {
    Lines(Arc<Mutex<Vec<String>>>),
    Slow(Mutex<(ChildStdout, Vec<u8>)>),
}

impl Kubectl {
    /// Its lines are read as they come.
    #[track_caller]
    pub fn start(scene: &Scene, host: &Host, arguments: &[&str]) -> Self {
        let mut started = Self::start_slow(scene, host, arguments);
        let lines = Arc::<Mutex<Vec<String>>>::default();
        let sink = Arc::clone(&lines);
        let slow = std::mem::replace(&mut started.output, Output::Lines(lines));
        let Output::Slow(slow) = slow else { unreachable!("it was started so") };
        let (stdout, _) = slow.into_inner().expect("no panic");
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                lock(&sink).push(line);
            }
        });
        started
    }

    /// Nothing is read of its output before [`Self::read_more`].
    #[track_caller]
    pub fn start_slow(scene: &Scene, host: &Host, arguments: &[&str]) -> Self {
        let mut command = command(scene, arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        die_with_parent(&mut command);
        let mut child = host.run(move || command.spawn()).expect("kubectl");
        let stdout = child.stdout.take().expect("a pipe");
        let mut stderr = child.stderr.take().expect("a pipe");
        let errors = Arc::<Mutex<String>>::default();
        let sink = Arc::clone(&errors);
        std::thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = stderr.read(&mut buffer) {
                lock(&sink).push_str(&String::from_utf8_lossy(&buffer[..count]));
            }
        });
        let what = format!("kubectl {} on {}", arguments.join(" "), host.name());
        Self { child, what, output: Output::Slow(Mutex::new((stdout, Vec::new()))), errors }
    }

    /// Waits until what `of` makes of the lines is `wanted`, neither more nor less.
    #[track_caller]
    pub fn await_lines(&self, wanted: &[String], of: impl Fn(&str) -> Option<String>) {
        let Output::Lines(lines) = &self.output else { panic!("read as bytes") };
        let so_far = || -> Vec<String> { lock(lines).iter().filter_map(|line| of(line)).collect() };
        until(&format!("{}: {} objects", self.what, wanted.len()), || {
            let (so_far, errors) = (so_far(), lock(&self.errors));
            // What will not become right is not waited for.
            let is_prefix = wanted.starts_with(&so_far);
            assert!(is_prefix && errors.is_empty(), "{}: {so_far:?} {errors}", self.what);
            so_far.len() == wanted.len()
        });
    }

    /// Reads so many bytes more.
    #[track_caller]
    pub fn read_more(&self, count: usize) {
        let Output::Slow(slow) = &self.output else { panic!("read as lines") };
        let (stdout, read) = &mut *lock(slow);
        let begun = read.len();
        let got = stdout.take(count as u64).read_to_end(read);
        assert_eq!(got.ok(), Some(count), "{} after {begun}: {}", self.what, lock(&self.errors));
    }

    /// All of its output, to its orderly end.
    #[track_caller]
    pub fn rest(mut self) -> Vec<u8> {
        let Output::Slow(slow) = &self.output else { panic!("read as lines") };
        let (stdout, read) = &mut *lock(slow);
        stdout.read_to_end(read).expect("a pipe");
        let status = self.child.wait().expect("our own child");
        assert!(status.success(), "{}: {}", self.what, lock(&self.errors));
        std::mem::take(read)
    }

    /// Ends it, which must not have ended by itself.
    #[track_caller]
    pub fn kill(mut self) {
        let ended = self.child.try_wait().expect("our own child");
        assert_eq!(ended, None, "{}: {}", self.what, lock(&self.errors));
    }
}

impl Drop for Kubectl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The names of all objects of a kind.
#[track_caller]
pub fn get(scene: &Scene, host: &Host, kind: &str) -> String {
    let answer = try_get(scene, host, kind);
    answer.unwrap_or_else(|error| panic!("kubectl get {kind} on {}: {error}", host.name()))
}

/// The same, or what kubectl has to say.
pub fn try_get(scene: &Scene, host: &Host, kind: &str) -> Result<String, String> {
    let mut command = command(scene, &["get", kind, "--output=name"]);
    let output = host.run(move || command.output()).expect("kubectl");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn command(scene: &Scene, arguments: &[&str]) -> Command {
    let mut command = scene.kubectl_command();
    command.arg(format!("--server=https://{}", scene.service)).args(arguments);
    command
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
