//! Conversations by script: what both ends of a connection say, when, and how it ends, all of it
//! derived from one seed, so that a failure can be told as a number.
//!
//! Each byte is compared with the one that belongs at its place ([`Stream`]), which finds what
//! digests at both ends would find, and says where. An end that waits in vain says so after
//! [`bound`]; nothing here panics, since hundreds of conversations share a test.

use std::io::{ErrorKind, Read};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use socket2::SockRef;

use crate::stream::{Dice, Stream};
use crate::wait::bound;

/// Bytes of the greeting: the seed and its complement.
const GREETING: usize = 16;

/// Most bytes of one write or read.
const CHUNK: usize = 64 * 1024;

/// One of the two ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Who connected.
    Client,
    /// Who accepted.
    Server,
}

/// One step of a conversation. Sizes are in bytes; `up` is from client to server.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// Request and response, so many times.
    PingPong { rounds: u64, up: usize, down: usize },
    /// Nobody says anything: an engine may change under the connection.
    Quiet(Duration),
    /// Both ways at once.
    Bulk { up: u64, down: u64 },
    /// `first` ends its direction; the other end goes on for `rest` bytes and ends as well.
    HalfClose { first: End, rest: u64 },
    /// Both end at once, with bytes under way.
    Close { up: u64, down: u64 },
}

/// What is said over one connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    seed: u64,
    speaks_first: End,
    steps: Vec<Step>,
}

impl Script {
    /// The conversation of `seed`, with at most about `most` bytes in one bulk step each way. Who
    /// speaks first sends a greeting of 16 bytes, from which the other knows the seed.
    #[must_use]
    pub fn new(seed: u64, speaks_first: End, most: usize) -> Self {
        let mut dice = Dice::new(seed);
        let mut steps = Vec::new();
        for _ in 0..1 + dice.roll() % 4 {
            steps.push(match dice.roll() % 4 {
                0 | 1 => Step::PingPong {
                    rounds: 1 + dice.roll() % 12,
                    up: dice.size(4_000),
                    down: dice.size(4_000),
                },
                2 => Step::Bulk { up: some(&mut dice, most), down: some(&mut dice, most) },
                _ => Step::Quiet(Duration::from_millis(dice.roll() % 80)),
            });
        }
        steps.push(match dice.roll() % 3 {
            0 => Step::HalfClose { first: End::Client, rest: some(&mut dice, most) },
            1 => Step::HalfClose { first: End::Server, rest: some(&mut dice, most) },
            _ => Step::Close { up: some(&mut dice, most), down: some(&mut dice, most) },
        });
        Self { seed, speaks_first, steps }
    }

    /// Bytes from client to server, and from server to client.
    #[must_use]
    pub fn bytes(&self) -> (u64, u64) {
        let greeting = match self.speaks_first {
            End::Client => (GREETING as u64, 0),
            End::Server => (0, GREETING as u64),
        };
        self.steps.iter().fold(greeting, |(up, down), step| {
            let (more_up, more_down) = match *step {
                Step::PingPong { rounds, up: request, down: response } => {
                    (rounds * request as u64, rounds * response as u64)
                }
                Step::Quiet(_) => (0, 0),
                Step::Bulk { up, down } | Step::Close { up, down } => (up, down),
                Step::HalfClose { first: End::Client, rest } => (0, rest),
                Step::HalfClose { first: End::Server, rest } => (rest, 0),
            };
            (up + more_up, down + more_down)
        })
    }
}

/// A size, every fourth time none.
fn some(dice: &mut Dice, most: usize) -> u64 {
    if dice.roll().is_multiple_of(4) { 0 } else { dice.size(most) as u64 }
}

/// How one end's part of a conversation went wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The conversation's, 0 if it was not even learnt.
    pub seed: u64,
    /// At which step, and what.
    pub what: String,
}

/// Says this end's part of the conversation that it begins, and checks the other's.
///
/// # Errors
/// What differed from the script.
pub fn begin(socket: &TcpStream, end: End, script: &Script) -> Result<(), Failure> {
    let greeting = [script.seed.to_le_bytes(), (!script.seed).to_le_bytes()].concat();
    let said = Talk::new(socket, end, script.seed).write_all(&greeting);
    let fail = |what| Failure { seed: script.seed, what: format!("{end:?}, greeting: {what}") };
    said.map_err(fail)?;
    perform(socket, end, script)
}

