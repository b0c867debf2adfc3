//! The command line: Go's flag syntax in, one validated [`Config`] out.
//!
//! The program replaces a Go one whose manifests must keep working, so flags are read as Go's
//! `flag` package reads them: one dash or two, `-flag=value` or `-flag value`, booleans only as
//! `-flag` or `-flag=value`, and the last of several wins. clap holds the definitions and writes
//! the help; `normalize` brings Go's spelling into clap's and collects what neither knows.

mod judge;
mod verbs;

use std::ffi::OsString;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};

use crate::config::{Config, DEFAULT_ADMIN_SOCKET, DEFAULT_BPFFS};
use crate::packet::attach::Method;
pub use judge::Mistakes;
pub use verbs::{CheckFlags, CleanupFlags, ConnectionsFlags, ConnectionsVerb, KillFlags, Output};

/// The flags of the proxy. All values stay text here: `judge.rs` judges them
/// together, so that every mistake is reported at once.
#[derive(Parser, Debug, Clone)]
#[command(
    name = "steward-tcp-proxy",
    version = crate::VERSION,
    about = "Relays a tenant cluster's API connections to its hosted control plane",
    args_override_self = true,
    after_help = "Verbs, each with a --help of its own:\n  \
                  check        show what this kernel and these privileges allow\n  \
                  connections  list or kill the connections of a running proxy\n  \
                  cleanup      remove what kernel engines have left in the kernel\n\n\
                  Flags may be written as in Go: -flag=value, --flag=value or --flag value."
)]
pub struct Flags {
    /// Address to accept clients on; ":6443" means every address, IPv4 and IPv6
    #[arg(long, value_name = "ADDR", default_value = ":6443", help_heading = "Relay")]
    pub listen_addr: String,

    /// The real API server: host or host:port (port 6443 if none), several separated by commas,
    /// preferred in this order
    #[arg(long, value_name = "ADDR[,ADDR]", env = "UPSTREAM_ADDR", help_heading = "Relay")]
    pub upstream_addr: Option<String>,

    /// How bytes move: packet (by the kernel alone), splice, copy, or auto: packet where it works
    /// and for each connection that it fits, else splice
    #[arg(long, value_name = "ENGINE", default_value = "auto", help_heading = "Relay")]
    pub engine: String,

    /// Directory of a bpffs that the packet engine pins to; "off" for none
    #[arg(long, value_name = "PATH", default_value = DEFAULT_BPFFS, help_heading = "Relay")]
    pub bpffs: String,

    /// The packet engine leaves connections with a longer round trip to the other engines
    #[arg(long, value_name = "DURATION", default_value = "4ms", help_heading = "Relay")]
    pub packet_max_rtt: String,

    /// Ends of connections in the kernel are asked after so long a silence, and count as gone after
    /// three times as long; 0 means never
    #[arg(long, value_name = "DURATION", default_value = "200s", help_heading = "Relay")]
    pub packet_keepalive: String,

