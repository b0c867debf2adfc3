//! Engine `packet`: established connections relayed by the kernel, segment by segment.

pub mod attach;
pub mod conntrack;
pub mod devices;
pub mod eligible;
pub mod grace;
pub mod inject;
pub mod netlink;
pub mod ports;
pub mod routes;
pub mod table;
pub mod tcp;
