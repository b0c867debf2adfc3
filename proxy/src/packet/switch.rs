//! The switch: two sockets and a relay become one TCP conversation between the two ends.
//!
//! It happens while (almost) nothing is in our hands: bytes that we have acknowledged to one end
//! and not yet delivered to the other must fit into one flight, or the two ends' numbers would
//! leave each other's windows. In this order, each step for a reason:
//!
//! 1. both tuples are made findable, then one word makes both directions live at once;
//! 2. what we hold is sent on; where our socket has bytes on their way, it has a *duty*, and the
//!    program shows it what is acknowledged;
//! 3. after a grace period nothing new reaches our sockets; what raced in is sent on as well;
//! 4. a filter drops whatever else might come late, so nothing is acknowledged any more;
//! 5. once everything sent is acknowledged, as the sockets themselves say, both are frozen, their
//!    sequence numbers compared with the bytes moved, and closed without a word.
//!
//! Up to step 5 an end of this process is a RST to both ends.

use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_common::{CLIENT, Half, Record, SEEN_SYN_ACK, SERVER, Seen};
use tokio::time::sleep;

use super::eligible::{Ineligible, Leg, judge};
use super::table::{Slot, Unprepared};
use super::{Packet, conntrack, tcp};
use crate::relay::copy::{self, Fault, Step};
use crate::relay::{Counters, Moved, Reason, Side, fault, last_words};
use crate::socket::{Downstream, Info, Socket, Upstream};

/// Most bytes of one direction that may be in our hands at the switch. Well below the smallest
/// window that a peer on a fast network opens with (64 KiB).
const FLIGHT: u32 = 32 * 1024;

/// Bytes that both sockets queue while a busy connection is brought to a quiet moment: less than
/// [`FLIGHT`], or what comes in a millisecond would be too much again.
const SQUEEZED: usize = 8 * 1024;

/// How long that may take without what is in our hands becoming less, and in all. Until it has
/// become little, its receiver takes it as fast as ever.
const SQUEEZE: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(2));

/// How long a connection that is quiet, but for what we have announced, may receive nothing.
const LULL: Duration = Duration::from_millis(50);

/// By how much our window may exceed that of the end that will have to stand for it.
const WINDOW_SLACK: u32 = 64 * 1024;

/// What came of it.
#[derive(Debug)]
pub enum Outcome {
    /// The connection lives on without our sockets.
    Switched(Slot),
    /// Nothing has changed; the relay goes on, with so many bytes moved.
    Stays(Ineligible, Moved),
    /// The connection had to be ended, or ended meanwhile; closing the sockets resets both ends.
    Ended(Reason, Moved),
}

/// What the two connections are made of: found out once, before anything changes.
struct Plan {
    record: Record,
    /// Numbers of the first bytes of both streams, each in its end's own space.
    first: [u32; 2],
    guard: Option<proxy_common::Tuple>,
}

/// One attempt.
pub struct Attempt<'a> {
    /// The engine.
    pub packet: &'a Arc<Packet>,
    /// The client's socket.
    pub client: &'a Downstream,
    /// The server's socket.
    pub server: &'a Upstream,
    /// What the relay has moved.
    pub moved: Moved,
    /// Where moved bytes are counted.
    pub counters: &'a Counters,
    /// When the client was accepted, in milliseconds since 1970.
    pub accepted_ms: u64,
}

