//! Tells the linker how to make code of this crate alone.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // With its default of copying strictly in order, LLVM has no other way to clear memory than to
    // call a loop of single bytes, which each segment would go through a dozen times.
    println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
}