    /// How programs are attached to devices: best, or clsact as on kernels before 6.6. To try what
    /// such a kernel does; there is no other reason to choose
    #[arg(
        long,
        value_name = "WAY",
        value_enum,
        default_value = "best",
        hide = true,
        help_heading = "Relay"
    )]
    pub packet_attach: Method,

    /// Time to reach the upstream, over all its addresses, before a client is refused
    #[arg(long, value_name = "DURATION", default_value = "5s", help_heading = "Relay")]
    pub connect_timeout: String,

    /// End a connection that moved no byte for this long; 0 means never
    #[arg(long, value_name = "DURATION", default_value = "0", help_heading = "Relay")]
    pub idle_timeout: String,

    /// After SIGTERM, how long live connections may go on before they are reset
    #[arg(long, value_name = "DURATION", default_value = "30s", help_heading = "Relay")]
    pub drain_timeout: String,

    /// Connections relayed at once; more are refused
    #[arg(long, value_name = "N", default_value = "10000", help_heading = "Relay")]
    pub max_connections: String,

    /// Where endpoints of default/kubernetes point to: mirror, cluster-ip or off
    #[arg(long, value_name = "MODE", default_value = "mirror", help_heading = "Endpoints")]
    pub endpoint_mode: String,

    /// Name of our own Service, in namespace kube-system
    #[arg(
        long,
        value_name = "NAME",
        default_value = "steward-tcp-proxy",
        help_heading = "Endpoints"
    )]
    pub service_name: String,

    /// Port that our endpoints are published with
    #[arg(long, value_name = "PORT", default_value = "6443", help_heading = "Endpoints")]
    pub service_port: String,

    /// How often all is compared anew, beside the watches
    #[arg(long, value_name = "DURATION", default_value = "30s", help_heading = "Endpoints")]
    pub reconcile_interval: String,

    /// Credentials for the API server; without it those of the pod are used
    #[arg(long, value_name = "FILE", help_heading = "Endpoints")]
    pub kubeconfig: Option<String>,

    /// Address of this pod, published while our Service has no endpoints yet
    #[arg(long, value_name = "IP", env = "POD_IP", help_heading = "Endpoints")]
    pub pod_ip: Option<String>,

    /// Serving certificate, PEM; selects ingress mode together with --tls-key-file
    #[arg(long, value_name = "FILE", env = "TLS_CERT_FILE", help_heading = "Ingress mode")]
    pub tls_cert_file: Option<String>,

    /// Key of the serving certificate, PEM
    #[arg(long, value_name = "FILE", env = "TLS_KEY_FILE", help_heading = "Ingress mode")]
    pub tls_key_file: Option<String>,

    /// Server name sent to the upstream; the host of --upstream-addr if not given
    #[arg(long, value_name = "NAME", help_heading = "Ingress mode")]
    pub upstream_sni: Option<String>,

    /// Do not verify the upstream's certificate
    #[arg(long, value_name = "BOOL", default_value = "false", default_missing_value = "true",
          num_args = 0..=1, require_equals = true, help_heading = "Ingress mode")]
    pub upstream_insecure: String,

    /// Address of /metrics, /healthz, /readyz and /version; "off" for none
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:6480", help_heading = "Operation")]
    pub admin_addr: String,

    /// Unix socket that the verb "connections" talks to; "off" for none
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET,
          help_heading = "Operation")]
    pub admin_socket: String,

    /// text or json
    #[arg(long, value_name = "FORMAT", default_value = "text", help_heading = "Operation")]
    pub log_format: String,

    /// Verbosity as in klog: 0 and up; 4 shows debug messages, 6 traces
    #[arg(long = "v", value_name = "N", default_value = "0", help_heading = "Operation")]
    pub verbosity: String,

    /// Accepted for compatibility with klog; logs always go to stderr
    #[arg(long, value_name = "BOOL", default_value = "true", default_missing_value = "true",
          num_args = 0..=1, require_equals = true, help_heading = "Operation")]
    pub logtostderr: String,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Run the proxy.
    Proxy(Box<Config>),
    /// Show what this kernel and these privileges allow.
    Check(CheckFlags),
    /// List or kill the connections of a running proxy.
    Connections(ConnectionsFlags),
    /// Remove what kernel engines have left in the kernel.
    Cleanup(CleanupFlags),
    /// Print this text (help, version) to stdout and end with status 0.
    Print(String),
}

/// Reads the process's arguments (without the program's name) and environment.
///
/// # Errors
/// All mistakes in the flags at once, ready to be shown one per line.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, Mistakes> {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Some(parsed) = verbs::parse(&args) {
        return parsed.or_else(|error| clap_outcome(&error));
    }
    let mut mistakes = Mistakes::default();
    let normal = normalize(&Flags::command(), args, &mut mistakes);
    let program = std::iter::once(OsString::from("steward-tcp-proxy"));
    let parsed = Flags::command().try_get_matches_from(program.chain(normal));
    match parsed.and_then(|matches| Flags::from_arg_matches(&matches)) {
        Ok(flags) => match judge::config(&flags, &mut mistakes) {
            Some(config) if mistakes.is_empty() => Ok(Invocation::Proxy(Box::new(config))),
            _ => Err(mistakes),
        },
        Err(error) => clap_outcome(&error),
    }
}

/// Help and version are no mistakes; everything else is one.
fn clap_outcome(error: &clap::Error) -> Result<Invocation, Mistakes> {
    if error.use_stderr() {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end();
        Err(Mistakes::from(text.to_owned()))
    } else {
        Ok(Invocation::Print(error.to_string()))
    }
}

