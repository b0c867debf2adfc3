//! Whether two connections can be joined by rewriting segments: a pure decision on what is known
//! of both. When in doubt they cannot, and the connection stays where it is.

use std::time::Duration;

use proxy_common::{Opening, SEEN_SYN_ACK, Seen, TcpOptions, flags};

use crate::socket::Info;

/// Why a connection stays in userspace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ineligible {
    /// The client came over IPv4 and the server is reached over IPv6, or the other way round.
    Families,
    /// The programs did not see a handshake: it came before them, by a device without them, under
    /// another address (source translation), or as one of a flood.
    Handshake,
    /// Timestamps or selective acknowledgements were not agreed on both sides.
    Options,
    /// An option was agreed that cannot be translated: MPTCP, authentication.
    Foreign,
    /// Congestion marks were agreed on one side only, or in the accurate form.
    Ecn,
    /// The scales of the windows would lose too much.
    WindowScale,
    /// One end may send segments that the other does not take.
    SegmentSize,
    /// One end is too far away: the ends' congestion control has learnt half of the way.
    RoundTrip,
    /// A device on the way does not carry the programs, or is not fit for it.
    Device,
    /// The namespace has IPsec policies, which rewriting would bypass.
    Ipsec,
    /// No port of those that nobody else uses was left.
    Ports,
    /// As many connections are switched as there is room for.
    Full,
    /// It could not be brought to a moment in which (almost) nothing was in our hands.
    Busy,
    /// One direction has ended already.
    HalfClosed,
    /// We have announced a larger window than the end that will have to stand for it.
    Window,
    /// Bytes that were counted and sequence numbers do not agree.
    Numbers,
    /// The kernel refused a step.
    Refused,
}

impl Ineligible {
    /// Every reason, for the metric's labels.
    pub const ALL: [Self; 17] = [
        Self::Families,
        Self::Handshake,
        Self::Options,
        Self::Foreign,
        Self::Ecn,
        Self::WindowScale,
        Self::SegmentSize,
        Self::RoundTrip,
        Self::Device,
        Self::Ipsec,
        Self::Ports,
        Self::Full,
        Self::Busy,
        Self::HalfClosed,
        Self::Window,
        Self::Numbers,
        Self::Refused,
    ];

    /// The label in logs and metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Families => "families",
            Self::Handshake => "handshake_not_seen",
            Self::Options => "tcp_options",
            Self::Foreign => "foreign_option",
            Self::Ecn => "ecn",
            Self::WindowScale => "window_scale",
            Self::SegmentSize => "segment_size",
            Self::RoundTrip => "round_trip",
            Self::Device => "device",
            Self::Ipsec => "ipsec",
            Self::Ports => "ports",
            Self::Full => "full",
            Self::Busy => "busy",
            Self::HalfClosed => "half_closed",
            Self::Window => "window",
            Self::Numbers => "numbers",
            Self::Refused => "refused",
        }
    }

    /// Whether the same connection may fit a moment later. (Of the round trip there may be no
    /// other measurement yet than the handshake, which had to wait for a neighbour's address. And
    /// what is refused may be a client's port in its place, whose last connection was reset and is
    /// still being cleared away.)
    #[must_use]
    pub fn may_pass(self) -> bool {
        matches!(self, Self::Busy | Self::Window | Self::Full | Self::RoundTrip | Self::Refused)
    }
}

/// One of the two connections: what the programs saw of its handshake, and what its socket says.
#[derive(Debug, Clone, Copy)]
pub struct Leg<'a> {
    /// The handshake.
    pub seen: &'a Seen,
    /// The socket.
    pub info: &'a Info,
    /// Whether we accepted it (the client's) or opened it (the server's).
    pub is_accepted: bool,
}

impl Leg<'_> {
    /// What the peer said of itself.
    #[must_use]
    pub fn peer(&self) -> &Opening {
        if self.is_accepted { &self.seen.client } else { &self.seen.server }
    }

    /// What we said.
    #[must_use]
    pub fn ours(&self) -> &Opening {
        if self.is_accepted { &self.seen.server } else { &self.seen.client }
    }

    /// ECN as agreed; `None` if it was agreed in a form that cannot be carried over.
    fn ecn(&self) -> Option<bool> {
        let (asked, answered) = (self.seen.client.flags, self.seen.server.flags);
        let offered = flags::ECE | flags::CWR;
        // RFC 9768: an answer of any other form than ECE alone to an accurate offer is accurate.
        if asked & flags::AE != 0 && answered & (flags::AE | flags::CWR) != 0 {
            return None;
        }
        Some(asked & offered == offered && answered & offered == flags::ECE)
    }
}

