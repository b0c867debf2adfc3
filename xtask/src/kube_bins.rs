//! Kubernetes's own programs for the tests: from `KUBEBUILDER_ASSETS`, else built with Go.

use std::collections::hash_map::DefaultHasher;
use std::env;
use std::fs;
use std::hash::{Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::shell::{root, run, say, target, which};

/// The Go module that imports them.
const MODULE: &str = "tests/kube-bins";

/// The version that they report, which clients read.
const LDFLAGS: &str = "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3 \
    -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36";

/// What the tests start. Released sets of test programs often lack the controller manager.
const PROGRAMS: [&str; 5] =
    ["kube-apiserver", "kube-controller-manager", "kube-proxy", "etcd", "kubectl"];

/// The folder with the programs, which is built if it does not fit its sources. The tests take
/// what `KUBEBUILDER_ASSETS` has from there, and the rest from this folder.
///
/// # Errors
/// One line that says what to install or to set.
pub fn ensure() -> Result<PathBuf> {
    let assets = env::var_os("KUBEBUILDER_ASSETS").map(PathBuf::from);
    if let Some(folder) = assets {
        let lacking = PROGRAMS.into_iter().find(|program| !has(Some(&folder), program));
        let Some(program) = lacking else {
            say(&format!("Kubernetes: programs in {} (KUBEBUILDER_ASSETS)", folder.display()));
            return Ok(folder);
        };
        say(&format!("Kubernetes: {} has no {program}", folder.display()));
    }
    let module = root().join(MODULE);
    let folder = target().join("kube-bins");
    let stamp = folder.join("stamp");
    let wanted = fingerprint(&module)?;
    if fs::read_to_string(&stamp).is_ok_and(|found| found == wanted) {
        say(&format!("Kubernetes: programs in {}", folder.display()));
        return Ok(folder);
    }
    let go = which("go").context(
        "Kubernetes's programs (install Go 1.26 or later to have them built, or set \
         KUBEBUILDER_ASSETS to a folder with kube-apiserver, kube-controller-manager, \
         kube-proxy, etcd and kubectl)",
    )?;
    say("building Kubernetes's programs with Go: some minutes, once");
    fs::create_dir_all(&folder)?;
    let mut output = folder.clone().into_os_string();
    // With a final slash Go takes it for a folder and names each program after its package.
    output.push("/");
    run(Command::new(go)
        .current_dir(&module)
        .args(["build", "-trimpath", "-ldflags", LDFLAGS, "-o"])
        .arg(output)
        .arg("./..."))
    .context("Kubernetes's programs")?;
    fs::write(&stamp, wanted)?;
    Ok(folder)
}

fn has(folder: Option<&Path>, program: &str) -> bool {
    folder.is_some_and(|folder| folder.join(program).is_file())
}

/// Changes whenever the module does. An unlucky change of the hash costs one build.
fn fingerprint(module: &Path) -> Result<String> {
    let mut files = Vec::new();
    sources(module, &mut files).with_context(|| format!("cannot read {}", module.display()))?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    LDFLAGS.hash(&mut hasher);
    for file in files {
        file.strip_prefix(module)?.hash(&mut hasher);
        fs::read(&file)?.hash(&mut hasher);
    }
    Ok(format!("{:016x}", hasher.finish()))
}

fn sources(folder: &Path, into: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            sources(&path, into)?;
        } else if name.ends_with(".go") || name == "go.mod" || name == "go.sum" {
            into.push(path);
        }
    }
    Ok(())
}
