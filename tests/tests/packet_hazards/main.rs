//! Attacks on connections that the kernel relays: forged segments, lost programs, moving devices
//! and sizes, `kill -9`, readers that stall, tables that run full. Whatever happens, such a
//! connection goes on with every byte in its place, or both its ends are told by RST.
//!
//! Needs root and the `ip` command (network namespaces).

mod blind;
mod busy;
mod ends;
mod extras;
mod ground;
mod killed;
mod neighbours;
mod reuse;
mod room;
mod sizes;
mod stalls;
mod strays;
mod urgent;
mod vlans;
mod windows;
