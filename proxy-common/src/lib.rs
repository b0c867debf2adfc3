//! What the kernel programs and the loader must agree on, byte for byte.
//!
//! Every type here lies in a map or in a ring buffer: `repr(C)`, no padding that is not named, no
//! byte whose meaning depends on the machine. Numbers are in host order unless they say otherwise.
#![no_std]

mod flow;
mod handshake;
mod options;

pub use flow::{
    CLIENT, CLOCK_FIXED, CLOCK_READY, EVENT_CLOSED, EVENT_LEFT, EVENT_RESET, EVENT_STRAY,
    EVENT_TOO_BIG, Event, FlowRef, Half, LAYOUT, MARK_FIN, MARK_FIRST, MARK_LEFT, PHASE_FREE,
    PHASE_LIVE, PHASE_PREPARED, PHASE_SETTLED, Record, SERVER,
};
pub use handshake::{
    Counter, Endpoint, HOOK_EGRESS, HOOK_INGRESS, Handshake, Opening, Pending, SEEN_SYN,
    SEEN_SYN_ACK, STEP_ACK, STEP_SYN, STEP_SYN_ACK, Seen, Tuple, WATCH_LOCAL, WATCH_REMOTE, flags,
    port_bit,
};
pub use options::{MAX_OPTIONS, OptionsBuffer, TcpOptions};

/// Names of maps and programs, as the object carries them.
pub mod names {
    /// Tc program for segments that arrive.
    pub const PACKET_INGRESS: &str = "packet_ingress";
    /// Tc program for segments that leave.
    pub const PACKET_EGRESS: &str = "packet_egress";
    /// Hash of [`Endpoint`](crate::Endpoint) to [`WATCH_LOCAL`](crate::WATCH_LOCAL) or
    /// [`WATCH_REMOTE`](crate::WATCH_REMOTE): accepting ends whose handshakes are observed.
    pub const WATCHED: &str = "WATCHED";
    /// Bitmap of all ports in [`WATCHED`]; see [`port_bit`](crate::port_bit). Other segments cost
    /// two array look-ups and nothing more.
    pub const WATCHED_PORTS: &str = "WATCHED_PORTS";
    /// Ring buffer of [`Handshake`](crate::Handshake).
    pub const HANDSHAKES: &str = "HANDSHAKES";
    /// Handshakes that wait for the segment that completes them.
    pub const PENDING: &str = "PENDING";
    /// Tc program that jumps to [`PACKET_INGRESS`]: what is attached to devices.
    pub const GATE_INGRESS: &str = "packet_gate_in";
    /// Tc program that jumps to [`PACKET_EGRESS`].
    pub const GATE_EGRESS: &str = "packet_gate_out";
    /// Program of the socket lookup that swallows strays.
    pub const GUARD: &str = "packet_guard";
    /// The programs behind the gates: [`HOOK_INGRESS`](crate::HOOK_INGRESS) and
    /// [`HOOK_EGRESS`](crate::HOOK_EGRESS) are the indices.
    pub const STAGES: &str = "STAGES";
    /// [`Tuple`](crate::Tuple) of a handshake to [`Seen`](crate::Seen).
    pub const SEEN: &str = "SEEN";
    /// [`Tuple`](crate::Tuple) of a segment that arrives from a client to
    /// [`FlowRef`](crate::FlowRef).
    pub const FLOWS: &str = "FLOWS";
    /// Array of [`FlowRef`](crate::FlowRef) by local port: where segments from servers lead.
    pub const OWN_PORTS: &str = "OWN_PORTS";
    /// [`Record`](crate::Record) by slot.
    pub const RECORDS: &str = "RECORDS";
    /// Ring buffer of [`Event`](crate::Event).
    pub const EVENTS: &str = "EVENTS";
    /// Two listeners that nobody can reach, which take what the guard swallows: IPv4, IPv6.
    pub const GUARD_SOCKETS: &str = "GUARD_SOCKETS";
    /// Constant of the object: not 0 to have every handshake segment reported.
    pub const REPORT: &str = "REPORT";
    /// One `u64` per [`Counter`](crate::Counter) and CPU.
    pub const COUNTERS: &str = "COUNTERS";
}
