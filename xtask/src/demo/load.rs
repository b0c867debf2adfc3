//! Loads: many clients at once, every answer checked, times kept in histograms.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hdrhistogram::Histogram;
use http_body_util::BodyExt as _;
use hyper::Method;
use serde_json::Value;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use super::client::{Connection, Target, collect};
use super::payload::Check;
use super::standin;

/// Bytes of one bulk transfer; a load makes many of them.
const BULK: u64 = 8 << 20;

/// How long requests took, and how many there were.
#[derive(Debug, Clone)]
pub struct Times {
    /// In nanoseconds.
    histogram: Histogram<u64>,
    elapsed: Duration,
}

impl Times {
    /// None yet.
    ///
    /// # Errors
    /// Never: the precision is one that histograms have.
    pub fn start() -> Result<Self> {
        Ok(Self { histogram: Histogram::new(3)?, elapsed: Duration::ZERO })
    }

    /// Those of a further round.
    ///
    /// # Errors
    /// Never: histograms grow.
    pub fn add(&mut self, round: &Self) -> Result<()> {
        self.elapsed += round.elapsed;
        Ok(self.histogram.add(&round.histogram)?)
    }

    fn note(&mut self, nanoseconds: u64) -> Result<()> {
        Ok(self.histogram.record(nanoseconds)?)
    }

    fn sum(parts: Vec<Self>, elapsed: Duration) -> Result<Self> {
        let mut all = Self::start()?;
        for part in parts {
            all.add(&part)?;
        }
        // They were taken at the same time.
        Ok(Self { elapsed, ..all })
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    /// How many in a second.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub fn per_second(&self) -> f64 {
        self.histogram.len() as f64 / self.elapsed.as_secs_f64()
    }

    /// The time within which this share (0 to 1) of them was done, in microseconds.
    #[expect(clippy::cast_precision_loss, reason = "times are far below 2^52 ns")]
    pub fn quantile_us(&self, share: f64) -> f64 {
        self.histogram.value_at_quantile(share) as f64 / 1000.0
    }
}

/// How much was moved in which time.
#[derive(Debug, Clone, Copy, Default)]
pub struct Volume {
    /// Bytes without HTTP and TLS.
    pub bytes: u64,
    elapsed: Duration,
}

impl Volume {
    /// That of a further round.
    pub fn add(&mut self, round: Self) {
        self.bytes += round.bytes;
        self.elapsed += round.elapsed;
    }

    /// Gbit/s.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub fn gbit_per_second(&self) -> f64 {
        self.bytes as f64 * 8e-9 / self.elapsed.as_secs_f64()
    }
}

/// Runs `count` copies at once. The first that fails ends all.
async fn at_once<T, F>(count: usize, one: impl Fn() -> F) -> Result<(Vec<T>, Duration)>
where
    T: Send + 'static,
    F: Future<Output = Result<T>> + Send + 'static,
{
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        tasks.spawn(one());
    }
    let mut results = Vec::with_capacity(count);
    while let Some(result) = tasks.join_next().await {
        results.push(result??);
    }
    Ok((results, begun.elapsed()))
}

/// Requests back to back on `connections` connections that stay open.
///
/// # Errors
/// The first request that fails.
pub async fn keep_alive(to: &Target, connections: usize, time: Duration) -> Result<Times> {
    let (parts, elapsed) = at_once(connections, || {
        let to = to.clone();
        async move {
            let mut connection = Connection::open(&to).await?;
            let mut times = Times::start()?;
            let begun = Instant::now();
            while begun.elapsed() < time {
                let sent = standin::now();
                connection.version().await?;
                times.note(standin::now() - sent)?;
            }
            connection.close().await?;
            Ok(times)
        }
    })
    .await?;
    Times::sum(parts, elapsed)
}

/// One request per connection, `clients` at once: the time from connecting to the whole answer.
///
/// # Errors
/// The first that fails.
pub async fn new_connections(to: &Target, clients: usize, time: Duration) -> Result<Times> {
    let (parts, elapsed) = at_once(clients, || {
        let to = to.clone();
        async move {
            let mut times = Times::start()?;
            let begun = Instant::now();
            while begun.elapsed() < time {
                let opened = standin::now();
                let mut connection = Connection::open(&to).await?;
                connection.version().await?;
                times.note(standin::now() - opened)?;
                connection.close().await?;
            }
            Ok(times)
        }
    })
    .await?;
    Times::sum(parts, elapsed)
}

