//! Which gate is closed: from an error number, and from what is known about this host.
//!
//! The kernel says EPERM for a missing capability, a seccomp profile, a security module and a
//! memory limit alike, so what each of them says about itself decides.

use rustix::thread::CapabilitySet;

use super::facts::{BpfCall, Host};
use super::trial::{Failure, Stage};

// Names of rows, which a closed gate is named by.
pub(super) const KERNEL: &str = "kernel";
pub(super) const USER_NAMESPACE: &str = "user namespace";
pub(super) const CAP_BPF: &str = "CAP_BPF";
pub(super) const CAP_NET_ADMIN: &str = "CAP_NET_ADMIN";
pub(super) const CAP_NET_RAW: &str = "CAP_NET_RAW";
pub(super) const CAP_PERFMON: &str = "CAP_PERFMON";
pub(super) const CAP_SYS_ADMIN: &str = "CAP_SYS_ADMIN";
pub(super) const SECCOMP: &str = "seccomp";
pub(super) const LSM: &str = "security modules";
pub(super) const LOCKDOWN: &str = "lockdown";
pub(super) const MEMLOCK: &str = "memlock";

/// A gate and how to open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Closed {
    pub(super) gate: &'static str,
    pub(super) remedy: String,
}

impl Closed {
    fn new(gate: &'static str, remedy: impl Into<String>) -> Self {
        Self { gate, remedy: remedy.into() }
    }
}

/// How a container gets a capability.
pub(super) fn add_capability(name: &str) -> String {
    let short = name.trim_start_matches("CAP_");
    format!("add capability {short} to the container's securityContext")
}

/// What to do about a seccomp profile that refuses a call.
pub(super) fn allow_call(call: &str) -> String {
    format!(
        "the seccomp profile refuses {call}(): set the container's seccompProfile to one that \
         allows it, or to Unconfined"
    )
}

/// The gate that a failed stage ran into.
pub(super) fn closed(host: &Host, stage: Stage, failure: &Failure) -> Closed {
    match failure.errno() {
        Some(libc::EPERM) => refused(host, stage),
        // The verifier says EACCES, and says more to those with PERFMON.
        Some(libc::EACCES | libc::EINVAL) if stage == Stage::Load && !host.may(PERFMON) => {
            Closed::new(CAP_PERFMON, add_capability(CAP_PERFMON))
        }
        Some(libc::EACCES) if stage != Stage::Load => refused(host, stage),
        Some(libc::ENOSYS) if host.seccomp_mode > 0 => {
            Closed::new(SECCOMP, allow_call(stage.call()))
        }
        Some(libc::ENOMEM) if host.is_memlock_tight() => memlock(),
        _ => Closed::new(KERNEL, stage.kernel_remedy()),
    }
}

/// First kernel that takes SYS_ADMIN for NET_ADMIN wherever bpf() asks for that.
const SYS_ADMIN_DOES: (u32, u32) = (6, 9);

const BPF: CapabilitySet = CapabilitySet::BPF;
const NET_ADMIN: CapabilitySet = CapabilitySet::NET_ADMIN;
const NET_RAW: CapabilitySet = CapabilitySet::NET_RAW;
const PERFMON: CapabilitySet = CapabilitySet::PERFMON;
const SYS_ADMIN: CapabilitySet = CapabilitySet::SYS_ADMIN;

