//! What the kernel programs and the loader must agree on, byte for byte.
//!
//! Every type here lies in a map or in a ring buffer: `repr(C)`, no padding that is not named, no
//! byte whose meaning depends on the machine. Numbers are in host order unless they say otherwise.
#![no_std]

mod handshake;
mod options;

pub use handshake::{
    Counter, Endpoint, HOOK_EGRESS, HOOK_INGRESS, Handshake, Pending, STEP_ACK, STEP_SYN,
    STEP_SYN_ACK, Tuple, WATCH_LOCAL, WATCH_REMOTE, flags, port_bit,
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
    /// One `u64` per [`Counter`](crate::Counter) and CPU.
    pub const COUNTERS: &str = "COUNTERS";
}