/// Hears a greeting, takes the other part of its conversation, and says which it was.
///
/// # Errors
/// What differed from the script.
pub fn answer(socket: &TcpStream, end: End, most: usize) -> Result<u64, Failure> {
    let mut greeting = [0; GREETING];
    let unknown = |what: String| Failure { seed: 0, what: format!("{end:?}, greeting: {what}") };
    Talk::new(socket, end, 0).read_all(&mut greeting).map_err(unknown)?;
    let (seed, complement) = greeting.split_at(8);
    let [seed, complement] =
        [seed, complement].map(|bytes| bytes.iter().rev().fold(0, |n, b| n << 8 | u64::from(*b)));
    if seed != !complement {
        return Err(unknown(format!("{seed:#x} and {complement:#x} do not belong together")));
    }
    let speaks_first = if end == End::Client { End::Server } else { End::Client };
    perform(socket, end, &Script::new(seed, speaks_first, most))?;
    Ok(seed)
}

fn perform(socket: &TcpStream, end: End, script: &Script) -> Result<(), Failure> {
    let mut talk = Talk::new(socket, end, script.seed);
    // Both ways of writing: small segments at once, and gathered ones.
    let _ = socket.set_nodelay(!script.seed.is_multiple_of(4));
    for (number, step) in script.steps.iter().enumerate() {
        talk.step(step).map_err(|what| Failure {
            seed: script.seed,
            what: format!("{end:?}, step {number} {step:?}: {what}"),
        })?;
    }
    Ok(())
}

/// One end in the middle of its conversation.
struct Talk<'a> {
    socket: &'a TcpStream,
    end: End,
    said: Stream,
    heard: Stream,
    dice: Dice,
}

impl<'a> Talk<'a> {
    fn new(socket: &'a TcpStream, end: End, seed: u64) -> Self {
        let (up, down) = (Stream::new(seed), Stream::new(!seed));
        let (said, heard) = if end == End::Client { (up, down) } else { (down, up) };
        Self { socket, end, said, heard, dice: Dice::new(seed ^ end as u64) }
    }

    fn step(&mut self, step: &Step) -> Result<(), String> {
        let client = self.end == End::Client;
        let mine = |up, down| if client { (up, down) } else { (down, up) };
        match *step {
            Step::PingPong { rounds, up, down } => {
                let (say, hear) = mine(up as u64, down as u64);
                for _ in 0..rounds {
                    if client {
                        self.exchange(say, 0)?;
                        self.exchange(0, hear)?;
                    } else {
                        self.exchange(0, hear)?;
                        self.exchange(say, 0)?;
                    }
                }
                Ok(())
            }
            Step::Quiet(time) => {
                std::thread::sleep(time);
                Ok(())
            }
            Step::Bulk { up, down } => {
                let (say, hear) = mine(up, down);
                self.exchange(say, hear)
            }
            Step::HalfClose { first, rest } if first == self.end => {
                self.finish()?;
                self.exchange(0, rest)?;
                self.hear_end()
            }
            Step::HalfClose { rest, .. } => {
                self.hear_end()?;
                self.exchange(rest, 0)?;
                self.finish()
            }
            Step::Close { up, down } => {
                let (say, hear) = mine(up, down);
                // Whoever has less to say ends while the other still speaks.
                let both = say.min(hear);
                self.exchange(both, both)?;
                self.exchange(say - both, 0)?;
                self.finish()?;
                self.exchange(0, hear - both)?;
                self.hear_end()
            }
        }
    }

    /// Sends and receives so many bytes, in any order, in writes and reads of random sizes.
    fn exchange(&mut self, mut say: u64, mut hear: u64) -> Result<(), String> {
        let mut buffer = vec![0; CHUNK];
        while say > 0 || hear > 0 {
            let (readable, writable) = self.wait(hear > 0, say > 0)?;
            if readable {
                let most = self.dice.size(CHUNK).min(hear as usize);
                match self.read(&mut buffer[..most])? {
                    None => {}
                    Some(0) => {
                        return Err(format!("end after {}, {hear} to come", self.heard.position()));
                    }
                    Some(got) => {
                        self.heard.check(&buffer[..got])?;
                        hear -= got as u64;
                    }
                }
            }
            if writable {
                let most = self.dice.size(CHUNK).min(say as usize);
                self.said.peek(&mut buffer[..most]);
                let sent = self.write(&buffer[..most])?;
                self.said.advance(sent);
                say -= sent as u64;
            }
        }
        Ok(())
    }

