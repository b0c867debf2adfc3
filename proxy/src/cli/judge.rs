//! Judges the values of all flags together. Nothing here binds, resolves or connects.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::config::{Kubeconfig, KubeconfigError};

use super::Flags;
use crate::config::{
    Config, DEFAULT_UPSTREAM_PORT, EndpointConfig, EndpointMode, Host, HostPort, ListenAddr,
    LogFormat, PacketConfig, UpstreamAddrs,
};
use crate::relay::Wish;

/// Everything wrong with the flags, in the order found.
#[derive(Debug, Default, Clone)]
pub struct Mistakes(Vec<String>);

impl Mistakes {
    /// Notes one more.
    pub fn add(&mut self, mistake: impl Into<String>) {
        self.0.push(mistake.into());
    }

    /// Whether all is well so far.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value, or a note of what is wrong with `--flag`.
    fn take<T>(&mut self, flag: &str, result: Result<T, String>) -> Option<T> {
        result.map_err(|why| self.add(format!("--{flag}: {why}"))).ok()
    }
}

impl From<String> for Mistakes {
    fn from(mistake: String) -> Self {
        Self(vec![mistake])
    }
}

impl IntoIterator for Mistakes {
    type Item = String;
    type IntoIter = std::vec::IntoIter<String>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// Judges all flags, noting every mistake; `None` if there was one.
pub(super) fn config(flags: &Flags, mistakes: &mut Mistakes) -> Option<Config> {
    let listen = mistakes.take("listen-addr", parse_listen(&flags.listen_addr));
    let upstream = mistakes.take(
        "upstream-addr",
        match set(&flags.upstream_addr) {
            Some(text) => parse_upstreams(text),
            None => Err("is required (or env UPSTREAM_ADDR): the API server to relay to".into()),
        },
    );
    let engine = mistakes.take("engine", flags.engine.parse::<Wish>());
    let connect_timeout = mistakes.take("connect-timeout", parse_positive(&flags.connect_timeout));
    let idle_timeout = mistakes.take("idle-timeout", parse_duration(&flags.idle_timeout));
    let drain_timeout = mistakes.take("drain-timeout", parse_duration(&flags.drain_timeout));
    let max_connections =
        mistakes.take("max-connections", parse_count(&flags.max_connections, 1, 10_000_000));
    let admin = mistakes.take("admin-addr", parse_admin(&flags.admin_addr));
    let admin_socket = mistakes.take("admin-socket", parse_admin_socket(&flags.admin_socket));
    let bpffs = mistakes.take("bpffs", parse_path(&flags.bpffs));
    let max_rtt = mistakes.take("packet-max-rtt", parse_positive(&flags.packet_max_rtt));
    let keepalive = mistakes.take("packet-keepalive", parse_duration(&flags.packet_keepalive));
    let log_format = mistakes.take("log-format", parse_log_format(&flags.log_format));
    let verbosity = mistakes.take("v", parse_count(&flags.verbosity, 0, 255));
    mistakes.take("logtostderr", parse_bool(&flags.logtostderr));
    let endpoints = endpoint_config(flags, mistakes);
    refuse_ingress(flags, mistakes);
    Some(Config {
        listen: listen?,
        upstream: upstream?,
        engine: engine?,
        connect_timeout: connect_timeout?,
        idle_timeout: idle_timeout.map(|d| (!d.is_zero()).then_some(d))?,
        drain_timeout: drain_timeout?,
        max_connections: max_connections?,
        endpoints: endpoints?,
        admin: admin?,
        admin_socket: admin_socket?,
        packet: PacketConfig {
            bpffs: bpffs?,
            max_rtt: max_rtt?,
            keepalive: keepalive.map(|d| (!d.is_zero()).then_some(d))?,
            attach: flags.packet_attach,
        },
        log_format: log_format?,
        verbosity: u8::try_from(verbosity?).ok()?,
    })
}

fn endpoint_config(flags: &Flags, mistakes: &mut Mistakes) -> Option<EndpointConfig> {
    let mode = mistakes.take("endpoint-mode", parse_mode(&flags.endpoint_mode));
    let service_name = mistakes.take("service-name", parse_service_name(&flags.service_name));
    let service_port = mistakes.take("service-port", parse_port(&flags.service_port));
    let interval = mistakes.take("reconcile-interval", parse_positive(&flags.reconcile_interval));
    let kubeconfig = mistakes.take(
        "kubeconfig",
        set(&flags.kubeconfig).map(|file| parse_kubeconfig(Path::new(file))).transpose(),
    );
    let pod_ip = mistakes.take("pod-ip", set(&flags.pod_ip).map(|text| parse_ip(text)).transpose());
    Some(EndpointConfig {
        mode: mode?,
        service_name: service_name?,
        service_port: service_port?,
        reconcile_interval: interval?,
        kubeconfig: kubeconfig?,
        pod_ip: pod_ip?,
    })
}

/// Ingress mode's flags are part of the contract and are checked, but it does not exist yet:
/// relaying such a client's TLS bytes unterminated would look like an outage, so refuse early.
fn refuse_ingress(flags: &Flags, mistakes: &mut Mistakes) {
    mistakes.take("upstream-insecure", parse_bool(&flags.upstream_insecure));
    let cert = set(&flags.tls_cert_file);
    let key = set(&flags.tls_key_file);
    match (cert, key) {
        (Some(_), None) => mistakes.add("--tls-cert-file needs --tls-key-file beside it"),
        (None, Some(_)) => mistakes.add("--tls-key-file needs --tls-cert-file beside it"),
        (Some(_), Some(_)) => mistakes.add(
            "--tls-cert-file, --tls-key-file: ingress mode (terminating TLS) is not in this \
             release; without both flags TLS passes through untouched",
        ),
        // As in the original, the other TLS flags mean nothing without a certificate.
        (None, None) => {}
    }
}

/// An empty value counts as not given: manifests set empty variables freely.
fn set(value: &Option<String>) -> Option<&String> {
    value.as_ref().filter(|text| !text.trim().is_empty())
}

fn parse_listen(text: &str) -> Result<ListenAddr, String> {
    let shape = || format!("{text:?} is not an address such as \":6443\" or \"192.0.2.1:6443\"");
    if let Some(port) = text.strip_prefix(':') {
        let port = port.parse().map_err(|_| shape())?;
        return Ok(ListenAddr { ip: None, port });
    }
    let address: SocketAddr = text.parse().map_err(|_| shape())?;
    Ok(ListenAddr { ip: Some(address.ip()), port: address.port() })
}

fn parse_admin(text: &str) -> Result<Option<SocketAddr>, String> {
    if text == "off" {
        return Ok(None);
    }
    let listen = parse_listen(text)?;
    let ip = listen.ip.unwrap_or(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED));
    Ok(Some(SocketAddr::new(ip, listen.port)))
}

