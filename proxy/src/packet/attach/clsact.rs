//! Filters on a clsact qdisc, for kernels before 6.6. They stay when the process ends.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::super::netlink::{Answer, Body, Netlink, context};
use super::Hook;

/// Length of tcmsg, in bytes.
const TCMSG: usize = 20;

/// TC_H_CLSACT (which is also TC_H_INGRESS): where the qdisc sits.
const QDISC_PARENT: u32 = 0xffff_fff1;
/// Its own number.
const QDISC_HANDLE: u32 = 0xffff_0000;

const ETH_P_ALL: u16 = 3;

/// Priorities of ours, best first. Not 1, if that can be helped: others who want to be first take
/// 1, and a filter of another kind cannot be added to a priority that is in use.
const PRIORITIES: [u16; 2] = [2, 1];

/// The first handle of ours; more than one is taken while a process replaces another.
const HANDLE: u32 = 0x5374_0001;
const HANDLES: u32 = 64;

/// linux/pkt_cls.h, inside TCA_OPTIONS of kind `bpf`.
mod options {
    pub(super) const FD: u16 = 6;
    pub(super) const NAME: u16 = 7;
    pub(super) const FLAGS: u16 = 8;
    pub(super) const ID: u16 = 11;
    pub(super) const DIRECT_ACTION: u32 = 1;
}

/// A filter as the kernel lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) key: Key,
    chain: u32,
    name: String,
    pub(super) program: Option<u32>,
}

/// What a filter is known by, on one hook of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Key {
    priority: u16,
    handle: u32,
}

impl Found {
    /// A filter of ours, of this process or another.
    pub(super) fn is_ours(&self, hook: Hook) -> bool {
        self.name == hook.filter()
    }
}

/// Whether a filter with this program is there, with none but ours in front of it.
pub(super) fn is_first(found: &[Found], hook: Hook, key: Key, program: u32) -> bool {
    let mut first = found.iter().filter(|filter| filter.chain == 0);
    let Some(ours) = first.find(|filter| !filter.is_ours(hook) || filter.key == key) else {
        return false;
    };
    ours.key == key && ours.is_ours(hook) && ours.program == Some(program)
}

/// A priority in front of every filter of others. None if there is no such.
pub(super) fn free_priority(found: &[Found], hook: Hook) -> Option<u16> {
    let others = found.iter().filter(|filter| filter.chain == 0 && !filter.is_ours(hook));
    let front = others.map(|filter| filter.key.priority).min();
    PRIORITIES.into_iter().find(|&ours| front.is_none_or(|front| ours < front))
}

/// All filters on a hook, in the order in which they are asked.
pub(super) fn filters(netlink: &mut Netlink, index: u32, hook: Hook) -> io::Result<Vec<Found>> {
    let body = Body::new(&tcmsg(index, 0, hook.parent(), 0));
    let answers =
        netlink.dump(libc::RTM_GETTFILTER, &body).map_err(context("filters (RTM_GETTFILTER)"))?;
    let answers = answers.iter().filter(|answer| answer.kind == libc::RTM_NEWTFILTER);
    let all: io::Result<Vec<Found>> = answers.map(found).collect();
    // Each priority also has an entry of its own, without handle.
    Ok(all?.into_iter().filter(|filter| filter.key.handle != 0).collect())
}

fn found(answer: &Answer) -> io::Result<Found> {
    let header = Tcmsg::of(answer)?;
    let attributes = answer.attributes(TCMSG);
    let kind = attributes.text(libc::TCA_KIND).unwrap_or_default();
    let (name, program) = match attributes.nest(libc::TCA_OPTIONS) {
        bpf if kind == "bpf" => (bpf.text(options::NAME), bpf.u32(options::ID)),
        _ => (None, None),
    };
    let key = Key { priority: (header.info >> 16) as u16, handle: header.handle };
    let chain = attributes.u32(libc::TCA_CHAIN).unwrap_or_default();
    Ok(Found { key, chain, name: name.unwrap_or_default(), program })
}

/// Adds a filter of ours, by a handle that nobody has. It comes in front of those of the same
/// priority (`cls_bpf_change`).
pub(super) fn add(
    netlink: &mut Netlink,
    index: u32,
    hook: Hook,
    priority: u16,
    program: BorrowedFd<'_>,
) -> io::Result<Key> {
    let mut refusal = io::Error::from(io::ErrorKind::AlreadyExists);
    for handle in HANDLE..HANDLE + HANDLES {
        let key = Key { priority, handle };
        let bpf = Body::default()
            .with_u32(options::FD, program.as_raw_fd() as u32)
            .with_text(options::NAME, hook.filter())
            .with_u32(options::FLAGS, options::DIRECT_ACTION);
        let body = filter(index, hook, key).with_nest(libc::TCA_OPTIONS, bpf);
        let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
        match netlink.request(libc::RTM_NEWTFILTER, flags, &body) {
            Ok(_) => return Ok(key),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => refusal = error,
            Err(error) => return Err(error),
        }
    }
    Err(refusal)
}

/// Removes a filter. Fine if it is gone, with its device or without.
pub(super) fn remove(netlink: &mut Netlink, index: u32, hook: Hook, key: Key) -> io::Result<()> {
    let outcome = netlink.request(libc::RTM_DELTFILTER, 0, &filter(index, hook, key));
    unless_gone(outcome.map(drop)).map_err(context("filter (RTM_DELTFILTER)"))
}

/// What a device has in the place of a clsact qdisc.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Qdisc {
    None,
    Clsact,
    /// The older kind, `ingress`, which has no hook for egress.
    Other,
}

