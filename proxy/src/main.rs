//! Parse, log, run, exit code.

use std::process::ExitCode;

use proxy::cli::{self, Invocation};
use proxy::{app, preflight};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Proxy(config)) => app::main(*config),
        Ok(Invocation::Check(flags)) => preflight::check(&flags),
        Ok(Invocation::Print(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(mistakes) => {
            for mistake in mistakes {
                eprintln!("steward-tcp-proxy: {mistake}");
            }
            eprintln!("steward-tcp-proxy: see --help");
            ExitCode::from(2)
        }
    }
}
