//! What can be read about this host and process, and one row about each.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};

use super::gates::{
    CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON, CAP_SYS_ADMIN, KERNEL, LOCKDOWN, LSM,
    MEMLOCK, SECCOMP, USER_NAMESPACE, add_capability, allow_call,
};
use super::{Row, Status};

/// Oldest kernel that the programs are made for: it has bpf_redirect_neigh.
const OLDEST: (u32, u32) = (5, 10);

/// First kernel that charges maps to the cgroup instead of to RLIMIT_MEMLOCK.
const WITHOUT_MEMLOCK: (u32, u32) = (5, 11);

/// First kernel whose bpf() looks at its arguments before it looks at capabilities.
const ARGUMENTS_FIRST: (u32, u32) = (5, 19);

/// What the engine needs.
const NEEDED: [(CapabilitySet, &str); 4] = [
    (CapabilitySet::BPF, CAP_BPF),
    (CapabilitySet::NET_ADMIN, CAP_NET_ADMIN),
    // Segments in the name of connections that have no socket any more.
    (CapabilitySet::NET_RAW, CAP_NET_RAW),
    // Without it the verifier guards against speculation, and refuses branches that the compiler
    // made of ordinary code.
    (CapabilitySet::PERFMON, CAP_PERFMON),
];

fn effective() -> CapabilitySet {
    capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective)
}

/// Whether the kernel grants with `held` what `capability` stands for.
fn suffice(held: CapabilitySet, capability: CapabilitySet) -> bool {
    let mut enough = capability;
    if capability == CapabilitySet::BPF || capability == CapabilitySet::PERFMON {
        enough |= CapabilitySet::SYS_ADMIN;
    }
    held.intersects(enough)
}

/// Capabilities that the packet engine needs and this process lacks, as a securityContext names
/// them.
#[must_use]
pub fn missing_capabilities() -> Vec<&'static str> {
    missing_of(effective())
}

fn missing_of(held: CapabilitySet) -> Vec<&'static str> {
    let missing = NEEDED.into_iter().filter(|(capability, _)| !suffice(held, *capability));
    missing.map(|(_, name)| name.trim_start_matches("CAP_")).collect()
}

/// Whether bpf(2) reaches the kernel at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BpfCall {
    /// It does.
    Reaches,
    /// A seccomp profile answers in its place.
    Refused,
    /// The kernel was built without it.
    Missing,
    /// Without CAP_BPF the answer is the same either way.
    Unknown,
}

/// This host, as far as it concerns kernel programs.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) release: String,
    pub(super) kernel: (u32, u32),
    pub(super) capabilities: CapabilitySet,
    pub(super) is_initial_user_namespace: bool,
    /// As in /proc/self/status: 0 none, 1 strict, 2 filter.
    pub(super) seccomp_mode: u32,
    pub(super) bpf_call: BpfCall,
    pub(super) security_modules: Option<String>,
    /// What the security module calls this process: a profile or a context.
    pub(super) security_label: Option<String>,
    pub(super) lockdown: Option<String>,
    pub(super) unprivileged_bpf_disabled: Option<String>,
    pub(super) has_btf: bool,
    /// A mounted bpffs, and whether we may write there.
    pub(super) bpffs: Option<(PathBuf, bool)>,
    pub(super) cgroup2: Option<PathBuf>,
    /// Hard limit in bytes, up to which a process raises its own; `None` for none.
    pub(super) memlock: Option<u64>,
}

impl Host {
    /// Reads everything. What cannot be read counts as absent.
    pub(super) fn read() -> Self {
        let release = rustix::system::uname().release().to_string_lossy().into_owned();
        let kernel = parse_release(&release);
        let capabilities = effective();
        let unprivileged_bpf_disabled = line("/proc/sys/kernel/unprivileged_bpf_disabled");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let bpffs = find_mount(&mounts, "bpf");
        let is_privileged = capabilities.intersects(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN)
            || kernel >= ARGUMENTS_FIRST
            || unprivileged_bpf_disabled.as_deref() == Some("0");
        Self {
            release,
            kernel,
            capabilities,
            is_initial_user_namespace: is_whole_range(&line("/proc/self/uid_map")),
            seccomp_mode: status_field("Seccomp").and_then(|f| f.parse().ok()).unwrap_or(0),
            bpf_call: probe_bpf_call(is_privileged),
            security_modules: line("/sys/kernel/security/lsm"),
            security_label: line("/proc/self/attr/current").filter(|label| label != "unconfined"),
            lockdown: line("/sys/kernel/security/lockdown").and_then(|text| selected(&text)),
            unprivileged_bpf_disabled,
            has_btf: Path::new("/sys/kernel/btf/vmlinux").exists(),
            bpffs: bpffs.map(|path| (path.clone(), is_writable(&path))),
            cgroup2: find_mount(&mounts, "cgroup2"),
            memlock: getrlimit(Resource::Memlock).maximum,
        }
    }