/// An absolute path, or `off`.
fn parse_path(text: &str) -> Result<Option<PathBuf>, String> {
    match Path::new(text) {
        _ if text == "off" => Ok(None),
        // A relative one would depend on where the process happens to be started.
        path if path.is_absolute() => Ok(Some(path.to_owned())),
        _ => Err(format!("{text:?} is neither an absolute path nor \"off\"")),
    }
}

/// The name of a unix socket fits into `sun_path`, with a zero behind it (unix(7)).
fn parse_admin_socket(text: &str) -> Result<Option<PathBuf>, String> {
    const LONGEST: usize = 107;
    match parse_path(text)? {
        Some(_) if text.len() > LONGEST => {
            Err(format!("{text:?} is too long for a unix socket (at most {LONGEST} bytes)"))
        }
        Some(_) if text.ends_with('/') => Err(format!("{text:?} names a directory")),
        path => Ok(path),
    }
}

fn parse_upstreams(text: &str) -> Result<UpstreamAddrs, String> {
    let hosts: Result<Vec<_>, _> =
        text.split(',').map(|part| parse_host_port(part.trim())).collect();
    let mut seen = Vec::new();
    for host in hosts? {
        if let Host::Ip(ip) = host.host
            && (ip.is_unspecified() || ip.is_multicast())
        {
            // Connecting to the unspecified address reaches this host: ourselves, most likely.
            return Err(format!("{ip} is no address of a server"));
        }
        if !seen.contains(&host) {
            seen.push(host);
        }
    }
    Ok(UpstreamAddrs(seen))
}