/// Brings Go's spelling of flags into `--name=value`, noting what is unknown or incomplete.
fn normalize(
    command: &clap::Command,
    args: Vec<OsString>,
    mistakes: &mut Mistakes,
) -> Vec<OsString> {
    let mut normal = Vec::with_capacity(args.len());
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let Some(text) = arg.to_str() else {
            mistakes.add(format!("argument {arg:?} is not UTF-8"));
            continue;
        };
        let Some(flag) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')) else {
            mistakes.add(format!("unexpected argument {text:?}: flags start with a dash"));
            continue;
        };
        let (name, value) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        if value.is_none() && matches!(name, "h" | "help" | "V" | "version") {
            let long = if name.starts_with(['h']) { "--help" } else { "--version" };
            normal.push(long.into());
            continue;
        }
        let known = command.get_arguments().find(|a| a.get_long() == Some(name));
        let Some(known) = known.filter(|_| !name.is_empty()) else {
            mistakes.add(format!("unknown flag {text:?}{}", nearest(command, name)));
            continue;
        };
        let is_switch = known.get_num_args().is_some_and(|n| n.min_values() == 0)
            || matches!(known.get_action(), ArgAction::SetTrue);
        let value = match value {
            Some(value) => value,
            None if is_switch => "true".to_owned(),
            None => match args.next() {
                Some(value) => value.to_string_lossy().into_owned(),
                None => {
                    mistakes.add(format!("flag --{name} needs a value"));
                    continue;
                }
            },
        };
        normal.push(format!("--{name}={value}").into());
    }
    normal
}

/// " (did you mean --x?)" for a misspelt flag, else nothing.
fn nearest(command: &clap::Command, name: &str) -> String {
    let squeezed = |text: &str| text.replace(['-', '_'], "").to_lowercase();
    let wanted = squeezed(name);
    command
        .get_arguments()
        .filter_map(clap::Arg::get_long)
        .find(|long| {
            let long = squeezed(long);
            !wanted.is_empty() && (long == wanted || long.starts_with(&wanted))
        })
        .map(|long| format!(" (did you mean --{long}?)"))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::relay::Wish;

    fn parse_all(args: &[&str]) -> Result<Invocation, Mistakes> {
        parse(args.iter().map(OsString::from))
    }

    fn config(args: &[&str]) -> Config {
        match parse_all(args) {
            Ok(Invocation::Proxy(config)) => *config,
            other => panic!("{args:?} gave {other:?}"),
        }
    }

    fn mistakes(args: &[&str]) -> Vec<String> {
        match parse_all(args) {
            Err(mistakes) => mistakes.into_iter().collect(),
            Ok(other) => panic!("{args:?} gave {other:?}"),
        }
    }

    #[test]
    fn go_spellings_mean_the_same() {
        for args in [
            &["--upstream-addr=api.example:443", "--connect-timeout=1m30s"][..],
            &["-upstream-addr=api.example:443", "-connect-timeout", "1m30s"],
            &["--upstream-addr", "api.example:443", "-connect-timeout=1.5m"],
        ] {
            let config = config(args);
            assert_eq!(config.upstream.to_string(), "api.example:443");
            assert_eq!(config.connect_timeout, Duration::from_secs(90));
        }
    }

    #[test]
    fn stewards_manifest_is_accepted_as_it_is() {
        let config = config(&["--upstream-addr=203.0.113.7:6443", "--listen-addr=:6443", "-v=2"]);
        assert_eq!(config.listen.to_string(), ":6443");
        assert_eq!(config.engine, Wish::Auto);
        assert_eq!(config.verbosity, 2);
    }

    #[test]
    fn klog_flags_are_accepted_and_the_last_of_several_wins() {
        let config = config(&["-logtostderr", "-v", "1", "--upstream-addr=a", "-v=5"]);
        assert_eq!(config.verbosity, 5);
    }

    #[test]
    fn every_mistake_is_reported_in_one_go() {
        let found = mistakes(&[
            "--listen-adr=:1",
            "--engine=sockmap",
            "--connect-timeout=5",
            "--service-port=70000",
            "--max-connections=none",
            "--tls-cert-file=/tls.crt",
            "stray",
        ]);
        for part in [
            "listen-adr",
            "sockmap",
            "--connect-timeout",
            "--service-port",
            "--max-connections",
            "--tls-key-file",
            "stray",
            "--upstream-addr",
        ] {
            assert!(found.iter().any(|m| m.contains(part)), "{part} missing in {found:#?}");
        }
        assert_eq!(found.len(), 8, "{found:#?}");
    }

    #[test]
    fn help_and_version_are_printed_not_refused() {
        for args in [["--help"], ["-h"], ["--version"], ["-version"]] {
            assert!(matches!(parse_all(&args), Ok(Invocation::Print(_))), "{args:?}");
        }
    }

    #[test]
    fn a_misspelt_flag_is_met_with_the_right_one() {
        let found = mistakes(&["--upstreamaddr=a", "--upstream-addr=a"]);
        assert!(found[0].contains("did you mean --upstream-addr"), "{found:?}");
    }
}