    /// Whether the kernel grants what `capability` stands for.
    pub(super) fn may(&self, capability: CapabilitySet) -> bool {
        suffice(self.capabilities, capability)
    }

    /// Whether RLIMIT_MEMLOCK is in force and cannot be raised.
    pub(super) fn is_memlock_tight(&self) -> bool {
        self.kernel < WITHOUT_MEMLOCK
            && self.memlock.is_some()
            && !self.capabilities.contains(CapabilitySet::SYS_RESOURCE)
    }

    /// A row per fact.
    pub(super) fn rows(&self) -> Vec<Row> {
        let mut rows = vec![self.kernel_row(), self.user_namespace_row()];
        rows.extend(NEEDED.map(|(capability, name)| self.capability_row(capability, name)));
        rows.extend([
            self.sys_admin_row(),
            self.seccomp_row(),
            self.lsm_row(),
            self.lockdown_row(),
            self.unprivileged_row(),
            self.btf_row(),
            self.bpffs_row(),
            self.memlock_row(),
            self.cgroup_row(),
        ]);
        rows
    }

    fn kernel_row(&self) -> Row {
        let release = self.release.clone();
        if self.kernel >= OLDEST {
            return Row::new(KERNEL, Status::Ok, release);
        }
        Row::failed(KERNEL, release, "use engine splice, or a kernel from 5.10 on")
    }

    fn user_namespace_row(&self) -> Row {
        if self.is_initial_user_namespace {
            return Row::new(USER_NAMESPACE, Status::Ok, "the host's");
        }
        Row::failed(
            USER_NAMESPACE,
            "not the host's, so capabilities count for nothing in bpf()",
            "run the pod in the host's user namespace (hostUsers: true)",
        )
    }

    fn capability_row(&self, which: CapabilitySet, name: &'static str) -> Row {
        if self.capabilities.contains(which) {
            Row::new(name, Status::Ok, "effective")
        } else if self.may(which) {
            Row::new(name, Status::NotNeeded, "absent; CAP_SYS_ADMIN includes it")
        } else {
            Row::failed(name, "absent", add_capability(name))
        }
    }

    fn sys_admin_row(&self) -> Row {
        if self.may(CapabilitySet::SYS_ADMIN) {
            return Row::new(CAP_SYS_ADMIN, Status::Ok, "effective");
        }
        Row::failed(
            CAP_SYS_ADMIN,
            "absent; check and the engine's self-test make namespaces of their own with it, the engine \
             does without",
            "add capability SYS_ADMIN while check runs, and take it away afterwards",
        )
    }

    fn seccomp_row(&self) -> Row {
        match (self.bpf_call, self.seccomp_mode) {
            (BpfCall::Refused, _) => {
                Row::failed(SECCOMP, "the profile refuses bpf()", allow_call("bpf"))
            }
            (BpfCall::Missing, mode) if mode > 0 => {
                Row::failed(SECCOMP, "bpf() is not there, or hidden", allow_call("bpf"))
            }
            (_, 0) => Row::new(SECCOMP, Status::Ok, "no profile"),
            (BpfCall::Unknown, _) => Row::new(
                SECCOMP,
                Status::Ok,
                "a profile; without CAP_BPF it cannot be told whether it allows bpf()",
            ),
            _ => Row::new(SECCOMP, Status::Ok, "a profile that allows bpf()"),
        }
    }

