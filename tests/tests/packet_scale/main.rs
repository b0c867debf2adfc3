//! Engine `packet` with many connections at once, and after many: what one costs, and what is left.
//!
//! Needs root, the `ip` and `nft` commands (network namespaces, connection tracking), and 20,000
//! open files (`ulimit -Hn`).

mod idle;
mod leftovers;
mod node;
