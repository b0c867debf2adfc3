//! Engine `packet`: connections that the kernel carries from packet to packet.

pub mod attach;
pub mod devices;
pub mod netlink;
pub mod routes;
