//! Attaches the two programs to devices, beside other people's programs.
//!
//! By TCX where the kernel has it, else by filters on a clsact qdisc. Ours come first: a program
//! in front of them could take packets of a switched connection away, or change them.
//!
//! All calls belong to the network namespace of the calling thread.

mod clsact;
mod hook;
mod pins;
mod tcx;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::programs::{ProgramError, SchedClassifier};
use proxy_common::names;
use rustix::io::Errno;
use rustix::net::netdevice::index_to_name;

use self::clsact::Qdisc;
use self::hook::Hook;
use super::devices::{self, Device};
use super::netlink::{Netlink, context};

/// Whether a guard is at work in this network namespace. While no process runs the engine here, it
/// is one that an earlier process has pinned, and with it programs that relay connections. Without
/// CAP_SYS_ADMIN names of programs cannot be read, and any program of the socket lookup counts.
///
/// # Errors
/// The kernel does not tell.
pub fn is_guarded() -> io::Result<bool> {
    let ids = tcx::lookups(std::fs::File::open("/proc/thread-self/ns/net")?)?;
    let name = |id: u32| {
        let all = aya::programs::loaded_programs();
        let found = all.filter_map(Result::ok).find(|program| program.id() == id)?;
        found.name_as_str().map(str::to_owned)
    };
    Ok(ids.into_iter().any(|id| name(id).is_none_or(|name| name == names::GUARD)))
}

/// Why a device got no programs. Nothing on it was changed.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Other people's filters are there and we cannot get in front of them, or the place of the
    /// clsact qdisc is taken by another kind.
    #[error("other filters come first")]
    Shared,
    /// The device went away, or got another name at that moment.
    #[error("the device is gone")]
    Gone,
    /// The object is another version's.
    #[error("the object lacks {0}")]
    Lacking(&'static str),
    /// A program is not loaded, or the kernel refuses to attach it.
    #[error("{0}")]
    Program(#[source] ProgramError),
    /// The kernel refuses something else.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

impl AttachError {
    /// Its name in metrics and logs.
    #[must_use]
    pub fn as_label(&self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Gone => "gone",
            Self::Lacking(_) => "lacking",
            Self::Program(_) => "program",
            Self::Kernel(_) => "kernel",
        }
    }
}

impl From<ProgramError> for AttachError {
    fn from(error: ProgramError) -> Self {
        match &error {
            ProgramError::SyscallError(call) if is_gone(&call.io_error) => Self::Gone,
            _ => Self::Program(error),
        }
    }
}

/// How programs are attached.
#[derive(clap::ValueEnum, Debug, Default, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// By TCX where the kernel has it.
    #[default]
    Best,
    /// By filters on a clsact qdisc, as on kernels before 6.6.
    Clsact,
}

/// One program on one hook.
#[derive(Debug)]
struct Held {
    hook: Hook,
    /// The kernel's number of the program.
    program: u32,
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// Ends when the link is closed, unless it is pinned.
    Tcx { link: OwnedFd, pin: Option<PathBuf> },
    /// Stays until it is removed.
    Filter(clsact::Key),
}

/// Both programs on one device.
#[derive(Debug)]
struct Attachment {
    hooks: [Held; 2],
    /// Nobody but us is known to need the clsact qdisc.
    owns_qdisc: bool,
}

/// What came of [`Attachments::adopt_and_replace`].
#[derive(Debug, Default)]
pub struct Adopted {
    /// Attachments of earlier processes that were removed.
    pub removed: usize,
    /// Devices that got no programs, by index.
    pub failed: Vec<(u32, AttachError)>,
}

/// Where our programs are attached.
///
/// Dropping it takes TCX programs off, except pinned ones; those and clsact filters stay, as they
/// do when the process is killed, until the next process replaces them or [`remove_all`].
#[derive(Debug, Default)]
pub struct Attachments {
    method: Method,
    devices: BTreeMap<u32, Attachment>,
    pins: Option<PathBuf>,
}

impl Attachments {
    /// None yet.
    #[must_use]
    pub fn new(method: Method) -> Self {
        Self { method, ..Self::default() }
    }

    /// Indices of devices that carry our programs, as far as we know.
    pub fn indices(&self) -> impl Iterator<Item = u32> {
        self.devices.keys().copied()
    }

