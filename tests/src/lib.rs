//! What the suites are made of: the proxy as a process, peers that misbehave on purpose, streams
//! whose every byte is known, and hosts made from network namespaces.
//!
//! All of it looks at the proxy from the outside: its command line, its sockets, its log lines,
//! its metrics and what `/proc` tells about it. Nothing here links the proxy's code, so a suite
//! holds for any engine, and for any build that `STEWARD_TCP_PROXY_BIN` names.
//!
//! Two rules keep the suites honest on slow machines: nothing sleeps and hopes (a condition is
//! awaited with [`wait::eventually`]), and no test passes because something took long enough.

pub mod admin;
pub mod apiserver;
pub mod capabilities;
pub mod facts;
pub mod forge;
pub mod holder;
pub mod lossy;
pub mod maps;
pub mod netns;
pub mod peers;
pub mod process;
pub mod proxy;
pub mod row;
pub mod script;
pub mod seccomp;
pub mod segments;
pub mod servers;
pub mod sniff;
pub mod stalled;
pub mod stream;
pub mod wait;
