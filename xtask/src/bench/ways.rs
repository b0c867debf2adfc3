//! The ways from client to server: none in between, our engines, and other proxies.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use tempfile::TempDir;
use tokio::process::{Child, Command};

use crate::lab::Host;
use crate::shell::{say, which};

/// Ticks per second of the times in /proc/PID/stat; fixed in the kernel's interface.
const TICKS: f64 = 100.0;

/// A way to the server.
pub struct Way {
    /// Its name in the table.
    pub name: &'static str,
    /// Where clients connect to.
    pub address: SocketAddr,
    process: Option<Child>,
    /// Its configuration, which it may read late.
    _folder: Option<TempDir>,
}

impl Way {
    /// Processor time so far, of the process and its children.
    pub fn cpu_seconds(&self) -> f64 {
        let Some(pid) = self.process.as_ref().and_then(Child::id) else { return 0.0 };
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        let children = children.unwrap_or_default();
        let all = children.split_whitespace().filter_map(|child| child.parse().ok()).chain([pid]);
        all.map(ticks).sum::<f64>() / TICKS
    }
}

/// utime and stime (proc(5), fields 14 and 15).
fn ticks(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The second field is the name, which may hold anything; count from behind it.
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    fields.split_whitespace().skip(11).take(2).filter_map(|t| t.parse::<f64>().ok()).sum()
}

/// Starts every way that was asked for and is there.
///
/// # Errors
/// One does not come up, or a name is unknown.
pub fn start(
    node: &Host,
    node_address: IpAddr,
    origin: SocketAddr,
    proxy: &Path,
    only: &[String],
) -> Result<Vec<Way>> {
    const NAMES: [&str; 5] = ["direct", "splice", "copy", "nginx", "haproxy"];
    for name in only {
        ensure!(NAMES.contains(&name.as_str()), "{name} is none of {}", NAMES.join(", "));
    }
    let mut ways = Vec::new();
    for (port, name) in (7001..).zip(NAMES) {
        if !only.is_empty() && !only.iter().any(|wanted| wanted == name) {
            continue;
        }
        let address = SocketAddr::new(node_address, port);
        match name {
            "direct" => ways.push(Way { name, address: origin, process: None, _folder: None }),
            "splice" | "copy" => ways.push(ours(node, name, address, origin, proxy)?),
            _ => match which(name) {
                Some(program) => ways.push(other(node, name, &program, address, origin)?),
                None => say(&format!("bench: {name} is not installed and takes no part")),
            },
        }
    }
    Ok(ways)
}

fn ours(
    node: &Host,
    name: &'static str,
    address: SocketAddr,
    origin: SocketAddr,
    proxy: &Path,
) -> Result<Way> {
    let mut command = Command::new(proxy);
    command.args([
        format!("--listen-addr={address}"),
        format!("--upstream-addr={origin}"),
        format!("--engine={name}"),
        "--endpoint-mode=off".to_owned(),
        "--admin-addr=off".to_owned(),
    ]);
    launch(node, name, address, command, None)
}

fn other(
    node: &Host,
    name: &'static str,
    program: &Path,
    address: SocketAddr,
    origin: SocketAddr,
) -> Result<Way> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("conf");
    let here = folder.path().display();
    let mut command = Command::new(program);
    let text = if name == "nginx" {
        command.arg("-c").arg(&file).args(["-g", "daemon off;"]);
        // Debian's package has the stream module in a file of its own.
        let module = Path::new("/usr/lib/nginx/modules/ngx_stream_module.so");
        let load = match module.exists() {
            true => format!("load_module {};\n", module.display()),
            false => String::new(),
        };
        format!(
            "{load}worker_processes auto;\npid {here}/pid;\nerror_log {here}/log;\n\
             events {{ worker_connections 4096; }}\n\
             stream {{ server {{ listen {address} reuseport; proxy_pass {origin}; \
             tcp_nodelay on; }} }}\n"
        )
    } else {
        command.arg("-db").arg("-f").arg(&file);
        format!(
            "global\n maxconn 2000\ndefaults\n mode tcp\n timeout connect 5s\n \
             timeout client 1h\n timeout server 1h\n option splice-auto\n\
             listen bench\n bind {address}\n server origin {origin}\n"
        )
    };
    fs::write(&file, text)?;
    launch(node, name, address, command, Some(folder))
}

/// Starts it on the node and waits until it listens.
fn launch(
    node: &Host,
    name: &'static str,
    address: SocketAddr,
    mut command: Command,
    folder: Option<TempDir>,
) -> Result<Way> {
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut process = node.spawn(command)?;
    let deadline = Instant::now() + Duration::from_secs(5);
    let listens = move || std::net::TcpStream::connect(address).is_ok();
    while !node.run(listens)? {
        if let Some(status) = process.try_wait()? {
            bail!("{name} ended at once ({status})");
        }
        ensure!(Instant::now() < deadline, "{name} does not listen on {address}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(Way { name, address, process: Some(process), _folder: folder })
}
