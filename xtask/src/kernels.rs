//! `cargo xtask kernels`: the program and its kernel suites on kernels of other distributions, each
//! in a virtual machine of its own.
//!
//! A kernel comes as a Debian package (`apt-get download linux-image-…-cloud-amd64`), which is only
//! unpacked. The machine is QEMU's emulation (KVM is often not to be had, and 20 s are bearable
//! without), its root file system an archive in memory: busybox, `ip` and other commands, the
//! programs under test and the libraries and kernel modules that these need.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::shell::{cargo, root, run as sh, say, target, which};
use crate::test;

/// Modules that the suites need, where the kernel does not have them built in.
const MODULES: &[&str] = &[
    "veth",
    "tun",
    "dummy",
    "bridge",
    "8021q",
    "vxlan",
    "wireguard",
    "ip_gre",
    "xfrm_user",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "nf_conntrack",
    "nf_conntrack_netlink",
    "nft_chain_nat",
    "nft_nat",
    "nft_ct",
    "tcp_diag",
];

/// Commands beside busybox and `ip`, where this machine has them: suites that need one say so.
const TOOLS: &[&str] = &["tc", "ss", "ethtool", "nft", "mount", "unshare"];

/// What the guest prints after each program, followed by its exit status.
const STATUS: &str = "xtask-status";

/// What the guest's kernel is told. Left to itself it believes that the emulated processors' counters
/// differ, and asks an emulated device for the time, for which both processors must stop.
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1 loglevel=4 tsc=reliable";

/// How much longer than on a real machine anything may take in the guest.
const PATIENCE: u32 = 6;

/// The flags of `kernels`.
#[derive(clap::Args)]
pub struct Flags {
    /// Debian packages of kernels (linux-image-*-cloud-amd64_*.deb)
    #[arg(required = true)]
    packages: Vec<PathBuf>,
    /// What to run beside `check`: a suite, a suite and which of its tests, or `all` suites of the
    /// packet engine (an hour and more)
    #[arg(long = "suite", value_name = "SUITE[=FILTER]", default_values = ["check", "selftest", "bad_wires=packet::clean"])]
    suites: Vec<String>,
    /// Memory of a machine, in MiB
    #[arg(long, default_value = "2048")]
    memory: u32,
    /// Tests at once
    #[arg(long, default_value = "1")]
    threads: u32,
    /// How long a suite may run, in minutes
    #[arg(long, default_value = "60")]
    minutes: u32,
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
    for wish in &flags.suites {
        match wish.as_str() {
            "all" => programs.extend(all_suites(flags.threads)?),
            wish => programs.push(Program::of_suite(wish, flags.threads)?),
        }
    }
    let mut failed = Vec::new();
    for package in &flags.packages {
        say(&format!("--- {}", package.display()));
        if let Err(error) = try_kernel(package, &programs, flags) {
            say(&format!("--- {}: FAILED: {error:#}", package.display()));
            failed.push(package.display().to_string());
        }
    }
    ensure!(failed.is_empty(), "failed: {}", failed.join(", "));
    Ok(())
}

/// Every suite that needs the kernel, and of those that try all engines what is about this one: the
/// others ask nothing of a kernel that they do not ask of every kernel.
fn all_suites(threads: u32) -> Result<Vec<Program>> {
    let wish = |suite: &str| match suite {
        "bad_wires" | "wires" => format!("{suite}=packet"),
        suite => suite.to_owned(),
    };
    test::kernel_suites().map(|suite| Program::of_suite(&wish(suite), threads)).collect()
}

/// Something to run in the guest.
struct Program {
    path: PathBuf,
    line: String,
}

impl Program {
    fn of_suite(wish: &str, threads: u32) -> Result<Self> {
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
        // Also of tests that pass: what they could not try there, they say.
        let line = format!("suite-{suite} --show-output --test-threads={threads} {filter}");
        let line = line.trim_end().to_owned();
        Ok(Self { path, line })
    }