/// What sits there now.
pub(super) fn qdisc(netlink: &mut Netlink, index: u32) -> io::Result<Qdisc> {
    // The list of all devices: asking for one makes the kernel tell everybody who listens for
    // changes (`qdisc_get_notify`).
    let body = Body::new(&tcmsg(index, 0, 0, 0));
    let answers =
        netlink.dump(libc::RTM_GETQDISC, &body).map_err(context("qdiscs (RTM_GETQDISC)"))?;
    for answer in answers.iter().filter(|answer| answer.kind == libc::RTM_NEWQDISC) {
        let header = Tcmsg::of(answer)?;
        if (header.index, header.parent) == (index, QDISC_PARENT) {
            let kind = answer.attributes(TCMSG).text(libc::TCA_KIND);
            let is_clsact = kind.as_deref() == Some("clsact");
            return Ok(if is_clsact { Qdisc::Clsact } else { Qdisc::Other });
        }
    }
    Ok(Qdisc::None)
}

/// Makes the qdisc. False: there is one already.
pub(super) fn add_qdisc(netlink: &mut Netlink, index: u32) -> io::Result<bool> {
    let flags = (libc::NLM_F_CREATE | libc::NLM_F_EXCL) as u16;
    match netlink.request(libc::RTM_NEWQDISC, flags, &clsact(index)) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes the qdisc if no filter of anybody is left on it. (A filter that somebody adds between
/// look and removal goes with it; the kernel knows no such condition.)
pub(super) fn remove_empty_qdisc(netlink: &mut Netlink, index: u32) -> io::Result<()> {
    for hook in Hook::ALL {
        if !filters(netlink, index, hook)?.is_empty() {
            return Ok(());
        }
    }
    if qdisc(netlink, index)? != Qdisc::Clsact {
        return Ok(());
    }
    let outcome = netlink.request(libc::RTM_DELQDISC, 0, &clsact(index));
    unless_gone(outcome.map(drop)).map_err(context("clsact qdisc (RTM_DELQDISC)"))
}

fn unless_gone(outcome: io::Result<()>) -> io::Result<()> {
    match outcome {
        // EINVAL: the qdisc is gone, and with it all its filters.
        Err(error)
            if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::EINVAL)) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn clsact(index: u32) -> Body {
    Body::new(&tcmsg(index, QDISC_HANDLE, QDISC_PARENT, 0)).with_text(libc::TCA_KIND, "clsact")
}

fn filter(index: u32, hook: Hook, key: Key) -> Body {
    let info = u32::from(key.priority) << 16 | u32::from(ETH_P_ALL.to_be());
    Body::new(&tcmsg(index, key.handle, hook.parent(), info)).with_text(libc::TCA_KIND, "bpf")
}

/// What we read of struct tcmsg.
struct Tcmsg {
    index: u32,
    handle: u32,
    parent: u32,
    info: u32,
}

impl Tcmsg {
    fn of(answer: &Answer) -> io::Result<Self> {
        let numbers = answer.header(TCMSG)?[4..].as_chunks::<4>().0;
        let number = |at: usize| u32::from_ne_bytes(numbers[at]);
        Ok(Self { index: number(0), handle: number(1), parent: number(2), info: number(3) })
    }
}

/// struct tcmsg: family and padding, then index, handle, parent, info.
fn tcmsg(index: u32, handle: u32, parent: u32, info: u32) -> [u8; TCMSG] {
    let mut header = [0; TCMSG];
    for (at, number) in [index, handle, parent, info].into_iter().enumerate() {
        header[4 + 4 * at..][..4].copy_from_slice(&number.to_ne_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOOK: Hook = Hook::Ingress;

    fn filter(priority: u16, name: &str, program: u32) -> Found {
        let key = Key { priority, handle: program };
        Found { key, chain: 0, name: name.into(), program: Some(program) }
    }

    #[test]
    fn a_priority_in_front_of_all_others_is_taken() {
        let ours = filter(2, HOOK.filter(), 5);
        let theirs = |priority| filter(priority, "theirs", 6);
        assert_eq!(free_priority(&[], HOOK), Some(2));
        assert_eq!(free_priority(&[ours.clone(), theirs(3)], HOOK), Some(2));
        assert_eq!(free_priority(&[ours, theirs(2)], HOOK), Some(1));
        assert_eq!(free_priority(&[theirs(1)], HOOK), None);
        // Other chains are entered only from a filter in chain 0.
        let elsewhere = Found { chain: 7, ..theirs(1) };
        assert_eq!(free_priority(&[elsewhere], HOOK), Some(2));
    }

    #[test]
    fn only_ones_own_may_be_in_front() {
        let (ours, older) = (filter(2, HOOK.filter(), 5), filter(2, HOOK.filter(), 4));
        let theirs = filter(2, "theirs", 6);
        let key = ours.key;
        let is_first = |found: &[Found]| is_first(found, HOOK, key, 5);
        assert!(is_first(&[ours.clone(), theirs.clone()]));
        assert!(is_first(&[older.clone(), ours.clone()]));
        assert!(is_first(&[Found { chain: 1, ..theirs.clone() }, ours.clone()]));
        assert!(!is_first(&[theirs.clone(), ours.clone()]));
        assert!(!is_first(&[older.clone(), theirs.clone(), ours.clone()]));
        assert!(!is_first(&[older]));
        assert!(!is_first(&[]));
        // Somebody replaced the program, or put his own filter in our place.
        assert!(!is_first(&[Found { program: Some(7), ..ours.clone() }]));
        assert!(!is_first(&[Found { name: "theirs".into(), ..ours }]));
    }
}
