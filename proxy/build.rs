//! Builds the kernel programs, which the binary then carries inside.

use std::path::Path;
use std::process::ExitCode;

#[path = "../xtask/src/toolchain.rs"]
mod toolchain;

fn main() -> ExitCode {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for path in ["proxy-common", "xtask/src/toolchain.rs", "Cargo.lock", "proxy/build.rs"] {
        println!("cargo::rerun-if-changed={}", root.join(path).display());
    }
    let Some(toolchain) = toolchain::Toolchain::find() else {
        println!("cargo::error=the eBPF toolchain is missing: run `cargo xtask setup`");
        return ExitCode::FAILURE;
    };
    for (name, value) in toolchain.environment() {
        // SAFETY: this program has started no thread yet, so nobody else reads the environment.
        unsafe { std::env::set_var(name, value) };
    }
    match toolchain.build(&root) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("cargo::error=the kernel programs did not build: {error:#}");
            ExitCode::FAILURE
        }
    }
}