    fn name(&self) -> &str {
        self.line.split(' ').next().unwrap_or(&self.line)
    }
}

fn try_kernel(package: &Path, programs: &[Program], flags: &Flags) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (unpacked, guest) = (folder.path().join("package"), folder.path().join("guest"));
    sh(Command::new("dpkg-deb").arg("-x").arg(package).arg(&unpacked))?;
    let image = fs::read_dir(unpacked.join("boot"))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz")))
        .context("the package holds no boot/vmlinuz-*; take the one that is not -unsigned")?;
    furnish(&guest, &unpacked.join("lib/modules"), programs, flags.minutes)?;
    let archive = folder.path().join("initramfs");
    let pack = "find . | cpio --quiet -o -H newc -R 0:0 > \"$0\"";
    sh(Command::new("sh").args(["-c", pack]).arg(&archive).current_dir(&guest))?;
    boot(&image, &archive, programs, flags)
}

/// Makes the guest's root file system.
fn furnish(guest: &Path, modules: &Path, programs: &[Program], minutes: u32) -> Result<()> {
    for folder in ["bin", "proc", "sys", "dev", "run", "tmp", "modules", "etc"] {
        fs::create_dir_all(guest.join(folder))?;
    }
    let find = |tool: &str| which(tool).with_context(|| format!("{tool} is not there"));
    let busybox = find("busybox")?;
    let is_dynamic = !libraries(&busybox)?.is_empty();
    ensure!(!is_dynamic, "busybox needs libraries: install Debian's busybox-static");
    fs::copy(busybox, guest.join("bin/busybox"))?;
    let applets = Command::new("busybox").arg("--list").output().context("cannot run busybox")?;
    for applet in String::from_utf8_lossy(&applets.stdout).lines() {
        symlink("busybox", guest.join("bin").join(applet)).or_else(|error| {
            // The program itself is among them.
            (applet == "busybox").then_some(()).ok_or(error)
        })?;
    }
    let mut tools = vec![(find("ip")?, "ip".to_owned())];
    tools.extend(TOOLS.iter().filter_map(|tool| Some((which(tool)?, (*tool).to_owned()))));
    tools.extend(programs.iter().map(|p| (p.path.clone(), p.name().to_owned())));
    let mut needed = BTreeSet::new();
    for (path, name) in tools {
        let copy = guest.join("bin").join(&name);
        // Not through busybox's link of this name.
        let _ = fs::remove_file(&copy);
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
    fs::write(guest.join("etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    let order = install_modules(modules, &guest.join("modules"))?;
    let init = guest.join("init");
    fs::write(&init, script(&order, programs, minutes)?)?;
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
fn script(modules: &[String], programs: &[Program], minutes: u32) -> Result<String> {
    let mut script = String::from(
        "#!/bin/busybox sh\n\
         export PATH=/bin STEWARD_TCP_PROXY_BIN=/bin/steward-tcp-proxy RUST_BACKTRACE=1\n\
         mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev\n\
         mount -t tmpfs tmpfs /tmp; mount -t tmpfs run /run; mount -t bpf bpf /sys/fs/bpf\n\
         mount -t securityfs securityfs /sys/kernel/security\n\
         [ -e /dev/net/tun ] || { mkdir -p /dev/net; busybox mknod /dev/net/tun c 10 200; }\n\
         ulimit -n 65536\n",
    );
    writeln!(script, "export STEWARD_TEST_PATIENCE={PATIENCE}")?;
    for module in modules {
        writeln!(script, "insmod /modules/{module} || echo no module {module}")?;
    }
    // A shell of its own prefers its own applets: ip is called by its path.
    writeln!(script, "/bin/ip link set lo up")?;
    for program in programs {
        // What hangs must not keep the others from their turn.
        let (line, seconds) = (&program.line, minutes * 60);
        writeln!(script, "echo '--- {line}'; timeout {seconds} /bin/{line}; echo {STATUS} $?")?;
    }
    writeln!(script, "poweroff -f")?;
    Ok(script)
}

/// What became of a program in the guest.
#[derive(Default)]
struct Outcome {
    seconds: f32,
    /// Tests that passed, failed and were left out.
    counts: [u32; 3],
    failed_tests: Vec<String>,
    /// The test whose output this is.
    shown: String,
    /// What this kernel cannot do, and so which tests said that they tried nothing, or less.
    untried: BTreeMap<String, BTreeSet<String>>,
    /// Exit status; none if the machine ended before it.
    status: Option<String>,
}

/// Boots the machine, shows what it prints, and judges by the programs' statuses.
fn boot(image: &Path, archive: &Path, programs: &[Program], flags: &Flags) -> Result<()> {
    let mut machine = Command::new("timeout");
    let bound = (programs.len() as u32 * flags.minutes + 5) * 60;
    machine
        .arg(bound.to_string())
        .args(["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-smp", "2", "-m", &flags.memory.to_string()])
        .args(["-nographic", "-no-reboot", "-nodefaults"])
        .args(["-serial", "stdio", "-append", COMMAND_LINE])
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(archive)
        .current_dir(root())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut child = machine.spawn().context("cannot run qemu-system-x86_64")?;
    let output = child.stdout.take().context("piped")?;
    let mut outcomes: Vec<Outcome> = Vec::new();
    let mut current = Outcome::default();
    let mut begun = Instant::now();
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        println!("{line}");
        if let Some((_, status)) = line.split_once(STATUS) {
            current.status = Some(status.trim().to_owned());
            current.seconds = begun.elapsed().as_secs_f32();
            outcomes.push(std::mem::take(&mut current));
            begun = Instant::now();
        } else {
            current.heed(&line);
        }
    }
    child.wait()?;
    outcomes.push(current);
    outcomes.truncate(programs.len());
    summarize(programs, &outcomes)
}

impl Outcome {
    /// Takes from a line what libtest says.
    fn heed(&mut self, line: &str) {
        if let Some((_, counts)) = line.split_once("test result: ") {
            let numbers = counts.split([' ', ';']).filter_map(|word| word.parse::<u32>().ok());
            for (count, number) in self.counts.iter_mut().zip(numbers) {
                *count += number;
            }
        } else if let Some(name) =
            line.strip_prefix("test ").and_then(|rest| rest.strip_suffix(" ... FAILED"))
        {
            self.failed_tests.push(name.to_owned());
        } else if let Some(name) =
            line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            name.clone_into(&mut self.shown);
        } else if line.starts_with("not tested") {
            self.untried.entry(line.to_owned()).or_default().insert(self.shown.clone());
        }
    }
}

fn summarize(programs: &[Program], outcomes: &[Outcome]) -> Result<()> {
    let mut bad = Vec::new();
    println!("{:<52} {:>8} {:>7} {:>7}  result", "program", "seconds", "passed", "failed");
    for (number, program) in programs.iter().enumerate() {
        let none = Outcome::default();
        let outcome = outcomes.get(number).unwrap_or(&none);
        let word = match outcome.status.as_deref() {
            Some("0") => "ok".to_owned(),
            Some(status) => format!("FAILED, status {status}"),
            None => "FAILED, the machine ended before".to_owned(),
        };
        if word != "ok" {
            bad.push(program.line.as_str());
        }
        let [passed, failed, _] = outcome.counts;
        println!("{:<52} {:>8.1} {passed:>7} {failed:>7}  {word}", program.line, outcome.seconds);
        for test in &outcome.failed_tests {
            println!("    FAILED: {test}");
        }
        for (why, tests) in &outcome.untried {
            let tests: Vec<&str> = tests.iter().map(String::as_str).collect();
            println!("    {why}: {}", tests.join(", "));
        }
    }
    ensure!(bad.is_empty(), "failed there: {}", bad.join(", "));
    Ok(())
}