    fn lsm_row(&self) -> Row {
        let modules = self.security_modules.as_deref().unwrap_or("cannot be read here");
        let detail = match &self.security_label {
            Some(label) => format!("{modules}; this process is {label:?}"),
            None => modules.to_owned(),
        };
        Row::new(LSM, Status::Ok, detail)
    }

    fn lockdown_row(&self) -> Row {
        match self.lockdown.as_deref() {
            None => Row::new(LOCKDOWN, Status::Ok, "not there"),
            Some("confidentiality") => Row::new(
                LOCKDOWN,
                Status::NotNeeded,
                "confidentiality: programs cannot read kernel memory, which packet does not do",
            ),
            Some(mode) => Row::new(LOCKDOWN, Status::Ok, mode),
        }
    }

    fn unprivileged_row(&self) -> Row {
        let value = self.unprivileged_bpf_disabled.as_deref().unwrap_or("cannot be read");
        let detail = format!("unprivileged_bpf_disabled is {value}; capabilities outrank it");
        Row::new("unprivileged bpf", Status::NotNeeded, detail)
    }

    fn btf_row(&self) -> Row {
        if self.has_btf {
            return Row::new("BTF", Status::Ok, "/sys/kernel/btf/vmlinux");
        }
        Row::new("BTF", Status::NotNeeded, "absent; packet reads no kernel structures")
    }

    fn bpffs_row(&self) -> Row {
        let lacking = |detail: String| Row::new("bpffs", Status::NotNeeded, detail);
        match &self.bpffs {
            Some((path, true)) => Row::new("bpffs", Status::Ok, path.display().to_string()),
            Some((path, false)) => lacking(format!("{} cannot be written", path.display())),
            None => lacking("not mounted; only taking over from an older process needs it".into()),
        }
    }

    fn memlock_row(&self) -> Row {
        let limit = self.memlock.map_or("unlimited".to_owned(), |limit| format!("{limit} bytes"));
        if self.kernel >= WITHOUT_MEMLOCK {
            let detail = format!("{limit}; from 5.11 on maps count for the cgroup");
            return Row::new(MEMLOCK, Status::NotNeeded, detail);
        }
        if self.is_memlock_tight() {
            let remedy = "ulimit -l unlimited, or add capability SYS_RESOURCE";
            return Row::failed(MEMLOCK, limit, remedy);
        }
        Row::new(MEMLOCK, Status::Ok, limit)
    }

    fn cgroup_row(&self) -> Row {
        match &self.cgroup2 {
            Some(path) => Row::new("cgroup v2", Status::Ok, path.display().to_string()),
            None => Row::new("cgroup v2", Status::NotNeeded, "not mounted; packet does without"),
        }
    }

    /// A host where every gate is open.
    #[cfg(test)]
    pub(super) fn privileged() -> Self {
        Self {
            release: "6.18.0".into(),
            kernel: (6, 18),
            capabilities: CapabilitySet::all(),
            is_initial_user_namespace: true,
            seccomp_mode: 0,
            bpf_call: BpfCall::Reaches,
            security_modules: Some("capability,lockdown,apparmor,bpf".into()),
            security_label: None,
            lockdown: Some("none".into()),
            unprivileged_bpf_disabled: Some("2".into()),
            has_btf: true,
            bpffs: Some(("/sys/fs/bpf".into(), true)),
            cgroup2: Some("/sys/fs/cgroup".into()),
            memlock: Some(65536),
        }
    }
}

/// Major and minor number; 0.0 for what is no version.
fn parse_release(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// A file's text, without the end of the line.
fn line(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    let text = text.trim_end_matches(['\n', '\0']).trim();
    (!text.is_empty()).then(|| text.to_owned())
}

/// The bracketed one of `none [integrity] confidentiality`.
fn selected(text: &str) -> Option<String> {
    Some(text.split_once('[')?.1.split_once(']')?.0.to_owned())
}

/// Whether the map of user ids is that of the initial namespace: all of them, onto themselves.
fn is_whole_range(uid_map: &Option<String>) -> bool {
    uid_map.as_ref().is_none_or(|map| map.split_whitespace().eq(["0", "0", "4294967295"]))
}

fn status_field(name: &str) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = |line: &str| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned());
    status.lines().find_map(value)
}

