//! One validated configuration: what the parts are wired with. `cli/judge.rs` makes it from flags.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use crate::packet::attach::Method;
use crate::relay::Wish;

/// Port of an upstream that names none: the API server's own default.
pub const DEFAULT_UPSTREAM_PORT: u16 = 6443;

/// Where the kernel engines pin what must outlive a process, unless `--bpffs` says otherwise.
pub const DEFAULT_BPFFS: &str = "/sys/fs/bpf/steward-tcp-proxy";

/// Where the verb `connections` finds a proxy, unless `--admin-socket` says otherwise.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/steward-tcp-proxy/admin.sock";

/// Namespace of our own Service; the add-on that installs us always uses this one.
pub const SERVICE_NAMESPACE: &str = "kube-system";

/// All that was asked for, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where clients are accepted.
    pub listen: ListenAddr,
    /// The real API server.
    pub upstream: UpstreamAddrs,
    /// The engine that was asked for.
    pub engine: Wish,
    /// Time to reach the upstream, over all its addresses.
    pub connect_timeout: Duration,
    /// End a connection that moved no byte for this long.
    pub idle_timeout: Option<Duration>,
    /// After SIGTERM, how long live connections may go on.
    pub drain_timeout: Duration,
    /// Connections relayed at once.
    pub max_connections: usize,
    /// What to do about `default/kubernetes`.
    pub endpoints: EndpointConfig,
    /// Where metrics and health are served; `None` for nowhere.
    pub admin: Option<SocketAddr>,
    /// Unix socket of the verb `connections`; `None` for none.
    pub admin_socket: Option<PathBuf>,
    /// What the `packet` engine is wired with.
    pub packet: PacketConfig,
    /// How logs are written.
    pub log_format: LogFormat,
    /// klog's verbosity.
    pub verbosity: u8,
}

/// What the `packet` engine needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PacketConfig {
    /// Directory of a bpffs for pins; `None` for none.
    pub bpffs: Option<PathBuf>,
    /// Connections with a longer round trip than this, on either side, stay with the userspace
    /// engines: their TCP ends shorten the way that a lost segment has to be repeated on.
    pub max_rtt: Duration,
    /// How long an end may be silent before it is asked whether it is still there.
    pub keepalive: Option<Duration>,
    /// How programs are attached to devices.
    pub attach: Method,
}

/// What the reconciler needs to know.
#[derive(Debug, Clone)]
pub struct EndpointConfig {
    /// Where the endpoints point to.
    pub mode: EndpointMode,
    /// Name of our own Service, in [`SERVICE_NAMESPACE`].
    pub service_name: String,
    /// Port published with each address.
    pub service_port: u16,
    /// How often all is compared anew, beside the watches.
    pub reconcile_interval: Duration,
    /// Credentials; `None` for those of the pod.
    pub kubeconfig: Option<PathBuf>,
    /// Address of this pod (the node's, under hostNetwork).
    pub pod_ip: Option<IpAddr>,
}

/// Where the endpoints of `default/kubernetes` point to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndpointMode {
    /// The ready endpoints of our own Service.
    Mirror,
    /// The ClusterIP of our own Service, as the original did.
    ClusterIp,
    /// Nothing is written.
    Off,
}

impl EndpointMode {
    /// The name on the command line and in metrics.
    #[must_use]
    pub fn as_label(self) -> &'static str {
        match self {
            Self::Mirror => "mirror",
            Self::ClusterIp => "cluster-ip",
            Self::Off => "off",
        }
    }
}

/// How logs are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// An address to listen on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ListenAddr {
    /// `None` for every address of both families.
    pub ip: Option<IpAddr>,
    /// 0 lets the kernel choose, which only tests want.
    pub port: u16,
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.ip {
            None => write!(f, ":{}", self.port),
            Some(ip) => write!(f, "{}", SocketAddr::new(ip, self.port)),
        }
    }
}

/// A host of the upstream: a name still to be resolved, or an address.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Host {
    /// A DNS name, in lower case and without a final dot.
    Name(String),
    /// A literal address.
    Ip(IpAddr),
}

/// One entry of `--upstream-addr`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct HostPort {
    /// Name or address.
    pub host: Host,
    /// TCP port.
    pub port: u16,
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            Host::Name(name) => write!(f, "{name}:{}", self.port),
            Host::Ip(ip) => write!(f, "{}", SocketAddr::new(*ip, self.port)),
        }
    }
}

/// All of `--upstream-addr`, in order of preference; never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamAddrs(pub Vec<HostPort>);

impl fmt::Display for UpstreamAddrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, host) in self.0.iter().enumerate() {
            write!(f, "{}{host}", if i == 0 { "" } else { "," })?;
        }
        Ok(())
    }
}