    fn hear_end(&mut self) -> Result<(), String> {
        loop {
            self.wait(true, false)?;
            match self.read(&mut [0; CHUNK])? {
                None => {}
                Some(0) => return Ok(()),
                Some(more) => {
                    return Err(format!("{more} bytes after {}, the end", self.heard.position()));
                }
            }
        }
    }

    fn finish(&self) -> Result<(), String> {
        self.socket.shutdown(Shutdown::Write).map_err(|e| self.broken("shutdown", &e))
    }

    fn write_all(&self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            self.wait(false, true)?;
            bytes = &bytes[self.write(bytes)?..];
        }
        Ok(())
    }

    fn read_all(&self, mut bytes: &mut [u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            self.wait(true, false)?;
            match self.read(bytes)? {
                None => {}
                Some(0) => return Err(format!("end with {} bytes to come", bytes.len())),
                Some(got) => bytes = &mut bytes[got..],
            }
        }
        Ok(())
    }

    /// Waits until one of the wanted is possible; an error or the end counts as either.
    fn wait(&self, read: bool, write: bool) -> Result<(bool, bool), String> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, read);
        wanted.set(PollFlags::OUT, write);
        let timeout = Timespec { tv_sec: bound().as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(self.socket, wanted)];
        match retry_on_intr(|| poll(&mut fds, Some(&timeout))) {
            Ok(0) => Err(format!(
                "nothing moves for {:?}: said {}, heard {}",
                bound(),
                self.said.position(),
                self.heard.position()
            )),
            Ok(_) => {
                let ready = fds[0].revents();
                let over = ready.intersects(PollFlags::ERR | PollFlags::HUP);
                let (readable, writable) =
                    (ready.contains(PollFlags::IN), ready.contains(PollFlags::OUT));
                Ok((read && (readable || over), write && (writable || over)))
            }
            Err(error) => Err(format!("poll: {error}")),
        }
    }

    /// What is there now, if anything is.
    fn read(&self, buffer: &mut [u8]) -> Result<Option<usize>, String> {
        match (&mut &*self.socket).read(buffer) {
            Ok(got) => Ok(Some(got)),
            Err(error) if is_for_later(&error) => Ok(None),
            Err(error) => Err(self.broken("reading", &error)),
        }
    }

    /// Sends what fits now.
    fn write(&self, bytes: &[u8]) -> Result<usize, String> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        match SockRef::from(self.socket).send_with_flags(bytes, flags) {
            Ok(sent) => Ok(sent),
            Err(error) if is_for_later(&error) => Ok(0),
            Err(error) => Err(self.broken("writing", &error)),
        }
    }

    fn broken(&self, doing: &str, error: &std::io::Error) -> String {
        let (said, heard) = (self.said.position(), self.heard.position());
        format!("{doing} (said {said}, heard {heard}): {error}")
    }
}

