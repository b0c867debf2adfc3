//! The API server's stand-in: a real HTTPS server with a certificate of its own, made at start.
//!
//! It runs as a process of its own (`cargo xtask demo --as-server`), on the server host.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http_body_util::channel::{Channel, Sender};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType};
use rustix::time::{ClockId, clock_gettime};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::payload::{Check, Payload};

/// The name in the certificate, by which pods call their API server.
pub const NAME: &str = "kubernetes.default.svc";

/// What `GET /version` answers.
pub const VERSION: &str =
    r#"{"major":"1","minor":"33","gitVersion":"v1.33.0-stand-in","platform":"linux/amd64"}"#;

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;

/// Nanoseconds of the clock that all processes of one machine share.
pub fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// Serves until killed. Its one line on stdout tells the address and the CA's certificate (PEM).
///
/// # Errors
/// The address cannot be bound.
pub fn serve(address: SocketAddr) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let (ca, acceptor) = identity(address.ip())?;
        let listener = TcpListener::bind(address).await?;
        println!("{}", json!({ "address": listener.local_addr()?, "ca": ca }));
        loop {
            // Without descriptors accept fails at once, again and again.
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            tokio::spawn(connection(stream, acceptor.clone()));
        }
    })
}

/// A CA as a cluster has one, and a certificate signed by it.
fn identity(ip: IpAddr) -> Result<(String, TlsAcceptor)> {
    let mut ca = CertificateParams::default();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    ca.distinguished_name.push(DnType::CommonName, "demo cluster CA");
    let ca_key = KeyPair::generate()?;
    let ca_certificate = ca.self_signed(&ca_key)?;
    let issuer = Issuer::new(ca, ca_key);

    let mut leaf = CertificateParams::new(vec![NAME.to_owned(), "kubernetes".to_owned()])?;
    leaf.distinguished_name.push(DnType::CommonName, "kube-apiserver");
    leaf.subject_alt_names.push(SanType::IpAddress(ip));
    let key = KeyPair::generate()?;
    let certificate = leaf.signed_by(&key, &issuer)?;

    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)?;
    Ok((ca_certificate.pem(), TlsAcceptor::from(Arc::new(config))))
}

/// Errors end the connection, which its client notices.
async fn connection(stream: TcpStream, acceptor: TlsAcceptor) {
    let _ = stream.set_nodelay(true);
    if let Ok(stream) = acceptor.accept(stream).await {
        let connection = http1::Builder::new();
        let _ = connection.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
    }
}

async fn answer(request: Request<Incoming>) -> Result<Answer, Infallible> {
    let query = request.uri().query().unwrap_or_default().to_owned();
    let number = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).and_then(|(_, value)| value.parse::<u64>().ok())
    };
    Ok(match (request.method(), request.uri().path()) {
        (&Method::GET, "/version") => text(StatusCode::OK, VERSION.to_owned()),
        (&Method::GET, "/watch") => {
            let (sender, body) = Channel::new(1);
            let every = Duration::from_millis(number("every_ms").unwrap_or(100).max(1));
            tokio::spawn(send_events(sender, number("events").unwrap_or(30), every));
            Response::new(body.boxed_unsync())
        }
        (&Method::GET, "/bulk") => {
            Response::new(Payload::new(number("bytes").unwrap_or_default()).boxed_unsync())
        }
        (&Method::PUT | &Method::POST, "/bulk") => match receive(request.into_body()).await {
            Ok(bytes) => text(StatusCode::OK, json!({ "bytes": bytes }).to_string()),
            Err(error) => failure(StatusCode::UNPROCESSABLE_ENTITY, &format!("{error:#}")),
        },
        _ => failure(StatusCode::NOT_FOUND, "try /version, /watch or /bulk"),
    })
}

/// Refusals look like those of an API server.
fn failure(code: StatusCode, message: &str) -> Answer {
    let code_number = code.as_u16();
    let status = json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure",
                         "message": message, "code": code_number });
    text(code, status.to_string())
}

fn text(code: StatusCode, json: String) -> Answer {
    let mut response = Response::new(Full::from(json + "\n").boxed_unsync());
    *response.status_mut() = code;
    response
}

/// One JSON object per line, each with its number and the moment at which it was sent.
async fn send_events(mut to: Sender<Bytes>, events: u64, every: Duration) {
    let mut pace = tokio::time::interval(every);
    for number in 1..=events {
        pace.tick().await;
        if to.send_data(Bytes::from(format!("{}\n", event(number)))).await.is_err() {
            return;
        }
    }
}

fn event(number: u64) -> Value {
    json!({
        "type": "MODIFIED",
        "object": {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {
                "name": "demo",
                "namespace": "default",
                "resourceVersion": number.to_string(),
                "annotations": { "sent": now().to_string() },
            },
        },
    })
}

/// The length of an upload whose every byte is right.
async fn receive(mut body: Incoming) -> Result<u64> {
    let mut check = Check::default();
    while let Some(frame) = body.frame().await {
        if let Some(data) = frame.context("the upload broke off")?.data_ref() {
            check.take(data)?;
        }
    }
    Ok(check.bytes)
}