impl Attempt<'_> {
    /// Tries to switch.
    pub async fn run(&mut self) -> Outcome {
        let outcome = self.attempt().await;
        if let Outcome::Stays(..) = outcome {
            self.loosen();
        }
        outcome
    }

    async fn attempt(&mut self) -> Outcome {
        let begun = Instant::now();
        // None: a successor has the records.
        let Some(_turn) = self.packet.turn() else {
            return Outcome::Stays(Ineligible::Refused, self.moved);
        };
        let plan = match self.plan() {
            Ok(plan) => plan,
            Err(reason) => return Outcome::Stays(reason, self.moved),
        };
        self.server.0.watch_peer();
        match self.quieten().await {
            Ok(()) => {}
            Err(End::Stays(reason)) => return Outcome::Stays(reason, self.moved),
            Err(End::Ends(reason)) => {
                if let Reason::Reset(side) = reason {
                    let sockets = (self.client, self.server);
                    self.moved = last_words(sockets, self.counters, self.moved, side).await;
                }
                return Outcome::Ended(reason, self.moved);
            }
        }
        let (slot, halves) = match self.prepare(&plan) {
            Ok(prepared) => prepared,
            Err(reason) => return Outcome::Stays(reason, self.moved),
        };
        self.packet.table().go_live(slot);
        let unfinished = Unfinished { packet: self.packet, slot };
        match self.finish(slot, &halves).await {
            Ok(()) => {
                std::mem::forget(unfinished);
                self.packet.note_switched(slot, begun.elapsed(), self.moved);
                Outcome::Switched(slot)
            }
            Err(reason) => Outcome::Ended(reason, self.moved),
        }
    }

    fn socket(&self, side: Side) -> &Socket {
        match side {
            Side::Client => &self.client.0,
            Side::Server => &self.server.0,
        }
    }

    /// All that must hold whatever the moment is.
    fn plan(&self) -> Result<Plan, Ineligible> {
        let refused = |_| Ineligible::Refused;
        let client = self.client.0.addresses().map_err(refused)?;
        let server = self.server.0.addresses().map_err(refused)?;
        if client.peer.is_ipv4() != server.peer.is_ipv4() {
            return Err(Ineligible::Families);
        }
        if self.server.1.is_none() {
            return Err(Ineligible::Ports);
        }
        let down = Info::of(self.client.0.as_fd()).ok_or(Ineligible::Refused)?;
        let up = Info::of(self.server.0.as_fd()).ok_or(Ineligible::Refused)?;
        let (client_seen, client_local) = self.client_handshake(client.peer, client.local)?;
        let server_seen = self.packet.seen(server.local, server.peer);
        let server_seen = server_seen.ok_or(Ineligible::Handshake)?;
        self.packet.note_server(server.peer, &server_seen);
        judge(
            Leg { seen: &client_seen, info: &down, is_accepted: true },
            Leg { seen: &server_seen, info: &up, is_accepted: false },
            self.packet.max_rtt(),
        )?;
        let half = |peer, local, seen: &Seen, info: &Info| {
            let mut half = self.packet.half(peer, local, seen)?;
            half.shifts = Half::shifts(info.peer_shift(), info.our_shift());
            half.window = u16::try_from(info.send_window() >> half.shift()).unwrap_or(u16::MAX);
            Ok(half)
        };
        let mut halves = [
            half(client.peer, client_local, &client_seen, &down)?,
            half(server.peer, server.local, &server_seen, &up)?,
        ];
        // Byte k of a stream has the k-th number after the SYN's on either connection.
        halves[CLIENT].seq_add =
            server_seen.client.sequence.wrapping_sub(client_seen.client.sequence);
        halves[SERVER].seq_add =
            client_seen.server.sequence.wrapping_sub(server_seen.server.sequence);
        let changes = [
            halves[CLIENT].address_change(&halves[SERVER]),
            halves[SERVER].address_change(&halves[CLIENT]),
        ];
        for (half, change) in halves.iter_mut().zip(changes) {
            half.pseudo = change;
        }
        for (half, socket) in halves.iter_mut().zip([&self.client.0, &self.server.0]) {
            let clock = tcp::timestamp(socket).map_err(refused)?;
            half.ts_clock = clock.wrapping_sub((tcp::monotonic_ns() / 1_000_000) as u32);
        }
        let guard = (client_local != client.local).then(|| proxy_common::Tuple {
            source: client.peer.into(),
            destination: client.local.into(),
        });
        let record = Record { accepted_ms: self.accepted_ms, halves, ..Record::default() };
        let first = [client_seen.client.sequence, server_seen.server.sequence];
        Ok(Plan { record, first: first.map(|syn| syn.wrapping_add(1)), guard })
    }

    /// The client's handshake, and our address as it passed the device: with address translation
    /// (kube-proxy) that is the one the client asked for.
    fn client_handshake(
        &self,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Result<(Seen, SocketAddr), Ineligible> {
        if let Some(seen) = self.packet.seen(peer, local) {
            return Ok((seen, local));
        }
        let original = conntrack::original_destination(&self.client.0);
        let original = original.ok().flatten().ok_or(Ineligible::Handshake)?;
        match self.packet.seen(peer, original) {
            Some(seen) if seen.state == SEEN_SYN_ACK => Ok((seen, original)),
            _ => {
                // The next client that asks for this address will be seen.
                self.packet.watch_translated(original);
                Err(Ineligible::Handshake)
            }
        }
    }

    /// Bytes in our hands that come from `side`: read or not, until the other end has
    /// acknowledged them.
    fn held(&self, side: Side) -> Result<u32, End> {
        let refused = |_| End::Stays(Ineligible::Refused);
        let unread = tcp::unread(self.socket(side)).map_err(refused)?;
        let unacknowledged = tcp::unacknowledged(self.socket(side.other())).map_err(refused)?;
        Ok(unread + unacknowledged)
    }

    /// The same of both directions, and whether either is little enough.
    fn held_by_us(&self) -> Result<((u32, u32), bool), End> {
        let (up, down) = (self.held(Side::Client)?, self.held(Side::Server)?);
        Ok(((up, down), up <= FLIGHT && down <= FLIGHT))
    }

    fn infos(&self) -> Option<[Info; 2]> {
        Some([Info::of(self.client.0.as_fd())?, Info::of(self.server.0.as_fd())?])
    }

    /// By how much an end may send more than the other has room for, given what our sockets had
    /// announced `before`: a window is only used up, whatever a socket says of it once it is bounded.
    fn overhang(&self, before: &[Info; 2]) -> Result<u64, End> {
        let now = self.infos().ok_or(End::Stays(Ineligible::Refused))?;
        let of = |ours: usize, peer: usize| {
            let used = now[ours].bytes_received().saturating_sub(before[ours].bytes_received());
            let open = u64::from(before[ours].receive_window_bound()).saturating_sub(used);
            open.saturating_sub(u64::from(now[peer].send_window().saturating_add(WINDOW_SLACK)))
        };
        Ok(of(CLIENT, SERVER) + of(SERVER, CLIENT))
    }

    /// Relays with small windows until little enough is in our hands. So as well if we have announced
    /// too much: while bytes flow, our socket's window grows faster than that of an end which reads
    /// slowly, and stays so once they do not.
    async fn quieten(&mut self) -> Result<(), End> {
        let before = self.infos().ok_or(End::Stays(Ineligible::Refused))?;
        let was_quiet = self.held_by_us()?.1;
        if was_quiet && self.overhang(&before)? == 0 {
            return Ok(());
        }
        for side in [Side::Client, Side::Server] {
            self.socket(side).hold_back(SQUEEZED);
        }
        let begun = Instant::now();
        let (mut least, mut shrank) = (u64::MAX, begun);
        loop {
            for side in [Side::Client, Side::Server] {
                match self.pass(side)? {
                    Passed::Everything => {}
                    // An end under way is the relay's business.
                    Passed::EndOfStream => return Err(End::Stays(Ineligible::HalfClosed)),
                }
            }
            let ((up, down), is_quiet) = self.held_by_us()?;
            let overhang = if was_quiet { self.overhang(&before)? } else { 0 };
            if is_quiet && overhang == 0 {
                return Ok(());
            }
            let left = u64::from(up) + u64::from(down) + overhang;
            if left < least {
                (least, shrank) = (left, Instant::now());
            }
            let (patience, reason) = match is_quiet {
                true => (LULL, Ineligible::Window),
                false => (SQUEEZE.0, Ineligible::Busy),
            };
            if shrank.elapsed() >= patience || begun.elapsed() >= SQUEEZE.1 {
                tracing::debug!(up, down, overhang, "too busy to be switched");
                return Err(End::Stays(reason));
            }
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// Gives both sockets their queues back: this keeps them small, and so does the relay before.
    fn loosen(&self) {
        for side in [Side::Client, Side::Server] {
            self.socket(side).let_flow();
        }
    }

    /// Moves what can be moved from `side` without waiting.
    fn pass(&mut self, side: Side) -> Result<Passed, End> {
        // Bounded, so that a fast sender cannot keep us here.
        for _ in 0..64 {
            match copy::step(self.socket(side), self.socket(side.other()), true) {
                Ok(Step::Moved(count)) => self.count(side, count),
                Ok(Step::Full(count)) => {
                    self.count(side, count);
                    break;
                }
                Ok(Step::DestinationFull | Step::SourceEmpty) => break,
                Ok(Step::EndOfStream) => return Ok(Passed::EndOfStream),
                Err(Fault::Source(error)) => return Err(End::Ends(fault(side, &error))),
                Err(Fault::Destination(error)) => {
                    return Err(End::Ends(fault(side.other(), &error)));
                }
            }
        }
        Ok(Passed::Everything)
    }

    fn count(&mut self, side: Side, bytes: usize) {
        let bytes = bytes as u64;
        let (total, counter) = match side {
            Side::Client => (&mut self.moved.up, &self.counters.up),
            Side::Server => (&mut self.moved.down, &self.counters.down),
        };
        *total += bytes;
        counter.inc_by(bytes);
    }

    /// Checks the moment, writes the record and makes it findable.
    fn prepare(&self, plan: &Plan) -> Result<(Slot, [Half; 2]), Ineligible> {
        let refused = |_| Ineligible::Refused;
        let [down, up] = self.infos().ok_or(Ineligible::Refused)?;
        if !down.is_established() || !up.is_established() {
            return Err(Ineligible::HalfClosed);
        }
        for (peer, ours) in [(&down, &up), (&up, &down)] {
            // Never let an end send more than the other has room for: what lies outside of a
            // window may be answered with RST by a NAT in between.
            if ours.receive_window_bound() > peer.send_window().saturating_add(WINDOW_SLACK) {
                return Err(Ineligible::Window);
            }
        }
        let mut record = plan.record;
        for (index, side) in [Side::Client, Side::Server].into_iter().enumerate() {
            let unread = tcp::unread(self.socket(side)).map_err(refused)?;
            let unacknowledged = tcp::unacknowledged(self.socket(side.other())).map_err(refused)?;
            let moved = self.moved_from(side);
            let (source, sink) = match side {
                Side::Client => (&down, &up),
                Side::Server => (&up, &down),
            };
            // A FIN counts as one on the receiving side; the SYN does on the side that connects.
            let acked = moved.wrapping_sub(unacknowledged.into());
            let syn = u64::from(side == Side::Client);
            let received_now = moved + u64::from(unread);
            let is_consistent = source.bytes_received() <= received_now
                && received_now <= source.bytes_received() + u64::from(FLIGHT)
                && sink.bytes_acked() <= acked + syn
                && acked <= sink.bytes_acked() + u64::from(FLIGHT);
            if !is_consistent {
                return Err(Ineligible::Numbers);
            }
            // What our socket has taken must not have to wait for an end that reads nothing.
            if unread + unacknowledged > sink.send_window() {
                return Err(Ineligible::Window);
            }
            let half = &mut record.halves[index];
            half.first = plan.first[index];
            half.bytes = received_now;
            half.seen_ns = tcp::monotonic_ns();
            half.own_next = plan.first[index].wrapping_add(received_now as u32);
            half.sent = half.own_next;
            let add = half.seq_add;
            let end = half.own_next.wrapping_add(add);
            let other = &mut record.halves[index ^ 1];
            other.own_end = end;
            other.acked = end.wrapping_sub(unread).wrapping_sub(unacknowledged);
            other.duty = u8::from(unread + unacknowledged > 0);
        }
        let slot = match self.packet.table().prepare(record, plan.guard) {
            Ok(slot) => slot,
            Err(Unprepared::Full) => return Err(Ineligible::Full),
            Err(Unprepared::Refused(slot)) => {
                self.packet.recycle(slot);
                return Err(Ineligible::Refused);
            }
        };
        self.packet.note_guard(slot, plan.guard);
        Ok((slot, record.halves))
    }

    fn moved_from(&self, side: Side) -> u64 {
        match side {
            Side::Client => self.moved.up,
            Side::Server => self.moved.down,
        }
    }

    /// Everything after the moment in which segments began to be rewritten.
    async fn finish(&mut self, slot: Slot, halves: &[Half; 2]) -> Result<(), Reason> {
        let mut ended = [false; 2];
        self.drain(slot, halves, &mut ended).await?;
        if !self.packet.grace().pass().await {
            return Err(Reason::Failed(Side::Client));
        }
        self.drain(slot, halves, &mut ended).await?;
        for side in [Side::Client, Side::Server] {
            tcp::fence(self.socket(side)).map_err(|_| Reason::Failed(side))?;
        }
        self.drain(slot, halves, &mut ended).await?;
        self.acknowledged(slot).await?;
        for side in [Side::Client, Side::Server] {
            tcp::freeze(self.socket(side)).map_err(|_| Reason::Failed(side))?;
        }
        for (index, side) in [Side::Client, Side::Server].into_iter().enumerate() {
            let numbers = tcp::sequence_numbers(self.socket(side));
            let (next, written) = numbers.map_err(|_| Reason::Failed(side))?;
            let total = |of: usize| {
                let moved = self.moved_from(if of == CLIENT { Side::Client } else { Side::Server });
                (moved as u32).wrapping_add(ended[of].into())
            };
            let expected_next = base(halves, index).wrapping_add(total(index));
            let expected_written = base(halves, index ^ 1)
                .wrapping_add(halves[index ^ 1].seq_add)
                .wrapping_add(total(index ^ 1));
            if (next, written) != (expected_next, expected_written) {
                tracing::warn!(
                    next,
                    expected_next,
                    written,
                    expected_written,
                    ?side,
                    "sequence numbers and bytes moved differ; resetting the connection"
                );
                tcp::thaw(self.socket(Side::Client));
                tcp::thaw(self.socket(Side::Server));
                return Err(Reason::Failed(side));
            }
        }
        self.packet.table().settle(slot);
        for side in [Side::Client, Side::Server] {
            // Were it refused, closing the descriptor does the same.
            let _ = tcp::vanish(self.socket(side));
        }
        Ok(())
    }

    /// Sends on what has reached our sockets, until nothing is left in them.
    async fn drain(
        &mut self,
        slot: Slot,
        halves: &[Half; 2],
        ended: &mut [bool; 2],
    ) -> Result<(), Reason> {
        for (index, side) in [Side::Client, Side::Server].into_iter().enumerate() {
            loop {
                let unread = tcp::unread(self.socket(side)).map_err(|_| Reason::Failed(side))?;
                let total = (self.moved_from(side) as u32).wrapping_add(unread);
                let next = base(halves, index).wrapping_add(total);
                self.announce(slot, index, next, halves[index].seq_add, unread > 0);
                match self.pass(side) {
                    Ok(Passed::Everything) => {}
                    Ok(Passed::EndOfStream) if ended[index] => break,
                    Ok(Passed::EndOfStream) => {
                        // Its number comes after all bytes, on either connection.
                        self.announce(
                            slot,
                            index,
                            next.wrapping_add(1),
                            halves[index].seq_add,
                            true,
                        );
                        let (number, bytes) = (next.wrapping_add(1), self.moved_from(side));
                        self.packet.table().mark_fin(slot, index, number, bytes);
                        let shut = self.socket(side.other()).shutdown_write();
                        shut.map_err(|_| Reason::Reset(side.other()))?;
                        ended[index] = true;
                        break;
                    }
                    Err(End::Ends(reason)) => return Err(reason),
                    Err(End::Stays(_)) => return Err(Reason::Failed(side)),
                }
                if tcp::unread(self.socket(side)).map_err(|_| Reason::Failed(side))? == 0 {
                    // An end of the stream shows only once everything else was read.
                    if ended[index] || !self.socket(side).is_at_end() {
                        break;
                    }
                    continue;
                }
                // The destination was full: its acknowledgements reach it, so it drains.
                sleep(Duration::from_millis(1)).await;
                self.check(slot, side.other())?;
            }
        }
        Ok(())
    }

    /// Tells the program up to where our sockets are responsible.
    fn announce(&self, slot: Slot, index: usize, next: u32, add: u32, has_more: bool) {
        let table = self.packet.table();
        table.set_own_next(slot, index, next);
        let end = next.wrapping_add(add);
        table.set_own_end(slot, index ^ 1, end);
        if has_more {
            table.set_duty(slot, index ^ 1, true);
        }
    }

    /// Ends when both ends have acknowledged all that our sockets sent, as the sockets say.
    async fn acknowledged(&self, slot: Slot) -> Result<(), Reason> {
        let mut pause = Duration::from_micros(200);
        for (index, side) in [Side::Client, Side::Server].into_iter().enumerate() {
            loop {
                let left = tcp::unacknowledged(self.socket(side));
                if left.map_err(|_| Reason::Failed(side))? == 0 {
                    break;
                }
                self.check(slot, side)?;
                sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            self.packet.table().set_duty(slot, index, false);
        }
        Ok(())
    }

    /// Whether waiting for `side` still makes sense.
    fn check(&self, slot: Slot, side: Side) -> Result<(), Reason> {
        let info = Info::of(self.socket(side).as_fd()).ok_or(Reason::Failed(side))?;
        if info.is_closed() {
            return Err(Reason::TimedOut(side));
        }
        // An end that is alive but reads nothing has all the time it wants, as in the relay.
        self.socket(side).lift_user_timeout(self.socket(side).send_queue().is_stalled());
        // A RST that came before our last bytes were delivered: the other end may not take it for
        // its own, so both get one from us.
        let record = self.packet.table().read(slot).ok_or(Reason::Cut)?;
        for (half, end) in record.halves.iter().zip([Side::Client, Side::Server]) {
            if half.reset != 0 {
                return Err(Reason::Reset(end));
            }
        }
        Ok(())
    }
}

/// A switch under way. Dropped before it is done (by an error, or by the drain's deadline), the
/// connection is reset: there is no way back.
struct Unfinished<'a> {
    packet: &'a Arc<Packet>,
    slot: Slot,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        self.packet.abandon(self.slot);
    }
}

/// Number of the first byte of an end's stream, in its own space.
fn base(halves: &[Half; 2], index: usize) -> u32 {
    halves[index].own_next.wrapping_sub(halves[index].bytes as u32)
}

enum Passed {
    Everything,
    EndOfStream,
}

enum End {
    Stays(Ineligible),
    Ends(Reason),
}
