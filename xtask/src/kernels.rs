//! `cargo xtask kernels`: the program and its kernel suites on kernels of other distributions, each
//! in a virtual machine of its own.
//!
//! A kernel comes as a Debian package (`apt-get download linux-image-…-cloud-amd64`), which is only
//! unpacked. The machine is QEMU's emulation (KVM is often not to be had, and 20 s are bearable
//! without), its root file system an archive in memory: busybox, `ip`, the programs under test and
//! the libraries and kernel modules that these need.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail, ensure};

use crate::shell::{cargo, root, run as sh, say, target, which};

/// Modules that the suites need, where the kernel does not have them built in.
const MODULES: &[&str] =
    &["veth", "tun", "sch_ingress", "cls_bpf", "act_bpf", "nf_conntrack", "nf_conntrack_netlink"];

/// What the guest prints after each program, followed by its exit status.
const STATUS: &str = "xtask-status";

/// The flags of `kernels`.
#[derive(clap::Args)]
pub struct Flags {
    /// Debian packages of kernels (linux-image-*-cloud-amd64_*.deb)
    #[arg(required = true)]
    packages: Vec<PathBuf>,
    /// What to run beside `check`: a suite, or a suite and which of its tests
    #[arg(long = "suite", value_name = "SUITE[=FILTER]", default_values = ["check", "wires=packet"])]
    suites: Vec<String>,
    /// Memory of a machine, in MiB
    #[arg(long, default_value = "1024")]
    memory: u32,
}