    /// Attaches both programs, which are loaded, in front of all others. On a device that has
    /// them already: does so anew if [`Self::missing`] lists it, else nothing. (Anew means off and
    /// on again: the kernel takes a program only once on a hook.)
    ///
    /// # Errors
    /// See [`AttachError`]; the device is then as it was before, without programs of ours.
    pub fn attach(&mut self, ebpf: &mut Ebpf, device: &Device) -> Result<(), AttachError> {
        let mut netlink = Netlink::open()?;
        if let Some(attachment) = self.devices.get(&device.index) {
            if is_in_place(&mut netlink, device.index, attachment) {
                return Ok(());
            }
            self.detach(device.index)?;
        }
        // The name may have changed since the device was listed; its number never does.
        let name = name(&netlink, device.index)?;
        let by_tcx = match self.method {
            Method::Best => attach_by_tcx(ebpf, &name)?,
            Method::Clsact => None,
        };
        let mut attachment = match by_tcx {
            Some(hooks) => Attachment { hooks, owns_qdisc: false },
            None => attach_by_filters(&mut netlink, ebpf, device.index)?,
        };
        // aya goes by name: had that meant another device, the name would not be back by now.
        if !self::name(&netlink, device.index).is_ok_and(|now| now == name) {
            attachment.remove(&mut netlink, device.index)?;
            return Err(AttachError::Gone);
        }
        if let Some(dir) = &self.pins
            && let Err(error) = attachment.pin(device.index, dir)
        {
            attachment.remove(&mut netlink, device.index)?;
            return Err(error.into());
        }
        self.devices.insert(device.index, attachment);
        Ok(())
    }

    /// Makes attachments outlive the process, those of now and later ones: TCX links by a file
    /// for each in `dir`, which is on a bpffs and belongs to this network namespace alone.
    ///
    /// # Errors
    /// A link cannot be pinned; it stays as it was.
    pub fn pin(&mut self, dir: &Path) -> io::Result<()> {
        self.pins = Some(dir.to_owned());
        for (&index, attachment) in &mut self.devices {
            attachment.pin(index, dir)?;
        }
        Ok(())
    }

    /// For the start of a process: attaches to `devices`, pins if `dir` is given, and then
    /// removes what earlier processes left: links pinned in `dir`, and our filters on every
    /// device. So there is no moment in which no program is attached.
    ///
    /// # Errors
    /// What is left cannot be found or removed. Devices that fail are listed in the result.
    pub fn adopt_and_replace(
        &mut self,
        ebpf: &mut Ebpf,
        devices: &[Device],
        dir: Option<&Path>,
    ) -> io::Result<Adopted> {
        let mut adopted = Adopted::default();
        for device in devices {
            if let Err(error) = self.attach(ebpf, device) {
                adopted.failed.push((device.index, error));
            }
        }
        if let Some(dir) = dir {
            self.pin(dir)?;
            adopted.removed += pins::remove(dir, |path| self.holds_pin(path))?;
        }
        let mut netlink = Netlink::open()?;
        for index in devices::indices(&mut netlink)? {
            adopted.removed +=
                remove_filters(&mut netlink, index, |hook, key| self.holds(index, hook, key))?;
        }
        Ok(adopted)
    }

    /// Devices where one of our programs is no longer attached, or no longer the first. Also
    /// those that cannot be asked. To be called after [`Watch::changed`], which tells of filters
    /// and devices; of TCX programs the kernel sends no word.
    ///
    /// [`Watch::changed`]: super::netlink::Watch::changed
    #[must_use]
    pub fn missing(&self) -> Vec<u32> {
        let Ok(mut netlink) = Netlink::open() else {
            return self.indices().collect();
        };
        let devices = self.devices.iter();
        devices
            .filter(|(index, attachment)| !is_in_place(&mut netlink, **index, attachment))
            .map(|(index, _)| *index)
            .collect()
    }

    /// Removes both programs from a device, and the clsact qdisc if nobody else uses it. Fine if
    /// there are none, or the device is gone.
    ///
    /// # Errors
    /// The kernel refuses. The device counts as one without programs all the same.
    pub fn detach(&mut self, index: u32) -> io::Result<()> {
        match self.devices.remove(&index) {
            Some(attachment) => attachment
                .remove(&mut Netlink::open()?, index)
                .map_err(context(format_args!("programs on device {index}"))),
            None => Ok(()),
        }
    }