/// `host`, `host:port`, `192.0.2.1`, `[2001:db8::1]`, `[2001:db8::1]:443` or `2001:db8::1`.
fn parse_host_port(text: &str) -> Result<HostPort, String> {
    if text.contains("://") {
        return Err(format!("{text:?} has a scheme: give host or host:port"));
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        refuse_ambiguous(text, ip)?;
        return Ok(HostPort { host: Host::Ip(ip), port: DEFAULT_UPSTREAM_PORT });
    }
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) =
                rest.split_once(']').ok_or_else(|| format!("{text:?} lacks a ']'"))?;
            let ip: std::net::Ipv6Addr =
                host.parse().map_err(|_| format!("{host:?} is not an IPv6 address"))?;
            (Host::Ip(ip.into()), if rest.is_empty() { None } else { Some(rest) })
        }
        None => {
            let (name, port) = match text.split_once(':') {
                Some((name, _)) => (name, Some(&text[name.len()..])),
                None => (text, None),
            };
            (parse_host(name)?, port)
        }
    };
    let port = match port {
        None => DEFAULT_UPSTREAM_PORT,
        Some(port) => port
            .strip_prefix(':')
            .ok_or_else(|| format!("{text:?} is not host:port"))
            .and_then(parse_port)?,
    };
    Ok(HostPort { host, port })
}

/// `2001:db8::1:6443` is an address, and hardly ever the one that was meant.
fn refuse_ambiguous(text: &str, ip: IpAddr) -> Result<(), String> {
    let last = text.rsplit(':').next().unwrap_or_default();
    if ip.is_ipv6() && last.len() >= 3 && last.bytes().all(|b| b.is_ascii_digit()) {
        let address = &text[..text.len() - last.len() - 1];
        return Err(format!("{text:?} may mean [{address}]:{last} or [{text}]: use brackets"));
    }
    Ok(())
}

fn parse_host(name: &str) -> Result<Host, String> {
    if let Ok(ip) = name.parse::<IpAddr>() {
        return Ok(Host::Ip(ip));
    }
    let name = name.strip_suffix('.').unwrap_or(name).to_lowercase();
    // RFC 1123, with the underscore that some internal zones use.
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    let all_numeric = name.bytes().all(|b| b.is_ascii_digit() || b == b'.');
    if name.len() > 253 || all_numeric || !name.split('.').all(label_ok) {
        return Err(format!("{name:?} is neither a host name nor an address"));
    }
    Ok(Host::Name(name))
}

fn parse_ip(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.trim().parse().map_err(|_| format!("{text:?} is not an IP address"))?;
    Ok(ip.to_canonical())
}

fn parse_port(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(format!("{text:?} is not a port (1 to 65535)")),
    }
}

fn parse_count(text: &str, least: usize, most: usize) -> Result<usize, String> {
    match text.parse::<usize>() {
        Ok(count) if (least..=most).contains(&count) => Ok(count),
        _ => Err(format!("{text:?} is not a whole number from {least} to {most}")),
    }
}

/// What Go's `strconv.ParseBool` takes.
fn parse_bool(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err(format!("{text:?} is neither true nor false")),
    }
}

fn parse_mode(text: &str) -> Result<EndpointMode, String> {
    match text {
        "mirror" => Ok(EndpointMode::Mirror),
        "cluster-ip" => Ok(EndpointMode::ClusterIp),
        "off" => Ok(EndpointMode::Off),
        _ => Err(format!("{text:?} is none of mirror, cluster-ip, off")),
    }
}

fn parse_log_format(text: &str) -> Result<LogFormat, String> {
    match text {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        _ => Err(format!("{text:?} is neither text nor json")),
    }
}

/// A Service's name is a DNS label (RFC 1035): the API server would refuse anything else, but
/// much later and in every pass.
fn parse_service_name(text: &str) -> Result<String, String> {
    let ok = (1..=63).contains(&text.len())
        && text.starts_with(|c: char| c.is_ascii_lowercase())
        && !text.ends_with('-')
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if ok { Ok(text.to_owned()) } else { Err(format!("{text:?} cannot be the name of a Service")) }
}

/// A file that holds a kubeconfig. What it holds is never shown: tokens are among it.
fn parse_kubeconfig(file: &Path) -> Result<PathBuf, String> {
    let shown = file.display();
    match Kubeconfig::read_from(file) {
        Ok(_) => Ok(file.to_owned()),
        Err(KubeconfigError::ReadConfig(error, _)) => Err(format!("cannot read {shown}: {error}")),
        Err(_) => Err(format!("{shown} is no kubeconfig: it cannot be parsed")),
    }
}

fn parse_positive(text: &str) -> Result<Duration, String> {
    match parse_duration(text)? {
        Duration::ZERO => Err(format!("{text:?} must be more than zero")),
        duration => Ok(duration),
    }
}