/// The verb.
///
/// # Errors
/// A tool is missing, a kernel does not start, or a program failed in one.
pub fn run(flags: &Flags) -> Result<()> {
    for (tool, package) in
        [("qemu-system-x86_64", "qemu-system-x86"), ("busybox", "busybox-static"), ("cpio", "cpio")]
    {
        ensure!(which(tool).is_some(), "{tool} is not there (Debian: apt-get install {package})");
    }
    sh(&mut cargo(&["build"]))?;
    let mut programs = vec![Program {
        path: target().join("debug/steward-tcp-proxy"),
        line: "steward-tcp-proxy check".to_owned(),
    }];
    for suite in &flags.suites {
        programs.push(Program::of_suite(suite)?);
    }
    let mut failed = Vec::new();
    for package in &flags.packages {
        say(&format!("--- {}", package.display()));
        if let Err(error) = try_kernel(package, &programs, flags.memory) {
            say(&format!("--- {}: FAILED: {error:#}", package.display()));
            failed.push(package.display().to_string());
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Something to run in the guest.
struct Program {
    path: PathBuf,
    line: String,
}

impl Program {
    fn of_suite(wish: &str) -> Result<Self> {
        let (suite, filter) = wish.split_once('=').unwrap_or((wish, ""));
        let mut command = cargo(&[
            "test",
            "--no-run",
            "--test",
            suite,
            "--message-format=json-render-diagnostics",
        ]);
        let output = command.stderr(Stdio::inherit()).output()?;
        ensure!(output.status.success(), "suite {suite} does not build");
        let messages = String::from_utf8(output.stdout)?;
        let path = messages.lines().find_map(|line| {
            let message: serde_json::Value = serde_json::from_str(line).ok()?;
            let is_it = message["target"]["name"] == suite;
            is_it.then(|| message["executable"].as_str().map(PathBuf::from))?
        });
        let path = path.with_context(|| format!("cargo names no program for suite {suite}"))?;
        let line = format!("suite-{suite} --test-threads=1 {filter}");
        Ok(Self { path, line })
    }

    fn name(&self) -> &str {
        self.line.split(' ').next().unwrap_or(&self.line)
    }
}

fn try_kernel(package: &Path, programs: &[Program], memory: u32) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (unpacked, guest) = (folder.path().join("package"), folder.path().join("guest"));
    sh(Command::new("dpkg-deb").arg("-x").arg(package).arg(&unpacked))?;
    let image = fs::read_dir(unpacked.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")))
        .context("the package holds no boot/vmlinuz-*; take the one that is not -unsigned")?;
    furnish(&guest, &unpacked.join("lib/modules"), programs)?;
    let archive = folder.path().join("initramfs");
    let pack = "find . | cpio --quiet -o -H newc -R 0:0 > \"$0\"";
    sh(Command::new("sh").args(["-c", pack]).arg(&archive).current_dir(&guest))?;
    boot(&image, &archive, programs, memory)
}

/// Makes the guest's root file system.
fn furnish(guest: &Path, modules: &Path, programs: &[Program]) -> Result<()> {
    for folder in ["bin", "proc", "sys", "dev", "run", "tmp", "modules", "etc"] {
        fs::create_dir_all(guest.join(folder))?;
    }
    let find = |tool: &str| which(tool).with_context(|| format!("{tool} is not there"));
    let busybox = find("busybox")?;
    let is_dynamic = !libraries(&busybox)?.is_empty();
    ensure!(!is_dynamic, "busybox needs libraries: install Debian's busybox-static");
    fs::copy(busybox, guest.join("bin/busybox"))?;
    for applet in ["sh", "mount", "mkdir", "insmod", "poweroff", "cat", "unshare", "nsenter"] {
        symlink("busybox", guest.join("bin").join(applet))?;
    }
    // Optional tools: suites that need one say so.
    let mut tools = vec![(find("ip")?, "ip".to_owned())];
    tools.extend(["tc", "ethtool"].iter().filter_map(|t| Some((which(t)?, (*t).to_owned()))));
    tools.extend(programs.iter().map(|p| (p.path.clone(), p.name().to_owned())));
    let mut needed = BTreeSet::new();
    for (path, name) in tools {
        let copy = guest.join("bin").join(&name);
        fs::copy(&path, &copy)?;
        // Debug information is most of such a program, and would only take the guest's memory.
        let _ = Command::new("strip").arg("--strip-debug").arg(&copy).status();
        needed.extend(libraries(&path)?);
    }
    for library in needed {
        let copy = guest.join(library.strip_prefix("/")?);
        fs::create_dir_all(copy.parent().context("a folder")?)?;
        fs::copy(&library, copy)?;
    }
    let order = install_modules(modules, &guest.join("modules"))?;
    let init = guest.join("init");
    fs::write(&init, script(&order, programs)?)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// The shared libraries of a program, the loader included; none if it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("cannot run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let words = text.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(words.map(|word| PathBuf::from(word.trim_end_matches(':'))).collect())
}

/// Copies the modules and those that they depend on; their names in the order of loading.
fn install_modules(from: &Path, to: &Path) -> Result<Vec<String>> {
    let mut all = Vec::new();
    collect_modules(from, &mut all)?;
    let mut order = Vec::new();
    for module in MODULES {
        install_module(module, &all, to, &mut order)?;
    }
    Ok(order)
}

fn collect_modules(folder: &Path, all: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            collect_modules(&path, all)?;
        } else if path.to_string_lossy().contains(".ko") {
            all.push(path);
        }
    }
    Ok(())
}

fn install_module(name: &str, all: &[PathBuf], to: &Path, order: &mut Vec<String>) -> Result<()> {
    if order.iter().any(|known| known == name) {
        return Ok(());
    }
    let is_it = |path: &&PathBuf| {
        let file = path.file_name().unwrap_or_default().to_string_lossy().replace('-', "_");
        file.split(".ko").next() == Some(&*name.replace('-', "_"))
    };
    // Without a file it is built in, or the programs that need it will say what is missing.
    let Some(path) = all.iter().find(is_it) else { return Ok(()) };
    let bytes = if path.extension().is_some_and(|extension| extension == "xz") {
        Command::new("xz").args(["-dc"]).arg(path).output().context("cannot run xz")?.stdout
    } else {
        fs::read(path)?
    };
    for needed in dependencies(&bytes) {
        install_module(&needed, all, to, order)?;
    }
    fs::write(to.join(name), bytes)?;
    order.push(name.to_owned());
    Ok(())
}

/// What the module's section .modinfo says that it needs.
fn dependencies(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[at + KEY.len()..].split(|byte| *byte == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(value).into_owned();
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

/// The guest's first program.
fn script(modules: &[String], programs: &[Program]) -> Result<String> {
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         export PATH=/bin STEWARD_TCP_PROXY_BIN=/bin/steward-tcp-proxy RUST_BACKTRACE=1\n\
         mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmpfs /tmp; mount -t tmpfs run /run; mount -t bpf bpf /sys/fs/bpf\n\
         mount -t securityfs securityfs /sys/kernel/security\n\
         [ -e /dev/net/tun ] || { mkdir -p /dev/net; busybox mknod /dev/net/tun c 10 200; }\n\
         ulimit -n 65536\n",
    );
    for module in modules {
        writeln!(script, "insmod /modules/{module} || echo no module {module}")?;
    }
    // A shell of its own prefers its own applets: ip is called by its path.
    writeln!(script, "/bin/ip link set lo up")?;
    for program in programs {
        writeln!(script, "echo '--- {}'; /bin/{}; echo {STATUS} $?", program.line, program.line)?;
    }
    writeln!(script, "poweroff -f")?;
    Ok(script)
}

/// Boots the machine, shows what it prints, and judges by the programs' statuses.
fn boot(image: &Path, archive: &Path, programs: &[Program], memory: u32) -> Result<()> {
    let mut machine = Command::new("timeout");
    machine
        .args(["1800", "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-smp", "2", "-m", &memory.to_string(), "-nographic", "-no-reboot", "-nodefaults"])
        .args(["-serial", "stdio", "-append", "console=ttyS0 quiet panic=-1 loglevel=4"])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(archive)
        .current_dir(root())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = machine.spawn().context("cannot run qemu-system-x86_64")?;
    let output = child.stdout.take().context("piped")?;
    let mut statuses = Vec::new();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        if let Some((_, status)) = line.split_once(STATUS) {
            statuses.push(status.trim().to_owned());
        }
        println!("{line}");
    }
    child.wait()?;
    if statuses.len() != programs.len() {
        bail!("the machine ended after {} of {} programs", statuses.len(), programs.len());
    }
    let failed: Vec<&str> = programs
        .iter()
        .zip(&statuses)
        .filter(|(_, status)| *status != "0")
        .map(|(program, _)| program.line.as_str())
        .collect();
    ensure!(failed.is_empty(), "failed there: {}", failed.join(", "));
    Ok(())
}
