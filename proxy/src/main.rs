//! Parse, log, run, exit code.

use std::io::Write as _;
use std::process::ExitCode;

use proxy::cli::{self, Invocation};
use proxy::{app, cleanup, control, preflight};

fn main() -> ExitCode {
    match cli::parse(std::env::args_os().skip(1)) {
        Ok(Invocation::Proxy(config)) => app::main(*config),
        Ok(Invocation::Check(flags)) => preflight::check(&flags),
        Ok(Invocation::Connections(flags)) => control::verb::run(&flags),
        Ok(Invocation::Cleanup(flags)) => cleanup::run(&flags),
        // Written by hand, since the macros panic where nobody reads.
        Ok(Invocation::Print(text)) => match std::io::stdout().write_all(text.as_bytes()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Err(mistakes) => {
            let mut stderr = std::io::stderr();
            for mistake in mistakes {
                let _ = writeln!(stderr, "steward-tcp-proxy: {mistake}");
            }
            let _ = writeln!(stderr, "steward-tcp-proxy: see --help");
            ExitCode::from(2)
        }
    }
}