/// `watchers` streams of `events` events each: the time from sending an event to its arrival.
///
/// # Errors
/// A stream breaks off, or an event is missing.
pub async fn watch(to: &Target, watchers: usize, events: u64, first: Arc<Notify>) -> Result<Times> {
    let (parts, elapsed) = at_once(watchers, || {
        let (to, first) = (to.clone(), Arc::clone(&first));
        async move {
            let mut connection = Connection::open(&to).await?;
            let times = follow(&mut connection, events, &first).await?;
            connection.close().await?;
            Ok(times)
        }
    })
    .await?;
    Times::sum(parts, elapsed)
}

async fn follow(connection: &mut Connection, events: u64, first: &Notify) -> Result<Times> {
    let path = format!("/watch?events={events}&every_ms=100");
    let mut stream = connection.request(Method::GET, &path, 0).await?.into_body();
    let mut times = Times::start()?;
    let mut pending = Vec::new();
    while let Some(frame) = stream.frame().await {
        let frame = frame.context("the watch broke off")?;
        let arrived = standin::now();
        pending.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        // An event is a line; where the stream is cut into pieces says nothing.
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = pending.drain(..=end).collect();
            let (number, sent) = event(&line)?;
            let wanted = times.count() + 1;
            ensure!(number == wanted, "watch: event {number} came instead of {wanted}");
            times.note(arrived.saturating_sub(sent))?;
            first.notify_one();
        }
    }
    ensure!(times.count() == events, "watch: {} of {events} events came", times.count());
    Ok(times)
}

/// An event's number, and when it was sent.
fn event(line: &[u8]) -> Result<(u64, u64)> {
    let event: Value = serde_json::from_slice(line).context("watch: an event is damaged")?;
    let metadata = &event["object"]["metadata"];
    let number = |value: &Value| value.as_str().and_then(|text| text.parse().ok());
    number(&metadata["resourceVersion"])
        .zip(number(&metadata["annotations"]["sent"]))
        .context("watch: an event lacks its number or time")
}

/// Which way bulk goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From client to server.
    Up,
    /// From server to client.
    Down,
}

/// Bulk transfers on `connections` connections.
///
/// # Errors
/// A transfer breaks off, or a byte of it is wrong.
pub async fn bulk(
    to: &Target,
    way: Direction,
    connections: usize,
    time: Duration,
) -> Result<Volume> {
    let (parts, elapsed) = at_once(connections, || {
        let to = to.clone();
        async move {
            let mut connection = Connection::open(&to).await?;
            let mut bytes = 0;
            let begun = Instant::now();
            while begun.elapsed() < time {
                bytes += match way {
                    Direction::Up => upload(&mut connection).await?,
                    Direction::Down => download(&mut connection).await?,
                };
            }
            connection.close().await?;
            Ok(bytes)
        }
    })
    .await?;
    Ok(Volume { bytes: parts.iter().sum(), elapsed })
}

async fn upload(connection: &mut Connection) -> Result<u64> {
    let answer = collect(connection.request(Method::PUT, "/bulk", BULK).await?).await?;
    let arrived = serde_json::from_slice::<Value>(&answer)?["bytes"].as_u64();
    ensure!(arrived == Some(BULK), "upload: {arrived:?} of {BULK} bytes arrived");
    Ok(BULK)
}

async fn download(connection: &mut Connection) -> Result<u64> {
    let path = format!("/bulk?bytes={BULK}");
    let mut body = connection.request(Method::GET, &path, 0).await?.into_body();
    let mut check = Check::default();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame.context("the download broke off")?.data_ref() {
            check.take(data).context("download")?;
        }
    }
    ensure!(check.bytes == BULK, "download: {} of {BULK} bytes came", check.bytes);
    Ok(BULK)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_as_they_were_noted() {
        let mut part = Times::start().expect("a histogram");
        for nanoseconds in [1_000, 150_000, 2_000_000_000] {
            part.note(nanoseconds).expect("it grows");
        }
        let all = Times::sum(vec![part], Duration::from_secs(2)).expect("it grows");
        assert_eq!(all.count(), 3);
        assert!((all.per_second() - 1.5).abs() < 1e-9);
        for (share, microseconds) in [(0.5, 150.0), (1.0, 2e6)] {
            let told = all.quantile_us(share);
            assert!((told / microseconds - 1.0).abs() < 0.002, "{told} us at {share}");
        }
    }
}
