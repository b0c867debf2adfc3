//! What the kernel programs and the loader must agree on, byte for byte.
#![no_std]
