//! The admin socket: lists and kills connections, for those whom its file's mode lets in.
//!
//! A line of JSON asks, lines of JSON answer; a connection may ask several times:
//!
//! ```text
//! {"verb":"list"}                          a line for each Row, then {"count":N}
//! {"verb":"kill","ids":["1","2"]}          {"count":N}, how many of them were found
//! {"verb":"kill","client":"192.0.2.1:5"}   the same; the port may be left out
//! {"verb":"kill","all":true}               the same
//! anything else                            {"error":"..."}
//! ```
//!
//! The count comes last, so an answer without one was cut off.

mod socket;
pub mod verb;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio::time::timeout;

pub use socket::Name as SocketName;
use socket::Opened;

/// Clients at once; one more is closed at once. People and a script or two need no more.
const CLIENTS: usize = 8;

/// Bytes of a request: some thousand ids.
const REQUEST: u64 = 64 * 1024;

/// How long a client may take for a request, and for each answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often we look whether the process that serves the socket has ended.
const LOOK: Duration = Duration::from_secs(1);

/// What the socket shows and ends. Both calls may take some milliseconds; they are made where
/// blocking is allowed.
pub trait Connections: Send + Sync {
    /// Every connection that the kernel relays now.
    fn list(&self) -> Vec<Row>;

    /// Resets those, both ways; how many there were.
    fn kill(&self, which: &Which) -> usize;
}

/// One connection.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Names it for as long as it lives.
    pub id: String,
    /// Its client.
    pub client: SocketAddr,
    /// The upstream address that it was relayed to.
    pub upstream: SocketAddr,
    /// The engine that moves its bytes now.
    pub engine: &'static str,
    /// Since the client was accepted.
    pub age_seconds: f64,
    /// Since a byte moved.
    pub idle_seconds: f64,
    /// Bytes from the client.
    pub bytes_up: u64,
    /// Bytes to the client.
    pub bytes_down: u64,
}

/// Which connections are meant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// Those with these [`Row::id`]s.
    Ids(Vec<String>),
    /// Those of one client.
    Client(Client),
    /// All of them; `false` means none, so that a mistake ends nothing.
    All(bool),
}

impl Which {
    /// Whether that connection is meant.
    #[must_use]
    pub fn covers(&self, id: &str, client: SocketAddr) -> bool {
        match self {
            Self::Ids(ids) => ids.iter().any(|wanted| wanted == id),
            Self::Client(wanted) => wanted.is(client),
            Self::All(all) => *all,
        }
    }
}

/// A client: one of its connections, or all that come from its address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Client {
    /// Its address; of IPv4 never in IPv6's disguise.
    pub ip: IpAddr,
    /// `None` for every port.
    pub port: Option<u16>,
}

impl Client {
    fn is(self, client: SocketAddr) -> bool {
        self.ip == client.ip().to_canonical() && self.port.is_none_or(|port| port == client.port())
    }
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.ip, port).fmt(f),
            None => self.ip.fmt(f),
        }
    }
}

impl From<Client> for String {
    fn from(client: Client) -> Self {
        client.to_string()
    }
}

impl TryFrom<String> for Client {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
enum Request {
    /// For every row.
    List,
    /// To end some.
    Kill(Which),
}

/// The last line of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Last {
    /// All went well; so many connections were listed or killed.
    Count(usize),
    /// Nothing was done, because of this.
    Error(String),
}

/// The socket's name, once we have it. Dropping this takes it away.
pub type Held = Arc<OnceLock<SocketName>>;

/// Serves the socket on `side`: from now on, or from when the process ends that serves it now (an
/// upgrade starts the successor before its predecessor has ended).
#[must_use]
pub fn start(path: &Path, connections: Arc<dyn Connections>, side: &Handle) -> Held {
    let held = Held::default();
    match socket::open(path) {
        Opened::Bound(listener, name) => {
            // Nobody else has set it.
            let _ = held.set(name);
            side.spawn(serve(listener, connections));
        }
        Opened::Busy => {
            let (path, held) = (path.to_owned(), Arc::downgrade(&held));
            side.spawn(async move {
                match wait_for(path, held).await {
                    Some(listener) => serve(listener, connections).await,
                    None => Ok(()),
                }
            });
        }
        Opened::Never => {}
    }
    held
}

/// Waits until the socket can be had; `None` if it never can, or if we end.
async fn wait_for(
    path: PathBuf,
    held: Weak<OnceLock<SocketName>>,
) -> Option<std::os::unix::net::UnixListener> {
    loop {
        tokio::time::sleep(LOOK).await;
        let (path, held) = (path.clone(), Weak::clone(&held));
        let look = tokio::task::spawn_blocking(move || {
            // Kept meanwhile: should we end now, the name goes as soon as it was made.
            let held = held.upgrade()?;
            match socket::look_again(&path) {
                Opened::Bound(listener, name) => {
                    let _ = held.set(name);
                    Some(Some(listener))
                }
                Opened::Busy => Some(None),
                Opened::Never => None,
            }
        });
        if let Some(listener) = look.await.ok()?? {
            return Some(listener);
        }
    }
}

/// Serves the socket until the task is dropped.
///
/// # Errors
/// The listener cannot be used.
async fn serve(
    listener: std::os::unix::net::UnixListener,
    connections: Arc<dyn Connections>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CLIENTS));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, most likely; the relays' listener says so.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let connections = Arc::clone(&connections);
        tokio::spawn(async move {
            let _place = place;
            // A client that goes away in the middle is its own affair.
            let _ = converse(stream, connections).await;
        });
    }
}

async fn converse(stream: UnixStream, connections: Arc<dyn Connections>) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        // One byte more than is allowed tells a request that is too long from one that is not.
        let mut bounded = (&mut stream).take(REQUEST + 1);
        timeout(PATIENCE, bounded.read_until(b'\n', &mut line)).await??;
        if line.is_empty() {
            return Ok(());
        }
        let is_whole = line.ends_with(b"\n");
        let answer = if is_whole {
            let connections = Arc::clone(&connections);
            tokio::task::spawn_blocking(move || answer(&line, &*connections)).await?
        } else {
            as_line(&Last::Error(format!("no request of up to {REQUEST} bytes and a line's end")))
        };
        timeout(PATIENCE, stream.write_all(&answer)).await??;
        if !is_whole {
            return Ok(());
        }
    }
}

fn answer(line: &[u8], connections: &dyn Connections) -> Vec<u8> {
    match serde_json::from_slice(line) {
        Ok(Request::List) => {
            let rows = connections.list();
            let mut lines: Vec<u8> = rows.iter().flat_map(as_line).collect();
            lines.extend(as_line(&Last::Count(rows.len())));
            lines
        }
        Ok(Request::Kill(which)) => as_line(&Last::Count(connections.kill(&which))),
        Err(error) => as_line(&Last::Error(format!("not understood: {error}"))),
    }
}

fn as_line(value: &impl Serialize) -> Vec<u8> {
    // Serialising strings and numbers into memory cannot fail.
    let mut line = serde_json::to_vec(value).unwrap_or_default();
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests;
