//! One HTTPS client connection, verified against the stand-in's CA, with its bytes counted where
//! they meet the network: exactly those that a proxy in between relays.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, ensure};
use http_body_util::BodyExt as _;
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustls::client::Resumption;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncWriteExt as _, copy, sink};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_util::io::{InspectReader, InspectWriter};

use super::payload::Payload;
use super::standin;

/// What connections to one target moved, TLS included.
#[derive(Debug, Default)]
pub struct Meter {
    connections: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

/// Such counts at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Moved {
    /// Connections opened.
    pub connections: u64,
    /// Bytes that the socket took.
    pub sent: u64,
    /// Bytes that the socket gave.
    pub received: u64,
}

impl Meter {
    /// The counts now.
    pub fn read(&self) -> Moved {
        Moved {
            connections: self.connections.load(Ordering::Relaxed),
            sent: self.sent.load(Ordering::Relaxed),
            received: self.received.load(Ordering::Relaxed),
        }
    }
}

/// Where clients connect to: the stand-in itself, or a proxy before it.
#[derive(Clone)]
pub struct Target {
    /// Its address.
    pub address: SocketAddr,
    /// What went there so far.
    pub meter: Arc<Meter>,
    tls: TlsConnector,
    name: ServerName<'static>,
}

impl Target {
    /// Trusts the CA (PEM) alone, and expects the stand-in's name wherever it connects to.
    ///
    /// # Errors
    /// No certificate.
    pub fn new(address: SocketAddr, ca: &str) -> Result<Self> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(ca.as_bytes())?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        // Every new connection shall cost a whole handshake.
        config.resumption = Resumption::disabled();
        Ok(Self {
            address,
            meter: Arc::default(),
            tls: TlsConnector::from(Arc::new(config)),
            name: ServerName::try_from(standin::NAME)?,
        })
    }
}

/// A connection that takes one request after the other.
#[derive(Debug)]
pub struct Connection {
    requests: SendRequest<Payload>,
    driver: JoinHandle<Result<()>>,
}

impl Connection {
    /// TCP's and TLS's handshakes.
    ///
    /// # Errors
    /// The target refuses, or is not whom the CA vouches for.
    pub async fn open(target: &Target) -> Result<Self> {
        let tcp = TcpStream::connect(target.address)
            .await
            .with_context(|| format!("connecting to {}", target.address))?;
        tcp.set_nodelay(true)?;
        target.meter.connections.fetch_add(1, Ordering::Relaxed);
        let (up, down) = (Arc::clone(&target.meter), Arc::clone(&target.meter));
        let tcp = InspectReader::new(tcp, move |data: &[u8]| {
            down.received.fetch_add(data.len() as u64, Ordering::Relaxed);
        });
        let tcp = InspectWriter::new(tcp, move |data: &[u8]| {
            up.sent.fetch_add(data.len() as u64, Ordering::Relaxed);
        });
        let tls = target.tls.connect(target.name.clone(), tcp).await.context("TLS handshake")?;
        let (requests, connection) = http1::handshake(TokioIo::new(tls)).await?;
        Ok(Self { requests, driver: tokio::spawn(drive(connection)) })
    }

    /// Sends a request with a body of `upload` bytes and waits for the head of its answer.
    ///
    /// # Errors
    /// The connection broke, or the answer is not 200.
    pub async fn request(
        &mut self,
        method: Method,
        path: &str,
        upload: u64,
    ) -> Result<Response<Incoming>> {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(hyper::header::HOST, standin::NAME)
            .body(Payload::new(upload))?;
        self.requests.ready().await?;
        let response = self.requests.send_request(request).await?;
        if response.status() != StatusCode::OK {
            let status = response.status();
            let body = collect(response).await.unwrap_or_default();
            anyhow::bail!("{path}: {status}: {}", String::from_utf8_lossy(&body).trim());
        }
        Ok(response)
    }

    /// Asks for the version, and checks the whole answer.
    ///
    /// # Errors
    /// The connection broke, or the answer is not exactly what it must be.
    pub async fn version(&mut self) -> Result<()> {
        let body = collect(self.request(Method::GET, "/version", 0).await?).await?;
        let is_right = body.strip_suffix(b"\n") == Some(standin::VERSION.as_bytes());
        ensure!(is_right, "/version: unexpected answer {:?}", String::from_utf8_lossy(&body));
        Ok(())
    }

    /// Ends in order, both directions.
    ///
    /// # Errors
    /// It had ended otherwise before, or the other end does not follow.
    pub async fn close(self) -> Result<()> {
        drop(self.requests);
        self.driver.await?
    }
}

/// The whole body of an answer.
///
/// # Errors
/// It broke off.
pub async fn collect(response: Response<Incoming>) -> Result<Bytes> {
    Ok(response.into_body().collect().await.context("the answer broke off")?.to_bytes())
}

type Stream<T> = TokioIo<TlsStream<T>>;

/// Moves a connection's bytes until its user is done with it, then ends it: our farewell first,
/// then the other end's. Leaving before that came would answer it with RST.
async fn drive<T>(connection: http1::Connection<Stream<T>, Payload>) -> Result<()>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let mut stream = connection.without_shutdown().await?.io.into_inner();
    stream.shutdown().await.context("ending a connection")?;
    let rest = copy(&mut stream, &mut sink()).await.context("the server's end of a connection")?;
    ensure!(rest == 0, "{rest} bytes that nobody asked for");
    Ok(())
}
