//! Harness of the suites.

pub mod apiserver;
