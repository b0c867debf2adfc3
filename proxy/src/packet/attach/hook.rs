//! The two places of a device, and what belongs there.

use aya::programs::TcAttachType;
use proxy_common::names;

/// Where a program sees packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    pub(super) const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    /// The program that belongs there.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Ingress => names::GATE_INGRESS,
            Self::Egress => names::GATE_EGRESS,
        }
    }

    /// The name of our filters: shown by `tc filter show`, and what we know them by.
    pub(super) fn filter(self) -> &'static str {
        match self {
            Self::Ingress => "steward-tcp-proxy/packet_ingress",
            Self::Egress => "steward-tcp-proxy/packet_egress",
        }
    }

    /// TC_H_MIN_INGRESS and TC_H_MIN_EGRESS of a clsact qdisc.
    pub(super) fn parent(self) -> u32 {
        match self {
            Self::Ingress => 0xffff_fff2,
            Self::Egress => 0xffff_fff3,
        }
    }
}

impl From<Hook> for TcAttachType {
    fn from(hook: Hook) -> Self {
        match hook {
            Hook::Ingress => Self::Ingress,
            Hook::Egress => Self::Egress,
        }
    }
}
