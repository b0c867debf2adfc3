//! The reconciler against an API server in memory, which can be told to misbehave, in virtual
//! time.

mod content;
mod desired;
mod fake;
mod faults;
mod harness;
mod lifetime;
mod replicas;
mod rivals;