/// The mount point of the first file system of this type in /proc/self/mountinfo (proc(5): the
/// mount point is the fifth field, the type the first after a lone dash).
fn find_mount(mounts: &str, kind: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (head, tail) = line.split_once(" - ")?;
        (tail.split(' ').next()? == kind).then(|| head.split(' ').nth(4).map(PathBuf::from))?
    })
}

fn is_writable(path: &Path) -> bool {
    use rustix::fs::{Access, access};
    access(path, Access::WRITE_OK).is_ok()
}

/// Calls bpf(2) with a size that it refuses before it looks at anything else, so that an answer
/// of E2BIG comes from the kernel itself, and EPERM from a filter in front of it.
fn probe_bpf_call(is_privileged: bool) -> BpfCall {
    const TOO_BIG: usize = 1 << 20;
    // SAFETY: with a size above a page the kernel returns before it reads the (null) pointer; the
    // call changes nothing.
    let status =
        unsafe { libc::syscall(libc::SYS_bpf, 0, std::ptr::null::<libc::c_void>(), TOO_BIG) };
    let error = std::io::Error::last_os_error();
    match error.raw_os_error() {
        _ if status >= 0 => BpfCall::Reaches,
        Some(libc::ENOSYS) => BpfCall::Missing,
        Some(libc::EPERM | libc::EACCES) if is_privileged => BpfCall::Refused,
        Some(libc::EPERM | libc::EACCES) => BpfCall::Unknown,
        _ => BpfCall::Reaches,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_of_distributions_are_understood() {
        assert_eq!(parse_release("5.10.0-32-cloud-amd64"), (5, 10));
        assert_eq!(parse_release("6.18.44-fc-v669"), (6, 18));
        assert_eq!(parse_release("7.0-rc1"), (7, 0));
        assert_eq!(parse_release("unheard of"), (0, 0));
    }

    #[test]
    fn mounts_are_found_by_type_wherever_they_are() {
        let mounts = "24 30 0:22 / /sys rw,nosuid shared:7 - sysfs sysfs rw\n\
             31 24 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
             32 24 0:28 / /run/bpf rw - bpf none rw,mode=700\n";
        assert_eq!(find_mount(mounts, "bpf"), Some("/run/bpf".into()));
        assert_eq!(find_mount(mounts, "cgroup2"), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(find_mount(mounts, "cgroup"), None);
    }

    #[test]
    fn the_lockdown_mode_is_the_bracketed_one() {
        assert_eq!(selected("none [integrity] confidentiality").as_deref(), Some("integrity"));
        assert_eq!(selected("none"), None);
    }

    #[test]
    fn only_the_whole_range_is_the_hosts_user_namespace() {
        assert!(is_whole_range(&Some("0          0 4294967295".into())));
        assert!(!is_whole_range(&Some("0     100000      65536".into())));
    }

    #[test]
    fn sys_admin_does_for_some_of_what_the_engine_needs() {
        assert_eq!(missing_of(CapabilitySet::all()), [""; 0]);
        assert_eq!(missing_of(CapabilitySet::SYS_ADMIN), ["NET_ADMIN", "NET_RAW"]);
        let all = ["BPF", "NET_ADMIN", "NET_RAW", "PERFMON"];
        assert_eq!(missing_of(CapabilitySet::empty()), all);
    }

    #[test]
    fn every_missing_capability_has_a_remedy() {
        let host = Host { capabilities: CapabilitySet::empty(), ..Host::privileged() };
        let rows = host.rows();
        for name in [CAP_BPF, CAP_NET_ADMIN, CAP_NET_RAW, CAP_PERFMON, CAP_SYS_ADMIN] {
            let row = rows.iter().find(|row| row.gate == name).unwrap();
            assert_eq!(row.status, Status::Failed, "{row:?}");
            let short = name.trim_start_matches("CAP_");
            assert!(row.remedy.as_ref().unwrap().contains(short), "{row:?}");
        }
    }

    #[test]
    fn a_profile_that_refuses_bpf_fails_its_row() {
        let host = Host { bpf_call: BpfCall::Refused, seccomp_mode: 2, ..Host::privileged() };
        let row = host.seccomp_row();
        assert_eq!((row.gate, row.status), (SECCOMP, Status::Failed));
    }
}