    fn holds(&self, index: u32, hook: Hook, key: clsact::Key) -> bool {
        let attachment = self.devices.get(&index);
        attachment.is_some_and(|attachment| {
            let mut hooks = attachment.hooks.iter();
            hooks.any(|held| {
                held.hook == hook && matches!(held.way, Way::Filter(ours) if ours == key)
            })
        })
    }

    fn holds_pin(&self, path: &Path) -> bool {
        let mut hooks = self.devices.values().flat_map(|attachment| &attachment.hooks);
        hooks.any(|held| matches!(&held.way, Way::Tcx { pin: Some(ours), .. } if ours == path))
    }
}

impl Attachment {
    fn pin(&mut self, index: u32, dir: &Path) -> io::Result<()> {
        for held in &mut self.hooks {
            if let Way::Tcx { link, pin: pin @ None } = &mut held.way {
                let path = pins::path(dir, held.hook, index, held.program);
                tcx::pin(link, &path).map_err(context(path.display()))?;
                *pin = Some(path);
            }
        }
        Ok(())
    }

    /// Does all that can be done, and then tells of the first error.
    fn remove(self, netlink: &mut Netlink, index: u32) -> io::Result<()> {
        let mut outcome = Ok(());
        let mut has_filters = false;
        for held in self.hooks {
            outcome = outcome.and(match held.way {
                Way::Tcx { link, pin } => pins::unpin(pin.as_deref()).and(tcx::detach(link)),
                Way::Filter(key) => {
                    has_filters = true;
                    clsact::remove(netlink, index, held.hook, key)
                }
            });
        }
        if has_filters && self.owns_qdisc {
            outcome = outcome.and(clsact::remove_empty_qdisc(netlink, index));
        }
        outcome
    }
}

/// Removes every attachment of ours on every device of this namespace, also those of other
/// processes, dead or alive: links pinned in `dir`, filters, and clsact qdiscs that have no
/// filter left. How many there were. (A TCX link without a pin ends with its process.)
///
/// # Errors
/// The kernel refuses; some may be removed.
pub fn remove_all(dir: Option<&Path>) -> io::Result<usize> {
    let mut removed = dir.map_or(Ok(0), |dir| pins::remove(dir, |_| false))?;
    let mut netlink = Netlink::open()?;
    for index in devices::indices(&mut netlink)? {
        let filters = remove_filters(&mut netlink, index, |_, _| false)?;
        if filters > 0 {
            clsact::remove_empty_qdisc(&mut netlink, index)
                .map_err(context(format_args!("clsact qdisc of device {index}")))?;
        }
        removed += filters;
    }
    Ok(removed)
}

fn attach_by_tcx(ebpf: &mut Ebpf, device: &str) -> Result<Option<[Held; 2]>, AttachError> {
    let mut attach = |hook: Hook| {
        let program = program(ebpf, hook)?;
        let id = program.info()?.id();
        let link = tcx::attach(program, device, hook)?;
        let held = |link| Held { hook, program: id, way: Way::Tcx { link, pin: None } };
        Ok::<_, AttachError>(link.map(held))
    };
    let Some(ingress) = attach(Hook::Ingress)? else {
        return Ok(None);
    };
    // If this fails, the first link closes, and its program is off.
    Ok(attach(Hook::Egress)?.map(|egress| [ingress, egress]))
}

fn attach_by_filters(
    netlink: &mut Netlink,
    ebpf: &mut Ebpf,
    index: u32,
) -> Result<Attachment, AttachError> {
    let qdisc = clsact::qdisc(netlink, index)?;
    if qdisc == Qdisc::Other {
        return Err(AttachError::Shared);
    }
    // Looked at before anything is changed.
    let ingress = priority(netlink, index, Hook::Ingress)?;
    let egress = priority(netlink, index, Hook::Egress)?;
    let made = qdisc == Qdisc::None
        && clsact::add_qdisc(netlink, index)
            .map_err(gone_or_refused("clsact qdisc (RTM_NEWQDISC)"))?;
    let owns_qdisc = made || ingress.is_left || egress.is_left;
    let outcome =
        add_filter(netlink, ebpf, index, Hook::Ingress, ingress.priority).and_then(|one| {
            match add_filter(netlink, ebpf, index, Hook::Egress, egress.priority) {
                Ok(two) => Ok([one, two]),
                Err(error) => {
                    remove_filter(netlink, index, &one)?;
                    Err(error)
                }
            }
        });
    match outcome {
        Ok(hooks) => Ok(Attachment { hooks, owns_qdisc }),
        Err(error) => {
            if made {
                clsact::remove_empty_qdisc(netlink, index)?;
            }
            Err(error)
        }
    }
}

