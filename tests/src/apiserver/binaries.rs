//! Where the programs of the control plane are found.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

/// A command that runs the Kubernetes component `name`: `kube-apiserver`,
/// `kube-controller-manager`, `kube-proxy`, `etcd` or `kubectl`.
///
/// Looked for in this order:
/// 1. a program of that name in the folder `KUBEBUILDER_ASSETS`;
/// 2. in the folder `STEWARD_KUBE_BINS` (unset: `target/kube-bins` of the
///    workspace) a program of that name, or `kube-bins`, which is all but etcd in one.
///
/// # Errors
/// When it is in none of these places; the message lists them.
pub fn component(name: &str) -> Result<Command> {
    let assets = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    let built = env::var_os("STEWARD_KUBE_BINS").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/kube-bins"),
        PathBuf::from,
    );
    let folders: Vec<PathBuf> = assets.into_iter().chain([built.clone()]).collect();

    if let Some(program) = folders.iter().map(|dir| dir.join(name)).find(|file| file.is_file()) {
        return Ok(Command::new(program));
    }
    let all_in_one = built.join("kube-bins");
    if name.starts_with("kube") && all_in_one.is_file() {
        let mut command = Command::new(all_in_one);
        command.arg(name);
        return Ok(command);
    }
    let tried = folders.iter().map(|dir| format!("\n  {}", dir.display())).collect::<String>();
    bail!(
        "{name} not found. Run `cargo xtask setup --tests`, which builds it, or set \
         KUBEBUILDER_ASSETS to a folder that has it. Tried these folders:{tried}"
    )
}
