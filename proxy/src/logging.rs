//! Logs go to stderr, through a bounded buffer: whoever reads them slowly loses lines (counted at
//! the end), and never delays a byte of a relay.

use std::io::{self, BufWriter, Stderr, Write};
use std::time::Duration;

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

use crate::config::LogFormat;

/// Lines in the buffer; at some 300 bytes each this bounds it to a few megabytes.
const BUFFERED_LINES: usize = 8192;

/// Bytes that are written at once.
const BATCH: usize = 64 * 1024;

/// How long lines may wait for others. A proxy that serves thousands of short connections would
/// else wake the writer for each of them, which took more than a tenth of its time.
const GATHER: Duration = Duration::from_millis(5);

/// What the log's own thread writes to: many lines in one call.
struct InBatches(BufWriter<Stderr>);

impl Write for InBatches {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.write(line)
    }

    /// Called when no line waits. While this sleeps, lines gather in the channel, and nobody who
    /// sends one has to wake anybody.
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()?;
        std::thread::sleep(GATHER);
        Ok(())
    }
}

/// Starts logging for the whole process. `RUST_LOG` overrides the verbosity (klog's levels: up
/// to 3 shows what operators need, 4 and 5 debug messages, 6 and up traces).
///
/// Drop the guard last: it writes out what is buffered.
pub fn init(format: LogFormat, verbosity: u8) -> WorkerGuard {
    let level = match verbosity {
        // The reconciler tells in its own words what kube's crates would say once per attempt.
        0..=3 => "info,kube_client=off,kube_runtime=off,hickory_resolver=error",
        4..=5 => "info,proxy=debug,access=debug,kube_client=debug,kube_runtime=debug",
        _ => "debug,proxy=trace,kube_client=trace,kube_runtime=trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(BUFFERED_LINES)
        .lossy(true)
        .thread_name("log")
        .finish(InBatches(BufWriter::with_capacity(BATCH, io::stderr())));
    let logs = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    match format {
        LogFormat::Text => logs.with_ansi(false).init(),
        LogFormat::Json => logs.json().flatten_event(true).with_current_span(false).init(),
    }
    guard
}
