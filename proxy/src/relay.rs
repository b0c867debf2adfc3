//! The engine choice, and the one small interface behind which engines differ.
//!
//! Three types keep them apart: what the user wishes ([`Wish`]), what was decided for one pair of
//! sockets ([`Engine`]) and how a relay ended ([`End`]), which is the same for every engine.

pub(crate) mod copy;
mod pump;
mod splice;

use std::fmt;
use std::str::FromStr;

pub use pump::{Counters, Limits, Moment, Outcome, run};
pub(crate) use pump::{fault, last_words};
pub use splice::PipePool;

/// What the user asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// The best engine that applies to each connection.
    Auto,
    /// This one and no other.
    Only(Engine),
}

/// What was decided for one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// Bytes through a userspace buffer that every connection of a thread shares.
    Copy,
    /// Pages through a pipe for bulk, [`Engine::Copy`] for small messages.
    Splice,
    /// Whole segments, rewritten in the kernel; begins as [`Engine::Splice`].
    Packet,
}

impl Engine {
    /// Every engine, slowest first; the contract suite runs against each.
    pub const ALL: [Self; 3] = [Self::Copy, Self::Splice, Self::Packet];

    /// The name on the command line, in logs and in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Splice => "splice",
            Self::Packet => "packet",
        }
    }
}

impl Wish {
    /// The name on the command line, in logs and in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Only(engine) => engine.as_label(),
        }
    }

    /// The engine that a connection begins with. None begins with `packet`: what a connection
    /// consists of is known only once it is established.
    #[must_use]
    pub fn decide(self) -> Engine {
        match self {
            Self::Auto | Self::Only(Engine::Packet) => Engine::Splice,
            Self::Only(engine) => engine,
        }
    }
}

impl FromStr for Wish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "copy" => Ok(Self::Only(Engine::Copy)),
            "splice" => Ok(Self::Only(Engine::Splice)),
            "packet" => Ok(Self::Only(Engine::Packet)),
            "sockmap" | "capture" => Err(format!(
                "engine {text:?} is planned but not in this release; use auto, packet, splice or \
                 copy"
            )),
            _ => Err(format!("{text:?} is none of auto, packet, splice, copy")),
        }
    }
}

/// One end of a relayed connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Downstream of us.
    Client,
    /// Upstream of us.
    Server,
}

impl Side {
    /// The opposite end.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Client => Self::Server,
            Self::Server => Self::Client,
        }
    }

    /// Its place in a set of directions, as the side that bytes come from.
    fn bit(self) -> u8 {
        match self {
            Self::Client => 1,
            Self::Server => 2,
        }
    }

    /// The name in logs.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// Why a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// Both directions reached their end, this side's first; the only orderly reason.
    Closed(Side),
    /// This side sent RST.
    Reset(Side),
    /// This side no longer answered (keepalive or TCP_USER_TIMEOUT).
    TimedOut(Side),
    /// Another error of this side's socket.
    Failed(Side),
    /// No byte moved for `--idle-timeout`.
    Idle,
    /// The drain deadline, or a second signal.
    Cut,
}

impl Reason {
    /// The label in logs and metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Closed(Side::Client) => "client_closed",
            Self::Closed(Side::Server) => "server_closed",
            Self::Reset(Side::Client) => "client_reset",
            Self::Reset(Side::Server) => "server_reset",
            Self::TimedOut(Side::Client) => "client_timed_out",
            Self::TimedOut(Side::Server) => "server_timed_out",
            Self::Failed(Side::Client) => "client_error",
            Self::Failed(Side::Server) => "server_error",
            Self::Idle => "idle_timeout",
            Self::Cut => "cut_by_drain",
        }
    }

    /// Whether every byte of both directions was handed on, and the sockets may end with FIN.
    #[must_use]
    pub fn is_orderly(self) -> bool {
        matches!(self, Self::Closed(_))
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_label())
    }
}

/// How a relay ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub reason: Reason,
    /// Bytes from the client that the upstream socket took.
    pub bytes_up: u64,
    /// Bytes from the server that the downstream socket took.
    pub bytes_down: u64,
}

/// Bytes that a relay has moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// From the client to the server.
    pub up: u64,
    /// From the server to the client.
    pub down: u64,
}
