//! Which toolchain builds the eBPF object, and how.
//!
//! One file for both sides: `cargo xtask` has it as a module, `proxy/build.rs` includes it. So a
//! plain `cargo build` and `cargo xtask build-ebpf` cannot come to different conclusions.
//!
//! Two ways are known, because neither works everywhere:
//! - Debian packages a rustc with `core` for BPF already built, and the LLVM of that very rustc;
//!   nothing comes from the open web;
//! - rustup's nightly builds `core` from `rust-src`, and bpf-linker comes as a released binary.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Rustup's name for the toolchain of Debian's packages.
pub const DEBIAN: &str = "debian-bpf";
/// Where Debian's packages put it.
pub const DEBIAN_PREFIX: &str = "/usr";
/// The package with the kernel programs, and its folder.
pub const PACKAGE: &str = "proxy-ebpf";

/// Where `rustc` and `core` come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Debian's `rustc-web` with `libstd-rust-web-dev-bpf`.
    Debian,
    /// rustup's nightly with `rust-src`.
    Nightly,
}

/// A toolchain of which every part is there.
#[derive(Debug)]
pub struct Toolchain {
    /// Where `rustc` and `core` come from.
    pub way: Way,
    /// bpf-linker.
    pub linker: PathBuf,
}

impl Toolchain {
    /// The first way of which every part is there.
    pub fn find() -> Option<Self> {
        let linker = linker()?;
        let way = [Way::Debian, Way::Nightly].into_iter().find(|way| way.has_core())?;
        Some(Self { way, linker })
    }

    /// What the environment must say while the object is built.
    pub fn environment(&self) -> Vec<(&'static str, OsString)> {
        let mut environment = vec![
            // The linker by its path: no PATH must be right for it.
            ("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", self.linker.clone().into()),
            ("CARGO_TARGET_BPFEB_UNKNOWN_NONE_LINKER", self.linker.clone().into()),
            // aya-build shows each line of the inner cargo as a warning.
            ("CARGO_TERM_QUIET", "true".into()),
        ];
        if self.way == Way::Debian {
            // aya-ebpf needs a nightly feature, and this rustc calls itself stable. Naming the
            // crate, rather than "1", keeps aya-build from building `core` again.
            environment.push(("RUSTC_BOOTSTRAP", "aya_ebpf".into()));
        }
        environment
    }

    /// Builds the object through aya-build, which reads the variables that cargo gives a build
    /// script and leaves the object in `OUT_DIR`. [`Self::environment`] must be in place.
    pub fn build(&self, root: &Path) -> aya_build::Result<()> {
        let folder = root.join(PACKAGE);
        let package = aya_build::Package {
            name: PACKAGE,
            root_dir: &folder.to_string_lossy(),
            ..Default::default()
        };
        let toolchain = match self.way {
            Way::Debian => aya_build::Toolchain::Custom(DEBIAN),
            Way::Nightly => aya_build::Toolchain::Nightly,
        };
        aya_build::build_ebpf([package], toolchain)
    }
}

impl Way {
    /// Whether rustc and `core` for BPF are there and can be called.
    pub fn has_core(self) -> bool {
        match self {
            Self::Debian => has_debian_core() && (!has_rustup() || is_debian_linked()),
            Self::Nightly => has_nightly_source(),
        }
    }
}

/// Whether Debian's packages are installed, whatever rustup knows of them.
pub fn has_debian_core() -> bool {
    let rustc = Path::new(DEBIAN_PREFIX).join("bin/rustc");
    let question = ["--print=target-libdir", "--target=bpfel-unknown-none"];
    let Some(folder) = answer(Command::new(rustc).args(question)) else {
        return false;
    };
    let Ok(files) = Path::new(&folder).read_dir() else {
        return false;
    };
    files.flatten().any(|file| file.file_name().to_string_lossy().starts_with("libcore-"))
}

/// Whether there is a rustup, through which aya-build then calls every toolchain.
pub fn has_rustup() -> bool {
    answer(Command::new("rustup").arg("--version")).is_some()
}

/// Whether rustup calls Debian's toolchain [`DEBIAN`].
fn is_debian_linked() -> bool {
    let sysroot = ["run", DEBIAN, "rustc", "--print=sysroot"];
    answer(Command::new("rustup").args(sysroot)).is_some_and(|path| path == DEBIAN_PREFIX)
}

fn has_nightly_source() -> bool {
    let sysroot = ["run", "nightly", "rustc", "--print=sysroot"];
    answer(Command::new("rustup").args(sysroot)).is_some_and(|path| {
        Path::new(&path).join("lib/rustlib/src/rust/library/core/Cargo.toml").exists()
    })
}

/// bpf-linker: where `cargo install` puts it, else anywhere on PATH.
pub fn linker() -> Option<PathBuf> {
    let folders = env::var_os("PATH").unwrap_or_default();
    cargo_home()
        .map(|home| home.join("bin"))
        .into_iter()
        .chain(env::split_paths(&folders))
        .map(|folder| folder.join("bpf-linker"))
        .find(|path| answer(Command::new(path).arg("--version")).is_some())
}

/// Cargo's folder, as cargo itself finds it.
pub fn cargo_home() -> Option<PathBuf> {
    env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")))
}

/// The trimmed output of a command that ran and succeeded.
pub fn answer(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