/// Go's `time.ParseDuration`, without negative values: `300ms`, `1.5h`, `2h45m`, `0`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a duration such as \"30s\", \"1m30s\" or \"500ms\"");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    let mut total = Duration::ZERO;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, tail) = rest.split_at(digits);
        let unit_len = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_len);
        let seconds = match unit {
            "ns" => 1e-9,
            "us" | "µs" | "μs" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let part = Duration::try_from_secs_f64(number * seconds).map_err(|_| wrong())?;
        total = total.checked_add(part).ok_or_else(wrong)?;
        rest = tail;
    }
    // Timers add durations to clocks; a century is as good as for ever and cannot overflow.
    Ok(total.min(Duration::from_secs(100 * 365 * 86_400)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        let millis = |text| parse_duration(text).map(|d| d.as_millis());
        assert_eq!(millis("1m30s"), Ok(90_000));
        assert_eq!(millis("1.5h"), Ok(5_400_000));
        assert_eq!(millis("0"), Ok(0));
        assert_eq!(millis("0s"), Ok(0));
        assert_eq!(millis("500ms"), Ok(500));
        assert_eq!(millis("1000us"), Ok(1));
        assert_eq!(millis(".5s"), Ok(500));
        for wrong in ["", "5", "-5s", "5 s", "s", "5x", "1.2.3s", "1m30", "nan s", "infs", "1e3s"] {
            assert!(parse_duration(wrong).is_err(), "{wrong:?} was accepted");
        }
    }

    #[test]
    fn an_upstream_may_be_a_name_or_an_address_of_either_family() {
        let shown = |text| parse_upstreams(text).map(|all| all.to_string());
        assert_eq!(shown("api.example"), Ok("api.example:6443".into()));
        assert_eq!(shown("API.example.:443"), Ok("api.example:443".into()));
        assert_eq!(shown("192.0.2.1"), Ok("192.0.2.1:6443".into()));
        assert_eq!(shown("2001:db8::1"), Ok("[2001:db8::1]:6443".into()));
        assert_eq!(shown("[2001:db8::1]"), Ok("[2001:db8::1]:6443".into()));
        assert_eq!(shown("[2001:db8::1]:443"), Ok("[2001:db8::1]:443".into()));
        assert_eq!(shown("a, b:443 ,a"), Ok("a:6443,b:443".into()));
        for wrong in [
            "",
            ",",
            "a,",
            ":443",
            "a:",
            "a:0",
            "a:65536",
            "a:https",
            "https://a",
            "a b",
            "[::1",
            "[a]:1",
            "[::1]443",
            "300.1.1.1",
            "-a",
            "a..b",
            "a:1:2",
        ] {
            assert!(parse_upstreams(wrong).is_err(), "{wrong:?} was accepted");
        }
    }

    #[test]
    fn a_kubeconfig_must_be_one_and_is_never_shown() {
        let folder = std::env::temp_dir();
        let file = folder.join(format!("kubeconfig-{}", std::process::id()));
        std::fs::write(&file, "users:\n- user: {token: SECRET\n  name: [").expect("writes");
        let broken = parse_kubeconfig(&file).expect_err("is broken");
        std::fs::remove_file(&file).expect("was there");
        assert!(broken.contains("cannot be parsed") && !broken.contains("SECRET"), "{broken}");
        assert!(parse_kubeconfig(&file).expect_err("is gone").contains("cannot read"));
        assert!(parse_kubeconfig(&folder).is_err(), "a folder was accepted");
    }

    #[test]
    fn paths_are_absolute_or_off() {
        assert_eq!(parse_path("off"), Ok(None));
        assert_eq!(parse_path("/a/b"), Ok(Some("/a/b".into())));
        for wrong in ["", "a", "./off", "~/a"] {
            assert!(parse_path(wrong).is_err(), "{wrong:?} was accepted");
        }
        let long = |length: usize| format!("/{}", "a".repeat(length - 1));
        assert!(parse_admin_socket(&long(107)).is_ok());
        for wrong in [long(108), "/run/x/".into(), "a".into()] {
            assert!(parse_admin_socket(&wrong).is_err(), "{wrong:?} was accepted");
        }
        assert_eq!(parse_admin_socket("off"), Ok(None));
    }

    #[test]
    fn a_listen_address_names_all_addresses_or_one() {
        assert_eq!(parse_listen(":6443"), Ok(ListenAddr { ip: None, port: 6443 }));
        assert_eq!(parse_listen("[::1]:1").map(|l| l.to_string()), Ok("[::1]:1".into()));
        for wrong in ["6443", "a:1", ":", ":x", "1.2.3.4", ""] {
            assert!(parse_listen(wrong).is_err(), "{wrong:?} was accepted");
        }
    }
}
