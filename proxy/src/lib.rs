//! A relay between the clients of a Kubernetes tenant cluster and its hosted API server.
//!
//! Modules in the order in which a connection meets them:
//!
//! 1. [`cli`], [`config`]: what was asked for, judged before anything is bound;
//! 2. [`app`]: the only place where parts are wired together;
//! 3. [`listeners`], [`accept`]: the port, limits, back-off;
//! 4. [`workers`]: the thread on which the connection lives from here on;
//! 5. [`session`]: one connection's life;
//! 6. [`upstream`]: which address, and how it is reached;
//! 7. [`relay`]: the engines;
//! 8. [`socket`]: what the kernel is asked for on both sockets;
//! 9. [`drain`]: ending in order.
//!
//! Beside that way: [`access`] tells of a connection that has ended, [`endpoints`] keeps `default/kubernetes` pointing at us, [`admin`] and
//! [`metrics`] show what goes on, [`control`] lists and kills connections, [`preflight`] tells what
//! the kernel allows, [`cleanup`] removes what is left in it.

pub mod accept;
pub mod access;
pub mod admin;
pub mod app;
pub mod cleanup;
pub mod cli;
pub mod config;
pub mod control;
pub mod drain;
pub mod endpoints;
pub mod listeners;
pub mod logging;
pub mod metrics;
pub mod packet;
pub mod preflight;
pub mod readiness;
pub mod relay;
pub mod session;
pub mod socket;
pub mod upstream;
pub mod workers;

/// The version of this build, as in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
