//! The ways from client to server: none in between, our engines, and other proxies.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use super::meter::Meter;
use crate::lab::Lab;
use crate::shell::{say, which};

/// All ways that can take part, as they are shown.
pub const NAMES: [&str; 7] = ["direct", "packet", "splice", "copy", "nginx", "haproxy", "envoy"];

/// Those that are not ours.
pub const PEERS: [&str; 3] = ["nginx", "haproxy", "envoy"];

/// A way to the server.
pub struct Way {
    /// Its name in the table.
    pub name: &'static str,
    /// Which of the labs it is in.
    pub lab: usize,
    /// Where clients connect to.
    pub address: SocketAddr,
    /// Tells what it costs.
    pub meter: Meter,
    /// Ended when this is dropped.
    _process: Option<Child>,
    /// Its configuration, which it may read late, and its log.
    _folder: Option<TempDir>,
}

/// Starts every way of `wanted` that is there. `labs` tells where: kernel engines watch every
/// packet of their node, so they are in a lab of their own and cost the others nothing.
///
/// # Errors
/// One does not come up.
pub fn start(labs: &[(&Lab, &[&'static str])], proxy: &Path, wanted: &[&str]) -> Result<Vec<Way>> {
    let mut ways = Vec::new();
    for (index, (lab, names)) in labs.iter().enumerate() {
        for (port, name) in (7001..).zip(names.iter().copied()) {
            if !wanted.contains(&name) {
                continue;
            }
            let started = Starter { lab, index, name, port }.start(proxy)?;
            ways.extend(started);
        }
    }
    // As they are shown, not lab by lab.
    ways.sort_by_key(|way| wanted.iter().position(|name| *name == way.name));
    Ok(ways)
}

struct Starter<'a> {
    lab: &'a Lab,
    index: usize,
    name: &'static str,
    port: u16,
}

impl Starter<'_> {
    /// `None`, and a word, if it is not there.
    fn start(&self, proxy: &Path) -> Result<Option<Way>> {
        match self.name {
            "direct" => Ok(Some(Way {
                name: self.name,
                lab: self.index,
                address: self.origin(),
                meter: Meter::none(),
                _process: None,
                _folder: None,
            })),
            "packet" => match self.ours(proxy) {
                Ok(way) => Ok(Some(way)),
                Err(error) => {
                    say(&format!("bench: packet takes no part: {error:#}"));
                    Ok(None)
                }
            },
            "auto" | "splice" | "copy" => Ok(Some(self.ours(proxy)?)),
            _ => match which(self.name) {
                Some(program) => Ok(Some(self.other(&program)?)),
                None => {
                    say(&format!("bench: {} is not installed and takes no part", self.name));
                    Ok(None)
                }
            },
        }
    }

    fn origin(&self) -> SocketAddr {
        SocketAddr::new(self.lab.plan.server, self.lab.plan.server_port)
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::new(self.lab.plan.node, self.port)
    }

    fn ours(&self, proxy: &Path) -> Result<Way> {
        let mut command = Command::new(proxy);
        command.args([
            format!("--listen-addr={}", self.address()),
            format!("--upstream-addr={}", self.origin()),
            format!("--engine={}", self.name),
            "--endpoint-mode=off".to_owned(),
            "--admin-addr=off".to_owned(),
            "--admin-socket=off".to_owned(),
            "--bpffs=off".to_owned(),
        ]);
        // None of the others writes a line for each connection, unless told to.
        command.env("RUST_LOG", "info,access=off");
        self.launch(command, tempfile::tempdir()?)
    }

    /// As many workers as cores, as those who run them would have it.
    fn other(&self, program: &Path) -> Result<Way> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join(if self.name == "envoy" { "conf.json" } else { "conf" });
        let workers = std::thread::available_parallelism()?.to_string();
        let mut command = Command::new(program);
        let text = match self.name {
            "nginx" => {
                // Its workers outlive a master that is killed. In a namespace of processes they
                // end with it, whichever way that happens.
                command = Command::new("unshare");
                command.args(["--pid", "--fork", "--kill-child"]).arg(program);
                command.arg("-c").arg(&file).args(["-g", "daemon off;"]);
                nginx(folder.path(), &workers, self.address(), self.origin())
            }
            "haproxy" => {
                command.arg("-db").arg("-f").arg(&file);
                haproxy(&workers, self.address(), self.origin())
            }
            _ => {
                command.arg("-c").arg(&file).args(["--concurrency", &workers]);
                command.args(["--disable-hot-restart", "--log-level", "error"]);
                envoy(self.address(), self.origin())
            }
        };
        fs::write(&file, text)?;
        self.launch(command, folder)
    }

    /// Starts it on the node and waits until it listens.
    fn launch(&self, mut command: Command, folder: TempDir) -> Result<Way> {
        let (name, address) = (self.name, self.address());
        let log = folder.path().join("stderr");
        command.stdout(Stdio::null()).stderr(File::create(&log)?);
        let node = &self.lab.node;
        let mut process = node.spawn(command)?;
        let deadline = Instant::now() + Duration::from_secs(10);
        while !node.run(move || TcpStream::connect(address).is_ok())? {
            if let Some(status) = process.try_wait()? {
                let told = fs::read_to_string(&log).unwrap_or_default();
                let told: Vec<&str> = told.lines().take(3).collect();
                bail!("{name} ended at once ({status}): {}", told.join("; "));
            }
            ensure!(Instant::now() < deadline, "{name} does not listen on {address}");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(Way {
            name,
            lab: self.index,
            address,
            meter: Meter::of(process.id()),
            _process: Some(process),
            _folder: Some(folder),
        })
    }
}

fn nginx(here: &Path, workers: &str, address: SocketAddr, origin: SocketAddr) -> String {
    // Debian's package has the stream module in a file of its own.
    let module = Path::new("/usr/lib/nginx/modules/ngx_stream_module.so");
    let load = match module.exists() {
        true => format!("load_module {};\n", module.display()),
        false => String::new(),
    };
    let here = here.display();
    format!(
        "{load}worker_processes {workers};\npid {here}/pid;\nerror_log {here}/log;\n\
         events {{ worker_connections 4096; }}\n\
         stream {{ server {{ listen {address} reuseport; proxy_pass {origin}; \
         proxy_half_close on; tcp_nodelay on; }} }}\n"
    )
}

fn haproxy(workers: &str, address: SocketAddr, origin: SocketAddr) -> String {
    format!(
        "global\n maxconn 2000\n nbthread {workers}\ndefaults\n mode tcp\n timeout connect 5s\n \
         timeout client 1h\n timeout server 1h\n option splice-auto\n\
         listen bench\n bind {address}\n server origin {origin}\n"
    )
}

fn envoy(address: SocketAddr, origin: SocketAddr) -> String {
    let at = |address: SocketAddr| {
        serde_json::json!({"socket_address": {
            "address": address.ip().to_string(),
            "port_value": address.port(),
        }})
    };
    let relay = serde_json::json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type":
                "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": "bench",
            "cluster": "origin",
        },
    });
    serde_json::json!({"static_resources": {
        "listeners": [{
            "name": "bench",
            "address": at(address),
            "filter_chains": [{"filters": [relay]}],
        }],
        "clusters": [{
            "name": "origin",
            "type": "STATIC",
            "connect_timeout": "5s",
            "load_assignment": {
                "cluster_name": "origin",
                "endpoints": [{"lb_endpoints": [{"endpoint": {"address": at(origin)}}]}],
            },
        }],
    }})
    .to_string()
}
