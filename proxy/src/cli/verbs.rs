//! The verbs beside running the proxy: `check`, `connections`, `cleanup`.
//!
//! They are new in this program, so their flags are spelt as clap spells them.

use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::Invocation;
use crate::config::{DEFAULT_ADMIN_SOCKET, DEFAULT_BPFFS};
use crate::control::{Client, Which};

/// The flags of `check`.
#[derive(Parser, Debug, Clone)]
#[command(
    name = "steward-tcp-proxy check",
    about = "Shows what this kernel and these privileges allow, naming the closed gate of each \
             row that fails; exit status 0 if all that the kernel engines need is there, else 1"
)]
pub struct CheckFlags {
    /// Table for people, JSON for programs
    #[arg(long, value_enum, default_value = "table")]
    pub output: Output,

    /// Show the kernel programs' debug messages
    #[arg(long, short)]
    pub verbose: bool,
}

/// How a verb prints what it found.
#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Output {
    /// Aligned columns.
    Table,
    /// One JSON object.
    Json,
}

/// The flags of `connections`.
#[derive(Parser, Debug, Clone)]
#[command(
    name = "steward-tcp-proxy connections",
    about = "Lists or kills the connections of the proxy that runs on this host"
)]
pub struct ConnectionsFlags {
    /// The proxy's --admin-socket
    #[arg(long, value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET, global = true)]
    pub admin_socket: PathBuf,

    /// What to do.
    #[command(subcommand)]
    pub verb: ConnectionsVerb,
}

/// What `connections` does.
#[derive(Subcommand, Debug, Clone)]
pub enum ConnectionsVerb {
    /// Show the connections that the kernel relays; exit status 0, or 1 if no proxy answers
    List {
        /// Table for people, JSON for programs
        #[arg(long, value_enum, default_value = "table")]
        output: Output,
    },
    /// Reset connections, both ways; exit status 0, or 1 if one that was named is not there
    Kill(KillFlags),
}

/// Which connections `connections kill` ends.
#[derive(Args, Debug, Clone)]
#[group(required = true, multiple = false)]
pub struct KillFlags {
    /// By their ids, as `connections list` shows them
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,

    /// Those of one client: of an address, or with its port just that one; of IPv6 in brackets
    #[arg(long, value_name = "IP[:PORT]")]
    pub client: Option<Client>,

    /// All of them
    #[arg(long)]
    pub all: bool,
}

impl KillFlags {
    /// What was chosen; clap has seen to it that it is one of the three.
    #[must_use]
    pub fn which(&self) -> Which {
        match self.client {
            Some(client) => Which::Client(client),
            None if self.all => Which::All(true),
            None => Which::Ids(self.ids.clone()),
        }
    }
}

/// The flags of `cleanup`.
#[derive(Parser, Debug, Clone)]
#[command(
    name = "steward-tcp-proxy cleanup",
    about = "Removes what kernel engines have left in the kernel, after the last proxy of this \
             host has ended; exit status 0 if nothing of it is left"
)]
pub struct CleanupFlags {
    /// The proxy's --bpffs
    #[arg(long, value_name = "PATH", default_value = DEFAULT_BPFFS)]
    pub bpffs: PathBuf,
}

impl std::str::FromStr for Client {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Self { ip: address.ip().to_canonical(), port: Some(address.port()) });
        }
        let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        match bare.parse::<IpAddr>() {
            Ok(ip) => Ok(Self { ip: ip.to_canonical(), port: None }),
            Err(_) => Err(format!("{text:?} is neither an IP address nor one with a port")),
        }
    }
}

/// What a verb asks for; `None` if the arguments begin with none.
pub(super) fn parse(args: &[OsString]) -> Option<Result<Invocation, clap::Error>> {
    let verb = args.first()?.to_str()?;
    let all =
        || std::iter::once(format!("steward-tcp-proxy {verb}").into()).chain(args[1..].to_vec());
    Some(match verb {
        "check" => CheckFlags::try_parse_from(all()).map(Invocation::Check),
        "connections" => ConnectionsFlags::try_parse_from(all()).map(Invocation::Connections),
        "cleanup" => CleanupFlags::try_parse_from(all()).map(Invocation::Cleanup),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connections(args: &[&str]) -> Result<ConnectionsFlags, String> {
        let args: Vec<OsString> = ["connections"].iter().chain(args).map(OsString::from).collect();
        match parse(&args) {
            Some(Ok(Invocation::Connections(flags))) => Ok(flags),
            Some(Err(error)) => Err(error.to_string()),
            other => panic!("{args:?} gave {other:?}"),
        }
    }

    fn which(args: &[&str]) -> Which {
        match connections(&[&["kill"], args].concat()).expect("well-formed").verb {
            ConnectionsVerb::Kill(flags) => flags.which(),
            other => panic!("{args:?} gave {other:?}"),
        }
    }

    #[test]
    fn a_kill_names_its_connections_in_one_way() {
        let client = |ip: &str, port| Which::Client(Client { ip: ip.parse().expect("ip"), port });
        assert_eq!(which(&["1", "b"]), Which::Ids(vec!["1".into(), "b".into()]));
        assert_eq!(which(&["--client=192.0.2.1"]), client("192.0.2.1", None));
        assert_eq!(which(&["--client", "192.0.2.1:5"]), client("192.0.2.1", Some(5)));
        assert_eq!(which(&["--client=2001:db8::1"]), client("2001:db8::1", None));
        assert_eq!(which(&["--client=[2001:db8::1]"]), client("2001:db8::1", None));
        assert_eq!(which(&["--client=[2001:db8::1]:5"]), client("2001:db8::1", Some(5)));
        assert_eq!(which(&["--client=[::ffff:192.0.2.1]:5"]), client("192.0.2.1", Some(5)));
        assert_eq!(which(&["--all"]), Which::All(true));
        for wrong in [&[][..], &["1", "--all"], &["--all", "--client=::1"], &["--client=a"]] {
            assert!(connections(&[&["kill"], wrong].concat()).is_err(), "{wrong:?} was accepted");
        }
    }

    #[test]
    fn the_socket_may_be_named_before_or_behind_the_verb() {
        for args in [["--admin-socket=/x", "list"], ["list", "--admin-socket=/x"]] {
            assert_eq!(connections(&args).expect("well-formed").admin_socket, PathBuf::from("/x"));
        }
        let default = connections(&["list"]).expect("well-formed");
        assert_eq!(default.admin_socket, PathBuf::from(DEFAULT_ADMIN_SOCKET));
        assert!(connections(&[]).is_err(), "nothing to do was accepted");
    }

    #[test]
    fn a_flag_is_no_verb() {
        assert!(parse(&[]).is_none() && parse(&["--upstream-addr=check".into()]).is_none());
    }
}