/// Judges the pair.
///
/// # Errors
/// The first reason against it.
pub fn judge(client: Leg<'_>, server: Leg<'_>, max_rtt: Duration) -> Result<(), Ineligible> {
    for leg in [client, server] {
        if leg.seen.state != SEEN_SYN_ACK {
            return Err(Ineligible::Handshake);
        }
        if !leg.info.is_established() {
            return Err(Ineligible::HalfClosed);
        }
        let agreed = Info::TIMESTAMPS | Info::SACK | Info::WINDOW_SCALE;
        let needed = TcpOptions::HAS_TIMESTAMPS
            | TcpOptions::SACK_PERMITTED
            | TcpOptions::HAS_WINDOW_SCALE
            | TcpOptions::HAS_MSS;
        if leg.info.options() & agreed != agreed
            || leg.info.options() & Info::MICROSECONDS != 0
            || !leg.peer().options.has(needed)
            || !leg.ours().options.has(needed)
        {
            return Err(Ineligible::Options);
        }
        // An offer alone binds nobody; only what the answer has as well was agreed.
        let (asked, answered) = (leg.seen.client.options, leg.seen.server.options);
        if answered.has(TcpOptions::FOREIGN)
            || (asked.present | answered.present) & TcpOptions::MALFORMED != 0
        {
            return Err(Ineligible::Foreign);
        }
        if leg.info.round_trip() > max_rtt {
            return Err(Ineligible::RoundTrip);
        }
    }
    match (client.ecn(), server.ecn()) {
        (Some(one), Some(other)) if one == other => {}
        _ => return Err(Ineligible::Ecn),
    }
    for (from, to) in [(client, server), (server, client)] {
        // What `from` announces is said again in the scale that we announced to `to`.
        let (theirs, ours) = (from.info.peer_shift(), to.info.our_shift());
        if ours > theirs && from.info.send_window() < 4 << ours {
            return Err(Ineligible::WindowScale);
        }
        // Segments of `from` are as large as we said that we take them.
        if u32::from(from.ours().options.mss) > u32::from(to.peer().options.mss) {
            return Err(Ineligible::SegmentSize);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proxy_common::SEEN_SYN;

    use super::*;

    fn opening(flags: u16) -> Opening {
        let options = TcpOptions {
            mss: 1460,
            window_scale: 7,
            present: TcpOptions::HAS_TIMESTAMPS
                | TcpOptions::SACK_PERMITTED
                | TcpOptions::HAS_WINDOW_SCALE
                | TcpOptions::HAS_MSS,
            ..TcpOptions::default()
        };
        Opening { sequence: 1, options, window: 64240, flags }
    }

    fn seen() -> Seen {
        Seen {
            state: SEEN_SYN_ACK,
            ifindex: 2,
            client: opening(flags::SYN),
            server: opening(flags::SYN | flags::ACK),
        }
    }

    fn verdict(client: &Seen, server: &Seen) -> Result<(), Ineligible> {
        verdict_of(&Info::sample(), client, server)
    }

    fn verdict_of(info: &Info, client: &Seen, server: &Seen) -> Result<(), Ineligible> {
        judge(
            Leg { seen: client, info, is_accepted: true },
            Leg { seen: server, info, is_accepted: false },
            Duration::from_millis(4),
        )
    }

    #[test]
    fn equal_connections_fit() {
        assert_eq!(verdict(&seen(), &seen()), Ok(()));
    }

    #[test]
    fn each_difference_has_its_reason() {
        type Change = fn(&mut Seen);
        let cases: [(Change, Ineligible); 7] = [
            (|seen| seen.state = SEEN_SYN, Ineligible::Handshake),
            (
                |seen| seen.client.options.present &= !TcpOptions::HAS_TIMESTAMPS,
                Ineligible::Options,
            ),
            (
                |seen| seen.server.options.present &= !TcpOptions::SACK_PERMITTED,
                Ineligible::Options,
            ),
            (|seen| seen.server.options.present |= TcpOptions::FOREIGN, Ineligible::Foreign),
            (|seen| seen.client.options.mss = 1400, Ineligible::SegmentSize),
            (
                |seen| {
                    seen.client.flags |= flags::ECE | flags::CWR;
                    seen.server.flags |= flags::ECE;
                },
                Ineligible::Ecn,
            ),
            (
                |seen| {
                    seen.client.flags |= flags::ECE | flags::CWR | flags::AE;
                    seen.server.flags |= flags::CWR;
                },
                Ineligible::Ecn,
            ),
        ];
        for (index, (change, reason)) in cases.into_iter().enumerate() {
            let mut client = seen();
            change(&mut client);
            assert_eq!(verdict(&client, &seen()), Err(reason), "case {index}");
        }
    }

    #[test]
    fn one_slow_answer_is_forgotten_after_a_fast_one() {
        let [near, far] = [1_000, 50_000].map(Duration::from_micros);
        let verdict = |average, smallest| {
            let info = Info::sample().with_round_trips(average, smallest);
            verdict_of(&info, &seen(), &seen())
        };
        assert_eq!(verdict(far, Some(near)), Ok(()));
        assert_eq!(verdict(far, Some(far)), Err(Ineligible::RoundTrip));
        assert_eq!(verdict(far, None), Err(Ineligible::RoundTrip));
        assert!(Ineligible::RoundTrip.may_pass());
        assert!(!Ineligible::Families.may_pass());
    }

    #[test]
    fn congestion_marks_agreed_on_both_sides_fit() {
        let mut both = seen();
        both.client.flags |= flags::ECE | flags::CWR;
        both.server.flags |= flags::ECE;
        assert_eq!(verdict(&both, &both), Ok(()));
    }

    #[test]
    fn labels_are_unique() {
        let labels: std::collections::HashSet<_> =
            Ineligible::ALL.iter().map(|reason| reason.as_label()).collect();
        assert_eq!(labels.len(), Ineligible::ALL.len());
    }
}
