//! Debian's packages, where there are any and we may install them.

use std::cell::Cell;
use std::io::IsTerminal as _;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::shell::{run, say, which};
use crate::toolchain::answer;

/// apt, with the right to use it.
pub struct Apt {
    sudo: Option<&'static [&'static str]>,
    is_updated: Cell<bool>,
}

impl Apt {
    /// `None` where there is no apt, or neither root nor sudo.
    pub fn find() -> Option<Self> {
        which("apt-get")?;
        let sudo: Option<&[&str]> = if rustix::process::geteuid().is_root() {
            None
        } else if answer(Command::new("sudo").args(["-n", "true"])).is_some() {
            Some(&["sudo", "-n"])
        } else if which("sudo").is_some() && std::io::stdin().is_terminal() {
            Some(&["sudo"])
        } else {
            return None;
        };
        Some(Self { sudo, is_updated: Cell::new(false) })
    }

    /// Whether the distribution has this package. Asks with fresh lists only: those of a new
    /// machine are empty.
    pub fn offers(&self, package: &str) -> bool {
        self.update().is_ok()
            && answer(Command::new("apt-cache").args(["show", "--no-all-versions", package]))
                .is_some()
    }

    /// Installs packages, and never removes one: a conflict with what the user has is an error.
    ///
    /// # Errors
    /// apt failed, and has said why.
    pub fn install(&self, packages: &[&str]) -> Result<()> {
        say(&format!("installing Debian packages: {}", packages.join(" ")));
        self.update()?;
        let flags = ["install", "--yes", "--no-install-recommends", "--no-remove"];
        run(self.apt_get(&flags).args(packages).stdout(Stdio::null()))
            .with_context(|| format!("packages {}", packages.join(" ")))
    }

    fn update(&self) -> Result<()> {
        if !self.is_updated.get() {
            say("asking the package servers what there is");
            run(self.apt_get(&["update"]).stdout(Stdio::null()))?;
            self.is_updated.set(true);
        }
        Ok(())
    }

    fn apt_get(&self, args: &[&str]) -> Command {
        let words = self.sudo.unwrap_or_default().iter().copied();
        // Through env, because sudo drops the variables that it is called with.
        let mut words =
            words.chain(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet"]);
        let mut command = Command::new(words.next().unwrap_or("env"));
        command.args(words).args(args);
        command
    }
}