/// Where to put a filter.
struct Place {
    priority: u16,
    /// There is one of an earlier process.
    is_left: bool,
}

fn priority(netlink: &mut Netlink, index: u32, hook: Hook) -> Result<Place, AttachError> {
    // Programs on TCX run before all filters.
    if !tcx::programs(index, hook).map_err(gone_or_refused("BPF_PROG_QUERY"))?.is_empty() {
        return Err(AttachError::Shared);
    }
    let found = clsact::filters(netlink, index, hook)?;
    let priority = clsact::free_priority(&found, hook).ok_or(AttachError::Shared)?;
    Ok(Place { priority, is_left: found.iter().any(|filter| filter.is_ours(hook)) })
}

/// Adds a filter and looks whether it came first.
fn add_filter(
    netlink: &mut Netlink,
    ebpf: &mut Ebpf,
    index: u32,
    hook: Hook,
    priority: u16,
) -> Result<Held, AttachError> {
    let program = program(ebpf, hook)?;
    let id = program.info()?.id();
    let fd = program.fd()?.as_fd();
    let key = clsact::add(netlink, index, hook, priority, fd).map_err(|error| {
        match error.raw_os_error() {
            // The filters belong to a block that several devices share.
            Some(libc::EOPNOTSUPP) => AttachError::Shared,
            _ => gone_or_refused("filter (RTM_NEWTFILTER)")(error),
        }
    })?;
    let held = Held { hook, program: id, way: Way::Filter(key) };
    if clsact::is_first(&clsact::filters(netlink, index, hook)?, hook, key, id) {
        return Ok(held);
    }
    // Somebody was quicker.
    remove_filter(netlink, index, &held)?;
    Err(AttachError::Shared)
}

fn remove_filter(netlink: &mut Netlink, index: u32, held: &Held) -> io::Result<()> {
    match held.way {
        Way::Filter(key) => clsact::remove(netlink, index, held.hook, key),
        Way::Tcx { .. } => Ok(()),
    }
}

/// Removes our filters from a device, except those to keep. How many.
fn remove_filters(
    netlink: &mut Netlink,
    index: u32,
    is_kept: impl Fn(Hook, clsact::Key) -> bool,
) -> io::Result<usize> {
    let mut removed = 0;
    for hook in Hook::ALL {
        let filters = clsact::filters(netlink, index, hook)
            .map_err(context(format_args!("filters of device {index}")))?;
        for filter in filters {
            if filter.is_ours(hook) && !is_kept(hook, filter.key) {
                clsact::remove(netlink, index, hook, filter.key)
                    .map_err(context(format_args!("filter on device {index}")))?;
                removed += 1;
            }
        }
    }
    Ok(removed)
}

fn is_in_place(netlink: &mut Netlink, index: u32, attachment: &Attachment) -> bool {
    attachment.hooks.iter().all(|held| {
        let programs = tcx::programs(index, held.hook);
        match held.way {
            Way::Tcx { .. } => programs.is_ok_and(|ids| ids.first() == Some(&held.program)),
            Way::Filter(key) => {
                programs.is_ok_and(|ids| ids.is_empty())
                    && clsact::filters(netlink, index, held.hook)
                        .is_ok_and(|found| clsact::is_first(&found, held.hook, key, held.program))
            }
        }
    })
}

fn program(ebpf: &mut Ebpf, hook: Hook) -> Result<&mut SchedClassifier, AttachError> {
    let name = hook.program();
    let program = ebpf.program_mut(name).ok_or(AttachError::Lacking(name))?;
    Ok(program.try_into()?)
}

/// The present name of a device. (This ioctl works on any socket.)
fn name(netlink: &Netlink, index: u32) -> Result<String, AttachError> {
    index_to_name(netlink, index)
        .map_err(|error| gone_or_refused("name (SIOCGIFNAME)")(error.into()))
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}

fn gone_or_refused(what: &str) -> impl FnOnce(io::Error) -> AttachError {
    move |error| match is_gone(&error) {
        true => AttachError::Gone,
        false => AttachError::Kernel(context(what)(error)),
    }
}
