//! Set-up, builds, demo and tests: `cargo xtask <verb>`. A file per verb.

mod bench;
mod build_ebpf;
mod demo;
mod kernels;
mod kube_bins;
mod lab;
mod packages;
mod setup;
mod shell;
mod test;
mod toolchain;

use std::process::ExitCode;

use clap::Parser;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Verb {
    /// Find or install what building and running needs; safe to repeat
    Setup(setup::Flags),
    /// Build the kernel programs into target/ebpf (a plain cargo build does it as well)
    BuildEbpf(build_ebpf::Flags),
    /// Set up, then relay real HTTPS traffic and compare it with the direct way; no cluster needed
    Demo(demo::Flags),
    /// Compare engines and other proxies with the direct way in one run (root; nginx, HAProxy and
    /// Envoy take part where they are installed)
    Bench(bench::Flags),
    /// Run `check` and kernel suites on other kernels, each in a virtual machine (QEMU, busybox)
    Kernels(kernels::Flags),
    /// Set up, then run format, lints, documentation and all tests
    Test(test::Flags),
}

fn main() -> ExitCode {
    let outcome = match Verb::parse() {
        Verb::Setup(flags) => setup::run(&flags),
        Verb::BuildEbpf(flags) => build_ebpf::run(&flags),
        Verb::Demo(flags) => demo::run(&flags),
        Verb::Bench(flags) => bench::run(&flags),
        Verb::Kernels(flags) => kernels::run(&flags),
        Verb::Test(flags) => test::run(&flags),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