/// Nothing happened, and the same may be tried again.
fn is_for_later(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const MOST: usize = 300_000;

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("binds");
        let client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connects");
        (client, listener.accept().expect("accepts").0)
    }

    /// What both ends say of conversation `seed` if `harm` stands in for the wire from client to
    /// server.
    fn talk(
        seed: u64,
        harm: impl FnOnce(TcpStream, TcpStream) + Send + 'static,
    ) -> (Result<(), Failure>, Result<u64, Failure>) {
        let script = Script::new(seed, End::Client, MOST);
        let ((client, near), (far, server)) = (pair(), pair());
        let (mut back, mut front) = (far.try_clone().expect("dup"), near.try_clone().expect("dup"));
        thread::spawn(move || {
            let _ = std::io::copy(&mut back, &mut front);
            let _ = front.shutdown(Shutdown::Write);
        });
        thread::spawn(move || harm(near, far));
        let begun = thread::spawn(move || begin(&client, End::Client, &script));
        let answered = answer(&server, End::Server, MOST);
        // Lets the client's end go, too, if this one has given up.
        drop(server);
        (begun.join().expect("no panic"), answered)
    }

    /// Passes `first` bytes on, then what `change` makes of the next `some`, then the rest.
    fn relay(
        mut from: TcpStream,
        mut to: TcpStream,
        (first, some): (u64, u64),
        change: fn(&mut Vec<u8>),
    ) {
        let _ = std::io::copy(&mut (&from).take(first), &mut to);
        let mut bytes = Vec::new();
        let _ = (&from).take(some).read_to_end(&mut bytes);
        change(&mut bytes);
        let _ = to.write_all(&bytes);
        let _ = std::io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
    }

    /// A seed whose client begins with many bytes.
    fn talkative(from: u64) -> u64 {
        let says = |seed: &u64| {
            let script = Script::new(*seed, End::Client, MOST);
            matches!(script.steps[0], Step::Bulk { up: 50_000.., .. })
        };
        (from..).find(says).expect("there are many")
    }

    #[test]
    fn whole_conversations_pass() {
        for seed in 1..20 {
            let (begun, answered) = talk(seed, |from, to| relay(from, to, (0, 0), |_| {}));
            assert_eq!((begun, answered), (Ok(()), Ok(seed)));
        }
    }

    #[test]
    fn a_changed_byte_is_found() {
        for seed in [talkative(100), talkative(200)] {
            let (_, answered) = talk(seed, |from, to| relay(from, to, (2_000, 100), |b| b[7] ^= 1));
            let failure = answered.expect_err("a byte is wrong");
            assert_eq!(failure.seed, seed);
            assert!(failure.what.contains("byte 1991 of stream"), "{failure:?}");
        }
    }

    #[test]
    fn lost_doubled_and_swapped_bytes_are_found() {
        let changes: [fn(&mut Vec<u8>); 3] =
            [|b| b.truncate(50), |b| b.extend_from_within(..), |b| b.rotate_left(50)];
        for change in changes {
            let (_, answered) =
                talk(talkative(300), move |from, to| relay(from, to, (2_000, 100), change));
            let failure = answered.expect_err("something is wrong");
            assert!(failure.what.contains("of stream"), "{failure:?}");
        }
    }

    #[test]
    fn a_wrong_greeting_is_found() {
        let (_, answered) = talk(1, |from, to| relay(from, to, (3, 13), |b| b[0] ^= 1));
        let failure = answered.expect_err("a greeting without sense");
        assert!(failure.what.contains("do not belong together"), "{failure:?}");
    }

    #[test]
    fn an_early_end_is_found() {
        let (_, answered) = talk(talkative(400), |from, mut to| {
            let _ = std::io::copy(&mut (&from).take(3_000), &mut to);
            let _ = to.shutdown(Shutdown::Write);
            let _ = std::io::copy(&mut &from, &mut std::io::sink());
        });
        let failure = answered.expect_err("truncated");
        assert!(failure.what.contains("end after"), "{failure:?}");
    }

    #[test]
    fn a_reset_is_found() {
        let (_, answered) = talk(talkative(500), |from, mut to| {
            let _ = std::io::copy(&mut (&from).take(3_000), &mut to);
            SockRef::from(&to).set_linger(Some(Duration::ZERO)).expect("SO_LINGER");
            let _ = to.shutdown(Shutdown::Both);
            drop((from, to));
        });
        assert!(answered.is_err(), "cut off");
    }

    #[test]
    fn a_byte_after_the_end_is_found() {
        let (_, answered) = talk(talkative(600), |mut from, mut to| {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.write_all(b"x");
            let _ = to.shutdown(Shutdown::Write);
        });
        let failure = answered.expect_err("one too many");
        assert!(failure.what.contains("of stream") || failure.what.contains("the end"));
    }

    #[test]
    fn scripts_have_every_kind_of_step_and_end() {
        let steps: Vec<Step> =
            (0..100).flat_map(|seed| Script::new(seed, End::Client, MOST).steps).collect();
        assert!(steps.iter().any(|s| matches!(s, Step::Quiet(_))));
        assert!(steps.iter().any(|s| matches!(s, Step::PingPong { .. })));
        assert!(steps.iter().any(|s| matches!(s, Step::Bulk { up: 0, .. })));
        assert!(steps.iter().any(|s| matches!(s, Step::Bulk { up: 100_000.., .. })));
        assert!(steps.iter().any(|s| matches!(s, Step::HalfClose { first: End::Client, .. })));
        assert!(steps.iter().any(|s| matches!(s, Step::HalfClose { first: End::Server, .. })));
        assert!(steps.iter().any(|s| matches!(s, Step::Close { .. })));
    }
}