/// EPERM, asked in the order in which the kernel asks: seccomp before the call, capabilities in
/// it, memory when charged, security modules by their hooks.
fn refused(host: &Host, stage: Stage) -> Closed {
    let needs: &[(CapabilitySet, &'static str)] = match stage {
        Stage::RingBuffer => &[(BPF, CAP_BPF)],
        // SYS_ADMIN does not do for the guard's map of sockets.
        Stage::Load if host.kernel < SYS_ADMIN_DOES => {
            &[(BPF, CAP_BPF), (NET_ADMIN, CAP_NET_ADMIN)]
        }
        // To load, unlike to attach, SYS_ADMIN does as well.
        Stage::Load => &[(BPF, CAP_BPF), (NET_ADMIN.union(SYS_ADMIN), CAP_NET_ADMIN)],
        Stage::Namespace => &[(SYS_ADMIN, CAP_SYS_ADMIN)],
        Stage::Attach | Stage::Handshake => &[(NET_ADMIN, CAP_NET_ADMIN)],
        Stage::Relay => &[(NET_RAW, CAP_NET_RAW)],
    };
    if host.bpf_call == BpfCall::Refused && stage != Stage::Namespace {
        return Closed::new(SECCOMP, allow_call("bpf"));
    }
    if let Some((_, name)) = needs.iter().find(|(capability, _)| !host.may(*capability)) {
        return Closed::new(name, add_capability(name));
    }
    if !host.is_initial_user_namespace && stage != Stage::Attach {
        return Closed::new(
            USER_NAMESPACE,
            "run the pod in the host's user namespace (hostUsers: true)",
        );
    }
    if host.is_memlock_tight() {
        return memlock();
    }
    if matches!(stage, Stage::Namespace | Stage::Relay) && host.seccomp_mode > 0 {
        return Closed::new(SECCOMP, allow_call(stage.call()));
    }
    if host.lockdown.as_deref() == Some("confidentiality") {
        return Closed::new(LOCKDOWN, "boot without lockdown=confidentiality");
    }
    Closed::new(
        LSM,
        format!(
            "a security module ({}) refuses {}(): allow it in the profile of this container{}",
            host.security_modules.as_deref().unwrap_or("which, cannot be read here"),
            stage.call(),
            host.security_label.as_deref().map(|l| format!(" (now {l:?})")).unwrap_or_default(),
        ),
    )
}

fn memlock() -> Closed {
    Closed::new(
        MEMLOCK,
        "raise the limit of locked memory (ulimit -l unlimited), or add capability SYS_RESOURCE",
    )
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn gate(host: &Host, stage: Stage, errno: i32) -> &'static str {
        closed(host, stage, &Failure::from(io::Error::from_raw_os_error(errno))).gate
    }

    fn without(capability: CapabilitySet) -> Host {
        let mut host = Host::privileged();
        host.capabilities.remove(capability | SYS_ADMIN);
        host
    }

    #[test]
    fn eperm_names_the_capability_that_the_stage_needs_and_lacks() {
        assert_eq!(gate(&without(BPF), Stage::RingBuffer, libc::EPERM), CAP_BPF);
        assert_eq!(gate(&without(NET_ADMIN), Stage::Load, libc::EPERM), CAP_NET_ADMIN);
        assert_eq!(gate(&without(SYS_ADMIN), Stage::Namespace, libc::EPERM), CAP_SYS_ADMIN);
        assert_eq!(gate(&without(NET_ADMIN), Stage::Attach, libc::EPERM), CAP_NET_ADMIN);
        assert_eq!(gate(&without(PERFMON), Stage::Load, libc::EACCES), CAP_PERFMON);
    }

    #[test]
    fn sys_admin_is_enough_to_load_but_not_to_attach() {
        let mut host = Host::privileged();
        host.capabilities = SYS_ADMIN;
        assert_eq!(gate(&host, Stage::RingBuffer, libc::EPERM), LSM);
        assert_eq!(gate(&host, Stage::Load, libc::EPERM), LSM);
        assert_eq!(gate(&host, Stage::Attach, libc::EPERM), CAP_NET_ADMIN);
        host.kernel = (6, 8);
        assert_eq!(gate(&host, Stage::Load, libc::EPERM), CAP_NET_ADMIN);
    }

    #[test]
    fn seccomp_is_named_before_capabilities() {
        let host = Host { bpf_call: BpfCall::Refused, ..without(BPF) };
        assert_eq!(gate(&host, Stage::RingBuffer, libc::EPERM), SECCOMP);
        let host = Host { seccomp_mode: 2, ..Host::privileged() };
        assert_eq!(gate(&host, Stage::Namespace, libc::EPERM), SECCOMP);
        assert_eq!(gate(&host, Stage::RingBuffer, libc::ENOSYS), SECCOMP);
    }

    #[test]
    fn old_kernels_and_foreign_user_namespaces_and_lockdown_have_their_own_names() {
        let old =
            Host { kernel: (5, 10), memlock: Some(65536), ..without(CapabilitySet::SYS_RESOURCE) };
        let old = Host { capabilities: old.capabilities | SYS_ADMIN, ..old };
        assert_eq!(gate(&old, Stage::RingBuffer, libc::EPERM), MEMLOCK);
        let inner = Host { is_initial_user_namespace: false, ..Host::privileged() };
        assert_eq!(gate(&inner, Stage::Load, libc::EPERM), USER_NAMESPACE);
        let locked = Host { lockdown: Some("confidentiality".into()), ..Host::privileged() };
        assert_eq!(gate(&locked, Stage::Load, libc::EPERM), LOCKDOWN);
        assert_eq!(gate(&Host::privileged(), Stage::Attach, libc::EINVAL), KERNEL);
    }
}
