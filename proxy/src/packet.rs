//! What the `packet` engine needs beside its maps and programs.

pub mod conntrack;
pub mod inject;
pub mod ports;
